"""What only the chapters use: data, models, training, figures and networks in the page, claims, documents.

Nothing in gradprune imports it.
"""

from gradprune.lab import (
    claims,
    compare,
    data,
    documents,
    experiment,
    figures,
    language,
    live,
    models,
    sliders,
    train,
    zoo,
)
from gradprune.lab.setup import device, start

__all__ = [
    "claims",
    "compare",
    "data",
    "device",
    "documents",
    "experiment",
    "figures",
    "language",
    "live",
    "models",
    "sliders",
    "start",
    "train",
    "zoo",
]

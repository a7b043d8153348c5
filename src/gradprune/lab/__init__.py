"""What only the chapters use: data, models, training, figures, sliders, claims, what the documents print.

Nothing in gradprune imports it.
"""

from gradprune.lab import claims, data, documents, experiment, figures, models, sliders, train, zoo
from gradprune.lab.setup import device, start

__all__ = [
    "claims",
    "data",
    "device",
    "documents",
    "experiment",
    "figures",
    "models",
    "sliders",
    "start",
    "train",
    "zoo",
]

"""What only the chapters use: data, models, training, figures, sliders, claims. Nothing in gradprune imports it."""

from gradprune.lab import claims, data, experiment, figures, models, sliders, train
from gradprune.lab.setup import device, start

__all__ = ["claims", "data", "device", "experiment", "figures", "models", "sliders", "start", "train"]

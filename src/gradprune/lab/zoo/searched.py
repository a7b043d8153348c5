"""Which network did a search find, and can that one be pruned?

The search (Optuna; chapters/experiments/network_search.py) chose depth, width, kernel, activation and rate of a
convolutional network by its validation accuracy on MNIST-1D, with the two tuning seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gradprune.lab import models
from gradprune.lab.zoo import tasks
from gradprune.lab.zoo.base import Architecture

STEPS = 400


@dataclass(frozen=True)
class Design:
    """What the search decides."""

    depth: int
    width: int
    kernel: int
    activation: str
    rate: float

    @classmethod
    def suggested(cls, trial: Any) -> Design:
        """Return the design that an Optuna trial suggests."""
        return cls(
            depth=trial.suggest_int("depth", 1, 3),
            width=trial.suggest_int("width", 8, 32, step=4),
            kernel=trial.suggest_categorical("kernel", [3, 5]),
            activation=trial.suggest_categorical("activation", ["relu", "tanh", "gelu"]),
            rate=float(f"{trial.suggest_float('rate', 0.001, 0.1, log=True):.2g}"),
        )

    def build(self) -> nn.Module:
        """Return the network."""
        return models.conv((40,), channels=[self.width] * self.depth, kernels=self.kernel, activation=self.activation)

    def architecture(self, name: str) -> Architecture:
        """Return the row of this network."""
        return Architecture(
            name,
            claims=("D1-14", "D2-11", "D2-18"),
            data="MNIST-1D",
            metric="accuracy",
            higher=True,
            level=0.85,
            steps=STEPS,
            rate=self.rate,
            rates=(self.rate / 3, self.rate, self.rate * 3),
            build=lambda seed: self.build(),
            task=tasks.mnist1d,
        )


FOUND = Design(depth=2, width=32, kernel=5, activation="gelu", rate=0.037)

ROWS = (FOUND.architecture("found by a search"),)

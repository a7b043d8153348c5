"""Which network do the figures that read digits start from?"""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import nn

from gradprune.lab import data, models, train

WIDTHS = (64, 48, 10)
STEPS = 300


@lru_cache(maxsize=4)
def _trained(steps: int) -> nn.Sequential:
    model = untrained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    train.fit(model, digits(), steps=steps, optimizer=optimizer, batch_size=64, watch=False)
    return model


def untrained() -> nn.Sequential:
    """Return the perceptron as it is initialised; the same numbers at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models.mlp(WIDTHS, activation="relu")


def trained(steps: int = STEPS) -> nn.Sequential:
    """Return a perceptron with 48 hidden units after `steps` steps on the digits; the same numbers at every call."""
    return copy.deepcopy(_trained(steps))


@lru_cache(maxsize=1)
def digits() -> data.Dataset:
    """Return the digits, as every chapter splits them."""
    return data.load("digits")

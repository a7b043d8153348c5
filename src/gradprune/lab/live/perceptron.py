"""Which network do the figures that read digits start from?"""

from __future__ import annotations

import copy
from functools import lru_cache

import torch
from torch import nn

from gradprune.lab import data, models, train

WIDTHS = (64, 48, 10)


@lru_cache(maxsize=1)
def _trained() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.mlp(WIDTHS, activation="relu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    train.fit(model, digits(), steps=300, optimizer=optimizer, batch_size=64, watch=False)
    return model


def trained() -> nn.Sequential:
    """Return a perceptron with 48 hidden units that was trained on the digits; the same numbers at every call."""
    return copy.deepcopy(_trained())


@lru_cache(maxsize=1)
def digits() -> data.Dataset:
    """Return the digits, as every chapter splits them."""
    return data.load("digits")

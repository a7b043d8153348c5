"""What is the same for all methods that chapter 5 compares: networks, data, the dense training and the budget.

A dense network takes STEPS steps of Adam at a rate tuned on validation data, once for each data set and kind of
network. Then each method has CORRECTION further steps, in which the rate falls on a straight line from a share of the
dense one to 0; the share is the method's own, tuned on validation data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from gradprune import lab

STEPS, CORRECTION = 800, 800
RATES = (0.001, 0.003, 0.01)
SHARES = (0.3, 1.0, 3.0, 10.0)
TUNING_SEEDS = [100, 101]


@cache
def data(name: str, seed: int) -> lab.data.Dataset:
    """Return a data set, split by the seed."""
    return lab.data.load(name, seed=seed)


def network(name: str, kind: str, seed: int) -> nn.Module:
    """Return a network before its first step, for "digits" or "mnist1d": "perceptron" or "convolutional"."""
    torch.manual_seed(seed)
    if kind == "perceptron":
        return lab.models.mlp([64 if name == "digits" else 40, 300, 100, 10], "relu")
    return lab.models.conv((8, 8) if name == "digits" else (40,))


def decay(step: int) -> float:
    """Return the rate of a step of the dense training as a share of its peak: it falls in steps, as Renda et al.'s."""
    return 1.0 if step < 0.6 * STEPS else 0.1 if step < 0.85 * STEPS else 0.01


def fit(
    model: nn.Module,
    part: lab.data.Dataset,
    steps: int,
    rate: float,
    shape: Callable[[int], float],
    seed: int,
    *,
    prepare: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
    after_backward: Callable[[int], object] | None = None,
    loss: lab.train.Loss | None = None,
) -> None:
    """Train by Adam; `prepare` may hold masks or let a pruner ride on the optimizer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    prepare(optimizer)
    lab.train.fit(
        model,
        part,
        steps=steps,
        optimizer=optimizer,
        seed=seed,
        watch=False,
        rate=shape,
        loss=loss,
        after_backward=after_backward,
    )


@cache
def best_rate(name: str, kind: str) -> float:
    """Return the rate whose dense networks are best on validation data."""

    def score(rate: float) -> float:
        total = 0.0
        for seed in TUNING_SEEDS:
            model = network(name, kind, seed)
            fit(model, data(name, seed), STEPS, rate, decay, seed)
            total += lab.train.accuracy(model, data(name, seed).validation)
        return total

    return max(RATES, key=score)


@cache
def _dense(name: str, kind: str, seed: int) -> nn.Module:
    model = network(name, kind, seed)
    fit(model, data(name, seed), STEPS, best_rate(name, kind), decay, seed)
    return model


def dense(name: str, kind: str, seed: int) -> nn.Module:
    """Return a copy of the trained dense network of a seed."""
    return copy.deepcopy(_dense(name, kind, seed))


def straight_down(steps: int) -> Callable[[int], float]:
    """Return the shape of a correction's rate: from 1 to 0 over its steps."""
    return lambda step: 1 - step / steps

"""Which networks without memory are pruned: one layer, perceptrons under four optimizers, a convolutional network?"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from gradprune.lab import models
from gradprune.lab.zoo import tasks
from gradprune.lab.zoo.base import Architecture

ACCURACY: dict[str, Any] = {"metric": "accuracy", "higher": True}
ERROR: dict[str, Any] = {"metric": "unexplained share", "higher": False}


def _perceptron(
    optimizer: Literal["sgd", "momentum", "adam", "adamw"], name: str, rate: float, rates: tuple[float, ...]
) -> Architecture:
    return Architecture(
        f"perceptron, {name}",
        claims=("D1-14", "D1-15", "D2-11", "D2-12"),
        data="digits",
        **ACCURACY,
        level=0.94,
        steps=600,
        rate=rate,
        rates=rates,
        build=lambda seed: models.mlp([64, 128, 64, 10]),
        task=tasks.digits,
        optimizer=optimizer,
    )


ROWS = (
    Architecture(
        "one weight",
        claims=("D1-14", "D2-11", "D2-20"),
        data="one number in, one number out",
        **ERROR,
        level=0.1,
        steps=300,
        rate=0.3,
        rates=(0.1, 0.3, 1.0),
        build=lambda seed: nn.Linear(1, 1),
        task=tasks.one_variable,
    ),
    Architecture(
        "one variable's past",
        claims=("D1-14", "D2-11", "D2-20"),
        data="a series, its last 32 values in, the next out",
        **ERROR,
        level=0.7,
        steps=600,
        rate=0.1,
        rates=(0.03, 0.1, 0.3),
        build=lambda seed: nn.Linear(tasks.LAGS, 1),
        task=tasks.own_past,
    ),
    Architecture(
        "linear regression",
        claims=("D1-14", "D2-11", "D2-20"),
        data="64 inputs of which 8 matter, one number out",
        **ERROR,
        level=0.1,
        steps=600,
        rate=0.3,
        rates=(0.1, 0.3, 1.0),
        build=lambda seed: nn.Linear(tasks.INPUTS, 1),
        task=tasks.sparse_line,
    ),
    Architecture(
        "logistic regression",
        claims=("D1-14", "D2-11", "D2-20"),
        data="digits",
        **ACCURACY,
        level=0.92,
        steps=600,
        rate=0.03,
        rates=(0.01, 0.03, 0.1),
        build=lambda seed: nn.Linear(64, 10),
        task=tasks.digits,
    ),
    _perceptron("sgd", "SGD", 1.0, (0.3, 1.0, 3.0)),
    _perceptron("momentum", "momentum", 0.1, (0.03, 0.1, 0.3)),
    _perceptron("adam", "Adam", 0.03, (0.01, 0.03, 0.1)),
    _perceptron("adamw", "AdamW", 0.01, (0.003, 0.01, 0.03)),
    Architecture(
        "convolutional",
        claims=("D0-15", "D1-14", "D1-15", "D2-11", "D2-13"),
        data="digits",
        **ACCURACY,
        level=0.95,
        steps=600,
        rate=0.01,
        rates=(0.003, 0.01, 0.03),
        build=lambda seed: models.conv((8, 8)),
        task=tasks.digits,
    ),
)

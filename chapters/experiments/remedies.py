"""Chapter 1: which remedies let a network of 30 hidden layers learn the digits?

`python chapters/experiments/remedies.py` writes chapters/results/remedies.json; a run that was stopped goes on where it
was.

Each method gets the same network (30 layers of 64), data, batches and number of steps, and its own learning rate: the
one of the same grid with the best mean validation accuracy over two seeds that are not used again. Then ten fresh
seeds, each with its own split, initial weights and batches; the test part is read once, after the last step.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gradprune as gp
from gradprune import lab

DEPTH, WIDTH, STEPS = 30, 64, 500
SEEDS = list(range(10))
TUNING_SEEDS = [100, 101]
RATES = {
    "sgd": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
    "adam": [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03],
}
METHODS: dict[str, dict[str, Any]] = {
    "sigmoid, 2 layers": {"activation": "sigmoid", "depth": 2},
    "sigmoid": {"activation": "sigmoid"},
    "sigmoid, Adam": {"activation": "sigmoid", "optimizer": "adam"},
    "sigmoid, LayerNorm": {"activation": "sigmoid", "normalise": "layer"},
    "sigmoid, BatchNorm": {"activation": "sigmoid", "normalise": "batch"},
    "sigmoid, residual": {"activation": "sigmoid", "skip": True},
    "tanh": {"activation": "tanh"},
    "tanh, Xavier": {"activation": "tanh", "init": "xavier"},
    "tanh, orthogonal": {"activation": "tanh", "init": "orthogonal"},
    "ReLU": {"activation": "relu"},
    "ReLU, He": {"activation": "relu", "init": "he"},
    "ReLU, BatchNorm": {"activation": "relu", "normalise": "batch"},
    "ReLU, residual": {"activation": "relu", "skip": True},
}


def build(method: str, seed: int) -> torch.nn.Sequential:
    """Return the network of `method` as it is before the first step."""
    torch.manual_seed(seed)
    options = {key: value for key, value in METHODS[method].items() if key not in ("depth", "optimizer")}
    depth = METHODS[method].get("depth", DEPTH)
    return lab.models.mlp([64] + [WIDTH] * depth + [10], **options)


def train(method: str, rate: float, seed: int) -> tuple[torch.nn.Sequential, lab.data.Dataset]:
    """Train one network; return it and its data."""
    data = lab.data.load("digits", seed=seed)
    model = build(method, seed)
    kind = METHODS[method].get("optimizer", "sgd")
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[kind](model.parameters(), lr=rate)
    lab.train.fit(model, data, steps=STEPS, optimizer=optimizer, seed=seed, watch=False)
    return model, data


def first_gradient(method: str, seed: int) -> float:
    """Return log10 of the norm of the first weight matrix's gradient before training."""
    data = lab.data.load("digits", seed=seed)
    model = build(method, seed)
    loss = torch.nn.functional.cross_entropy(model(data.train.x), data.train.y)
    return math.log10(gp.gradient_norms(model, loss)["0.linear.weight"])


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Tune one method on validation data, then report it on test data."""
    method = cell["method"]
    rates = RATES[METHODS[method].get("optimizer", "sgd")]
    return lab.train.tune_and_report(partial(train, method), rates, tuning_seeds=TUNING_SEEDS, seeds=SEEDS)


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/remedies.json"),
        [{"method": method} for method in METHODS],
        measure,
        seeds=SEEDS,
        about=f"digits, {DEPTH} hidden layers of {WIDTH}, {STEPS} steps; accuracy on test data",
    )

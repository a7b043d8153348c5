"""Chapter 1: from which initial weight scales does a network of 20 hidden layers learn the digits?

`python chapters/experiments/initial_scale.py` writes chapters/results/initial_scale.json; a run that was stopped goes
on where it was.

The scale is what is set: of one seed, all scales have the same normal draws, multiplied by scale / sqrt(inputs), the
same split, zero biases and the same batches. Each activation and scale has its own learning rate, the one of the same
grid with the best mean validation accuracy over two seeds that are not used again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradprune import lab

DEPTH, WIDTH, STEPS = 20, 64, 300
SEEDS = list(range(10))
TUNING_SEEDS = [100, 101]
RATES = [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
ACTIVATIONS = ["tanh", "relu"]
SCALES = [0.5, 0.71, 1.0, 1.41, 2.0, 2.83]  # steps of the square root of 2


def build(activation: str, scale: float, seed: int) -> torch.nn.Sequential:
    """Return the network before the first step."""
    torch.manual_seed(seed)
    return lab.models.mlp([64] + [WIDTH] * DEPTH + [10], activation, init="lecun", gain=scale)


def train(activation: str, scale: float, rate: float, seed: int) -> tuple[torch.nn.Sequential, lab.data.Dataset]:
    """Train one network; return it and its data."""
    data = lab.data.load("digits", seed=seed)
    model = build(activation, scale, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    lab.train.fit(model, data, steps=STEPS, optimizer=optimizer, seed=seed, watch=False)
    return model, data


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Tune one activation and scale on validation data, then report it on test data."""
    tried = partial(train, cell["activation"], cell["scale"])
    return lab.train.tune_and_report(tried, RATES, tuning_seeds=TUNING_SEEDS, seeds=SEEDS)


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/initial_scale.json"),
        [{"activation": activation, "scale": scale} for activation in ACTIVATIONS for scale in SCALES],
        measure,
        seeds=SEEDS,
        about=f"digits, {DEPTH} hidden layers of {WIDTH}, {STEPS} steps of SGD; accuracy on test data",
    )

"""Chapter 3: does removing small weights cure vanishing gradients?

`python chapters/experiments/pruned_depth.py` writes chapters/results/pruned_depth.json; a run that was stopped goes on
where it was.

The networks, data, steps, learning rates and seeds are those of chapter 1's remedies, and so is the protocol; the
smallest weights of every layer are removed before training and held at zero.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import remedies
import torch

import gradprune as gp
from gradprune import lab

CELLS = [("sigmoid", 0.5), ("tanh", 0.5), ("ReLU", 0.5), ("tanh, orthogonal", 0.5)]


def build(method: str, sparsity: float, seed: int) -> tuple[torch.nn.Sequential, gp.Masks]:
    """Return the network of a remedy, pruned before the first step, and its masks."""
    model = remedies.build(method, seed)
    return model, gp.prune(model, sparsity=sparsity, scope="layer")


def train(
    method: str, sparsity: float, rate: float, seed: int, *, seen: dict[int, float]
) -> tuple[torch.nn.Sequential, lab.data.Dataset]:
    """Train one pruned network; return it and its data, and leave its last losses' mean in `seen`."""
    data = lab.data.load("digits", seed=seed)
    model, masks = build(method, sparsity, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with masks.hold(optimizer):
        history = lab.train.fit(model, data, steps=remedies.STEPS, optimizer=optimizer, seed=seed, watch=False)
    seen[seed] = float(np.mean(history.losses[-50:]))
    return model, data


def first_gradient(method: str, sparsity: float, seed: int) -> float:
    """Return log10 of the norm of the first weight matrix's gradient before training, pruned weights left out."""
    data = lab.data.load("digits", seed=seed)
    model, masks = build(method, sparsity, seed)
    torch.nn.functional.cross_entropy(model(data.train.x), data.train.y).backward()
    masks.apply_(model)
    name = "0.linear.weight"
    with torch.no_grad():
        model[0].linear.weight.grad *= masks[name]
    return math.log10(gp.gradient_norms(model)[name])


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Tune one network on validation data, then report it on test data."""
    seen: dict[int, float] = {}
    run = partial(train, cell["method"], cell["sparsity"], seen=seen)
    reported = lab.train.tune_and_report(
        run, remedies.RATES["sgd"], tuning_seeds=remedies.TUNING_SEEDS, seeds=remedies.SEEDS
    )
    return reported | {"loss": [round(seen[seed], 4) for seed in remedies.SEEDS]}


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/pruned_depth.json"),
        [{"method": method, "sparsity": sparsity} for method, sparsity in CELLS],
        measure,
        seeds=remedies.SEEDS,
        about=f"digits, {remedies.DEPTH} hidden layers of {remedies.WIDTH}, {remedies.STEPS} steps, the smallest "
        "weights of each layer removed before training; accuracy on test data, loss over the last 50 steps",
    )

"""Chapter 1, exercise 3: does training move a ReLU network's factor a layer toward one?

`python chapters/experiments/trained_factor.py` writes chapters/results/trained_factor.json; a run that was stopped goes
on where it was.

He's first weights, the learning rate and the steps of initial_scale.py. The factor is the mean over the layers, by the
logarithm, of what each multiplies the gradient's norm by, on 256 examples in double precision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import initial_scale
import torch
from torch.nn import functional

from gradprune import lab

SEEDS = list(range(10))
RATE = 0.03  # initial_scale's for relu at 1.41


def factor(model: torch.nn.Sequential, split: lab.data.Split) -> float:
    """Return by what a hidden layer multiplies the gradient's norm on its way down."""
    kept, a = [], split.x[:256].double()
    for layer in model.double()[:-1]:
        kept.append(layer.linear(a))
        a = layer.activation(kept[-1])
    loss = functional.cross_entropy(model[-1](a), split.y[:256])
    norms = [grad.norm().item() for grad in torch.autograd.grad(loss, kept)]
    return (norms[0] / norms[-1]) ** (1 / (len(norms) - 1))


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Train one network; measure its factor before and after."""
    fresh = initial_scale.build("relu", 2**0.5, cell["seed"])
    model, data = initial_scale.train("relu", 2**0.5, RATE, cell["seed"])
    accuracy = lab.train.accuracy(model, data.test)
    before, after = factor(fresh, data.train), factor(model, data.train)
    return {"before": round(before, 4), "after": round(after, 4), "accuracy": round(accuracy, 4)}


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/trained_factor.json"),
        [{"seed": seed} for seed in SEEDS],
        measure,
        seeds=SEEDS,
        about="digits, 20 ReLU layers of 64, 300 steps of SGD; mean factor a layer, accuracy on test data",
    )

"""Chapter 3: which fraction of a real gradient lies above a multiple of its mean?

`python chapters/experiments/gradient_tails.py` writes chapters/results/gradient_tails.json; a run that was stopped goes
on where it was.

The weight gradients of document 1's network, layers of 64, 32 and 10 units, on the first 128 training examples, before
training and after 300 steps of Adam; a threshold for each matrix, the fraction counted over all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import gradprune as gp
from gradprune import lab

SEEDS = list(range(5))
RATIOS = [0.25, 0.5, 1.0, 2.0, 3.0]
RATE = 0.003


def gradients(dataset: str, steps: int, seed: int) -> list[Tensor]:
    """Return the gradients of the weight matrices after so many steps."""
    data = lab.data.load(dataset, seed=seed)
    torch.manual_seed(seed)
    model = lab.models.mlp([data.features, 64, 32, 10], "relu")
    if steps:
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        lab.train.fit(model, data, steps=steps, optimizer=optimizer, seed=seed, watch=False)
    model.zero_grad()
    functional.cross_entropy(model(data.train.x[:128]), data.train.y[:128]).backward()
    return [p.grad for p in model.parameters() if p.ndim == 2 and p.grad is not None]


def survives(tensors: list[Tensor], ratio: float) -> float:
    """Return the fraction kept, counted over all tensors, by the package's own function."""
    holders = [torch.nn.Parameter(torch.zeros_like(t)) for t in tensors]
    for holder, tensor in zip(holders, tensors, strict=True):
        holder.grad = tensor.clone()
    return gp.threshold_gradients_(holders, ratio=ratio)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the fractions kept at each ratio, one a seed."""
    found = [gradients(cell["data"], cell["steps"], seed) for seed in SEEDS]
    return {"kept": [[round(survives(g, ratio), 4) for g in found] for ratio in RATIOS]}


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/gradient_tails.json"),
        [{"data": data, "steps": steps} for data in ("digits", "mnist1d") for steps in (0, 300)],
        measure,
        seeds=SEEDS,
        about="layers of 64, 32, 10 units, Adam; fraction of weight gradients of at least a ratio times the mean of "
        f"their matrix, ratios {RATIOS}",
    )

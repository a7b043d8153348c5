"""Chapter 3: what do networks lose whose weights with small gradients are removed, against training on as long?

`python chapters/experiments/gradient_pruned.py` writes chapters/results/gradient_pruned.json; a run that was stopped
goes on where it was.

Document 1's network, layers of 64, 32 and 10 units, trained by Adam at the rate that chapter 3's thresholds experiment
chose for it. Then weights go whose score is below half of their tensor's mean |gradient|, document 1's rule, on the
weights instead of in their place; the other scores remove as many of each tensor. All train on for the same steps, and
so does the network that keeps all its weights.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from gradient_thresholds import FINE_TUNING, STEPS, build
from torch import nn

import gradprune as gp
from gradprune import lab

SEEDS = list(range(10))
RATES = {"digits": 0.003, "mnist1d": 0.01}
SCORES = ["none", "gradient", "taylor", "magnitude", "random"]


@cache
def dense(name: str, seed: int) -> tuple[nn.Sequential, lab.data.Dataset]:
    """Return the trained network and its data."""
    data = lab.data.load(name, seed=seed)
    model = build(data, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATES[name])
    lab.train.fit(model, data, steps=STEPS, optimizer=optimizer, seed=seed, watch=False)
    return model, data


def prune(model: nn.Module, data: lab.data.Dataset, score: str, seed: int) -> gp.Masks:
    """Remove what the gradient's rule removes of each tensor, chosen by `score`."""
    looked_at = {"batches": [(data.train.x, data.train.y)], "loss": nn.functional.cross_entropy}
    by_gradient = gp.gradient(model, **looked_at)
    share = {name: float((g < 0.5 * g.mean()).float().mean()) for name, g in by_gradient.items() if g.ndim > 1}
    scores = {
        "gradient": partial(gp.gradient, **looked_at),
        "taylor": partial(gp.taylor, **looked_at),
        "magnitude": gp.magnitude,
        "random": partial(gp.random, generator=lab.train.lots(seed)),
    }
    return gp.prune(model, scores[score], scope=share, min_keep=0)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy of one network: dense, pruned, and after training on."""
    seed = cell["seed"]
    trained, data = dense(cell["data"], seed)
    model = copy.deepcopy(trained)
    found = {"dense": round(lab.train.accuracy(model, data.test), 4)}
    optimizer = torch.optim.Adam(model.parameters(), lr=RATES[cell["data"]])
    if cell["score"] != "none":
        masks = prune(model, data, cell["score"], seed)
        masks.hold(optimizer)
        found |= {"sparsity": round(masks.sparsity, 4), "pruned": round(lab.train.accuracy(model, data.test), 4)}
    lab.train.fit(model, data, steps=FINE_TUNING, optimizer=optimizer, seed=seed + 1000, watch=False)
    return found | {"trained on": round(lab.train.accuracy(model, data.test), 4)}


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/gradient_pruned.json"),
        [{"data": d, "seed": seed, "score": score} for d in RATES for seed in SEEDS for score in SCORES],
        measure,
        seeds=SEEDS,
        about=f"layers of 64, 32, 10 units, {STEPS} steps of Adam, pruned, {FINE_TUNING} steps more; test accuracy",
    )

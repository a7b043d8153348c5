"""Chapter 1: does one change make a network of 20 hidden layers learn that does not?

`python chapters/experiments/stalled.py` writes chapters/results/stalled.json; a run that was stopped goes on where it
was.

Each fault is measured as it is and with one thing changed, with the same data, first random draws, batches, learning
rate and number of steps, for ten seeds; the rates are not tuned. The test part is read once, after the last step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gradprune import lab

DEPTH, WIDTH, STEPS = 20, 64, 200
SEEDS = list(range(10))
# A network and its optimizer; then what the change makes of them.
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small factor": ({"activation": "sigmoid", "rate": 0.5}, {"normalise": "batch"}),
    "below epsilon": ({"activation": "gelu", "optimizer": "adam", "rate": 0.001}, {"eps": 1e-16}),
    "dead units": ({"activation": "relu", "init": "he", "rate": 0.01, "bias": -1.0}, {"bias": 0.0}),
}


def build(setting: dict[str, Any], seed: int) -> torch.nn.Sequential:
    """Return the network of `setting` before the first step."""
    torch.manual_seed(seed)
    options = {name: setting[name] for name in ("activation", "init", "normalise") if name in setting}
    model = lab.models.mlp([64] + [WIDTH] * DEPTH + [10], **options)
    for layer in model[:-1] if "bias" in setting else []:
        torch.nn.init.constant_(layer.linear.bias, setting["bias"])
    return model


def optimizer(model: torch.nn.Module, setting: dict[str, Any]) -> torch.optim.Optimizer:
    """Return the optimizer of `setting`."""
    if setting.get("optimizer") == "adam":
        return torch.optim.Adam(model.parameters(), lr=setting["rate"], eps=setting.get("eps", 1e-8))
    return torch.optim.SGD(model.parameters(), lr=setting["rate"])


def setting(fault: str, changed: bool) -> dict[str, Any]:
    """Return what the network and the optimizer of `fault` are, as it is or with the one change."""
    as_it_is, change = FAULTS[fault]
    return as_it_is | change if changed else as_it_is


def accuracy(fault: str, changed: bool, seed: int) -> float:
    """Train one network; return its accuracy on test data."""
    data, wanted = lab.data.load("digits", seed=seed), setting(fault, changed)
    model = build(wanted, seed)
    lab.train.fit(model, data, steps=STEPS, optimizer=optimizer(model, wanted), seed=seed, watch=False)
    return round(lab.train.accuracy(model, data.test), 4)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Train the networks of one row, a seed each."""
    return {"accuracy": [accuracy(cell["fault"], cell["changed"], seed) for seed in SEEDS]}


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/stalled.json"),
        [{"fault": fault, "changed": changed} for fault in FAULTS for changed in (False, True)],
        measure,
        seeds=SEEDS,
        about=f"digits, {DEPTH} hidden layers of {WIDTH}, {STEPS} steps; accuracy on test data",
    )

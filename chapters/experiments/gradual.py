"""Chapter 5: does it pay to prune a little at a time?

`python chapters/experiments/gradual.py` writes chapters/results/gradual.json; a run that was stopped goes on where it
was.

Every method starts from the same trained networks and has the same number of further steps, with one shape of the
learning rate whose peak is tuned for each method on validation data (`protocol.py`, as in `peers.py`). What differs is
when the weights go: all at the start, all at 60 % of the steps, or little by little until then, on a straight line or
on the cubic schedule of Zhu and Gupta (2017).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import protocol
import torch
from protocol import CORRECTION, SHARES, TUNING_SEEDS, straight_down
from torch import nn

import gradprune as gp
from gradprune import lab

SEEDS = list(range(5))
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
TUNED_AT = 0.95
END, EVERY = int(0.6 * CORRECTION), 20
METHODS: dict[str, Callable[[float], Callable[[int], float]]] = {
    "one shot, at the start": gp.OneShot,
    "one shot, at 60 %": lambda s: gp.OneShot(s, at=END),
    "linear": lambda s: gp.Linear(s, 0, END, every=EVERY),
    "cubic": lambda s: gp.Cubic(s, 0, END, every=EVERY),
}
NETWORKS = [("digits", "perceptron"), ("mnist1d", "perceptron"), ("mnist1d", "convolutional")]


def corrected(cell: dict[str, Any], share: float, seed: int) -> tuple[nn.Module, lab.data.Dataset]:
    """Prune one dense network while it trains on; return it and its data."""
    name, kind = cell["data"], cell["network"]
    part, model = protocol.data(name, seed), protocol.dense(name, kind, seed)
    schedule = METHODS[cell["method"]](cell["sparsity"])

    def ride(optimizer: torch.optim.Optimizer) -> None:
        gp.Pruner(model, optimizer, schedule)

    rate = share * protocol.best_rate(name, kind)
    protocol.fit(model, part, CORRECTION, rate, straight_down(CORRECTION), 1000 + seed, prepare=ride)
    return model, part


@cache
def best_share(name: str, kind: str, method: str) -> float:
    """Return the share of the dense rate that a method's networks are best with on validation data."""
    cell = {"data": name, "network": kind, "method": method, "sparsity": TUNED_AT}

    def score(share: float) -> float:
        runs = [corrected(cell, share, seed) for seed in TUNING_SEEDS]
        return sum(lab.train.accuracy(model, part.validation) for model, part in runs)

    return max(SHARES, key=score)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one way at one sparsity."""
    share = best_share(cell["data"], cell["network"], cell["method"])
    runs = [corrected(cell, share, seed) for seed in SEEDS]
    schedule = METHODS[cell["method"]](cell["sparsity"])
    return {
        "accuracy": [round(lab.train.accuracy(model, part.test), 4) for model, part in runs],
        "share of the dense rate": share,
        "of the way": {str(at): round(schedule(int(at * END)) / cell["sparsity"], 4) for at in (0.25, 0.5, 0.75)},
    }


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/gradual.json"),
        [
            {"data": name, "network": kind, "method": method, "sparsity": sparsity}
            for name, kind in NETWORKS
            for method in METHODS
            for sparsity in SPARSITIES
        ],
        measure,
        seeds=SEEDS,
        about=f"{CORRECTION} steps after the dense training; accuracy on test data",
    )

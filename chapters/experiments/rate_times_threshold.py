"""Chapter 3: with error feedback, is it the threshold that harms, or the threshold times the learning rate?

`python chapters/experiments/rate_times_threshold.py` writes chapters/results/rate_times_threshold.json; a run that was
stopped goes on where it was.

Document 1's network on the digits, by gradient descent at three rates, with two thresholds and with none, every
threshold with error feedback. Nothing is chosen here: each rate and each threshold is a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gradient_thresholds import STEPS, build

import gradprune as gp
from gradprune import lab

SEEDS = list(range(6))
RATES, THRESHOLDS = [0.1, 0.3, 1.0], [0.0, 0.1, 0.3]


def accuracy(rate: float, threshold: float, seed: int) -> float:
    """Train one network; return its test accuracy."""
    data = lab.data.load("digits", seed=seed)
    model = build(data, seed)
    waiting = gp.ErrorFeedback(model, threshold=threshold)
    send = (lambda at: waiting.step()) if threshold else None
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    lab.train.fit(model, data, steps=STEPS, optimizer=optimizer, seed=seed, watch=False, after_backward=send)
    return round(lab.train.accuracy(model, data.test), 4)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the test accuracies, one a seed."""
    return {"accuracy": [accuracy(cell["rate"], cell["threshold"], seed) for seed in SEEDS]}


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/rate_times_threshold.json"),
        [{"rate": rate, "threshold": threshold} for rate in RATES for threshold in THRESHOLDS],
        measure,
        seeds=SEEDS,
        about=f"digits, layers of 64, 32, 10 units, {STEPS} steps of gradient descent; test accuracy, a value a seed",
    )

"""Chapter 3: with error feedback, is it the threshold that harms, or the threshold times the learning rate?

`python chapters/experiments/rate_times_threshold.py` writes chapters/results/rate_times_threshold.json; a run that was
stopped goes on where it was.

Document 1's network on the digits, by gradient descent at three rates, with two thresholds and with none, every
threshold with error feedback. Nothing is chosen here: each rate and each threshold is a row. Some networks end at
guessing; so a row has, for each seed, the share of the last hidden layer's outputs on test data that are exactly zero.
In double precision: in single, two processors' roundings break different networks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gradient_thresholds import STEPS, build

import gradprune as gp
from gradprune import lab

SEEDS = list(range(20))
RATES, THRESHOLDS = [0.1, 0.3, 1.0], [0.0, 0.1, 0.3]


def trained(rate: float, threshold: float, seed: int) -> tuple[float, float]:
    """Train one network; return its test accuracy and the share of the last hidden layer's outputs that are zero."""
    data = lab.data.load("digits", seed=seed)
    data = replace(data, **{part: getattr(data, part).double() for part in ("train", "validation", "test")})
    model = build(data, seed).double()
    waiting = gp.ErrorFeedback(model, threshold=threshold) if threshold else None
    send = (lambda at: waiting.step()) if waiting else None
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    lab.train.fit(model, data, steps=STEPS, optimizer=optimizer, seed=seed, watch=False, after_backward=send)
    with torch.no_grad():
        zero = (model[:-1](data.test.x) == 0).double().mean().item()
    return round(lab.train.accuracy(model, data.test), 4), round(zero, 4)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the test accuracies and the shares of zero outputs, one a seed."""
    accuracies, zeros = zip(*(trained(cell["rate"], cell["threshold"], seed) for seed in SEEDS), strict=True)
    return {"accuracy": list(accuracies), "zeros": list(zeros)}


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/rate_times_threshold.json"),
        [{"rate": rate, "threshold": threshold} for rate in RATES for threshold in THRESHOLDS],
        measure,
        seeds=SEEDS,
        about=f"digits, layers of 64, 32, 10 units, {STEPS} steps of gradient descent; a value a seed: test accuracy, "
        "and the share of the last hidden layer's outputs that are zero",
    )

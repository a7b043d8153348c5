"""Chapter 3: what does training do when small gradients are set to zero, with and without error feedback?

`python chapters/experiments/gradient_thresholds.py` writes chapters/results/gradient_thresholds.json; a run that was
stopped goes on where it was.

The network is that of document 1: layers of 64, 32 and 10 units. Each method gets the same number of steps and its own
learning rate, chosen of one grid on validation data with five seeds that are not used again: with two, a rate at which
one run in five breaks was chosen too often.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gradprune as gp
from gradprune import lab

STEPS, WINDOW = 600, 30
FINE_TUNING = 200
SEEDS = list(range(5))
TUNING_SEEDS = [100, 101, 102, 103, 104]
RATES = {"SGD": [0.1, 0.3, 1.0], "Adam": [0.001, 0.003, 0.01]}
GROWING = 0.1  # the last threshold; it grows from 0 in equal steps


def growing(step: int) -> float:
    """Return the growing threshold at a step."""
    return GROWING * step / STEPS


RULES: dict[str, dict[str, Any]] = {
    "plain": {"threshold": 0.0},
    **{f"fixed {value}": {"threshold": value} for value in (0.003, 0.01, 0.03, 0.1)},
    f"growing to {GROWING}": {"threshold": growing},
    "ratio 0.5": {"ratio": 0.5},
    "ratio 1": {"ratio": 1.0},
    "ratio 2": {"ratio": 2.0},
}
METHODS = [("SGD", name, False) for name in list(RULES)[:6]]
METHODS += [("SGD", name, True) for name in list(RULES)[2:6]]
METHODS += [("Adam", name, False) for name in ("plain", "ratio 0.5", "ratio 1", "ratio 2")]
METHODS += [("Adam", "ratio 2", True)]


def build(data: lab.data.Dataset, seed: int) -> nn.Sequential:
    """Return document 1's network before training: 64, 32 and 10 units."""
    torch.manual_seed(seed)
    return lab.models.mlp([data.features, 64, 32, 10], "relu")


def thin(model: nn.Module, rule: str, feedback: bool) -> Callable[[int], float]:
    """Return what is to be called with the step after each backward pass; it returns the fraction kept."""
    given = RULES[rule]
    if feedback:
        waiting = gp.ErrorFeedback(model, **given)
        return lambda step: waiting.step()
    now = {name: value if callable(value) else (lambda step, value=value: value) for name, value in given.items()}
    return lambda step: gp.threshold_gradients_(model, **{name: value(step) for name, value in now.items()})


def train(
    dataset: str, optimizer: str, rule: str, feedback: bool, rate: float, seed: int, *, seen: dict[int, Any]
) -> tuple[nn.Sequential, lab.data.Dataset]:
    """Train one network; return it and its data, and leave in `seen` what was seen on the way."""
    data = lab.data.load(dataset, seed=seed)
    model = build(data, seed)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    steps = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[optimizer](model.parameters(), lr=rate)
    kept: list[float] = []
    step = thin(model, rule, feedback)
    history = lab.train.fit(
        model,
        data,
        steps=STEPS,
        optimizer=steps,
        seed=seed,
        watch=False,
        after_backward=lambda at: kept.append(step(at)),
    )
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    last = max((at + 1 for at, share in enumerate(kept) if share), default=0)
    seen[seed] = {
        "loss": windows(history.losses),
        "kept": windows(kept),
        "last_update": last,
        "zeros": int((after == 0).sum()),
        "never_moved": int((after == before).sum()),
        "entries": after.numel(),
    }
    return model, data


def windows(values: list[float]) -> list[float]:
    """Return the means over windows of steps, to four digits."""
    return [float(f"{np.mean(values[at : at + WINDOW]):.4g}") for at in range(0, len(values), WINDOW)]


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Tune one method on validation data, then report it on test data."""
    seen: dict[int, Any] = {}
    run = partial(train, cell["data"], cell["optimizer"], cell["rule"], cell["feedback"], seen=seen)
    reported = lab.train.tune_and_report(run, RATES[cell["optimizer"]], tuning_seeds=TUNING_SEEDS, seeds=SEEDS)
    return reported | {key: [seen[seed][key] for seed in SEEDS] for key in seen[SEEDS[0]]}


def prune_after(cell: dict[str, Any], rate: float) -> dict[str, Any]:
    """Train by plain Adam, then remove weights where |score| is below half its tensor's mean |gradient score|.

    The rule is document 1's, on the weights instead of in their place; magnitude and chance remove as many of each
    tensor. All fine-tune for the same number of steps. Test accuracy: dense, pruned, fine-tuned.
    """
    results: dict[str, list[float]] = {"sparsity": [], "dense": [], "pruned": [], "accuracy": []}
    for seed in SEEDS:
        model, data = train(cell["data"], "Adam", "plain", False, rate, seed, seen={})
        results["dense"].append(round(lab.train.accuracy(model, data.test), 4))
        batch = [(data.train.x, data.train.y)]
        by_gradient = gp.gradient(model, batch, nn.functional.cross_entropy)
        share = {name: float((g < 0.5 * g.mean()).float().mean()) for name, g in by_gradient.items() if g.ndim > 1}
        score = {
            "gradient": partial(gp.gradient, batches=batch, loss=nn.functional.cross_entropy),
            "taylor": partial(gp.taylor, batches=batch, loss=nn.functional.cross_entropy),
            "magnitude": gp.magnitude,
            "random": partial(gp.random, generator=lab.train.lots(seed)),
        }[cell["score"]]
        masks = gp.prune(model, score, scope=share, min_keep=0)
        results["sparsity"].append(round(masks.sparsity, 4))
        results["pruned"].append(round(lab.train.accuracy(model, data.test), 4))
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        with masks.hold(optimizer):
            lab.train.fit(model, data, steps=FINE_TUNING, optimizer=optimizer, seed=seed + 1000, watch=False)
        results["accuracy"].append(round(lab.train.accuracy(model, data.test), 4))
    return results | {"learning_rate": rate}


if __name__ == "__main__":
    lab.start(0)
    path = Path("chapters/results/gradient_thresholds.json")
    cells: list[dict[str, Any]] = [
        {"data": data, "optimizer": optimizer, "rule": rule, "feedback": feedback, "score": None}
        for data in ("digits", "mnist1d")
        for optimizer, rule, feedback in METHODS
    ]
    cells += [
        {"data": data, "optimizer": "Adam", "rule": "after training", "feedback": False, "score": score}
        for data in ("digits", "mnist1d")
        for score in ("gradient", "taylor", "magnitude", "random")
    ]
    rates: dict[str, float] = {}

    def measure_any(cell: dict[str, Any]) -> dict[str, Any]:
        """Measure one cell; pruning afterwards uses plain Adam's learning rate."""
        if cell["score"] is None:
            return measure(cell)
        if cell["data"] not in rates:
            plain = measure(copy.copy(cell) | {"rule": "plain", "score": None})
            rates[cell["data"]] = plain["learning_rate"]
        return prune_after(cell, rates[cell["data"]])

    lab.experiment.run(
        path,
        cells,
        measure_any,
        seeds=SEEDS,
        about=f"layers of 64, 32, 10 units, {STEPS} steps, batches of 128; accuracy on test data; "
        f"loss and kept are means over windows of {WINDOW} steps",
    )

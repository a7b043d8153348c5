"""Chapter 3: which weights can go, judged by gradients, at initialisation and after training?

`python chapters/experiments/gradient_scores.py` writes chapters/results/gradient_scores.json; a run that was stopped
goes on where it was.

MNIST-1D and layers of 128, 64 and 10 units, twice document 1's. Every run takes 1,000 steps of Adam in all: pruned
before the first of them, or after 700, with 300 steps of fine-tuning. The learning rate of the steps after pruning is
chosen of one grid on validation data for each cell; the first 700 steps have the dense network's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradprune as gp
from gradprune import lab

STEPS, FINE_TUNING = 1000, 300
SEEDS = list(range(5))
TUNING_SEEDS = [100, 101]
RATES = [0.003, 0.01, 0.03]
SPARSITIES = [0.8, 0.9, 0.95, 0.98]
SCORES = ["random", "magnitude", "gradient", "snip", "grasp", "synflow"]  # taylor ranks as snip does
CONTROLS = ["magnitude, by layer"]  # the same share of each layer
SAMPLES = 512  # of the training part, in batches of 128, that a score looks at
ROUNDS = 100  # of SynFlow

Score = Callable[[nn.Module], Mapping[str, Tensor]]


def build(data: lab.data.Dataset, seed: int) -> nn.Sequential:
    """Return the network before training: 128, 64 and 10 units."""
    torch.manual_seed(seed)
    return lab.models.mlp([data.features, 128, 64, 10], "relu")


def score_of(name: str, data: lab.data.Dataset, seed: int) -> Score:
    """Return the score `name` as a function of the model alone."""
    x, y = data.train.x[:SAMPLES].split(128), data.train.y[:SAMPLES].split(128)
    looked_at = {"batches": list(zip(x, y, strict=True)), "loss": nn.functional.cross_entropy}
    return {
        "random": partial(gp.random, generator=lab.train.lots(seed)),
        "magnitude": gp.magnitude,
        "gradient": partial(gp.gradient, **looked_at),
        "taylor": partial(gp.taylor, **looked_at),
        "snip": partial(gp.snip, **looked_at),
        "grasp": partial(gp.grasp, **looked_at),
        "synflow": partial(gp.synflow, inputs=data.train.x[:1]),
    }[name.split(",")[0]]


def prune(model: nn.Module, name: str, sparsity: float, data: lab.data.Dataset, seed: int) -> gp.Masks:
    """Remove a share of the weights of all layers together; nothing keeps a layer from being emptied.

    SynFlow goes there in rounds, each of which removes the same fraction of what is left, as it is meant to. "By layer"
    each layer loses the same share.
    """
    score = score_of(name, data, seed)
    if name != "synflow":
        scope = "layer" if name.endswith("by layer") else "global"
        return gp.prune(model, score, sparsity=sparsity, scope=scope, min_keep=0)
    masks = None
    for done in range(1, ROUNDS + 1):
        share = sparsity if done == ROUNDS else 1 - (1 - sparsity) ** (done / ROUNDS)
        masks = gp.prune(model, score, sparsity=share, min_keep=0, within=masks)
    assert masks is not None
    return masks


_dense: dict[tuple[int, float], nn.Module] = {}


def dense(data: lab.data.Dataset, rate: float, seed: int) -> nn.Module:
    """Return a copy of the network after the dense part of its training."""
    if (seed, rate) not in _dense:
        model = build(data, seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        lab.train.fit(model, data, steps=STEPS - FINE_TUNING, optimizer=optimizer, seed=seed, watch=False)
        _dense[seed, rate] = model
    return copy.deepcopy(_dense[seed, rate])


def train(
    when: str, name: str, sparsity: float, first_rate: float, rate: float, seed: int, *, seen: dict[int, Any]
) -> tuple[nn.Module, lab.data.Dataset]:
    """Prune before or after training, train or fine-tune; return the network and its data."""
    data = lab.data.load("mnist1d", seed=seed)
    late = when == "after training"
    model = dense(data, first_rate, seed) if late else build(data, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    if name == "dense":
        lab.train.fit(model, data, steps=STEPS, optimizer=optimizer, seed=seed, watch=False)
        return model, data
    masks = prune(model, name, sparsity, data, seed)
    before = lab.train.accuracy(model, data.test) if seed in SEEDS else None
    with masks.hold(optimizer):
        steps, batches = (FINE_TUNING, seed + 1000) if late else (STEPS, seed)
        lab.train.fit(model, data, steps=steps, optimizer=optimizer, seed=batches, watch=False)
    seen[seed] = {
        "sparsity_reached": round(masks.sparsity, 4),
        "pruned": before,
        "kept_in_layers": [int(mask.sum()) for mask in masks.values()],
    }
    return model, data


def measure(cell: dict[str, Any], first_rate: float) -> dict[str, Any]:
    """Tune one cell on validation data, then report it on test data."""
    seen: dict[int, Any] = {}
    run = partial(train, cell["when"], cell["score"], cell["sparsity"], first_rate, seen=seen)
    reported = lab.train.tune_and_report(run, RATES, tuning_seeds=TUNING_SEEDS, seeds=SEEDS)
    return reported | {key: [seen[seed][key] for seed in SEEDS] for key in seen.get(SEEDS[0], {})}


if __name__ == "__main__":
    lab.start(0)
    path = Path("chapters/results/gradient_scores.json")
    about = f"MNIST-1D, layers of 128, 64, 10 units, {STEPS} steps of Adam in all; accuracy on test data"
    cells: list[dict[str, Any]] = [{"when": "never", "score": "dense", "sparsity": 0.0}]
    whole = lab.experiment.run(path, cells, partial(measure, first_rate=0.0), seeds=SEEDS, about=about)
    cells += [
        {"when": when, "score": score, "sparsity": sparsity}
        for when in ("at initialisation", "after training")
        for score in SCORES + CONTROLS
        for sparsity in SPARSITIES
    ]
    first = partial(measure, first_rate=whole[0]["learning_rate"])
    lab.experiment.run(path, cells, first, seeds=SEEDS, about=about)

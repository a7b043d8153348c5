"""Chapter 4: one residual network with batch norm, pruned once: what is left, layer by layer and together?

`python chapters/experiments/residual_pruning.py` writes chapters/results/residual_pruning.json; a run that was stopped
goes on where it was.

`lab.models.residual` on MNIST-1D, eight seeds: of the initialisation, the order of the batches and the split. Nothing
is tuned on test data. "Recalibrated" networks have their batch norms' statistics taken anew on the training examples,
with the weights as they are. A "scan" prunes one layer at a time and reads validation data, with the norms as they are
and recalibrated; "by the scan" gives each layer the sparsity at which it alone costs as much accuracy, recalibrated, as
every other, so much that all together lose the wanted share; "by the stale scan" reads the norms as they are. "Trained
on" is FURTHER steps, from the whole rate or a tenth of it, masks held, beside the dense network trained on alike.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gradprune as gp
from gradprune import lab

STEPS, RATE, DECAY = 800, 0.003, 0.01
FURTHER = 200
SPARSITIES = [0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98]
SCANNED = [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98]
SCOPES = ["global", "layer", "erk", "lamp"]
TRAINED = [0.7, 0.8, 0.9, 0.95, 0.98]
RIVALS = ["layer", "erk", "lamp", "by the scan", "random"]  # of global ranking, when training follows
SEEDS = list(range(8))


@cache
def data(seed: int) -> lab.data.Dataset:
    """Return MNIST-1D, split by the seed."""
    return lab.data.load("mnist1d", seed=seed)


@cache
def _dense(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = lab.models.residual()
    train(model, seed, STEPS)
    return model


def dense(seed: int) -> nn.Module:
    """Return a copy of the trained network of a seed."""
    return copy.deepcopy(_dense(seed))


def train(
    model: nn.Module,
    seed: int,
    steps: int,
    share: float = 1.0,
    masks: gp.Masks | None = None,
    *,
    order: int | None = None,
) -> None:
    """Train by AdamW, from `share` of the rate down to 0; `order` is the batches', the seed's where it is left out."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=share * RATE, weight_decay=DECAY)
    if masks is not None:
        masks.hold(optimizer, model)
    shape = lab.train.cosine(steps)
    order = seed if order is None else order
    lab.train.fit(model, data(seed), steps=steps, optimizer=optimizer, seed=order, watch=False, rate=shape)


def read(model: nn.Module, seed: int) -> dict[str, float]:
    """Return the accuracies of a network, as it is and recalibrated."""
    found = {part: lab.train.accuracy(model, getattr(data(seed), part)) for part in ("validation", "test")}
    gp.recalibrate_(model, [data(seed).train.x])
    found |= {f"recalibrated {part}": lab.train.accuracy(model, getattr(data(seed), part)) for part in found}
    return {name: round(value, 4) for name, value in found.items()}


@cache
def layers() -> list[str]:
    """Return the names of the weights that are pruned, first layer first."""
    return list(gp.prune(lab.models.residual(), sparsity=0.5))


@cache
def lost_alone(seed: int, layer: str, sparsity: float) -> dict[str, float]:
    """Return by how much the validation accuracy falls when `layer` alone is pruned, by what is done about norms."""
    model = dense(seed)
    whole = lab.train.accuracy(model, data(seed).validation)
    gp.prune(model, sparsity=sparsity, include=layer)
    stale = whole - lab.train.accuracy(model, data(seed).validation)
    gp.recalibrate_(model, [data(seed).train.x])
    return {"lost": stale, "lost, recalibrated": whole - lab.train.accuracy(model, data(seed).validation)}


def by_the_scan(seed: int, wanted: float, lost: str = "lost, recalibrated") -> dict[str, float]:
    """Return each layer's sparsity: that at which it alone loses `loss`; the `loss` at which all lose `wanted`."""
    sizes = {name: dense(seed).get_parameter(name).numel() for name in layers()}
    curves = {
        name: np.maximum.accumulate([0.0, *(lost_alone(seed, name, s)[lost] for s in SCANNED), 1.0])
        for name in layers()
    }
    at = [0.0, *SCANNED, 1.0]

    def share(loss: float) -> dict[str, float]:
        return {name: min(float(np.interp(loss, curve, at)), 0.99) for name, curve in curves.items()}

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        shares = share(middle)
        removed = sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values())
        low, high = (low, middle) if removed > wanted else (middle, high)
    return share(high)


def pruned(seed: int, rule: str, sparsity: float) -> tuple[nn.Module, gp.Masks]:
    """Return a pruned copy of the trained network, and its masks."""
    model = dense(seed)
    prune = partial(gp.prune, model, sparsity=sparsity)
    if rule == "by the scan":
        return model, gp.prune(model, scope=by_the_scan(seed, sparsity))
    if rule == "by the stale scan":
        return model, gp.prune(model, scope=by_the_scan(seed, sparsity, "lost"))
    if rule == "random":
        torch.manual_seed(seed)
        return model, prune(gp.random)
    if rule == "largest":
        return model, prune(lambda net: {name: -size for name, size in gp.magnitude(net).items()})
    return model, prune(scope=rule)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    seed, what, sparsity = cell["seed"], cell["what"], cell.get("sparsity", 0.0)
    if what == "scanned":
        return {name: round(value, 4) for name, value in lost_alone(seed, cell["layer"], sparsity).items()}
    if what == "pruned":
        model, masks = pruned(seed, cell["rule"], sparsity)
        return {"sparsity reached": round(masks.sparsity, 5)} | read(model, seed)
    model, masks = (dense(seed), None) if sparsity == 0 else pruned(seed, cell["rule"], sparsity)
    if what == "trained on":
        train(model, seed, FURTHER, 0.1 if cell["from"] == "a tenth" else 1.0, masks)
    return {part: round(lab.train.accuracy(model, getattr(data(seed), part)), 4) for part in ("validation", "test")}


def cells(seed: int) -> list[dict[str, Any]]:
    """Return what is measured with one seed."""
    rules = [*SCOPES, "by the scan", "by the stale scan", "random", "largest"]
    trained = [(s, start, "global") for s in (0.0, *TRAINED) for start in ("a tenth", "the whole rate")]
    trained += [(s, "the whole rate", rule) for rule in RIVALS for s in (0.8, 0.9)]
    rows = [
        {"what": "dense"},
        *({"what": "scanned", "layer": layer, "sparsity": s} for layer in layers() for s in SCANNED),
        *({"what": "pruned", "rule": rule, "sparsity": s} for rule in rules for s in SPARSITIES),
        *({"what": "trained on", "sparsity": s, "from": start, "rule": rule} for s, start, rule in trained),
    ]
    return [{"seed": seed} | row for row in rows]


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "residual_pruning.json"
    about = "lab.models.residual on MNIST-1D, pruned once by magnitude; accuracies, and what one layer alone costs"
    lab.experiment.run(path, [cell for seed in SEEDS for cell in cells(seed)], measure, seeds=SEEDS, about=about)

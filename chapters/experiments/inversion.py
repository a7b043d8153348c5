"""Chapter 7: why does magnitude over all layers lose to chance in the Transformer on text, at 90 % and beyond?

`python chapters/experiments/inversion.py` writes chapters/results/inversion.json; a run that was stopped goes on where
it was. It is the row "Transformer, text" of `architectures_again`, its network, text, training and correction, with
five seeds; each row of the result changes one thing of it. Bits per character on test text, one a seed.

"ranking" says what is pruned:

- "global": magnitude over all layers, as in the row; "layer", "row", "erk", "lamp": as gp.prune's scopes;
- "global, head by itself": the last layer, which scores the characters, keeps as large a share as all layers together,
  the others are ranked as one;
- "layer, head as in global": every layer keeps the same share, but the last one what the global ranking leaves it;
- "head left out": the last layer is not pruned, the others are ranked as one;
- "random": chance over all layers; "random, shares of global": chance within each layer, as many as "global" there.

"change" says what else is different: of the dense training, a warm-up of 100 steps, a rate of 0.003 in place of 0.01,
twice the steps, or a norm before the last layer; of the correction, a warm-up of 50 steps, a rate of 0.003, or four
times the steps. "kept" is the share of each layer that stays, "silent" the share of the 31 characters whose scores
are left without a weight, "dense" the dense networks' bits. The dense network of seed 0 is stored beside the result.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradprune as gp
from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.zoo import base

SEEDS = list(range(5))
ROW = zoo.by_name("Transformer, text")
HEAD = "head.weight"
RANKINGS = [
    "global",
    "layer",
    "row",
    "random",
    "global, head by itself",
    "layer, head as in global",
    "random, shares of global",
    "head left out",
    "lamp",
    "erk",
]
DENSE_CHANGES: dict[str, dict[str, Any]] = {
    "none": {},
    "dense: warm-up": {"warm_up": 100},
    "dense: rate 0.003": {"rate": 0.003},
    "dense: twice the steps": {"steps": 2 * ROW.steps},
    "dense: a norm before the head": {"norm": True},
}
CORRECTION_CHANGES: dict[str, dict[str, Any]] = {
    "correction: warm-up": {"warm_up": 50},
    "correction: rate 0.003": {"rate": 0.003},
    "correction: four times the steps": {"steps": 2 * ROW.steps},
}


def train(
    model: nn.Module, seed: int, part: int, *, steps: int, rate: float = ROW.rate, warm_up: int = 0, masks: Any = None
) -> nn.Module:
    """Train as the row does, the rate rising for `warm_up` steps before it falls; `part` is the seed of batches."""
    task, generator = ROW.task(seed), torch.Generator().manual_seed(part)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    if masks is not None:
        masks.hold(optimizer, model)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(warm_up, 1)) * (1 - step / steps)
        optimizer.zero_grad()
        task.loss(model, generator).backward()
        optimizer.step()
    return model


@cache
def dense(change: str, seed: int) -> nn.Module:
    """Return the dense network of a seed; not to be changed."""
    setting = {"steps": ROW.steps} | DENSE_CHANGES.get(change, {})
    model = base.network(ROW, seed)
    if setting.pop("norm", False):
        model.encoder.norm = nn.LayerNorm(model.head.in_features)  # type: ignore[union-attr]
    return train(model, seed, seed, **setting)


def prune(model: nn.Module, ranking: str, sparsity: float, seed: int) -> gp.Masks:
    """Prune and return the masks; the last layer takes part unless the ranking says otherwise."""
    chance = partial(gp.random, generator=lab.train.lots(seed))
    if ranking == "random":
        return gp.prune(model, chance, sparsity=sparsity)
    if ranking == "head left out":
        return gp.prune(model, sparsity=sparsity, exclude=HEAD)
    if ranking == "global, head by itself":
        return gp.Masks(
            {**gp.prune(model, sparsity=sparsity, exclude=HEAD), **gp.prune(model, sparsity=sparsity, include=HEAD)}
        )
    if ranking in ("layer, head as in global", "random, shares of global"):
        shares = gp.prune(copy.deepcopy(model), sparsity=sparsity)
        gone = {name: 1 - float(mask.double().mean()) for name, mask in shares.items()}
        if ranking == "random, shares of global":
            return gp.prune(model, chance, scope=gone)
        return gp.prune(model, scope={name: gone[HEAD] if name == HEAD else sparsity for name in gone})
    return gp.prune(model, sparsity=sparsity, scope=ranking)  # type: ignore[arg-type]


def measure(cell: Mapping[str, Any], seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Measure one cell with all seeds."""
    row: dict[str, Any] = {"dense": [], "pruned": [], "corrected": [], "silent": []}
    kept: dict[str, list[float]] = {}
    for seed in seeds:
        task, model = ROW.task(seed), copy.deepcopy(dense(_trained_as(cell["change"]), seed))
        row["dense"].append(_bits(task, model))
        masks = prune(model, cell["ranking"], cell["sparsity"], seed)
        for name, mask in masks.items():
            kept.setdefault(name, []).append(round(float(mask.double().mean()), 4))
        silent = (model.head.weight == 0).all(1).double().mean()  # type: ignore[union-attr,operator]
        row["silent"].append(round(float(silent), 4))
        row["pruned"].append(_bits(task, model))
        setting = {"steps": ROW.steps // 2} | CORRECTION_CHANGES.get(cell["change"], {})
        train(model, seed, 1_000 + seed, masks=masks, **setting)
        row["corrected"].append(_bits(task, model))
    return row | {"kept": {name: round(sum(values) / len(values), 4) for name, values in kept.items()}}


def cells() -> list[dict[str, Any]]:
    """Return every cell: all rankings of the network as it is, and three of them with each change."""
    changes = [change for change in (*DENSE_CHANGES, *CORRECTION_CHANGES) if change != "none"]
    wanted = [("none", ranking, 0.9) for ranking in RANKINGS]
    wanted += [(change, ranking, 0.9) for change in changes for ranking in ("global", "layer", "random")]
    wanted += [("none", ranking, sparsity) for sparsity in (0.95, 0.8) for ranking in RANKINGS[:4]]
    return [{"change": change, "ranking": ranking, "sparsity": sparsity} for change, ranking, sparsity in wanted]


def _trained_as(change: str) -> str:
    return change if change in DENSE_CHANGES else "none"


def _bits(task: Any, model: nn.Module) -> float:
    return round(base.score(task, model, "test"), 4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parents[1] / "results" / "inversion.json")
    lab.start(0)
    path = parser.parse_args().to
    lab.experiment.run(path, cells(), measure, seeds=SEEDS, about="one cause at a time, bits per character")
    lab.experiment.store_network(path.with_suffix(".safetensors"), dense("none", 0))

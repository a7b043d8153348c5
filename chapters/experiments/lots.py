"""Chapter 7: is it chance when the lots are the numbers that a network's first weights were made of?

`python chapters/experiments/lots.py` writes chapters/results/lots.json; a run that was stopped goes on where it was;
about ten minutes on two cores.

In `architectures_again` random pruning draws from a generator with the seed of the network. In most rows torch drew the
first weights from the same numbers, so that the lots keep what was largest before training. Here are ten seeds of some
rows, at 80 %, layer by layer, corrected as there, with those lots ("same") and with lots of another seed ("apart"): the
metric on test data, and the mean correlation of a mask with the first weights.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import architectures_protocol as protocol
import numpy as np
import torch

import gradprune as gp
from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.zoo import base

NAMES = ("logistic regression", "RNN", "GRU", "LSTM", "quantum circuit, by rotation")
APART = 10_000
SPARSITY = max(protocol.JUDGED)


def correlation(masks: gp.Masks, first: dict[str, torch.Tensor]) -> float:
    """Return the mean over tensors of the correlation between what stays and the value before training."""
    pairs = [torch.stack([mask.double().flatten(), first[name].double().flatten()]) for name, mask in masks.items()]
    return round(float(np.mean([torch.corrcoef(pair)[0, 1].item() for pair in pairs])), 3)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row with both kinds of lots."""
    row = zoo.by_name(cell["architecture"])
    found: dict[str, list[float]] = {"same": [], "apart": [], "same, correlation": [], "apart, correlation": []}
    for seed in protocol.SEEDS:
        first = {name: p.detach().clone() for name, p in base.network(row, seed).named_parameters()}
        for how, lots in (("same", seed), ("apart", APART + seed)):
            model = copy.deepcopy(base.dense(row, seed))
            chance = partial(gp.random, generator=torch.Generator().manual_seed(lots))
            masks = gp.prune(model, chance, sparsity=SPARSITY, scope=protocol.PRIMARY, include=row.include)
            base.train(row, model, row.task(seed), row.steps // 2, rate=row.rate, seed=1_000 + seed, masks=masks)
            found[how].append(round(base.score(row.task(seed), model, "test"), 4))
            found[f"{how}, correlation"].append(correlation(masks, first))
    return found


if __name__ == "__main__":
    lab.start(0)
    path = Path(__file__).resolve().parents[1] / "results" / "lots.json"
    about = "random pruning with lots of the network's own seed and of another"
    lab.experiment.run(path, [{"architecture": name} for name in NAMES], measure, seeds=protocol.SEEDS, about=about)

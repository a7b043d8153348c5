"""Chapter 5: how much does correction bring back, for how many steps, and does it pay to prune in rounds?

`python chapters/experiments/correction.py` writes chapters/results/correction.json; a run that was stopped goes on
where it was.

Trained networks are pruned by magnitude, all layers together, and corrected with the rate falling on a straight line to
0 (`protocol.py`). Three questions share the cells: sparsity against the number of steps ("one round"); the number of
rounds at an equal budget of steps, the share of weights that stays falling by an equal factor in each round; and the
dense network as a teacher, or random masks, in place of the plain correction. The peak of the rate is tuned for each
number of rounds and each way on validation data, at one sparsity and the longest budget, with seeds that are not used
again. Sparsity 0 is the dense network that trains on for as long: what of the gain is due to the steps alone.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import protocol
import torch
from protocol import SHARES, TUNING_SEEDS, straight_down
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab

SEEDS = list(range(5))
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
BUDGETS = (30, 100, 300, 960)
LONGEST = BUDGETS[-1]
ROUNDS = (1, 2, 4, 8, 16)
DEEP = (0.9, 0.95, 0.98)
TUNED_AT = 0.95
NETWORKS = [("digits", "perceptron"), ("mnist1d", "perceptron"), ("mnist1d", "convolutional")]
WAYS = ("magnitude", "magnitude, taught", "random")


def cells() -> list[dict[str, Any]]:
    """Return what is measured."""
    table = [("magnitude", s, 1, steps) for s in SPARSITIES for steps in BUDGETS]
    table += [("magnitude", s, rounds, LONGEST) for s in DEEP for rounds in ROUNDS if rounds > 1]
    table += [(way, s, 1, LONGEST) for way in WAYS[1:] for s in SPARSITIES[1:]]
    return [
        {"data": name, "network": kind, "way": way, "sparsity": s, "rounds": rounds, "steps": steps}
        for name, kind in NETWORKS
        for way, s, rounds, steps in table
    ]


def corrected(cell: dict[str, Any], share: float, seed: int) -> tuple[nn.Module, nn.Module, lab.data.Dataset]:
    """Return the network as its last pruning left it, the corrected one, and the data."""
    name, kind = cell["data"], cell["network"]
    part, model = protocol.data(name, seed), protocol.dense(name, kind, seed)
    teacher = copy.deepcopy(model).eval()
    torch.manual_seed(seed)

    def taught(scores: Tensor, y: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        return 0.5 * functional.cross_entropy(scores, y) + 0.5 * gp.distill_loss(scores, wanted, 2.0)

    rounds, steps = cell["rounds"], cell["steps"] // cell["rounds"]
    rate = share * protocol.best_rate(name, kind)
    masks: gp.Masks | None = None
    for number in range(1, rounds + 1):
        sparsity = 1 - (1 - cell["sparsity"]) ** (number / rounds)
        score = gp.random if cell["way"] == "random" else gp.magnitude
        masks = gp.prune(model, score, sparsity=sparsity, within=masks)
        pruned = copy.deepcopy(model)
        protocol.fit(
            model,
            part,
            steps,
            rate,
            straight_down(steps),
            1000 * number + seed,
            prepare=masks.hold,
            loss=taught if cell["way"] == "magnitude, taught" else None,
        )
    return pruned, model, part


@cache
def best_share(name: str, kind: str, way: str, rounds: int) -> float:
    """Return the share of the dense rate that a way's networks are best with on validation data."""
    cell = {"data": name, "network": kind, "way": way, "sparsity": TUNED_AT, "rounds": rounds, "steps": LONGEST}

    def score(share: float) -> float:
        runs = [corrected(cell, share, seed) for seed in TUNING_SEEDS]
        return sum(lab.train.accuracy(model, part.validation) for _, model, part in runs)

    return max(SHARES, key=score)


@torch.no_grad()
def loss(model: nn.Module, split: lab.data.Split) -> float:
    """Return the mean cross-entropy."""
    return float(functional.cross_entropy(model(split.x), split.y))


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return accuracies and losses, a list over seeds each, on training and test data."""
    share = best_share(cell["data"], cell["network"], cell["way"], cell["rounds"])
    runs = [corrected(cell, share, seed) for seed in SEEDS]
    found: dict[str, Any] = {"share of the dense rate": share}
    for when, at in (("before correction", 0), ("accuracy", 1)):
        found[when] = [round(lab.train.accuracy(run[at], run[2].test), 4) for run in runs]
        found[f"{when}, training data"] = [round(lab.train.accuracy(run[at], run[2].train), 4) for run in runs]
    found["loss"] = [round(loss(run[1], run[2].test), 4) for run in runs]
    found["loss, training data"] = [round(loss(run[1], run[2].train), 4) for run in runs]
    return found


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/correction.json"),
        cells(),
        measure,
        seeds=SEEDS,
        about="after magnitude pruning, all layers together; on test data unless it says training data",
    )

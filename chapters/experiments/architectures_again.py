"""Chapter 7, the second measurement of its rows, by `architectures_protocol` (read that first).

`python chapters/experiments/architectures_again.py` writes chapters/results/architectures_again.json; a run that was
stopped goes on where it was. `--only NAME ...` measures some rows alone.

Each row has a cell "dense" ("rate", the tuned one; "shares", the tuned shares of it by what is corrected; test metrics
of the dense networks as trained and trained on) and one for each score and scope, lists over sparsities, then seeds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import architectures_protocol as protocol
import numpy as np
from torch import nn

from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.zoo import base
from gradprune.lab.zoo.base import Architecture

RESULTS = Path(__file__).resolve().parents[1] / "results"


def corrected(row: Architecture, share: float, seed: int, pruned: tuple[str, str, float] | None) -> nn.Module:
    """Return a seed's network, pruned by (score, scope, sparsity) or not at all, and trained on."""
    model = copy.deepcopy(base.dense(row, seed))
    masks = base.prune(row, model, *pruned, seed) if pruned else None
    steps, rate = row.steps // 2, share * row.rate
    return base.train(row, model, row.task(seed), steps, rate=rate, seed=1_000 + seed, masks=masks)


@cache
def tuned(name: str) -> tuple[Architecture, dict[str, float]]:
    """Return the row with its tuned rate, and the tuned share of it for "dense", "magnitude" and "random"."""
    row = zoo.by_name(name)
    sign = 1 if row.higher else -1
    rates = base.tune(row, protocol.TUNING_SEEDS)
    row = dataclasses.replace(row, rate=max(rates, key=lambda rate: sign * rates[rate]))

    def validated(score: str, share: float) -> float:
        pruned = None if score == "dense" else (score, protocol.PRIMARY, max(protocol.JUDGED))
        models = {seed: corrected(row, share, seed, pruned) for seed in protocol.TUNING_SEEDS}
        return float(np.mean([base.score(row.task(s), model, "validation") for s, model in models.items()]))

    def best(score: str) -> float:
        found = {share: validated(score, share) for share in protocol.SHARES}
        return max(found, key=lambda share: sign * found[share])

    return row, {score: best(score) for score in ("dense", "magnitude", "random")}


def measure(cell: Mapping[str, Any], seeds: Sequence[int] = protocol.SEEDS) -> dict[str, Any]:
    """Measure one cell with all seeds."""
    row, shares = tuned(cell["architecture"])

    def tested(model: nn.Module, seed: int, part: Any = "test") -> float:
        return float(f"{base.score(row.task(seed), model, part):.4g}")

    if cell["score"] == "dense":
        dense = {seed: copy.deepcopy(base.dense(row, seed)) for seed in seeds}
        return {
            "rate": row.rate,
            "shares": shares,
            "validation": [tested(model, seed, "validation") for seed, model in dense.items()],
            "test": [tested(model, seed) for seed, model in dense.items()],
            "continued": [tested(corrected(row, shares["dense"], seed, None), seed) for seed in seeds],
        }
    share, how = shares[cell["score"]], (cell["score"], cell["scope"])
    values = [
        [tested(corrected(row, share, seed, (*how, sparsity)), seed) for seed in seeds]
        for sparsity in protocol.SPARSITIES
    ]
    return {"sparsities": list(protocol.SPARSITIES), "corrected": values}


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return what the protocol says of each row, at 50 and 80 %; of one that misses its level, nothing."""
    cells = {(r["architecture"], r["score"], r["scope"]): r for r in rows}
    found = {}
    for name in dict.fromkeys(r["architecture"] for r in rows):
        row, dense = zoo.by_name(name), cells[name, "dense", "none"]
        if not row.reaches(float(np.mean(dense["validation"]))):
            continue
        ours, chance = (cells[name, score, protocol.PRIMARY] for score in ("magnitude", "random"))
        for sparsity in protocol.JUDGED:
            at = ours["sparsities"].index(sparsity)
            found[f"{name}, {sparsity:.0%}"] = (
                protocol.prunable(row, ours["corrected"][at], dense["continued"]),
                protocol.lead(row, ours["corrected"][at], chance["corrected"][at]),
            )
    return protocol.outcomes(found)


if __name__ == "__main__":
    known = [row.name for row in (*zoo.ARCHITECTURES, *zoo.TODAY)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=known, metavar="NAME")
    parser.add_argument("--to", type=Path, default=RESULTS / "architectures_again.json", metavar="PATH")
    chosen = parser.parse_args()
    lab.start(0)
    pairs = [("dense", "none"), *((score, scope) for scope in protocol.SCOPES for score in ("magnitude", "random"))]
    cells = [{"architecture": n, "score": score, "scope": scope} for n in chosen.only for score, scope in pairs]
    about = f"by architectures_protocol: {protocol.settings()}"
    done = lab.experiment.run(chosen.to, cells, measure, seeds=list(protocol.SEEDS), about=about)
    for name, said in judged(done).items():
        print(f"{name}: can be pruned {said[0]}; size chooses well {said[1]}")

"""Chapter 6: is a plan by measured milliseconds better than one by FLOPs, at equal measured milliseconds?

`python chapters/experiments/milliseconds.py` writes chapters/results/milliseconds.json; a run that was stopped goes on
where it was. It needs the extra "deploy".

The trained networks of `residual_pruning`, five seeds. Coupled channels go, by magnitude, and are cut out. "Time": the
network with one group of channels narrowed to one of LEVELS, cut, beside the dense one: processor time of a forward
pass of BATCH signals on one thread, the two in turn, in an order drawn anew each round; a share is the ratio of the
medians, its quartiles are of the ratios round by round. Times hang on widths only, so the seeds share them. "Compared":
`gp.fit_budget` with these times as its price ("milliseconds") or with the FLOPs of the same cut networks ("FLOPs"),
from one scan of the groups by the cross-entropy of validation data, recalibrated; beside them the same share of each
group ("uniform"). For each rule the least that must go is looked for by halving, so that the cut network takes at most
TARGET of the dense network's time, measured; then the networks of all rules are timed together, TIMED rounds, read
recalibrated, and trained on for `residual_pruning`'s further steps. "As planned": what `fit_budget` predicts for TARGET
itself, and what the masked and the cut network take.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable, Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import how_much
import numpy as np
import residual_pruning as base
import torch
from torch import nn

import gradprune as gp
from gradprune import lab
from gradprune.weights.groups import Groups

SEEDS = list(range(5))
BATCH, LEVELS, TARGET = 256, [round(i / 8, 3) for i in range(1, 8)], 0.7
ROUNDS, LOOKED, TIMED, HALVINGS = 25, 15, 40, 5
RULES = ["milliseconds", "FLOPs", "uniform"]

PATH = Path(__file__).resolve().parents[1] / "results" / "milliseconds.json"


@cache
def example() -> torch.Tensor:
    """Return the signals that are timed."""
    return base.data(0).train.x[:BATCH]


def cut(model: nn.Module, **how: Any) -> nn.Module:
    """Return a copy without the coupled channels that go."""
    pruned = copy.deepcopy(model)
    gp.prune(pruned, granularity="group", example=example()[:8], **how)
    return gp.shrink(pruned, example()[:8]).eval()


def timed(models: Mapping[Hashable, nn.Module], rounds: int) -> dict[Hashable, np.ndarray[Any, Any]]:
    """Return the processor times of forward passes, round by round."""
    found: dict[Hashable, list[float]] = {name: [] for name in models}
    shuffled = random.Random(0)
    with torch.no_grad():
        for _ in range(rounds):
            for name in shuffled.sample(list(models), len(models)):
                models[name](example())  # its memory is warm
                start = time.process_time()
                models[name](example())
                found[name].append(time.process_time() - start)
    return {name: np.array(times) for name, times in found.items()}


def share(times: np.ndarray[Any, Any], dense: np.ndarray[Any, Any]) -> float:
    """Return the median time as a share of the dense network's."""
    return float(np.median(times) / np.median(dense))


def spread(times: np.ndarray[Any, Any]) -> list[float]:
    """Return the quartiles in milliseconds."""
    return [round(1000 * float(t), 4) for t in np.quantile(times, [0.25, 0.5, 0.75])]


def flops(model: nn.Module) -> int:
    """Return the FLOPs of one signal."""
    return gp.report(model, example()[:1]).total.flops


def groups() -> list[str]:
    """Return the names of the groups of coupled channels."""
    return list(Groups.of(lab.models.residual(), example()[:8]).numbers)


def alone(name: str, level: float) -> dict[str, Any]:
    """Time the network with one group narrowed, beside the dense one."""
    torch.manual_seed(0)
    dense = lab.models.residual().eval()
    narrow = cut(dense, scope={name: level})
    found = timed({"dense": dense, "cut": narrow}, ROUNDS)
    quartiles = np.quantile(found["cut"] / found["dense"], [0.25, 0.75])
    return {
        "load": round(os.getloadavg()[0], 1),
        "share": round(share(found["cut"], found["dense"]), 4),
        "quartiles": [round(float(q), 4) for q in quartiles],
        "dense ms": spread(found["dense"]),
        "FLOPs": round(flops(narrow) / flops(dense), 4),
    }


@cache
def scanned(seed: int) -> gp.Sensitivity:
    """Return what each group of coupled channels loses alone, recalibrated."""
    evaluate = how_much.reads(seed, loss=True)
    return gp.sensitivity(base.dense(seed), evaluate, LEVELS, granularity="group", example=example()[:8])


@cache
def priced(by: str) -> Callable[[str, float], float]:
    """Return the price of the network with one group narrowed, as a share of the dense one's, as `fit_budget` asks."""
    rows = [row for row in lab.experiment.load("milliseconds")["rows"] if row["what"] == "time"]
    table = {(row["group"], row["level"]): row["FLOPs" if by == "FLOPs" else "share"] for row in rows}

    def price(name: str, stays: float) -> float:
        level = min([0.0, *LEVELS], key=lambda level: abs(1 - level - stays))
        return float(table[name, level]) if level else 1.0

    return price


def planned(seed: int, by: str, limit: float) -> gp.Plan:
    """Return the plan for a share of the dense network's milliseconds or FLOPs."""
    return gp.fit_budget(base.dense(seed), example(), latency=limit, sensitivities=scanned(seed), seconds=priced(by))


def made(seed: int, rule: str, amount: float) -> nn.Module:
    """Return the cut network; the higher the amount, the more goes."""
    model = base.dense(seed)
    if rule == "uniform":
        return cut(model, sparsity=amount, scope="layer")
    return cut(model, scope=planned(seed, rule, 1 - amount))


def most(by: str) -> float:
    """Return the largest amount that a plan can be asked for."""
    least = [min(priced(by)(name, 1 - level) for level in LEVELS) for name in groups()]
    return 0.999 * (1 - float(np.prod(least)))


def within(seed: int, rule: str) -> tuple[float, nn.Module]:
    """Return the least amount at which the cut network takes at most TARGET of the dense one's time, and it."""
    dense, low, high = base.dense(seed).eval(), 0.0, 0.8 if rule == "uniform" else most(rule)
    best = made(seed, rule, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        model = made(seed, rule, middle)
        found = timed({"dense": dense, "cut": model}, LOOKED)
        if share(found["cut"], found["dense"]) <= TARGET:
            high, best = middle, model
        else:
            low = middle
    return high, best


def as_planned(seed: int) -> dict[str, Any]:
    """Time the network of the plan for the target itself, masked and cut."""
    plan, dense = planned(seed, "milliseconds", TARGET), base.dense(seed).eval()
    masked = base.dense(seed).eval()
    plan.apply_(masked, example()[:8])
    found = timed({"dense": dense, "masked": masked, "cut": cut(dense, scope=plan)}, TIMED)
    return {
        "predicted": round(plan.predicted, 4),
        "masked": round(share(found["masked"], found["dense"]), 4),
        "cut": round(share(found["cut"], found["dense"]), 4),
        "ms": {name: spread(of) for name, of in found.items()},
    }


def compared(seed: int) -> dict[str, Any]:
    """Compare the rules at one measured time."""
    found = {rule: within(seed, rule) for rule in RULES}
    dense = base.dense(seed).eval()
    took = timed({"dense": dense} | {rule: model for rule, (_, model) in found.items()}, TIMED)
    rows: dict[str, Any] = {"load": round(os.getloadavg()[0], 1), "dense ms": spread(took["dense"])}
    for rule, (amount, model) in found.items():
        read = base.read(model, seed)  # which recalibrates
        rows[rule] = {
            "amount": round(amount, 4),
            "share": round(share(took[rule], took["dense"]), 4),
            "ms": spread(took[rule]),
            "FLOPs": flops(model),
            "widths": [w.shape[0] for n, w in model.named_parameters() if n in scanned(seed).values],
            "validation": read["recalibrated validation"],
            "test": read["recalibrated test"],
        }
        base.train(model, seed, base.FURTHER)
        rows[rule]["trained on"] = round(lab.train.accuracy(model, base.data(seed).test), 4)
    return rows


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    if cell["what"] == "time":
        return alone(cell["group"], cell["level"])
    seed = cell["seed"]
    if cell["what"] == "dense":
        model = base.dense(seed)
        found = {"test": round(lab.train.accuracy(model, base.data(seed).test), 4)}
        base.train(model, seed, base.FURTHER)
        return found | {"trained on": round(lab.train.accuracy(model, base.data(seed).test), 4)}
    return {"as planned": as_planned, "compared": compared}[cell["what"]](seed)


def cells() -> list[dict[str, Any]]:
    """Return what is measured, the times first."""
    found: list[dict[str, Any]] = [{"what": "time", "group": name, "level": s} for name in groups() for s in LEVELS]
    found += [{"what": what, "seed": seed} for seed in SEEDS for what in ("as planned", "compared")]
    return found + [{"what": "dense", "seed": seed} for seed in SEEDS]


if __name__ == "__main__":
    lab.start(seed=0)
    about = "lab.models.residual on MNIST-1D: coupled channels cut to equal measured time by three rules, one thread"
    lab.experiment.run(PATH, cells(), measure, seeds=SEEDS, about=about)

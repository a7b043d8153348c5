"""Chapter 6: the residual network pruned to what it may cost, and four ways to look for the sparsity.

`python chapters/experiments/how_much.py` writes chapters/results/how_much.json; a run that was stopped goes on where it
was.

The trained networks of `residual_pruning`, five seeds, pruned by magnitude. "Budget": FLOPs or bytes are bounded, and a
rule shares them out: the same sparsity for each layer, ERK, LAMP, all layers ranked together, or the allocation that
`gp.fit_budget` takes from a scan of the layers, of the cross-entropy or of the accuracy. The first four are given the
largest sparsity at which they keep the budget. "learned" gives each layer a soft threshold with a number of its own and
trains both for `residual_pruning`'s further steps (Kusupati et al. 2020), at each of STRENGTHS; the shares of weights
that this leaves, all multiplied by one factor, keep the budget on the trained network, those of the strength whose
factor is nearest to 1. All are read recalibrated, some are trained on for `residual_pruning`'s
further steps. "Search": the largest sparsity, all layers ranked together, whose validation accuracy is at most MARGIN
below the dense network's, looked for in several ways; "on" says which part of the data the search read. "Strategy":
the same over four scopes and three scores. "Jittered": CANDIDATES allocations near LAMP's at one sparsity. What is read
while a search runs has its norms recalibrated on LOOKED_AT training examples; the outcome is read as in
`residual_pruning`.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import residual_pruning as base
import torch
from regularisation import SoftThreshold
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

import gradprune as gp
from gradprune import lab
from gradprune.weights.allocate import share_out

SEEDS = list(range(5))
RULES = ["layer", "erk", "lamp", "global", "fitted", "learned"]
STRENGTHS = [1.0, 2.0, 3.0, 4.0, 5.0]  # the decay that pulls a threshold's number towards 0, and so the threshold up
BUDGETS = {"flops": [0.4, 0.2], "bytes": [0.5, 0.25]}
TRAINED = {"flops": [0.2], "bytes": [0.25]}
MARGIN, LOOKED_AT, TRIALS = 0.02, 512, 20
COARSE = [round(0.05 * i, 2) for i in range(1, 20)]
THRESHOLDS = [round(0.01 * i, 2) for i in range(1, 21)]
SCOPES, SCORES = ["layer", "erk", "lamp", "global"], ["magnitude", "activation", "taylor"]
CANDIDATES, JITTERED, SPREAD = 30, 0.7, 0.3

Evaluate = Callable[[nn.Module], float]


@cache
def example() -> torch.Tensor:
    """Return one input, for counting."""
    return torch.zeros(1, 40)


def cost(model: nn.Module, of: str) -> int:
    """Return the effective FLOPs of a network, or its bytes with one bit a weight and the nonzeros."""
    total = gp.report(model, example()).total
    return total.effective_flops if of == "flops" else total.bytes_bitmask


def whole(of: str) -> int:
    """Return what the dense network costs, its bytes as torch stores them."""
    total = gp.report(lab.models.residual(), example()).total
    return total.flops if of == "flops" else total.bytes_dense


def reads(seed: int, part: str = "validation", *, loss: bool = False) -> Evaluate:
    """Return a function that recalibrates a network on a few examples and returns its accuracy, or minus its loss."""
    split = getattr(base.data(seed), part)
    few = base.data(seed).train.x[:LOOKED_AT]

    def evaluate(model: nn.Module) -> float:
        gp.recalibrate_(model, [few])
        if not loss:
            return lab.train.accuracy(model, split)
        with torch.no_grad():
            return -float(functional.cross_entropy(model.eval()(split.x), split.y))

    return evaluate


@cache
def scanned(seed: int, loss: bool) -> gp.Sensitivity:
    """Return what each layer loses alone, recalibrated."""
    return gp.sensitivity(base.dense(seed), reads(seed, loss=loss))


@cache
def thresholded(seed: int, strength: float) -> dict[str, float]:
    """Return the share of each layer's weights that are left when soft thresholds are trained with the network."""
    model = base.dense(seed)
    for name in base.layers():
        layer, weight = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        parametrize.register_parametrization(layer, weight, SoftThreshold())
    numbers = [m.s for m in model.modules() if isinstance(m, SoftThreshold)]
    others = [p for p in model.parameters() if not any(p is s for s in numbers)]
    groups = [{"params": others}, {"params": numbers, "weight_decay": strength}]
    optimizer = torch.optim.AdamW(groups, lr=base.RATE, weight_decay=base.DECAY)
    rate, steps = lab.train.cosine(base.FURTHER), base.FURTHER
    lab.train.fit(model, base.data(seed), steps=steps, optimizer=optimizer, seed=seed, watch=False, rate=rate)
    left = {name: operator.attrgetter(name)(model) for name in base.layers()}
    return {name: float((weight != 0).double().mean()) for name, weight in left.items()}


def by_thresholds(seed: int, of: str, limit: float) -> tuple[nn.Module, gp.Masks]:
    """Return the network pruned to the shares that trained thresholds leave, scaled to the budget."""
    found = {}
    for strength in STRENGTHS:
        shares, low, high = thresholded(seed, strength), 0.0, 1e3  # the upper end costs too much
        for _ in range(30):
            factor = (low * high) ** 0.5 if low else high / 10
            model = base.dense(seed)
            gone = {name: 1 - min(1.0, factor * share) for name, share in shares.items()}
            masks = gp.prune(model, scope=gone, min_keep=1)
            if cost(model, of) <= limit:
                low, found[strength] = factor, (factor, model, masks)
            else:
                high = factor
    _, model, masks = min(found.values(), key=lambda kept: abs(math.log(kept[0])))
    return model, masks


def within(seed: int, rule: str, of: str, share: float) -> tuple[nn.Module, gp.Masks]:
    """Return a copy of the trained network that keeps a budget by a rule, and its masks."""
    limit = share * whole(of)
    if rule.startswith("fitted"):
        model = base.dense(seed)
        plan = gp.fit_budget(model, example(), **{of: limit}, sensitivities=scanned(seed, rule == "fitted"))
        return model, plan.apply_(model)
    if rule == "learned":
        return by_thresholds(seed, of, limit)
    low, high = 0.0, 1.0  # the lower end costs too much
    for _ in range(16):
        middle = (low + high) / 2
        model = base.dense(seed)
        gp.prune(model, sparsity=middle, scope=rule, min_keep=1)
        low, high = (low, middle) if cost(model, of) <= limit else (middle, high)
    model = base.dense(seed)
    return model, gp.prune(model, sparsity=high, scope=rule, min_keep=1)


def outcome(model: nn.Module, seed: int) -> dict[str, float]:
    """Return what a pruned network reads, recalibrated."""
    found = base.read(model, seed)
    return {part: found[f"recalibrated {part}"] for part in ("validation", "test")}


def plain(model: nn.Module, seed: int) -> dict[str, float]:
    """Return what a network reads, its norms as training left them."""
    parts = ("validation", "test")
    return {part: round(lab.train.accuracy(model, getattr(base.data(seed), part)), 4) for part in parts}


def largest(seed: int, levels: list[float], by: str, evaluate: Evaluate, wanted: float) -> float:
    """Return the sparsity of the largest of `levels` that reads what is wanted; all are tried."""
    best = 0.0
    for level in levels:
        model = base.dense(seed)
        masks = gp.prune(model, **{by: level}, min_keep=1)
        if evaluate(model) >= wanted:
            best = max(best, masks.sparsity)
    return best


def wish(evaluate: Evaluate, wanted: float) -> Evaluate:
    """Return what a sampler is to maximise: the sparsity where the network reads enough, else by how much it fails."""

    def value(model: nn.Module) -> float:
        reached = evaluate(model) - wanted
        weights = [model.get_parameter(name) for name in base.layers()]
        gone = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        return gone if reached >= 0 else reached

    return value


def scores(seed: int) -> dict[str, Any]:
    """Return the scores by name."""
    train = base.data(seed).train
    batches = [(train.x[:LOOKED_AT], train.y[:LOOKED_AT])]
    return {
        "magnitude": gp.magnitude,
        "activation": partial(gp.activation, batches=batches),
        "taylor": partial(gp.taylor, batches=batches, loss=functional.cross_entropy),
    }


def searched(seed: int, method: str, part: str) -> dict[str, Any]:
    """Look for the largest sparsity in one way; return it, and how many networks were read for it."""
    model, evaluate = base.dense(seed), reads(seed, part)
    wanted = evaluate(copy.deepcopy(model)) - MARGIN
    grids = {"grid of sparsities": (COARSE, "sparsity"), "grid of thresholds": (THRESHOLDS, "threshold")}
    if method in grids:
        levels, by = grids[method]
        return {"sparsity found": largest(seed, levels, by, evaluate, wanted), "evaluations": 1 + len(levels)}
    if method == "bisection":
        found = gp.largest_sparsity(model, evaluate, at_least=wanted, tolerance=0.01, min_keep=1)
        return {"sparsity found": found.sparsity, "evaluations": found.evaluations, "falls": found.falls}
    study = gp.search(
        model,
        wish(evaluate, wanted),
        {"sparsity": (0.0, 0.99), "min_keep": 1},
        trials=TRIALS,
        sampler="tpe" if method == "tpe" else "random",
        seed=seed,
    )
    best = max(row["value"] for row in study.rows())
    return {"sparsity found": max(best, 0.0), "evaluations": 1 + TRIALS}


def strategy(seed: int, method: str, part: str) -> tuple[nn.Module, dict[str, Any]]:
    """Look for the largest sparsity over scopes and scores; return the network that was found, and how."""
    model, evaluate = base.dense(seed), reads(seed, part)
    wanted = evaluate(copy.deepcopy(model)) - MARGIN
    every = scores(seed)
    if method == "bisection of each":
        tried = {
            (score, scope): gp.largest_sparsity(
                model, evaluate, at_least=wanted, tolerance=0.02, score=every[score], scope=scope, min_keep=1
            )
            for score in SCORES
            for scope in SCOPES
        }
        (score, scope), best = max(tried.items(), key=lambda item: item[1].sparsity)
        best.masks.apply_(model)
        spent, gone = sum(found.evaluations for found in tried.values()), best.sparsity
    else:
        spent = 12 * 11
        space = {"score": every, "scope": SCOPES, "sparsity": (0.0, 0.99), "min_keep": 1}
        study = gp.search(model, wish(evaluate, wanted), space, trials=spent, sampler="tpe", seed=seed)
        trial = study.best
        row = max(study.rows(), key=lambda row: -1.0 if row["value"] is None else row["value"])
        score, scope = row["score"], row["scope"]
        gone = gp.prune(model, **trial.settings).sparsity
    return model, {"score": score, "scope": scope, "sparsity found": gone, "evaluations": spent}


def near(masks: gp.Masks, seed: int) -> list[dict[str, float]]:
    """Return allocations that keep as many weights as these masks, each layer's share changed by chance."""
    kept = [int(mask.sum()) for mask in masks.values()]
    sizes = [mask.numel() for mask in masks.values()]
    torch.manual_seed(seed + 30_000)
    found = []
    for _ in range(CANDIDATES):
        wanted = [k * float(torch.exp(SPREAD * torch.randn(()))) for k in kept]
        counts = share_out(wanted, sum(kept), low=[1] * len(sizes), high=sizes)
        found.append({n: 1 - c / size for n, c, size in zip(masks, counts, sizes, strict=True)})
    return found


def jittered(seed: int) -> dict[str, Any]:
    """Read allocations near LAMP's on validation and on test data."""
    found: dict[str, list[float]] = {"validation": [], "test": []}
    for shares in near(gp.prune(base.dense(seed), sparsity=JITTERED, scope="lamp"), seed):
        model = base.dense(seed)
        gp.prune(model, scope=shares)
        for part, values in found.items():
            values.append(round(reads(seed, part)(model), 4))
    return found


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    seed, what = cell["seed"], cell["what"]
    if what == "dense":
        model = base.dense(seed)
        if cell["trained on"]:
            base.train(model, seed, base.FURTHER)
        return plain(model, seed)
    if what == "jittered":
        return jittered(seed)
    if what == "strategy":
        model, found = strategy(seed, cell["method"], cell["on"])
        return found | outcome(model, seed)
    if what == "search":
        found = searched(seed, cell["method"], cell["on"])
        model = base.dense(seed)
        if found["sparsity found"] > 0:
            gp.prune(model, sparsity=found["sparsity found"], min_keep=1)
        return found | {"sparsity found": round(found["sparsity found"], 4)} | outcome(model, seed)
    model, masks = within(seed, cell["rule"], cell["of"], cell["share"])
    found = {"sparsity reached": round(masks.sparsity, 4), "cost": cost(model, cell["of"])}
    if cell["trained on"]:
        base.train(model, seed, base.FURTHER, 1.0, masks)
        return found | plain(model, seed)
    return found | outcome(model, seed)


def cells() -> list[dict[str, Any]]:
    """Return what is measured, the budgets of all seeds first."""
    budgets = [(of, share, rule) for of in BUDGETS for share in BUDGETS[of] for rule in RULES]
    budgets += [(of, share, "fitted to accuracy") for of in TRAINED for share in TRAINED[of]]
    trained = [(of, share, rule) for of in TRAINED for share in TRAINED[of] for rule in RULES]
    searches = ["bisection", "grid of sparsities", "grid of thresholds", "random", "tpe"]
    first = [
        *({"what": "budget", "of": o, "share": s, "rule": r, "trained on": False} for o, s, r in budgets),
        *({"what": "dense", "trained on": on} for on in (False, True)),
        *({"what": "budget", "of": o, "share": s, "rule": r, "trained on": True} for o, s, r in trained),
        *({"what": "search", "method": method, "on": "validation"} for method in searches),
    ]
    second = [
        {"what": "search", "method": "bisection", "on": "test"},
        {"what": "jittered"},
        *({"what": "strategy", "method": m, "on": "validation"} for m in ("bisection of each", "tpe")),
    ]
    return [{"seed": seed} | row for rows in (first, second) for seed in SEEDS for row in rows]


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "how_much.json"
    about = "lab.models.residual on MNIST-1D: pruned to FLOPs and bytes by five rules, and searched for a sparsity"
    lab.experiment.run(path, cells(), measure, seeds=SEEDS, about=about)

"""How is every architecture trained, pruned, corrected and judged, so that their rows can stand in one table?

The protocol, fixed before the first run and the same for every row:

- Train for the architecture's own number of steps, the rate falling on a straight line to 0 from one chosen of three on
  validation data with two seeds that are not used again. The dense network has to reach a level stated beforehand on
  validation data; a row that does not reach it says so.
- Prune in one shot to each of `SPARSITIES`, by importance and at random, over the whole network and layer by layer.
- Correct for half as many steps by the same optimizer, the rate falling from the same height to 0, the masks held.
  Nothing is tuned for a score, a scope or a sparsity.
- Read the test part once for each number. Report the dense network, the pruned one, the corrected one, and the dense
  one trained on for as long as a correction takes.

A row's answer is the largest sparsity at which the mean over seeds after the correction stays within a tolerance of the
dense mean, at it and at every smaller one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import gradprune as gp
from gradprune.lab.train import interval
from gradprune.weights.mask import Masks
from gradprune.weights.plan import Scope
from gradprune.weights.request import Score

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
SCORES, SCOPES = ("magnitude", "random"), ("global", "layer")
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101)

Part = Literal["validation", "test"]
Player = tuple[Iterable[nn.Parameter], Callable[[torch.Generator], Tensor]]


class Task(Protocol):
    """The data of one seed and what is asked of a network on them.

    Two methods more are used where a task has them. ``players(model)`` returns several pairs of parameters and a loss,
    a function of the generator, which take their steps in turn, each by an optimizer of its own: a generator and its
    discriminator. ``details(model, part)`` returns further numbers by name, reported beside the score.
    """

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss on the next batch of the training part, drawn by `generator`, as is all other noise."""
        ...

    def score(self, model: nn.Module, part: Part) -> float:
        """Return the metric on a whole part; the model is in evaluation mode and no gradient is recorded."""
        ...


@dataclass(frozen=True)
class Architecture:
    """One row: a network, its task, and what counts as keeping it.

    `metric` is better when `higher`; a value is within the tolerance when it is worse than the dense one by no more
    than `tolerance`, times the dense value where `relative`. `level` is what the dense network must reach on validation
    data. `rate` is the one chosen of `rates`. `build(seed)` returns the network before its first step, `task(seed)` its
    data. `include` goes to ``gp.prune`` as it is; `score` is what stands for importance.
    """

    name: str
    claims: tuple[str, ...]
    data: str
    metric: str
    higher: bool
    tolerance: float
    relative: bool
    level: float
    steps: int
    rate: float
    rates: tuple[float, ...]
    build: Callable[[int], nn.Module]
    task: Callable[[int], Task]
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "adam without momentum"] = "adam"
    include: str | tuple[str, ...] | None = None
    score: Score = field(default=gp.magnitude)

    def lost(self, dense: float, value: float) -> float:
        """Return how much worse `value` is than `dense`, as a share of the tolerance; negative where it is better."""
        worse = dense - value if self.higher else value - dense
        return worse / (self.tolerance * abs(dense) if self.relative else self.tolerance)

    def reaches(self, value: float) -> bool:
        """Whether `value` is as good as the stated level."""
        return value >= self.level if self.higher else value <= self.level


# ------------------------------------------------------------------------------------------- training and correcting

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adam without momentum": partial(torch.optim.Adam, betas=(0.0, 0.99)),  # for adversaries: Karras et al. (2018)
}


def network(architecture: Architecture, seed: int) -> nn.Module:
    """Return the network of a seed before its first step."""
    torch.manual_seed(seed)
    return architecture.build(seed)


def train(
    architecture: Architecture,
    model: nn.Module,
    task: Task,
    steps: int,
    *,
    rate: float,
    seed: int,
    masks: Masks | None = None,
) -> nn.Module:
    """Train `model` on `task` for `steps` steps, the rate falling on a straight line from `rate` to 0; return it.

    `masks` are held throughout. `seed` decides the batches and all other noise of training; the test part is never
    read.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # for dropout, which takes no generator
    alone: list[Player] = [(model.parameters(), lambda generator: task.loss(model, generator))]
    players: list[Player] = task.players(model) if hasattr(task, "players") else alone
    moves = []
    for parameters, loss in players:
        parameters = list(parameters)
        optimizer = OPTIMIZERS[architecture.optimizer](parameters, lr=rate)
        if masks is not None and _shared(model, masks, parameters):
            masks.hold(optimizer, model)
        moves.append((optimizer, loss))
    model.train()
    for step in range(steps):
        for optimizer, loss in moves:
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            loss(generator).backward()
            optimizer.step()
    return model


def _shared(model: nn.Module, masks: Masks, parameters: Sequence[nn.Parameter]) -> bool:
    owned = {id(p) for p in parameters}
    return any(id(model.get_parameter(name)) in owned for name in masks)


def prune(architecture: Architecture, model: nn.Module, score: str, scope: Scope, sparsity: float, seed: int) -> Masks:
    """Prune `model` in one shot by the row's importance ("magnitude") or at "random", and return the masks."""
    by: Score = architecture.score
    if score == "random":
        by = partial(gp.random, generator=torch.Generator().manual_seed(seed))
    return gp.prune(model, by, sparsity=sparsity, scope=scope, include=architecture.include)


def correct(architecture: Architecture, model: nn.Module, task: Task, seed: int, masks: Masks | None) -> nn.Module:
    """Train `model` on for half of its training steps with `masks` held, and return it."""
    steps = architecture.steps // 2
    return train(architecture, model, task, steps, rate=architecture.rate, seed=1_000 + seed, masks=masks)


@torch.no_grad()
def score(task: Task, model: nn.Module, part: Part) -> float:
    """Return the metric of `model` on `part`; the model is left in training mode."""
    model.eval()
    value = float(task.score(model, part))
    model.train()
    return value


@torch.no_grad()
def details(task: Task, model: nn.Module, part: Part) -> dict[str, float]:
    """Return what else the task reports by name; nothing for most."""
    model.eval()
    found = dict(task.details(model, part)) if hasattr(task, "details") else {}
    model.train()
    return {name: float(value) for name, value in found.items()}


# ----------------------------------------------------------------------------------------------- measuring and judging


@cache
def dense(architecture: Architecture, seed: int) -> nn.Module:
    """Return the trained dense network of a seed; not to be changed."""
    task = architecture.task(seed)
    model = network(architecture, seed)
    return train(architecture, model, task, architecture.steps, rate=architecture.rate, seed=seed)


def cells(architectures: Iterable[Architecture]) -> list[dict[str, Any]]:
    """Return what is measured: of each architecture the dense network, then each score with each scope."""
    pairs = [("dense", "none"), *((score, scope) for score in SCORES for scope in SCOPES)]
    return [{"architecture": a.name, "score": score, "scope": scope} for a in architectures for score, scope in pairs]


def measure(
    architecture: Architecture, cell: Mapping[str, Any], seeds: Sequence[int] = SEEDS, sparsities: Sequence[float] = ()
) -> dict[str, Any]:
    """Return the test metric of one cell: lists over seeds, one for each of `sparsities` (all, unless given).

    A dense cell gives "validation", "test", "continued" (trained on for as long as a correction takes) and "weights",
    the number that may be pruned; another cell "pruned", "corrected" and "sparsities". Further numbers of the task are
    in "details", of the dense or the corrected networks.
    """
    if cell["score"] == "dense":
        return _measure_dense(architecture, seeds)
    sparsities = list(sparsities or SPARSITIES)
    pruned: list[list[float]] = [[] for _ in sparsities]
    corrected: list[list[float]] = [[] for _ in sparsities]
    more: list[list[dict[str, float]]] = [[] for _ in sparsities]
    for seed in seeds:
        task = architecture.task(seed)
        for at, sparsity in enumerate(sparsities):
            model = copy.deepcopy(dense(architecture, seed))
            masks = prune(architecture, model, cell["score"], cell["scope"], sparsity, seed)
            pruned[at].append(_rounded(score(task, model, "test")))
            correct(architecture, model, task, seed, masks)
            corrected[at].append(_rounded(score(task, model, "test")))
            more[at].append(details(task, model, "test"))
    row: dict[str, Any] = {"sparsities": sparsities, "pruned": pruned, "corrected": corrected}
    return row | ({"details": [_columns(each) for each in more]} if any(more[0]) else {})


def _measure_dense(architecture: Architecture, seeds: Sequence[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"validation": [], "test": [], "continued": []}
    more = []
    for seed in seeds:
        task, model = architecture.task(seed), copy.deepcopy(dense(architecture, seed))
        row["validation"].append(_rounded(score(task, model, "validation")))
        row["test"].append(_rounded(score(task, model, "test")))
        more.append(details(task, model, "test"))
        correct(architecture, model, task, seed, None)
        row["continued"].append(_rounded(score(task, model, "test")))
    masks = prune(architecture, copy.deepcopy(dense(architecture, seeds[0])), "random", "global", 0.5, seeds[0])
    row["weights"] = sum(mask.numel() for mask in masks.values())
    return row | ({"details": _columns(more)} if any(more) else {})


def tune(architecture: Architecture, seeds: Sequence[int] = TUNING_SEEDS) -> dict[float, float]:
    """Return the mean validation metric of the dense network at each of the architecture's rates."""

    def validated(rate: float, seed: int) -> float:
        task = architecture.task(seed)
        model = train(architecture, network(architecture, seed), task, architecture.steps, rate=rate, seed=seed)
        return score(task, model, "validation")

    return {rate: float(np.mean([validated(rate, seed) for seed in seeds])) for rate in architecture.rates}


def largest_sparsity(
    architecture: Architecture,
    dense: Sequence[float],
    corrected: Sequence[Sequence[float]],
    sparsities: Sequence[float],
) -> float | None:
    """Return the largest of `sparsities` at which the mean stays within the tolerance, with every smaller one.

    `dense` is a list over seeds, `corrected` one such list for each sparsity, rising. None where not even the smallest
    stays.
    """
    answer = None
    for sparsity, values in sorted(zip(sparsities, corrected, strict=True), key=lambda pair: pair[0]):
        if not architecture.lost(float(np.mean(dense)), float(np.mean(values))) <= 1:  # a nan is not within
            break
        answer = sparsity
    return answer


def advantage(architecture: Architecture, ours: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Return how much better `ours` is than `other`, seed by seed: the mean and the ends of its 95 % interval.

    Ours beats the other where the lower end is above 0.
    """
    sign = 1 if architecture.higher else -1
    return interval([sign * (a - b) for a, b in zip(ours, other, strict=True)])


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {name: [_rounded(row[name]) for row in rows] for name in rows[0]}

"""How is every architecture trained, pruned and scored, so that their rows can stand in one table?

What is run and what counts as what is in the experiment `architectures_protocol`; here are the parts that it needs,
the same for every row: training with a rate that falls on a straight line to 0, pruning in one shot by importance or at
random, and the metric on validation or test data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import gradprune as gp
from gradprune.lab.train import lots
from gradprune.weights.mask import Masks
from gradprune.weights.plan import Scope
from gradprune.weights.request import Score

TUNING_SEEDS = (100, 101)  # of what is chosen beforehand; not reported on

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
    """One row: a network, its task, and how it is trained.

    `metric` is better when `higher`. `level` is what the dense network must reach on validation data. `rate` is the one
    chosen of `rates`. `build(seed)` returns the network before its first step, `task(seed)` its data. `include` goes to
    ``gp.prune`` as it is; `score` is what stands for importance.
    """

    name: str
    claims: tuple[str, ...]
    data: str
    metric: str
    higher: bool
    level: float
    steps: int
    rate: float
    rates: tuple[float, ...]
    build: Callable[[int], nn.Module]
    task: Callable[[int], Task]
    optimizer: Literal["sgd", "momentum", "adam", "adamw", "adam without momentum"] = "adam"
    include: str | tuple[str, ...] | None = None
    score: Score = field(default=gp.magnitude)

    def reaches(self, value: float) -> bool:
        """Whether `value` is as good as the stated level."""
        return value >= self.level if self.higher else value <= self.level


# ------------------------------------------------------------------------------------------------ training and scoring

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
        by = partial(gp.random, generator=lots(seed))
    return gp.prune(model, by, sparsity=sparsity, scope=scope, include=architecture.include)


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


@cache
def dense(architecture: Architecture, seed: int) -> nn.Module:
    """Return the trained dense network of a seed; not to be changed."""
    task = architecture.task(seed)
    model = network(architecture, seed)
    return train(architecture, model, task, architecture.steps, rate=architecture.rate, seed=seed)


def tune(architecture: Architecture, seeds: Sequence[int] = TUNING_SEEDS) -> dict[float, float]:
    """Return the mean validation metric of the dense network at each of the architecture's rates."""

    def validated(rate: float, seed: int) -> float:
        task = architecture.task(seed)
        model = train(architecture, network(architecture, seed), task, architecture.steps, rate=rate, seed=seed)
        return score(task, model, "validation")

    return {rate: float(np.mean([validated(rate, seed) for seed in seeds])) for rate in architecture.rates}

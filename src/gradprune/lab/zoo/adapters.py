"""Can a network with low-rank adapters be pruned: the adapters, or the frozen network below them?

A perceptron learns the digits and is frozen; then an adapter of rank 8 on each layer learns the same digits turned by a
quarter, of which the perceptron alone names less than a third: LoRA, Hu et al. (2022). Adapting is the training of
these rows, so a correction trains the adapters alone.

Two readings. "LoRA adapters" prunes what was trained, as ``gp.prune`` does of itself, since it leaves frozen weights
alone. But adapters are few weights beside those below them: who wants a smaller network prunes the frozen one, which a
pattern names, and corrects by the adapters: "LoRA adapters, base pruned". Neither row prunes the two merged, which are
a perceptron like any other. Its weights are zero only where both parts are: sparse adapters thin no base, and merged
into a pruned base they fill its holes. Two factors of rank 8 that have half of their weights, drawn at random, have a
product with 90 % of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import torch
from torch import Tensor, nn

from gradprune.lab.zoo import base, dense, tasks
from gradprune.lab.zoo.base import Architecture

RANK = 8
BASE = next(row for row in dense.ROWS if row.name == "perceptron, Adam")


class Adapted(nn.Module):
    """A frozen linear layer, and a product of two thin ones beside it, which starts at 0."""

    def __init__(self, layer: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, inputs) to (examples, outputs)."""
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out

    def merged(self) -> Tensor:
        """Return the weight of the one layer that does the same."""
        return self.base.weight + self.up.weight @ self.down.weight


def adapt_(model: nn.Module, rank: int = RANK) -> nn.Module:
    """Freeze `model`, put an adapter on each of its linear layers, and return it."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, Adapted(layer, rank))
    return model


def adapted(seed: int) -> nn.Module:
    """Return the trained perceptron of a seed with adapters that do nothing yet."""
    trained = copy.deepcopy(base.dense(BASE, seed))
    torch.manual_seed(seed)
    return adapt_(trained)


@cache
def turned(seed: int) -> tasks.Classify:
    """Return the digits turned by a quarter, split as the seed splits the upright ones."""
    upright = tasks.digits(seed)

    def turn(part: tasks.Split) -> tasks.Split:
        return tasks.Split(part.x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1), part.y)

    return tasks.Classify(turn(upright.train), turn(upright.validation), turn(upright.test))


# A first setting, rank 4 and 600 steps at 0.03, reached this level with the tuning seeds and missed it with the others:
# at that rate some runs never learn. Rank, steps and rates were chosen again, by validation data of seeds 100 to 103.
_ADAPTERS = Architecture(
    "LoRA adapters",
    claims=("D1-14", "D2-11"),
    data="digits turned by a quarter, after upright ones",
    **dense.ACCURACY,
    level=0.9,
    steps=1_000,
    rate=0.01,
    rates=(0.001, 0.003, 0.01),
    build=adapted,
    task=turned,
)

ROWS = (_ADAPTERS, dataclasses.replace(_ADAPTERS, name="LoRA adapters, base pruned", include="*.base.weight"))

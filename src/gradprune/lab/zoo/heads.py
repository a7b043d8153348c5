"""Does a network with two inputs and two outputs lose one of its heads when all its weights are ranked together?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.lab import data
from gradprune.lab.zoo.base import Architecture, Part


class TwoHeads(nn.Module):
    """An encoder for each of two images, a trunk that reads both, and two heads on it: a digit, and larger or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.trunk = nn.Linear(128, 64)
        self.digit, self.larger = nn.Linear(64, 10), nn.Linear(64, 2)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class scores of both heads."""
        seen = torch.cat([self.first(first), self.second(second)], dim=1).relu()
        trunk = self.trunk(seen).relu()
        return self.digit(trunk), self.larger(trunk)


@dataclass(frozen=True)
class Pairs:
    """Two images of digits: which is the first, and is it larger than the second?

    The loss is the sum of both heads' cross-entropies, the score the mean of their accuracies. A part's pairs are
    fixed: each image with each of the four after it.
    """

    loaded: data.Dataset
    batch: int = 32

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch of pairs drawn with replacement."""
        part = self.loaded.train
        a, b = torch.randint(len(part), (2, self.batch), generator=generator)
        digit, larger = model(part.x[a], part.x[b])
        wanted = (part.y[a] > part.y[b]).long()
        return functional.cross_entropy(digit, part.y[a]) + functional.cross_entropy(larger, wanted)

    def score(self, model: nn.Module, part: Part) -> float:
        """Return the mean of the two accuracies, 0 to 1."""
        return sum(self._accuracies(model, part)) / 2

    def details(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Return each head's accuracy, and the share of its weights that are not zero."""
        accuracies = dict(zip(("digit accuracy", "larger accuracy"), self._accuracies(model, part), strict=True))
        weights = {name: model.get_parameter(f"{name}.weight") for name in ("digit", "larger")}
        return accuracies | {f"{n} kept": float(torch.count_nonzero(w)) / w.numel() for n, w in weights.items()}

    def _accuracies(self, model: nn.Module, part: Part) -> tuple[float, float]:
        split: data.Split = getattr(self.loaded, part)
        at = torch.arange(len(split)).repeat(4)
        other = torch.cat([torch.arange(len(split)).roll(-k) for k in (1, 2, 3, 4)])
        digit, larger = model(split.x[at], split.x[other])
        right = digit.argmax(1) == split.y[at], larger.argmax(1) == (split.y[at] > split.y[other]).long()
        return float(right[0].double().mean()), float(right[1].double().mean())


@cache
def pairs(seed: int) -> Pairs:
    """Return the digits in pairs, split by the seed."""
    return Pairs(data.load("digits", seed=seed))


ROWS = (
    Architecture(
        "two inputs, two heads",
        claims=("D1-14", "D2-11", "D2-21"),
        data="two digits: which is the first, and is it the larger?",
        metric="mean accuracy of the heads",
        higher=True,
        level=0.9,
        steps=800,
        rate=0.01,
        rates=(0.003, 0.01, 0.03),
        build=lambda seed: TwoHeads(),
        task=pairs,
    ),
)

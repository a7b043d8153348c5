"""Which network against which is pruned in a GAN: the generator, the discriminator, or both?"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.lab import models
from gradprune.lab.zoo.base import Architecture, Part

MODES, SPREAD = 8, 0.05
NOISE = 4  # inputs of the generator
BATCH, DRAWN = 128, 10_000
DIRECTIONS = 64


class Adversaries(nn.Module):
    """A generator of points in the plane, and the discriminator that tells them from real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = models.mlp([NOISE, 64, 64, 2])
        self.discriminator = models.mlp([2, 64, 64, 1])

    def forward(self, noise: Tensor) -> Tensor:
        """Return one point for each row of `noise`."""
        points: Tensor = self.generator(noise)
        return points


@dataclass(frozen=True)
class Heaps(ABC):
    """Draw points as the real ones are: eight round heaps on a circle.

    The score is the sliced Wasserstein distance between 10,000 generated and 10,000 real points: the mean, over 64
    directions, of how far the sorted projections are apart. Bonneel et al. (2015). How a network draws its points is
    what a task adds: ``draw``.
    """

    seed: int

    @abstractmethod
    def draw(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return DRAWN points of the network, of shape (DRAWN, 2); `generator` decides which."""

    def score(self, model: nn.Module, part: Part) -> float:
        """Return the sliced Wasserstein distance; 0 is perfect."""
        made, real = self._points(model, part)
        turns = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
        directions = torch.stack([turns.cos(), turns.sin()])
        apart = (made @ directions).sort(0).values - (real @ directions).sort(0).values
        return float(apart.square().mean(0).sqrt().mean())

    def details(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Return the share of the heaps that were hit, and the share of the points that lie in one.

        In a heap is what is within three standard deviations of its middle; a heap is hit when it has at least a
        quarter of its fair share of the points.
        """
        made, _ = self._points(model, part)
        near = torch.cdist(made, _middles()) < 3 * SPREAD
        hit = near.float().mean(0) >= 0.25 / MODES
        return {"heaps hit": float(hit.float().mean()), "points in a heap": float(near.any(1).float().mean())}

    def _points(self, model: nn.Module, part: Part) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(10 * self.seed + {"validation": 1, "test": 2}[part])
        return self.draw(model, generator), real_points(DRAWN, generator)


class Ring(Heaps):
    """Two players: a generator that turns noise into points, and the discriminator that tells them from real ones."""

    def draw(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return what the generator makes of DRAWN rows of noise."""
        points: Tensor = model(torch.randn(DRAWN, NOISE, generator=generator))
        return points

    def players(self, model: Adversaries) -> list[tuple[Iterable[nn.Parameter], Callable[[torch.Generator], Tensor]]]:
        """Return the discriminator and the generator with what each minimises.

        The generator's is the form that does not saturate. Goodfellow et al. (2014), section 3.
        """

        def tell_apart(generator: torch.Generator) -> Tensor:
            real, noise = real_points(BATCH, generator), torch.randn(BATCH, NOISE, generator=generator)
            with torch.no_grad():
                made = model(noise)
            scores = model.discriminator(torch.cat([real, made]))
            return functional.softplus(-scores[:BATCH]).mean() + functional.softplus(scores[BATCH:]).mean()

        def deceive(generator: torch.Generator) -> Tensor:
            made = model(torch.randn(BATCH, NOISE, generator=generator))
            return functional.softplus(-model.discriminator(made)).mean()

        return [(model.discriminator.parameters(), tell_apart), (model.generator.parameters(), deceive)]

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return what both minimise, added up; training takes them in turn, by ``players``."""
        assert isinstance(model, Adversaries)
        return torch.stack([loss(generator) for _, loss in self.players(model)]).sum()


def _middles() -> Tensor:
    turns = torch.arange(MODES) * 2 * math.pi / MODES
    return torch.stack([turns.cos(), turns.sin()], dim=1)


def real_points(count: int, generator: torch.Generator) -> Tensor:
    """Return points of the real distribution, of shape (count, 2)."""
    chosen = torch.randint(MODES, (count,), generator=generator)
    return _middles()[chosen] + SPREAD * torch.randn(count, 2, generator=generator)


@cache
def ring(seed: int) -> Ring:
    """Return the ring of a seed."""
    return Ring(seed)


ON_HEAPS: dict[str, Any] = {
    "data": "points in the plane, eight heaps on a circle",
    "metric": "sliced Wasserstein distance",
    "higher": False,
}


def _gan(which: str, include: str | None) -> Architecture:
    return Architecture(
        f"GAN, {which} pruned",
        claims=("D1-14", "D2-11", "D2-17"),
        **ON_HEAPS,
        level=0.12,
        steps=500,
        rate=0.003,
        rates=(0.001, 0.003, 0.01),
        build=lambda seed: Adversaries(),
        task=ring,
        optimizer="adam without momentum",
        include=include,
    )


ROWS = (_gan("generator", "generator.*"), _gan("discriminator", "discriminator.*"), _gan("both", None))

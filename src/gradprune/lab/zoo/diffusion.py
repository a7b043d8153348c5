"""Can a diffusion model be pruned, on the eight heaps that the GAN is asked for, by the same distance?

The network is asked once for each step of the sampling, so what pruning takes from it can add up over the steps.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.lab import models
from gradprune.lab.zoo.base import Architecture
from gradprune.lab.zoo.generative import BATCH, DRAWN, ON_HEAPS, Heaps, real_points

STEPS = 50  # of noise; Ho et al. (2020) take 1,000, so the variances here are 20 times theirs
WAVES = {"point": 3, "step": 6}  # how many octaves of sines and cosines stand for an input


class NoisePredictor(nn.Module):
    """Tell the noise in a point, given the point and how many steps of noise it has had.

    Both come as sines and cosines too, since a small perceptron learns fine detail slowly from the plain numbers:
    Tancik et al. (2020).
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = models.mlp([2 + 4 * WAVES["point"] + 2 * WAVES["step"], width, width, 2])

    def forward(self, points: Tensor, step: Tensor) -> Tensor:
        """Map points of shape (examples, 2) and their steps, 0 to STEPS - 1, to noise of shape (examples, 2)."""
        time = math.pi / 2 * step[:, None] / STEPS
        noise: Tensor = self.net(torch.cat([points, _waves(points, "point"), _waves(time, "step")], dim=1))
        return noise


def _waves(x: Tensor, of: str) -> Tensor:
    octaves = torch.cat([x * 2**k for k in range(WAVES[of])], dim=1)
    return torch.cat([octaves.sin(), octaves.cos()], dim=1)


class Denoising(Heaps):
    """Noise is added to real points step by step, and the network learns to take it out again: Ho et al. (2020)."""

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the squared error of the noise told at random steps, all weighed alike; their equation 14."""
        points, step = real_points(BATCH, generator), torch.randint(STEPS, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 2, generator=generator)
        _, left = schedule()
        left = left[step, None]
        return functional.mse_loss(model(left.sqrt() * points + (1 - left).sqrt() * noise, step), noise)

    def draw(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return points made out of noise, with new noise at each step but the last; their algorithm 2."""
        variances, left = schedule()
        points = torch.randn(DRAWN, 2, generator=generator)
        for at in reversed(range(STEPS)):
            told = model(points, torch.full((DRAWN,), at))
            points = (points - variances[at] / (1 - left[at]).sqrt() * told) / (1 - variances[at]).sqrt()
            if at:
                points = points + variances[at].sqrt() * torch.randn(DRAWN, 2, generator=generator)
        return points


def schedule() -> tuple[Tensor, Tensor]:
    """Return the variance of the noise added at each step, and the share of the point's own that is left after it."""
    variances = torch.linspace(0.1, 20, STEPS) / STEPS
    return variances, (1 - variances).cumprod(0)


@cache
def denoising(seed: int) -> Denoising:
    """Return the task of a seed."""
    return Denoising(seed)


ROWS = (
    Architecture(
        "diffusion model",
        claims=("D1-14", "D2-11"),
        **ON_HEAPS,
        level=0.07,  # two draws of real points are 0.03 apart
        steps=1_500,
        rate=0.01,
        rates=(0.003, 0.01, 0.03),
        build=lambda seed: NoisePredictor(),
        task=denoising,
    ),
)

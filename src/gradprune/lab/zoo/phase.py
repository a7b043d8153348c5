"""What is a "CVNN" for a cyclic variable: a recurrent network on a phase, or a complex-valued network? Both.

The name has no established meaning. Read as "cyclic-variable", it is any network on an angle, here a recurrent one;
read as the usual abbreviation, it is a complex-valued network. Both are asked the same: a phase runs round a circle,
and twelve values of it are shown; where is it three steps on?
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.lab import data
from gradprune.lab.zoo.base import Architecture, Part
from gradprune.lab.zoo.tasks import Classify, Split, Supervised

SHOWN, AHEAD = 12, 3


@dataclass(frozen=True)
class Phases(Supervised):
    """Say where a phase will be: the networks return a point in the plane, whose direction is the answer.

    Networks take phases of shape (examples, steps) in radians, each in [-pi, pi), and embed them as they like. The loss
    is the squared distance of the point from the one on the unit circle, the score the mean angle between the two.
    """

    batch: int = 64

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the squared distance of a batch drawn with replacement."""
        x, y = self.draw(generator)
        point: Tensor = model(x)
        return (point - on_circle(y)).square().sum(1).mean()

    def score(self, model: nn.Module, part: Part) -> float:
        """Return the mean circular error in radians: pi / 2 for a guess, 0 for perfection."""
        split: Split = getattr(self, part)
        point = model(split.x)
        off = torch.atan2(point[:, 1], point[:, 0]) - split.y
        return float(torch.atan2(off.sin(), off.cos()).abs().mean())


def on_circle(phase: Tensor) -> Tensor:
    """Return (cos, sin) along a new last dimension."""
    return torch.stack([phase.cos(), phase.sin()], dim=-1)


@cache
def series(seed: int) -> Phases:
    """Return stretches of a circle map with a hidden frequency.

    phase(t + 1) = phase(t) + w + 0.5 sin(phase(t)) + noise of standard deviation 0.05, with w drawn from -1 to 1 for
    each stretch: it runs round one way or the other, fast here and slow there, or it is caught. 2,000 to train on, 500
    to choose on, 1,000 to report on.
    """
    generator = np.random.default_rng([seed, 7])

    def draw(count: int) -> Split:
        phase, frequency = generator.uniform(-np.pi, np.pi, count), generator.uniform(-1, 1, count)
        steps = [phase]
        for _ in range(SHOWN + AHEAD - 1):
            noise = 0.05 * generator.standard_normal(count)
            steps.append(steps[-1] + frequency + 0.5 * np.sin(steps[-1]) + noise)
        wrapped = (np.stack(steps, axis=1) + np.pi) % (2 * np.pi) - np.pi
        every = torch.from_numpy(wrapped).float()
        return Split(every[:, :SHOWN], every[:, -1])

    return Phases(draw(2_000), draw(500), draw(1_000))


@cache
def spectra(seed: int) -> Classify:
    """Return the Fourier coefficients of MNIST-1D's signals, 21 complex numbers each, of mean modulus 1."""
    loaded = data.load("mnist1d", seed=seed)
    parts = [torch.fft.rfft(part.x) for part in (loaded.train, loaded.validation, loaded.test)]
    size = parts[0].abs().mean()
    labels = (loaded.train.y, loaded.validation.y, loaded.test.y)
    train, validation, test = (Split(x / size, y) for x, y in zip(parts, labels, strict=True))
    return Classify(train, validation, test)


# ------------------------------------------------------------------------------------------------------------ networks


class PhaseRecurrent(nn.Module):
    """A recurrent layer that reads the phase: as a point on the circle, or raw, with its jump at pi."""

    def __init__(self, width: int = 48, *, raw: bool = False) -> None:
        super().__init__()
        self.raw = raw
        self.cell = nn.RNN(1 if raw else 2, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, phases: Tensor) -> Tensor:
        """Map (examples, steps) to points in the plane."""
        states, _ = self.cell(phases.unsqueeze(-1) if self.raw else on_circle(phases))
        point: Tensor = self.head(states[:, -1])
        return point


def squash(z: Tensor) -> Tensor:
    """Bound the modulus below 1 and keep the phase: Georgiou and Koutsougeras (1992)."""
    return z / (1 + z.abs())


class ComplexLayers(nn.Module):
    """Complex linear layers, the modulus of each hidden value bounded."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=torch.complex64) for a, b in itertools.pairwise(widths))

    def forward(self, z: Tensor) -> Tensor:
        """Map complex inputs to complex outputs."""
        *hidden, last = self.layers
        for layer in hidden:
            z = squash(layer(z))
        out: Tensor = last(z)
        return out


class PhaseComplex(nn.Module):
    """Complex layers that read a window of phases as complex numbers of modulus 1."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = ComplexLayers((SHOWN, width, width, 1))

    def forward(self, phases: Tensor) -> Tensor:
        """Map (examples, steps) to points in the plane."""
        return torch.view_as_real(self.net(turning(phases)).squeeze(-1))


class SpectrumComplex(nn.Module):
    """Complex layers on Fourier coefficients; a class's score is the modulus of its output."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = ComplexLayers((21, width, width, 10))

    def forward(self, z: Tensor) -> Tensor:
        """Map (examples, 21) complex numbers to class scores."""
        scores: Tensor = self.net(z).abs()
        return scores


def turning(phases: Tensor) -> Tensor:
    """Return exp(i phase)."""
    return torch.polar(torch.ones_like(phases), phases)


# ---------------------------------------------------------------------------------------------------------------- rows

CIRCULAR: dict[str, Any] = {
    "data": "a phase's last 12 values",
    "metric": "circular error",
    "higher": False,
    "level": 0.2,
    "steps": 400,
    "task": series,
}

ROWS = (
    Architecture(
        "RNN on a phase",
        claims=("D1-14", "D2-11", "D2-22"),
        **CIRCULAR,
        rate=0.01,
        rates=(0.003, 0.01, 0.03),
        build=lambda seed: PhaseRecurrent(),
    ),
    Architecture(
        "RNN on a raw phase",
        claims=("D1-14", "D2-11", "D2-22"),
        **CIRCULAR,
        rate=0.03,
        rates=(0.01, 0.03, 0.1),
        build=lambda seed: PhaseRecurrent(raw=True),
    ),
    Architecture(
        "complex-valued on a phase",
        claims=("D1-14", "D2-11", "D2-22"),
        **CIRCULAR,
        rate=0.03,
        rates=(0.01, 0.03, 0.1),
        build=lambda seed: PhaseComplex(),
    ),
    Architecture(
        "complex-valued on spectra",
        claims=("D1-14", "D2-11", "D2-22"),
        data="MNIST-1D, Fourier coefficients",
        metric="accuracy",
        higher=True,
        level=0.55,
        steps=800,
        rate=0.03,
        rates=(0.01, 0.03, 0.1),
        build=lambda seed: SpectrumComplex(),
        task=spectra,
    ),
)

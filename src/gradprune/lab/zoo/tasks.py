"""What is asked of the architectures that take examples one by one: a class, or a number?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.lab import data
from gradprune.lab.zoo.base import Part


@dataclass(frozen=True)
class Split:
    """Inputs and what is wanted for them: class labels, or numbers of shape (examples, outputs)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Supervised:
    """Three parts of a data set, the first of which is read in random batches of `batch`."""

    train: Split
    validation: Split
    test: Split
    batch: int = 32

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs and what is wanted for them, a batch drawn with replacement."""
        chosen = torch.randint(len(self.train.x), (self.batch,), generator=generator)
        return self.train.x[chosen], self.train.y[chosen]


@dataclass(frozen=True)
class Classify(Supervised):
    """Name the class: cross-entropy on random batches, the share that is right on a part."""

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy of a batch drawn with replacement."""
        x, y = self.draw(generator)
        return functional.cross_entropy(model(x), y)

    def score(self, model: nn.Module, part: Part) -> float:
        """Return the accuracy, 0 to 1."""
        split: Split = getattr(self, part)
        return float((model(split.x).argmax(1) == split.y).double().mean())


@dataclass(frozen=True)
class Regress(Supervised):
    """Give the number: squared error on random batches; on a part, its mean as a share of the variance of y there."""

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the mean squared error of a batch drawn with replacement."""
        x, y = self.draw(generator)
        return functional.mse_loss(model(x), y)

    def score(self, model: nn.Module, part: Part) -> float:
        """Return the unexplained share: 0 is perfect, 1 is as good as the mean."""
        split: Split = getattr(self, part)
        return float(functional.mse_loss(model(split.x), split.y) / split.y.var(correction=0))


@cache
def digits(seed: int) -> Classify:
    """Return the 8 by 8 pixel digits, one flat row of 64 an example, split by the seed."""
    return _classify("digits", seed)


@cache
def mnist1d(seed: int) -> Classify:
    """Return MNIST-1D, 40 values an example, its training part split by the seed."""
    return _classify("mnist1d", seed)


def _classify(name: str, seed: int) -> Classify:
    loaded = data.load(name, seed=seed)
    train, validation, test = (Split(part.x, part.y) for part in (loaded.train, loaded.validation, loaded.test))
    return Classify(train, validation, test)


INPUTS, RELEVANT, NOISE = 64, 8, 0.5


@cache
def sparse_line(seed: int, correlation: float = 0.5) -> Regress:
    """Return 64 correlated inputs of which 8 matter: y = x w + noise, a fresh w for each seed.

    Inputs have mean 0, variance 1 and, k places apart, a correlation of ``correlation**k``. The 8 weights are 0.5 to
    1.5 in size, of either sign, and the noise has a standard deviation of 0.5. 256 examples to train on and 256 to
    choose on, 1,000 to report on.
    """
    generator = np.random.default_rng(seed)
    weights = true_weights(seed)

    def draw(count: int) -> Split:
        x = generator.standard_normal((count, INPUTS))
        for at in range(1, INPUTS):
            x[:, at] = correlation * x[:, at - 1] + np.sqrt(1 - correlation**2) * x[:, at]
        y = x @ weights[:, None] + NOISE * generator.standard_normal((count, 1))
        return Split(torch.from_numpy(x).float(), torch.from_numpy(y).float())

    return Regress(draw(256), draw(256), draw(1_000))


def true_weights(seed: int) -> np.ndarray:
    """Return the weights that made the data of ``sparse_line``, of shape (64,)."""
    generator = np.random.default_rng([seed, 1])
    weights = np.zeros(INPUTS)
    chosen = generator.permutation(INPUTS)[:RELEVANT]
    weights[chosen] = generator.choice([-1, 1], RELEVANT) * generator.uniform(0.5, 1.5, RELEVANT)
    return weights


@cache
def one_variable(seed: int) -> Regress:
    """Return one input and one output: y = 2 x + noise of standard deviation 0.5."""
    generator = np.random.default_rng(seed)

    def draw(count: int) -> Split:
        x = generator.standard_normal((count, 1))
        y = 2 * x + 0.5 * generator.standard_normal((count, 1))
        return Split(torch.from_numpy(x).float(), torch.from_numpy(y).float())

    return Regress(draw(256), draw(256), draw(1_000))


LAGS = 32


@cache
def own_past(seed: int) -> Regress:
    """Return one variable and its last 32 values, from which the next is to be told.

    x(t) = 0.5 x(t-1) + 0.2 x(t-5) - 0.25 x(t-12) + noise, a stable series of which three of the 32 values matter. One
    stretch to train on, the next to choose on, the one after that to report on.
    """
    generator = np.random.default_rng(seed)
    series = np.zeros(3_000)
    noise = generator.standard_normal(len(series))
    for t in range(12, len(series)):
        series[t] = 0.5 * series[t - 1] + 0.2 * series[t - 5] - 0.25 * series[t - 12] + noise[t]
    windows = np.lib.stride_tricks.sliding_window_view(series[200:], LAGS + 1)
    x, y = torch.from_numpy(windows[:, :-1].copy()).float(), torch.from_numpy(windows[:, -1:].copy()).float()
    edges = [(0, 1_000), (1_000 + LAGS, 1_700), (1_700 + LAGS, len(x))]  # no window reaches over an edge
    train, validation, test = (Split(x[a:b], y[a:b]) for a, b in edges)
    return Regress(train, validation, test)

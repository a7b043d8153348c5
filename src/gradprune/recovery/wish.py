"""What is wanted of a search for the largest sparsity: by how much, between which ends, with which training?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradprune.core.checks import function, number, require, require_writable, whole
from gradprune.recovery.bounds import difference_at_least, mean_at_least
from gradprune.recovery.history import Round
from gradprune.recovery.outcome import Outcome

MOST_REPEATS = 10_000

Train = Callable[[nn.Module, Round], object]


@dataclass(frozen=True)
class Wish:
    """What a look must reach to pass."""

    at_least: float | None
    margin: float | None
    confidence: float | None
    repeats: int

    @property
    def wanted(self) -> float:
        """The value, or the difference to the dense one."""
        return self.at_least if self.at_least is not None else -(self.margin or 0.0)

    def gained(self, value: float, dense: float) -> float:
        """What is compared with what is wanted."""
        return value if self.at_least is not None else value - dense

    def bound(self, outcome: Outcome, dense: Outcome, looks: int, *, by_example: bool) -> float | None:
        """The lower bound of that, for one of so many looks."""
        if self.confidence is None:
            return None
        level = 1 - (1 - self.confidence) / looks
        if self.at_least is not None:
            return mean_at_least(outcome.each, level, by_example=by_example, beside=dense.each)
        return difference_at_least(outcome.each, dense.each, level, by_example=by_example)


@dataclass(frozen=True)
class Ends:
    """Between which sparsities is looked, and how finely."""

    lowest: float
    highest: float
    tolerance: float

    @property
    def looks(self) -> int:
        """How many halvings there are."""
        return max(0, math.ceil(math.log2((self.highest - self.lowest) / self.tolerance) - 1e-9))

    @property
    def gate(self) -> int:
        """How many looks it takes to see whether the lowest passes: at 0, that of the dense network."""
        return int(self.lowest > 0)


@dataclass(frozen=True)
class Correction:
    """The training that corrects what was pruned, and its steps."""

    train: Train
    steps: range


def wish_of(at_least: Any, margin: Any, confidence: Any, repeats: Any) -> Wish:
    """Return what is wanted, checked."""
    if (at_least is None) == (margin is None):
        raise ValueError(f"give exactly one of at_least and margin; got {'neither' if margin is None else 'both'}")
    at_least = None if at_least is None else number("at_least", at_least)
    margin = None if margin is None else number("margin", margin, least=0.0)
    confidence = None if confidence is None else number("confidence", confidence, least=0.5, below=1.0)
    return Wish(at_least, margin, confidence, whole("repeats", repeats, least=1, most=MOST_REPEATS))


def ends_of(tolerance: Any, lowest: Any, highest: Any) -> Ends:
    """Return the ends, checked."""
    tolerance = number("tolerance", tolerance, above=0.0, below=1.0)
    lowest = number("lowest", lowest, least=0.0, below=1.0)
    highest = number("highest", highest, above=0.0, most=1.0)
    require(lowest < highest, f"lowest must be below highest, got {lowest} and {highest}")
    return Ends(lowest, highest, tolerance)


def correction_of(model: nn.Module, train: Any, steps: Any) -> Correction | None:
    """Return the training, checked, or None where there is none."""
    if train is None:
        require(steps is None, f"steps={steps!r} needs train")
        return None
    function("train", train)
    require(steps is not None, "train needs steps: how many each run takes")
    for name, parameter in model.named_parameters():
        require_writable(name, parameter)
    return Correction(train, range(whole("steps", steps, least=1, most=2**62)))

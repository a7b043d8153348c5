"""How sparsity grows: each schedule is a function of the number of optimizer steps taken (chapters 4 and 5).

Any callable from a step to a sparsity will do in their place; a pruner prunes where its value changes. ``iterate``
counts rounds of training instead, and asks its schedule for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gradprune.core.checks import fraction, whole
from gradprune.core.words import in_our_words


@in_our_words
@dataclass(frozen=True)
class OneShot:
    """All at once: 0 before step `at`, `sparsity` from then on.

    Args:
        sparsity: the fraction to prune, in [0, 1].
        at: the step, a whole number from 0.

    Raises:
        TypeError: where an argument is no number.
        ValueError: where it is out of range.

    Example:
        >>> [gp.OneShot(0.9, at=2)(step) for step in range(4)]
        [0.0, 0.0, 0.9, 0.9]

    Chapter 4.
    """

    sparsity: float
    at: int = 0

    def __post_init__(self) -> None:
        _set(self, sparsity=fraction("sparsity", self.sparsity), at=_at_least("at", self.at, 0))

    def __call__(self, step: int) -> float:
        """The sparsity wanted after `step` steps."""
        return self.sparsity if _taken(step) >= self.at else 0.0


@in_our_words
@dataclass(frozen=True)
class Linear:
    """From `initial` at step `begin` to `final` at step `end` on a straight line; 0 before `begin`.

    Args:
        final: the sparsity from `end` on, in [0, 1].
        begin: the first step at which it changes, a whole number from 0.
        end: the last one, at least `begin`.
        every: the steps between two changes, a whole number from 1.
        initial: the sparsity at `begin`, from 0 to `final`.

    Raises:
        TypeError: where an argument is no number.
        ValueError: where it is out of range.

    Example:
        >>> [gp.Linear(0.75, begin=1, end=4)(step) for step in range(6)]
        [0.0, 0.0, 0.25, 0.5, 0.75, 0.75]

    Chapter 5.
    """

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_ramp(self)

    def __call__(self, step: int) -> float:
        """The sparsity wanted after `step` steps."""
        left = _share_left(self, step)
        return 0.0 if left is None else self.final + (self.initial - self.final) * left


@in_our_words
@dataclass(frozen=True)
class Cubic:
    """Fast at first, when there is most to spare: s(t) = final + (initial - final) (1 - (t - begin)/(end - begin))³.

    Args:
        final: the sparsity from `end` on, in [0, 1].
        begin: the first step at which it changes, a whole number from 0; the sparsity is 0 before it.
        end: the last one, at least `begin`.
        every: the steps between two changes, a whole number from 1.
        initial: the sparsity at `begin`, from 0 to `final`.

    Raises:
        TypeError: where an argument is no number.
        ValueError: where it is out of range.

    Example:
        >>> [gp.Cubic(0.8, begin=0, end=4)(step) for step in (0, 2, 4)]
        [0.0, 0.7000000000000001, 0.8]

    Zhu and Gupta (2017), equation 1; chapter 5.
    """

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_ramp(self)

    def __call__(self, step: int) -> float:
        """The sparsity wanted after `step` steps."""
        left = _share_left(self, step)
        return 0.0 if left is None else self.final + (self.initial - self.final) * left**3


@in_our_words
@dataclass(frozen=True)
class Geometric:
    """Each round removes the fraction `rate` of what is left: after r rounds the sparsity is 1 - (1 - rate)^r.

    Args:
        rate: the fraction of what is left that a round removes, in [0, 1].
        every: the steps of a round for a ``Pruner``, a whole number from 1; 1 for ``iterate``, which counts rounds.
        rounds: how many rounds there are, a whole number from 1.

    Raises:
        TypeError: where an argument is no number.
        ValueError: where it is out of range.

    Example:
        >>> [gp.Geometric(0.5, every=1, rounds=3)(step) for step in range(5)]
        [0.0, 0.5, 0.75, 0.875, 0.875]

    Frankle and Carbin (2019), section 1 (iterative pruning); chapter 5.
    """

    rate: float
    every: int
    rounds: int

    def __post_init__(self) -> None:
        _set(
            self,
            rate=fraction("rate", self.rate),
            every=_at_least("every", self.every, 1),
            rounds=_at_least("rounds", self.rounds, 1),
        )

    def __call__(self, step: int) -> float:
        """The sparsity wanted after `step` steps."""
        return 1.0 - (1.0 - self.rate) ** min(_taken(step) // self.every, self.rounds)


def values_of(schedule: Callable[[int], float]) -> Iterator[float] | None:
    """All values that a schedule of this module takes from step 0 on, ascending; None for any other function."""
    if isinstance(schedule, OneShot):
        return _ascending(schedule, [0, schedule.at])
    if isinstance(schedule, Linear | Cubic):
        last = schedule.end  # a schedule may take as many values as there are steps: they are made one by one
        changes = range(schedule.begin, last, schedule.every)
        return _ascending(schedule, (at for steps in ([0], changes, [last]) for at in steps))
    if isinstance(schedule, Geometric):
        return _ascending(schedule, (number * schedule.every for number in range(schedule.rounds + 1)))
    return None


def _ascending(schedule: Callable[[int], float], steps: Any) -> Iterator[float]:
    last = -1.0
    for step in steps:
        value = schedule(step)
        if value > last:
            yield value
            last = value


def _share_left(ramp: Linear | Cubic, step: int) -> float | None:
    """The part of the ramp still ahead at the last change up to `step`, from 1 to 0; None before it begins."""
    step = _taken(step)
    if step < ramp.begin:
        return None
    if step >= ramp.end:
        return 0.0
    last_change = ramp.begin + (step - ramp.begin) // ramp.every * ramp.every
    return 1.0 - (last_change - ramp.begin) / (ramp.end - ramp.begin)


def _check_ramp(ramp: Linear | Cubic) -> None:
    _set(
        ramp,
        final=fraction("final", ramp.final),
        initial=fraction("initial", ramp.initial),
        begin=_at_least("begin", ramp.begin, 0),
        end=_at_least("end", ramp.end, int(ramp.begin)),
        every=_at_least("every", ramp.every, 1),
    )
    if ramp.initial > ramp.final:
        raise ValueError(f"initial must be at most final, which is {ramp.final}; got {ramp.initial}")


def _set(schedule: Any, **checked: float) -> None:
    for name, value in checked.items():
        object.__setattr__(schedule, name, value)  # the dataclass is frozen


def _taken(step: int) -> int:
    """The steps taken, checked at the cost of two comparisons where they are an int, as in every training loop."""
    return step if type(step) is int and step >= 0 else _at_least("step", step, 0)


def _at_least(name: str, value: Any, least: int) -> int:
    checked = whole(name, value)
    if checked < least:
        raise ValueError(f"{name} must be at least {least}, got {checked}")
    return checked

"""How sparsity grows: each schedule is a function of the number of optimizer steps taken (chapters 4 and 5).

Any callable from a step to a sparsity will do in their place; a pruner prunes where its value changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradprune.core.checks import fraction


@dataclass(frozen=True)
class OneShot:
    """All at once: 0 before step `at`, `sparsity` from then on.

    Raises ValueError where `sparsity` is not in [0, 1] or `at` is negative. Chapter 4.
    """

    sparsity: float
    at: int = 0

    def __post_init__(self) -> None:
        fraction("sparsity", self.sparsity)
        _require_at_least("at", self.at, 0)

    def __call__(self, step: int) -> float:
        """The sparsity wanted after `step` steps."""
        return self.sparsity if step >= self.at else 0.0


@dataclass(frozen=True)
class Linear:
    """From `initial` at step `begin` to `final` at step `end` on a straight line, changing every `every` steps.

    0 before `begin`. Raises ValueError where a sparsity is not in [0, 1], the steps are not in order or `every` is
    not positive. Chapter 5.
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


@dataclass(frozen=True)
class Cubic:
    """Fast at first, when there is most to spare: s(t) = final + (initial - final) (1 - (t - begin)/(end - begin))³.

    Changes every `every` steps from `begin` on; 0 before it, `final` from `end` on. Errors as for ``Linear``.
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


@dataclass(frozen=True)
class Geometric:
    """Each round removes the fraction `rate` of what is left: after r rounds the sparsity is 1 - (1 - rate)^r.

    A round ends every `every` steps; there are `rounds` of them. Raises ValueError where `rate` is not in [0, 1], or
    `every` or `rounds` is not positive.
    Frankle and Carbin (2019), section 1 (iterative pruning); chapter 5.
    """

    rate: float
    every: int
    rounds: int

    def __post_init__(self) -> None:
        fraction("rate", self.rate)
        _require_at_least("every", self.every, 1)
        _require_at_least("rounds", self.rounds, 1)

    def __call__(self, step: int) -> float:
        """The sparsity wanted after `step` steps."""
        return 1.0 - (1.0 - self.rate) ** min(step // self.every, self.rounds)


def _share_left(ramp: Linear | Cubic, step: int) -> float | None:
    """The part of the ramp still ahead at the last change up to `step`, from 1 to 0; None before it begins."""
    if step < ramp.begin:
        return None
    if step >= ramp.end:
        return 0.0
    last_change = ramp.begin + (step - ramp.begin) // ramp.every * ramp.every
    return 1.0 - (last_change - ramp.begin) / (ramp.end - ramp.begin)


def _check_ramp(ramp: Linear | Cubic) -> None:
    fraction("final", ramp.final)
    fraction("initial", ramp.initial)
    _require_at_least("begin", ramp.begin, 0)
    _require_at_least("end", ramp.end, ramp.begin)
    _require_at_least("every", ramp.every, 1)
    if ramp.initial > ramp.final:
        raise ValueError(f"initial must be at most final, which is {ramp.final}; got {ramp.initial}")


def _require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")

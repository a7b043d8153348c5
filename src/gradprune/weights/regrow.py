"""Which pruned weights come back, and when (chapter 5)?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradprune.core.checks import fraction, function, require, whole
from gradprune.weights.request import Score


@dataclass(frozen=True)
class Regrow:
    """Let pruned weights come back: every `every` steps each layer swaps a fraction of its weights.

    Of the k weights that a layer keeps, the ``int(fraction * k)`` with the lowest score go, and as many come back, at
    zero, from among those pruned before: the ones that score highest by `by`.

    Args:
        by: the score of what may come back. ``gp.gradient`` grows where the gradient is large, which is RigL;
            ``gp.random`` grows anywhere, which is SET.
        fraction: the share to swap, in [0, 1], or a function of the step, such as a decay to 0.
        every: optimizer steps between two swaps, at least 1.

    Raises:
        TypeError, ValueError: an argument is no function, no number, or out of range.

    Example:
        >>> regrow = gp.Regrow(gp.gradient, fraction=0.2, every=50)

    Evci et al. (2020), section 3; Mocanu et al. (2018), algorithm 1; chapter 5.
    """

    by: Score
    fraction: float | Callable[[int], float] = 0.3
    every: int = 100

    def __post_init__(self) -> None:
        function("by", self.by, hint="a score such as gp.gradient or gp.random")
        object.__setattr__(self, "every", whole("every", self.every, least=1))
        if not callable(self.fraction):
            object.__setattr__(self, "fraction", fraction("fraction", self.fraction))

    def share(self, step: int) -> float:
        """Return the fraction to swap after `step` steps; 0 between the events."""
        if step % self.every:
            return 0.0
        if callable(self.fraction):
            return fraction(f"the fraction of regrow at step {step}", self.fraction(step))
        return self.fraction


def checked_regrow(regrow: Regrow | None, granularity: Any) -> Regrow | None:
    """Return it, or raise where it is no Regrow or does not go with the granularity."""
    if regrow is None:
        return None
    if not isinstance(regrow, Regrow):
        raise TypeError(f"regrow must be a gp.Regrow, got {type(regrow).__name__}")
    require(granularity == "weight", f"regrow needs granularity 'weight', got {granularity!r}")
    return regrow

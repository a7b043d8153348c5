"""Is one method better than another, pair by pair, and may one say so?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def scipy_stats() -> Any:
    """Return SciPy's statistics, or raise ImportError that says how to get them."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("intervals by Student's t need SciPy: pip install 'gradprune[search]'") from error
    return stats


def standard_error(values: Sequence[float], overlap: float = 0.0) -> float:
    """Return the standard error of the mean of `values`; of overlapping ones, as ``paired`` says."""
    return float(np.std(values, ddof=1)) * math.sqrt(1 / len(values) + overlap)


def interval(values: Sequence[float], confidence: float = 0.95, *, overlap: float = 0.0) -> tuple[float, float, float]:
    """Return the mean of `values` and the ends of its interval by Student's t; for seeds, not for examples.

    Raises ValueError for fewer than two values, of which no interval can be had.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two values, not {len(values)}")
    mean = float(np.mean(values))
    half = float(scipy_stats().t.ppf(0.5 + confidence / 2, len(values) - 1)) * standard_error(values, overlap)
    return mean, mean - half, mean + half


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, the ends of its 95 % interval, and the p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float

    @property
    def outcome(self) -> str:
        """Return "better", "worse" or "not shown": whether the interval leaves out zero, and on which side."""
        return _outcome(self.mean, self.low > 0 or self.high < 0)

    @property
    def short(self) -> str:
        """Return the mean and half of the interval, for a narrow table."""
        return f"{_signed(self.mean)} ±{self.high - self.mean:.2f}"

    def __str__(self) -> str:
        """Return the mean and the interval, with two decimals and the signs before rounding: -0.00 is below zero."""
        return f"{_signed(self.mean)} ({_signed(self.low)} to {_signed(self.high)})"


def paired(these: Sequence[float], those: Sequence[float], *, overlap: float = 0.0) -> Difference:
    """Return by how much `these` are above `those`, pair by pair (a pair a seed), by Student's t.

    `overlap` is the ratio of test to training examples where the pairs are the folds of one set of data, whose
    training parts overlap: the variance of the mean is then (1/n + overlap) times that of the gaps, in place of 1/n
    (Nadeau and Bengio 2003, section 3). Raises ValueError where the two are not of one length, and for fewer than two
    pairs.
    """
    gaps = [a - b for a, b in zip(these, those, strict=True)]
    mean, low, high = interval(gaps, overlap=overlap)
    if np.ptp(gaps) == 0:  # no spread: the interval is a point, and t is not defined
        return Difference(mean, low, high, 1.0 if mean == 0 else 0.0)
    t = abs(mean) / standard_error(gaps, overlap)
    return Difference(mean, low, high, float(2 * scipy_stats().t.sf(t, len(gaps) - 1)))


def holm(differences: Sequence[Difference], level: float = 0.05) -> list[str]:
    """Return the outcome of each when one sentence rests on all of them: Holm's step-down procedure.

    The smallest p-value is compared with `level` over the number of differences, the next with `level` over one less,
    and so on to the first that fails; that one and all after it are "not shown". Holm (1979).
    """
    outcomes = ["not shown"] * len(differences)
    for rank, at in enumerate(np.argsort([d.p for d in differences], kind="stable")):
        if differences[at].p > level / (len(differences) - rank):
            break
        outcomes[at] = _outcome(differences[at].mean, shown=True)
    return outcomes


def _outcome(mean: float, shown: bool) -> str:
    return "not shown" if not shown or mean == 0 else "better" if mean > 0 else "worse"


def _signed(value: float) -> str:
    """A number below zero keeps its sign where it rounds to zero: so a printed interval says on which side it ends."""
    return f"{0.0 if abs(value) < 1e-9 else value:+.2f}"

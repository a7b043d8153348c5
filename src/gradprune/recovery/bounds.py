"""At least how large is a mean, or a mean of paired differences, with a stated confidence?

Each bound is one-sided. Of results by example that have two values, as 0 and 1, it is a score interval's, which says
something also where all results are alike, as Student's t cannot: of 100 answers that all stayed right one does not
know that 1 in 1,000 did not turn wrong. Of others it is Student's t. Where a spread is zero because nothing varies,
there is no bound, and ValueError says so.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from gradprune.core.checks import require
from gradprune.core.paired import scipy_stats

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def mean_at_least(results: Numbers, level: float, *, by_example: bool = True, beside: Numbers | None = None) -> float:
    """Return the lower bound of the mean: Wilson's of two values by example (1927), else Student's t.

    `beside` are other results of the same kind, the dense network's: where all of these are alike, they tell which two
    values there are, or how repetitions vary.
    """
    beside = results if beside is None else beside
    ends = _two_values(results, beside) if by_example else None
    if ends is None:
        error = _standard_error(results) or _standard_error(beside)
        require(
            error > 0,
            f"all {results.size} results are {results[0]:g}, which says nothing about how they vary: give 0 and 1 for "
            "each example",
        )
        return _below(results, level, error)
    low, high = ends
    n, z = results.size, NormalDist().inv_cdf(level)
    share = (float(results.mean()) - low) / (high - low)
    center = share + z * z / (2 * n)
    bound = (center - z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / (1 + z * z / n)
    return low + (high - low) * bound


def difference_at_least(these: Numbers, those: Numbers, level: float, *, by_example: bool = True) -> float:
    """Return the lower bound of the mean by which `these` are above `those`, pair by pair.

    Of two values by example it is Tango's (1998, section 2), else Student's t of the differences; where they are all
    the same, as those of a network to itself, that difference.
    """
    ends = _two_values(these, those) if by_example else None
    if ends is None:
        return _below(these - those, level, _standard_error(these - those))
    n = these.size
    gained, lost = int(np.sum(these > those)), int(np.sum(these < those))
    z = NormalDist().inv_cdf(level)
    low, high = -1.0, (gained - lost) / n
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tango(n, gained, lost, middle) > z else (low, middle)
    return (ends[1] - ends[0]) * low


def _tango(n: int, gained: int, lost: int, difference: float) -> float:
    """The score statistic of the hypothesis that the mean difference is `difference`."""
    a, b = 2 * n, -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    worse = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # the likeliest share that turns wrong
    variance = n * (2 * worse + difference * (1 - difference))
    distance = gained - lost - n * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def _below(results: Numbers, level: float, error: float) -> float:
    """Student's lower bound of a mean with that standard error."""
    mean = float(results.mean())
    return mean - float(scipy_stats().t.ppf(level, results.size - 1)) * error if error else mean


def _standard_error(results: Numbers) -> float:
    """That of the mean; 0 where all are the same, without the rounding of a mean."""
    return 0.0 if (results == results[0]).all() else float(results.std(ddof=1)) / math.sqrt(results.size)


def _two_values(these: Numbers, those: Numbers) -> tuple[float, float] | None:
    """The two values that all results have, or None; of one value, and of few results, only 0 and 1 are known to be."""
    found = np.union1d(these, those)
    if np.isin(found, (0.0, 1.0)).all():
        return 0.0, 1.0
    return (float(found[0]), float(found[1])) if found.size == 2 and these.size > 2 else None

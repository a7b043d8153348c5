"""At least how large is a mean, or a mean of paired differences, with a stated confidence?

Each bound is one-sided. Of results that are all 0 or 1 it is a score interval's, which says something also where all
results are alike, as Student's t cannot: of 100 answers that all stayed right one does not know that 1 in 1,000 did not
turn wrong. Of others it is Student's t.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from gradprune.core.paired import scipy_stats

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def mean_at_least(results: Numbers, level: float, *, by_example: bool = True) -> float:
    """Return the lower bound of the mean: Wilson's of zeros and ones by example (1927), else Student's t."""
    if not (by_example and _binary(results)):
        return _by_t(results, level)
    n, z = results.size, NormalDist().inv_cdf(level)
    share = float(results.mean())
    center = share + z * z / (2 * n)
    return (center - z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)) / (1 + z * z / n)


def difference_at_least(these: Numbers, those: Numbers, level: float, *, by_example: bool = True) -> float:
    """Return the lower bound of the mean by which `these` are above `those`, pair by pair.

    Of zeros and ones by example it is Tango's (1998, section 2), else Student's t of the differences.
    """
    if not (by_example and _binary(these) and _binary(those)):
        return _by_t(these - those, level)
    n = these.size
    gained, lost = int(np.sum(these > those)), int(np.sum(these < those))
    z = NormalDist().inv_cdf(level)
    low, high = -1.0, (gained - lost) / n
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tango(n, gained, lost, middle) > z else (low, middle)
    return low


def _tango(n: int, gained: int, lost: int, difference: float) -> float:
    """The score statistic of the hypothesis that the mean difference is `difference`."""
    a, b = 2 * n, -gained - lost + (2 * n - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    worse = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # the likeliest share that turns wrong
    variance = n * (2 * worse + difference * (1 - difference))
    distance = gained - lost - n * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)


def _by_t(results: Numbers, level: float) -> float:
    error = float(results.std(ddof=1)) / math.sqrt(results.size)
    mean = float(results.mean())
    return mean - float(scipy_stats().t.ppf(level, results.size - 1)) * error if error else mean


def _binary(results: Numbers) -> bool:
    return bool(((results == 0) | (results == 1)).all())

"""Is one method better than another, or no worse than a tolerance, seed by seed, and may one say so?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradprune.core.paired import Difference, holm, paired

__all__ = ["Difference", "Noninferiority", "holm", "noninferior", "noninferior_together", "paired"]


@dataclass(frozen=True)
class Noninferiority:
    """By what share an error grew, the ends of its 95 % interval, the share allowed, and the p-value of just that."""

    growth: float
    low: float
    high: float
    tolerance: float
    p: float

    @property
    def outcome(self) -> str:
        """Return "holds" (the interval is within the tolerance), "fails" (it is beyond) or "not shown" (neither)."""
        if self.high <= self.tolerance:
            return "holds"
        return "fails" if self.low > self.tolerance else "not shown"

    def __str__(self) -> str:
        """Return the growth and its interval in percent."""
        return f"{self.growth:+.0%} ({self.low:+.0%} to {self.high:+.0%})".replace("%", " %")


def noninferior(errors: Sequence[float], reference: Sequence[float], *, tolerance: float) -> Noninferiority:
    """Return whether errors are at most `tolerance` above those of a reference, as a share of these, by pairs of seeds.

    What is judged is the mean of ``error - (1 + tolerance) * reference``, seed by seed, by Student's t: a ratio of
    means, so that a seed whose reference errs little does not count for many. The interval is Fieller's: all growths
    for which that mean is not shown to differ from 0. So "holds" and "fails" are each wrong in one of forty cases.

    Raises ValueError where the two are not of one length, for fewer than two pairs, where `tolerance` is not positive
    or an error is negative or not finite, and where the reference's mean is not shown to be above 0: of nothing there
    are no shares.
    """
    these, those = np.asarray(errors, dtype=float), np.asarray(reference, dtype=float)
    if these.shape != those.shape or these.ndim != 1 or len(these) < 2:
        raise ValueError(f"two pairs at least, of one length, got {these.shape} and {those.shape}")
    if not (np.isfinite(these).all() and np.isfinite(those).all() and (these >= 0).all() and (those >= 0).all()):
        raise ValueError("errors are finite and not negative; of an accuracy give one minus it")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {tolerance!r}")
    low, high = _fieller(these, those)
    gap = paired(these.tolist(), ((1 + tolerance) * those).tolist())
    return Noninferiority(float(these.mean() / those.mean()) - 1, low - 1, high - 1, tolerance, gap.p)


def noninferior_together(found: Sequence[Noninferiority], level: float = 0.05) -> list[str]:
    """Return the outcome of each when one sentence rests on all of them, by Holm's procedure as in `holm`."""
    below = [Difference(f.tolerance - f.growth, 0.0, 0.0, f.p) for f in found]
    return [{"better": "holds", "worse": "fails"}.get(said, said) for said in holm(below, level)]


def _fieller(these: np.ndarray, those: np.ndarray) -> tuple[float, float]:
    """The ratios r for which the mean of these - r * those is within its interval of 0: the roots of a square."""
    from scipy import stats

    count = len(these)
    t = float(stats.t.ppf(0.975, count - 1))
    cov = np.cov(these, those) * t**2 / count
    a, b = float(these.mean()), float(those.mean())
    square, linear, constant = b * b - float(cov[1, 1]), a * b - float(cov[0, 1]), a * a - float(cov[0, 0])
    if square <= 0:
        raise ValueError("the reference's errors are too few or too far apart for a share of them to mean anything")
    root = math.sqrt(max(linear * linear - square * constant, 0.0))
    return (linear - root) / square, (linear + root) / square

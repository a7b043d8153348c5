"""Is one method better than another, seed by seed, and may one say so?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gradprune.lab.train import interval


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
        """Return the mean and the interval, with signs and two decimals."""
        return f"{_signed(self.mean)} ({_signed(self.low)} to {_signed(self.high)})"


def paired(these: Sequence[float], those: Sequence[float]) -> Difference:
    """Return by how much `these` are above `those`, pair by pair (a pair a seed), by Student's t.

    Raises ValueError where the two are not of one length, and for fewer than two pairs.
    """
    gaps = [a - b for a, b in zip(these, those, strict=True)]
    mean, low, high = interval(gaps)
    if np.ptp(gaps) == 0:  # no spread: the interval is a point, and t is not defined
        return Difference(mean, low, high, 1.0 if mean == 0 else 0.0)
    return Difference(mean, low, high, float(stats.ttest_1samp(gaps, 0.0).pvalue))


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
    return f"{round(value, 2) + 0.0:+.2f}"

"""What do the measured rows say: how much can go, is it more than by chance, and does that count as working?

What counts was fixed before the runs. "It works on this network" needs two things in one scope, over the whole network
or layer by layer: pruned by magnitude to at least 80 % and corrected, the mean stays within the row's tolerance of the
dense mean; and at one sparsity at least it is better than random pruning beyond the interval. A row whose dense network
misses its stated level is no evidence either way; neither is a loss at 80 % whose interval reaches into the tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradprune.lab import experiment
from gradprune.lab.zoo import base
from gradprune.lab.zoo.base import Architecture

NEEDED = 0.8  # the sparsity that magnitude has to reach within the tolerance


@dataclass(frozen=True)
class Row:
    """One architecture with its measured cells."""

    architecture: Architecture
    dense: Mapping[str, Any]
    cells: Mapping[tuple[str, str], Mapping[str, Any]]

    @property
    def dense_mean(self) -> float:
        """The dense networks' mean metric on test data."""
        return float(np.mean(self.dense["test"]))

    @property
    def reached(self) -> bool:
        """Whether the dense networks' mean on validation data is as good as the level stated beforehand."""
        return self.architecture.reaches(float(np.mean(self.dense["validation"])))

    @property
    def sparsities(self) -> list[float]:
        """The sparsities, rising."""
        return list(self.cells["magnitude", "global"]["sparsities"])

    def means(self, score: str, scope: str, when: str = "corrected") -> list[float]:
        """Return the mean over seeds at each sparsity, "pruned" or "corrected"."""
        return [float(np.mean(values)) for values in self.cells[score, scope][when]]

    def lost(self, score: str, scope: str, when: str = "corrected") -> list[float]:
        """Return the mean loss at each sparsity as a share of the tolerance: 1 is its edge."""
        return [self.architecture.lost(self.dense_mean, mean) for mean in self.means(score, scope, when)]

    def largest(self, score: str, scope: str, when: str = "corrected", against: str = "test") -> float | None:
        """Return the largest sparsity within the tolerance of the dense mean, with every smaller one; or None.

        ``against="continued"`` takes the dense networks that were trained on for as long as a correction.
        """
        cell = self.cells[score, scope]
        return base.largest_sparsity(self.architecture, self.dense[against], cell[when], cell["sparsities"])

    def advantages(self, scope: str, when: str = "corrected") -> list[tuple[float, float, float]]:
        """Return how much better magnitude is than random at each sparsity: the mean and its interval's ends."""
        pairs = zip(self.cells["magnitude", scope][when], self.cells["random", scope][when], strict=True)
        return [base.advantage(self.architecture, ours, other) for ours, other in pairs]

    def ahead(self, scope: str, when: str = "corrected") -> list[bool]:
        """Whether magnitude beats random beyond the interval, at each sparsity."""
        return [low > 0 for _, low, _ in self.advantages(scope, when)]

    def behind(self, scope: str, when: str = "corrected") -> list[bool]:
        """Whether random beats magnitude beyond the interval, at each sparsity."""
        return [high < 0 for _, _, high in self.advantages(scope, when)]

    def works(self, scope: str | None = None) -> bool:
        """Whether pruning by magnitude works on this network, in `scope` or in either, by what was fixed beforehand."""
        if scope is None:
            return any(self.works(scope) for scope in base.SCOPES)
        return self.reached and (self.largest("magnitude", scope) or 0.0) >= NEEDED and any(self.ahead(scope))

    def contradicted(self) -> bool:
        """Whether it does not work: at 80 % more than the tolerance is lost, in either scope, beyond the interval.

        The interval is that of the difference to the dense network, seed by seed.
        """
        at = self.sparsities.index(NEEDED)
        allowed = self.architecture.tolerance * (abs(self.dense_mean) if self.architecture.relative else 1.0)
        corrected = [self.cells["magnitude", scope]["corrected"][at] for scope in base.SCOPES]
        lost = [base.advantage(self.architecture, self.dense["test"], values) for values in corrected]
        return self.reached and all(low > allowed for _, low, _ in lost)


def rows(architectures: Sequence[Architecture], result: Mapping[str, Any] | None = None) -> dict[str, Row]:
    """Return the measured rows by name; of chapters/results/architectures.json unless `result` is given."""
    result = experiment.load("architectures") if result is None else result
    cells = {(row["architecture"], row["score"], row["scope"]): row for row in result["rows"]}
    pairs = [(score, scope) for score in base.SCORES for scope in base.SCOPES]
    return {
        a.name: Row(a, cells[a.name, "dense", "none"], {pair: cells[(a.name, *pair)] for pair in pairs})
        for a in architectures
    }


def percent(sparsity: float | None) -> str:
    """Return a largest sparsity in words: "90 %", or "none"."""
    return "none" if sparsity is None else f"{sparsity:.0%}".replace("%", " %")

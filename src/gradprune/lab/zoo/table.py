"""What do the measured rows say, by the protocol that was fixed before the runs (chapter 7)?

The protocol (`architectures_protocol`, among the experiments) says of a row at 50 and at 80 % whether it can be pruned
and whether the choice by size does it. From these two a row *works* to a sparsity: it can be pruned to it and to every
smaller one judged, and at one of them at least size chooses better than chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from gradprune.core.paired import Difference
from gradprune.lab import compare, experiment
from gradprune.lab.compare import Noninferiority
from gradprune.lab.zoo.base import Architecture

Outcomes = dict[tuple[str, float], tuple[str, str]]


def protocol() -> ModuleType:
    """Return the protocol as a module: its tolerance, sparsities and functions."""
    return experiment.script("architectures_protocol")


@dataclass(frozen=True)
class Row:
    """One architecture with its measured cells, by (score, scope); the dense one is ("dense", "none")."""

    architecture: Architecture
    cells: Mapping[tuple[str, str], Mapping[str, Any]]

    @property
    def name(self) -> str:
        """The architecture's name."""
        return self.architecture.name

    @property
    def reached(self) -> bool:
        """Whether the dense networks' mean on validation data is as good as the level stated beforehand."""
        return self.architecture.reaches(float(np.mean(self.cells["dense", "none"]["validation"])))

    @property
    def sparsities(self) -> list[float]:
        """The sparsities, rising."""
        return list(self.cells["magnitude", protocol().PRIMARY]["sparsities"])

    def dense(self, when: str = "continued") -> list[float]:
        """Return the dense networks' test errors, seed by seed: trained on ("continued") or as trained ("test")."""
        return self._errors(self.cells["dense", "none"][when])

    def errors(self, sparsity: float, score: str = "magnitude", scope: str | None = None) -> list[float]:
        """Return the test errors after correction, seed by seed."""
        cell = self.cells[score, scope or protocol().PRIMARY]
        return self._errors(cell["corrected"][cell["sparsities"].index(sparsity)])

    def growth(
        self, sparsity: float, score: str = "magnitude", scope: str | None = None, tolerance: float | None = None
    ) -> Noninferiority:
        """Return by what share the error grew over that of the dense networks trained on, with what may be said."""
        allowed = tolerance or protocol().TOLERANCE
        return compare.noninferior(self.errors(sparsity, score, scope), self.dense(), tolerance=allowed)

    def lead(self, sparsity: float, scope: str | None = None) -> Difference:
        """Return by how much random pruning errs more, seed by seed."""
        return compare.paired(self.errors(sparsity, "random", scope), self.errors(sparsity, scope=scope))

    def _errors(self, values: Sequence[float]) -> list[float]:
        return [protocol().error(self.architecture, value) for value in values]


def rows(known: Iterable[Architecture], measured: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Row]:
    """Return the rows of `known` that are measured in full, by name.

    `measured` are the cells of the result `architectures_again`, unless given.
    """
    if measured is None:
        measured = experiment.load("architectures_again")["rows"]
    scopes = protocol().SCOPES
    wanted = {("dense", "none"), *((score, scope) for score in ("magnitude", "random") for scope in scopes)}
    cells: dict[str, dict[tuple[str, str], Mapping[str, Any]]] = {}
    for cell in measured:
        cells.setdefault(cell["architecture"], {})[cell["score"], cell["scope"]] = cell
    return {a.name: Row(a, cells[a.name]) for a in known if wanted <= set(cells.get(a.name, ()))}


def outcomes(found: Mapping[str, Row], tolerance: float | None = None) -> Outcomes:
    """Return of each row at each sparsity judged what is said of "can be pruned" and of "size chooses well".

    One family for Holm's procedure, as the protocol says; a row that misses its level is not in it.
    """
    judged = {
        (name, sparsity): (row.growth(sparsity, tolerance=tolerance), row.lead(sparsity))
        for name, row in found.items()
        if row.reached
        for sparsity in protocol().JUDGED
    }
    said: Outcomes = protocol().outcomes(judged)
    return said


def works_to(name: str, said: Outcomes) -> float | None:
    """Return the largest sparsity judged to which pruning by size works on a row; None where it is not shown."""
    answer, leads = None, False
    for sparsity in sorted(protocol().JUDGED):
        pruned, lead = said.get((name, sparsity), ("no evidence", "not asked"))
        if pruned != "holds":
            break
        leads = leads or lead == "holds"
        answer = sparsity if leads else None
    return answer


def contradicted(name: str, said: Outcomes) -> bool:
    """Whether a row fails at every sparsity judged: the error is beyond the tolerance, or random pruning errs less."""
    here = [said[name, sparsity] for sparsity in protocol().JUDGED if (name, sparsity) in said]
    return bool(here) and all("fails" in both for both in here)


def kinds(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the names in groups of which each counts once: rows that share a network, or differ in its optimizer."""
    names, alike = list(names), protocol().ALIKE
    together: list[tuple[str, ...]] = [tuple(name for name in names if name in group) for group in alike]
    alone: list[tuple[str, ...]] = [(name,) for name in names if not any(name in group for group in alike)]
    return sorted([group for group in together if group] + alone, key=lambda group: names.index(group[0]))


def percent(share: float) -> str:
    """Return a share in words: "50 %"."""
    return f"{share:.0%}".replace("%", " %")

"""What does a search draw from (chapter 6): choices by their labels, and ranges."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gradprune.core.checks import require
from gradprune.recovery.told import name_of

Space = Mapping[str, Any]  # as a user gives it

AMOUNTS = frozenset({"sparsity", "threshold"})  # between two whole numbers of them lie others
CHOICES_ONLY = frozenset({"score", "scope", "granularity", "include", "exclude", "within", "axes"})


@dataclass(frozen=True)
class SearchSpace:
    """What is drawn from: choices by their labels, and ranges, which are Optuna's distributions."""

    choices: dict[str, dict[str, Any]]
    ranges: dict[str, Any]

    def drawn(self, drawing: Any) -> dict[str, Any]:
        """What Optuna draws: labels and numbers."""
        labels = {name: drawing.suggest_categorical(name, list(of)) for name, of in self.choices.items()}
        return labels | {name: _suggested(drawing, name, of) for name, of in self.ranges.items()}

    def settings(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """What is meant by them."""
        return {n: self.choices[n][value] if n in self.choices else value for n, value in params.items()}

    def words(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Them in the order of the space, None where they were not drawn."""
        return {name: params.get(name) for name in (*self.choices, *self.ranges)}

    def grid(self) -> dict[str, list[str]]:
        """All labels."""
        return {name: list(of) for name, of in self.choices.items()}

    def combinations(self) -> list[dict[str, str]]:
        """Every combination of labels."""
        return [dict(zip(self.choices, labels, strict=True)) for labels in itertools.product(*self.choices.values())]

    def grid_size(self) -> int:
        """How many combinations there are; ValueError where they cannot be counted."""
        require(not self.ranges, f"a grid needs lists of choices; {', '.join(map(repr, self.ranges))} has a range")
        return math.prod(len(of) for of in self.choices.values())

    def require_used(self, known: Collection[str]) -> None:
        """Raise ValueError where a name is none that ``prune`` takes, or nothing says how much is to be pruned."""
        for name in (*self.choices, *self.ranges):
            near = difflib.get_close_matches(name, known, 1)
            require(
                name in known,
                f"space names {name!r}, which prune does not take{f'; did you mean {near[0]!r}?' if near else ':'} "
                "Only train reads other names, and there is none",
            )
        require(
            bool(AMOUNTS & (self.choices.keys() | self.ranges.keys()))
            or any(isinstance(of, Mapping) for of in self.choices.get("scope", {}).values())
            or any(is_n_of_m(of) for of in self.choices.get("granularity", {}).values()),
            "space says nowhere how much is pruned: name sparsity or threshold in it, or give a train that prunes",
        )

    def described(self) -> dict[str, Any]:
        """What a file must agree with."""
        return {name: list(of) for name, of in self.choices.items()} | {n: repr(of) for n, of in self.ranges.items()}


def is_n_of_m(granularity: Any) -> bool:
    """Return whether it is itself a sparsity."""
    if isinstance(granularity, tuple):
        return len(granularity) == 2 and granularity[0] < granularity[1]
    return isinstance(granularity, str) and ":" in granularity


def _suggested(drawing: Any, name: str, of: Any) -> Any:
    """What Optuna draws from one of its distributions."""
    if not hasattr(of, "low"):
        return drawing.suggest_categorical(name, of.choices)
    suggest = drawing.suggest_int if "Int" in type(of).__name__ else drawing.suggest_float
    return suggest(name, of.low, of.high, step=of.step, log=of.log)


def space_of(library: Any, space: Any) -> SearchSpace:
    """Return what a user gave, checked: lists are choices, tuples ranges."""
    if not isinstance(space, Mapping):
        raise TypeError(f"space must be a dict from names to what is drawn from, got {type(space).__name__}")
    require(bool(space), "space is empty: there is nothing to draw")
    choices: dict[str, dict[str, Any]] = {}
    ranges: dict[str, Any] = {}
    for name, of in space.items():
        if not isinstance(name, str):
            raise TypeError(f"space must have names as keys, got {name!r}")
        if isinstance(of, library.distributions.BaseDistribution):
            ranges[name] = of
        elif name == "example":  # a network's input, be it a tuple or a dict
            choices[name] = {f"a {type(of).__name__}": of}
        elif isinstance(of, tuple) and name not in CHOICES_ONLY:
            ranges[name] = _range(library, name, of)
        else:
            choices[name] = _labelled(name, of)
    return SearchSpace(choices, ranges)


def _range(library: Any, name: str, ends: tuple[Any, ...]) -> Any:
    sound = len(ends) == 2 and all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    wanted = f"space[{name!r}] is a tuple, and so a pair (low, high) of numbers with low < high; choices are a list"
    require(sound and ends[0] < ends[1] and math.isfinite(ends[1] - ends[0]), f"{wanted}. Got {ends}")
    low, high = ends
    if isinstance(low, int) and isinstance(high, int) and name not in AMOUNTS:
        return library.distributions.IntDistribution(low, high)
    return library.distributions.FloatDistribution(float(low), float(high))


def _labelled(name: str, of: Any) -> dict[str, Any]:
    """Choices by their labels: the keys of a dict, or what they are called."""
    if isinstance(of, Mapping):
        require(bool(of) and all(isinstance(k, str) for k in of), f"space[{name!r}] must have names as keys")
        return dict(of)
    every = list(of) if isinstance(of, list | range) else [of]
    require(bool(every), f"space[{name!r}] is empty")
    labels = [name_of(value) for value in every]
    twice = {label for label in labels if labels.count(label) > 1}
    twice |= {label for label in labels if " at 0x" in label or "<lambda>" in label}
    require(not twice, f"choices of space[{name!r}] need names, as a dict: {', '.join(sorted(twice))} tells too little")
    return dict(zip(labels, every, strict=True))

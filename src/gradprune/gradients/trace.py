"""What did a recorder see: the norms of gradients and updates, and the statistics of activations (chapter 1)?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradprune.core import checks
from gradprune.gradients.norms import Scalar
from gradprune.gradients.plotting import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STATISTICS = ("mean", "std", "zero")
Row = tuple[int, dict[str, Scalar], dict[str, Scalar], dict[str, list[Scalar]]]
"""A step's number, the norms of gradients, those of updates over parameters, and each module's statistics."""

_NAMED = 10  # lines that a legend can name


@dataclass(eq=False)
class Trace:
    """What a :class:`Recorder` saw: one list entry for each recorded step. Equal where all numbers are, nan to nan.

    Attributes:
        steps: the step numbers, from 0.
        gradients: by parameter, the norm of its gradient before the step.
        updates: by parameter, the norm of the change that the step made, over the norm of the parameter before it; inf
            where a parameter left zero, nan where it stayed there.
        activations: by module, of its output over all entries, "mean", "std" (of the entries, not an estimate) and
            "zero", the share that is exactly zero.

    Chapter 1.
    """

    steps: list[int] = field(default_factory=list)
    gradients: dict[str, list[float]] = field(default_factory=dict)
    updates: dict[str, list[float]] = field(default_factory=dict)
    activations: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    __hash__ = None  # type: ignore[assignment]  # it grows, as a list does

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        return _same(vars(self), vars(other))

    def _extend(self, rows: Sequence[Row], numbers: Sequence[float]) -> None:
        """Append rows whose scalars, in their order, are these numbers."""
        ahead = iter(numbers)
        for step, norms, updates, seen in rows:
            at = len(self.steps)
            self.steps.append(step)
            _append(self.gradients, {name: next(ahead) for name in norms}, at)
            _append(self.updates, {name: next(ahead) for name in updates}, at)
            found = {name: {statistic: next(ahead) for statistic in STATISTICS} for name in seen}
            for name in dict.fromkeys((*self.activations, *found)):
                columns = self.activations.setdefault(name, {statistic: [] for statistic in STATISTICS})
                _append(columns, found.get(name, {}), at)

    def plot(self) -> Figure:
        """Draw what was recorded over the steps, a line a parameter or module, from the first layer to the last.

        Returns:
            A matplotlib figure: the norms of gradients, the updates over the parameters, and the standard deviations of
            the outputs, each on a logarithmic axis, as far as they were recorded. Zeros have no place on it.

        Raises:
            ImportError: without matplotlib.
            ValueError: where nothing was recorded.

        Example:
            >>> trace = gp.Trace(steps=[0, 1], gradients={"weight": [1.0, 0.1]})
            >>> [axes.get_ylabel() for axes in trace.plot().axes]
            ['norm of the gradient']
        """
        deviations = {name: columns["std"] for name, columns in self.activations.items()}
        panels = {
            "norm of the gradient": self.gradients,
            "norm of the update\nover the parameter's": self.updates,
            "standard deviation\nof the output": deviations,
        }
        panels = {label: columns for label, columns in panels.items() if columns}
        checks.require(bool(self.steps and panels), "there is nothing to plot: no step was recorded")
        figure = new_figure(2.2 * len(panels) + 0.4)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (label, columns) in zip(axes, panels.items(), strict=True):
            _draw(axis, self.steps, columns)
            axis.set(yscale="log", ylabel=label)
        axes[-1].set_xlabel("step")
        figure.suptitle(f"{len(self.steps)} recorded steps, first layer dark, last layer light")
        return figure


def _draw(axes: Axes, steps: list[int], columns: Mapping[str, list[float]]) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    named = {round(at * (len(columns) - 1) / (_NAMED - 1)) for at in range(_NAMED)}
    for at, (name, numbers) in enumerate(columns.items()):
        positive = [number if 0 < number < math.inf else math.nan for number in numbers]
        label = (name or "model") if len(columns) <= _NAMED or at in named else None
        marker = "." if len(steps) <= 30 else None
        colour = colours(0.9 * at / max(1, len(columns) - 1))
        axes.plot(steps, positive, marker=marker, linewidth=1, color=colour, label=label)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other or (one != one and other != other))


def _append(columns: dict[str, list[float]], row: Mapping[str, float], at: int) -> None:
    for name in dict.fromkeys((*columns, *row)):
        column = columns.setdefault(name, [])
        column.extend([math.nan] * (at - len(column)))
        column.append(row.get(name, math.nan))

"""What does each layer lose when it alone is pruned, a sparsity at a time (chapter 6)?

A layer is ranked once; its masks at growing sparsities lie within each other, so that each is applied over the one
before, and the layer is put back once, after its last. The rest of the time is the caller's `evaluate`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from gradprune.core import files
from gradprune.core.checks import fraction, function, module, require, warn
from gradprune.core.masked import zero_pruned_
from gradprune.core.progress import bar
from gradprune.core.tables import Table, cell
from gradprune.core.words import in_our_words
from gradprune.recovery.original import Original
from gradprune.recovery.outcome import Measure, measured
from gradprune.recovery.told import digest, score_of
from gradprune.weights.eligible import Patterns, StatedAxes
from gradprune.weights.granularity import Granularity, Ranked
from gradprune.weights.groups import Groups
from gradprune.weights.request import Request, Score, checked_score, ranked_by
from gradprune.weights.score import magnitude

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
_KEY = "gradprune.sensitivity"
_LABELLED = 10  # layers that a picture names


@dataclass(frozen=True)
class Sensitivity(Table):
    """What ``sensitivity`` found: for each layer alone, what `evaluate` gave at each sparsity.

    Printed, it is a table; ``fit_budget`` takes it.

    Args:
        dense: what `evaluate` gave for the network as it was.
        values: layer -> {sparsity: what `evaluate` gave}.
        weights: layer -> how many weights it has.
        score: what ranked the weights.
        granularity: what went together.
        eligible: the patterns and axes that said which layers take part, as ``prune`` takes them.

    Chapter 6.
    """

    _named_by: ClassVar[str | None] = "layer"

    dense: float
    values: dict[str, dict[float, float]] = field(hash=False)
    weights: dict[str, int] = field(hash=False)
    score: Score = magnitude
    granularity: Granularity = "weight"
    eligible: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def losses(self) -> dict[str, dict[float, float]]:
        """Return by how much each value lies below the dense one, layer by layer; a gain is negative."""
        return {name: {s: self.dense - value for s, value in row.items()} for name, row in self.values.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a layer: its name, its weights, and the value at each sparsity."""
        return [
            {"layer": name, "weights": self.weights[name]} | {f"{s:g}": value for s, value in row.items()}
            for name, row in self.values.items()
        ]

    def _notes(self) -> list[str]:
        return [f"What evaluate gave with one layer pruned to a sparsity; dense {cell(self.dense)}."]

    def plot(self) -> Figure:
        """Draw the values over sparsity, a line a layer, beside the dense one. Needs matplotlib.

        The layers that lose most are named.

        Returns:
            The figure, which no window shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from gradprune.gradients.plotting import new_figure

        figure = new_figure(3.6)
        axes = figure.subplots()
        axes.axhline(self.dense, linestyle=":", color="gray", label="dense")
        worst = sorted(self.values, key=lambda name: min(self.values[name].values()))
        named = set(worst[:_LABELLED])
        for name, row in self.values.items():
            style = {"label": name} if name in named else {"color": "gray", "alpha": 0.4, "linewidth": 0.8}
            axes.plot(list(row), list(row.values()), marker=".", **style)
        axes.set(xlabel="sparsity of the one layer", ylabel="what evaluate gave")
        if len(worst) > len(named):
            axes.plot([], [], color="gray", alpha=0.4, label=f"{len(worst) - len(named)} more")
        figure.legend(loc="outside right upper", fontsize="small")
        return figure


@in_our_words
def sensitivity(
    model: nn.Module,
    evaluate: Measure,
    sparsities: Iterable[float] | None = None,
    *,
    score: Score = magnitude,
    granularity: Granularity = "weight",
    include: Patterns = None,
    exclude: Patterns = None,
    axes: StatedAxes = None,
    example: Any = None,
    file: str | os.PathLike[str] | None = None,
) -> Sensitivity:
    """Return what `evaluate` gives when each layer alone is pruned to each sparsity.

    L layers at S sparsities are L times S evaluations and one of the dense network. The masks are those of
    ``prune(model, score, scope={layer: sparsity})``, and each of a layer's lies within the one before. The model is
    left bit by bit as it was, its buffers, modes and gradients too, whatever is raised meanwhile: a copy of its
    parameters is kept until then.

    Args:
        model: the network; it is pruned while the call runs.
        evaluate: a function from the model to a number, or to a tensor with one result an example, of which the mean
            is taken; the higher, the better (of a loss, give the negative). Use validation data.
            It may change buffers, modes and gradients, not the weights, their dtype or requires_grad, nor which there
            are: give it a copy for that, ``copy.deepcopy(model)``. A change is noticed after the evaluation; one
            through ``.data``, which torch does not count, after the first and at the end.
        sparsities: in (0, 1], growing; 0.3, 0.5, 0.7, 0.8, 0.9, 0.95 and 0.98 unless given. None for n of m.
        score: as for ``prune``; asked once.
        granularity: as for ``prune``; with ``"group"`` what is pruned alone is a group, which has the name of the first
            weight of its filters.
        include: as for ``prune``.
        exclude: as for ``prune``.
        axes: as for ``prune``.
        example: as for ``prune``, for ``"group"``.
        file: where each result is written down, in JSON, whole or not at all. The same call with the file there goes
            on from it. It knows the model by a sample of its weights, and the score by its name, with the arguments of
            a ``functools.partial`` and the numbers and words that a function encloses; a data loader's contents and
            `evaluate` it does not know.

    Returns:
        A ``Sensitivity``.

    Raises:
        TypeError: where an argument is of a wrong kind.
        ValueError: where one is out of range, nothing is eligible, the score has no name, as a lambda, for a `file` to
            know it by, or the file is damaged, of another call or cannot be written: before anything is evaluated. Also
            where `evaluate` returns anything but finite numbers, or changes the weights.

    Warns where every layer gains at the highest sparsity, as where `evaluate` returns a loss.

    Example:
        >>> x = torch.ones(1, 8)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
        >>> found = gp.sensitivity(model, lambda model: -model(x).abs(), [0.5, 0.9])
        >>> list(found.values), list(found.values["0.weight"])
        (['0.weight', '1.weight'], [0.5, 0.9])

    Han et al. (2015), section 4.1 and figure 6; chapter 6.
    """
    module(model)
    function("evaluate", evaluate)
    score = checked_score(score)
    patterns = {"include": include, "exclude": exclude, "axes": axes}
    if isinstance(granularity, str) and granularity == "group":
        groups = Groups.of(model, example, include, exclude, axes)
        levels = _levels(sparsities, None)
        weights = {name: groups.weights(name) for name in groups.numbers}
        notes = _Notes(file, model, weights, levels, score, granularity)
        steps = _coupled(groups, ranked_by(score, model, groups.parameters), levels)
    else:
        require(example is None, f"example is for granularity='group'; got granularity={granularity!r}")
        request = Request.of(model, granularity=granularity, include=include, exclude=exclude, axes=axes)
        levels = _levels(sparsities, request.n_of_m)
        weights = {name: weight.parameter.numel() for name, weight in request.layers.items()}
        notes = _Notes(file, model, weights, levels, score, granularity)
        steps = _alone(request, ranked_by(score, model, request.parameters))
    original = Original(model)
    with original.kept(), bar(1 + len(levels) * len(weights), "sensitivity", notes.done) as progress:
        if notes.dense is None:
            notes.add_dense(measured(evaluate, model, "for the dense network", original).mean)
            progress.update()
        for name in weights:
            _scan_layer(model, original, evaluate, steps, name, levels, notes, progress.update)
    assert notes.dense is not None
    _warn_of_gains(notes.dense, notes.values, levels[-1])
    return Sensitivity(notes.dense, notes.values, weights, score, granularity, patterns)


def _warn_of_gains(dense: float, values: Mapping[str, Mapping[float, float]], most: float) -> None:
    """Warn where every layer gains."""
    if values and all(row[most] > dense for row in values.values()):
        warn(f"every layer gains with {most:g} of it pruned: if evaluate returns a loss or an error, give its negative")


def _levels(sparsities: Any, n_of_m: tuple[int, int] | None) -> list[float]:
    """The sparsities as plain floats, checked."""
    if n_of_m is not None:
        n, m = n_of_m
        require(sparsities is None, f"granularity {n}:{m} is itself a sparsity of {1 - n / m:g}: give no others")
        return [1 - n / m]
    if sparsities is None:
        return list(SPARSITIES)
    if isinstance(sparsities, str | bytes | Mapping) or not isinstance(sparsities, Iterable):
        raise TypeError(f"sparsities must be several numbers, such as [0.5, 0.9], got {type(sparsities).__name__}")
    levels = [fraction(f"sparsities[{at}]", value) for at, value in enumerate(sparsities)]
    require(bool(levels), "sparsities is empty")
    require(
        levels[0] > 0 and all(a < b for a, b in pairwise(levels)),
        f"sparsities must be positive and grow, got {levels}",
    )
    return levels


Pruned = list[tuple[nn.Parameter, Tensor]]  # what is pruned, and what stays of it
Steps = Callable[[str], tuple[list[nn.Parameter], Callable[[float], Pruned]]]  # what one layer's masks write, and they


def _alone(request: Request, ranked: Ranked) -> Steps:
    """The masks of one layer by itself."""

    def steps(name: str) -> tuple[list[nn.Parameter], Callable[[float], Pruned]]:
        parameter = request.layers[name].parameter
        own = ranked.values[name].detach()
        own = own.clone() if ranked.by == "magnitude" else own  # else it would change with the layer

        def pruned(sparsity: float) -> Pruned:
            given = None if request.n_of_m is not None else sparsity
            return [(parameter, request.alone(name, sparsity).keep(Ranked({name: own}, ranked.by), given)[name])]

        return [parameter], pruned

    return steps


def _coupled(groups: Groups, ranked: Ranked, levels: list[float]) -> Steps:
    """The masks of one group by itself, with what goes beside the filters."""
    scores = ranked.scores()

    def steps(name: str) -> tuple[list[nn.Parameter], Callable[[float], Pruned]]:
        number = groups.numbers[name]

        def pruned(sparsity: float) -> Pruned:
            masks = groups.masks(scores, None, None, None, {number: sparsity})
            return [(groups.others[n], mask) for n, mask in masks.items() if not bool(mask.all())]

        return [parameter for parameter, _ in pruned(levels[-1])], pruned

    return steps


def _scan_layer(
    model: nn.Module,
    original: Original,
    evaluate: Measure,
    steps: Steps,
    name: str,
    levels: list[float],
    notes: _Notes,
    update: Callable[[], Any],
) -> None:
    """Prune one layer further and further, and put it back."""
    left = levels[len(notes.values[name]) :]
    if not left:
        return
    written, pruned = steps(name)
    with original.keeper.unchanged(written):
        for sparsity in left:
            zero_pruned_(pruned(sparsity))
            where = f"with {name!r} at sparsity {sparsity:g}"
            notes.add(name, sparsity, measured(evaluate, model, where, original, written).mean)
            update()


class _Notes:
    """What is known so far, in memory and in the file."""

    def __init__(
        self,
        file: Any,
        model: nn.Module,
        layers: Iterable[str],
        levels: list[float],
        score: Score,
        granularity: Granularity,
    ) -> None:
        self.dense: float | None = None
        self.values: dict[str, dict[float, float]] = {name: {} for name in layers}
        self._path: Path | None = None if file is None else files.place("file", file)
        if self._path is not None:
            self._call: dict[str, Any] = {
                "layers": list(self.values),
                "sparsities": levels,
                "score": score_of(score),
                "granularity": str(granularity),
                "weights": digest(model),
            }
            if self._path.exists():
                self._read(self._path)

    @property
    def done(self) -> int:
        """How many evaluations are known."""
        return (self.dense is not None) + sum(map(len, self.values.values()))

    def add_dense(self, value: float) -> None:
        """Note what the dense network gave."""
        self.dense = value
        self._write()

    def add(self, name: str, sparsity: float, value: float) -> None:
        """Note what a layer gave at a sparsity."""
        self.values[name][sparsity] = value
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        told = {"values": {name: list(row.values()) for name, row in self.values.items()}}
        with files.replacing(self._path) as part:
            part.write_text(json.dumps({_KEY: self._call, "dense": self.dense} | told), encoding="utf-8")

    def _read(self, path: Path) -> None:
        call, dense, values = _parsed(path)
        for key, wanted in self._call.items():
            require(
                call.get(key) == wanted,
                f"{str(path)!r} is of another scan, with other {key}: give another file, or remove it",
            )
        self.dense = dense
        for name, row in values.items():
            self.values[name] = dict(zip(self._call["sparsities"], row, strict=False))


def _parsed(path: Path) -> tuple[dict[str, Any], float | None, dict[str, list[float]]]:
    """What is in a file, in the form in which it was written; ValueError where it is something else."""
    wrong = f"{str(path)!r} is no scan of gp.sensitivity, or damaged: give another file, or remove it"
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        call, dense, values = dict(told[_KEY]), told["dense"], told["values"]
        most = len(call["sparsities"])
        sound = list(values) == call["layers"] and (dense is None or isinstance(dense, float))
        sound = sound and all(
            len(row) <= most and all(isinstance(value, float) for value in row) for row in values.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(wrong) from None
    require(sound, wrong)
    return call, dense, values

"""Which of several settings is best, beyond what one split of the data says by chance (chapter 6)?"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core import files
from gradprune.core.checks import function, require, whole
from gradprune.core.paired import Difference, holm, paired, standard_error
from gradprune.core.progress import bar
from gradprune.core.tables import Table
from gradprune.core.words import in_our_words
from gradprune.recovery.outcome import mean_of
from gradprune.recovery.told import name_of, told

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEY = "gradprune.cross_validate"


@dataclass(frozen=True)
class CrossValidation(Table):
    """What ``cross_validate`` found: each setting's value on each fold. Printed, it is a table.

    Args:
        values: setting -> its value on each fold, in the folds' order.
        reference: the setting that the others are compared with.

    The folds share most of their training examples, so that their spread alone is too small: standard errors and
    intervals are those of Nadeau and Bengio (2003), whose variance is 1/k + 1/(k - 1) times that over k folds.

    Chapter 6.
    """

    _named_by: ClassVar[str | None] = "setting"

    values: dict[str, list[float]] = field(hash=False)
    reference: str

    @property
    def folds(self) -> int:
        """How many there are."""
        return len(self.values[self.reference])

    def mean(self, setting: str) -> float:
        """Return the mean over the folds of the `setting`."""
        return float(np.mean(self.values[setting]))

    def standard_error(self, setting: str) -> float:
        """Return that of the mean of the `setting`, corrected for the overlap."""
        return standard_error(self.values[setting], self._overlap)

    @property
    def best(self) -> str:
        """The setting of the highest mean; the first among equals."""
        return max(self.values, key=self.mean)

    @property
    def one_standard_error(self) -> str:
        """The first setting whose mean is within one standard error of the best one's.

        Settings are given from the simplest, such as the sparsest, on: it is the simplest that is about as good.
        Breiman et al. (1984), section 3.4.3.
        """
        least = self.mean(self.best) - self.standard_error(self.best)
        return next(setting for setting in self.values if self.mean(setting) >= least)

    def difference(self, setting: str) -> Difference:
        """Return by how much the `setting` is above the reference, fold by fold, with its 95 % interval."""
        return paired(self.values[setting], self.values[self.reference], overlap=self._overlap)

    def outcomes(self) -> dict[str, str]:
        """Return for each setting but the reference "better", "worse" or "not shown", by Holm's procedure at 5 %."""
        others = [setting for setting in self.values if setting != self.reference]
        return dict(zip(others, holm([self.difference(setting) for setting in others]), strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a setting: its mean and standard error, the difference to the reference, the outcome."""
        outcomes = self.outcomes()
        return [
            {"setting": setting, "mean": self.mean(setting), "standard error": self.standard_error(setting)}
            | self._compared(setting, outcomes)
            for setting in self.values
        ]

    def plot(self) -> Figure:
        """Draw each setting's folds, their mean and standard error, and the line of one standard error.

        Needs matplotlib.

        Returns:
            The figure, which no window shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from gradprune.gradients.plotting import new_figure

        figure = new_figure(3.2)
        axes = figure.subplots()
        names = list(self.values)
        for at, name in enumerate(names):
            axes.plot([at] * self.folds, self.values[name], ".", color="gray", alpha=0.6)
        errors = [self.standard_error(name) for name in names]
        axes.errorbar(range(len(names)), [self.mean(name) for name in names], errors, fmt="o", capsize=3, label="mean")
        axes.axhline(
            self.mean(self.best) - self.standard_error(self.best),
            linestyle="--",
            color="black",
            lw=0.8,
            label="one standard error below the best",
        )
        axes.set_xticks(range(len(names)), names)
        axes.set(ylabel="what evaluate gave")
        axes.legend()
        return figure

    @property
    def _overlap(self) -> float:
        """Test examples over training examples."""
        return 1 / (self.folds - 1)

    def _compared(self, setting: str, outcomes: Mapping[str, str]) -> dict[str, Any]:
        if setting == self.reference:
            return {"difference": None, "low": None, "high": None, "outcome": "reference"}
        gap = self.difference(setting)
        return {"difference": gap.mean, "low": gap.low, "high": gap.high, "outcome": outcomes[setting]}

    def _notes(self) -> list[str]:
        return [
            f"{self.folds} folds; differences to {self.reference!r} with 95 % intervals, outcomes by Holm's procedure.",
            f"Best: {self.best!r}; the first within one standard error of it: {self.one_standard_error!r}.",
        ]


@in_our_words
def cross_validate(
    build: Callable[[], nn.Module],
    train: Callable[[nn.Module, Any, Any], object],
    evaluate: Callable[[nn.Module, Any], float | Tensor],
    data: Any,
    *,
    folds: int = 5,
    settings: Mapping[str, Any] | Iterable[Any],
    reference: str | None = None,
    seed: int = 0,
    file: str | os.PathLike[str] | None = None,
) -> CrossValidation:
    """Train and evaluate each setting on each of k folds, and return the paired comparison.

    Every setting sees the same folds, and on one fold starts from the same random state, so that differences are those
    of the settings. torch's random state is put back at the end.

    Args:
        build: returns a new network each time, which shares no trainable parameter with an earlier one.
        train: ``train(model, data, setting)`` trains and prunes it on the examples that are not in the fold.
        evaluate: ``evaluate(model, data)`` gives a number on the fold's examples, or a tensor with one an example, of
            which the mean is taken; the higher, the better.
        data: a tensor or array of examples, a tuple of several of one length, which come back as tuples, or a data set
            with a length, of which parts come back as ``torch.utils.data.Subset``.
        folds: how many, from 2.
        settings: what to compare: a dict by name, or a list of what has names of its own; the simplest, such as the
            sparsest, first.
        reference: the name of the setting that the others are compared with; the first unless given.
        seed: of the folds and of each training.
        file: where each result is written down, in JSON, whole or not at all. The same call with the file there goes
            on from it. It knows plain settings and tensors by their values, functions by their names, other objects by
            how they are written or by their type, and `build`, `train` and `evaluate` not at all.

    Returns:
        A ``CrossValidation``.

    Raises:
        ImportError: SciPy is not installed.
        TypeError: where an argument is of a wrong kind.
        ValueError: where one is out of range, two settings have one name, or there are fewer examples than folds:
            or the file is damaged, of another call or cannot be written: before anything is trained. Also where
            `evaluate` returns anything but a finite number, or `build` a network that was trained before.

    Example:
        >>> x = torch.randn(40, 3)
        >>> def train(model, data, keep):
        ...     model.weight.data.fill_(keep)
        >>> table = gp.cross_validate(
        ...     lambda: nn.Linear(3, 1), train, lambda model, data: -model(data).square().mean(), x,
        ...     settings={"small": 0.1, "large": 2.0})
        >>> table.best, table.one_standard_error
        ('small', 'small')

    Nadeau and Bengio (2003), section 3, for the variance; chapter 6.
    """
    if isinstance(build, nn.Module):
        raise TypeError(
            f"build must be a function that returns a new network, got a {type(build).__name__}: to start each time "
            "from this one give lambda: copy.deepcopy(network)"
        )
    for name, given in (("build", build), ("train", train), ("evaluate", evaluate)):
        function(name, given)
    named = _named(settings)
    folds, seed = whole("folds", folds, least=2), whole("seed", seed, least=0, most=2**62)
    first = next(iter(named)) if reference is None else reference
    require(isinstance(first, str) and first in named, f"reference must be one of {list(named)}, got {reference!r}")
    examples = _length(data)
    require(examples >= folds, f"data has {examples} examples, fewer than folds={folds}")
    parts = _parts(examples, folds, seed)
    values: dict[str, list[float]] = {name: [] for name in named}
    path, call = None if file is None else files.place("file", file), {}
    if path is not None:
        call = {"settings": list(named), "folds": folds, "seed": seed, "examples": examples, "data": _told(data)}
        call["values of settings"] = [told(setting) for setting in named.values()]
        values = _read(path, call) if path.exists() else values
    done = sum(map(len, values.values()))
    seen: dict[int, weakref.ref[Any]] = {}
    with torch.random.fork_rng(), bar(folds * len(named), "folds", done) as progress:
        for fold, part in enumerate(parts):
            rest = torch.cat([other for at, other in enumerate(parts) if at != fold]).sort().values
            for name, setting in named.items():
                if len(values[name]) > fold:
                    continue
                torch.manual_seed(seed + fold)
                model = build()
                if not isinstance(model, nn.Module):
                    kind = "nothing" if model is None else f"a {type(model).__name__}"
                    raise TypeError(f"build must return a torch.nn.Module; it returned {kind}")
                _require_new(model, seen)
                train(model, _taken(data, rest), setting)
                value = mean_of(evaluate(model, _taken(data, part)), f"for {name!r} on fold {fold}")
                require(math.isfinite(value), f"evaluate returned {value} for {name!r} on fold {fold}")
                values[name].append(value)
                if path is not None:
                    with files.replacing(path) as part_written:
                        written = json.dumps({_KEY: call, "values": values})
                        part_written.write_text(written, encoding="utf-8")
                progress.update()
    return CrossValidation(values, first)


def _require_new(model: nn.Module, seen: dict[int, weakref.ref[Any]]) -> None:
    """Raise ValueError where a network, or a part of it that trains, has been trained on another fold."""
    for part in (model, *(p for p in model.parameters() if p.requires_grad)):
        known = seen.get(id(part))
        require(
            known is None or known() is not part,
            "build returned a network that was trained before, with the examples that are now to judge it: build a new "
            "one each time, such as copy.deepcopy(network), and freeze what is shared by requires_grad_(False)",
        )
        seen[id(part)] = weakref.ref(part)


def _read(path: Path, call: Mapping[str, Any]) -> dict[str, list[float]]:
    """What a file knows of this call."""
    wrong = f"{str(path)!r} is no file of gp.cross_validate, or damaged: give another file, or remove it"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        theirs, values = dict(found[_KEY]), dict(found["values"])
        lengths = [len(row) for row in values.values()]
        finite = all(isinstance(v, float) and math.isfinite(v) for row in values.values() for v in row)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(wrong) from None
    for key, wanted in call.items():
        require(
            theirs.get(key) == wanted,
            f"{str(path)!r} is of another cross-validation, with other {key}: give another file, or remove it",
        )
    in_order = lengths == sorted(lengths, reverse=True) and max(lengths) - min(lengths) <= 1  # fold by fold
    sound = finite and in_order and max(lengths) <= call["folds"] and list(values) == call["settings"]
    require(sound, wrong)
    return values


def _told(data: Any) -> list[str]:
    """What tells tensors and arrays from others; of a data set only its length is known."""
    several = data if isinstance(data, tuple) else (data,)
    return [told(part) for part in several if isinstance(part, Tensor | np.ndarray)]


def _named(settings: Any) -> dict[str, Any]:
    """The settings by name."""
    if isinstance(settings, str | bytes) or not isinstance(settings, Iterable):
        raise TypeError(f"settings must be a dict by name, or a list, got {type(settings).__name__}")
    if isinstance(settings, Mapping):
        names, every = list(settings), list(settings.values())
    else:
        every = list(settings)
        names = [name_of(value) for value in every]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"settings must have names as keys, got {name!r}")
    require(bool(names), "settings is empty")
    require(len(set(names)) == len(names), f"two settings have one name: {names}; give a dict by name")
    return dict(zip(names, every, strict=True))


def _length(data: Any) -> int:
    """How many examples there are."""
    several = data if isinstance(data, tuple) else (data,)
    lengths = []
    for part in several:
        if isinstance(part, str | bytes | Mapping) or not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise TypeError(f"data must be tensors or a data set with a length, got {type(part).__name__}")
        require(not isinstance(part, Tensor | np.ndarray) or part.ndim > 0, "data must have a dimension of examples")
        lengths.append(len(part))
    require(len(set(lengths)) == 1, f"data must hold parts of one length, got {lengths}")
    return lengths[0]


def _parts(examples: int, folds: int, seed: int) -> list[Tensor]:
    """The examples of each fold, whose numbers differ by one at most."""
    shuffled = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in shuffled.tensor_split(folds)]


def _taken(data: Any, rows: Tensor) -> Any:
    """Some examples, in the form of all."""
    if isinstance(data, tuple):
        return tuple(_taken(part, rows) for part in data)
    if isinstance(data, Tensor):
        return data[rows.to(data.device)]
    if isinstance(data, np.ndarray):
        return data[rows.numpy()]
    return torch.utils.data.Subset(data, rows.tolist())

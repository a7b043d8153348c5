"""Which score, scope, granularity, sparsity or training is best for a network (chapter 6)? Optuna asks, we answer."""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from gradprune.core import files
from gradprune.core.checks import choice, function, module, require, whole
from gradprune.core.progress import bar
from gradprune.core.steps import Optimizers
from gradprune.core.tables import Table
from gradprune.core.words import in_our_words
from gradprune.recovery.outcome import Measure, mean_of, name_of
from gradprune.weights.hold import Hold
from gradprune.weights.mask import Masks
from gradprune.weights.prune import prune

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Space = Mapping[str, Any]
Sampler = Literal["tpe", "grid", "random"]

_PRUNE = frozenset(inspect.signature(prune).parameters) - {"model"}
_CHOICES_ONLY = frozenset({"score", "scope", "granularity", "include", "exclude", "within", "axes"})
_STUDY = "gradprune"
_ATTEMPTS, _PAUSE = 20, 0.25  # seconds, to open a file that another process is making
_HEARTBEAT = 60  # seconds after which twice a trial of a killed process is given up


def _optuna() -> ModuleType:
    """Return the library, or raise ImportError that says how to get it."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError("gp.search needs Optuna: pip install 'gradprune[search]'") from error
    return optuna


class Trial(Mapping[str, Any]):
    """One way to prune and train, as `train` gets it: a mapping of what was drawn from the space.

    Args:
        number: its number in the study, from 0.
        settings: what was drawn: name -> value.
        masks: what is pruned already; None where no amount was drawn, so that `train` prunes.

    Chapter 6.
    """

    def __init__(self, number: int, settings: dict[str, Any], masks: Masks | None = None) -> None:
        self.number, self.settings, self.masks = number, settings, masks
        self._is_hopeless: Callable[[float, int], bool] = lambda value, step: False

    def __getitem__(self, name: str) -> Any:
        return self.settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    def __repr__(self) -> str:
        return f"Trial({self.number}, {self.settings})"

    def hold(self, optimizer: Optimizers) -> Hold | None:
        """Keep what is pruned at zero while `optimizer` trains: ``masks.hold(optimizer)``.

        Args:
            optimizer: what trains the model, or a list of all that do.

        Returns:
            A handle with ``remove()``, or None where nothing is pruned yet.
        """
        return None if self.masks is None else self.masks.hold(optimizer)

    def report(self, value: float, step: int) -> None:
        """Say how good the network is by now, and end the trial here where it is hopeless beside the others.

        That is, where the best value so far is below the median of the other trials at this step. With a `cost` no
        trial is ended.

        Args:
            value: what `evaluate` would give; the higher, the better.
            step: how far the training is, counted as the other trials count.

        Raises:
            optuna.TrialPruned: let it pass, ``search`` waits for it.
        """
        if self._is_hopeless(float(value), whole("step", step, least=0)):
            raise _optuna().TrialPruned()


class Study(Table):
    """What ``search`` found: its trials, the best of them, and with a cost those that no other beats in both.

    Printed, it is a table of the best trials.

    Args:
        study: Optuna's own, for whatever else it can do.
        space: what was drawn from.

    Chapter 6.
    """

    def __init__(self, study: Any, space: Any) -> None:
        self.study = study
        self._space: _Space = space

    def __len__(self) -> int:
        return len(self.rows())

    @property
    def two_aims(self) -> bool:
        """Whether there is a cost beside the value."""
        return len(self.study.directions) > 1

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a finished trial: number, value, cost where there is one, and its settings as words.

        The value of one that was ended early, or did not fit, is None; the last column says which.
        """
        return [self._row(trial) for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    @property
    def best(self) -> Trial:
        """The trial of the highest value; its settings are those that were given in the space."""
        complete = [trial for trial in self.study.get_trials(deepcopy=False) if _complete(trial)]
        require(bool(complete), "no trial has been completed")
        found = max(complete, key=lambda trial: trial.values[0])
        return Trial(found.number, self._space.settings(found.params))

    @property
    def pareto(self) -> list[dict[str, Any]]:
        """The rows of the trials that no other beats, by cost; without a cost, those of the highest value."""
        rows = [row for row in self.rows() if row["value"] is not None]
        if not self.two_aims:
            return [row for row in rows if row["value"] == max(r["value"] for r in rows)]
        return sorted((row for row in rows if not any(_beats(other, row) for other in rows)), key=lambda r: r["cost"])

    def plot(self) -> Figure:
        """Draw the values: over the trials with the best so far, or with a cost over it with the front.

        Needs matplotlib.

        Returns:
            The figure, which no window shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from gradprune.gradients.plotting import new_figure

        figure = new_figure(3.2)
        axes = figure.subplots()
        rows = [row for row in self.rows() if row["value"] is not None]
        over = "cost" if self.two_aims else "trial"
        axes.plot([row[over] for row in rows], [row["value"] for row in rows], "o", alpha=0.5, label="a trial")
        if self.two_aims:
            front = self.pareto
            axes.plot([r["cost"] for r in front], [r["value"] for r in front], "o-", label="no other beats it")
        else:
            best = [max(r["value"] for r in rows[: at + 1]) for at in range(len(rows))]
            axes.step([row["trial"] for row in rows], best, where="post", label="best so far")
        axes.set(xlabel=over, ylabel="what evaluate gave")
        axes.legend()
        return figure

    def _row(self, trial: Any) -> dict[str, Any]:
        values = trial.values if _complete(trial) else [None] * len(self.study.directions)
        ended = trial.user_attrs.get("refused") or ("" if _complete(trial) else "hopeless")
        named = {"value": values[0]} | ({"cost": values[1]} if self.two_aims else {})
        return {"trial": trial.number} | named | self._space.words(trial.params) | {"ended": ended}

    def _shown(self) -> list[dict[str, Any]]:
        complete = [row for row in self.rows() if row["value"] is not None]
        rows = self.pareto if self.two_aims else sorted(complete, key=lambda row: -row["value"])[:10]
        return [{k: v for k, v in row.items() if k != "ended"} for row in rows] or [{"trial": "none"}]

    def _notes(self) -> list[str]:
        rows = self.rows()
        refused = sum(bool(row["ended"]) and row["ended"] != "hopeless" for row in rows)
        hopeless = sum(row["ended"] == "hopeless" for row in rows)
        which = "those that no other beats in both" if self.two_aims else "the best"
        return [f"{len(rows)} trials, {which} shown; {hopeless} ended as hopeless, {refused} did not fit."]


@in_our_words
def search(
    model: nn.Module,
    evaluate: Measure,
    space: Space,
    *,
    trials: int | None = None,
    sampler: Sampler = "tpe",
    train: Callable[[nn.Module, Trial], object] | None = None,
    cost: Callable[[nn.Module], float] | None = None,
    storage: str | os.PathLike[str] | None = None,
    n_jobs: int = 1,
    seed: int | None = None,
) -> Study:
    """Try ways to prune a network, drawn from a space by Optuna, and return how good each was.

    Each trial has a copy of the model. What it draws under the names of ``prune``'s arguments is handed to ``prune``,
    where an amount is among it; then come `train`, which gets all that was drawn, and `evaluate`. The model itself
    stays as it was.

    Args:
        model: the network; it must be possible to copy it.
        evaluate: a function from the pruned network to a number, or to a tensor with one result an example; the
            higher, the better. Use data that will not judge the outcome: the best of many trials is the luckiest too.
        space: name -> what to draw from: a list of choices, a dict of them by name, a pair (low, high) of whole numbers
            or of others, or an Optuna distribution; anything else is taken as it is. Choices without a name of their
            own, such as lambdas, need a dict.
        trials: how many there are to be in all, with those in `storage`; of a grid all, unless given.
        sampler: ``"tpe"`` models what was good (Optuna's tree-structured Parzen estimator); ``"random"``; or
            ``"grid"``, which needs choices only.
        train: ``train(model, trial)``; ``trial["lr"]`` is what was drawn as lr. It calls ``trial.hold(optimizer)``, and
            ``trial.report(value, step)`` now and then, which ends a trial that is hopeless. Where no sparsity or
            threshold is drawn it prunes, for example by a ``Pruner`` with ``trial["schedule"]``.
        cost: a function from the pruned network to a number, such as
            ``lambda model: gp.report(model).total.nonzeros``: then two aims are pursued, a high value and a low cost.
        storage: an SQLite file. The same call with the file there goes on from it; several processes may work on one.
        n_jobs: trials at a time, as threads; processes on one `storage` share the interpreter with nobody.
        seed: of the sampler; every process on one file needs another, or none.

    Returns:
        A ``Study``.

    Raises:
        ImportError: Optuna is not installed.
        TypeError: where an argument is of a wrong kind, or the model cannot be copied.
        ValueError: where one is out of range, or the file is of another space: before anything is tried. A
            combination that ``prune`` refuses is noted and passed over, as is a result that is not finite; where
            all are, the first reason is raised.

    Example:
        >>> x = torch.ones(1, 8)
        >>> space = {"score": [gp.magnitude, gp.random], "sparsity": [0.2, 0.8]}
        >>> model = nn.Linear(8, 1)
        >>> study = gp.search(model, lambda m: -(m(x) - model(x)).abs(), space, sampler="grid")
        >>> len(study), study.best["sparsity"]
        (4, 0.2)

    Akiba et al. (2019); Bergstra et al. (2011) for the estimator; chapter 6.
    """
    library = _optuna()
    module(model)
    function("evaluate", evaluate)
    known = _space(library, space)
    choice("sampler", sampler, ("tpe", "grid", "random"))
    if sampler == "grid":
        trials = known.grid_size() if trials is None else trials
    require(trials is not None, "trials is missing: how many there are to be in all")
    trials, n_jobs = whole("trials", trials, least=1, most=10**6), whole("n_jobs", n_jobs, least=1, most=1024)
    seed = None if seed is None else whole("seed", seed, least=0, most=2**32 - 1)
    for name, given in (("train", train), ("cost", cost)):
        if given is not None:
            function(name, given)
    _check_copy(model)
    with _quiet(library):
        study = _study(library, storage, known, sampler, seed, two_aims=cost is not None)
        _run(library, study, _Objective(library, model, evaluate, known, train, cost), trials, n_jobs)
    found = Study(study, known)
    rows = found.rows()
    reasons = [row["ended"] for row in rows if row["value"] is None and row["ended"] != "hopeless"]
    require(len(reasons) < len(rows) or not rows, f"no trial fitted; the first: {reasons[0] if reasons else ''}")
    return found


def _check_copy(model: nn.Module) -> None:
    try:
        copy.deepcopy(model)
    except Exception as error:
        raise TypeError(f"each trial needs a copy of the model, which cannot be copied: {error}") from error


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Without a line of Optuna's for each trial: there is a bar."""
    before = library.logging.get_verbosity()
    library.logging.set_verbosity(library.logging.ERROR)
    try:
        yield
    finally:
        library.logging.set_verbosity(before)


def _study(library: Any, storage: Any, space: _Space, sampler: str, seed: int | None, *, two_aims: bool) -> Any:
    """Optuna's study, from the file where there is one."""
    path = None if storage is None else files.place("storage", storage)
    directions = ["maximize", "minimize"] if two_aims else ["maximize"]
    if path is not None:
        _check_database(path)
    study = _created(library, path, directions)
    told = json.dumps(space.described(), sort_keys=True)
    before = study.user_attrs.get("space", told)
    require(before == told, f"{str(path)!r} is of another space: give another file, or remove it")
    require(
        len(study.directions) == len(directions),
        f"{str(path)!r} is of a search {'without' if two_aims else 'with'} a cost: give another file, or remove it",
    )
    study.set_user_attr("space", told)
    # A seed alone would draw again what an earlier run drew.
    drawn = None if seed is None else (seed + 7919 * len(study.get_trials(deepcopy=False))) % 2**32
    if sampler == "grid":
        study.sampler = library.samplers.GridSampler(space.grid(), seed=drawn)
    elif sampler == "random":
        study.sampler = library.samplers.RandomSampler(seed=drawn)
    else:
        study.sampler = library.samplers.TPESampler(seed=drawn)
    return study


def _created(library: Any, path: Any, directions: list[str]) -> Any:
    """A new study or the one in the file; of processes that make the file at one time, all but one have to wait."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            storage = None if path is None else _database(library, path)
            return library.create_study(storage=storage, study_name=_STUDY, load_if_exists=True, directions=directions)
        except Exception as error:
            passing = type(error).__module__.startswith(("sqlalchemy", "optuna", "alembic", "sqlite3"))
            if path is None or not passing or not left:
                raise
            time.sleep(_PAUSE)
    raise AssertionError("unreachable")


def _database(library: Any, path: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", library.exceptions.ExperimentalWarning)  # of the heartbeat
        return library.storages.RDBStorage(
            f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}}, heartbeat_interval=_HEARTBEAT
        )


def _check_database(path: Any) -> None:
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            start = file.read(16)
        require(start == b"SQLite format 3\0", f"storage {str(path)!r} is no SQLite file")


def _run(library: Any, study: Any, objective: Callable[[Any], Any], trials: int, n_jobs: int) -> None:
    """Run what is left of so many trials, counted over all processes."""
    state = library.trial.TrialState
    counted = (state.COMPLETE, state.PRUNED)
    done = len(study.get_trials(deepcopy=False, states=counted))
    if done >= trials:
        return
    enough = library.study.MaxTrialsCallback(trials, states=counted)
    with bar(trials, "search", done) as progress:
        callbacks = [enough, lambda study, trial: progress.update()]
        study.optimize(objective, n_trials=trials - done, n_jobs=n_jobs, callbacks=callbacks)


class _Objective:
    """One trial: draw, copy, prune, train, evaluate."""

    def __init__(self, library: Any, model: nn.Module, evaluate: Measure, space: _Space, train: Any, cost: Any) -> None:
        self._library, self._model, self._evaluate = library, model, evaluate
        self._space, self._train, self._cost = space, train, cost

    def __call__(self, drawing: Any) -> Any:
        settings = self._space.settings(self._space.drawn(drawing))
        model = copy.deepcopy(self._model)
        masks = self._pruned(model, settings, drawing)
        if self._train is not None:
            trial = Trial(drawing.number, settings, masks)
            trial._is_hopeless = lambda value, step: self._hopeless(drawing, value, step)
            self._train(model, trial)
        where = f"in trial {drawing.number}, {settings}"
        results = [mean_of(self._evaluate(model), where)]
        if self._cost is not None:
            results.append(mean_of(self._cost(model), where))
        if not all(map(math.isfinite, results)):
            self._refuse(drawing, f"it gave {results[0]}")
        return results

    def _pruned(self, model: nn.Module, settings: Mapping[str, Any], drawing: Any) -> Masks | None:
        """The masks, where the settings say how much; a combination that does not fit ends the trial."""
        given = {name: value for name, value in settings.items() if name in _PRUNE}
        amounts = any(given.get(name) is not None for name in ("sparsity", "threshold"))
        if not (amounts or isinstance(given.get("scope"), Mapping) or _is_n_of_m(given.get("granularity"))):
            return None
        try:
            return prune(model, **given)
        except ValueError as error:
            self._refuse(drawing, str(error))
            raise AssertionError("unreachable") from error

    def _refuse(self, drawing: Any, reason: str) -> None:
        drawing.set_user_attr("refused", reason[:500])
        raise self._library.TrialPruned(reason)

    def _hopeless(self, drawing: Any, value: float, step: int) -> bool:
        if self._cost is not None:  # Optuna ends none where there are two aims
            return False
        drawing.report(value, step)
        return bool(drawing.should_prune())


def _is_n_of_m(granularity: Any) -> bool:
    if isinstance(granularity, tuple):
        return len(granularity) == 2 and granularity[0] < granularity[1]
    return isinstance(granularity, str) and ":" in granularity


def _complete(trial: Any) -> bool:
    return bool(trial.state.name == "COMPLETE")


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one is at least as good in both, and better in one."""
    at_least = one["value"] >= other["value"] and one["cost"] <= other["cost"]
    return bool(at_least and (one["value"] > other["value"] or one["cost"] < other["cost"]))


# ---------------------------------------------------------------------------------------------------------- the space


@dataclass(frozen=True)
class _Space:
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

    def grid_size(self) -> int:
        """How many combinations there are; ValueError where they cannot be counted."""
        require(not self.ranges, f"a grid needs lists of choices; {', '.join(map(repr, self.ranges))} has a range")
        return math.prod(len(of) for of in self.choices.values())

    def described(self) -> dict[str, Any]:
        """What a file must agree with."""
        return {name: list(of) for name, of in self.choices.items()} | {n: repr(of) for n, of in self.ranges.items()}


def _suggested(drawing: Any, name: str, of: Any) -> Any:
    """What Optuna draws from one of its distributions."""
    if not hasattr(of, "low"):
        return drawing.suggest_categorical(name, of.choices)
    suggest = drawing.suggest_int if "Int" in type(of).__name__ else drawing.suggest_float
    return suggest(name, of.low, of.high, step=of.step, log=of.log)


def _space(library: Any, space: Any) -> _Space:
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
        elif isinstance(of, tuple) and name not in _CHOICES_ONLY:
            ranges[name] = _range(library, name, of)
        else:
            choices[name] = _labelled(name, of)
    return _Space(choices, ranges)


def _range(library: Any, name: str, ends: tuple[Any, ...]) -> Any:
    sound = len(ends) == 2 and all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    wanted = f"space[{name!r}] is a tuple, and so a pair (low, high) of numbers with low < high; choices are a list"
    require(sound and ends[0] < ends[1] and math.isfinite(ends[1] - ends[0]), f"{wanted}. Got {ends}")
    low, high = ends
    if isinstance(low, int) and isinstance(high, int):
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
    twice = {label for label in labels if labels.count(label) > 1} | {label for label in labels if " at 0x" in label}
    require(not twice, f"choices of space[{name!r}] need names, as a dict: {', '.join(sorted(twice))} tells too little")
    return dict(zip(labels, every, strict=True))

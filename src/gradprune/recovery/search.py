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
from typing import Any, Literal

from torch import nn

from gradprune.core import files
from gradprune.core.checks import choice, function, module, require, whole
from gradprune.core.progress import bar
from gradprune.core.words import in_our_words
from gradprune.recovery.outcome import Measure, mean_of
from gradprune.recovery.space import AMOUNTS, SearchSpace, Space, is_n_of_m, space_of
from gradprune.recovery.study import BROKEN_OFF, HOPELESS, Study, Trial, optuna_library
from gradprune.recovery.told import digest
from gradprune.weights.mask import Masks
from gradprune.weights.prune import prune

Sampler = Literal["tpe", "grid", "random"]

_PRUNE = frozenset(inspect.signature(prune).parameters) - {"model"}
_STUDY = "gradprune"
_ATTEMPTS, _PAUSE = 20, 0.25  # seconds, to open a file that another process is making
_HEARTBEAT = 60  # seconds after which twice a trial of a killed process is given up


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
            or of others (of a sparsity or threshold always others), or an Optuna distribution; anything else is taken
            as it is, and `example` always. Choices without a name of their own, such as lambdas, need a dict. Without
            `train` all names are ``prune``'s, and one says how much goes.
        trials: how many there are to be in all, with those in `storage`; of a grid all, unless given.
        sampler: ``"tpe"`` models what was good (Optuna's tree-structured Parzen estimator); ``"random"``; or
            ``"grid"``, which needs choices only.
        train: ``train(model, trial)``; ``trial["lr"]`` is what was drawn as lr. It calls ``trial.hold(optimizer)``, and
            ``trial.report(value, step)`` now and then, which ends a trial that is hopeless. Where no sparsity or
            threshold is drawn it prunes, for example by a ``Pruner`` with ``trial["schedule"]``.
        cost: a function from the pruned network to a number, such as
            ``lambda model: gp.report(model).total.nonzeros``: then two aims are pursued, a high value and a low cost.
        storage: an SQLite file. The same call with the file there goes on from it; several processes may work on one.
            It knows the space by its names and the model by a sample of its weights; `evaluate` and `train` it does not
            know.
        n_jobs: trials at a time, as threads; processes on one `storage` share the interpreter with nobody.
        seed: of the sampler; every process on one file needs another, or none.

    Returns:
        A ``Study``.

    Raises:
        ImportError: Optuna is not installed.
        TypeError: where an argument is of a wrong kind, or the model cannot be copied.
        ValueError: where one is out of range, or the file is of another space or model: before anything is tried. A
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
    library = optuna_library()
    module(model)
    function("evaluate", evaluate)
    known = space_of(library, space)
    choice("sampler", sampler, ("tpe", "grid", "random"))
    if sampler == "grid":
        trials = known.grid_size() if trials is None else trials
    require(trials is not None, "trials is missing: how many there are to be in all")
    trials, n_jobs = whole("trials", trials, least=1, most=10**6), whole("n_jobs", n_jobs, least=1, most=1024)
    seed = None if seed is None else whole("seed", seed, least=0, most=2**32 - 1)
    for name, given in (("train", train), ("cost", cost)):
        if given is not None:
            function(name, given)
    if train is None:
        known.require_used(_PRUNE)
    _check_copy(model)
    combinations = known.combinations() if sampler == "grid" else []
    with _quiet(library):
        study = _study(library, storage, model, known, sampler, seed, two_aims=cost is not None)
        _run(library, study, _Objective(library, model, evaluate, known, train, cost), trials, n_jobs, combinations)
    found = Study(study, known)
    rows = found.rows()
    reasons = [row["ended"] for row in rows if row["value"] is None and row["ended"] not in (HOPELESS, BROKEN_OFF)]
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


def _study(
    library: Any,
    storage: Any,
    model: nn.Module,
    space: SearchSpace,
    sampler: str,
    seed: int | None,
    *,
    two_aims: bool,
) -> Any:
    """Optuna's study, from the file where there is one."""
    require(
        not (isinstance(storage, str) and "://" in storage),
        f"storage is the path of an SQLite file, such as 'study.db', not an address: got {storage!r}",
    )
    path = None if storage is None else files.place("storage", storage)
    directions = ["maximize", "minimize"] if two_aims else ["maximize"]
    if path is not None:
        _check_database(path)
    study = _created(library, path, directions)
    told = {"space": json.dumps(space.described(), sort_keys=True), "weights": digest(model)}
    begun = bool(study.get_trials(deepcopy=False))  # asked first: another process may be setting what follows
    before = study.user_attrs
    for key, wanted in told.items():
        same = before[key] == wanted if key in before else not begun
        require(same, f"{str(path)!r} is of a search with other {key}: give another file, or remove it")
    require(
        len(study.directions) == len(directions),
        f"{str(path)!r} is of a search {'without' if two_aims else 'with'} a cost: give another file, or remove it",
    )
    for key, wanted in told.items():
        study.set_user_attr(key, wanted)
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


def _run(
    library: Any, study: Any, objective: Callable[[Any], Any], trials: int, n_jobs: int, grid: list[dict[str, str]]
) -> None:
    """Run what is left of so many trials, counted over all processes; of a grid, of so many combinations."""
    state = library.trial.TrialState
    counted = (state.COMPLETE, state.PRUNED)

    def done(states: tuple[Any, ...] = counted) -> int:
        found = study.get_trials(deepcopy=False, states=states)
        return len({tuple(sorted(trial.params.items())) for trial in found}) if grid else len(found)

    def stop_when_done(study: Any, trial: Any) -> None:
        if done() >= trials:
            study.stop()

    if done() >= trials:
        return
    with bar(trials, "search", done()) as progress:
        callbacks = [stop_when_done, lambda study, trial: progress.update()]
        tried = done((*counted, state.FAIL) if grid else counted)
        if tried < trials:
            study.optimize(objective, n_trials=trials - tried, n_jobs=n_jobs, callbacks=callbacks)
        while grid and done() < trials:  # Optuna takes a combination that was broken off as tried
            known = [trial.params for trial in study.get_trials(deepcopy=False, states=counted)]
            study.sampler = library.samplers.RandomSampler()  # draws nothing: all is fixed
            study.enqueue_trial(next(combination for combination in grid if combination not in known))
            study.optimize(objective, n_trials=1, callbacks=callbacks)


class _Objective:
    """One trial: draw, copy, prune, train, evaluate."""

    def __init__(
        self, library: Any, model: nn.Module, evaluate: Measure, space: SearchSpace, train: Any, cost: Any
    ) -> None:
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
        amounts = any(given.get(name) is not None for name in AMOUNTS)
        if not (amounts or isinstance(given.get("scope"), Mapping) or is_n_of_m(given.get("granularity"))):
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

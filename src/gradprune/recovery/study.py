"""What does a search try, and what has it found (chapter 6)?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradprune.core.checks import require, whole
from gradprune.core.steps import Optimizers
from gradprune.core.tables import Table
from gradprune.recovery.space import SearchSpace
from gradprune.weights.hold import Hold
from gradprune.weights.mask import Masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


HOPELESS, BROKEN_OFF = "hopeless", "broken off"  # how a trial ended without a value, where nothing else is noted


def optuna_library() -> ModuleType:
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
            raise optuna_library().TrialPruned()


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
        self._space: SearchSpace = space

    def __len__(self) -> int:
        return len(self.rows())

    def __repr__(self) -> str:
        rows = self.rows()
        values = [row["value"] for row in rows if row["value"] is not None]
        best = f"the best value {max(values):.6g}, see .best" if values else "none complete"
        return f"Study({len(rows)} trials, {best})"

    @property
    def two_aims(self) -> bool:
        """Whether there is a cost beside the value."""
        return len(self.study.directions) > 1

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a finished trial: number, value, cost where there is one, and its settings as words.

        The value of one that was ended early, did not fit or was broken off, by an error or an interruption, is None;
        the last column says which.
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
        how = {"COMPLETE": "", "PRUNED": HOPELESS}.get(trial.state.name, BROKEN_OFF)
        ended = trial.user_attrs.get("refused") or how
        named = {"value": values[0]} | ({"cost": values[1]} if self.two_aims else {})
        return {"trial": trial.number} | named | self._space.words(trial.params) | {"ended": ended}

    def _shown(self) -> list[dict[str, Any]]:
        complete = [row for row in self.rows() if row["value"] is not None]
        rows = self.pareto if self.two_aims else sorted(complete, key=lambda row: -row["value"])[:10]
        return [{k: v for k, v in row.items() if k != "ended"} for row in rows] or [{"trial": "none"}]

    def _notes(self) -> list[str]:
        rows = self.rows()
        ended = [row["ended"] for row in rows]
        hopeless, broken = ended.count(HOPELESS), ended.count(BROKEN_OFF)
        refused = len(rows) - ended.count("") - hopeless - broken
        which = "those that no other beats in both" if self.two_aims else "the best"
        return [
            f"{len(rows)} trials, {which} shown; {hopeless} ended as hopeless, {refused} did not fit, {broken} were "
            "broken off by an error or an interruption."
        ]


def _complete(trial: Any) -> bool:
    return bool(trial.state.name == "COMPLETE")


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one is at least as good in both, and better in one."""
    at_least = one["value"] >= other["value"] and one["cost"] <= other["cost"]
    return bool(at_least and (one["value"] > other["value"] or one["cost"] < other["cost"]))

"""How many rounds are there, how far is each trained, and from where (chapter 5)?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gradprune.core.checks import function, number, require, warn, whole
from gradprune.weights.schedule import Cubic, Geometric, Linear, OneShot

Rewind = Literal["weights", "learning rate"] | None


MOST_ROUNDS = 1_000_000
MANY_ROUNDS = 100  # more are rather the steps of a training


@dataclass(frozen=True)
class Rounds:
    """The rounds of one ``iterate``: all that a checkpoint must agree with."""

    steps: int
    retrain: int
    rewind: Rewind
    rewind_to: int
    sparsities: list[float]

    @property
    def rounds(self) -> int:
        """How many follow on the dense one."""
        return len(self.sparsities)

    def steps_of(self, number: int) -> range:
        """The steps that round `number`, from 1, takes."""
        if self.rewind == "weights":
            return range(self.rewind_to, self.steps)
        if self.rewind == "learning rate":
            return range(self.steps - self.retrain, self.steps)
        return range(self.steps + (number - 1) * self.retrain, self.steps + number * self.retrain)


def planned(schedule: Any, steps: Any, retrain: Any, rewind: Any, rewind_to: Any, rounds: Any) -> Rounds:
    """Return the plan, with every number checked and the schedule asked for all its rounds."""
    function("schedule", schedule, hint="for one amount at once, gp.OneShot(0.9)")
    steps, rewind_to = whole("steps", steps), whole("rewind_to", rewind_to)
    retrain = None if retrain is None else whole("retrain", retrain)
    require(steps >= 1, f"steps must be at least 1, got {steps}")
    known = rewind is None or (isinstance(rewind, str) and rewind in ("weights", "learning rate"))
    require(known, f'rewind must be "weights", "learning rate" or None, got {rewind!r}')
    require(retrain is None or retrain >= 1, f"retrain must be at least 1, got {retrain}")
    if rewind == "weights":
        require(retrain is None, "rewinding weights takes all steps from `rewind_to` on; retrain has no meaning")
        require(0 <= rewind_to < steps, f"rewind_to must be at least 0 and below steps={steps}, got {rewind_to}")
    else:
        require(rewind_to == 0, f'rewind_to={rewind_to} needs rewind="weights"')
    retrain = steps if retrain is None else retrain
    if rewind == "learning rate":
        require(retrain <= steps, f"retrain={retrain} rewinds beyond the start: training has {steps} steps")
    counted = rounds is None
    rounds = _rounds_of(schedule) if rounds is None else whole("rounds", rounds)
    require(1 <= rounds <= MOST_ROUNDS, f"rounds must be at least 1 and at most {MOST_ROUNDS:,}")
    sparsities = [number(f"schedule({at})", schedule(at), finite=False) for at in range(1, rounds + 1)]
    require(all(0 <= s <= 1 for s in sparsities), f"the schedule must give sparsities in [0, 1], got {sparsities}")
    require(sparsities == sorted(sparsities), f"the schedule falls: {sparsities}; pruned weights stay pruned")
    if counted:
        _check_meant(schedule, sparsities)
    return Rounds(steps, retrain, rewind, rewind_to, sparsities)


def _check_meant(schedule: Any, sparsities: list[float]) -> None:
    """Raise or warn where a schedule without `rounds` seems to count the steps of a training."""
    rounds, idle = len(sparsities), sum(a == b for a, b in zip([0.0, *sparsities], sparsities, strict=False))
    counts = f"iterate asks its schedule once a round, not once a step: {schedule} has {rounds} rounds"
    meant = f"or say that they are meant, rounds={rounds}"
    require(
        not idle,
        f"{counts}, of which {idle} prune nothing more. Count in rounds, every=1 where there is an every, {meant}",
    )
    if rounds > MANY_ROUNDS:
        warn(f"{counts}, each a whole training. Count in rounds, {meant}")


def _rounds_of(schedule: Callable[[int], float]) -> int:
    if isinstance(schedule, OneShot):
        return max(1, schedule.at)
    if isinstance(schedule, Linear | Cubic):
        return max(1, schedule.end)
    if isinstance(schedule, Geometric):
        return schedule.every * schedule.rounds
    raise ValueError(f"how many rounds has {schedule!r}? Give `rounds`")

"""Where does a loop of rounds stand, and how does it get back to where it stood (chapter 5)?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from gradprune.core.checks import require
from gradprune.core.masked import count_alive
from gradprune.recovery.checkpoint import Checkpoint, Standing, copy_of, put_back, random_state, set_random_state
from gradprune.recovery.history import Entry, History, Round
from gradprune.recovery.rounds import Rounds
from gradprune.weights.mask import Masks

Teacher = nn.Module | Literal["dense"] | None


class Run:
    """Where the loop stands, and how it gets back to where it stood."""

    def __init__(
        self,
        model: nn.Module,
        plan: Rounds,
        stop: Callable[[History], bool] | None,
        teacher: Teacher,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.model, self.plan = model, plan
        self._stop, self._wanted_teacher, self._checkpoint = stop, teacher, checkpoint
        self._teacher: nn.Module | None = None
        self.rewound: dict[str, Any] | None = None  # what rewinding goes back to
        self._dense: dict[str, Any] | None = None
        self._good: dict[str, Any] | None = None  # the last round that did not fail
        self._good_masks = self.masks = Masks({})
        self._entries: list[Entry] = []

    @property
    def done(self) -> int:
        """How many rounds are finished."""
        return len(self._entries)

    def history(self) -> History:
        """What they came to."""
        return History(list(self._entries), self.masks)

    def train(self, train: Callable[[nn.Module, Round], object], work: Round) -> None:
        """Train for a round; RuntimeError where a pruned weight is other than zero after it."""
        if work.steps:
            train(self.model, work)
        for name, mask in work.masks.items():
            parameter = self.model.get_parameter(name)
            revived = count_alive([(parameter, mask.to(parameter.device))])
            if revived:
                raise RuntimeError(
                    f"train left {revived} pruned weights of {name!r} other than zero: call round.hold(optimizer) "
                    "before the first step"
                )

    def keep_for_rewinding(self) -> None:
        """Remember the weights that rounds go back to."""
        self.rewound = copy_of(self.model) if self.plan.rewind == "weights" else {}
        if self.plan.rewind_to:
            self._save()

    def rewind(self, masks: Masks) -> None:
        """Go back to them, if the plan says so, with the new zeros."""
        if self.plan.rewind == "weights":
            assert self.rewound is not None
            put_back(self.model, self.rewound)
        masks.apply_(self.model)

    def teacher(self) -> nn.Module | None:
        """What teaches the rounds after the dense one."""
        if not isinstance(self._wanted_teacher, str):
            return self._wanted_teacher
        if self._teacher is None:
            assert self._dense is not None
            self._teacher = copy.deepcopy(self.model)
            put_back(self._teacher, self._dense)
            self._teacher.eval().requires_grad_(False)
        return self._teacher

    def finish(self, work: Round, entry: Entry) -> None:
        """Note what a round came to, and write it down."""
        if entry.round == 0 and isinstance(self._wanted_teacher, str):
            self._dense = copy_of(self.model)
        self.masks = work.masks
        self._entries.append(entry)
        self._save()

    def failed(self) -> bool:
        """Whether the last round did; one that did not is what a later one that does goes back to."""
        if self._stop is None or not self._entries:
            return False
        if _truth("stop", self._stop(self.history())):
            return True
        self._good, self._good_masks = copy_of(self.model), self.masks
        return False

    def last_good(self) -> History:
        """The model as the last round left it that did not fail, and the history with the one that did."""
        if self._good is not None:
            put_back(self.model, self._good)
            self.masks = self._good_masks.apply_(self.model)
        self._entries[-1] = replace(self._entries[-1], failed=True)
        return self.history()

    def _save(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.save(
                Standing(
                    copy_of(self.model),
                    self.rewound,
                    self._dense,
                    self._good,
                    self.masks,
                    self._good_masks,
                    self._entries,
                )
            )

    def resume(self) -> bool:
        """Go on from the file, where there is one; True where its last round failed. As it was where this raises."""
        found = None if self._checkpoint is None else self._checkpoint.read(self.model)
        if found is None:
            return False
        standing, random = found
        if self.plan.rewind == "weights":
            require(bool(standing.rewound), "the checkpoint lacks the weights to rewind to")
        needs_dense = isinstance(self._wanted_teacher, str) and bool(standing.entries)
        require(
            not needs_dense or standing.dense is not None,
            'the checkpoint holds no dense network to teach: it is of a call without teacher="dense"',
        )
        before = copy_of(self.model), random_state()
        try:
            put_back(self.model, standing.model)
            self.masks = standing.masks.apply_(self.model)
            self.rewound, self._dense, self._entries = standing.rewound, standing.dense, standing.entries
            self._good, self._good_masks = standing.good, standing.good_masks
            set_random_state(random)
            failed = self.failed()
            require(
                not failed or self._good is not None or self.done == 1,
                f"stop is true of round {self.done - 1}, the last one in the checkpoint, and the one before, which was "
                "to come back, is not there: the checkpoint is of a call without `stop`",
            )
        except BaseException:
            put_back(self.model, before[0])
            set_random_state(before[1])
            raise
        return failed


def _truth(name: str, value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if not isinstance(value, bool):
        raise TypeError(f"{name} must return True or False, got {type(value).__name__}")
    return value

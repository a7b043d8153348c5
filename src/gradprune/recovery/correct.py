"""How does a pruned network get its accuracy back: train, prune, rewind, repeat (chapter 5)?"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core.checks import function, module, number, require, require_readable, require_writable
from gradprune.core.progress import over
from gradprune.recovery.checkpoint import Checkpoint
from gradprune.recovery.history import Entry, History, Round
from gradprune.recovery.rounds import Rewind, Rounds, planned
from gradprune.recovery.run import Run, Teacher
from gradprune.weights.mask import Masks
from gradprune.weights.prune import AsPrune, check_for_schedule, prune
from gradprune.weights.request import Score, checked_score
from gradprune.weights.request_groups import requested
from gradprune.weights.score import magnitude

Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


def iterate(
    model: nn.Module,
    train: Callable[[nn.Module, Round], object],
    schedule: Callable[[int], float],
    *,
    steps: int,
    retrain: int | None = None,
    rewind: Rewind = None,
    rewind_to: int = 0,
    rounds: int | None = None,
    score: Score = magnitude,
    evaluate: Evaluate | None = None,
    stop: Callable[[History], bool] | None = None,
    teacher: Teacher = None,
    checkpoint: str | os.PathLike[str] | None = None,
    example: Any = None,
    **as_prune: Unpack[AsPrune],
) -> History:
    """Train `model`, prune it, correct it, and repeat; return what each round came to.

    Round 0 trains the dense network over ``range(steps)``. Then, in round r, it is pruned to the sparsity
    ``schedule(r)``; what is pruned stays pruned.

    Args:
        model: the network, trained and pruned in place.
        train: your training, ``train(model, round)``: takes the steps ``round.steps`` of your schedule with an
            optimizer of its own, and calls ``round.hold(optimizer)`` first.
        schedule: the sparsity in [0, 1] as a function of the round, from 1, not of the step; it must not fall.
            ``gp.Geometric(0.2, every=1, rounds=5)`` prunes in each of five rounds.
        steps: the steps of the dense training, from 1.
        retrain: the steps of each correction; `steps` unless given.
        rewind: None goes on after the last step (fine-tuning); ``"learning rate"`` takes the last `retrain` of the
            `steps` again with the weights as they are (Renda et al. 2020, section 3); ``"weights"`` puts weights and
            buffers back to what they were at step `rewind_to` and takes the steps from there again (Frankle and Carbin
            2019 for step 0, Frankle et al. 2020 for later ones). Round 0 then calls `train` up to that step and on.
        rewind_to: a step from 0 and below `steps`.
        rounds: how many; the schedules of this package have a number of their own, and without `rounds` each of these
            must prune more than the one before.
        score: as for ``prune``.
        evaluate: gives a number, or several by name, after each pruning and each correction: use validation data.
        stop: ends the loop after a round where ``stop(history)`` is true, that is, one that failed. The network and the
            masks that come back are those of the round before; the history shows the failed one, marked. Where the
            dense round fails, that is what comes back.
        teacher: handed to each round after the dense one, for ``distill_loss``: a module, or ``"dense"`` for a copy of
            the network as round 0 left it.
        checkpoint: a file that is written (whole or not at all, with torch's random state) after each training. The
            same call with the file there goes on from it and ends as if it had not been interrupted, where `train`
            draws from torch's generators or from ``round.steps`` alone. The file stays. Needs safetensors.
        example: as for ``prune``, for granularity ``"group"``.
        **as_prune: scope (not by name), granularity, include, exclude, min_keep, as for ``prune``.

    Returns:
        One entry a round, and the masks of the network that came back.

    Raises:
        TypeError: where an argument is of a wrong kind.
        ValueError: where one is out of range or does not fit the others, the checkpoint is damaged, of another call,
            or cannot be written. Both are raised before anything is trained; what `evaluate` and `stop` return is
            checked when they do.
        RuntimeError: where `train` left a pruned weight other than zero.

    Example:
        >>> def train(model, round):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     round.hold(optimizer)
        ...     for step in round.steps:
        ...         optimizer.zero_grad()
        ...         model(torch.ones(1, 8)).sum().backward()
        ...         optimizer.step()
        >>> history = gp.iterate(nn.Linear(8, 8), train, gp.Geometric(0.5, every=1, rounds=2), steps=3)
        >>> [entry.sparsity for entry in history.entries]
        [0.0, 0.5, 0.75]

    Han et al. (2015), section 3; chapter 5.
    """
    module(model)
    function("train", train)
    if evaluate is not None:
        function("evaluate", evaluate)
    if stop is not None:
        function("stop", stop)
    plan = planned(schedule, steps, retrain, rewind, rewind_to, rounds)
    _check_teacher(teacher, model)
    _check_pruning(model, score, plan, example, as_prune)
    call = vars(plan) | {name: as_prune.get(name) for name in AsPrune.__annotations__}
    run = Run(model, plan, stop, teacher, None if checkpoint is None else Checkpoint(checkpoint, model, call))
    if run.resume():
        return run.last_good()
    for at in over(range(plan.rounds + 1), "rounds", run.done):
        pruned: dict[str, float] = {}
        if at == 0:
            if run.rewound is None:
                run.train(train, Round(0, range(plan.rewind_to), Masks({}), None))
                run.keep_for_rewinding()
            work = Round(0, range(plan.rewind_to, plan.steps), Masks({}), None)
        else:
            sparsity, within = plan.sparsities[at - 1], run.masks or None
            masks = prune(model, score, sparsity=sparsity, within=within, example=example, **as_prune)
            pruned = _measured(evaluate, model)
            run.rewind(masks)
            work = Round(at, plan.steps_of(at), masks, run.teacher())
        run.train(train, work)
        steps_taken = (0 if at == 0 else work.steps.start, work.steps.stop)
        run.finish(work, Entry(at, steps_taken, work.masks.sparsity, pruned, _measured(evaluate, model)))
        if run.failed():
            return run.last_good()
    return run.history()


def _check_pruning(model: nn.Module, score: Score, plan: Rounds, example: Any, as_prune: AsPrune) -> None:
    """Refuse now what pruning would refuse after the first training."""
    check_for_schedule("iterate", as_prune, own=("score", "steps", "rounds", "example"))
    checked_score(score)
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if tensor.layout == torch.strided:
                require_readable(name, tensor, kind)
    request = requested(model, example, **as_prune)
    for sparsity in dict.fromkeys(plan.sparsities):
        request.plan(sparsity=sparsity)
    for name, parameter in request.parameters.items():
        require_writable(name, parameter)


def _check_teacher(teacher: Any, model: nn.Module) -> None:
    known = 'teacher must be a module, "dense" or None'
    if isinstance(teacher, str):
        require(teacher == "dense", f"{known}; got {teacher!r}")
        try:
            copy.deepcopy(model)
        except Exception as error:
            raise TypeError(f'teacher="dense" needs a copy of the model, which cannot be copied: {error}') from error
    elif teacher is not None and not isinstance(teacher, nn.Module):
        raise TypeError(f"{known}; got {type(teacher).__name__}")
    require(teacher is not model, 'teacher is the model itself, which changes: "dense" is a copy of it after round 0')


def _measured(evaluate: Evaluate | None, model: nn.Module) -> dict[str, float]:
    if evaluate is None:
        return {}
    value = evaluate(model)
    return {_name(k): _number(k, v) for k, v in (value if isinstance(value, Mapping) else {"score": value}).items()}


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"evaluate must give numbers by name, got the name {key!r}")
    return key


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, float) and math.isnan(value):  # a result as well: training diverged
        return math.nan
    return number(f"what evaluate returns ({name!r})", value, finite=False)

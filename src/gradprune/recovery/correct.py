"""How a pruned network gets its accuracy back: train, prune, rewind, repeat (chapter 5)."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from gradprune.core.checks import require
from gradprune.weights.hold import Hold
from gradprune.weights.mask import Masks
from gradprune.weights.plan import prepare
from gradprune.weights.prune import AsPrune, Score, prune
from gradprune.weights.schedule import Cubic, Geometric, Linear, OneShot
from gradprune.weights.score import magnitude

if TYPE_CHECKING:
    import matplotlib.figure

Rewind = Literal["weights", "learning rate"] | None
Evaluate = Callable[[nn.Module], float | Mapping[str, float]]


@dataclass(frozen=True)
class Round:
    """What one call of `train` is about.

    `number` is 0 for the dense network, then 1, 2, ... `steps` are the steps of your training schedule to take: the
    learning rate and the batches may depend on them. `masks` say what is pruned. `teacher` is the dense network, or
    whatever was given as `teacher`; None without one.
    """

    number: int
    steps: range
    masks: Masks
    teacher: nn.Module | None

    def hold(self, optimizer: Optimizer) -> Hold:
        """Keep what is pruned at zero while `optimizer` trains: ``masks.hold(optimizer)``."""
        return self.masks.hold(optimizer)


@dataclass(frozen=True)
class Entry:
    """What came out of one round: the sparsity, and what `evaluate` gave after pruning and after correction.

    Round 0 is the dense network: nothing is pruned, so `pruned` is empty.
    """

    round: int
    steps: tuple[int, int]
    sparsity: float
    pruned: dict[str, float]
    corrected: dict[str, float]


@dataclass
class History:
    """The rounds of one ``iterate``, the dense one first, and the masks they ended with."""

    entries: list[Entry]
    masks: Masks

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    def rows(self) -> list[dict[str, Any]]:
        """One flat row a round, for a table or a DataFrame."""
        return [
            {"round": e.round, "steps": e.steps[1] - e.steps[0], "sparsity": e.sparsity}
            | {f"{name} after pruning": value for name, value in e.pruned.items()}
            | {f"{name} after correction": value for name, value in e.corrected.items()}
            for e in self.entries
        ]

    def plot(self, metric: str | None = None) -> matplotlib.figure.Figure:
        """Draw `metric` over sparsity: dense, after pruning, after correction. Needs matplotlib.

        `metric` is a name that `evaluate` gave; the only one need not be named. Raises ValueError where nothing was
        evaluated, or the name is not among what was.
        """
        names = list(self.entries[0].corrected) if self.entries else []
        require(bool(names), "there is nothing to plot: give `evaluate` to iterate")
        metric = names[0] if metric is None and len(names) == 1 else metric
        require(metric in names, f"metric must be one of {names}, got {metric!r}")
        assert metric is not None
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        dense, later = self.entries[0], self.entries[1:]
        kept = [1 - e.sparsity for e in later]
        axes.axhline(dense.corrected[metric], linestyle=":", color="gray", label="dense")
        axes.plot(kept, [e.pruned[metric] for e in later], "v--", label="after pruning")
        axes.plot(kept, [e.corrected[metric] for e in later], "o-", label="after correction")
        axes.set(xscale="log", xlabel="share of weights that stay", ylabel=metric)
        axes.invert_xaxis()
        axes.legend()
        return figure


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
    teacher: nn.Module | Literal["dense"] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **as_prune: Unpack[AsPrune],
) -> History:
    """Train `model`, prune it, correct it, and repeat; return what each round came to.

    ``train(model, round)`` is your training: it takes the steps ``round.steps`` of your schedule with an optimizer of
    its own, and calls ``round.hold(optimizer)`` first. Round 0 trains the dense network over ``range(steps)``. Then,
    in round r, the network is pruned to the sparsity ``schedule(r)`` and corrected:

    - ``rewind=None``, fine-tuning: `retrain` steps that follow on those before, with whatever learning rate your
      schedule has at its end;
    - ``rewind="learning rate"``: the last `retrain` of the `steps` again, with the weights as they are
      (Renda et al. 2020, section 3);
    - ``rewind="weights"``: the weights (and buffers) go back to what they were at step `rewind_to`, and the steps from
      there to the end are taken again (Frankle and Carbin 2019 for step 0, Frankle et al. 2020 for later ones).
      Round 0 then calls `train` twice, up to that step and on from it.

    `retrain` is `steps` unless given; `rounds` is the schedule's own number unless given, and must be given for a
    schedule that is not one of ``gradprune.schedule``. `score`, scope, granularity, include, exclude and min_keep are
    those of ``prune``; what is pruned stays pruned. One round is one-shot pruning; pruning a little every few steps
    while the optimizer runs on is what ``Pruner`` does.

    `evaluate` gives a number, or several by name, recorded after each pruning and each correction: use validation
    data. ``stop(history)`` ends the loop after a round where it is true. `teacher` is handed to each round after the
    dense one, for ``distill_loss``: a module, or ``"dense"`` for a copy of the network as round 0 left it.

    With `checkpoint`, a path, everything is written to that file (safetensors) after each training, whole or not at
    all, with torch's random state; the same call with a file there goes on from it and ends as if it had not been
    interrupted, where `train` draws from torch's generators or from ``round.steps`` alone. The file stays.

    Raises ValueError, before anything is trained, where an argument is out of range, does not fit the others, or the
    checkpoint is of another call; RuntimeError where `train` left a pruned weight other than zero. Chapter 5.
    """
    plan = _Plan.checked(schedule, steps, retrain, rewind, rewind_to, rounds)
    require(
        teacher is None or teacher == "dense" or isinstance(teacher, nn.Module),
        f'teacher must be a module, "dense" or None; got {teacher!r}',
    )
    by_name = isinstance(as_prune.get("scope"), Mapping)
    require(not by_name, "a schedule and a scope with sparsities by name exclude each other")
    for sparsity in plan.sparsities:
        prepare(model, sparsity=sparsity, **as_prune)
    call = plan.described() | {name: as_prune.get(name) for name in AsPrune.__annotations__}
    run = _Run(model, plan, call, teacher, None if checkpoint is None else Path(checkpoint))
    run.resume()
    if run.entries and stop is not None and stop(run.history()):
        return run.history()
    measure = _measuring(evaluate)
    for number in _bar(range(plan.rounds + 1), run.done):
        pruned: dict[str, float] = {}
        if number == 0:
            if run.rewound is None:
                run.train(train, Round(0, range(plan.rewind_to), Masks({}), None))
                run.keep_for_rewinding()
            work = Round(0, range(plan.rewind_to, steps), Masks({}), None)
        else:
            within = run.masks or None
            masks = prune(model, score, sparsity=plan.sparsities[number - 1], within=within, **as_prune)
            pruned = measure(model)
            run.rewind(masks)
            work = Round(number, plan.steps_of(number), masks, run.teacher())
        run.train(train, work)
        steps_taken = (0 if number == 0 else work.steps.start, work.steps.stop)
        run.finish(work, Entry(number, steps_taken, work.masks.sparsity, pruned, measure(model)))
        if stop is not None and stop(run.history()):
            break
    return run.history()


def distill_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """Return how far the student's classes are from the teacher's: T² KL(teacher || student), a scalar.

    Both are logits of shape (..., classes), divided by the temperature T before the softmax; the mean is over all
    leading dimensions. The factor T² keeps the gradient's size when T changes. No gradient flows to the teacher.
    Raises ValueError where the shapes differ or the temperature is not positive.
    Hinton et al. (2015), section 2; chapter 5.
    """
    require(temperature > 0, f"temperature must be positive, got {temperature}")
    shapes = tuple(student_logits.shape), tuple(teacher_logits.shape)
    require(shapes[0] == shapes[1], f"student and teacher must give logits of one shape, got {shapes[0]}, {shapes[1]}")
    require(student_logits.numel() > 0, "there are no logits to compare")
    classes = shapes[0][-1]
    student = functional.log_softmax(student_logits.reshape(-1, classes) / temperature, dim=-1)
    target = functional.log_softmax(teacher_logits.detach().reshape(-1, classes) / temperature, dim=-1)
    return functional.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


@dataclass(frozen=True)
class _Plan:
    """How often, how far and from where: all that a checkpoint must agree with."""

    steps: int
    retrain: int
    rewind: Rewind
    rewind_to: int
    sparsities: list[float]

    @property
    def rounds(self) -> int:
        return len(self.sparsities)

    def steps_of(self, number: int) -> range:
        if self.rewind == "weights":
            return range(self.rewind_to, self.steps)
        if self.rewind == "learning rate":
            return range(self.steps - self.retrain, self.steps)
        return range(self.steps + (number - 1) * self.retrain, self.steps + number * self.retrain)

    def described(self) -> dict[str, Any]:
        return vars(self).copy()

    @classmethod
    def checked(
        cls,
        schedule: Callable[[int], float],
        steps: int,
        retrain: int | None,
        rewind: Rewind,
        rewind_to: int,
        rounds: int | None,
    ) -> _Plan:
        require(steps >= 1, f"steps must be at least 1, got {steps}")
        require(rewind in (None, "weights", "learning rate"), f'rewind: "weights", "learning rate" or None; {rewind!r}')
        require(retrain is None or retrain >= 1, f"retrain must be at least 1, got {retrain}")
        if rewind == "weights":
            require(retrain is None, "rewinding weights takes all steps from `rewind_to` on; retrain has no meaning")
            require(0 <= rewind_to < steps, f"rewind_to must be at least 0 and below steps={steps}, got {rewind_to}")
        else:
            require(rewind_to == 0, f'rewind_to={rewind_to} needs rewind="weights"')
        retrain = steps if retrain is None else retrain
        if rewind == "learning rate":
            require(retrain <= steps, f"retrain={retrain} rewinds beyond the start: training has {steps} steps")
        rounds = _rounds_of(schedule) if rounds is None else rounds
        require(rounds >= 1, f"rounds must be at least 1, got {rounds}")
        sparsities = [float(schedule(number)) for number in range(1, rounds + 1)]
        require(all(0 <= s <= 1 for s in sparsities), f"the schedule must give sparsities in [0, 1], got {sparsities}")
        require(sparsities == sorted(sparsities), f"the schedule falls: {sparsities}; pruned weights stay pruned")
        return cls(steps, retrain, rewind, rewind_to, sparsities)


def _rounds_of(schedule: Callable[[int], float]) -> int:
    if isinstance(schedule, OneShot):
        return max(1, schedule.at)
    if isinstance(schedule, Linear | Cubic):
        return max(1, schedule.end)
    if isinstance(schedule, Geometric):
        return schedule.every * schedule.rounds
    raise ValueError(f"how many rounds has {schedule!r}? Give `rounds`")


class _Run:
    """Where the loop stands, and how it gets back there from a file."""

    def __init__(
        self,
        model: nn.Module,
        plan: _Plan,
        call: Mapping[str, Any],
        teacher: nn.Module | Literal["dense"] | None,
        path: Path | None,
    ) -> None:
        self.model, self.plan, self.path, self._wanted_teacher = model, plan, path, teacher
        self._call = dict(call) | {"tensors": {name: list(value.shape) for name, value in _state_of(model).items()}}
        self.masks = Masks({})
        self.entries: list[Entry] = []
        self.rewound: dict[str, Tensor] | None = None  # what rewinding goes back to
        self.dense: dict[str, Tensor] | None = None
        self._teacher: nn.Module | None = None

    @property
    def done(self) -> int:
        return len(self.entries)

    def history(self) -> History:
        return History(list(self.entries), self.masks)

    def train(self, train: Callable[[nn.Module, Round], object], work: Round) -> None:
        if work.steps:
            train(self.model, work)
        for name, mask in work.masks.items():
            revived = int((self.model.get_parameter(name).detach()[~mask] != 0).sum())
            if revived:
                raise RuntimeError(
                    f"train left {revived} pruned weights of {name!r} other than zero: call round.hold(optimizer) "
                    "before the first step"
                )

    def keep_for_rewinding(self) -> None:
        self.rewound = _copy_of(self.model) if self.plan.rewind == "weights" else {}
        if self.plan.rewind_to:
            self.save()

    def rewind(self, masks: Masks) -> None:
        if self.plan.rewind == "weights":
            assert self.rewound is not None
            self.model.load_state_dict(self.rewound)
        masks.apply_(self.model)

    def teacher(self) -> nn.Module | None:
        if not isinstance(self._wanted_teacher, str):
            return self._wanted_teacher
        if self._teacher is None:
            assert self.dense is not None
            self._teacher = copy.deepcopy(self.model)
            self._teacher.load_state_dict(self.dense)
            self._teacher.eval().requires_grad_(False)
        return self._teacher

    def finish(self, work: Round, entry: Entry) -> None:
        if entry.round == 0 and isinstance(self._wanted_teacher, str):
            self.dense = _copy_of(self.model)
        self.masks = work.masks
        self.entries.append(entry)
        self.save()

    # ---------------------------------------------------------------------------------------------------- the file

    def save(self) -> None:
        if self.path is None:
            return
        parts = {"model": _copy_of(self.model), "rewound": self.rewound or {}, "dense": self.dense or {}}
        tensors = {f"{part}/{name}": t.contiguous() for part, values in parts.items() for name, t in values.items()}
        as_pairs = [name for name, t in tensors.items() if t.is_complex()]  # a format without them: (real, imaginary)
        tensors |= {name: torch.view_as_real(tensors[name].resolve_conj()) for name in as_pairs}
        masks = self.masks.state_dict()
        tensors |= {f"mask/{name}": entry["bits"] for name, entry in masks.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors |= {f"random/cuda{at}": state for at, state in enumerate(torch.cuda.get_rng_state_all())}
        told = {
            "call": self._call,
            "shapes": {name: entry["shape"] for name, entry in masks.items()},
            "entries": [vars(entry) for entry in self.entries],
            "complex": as_pairs,
        }
        _write(self.path, tensors, json.dumps(told))

    def resume(self) -> None:
        if self.path is None or not self.path.exists():
            return
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("gradprune.iterate", "null"))
            require(told is not None, f"{self.path.name!r} is no checkpoint of iterate")
            self._require_same(told["call"])
            parts: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - not a mapping
                part, _, name = key.partition("/")
                tensor = file.get_tensor(key)
                tensor = torch.view_as_complex(tensor) if key in told.get("complex", []) else tensor
                parts.setdefault(part, {})[name] = tensor
        self.model.load_state_dict(parts["model"])
        self.rewound, self.dense = parts.get("rewound", {}), parts.get("dense")
        bits = parts.get("mask", {})
        state = {name: {"bits": bits[name], "shape": shape} for name, shape in told["shapes"].items()}
        on_cpu = Masks.from_state_dict(state)
        self.masks = Masks({name: m.to(self.model.get_parameter(name).device) for name, m in on_cpu.items()})
        self.masks.apply_(self.model)
        self.entries = [Entry(**(entry | {"steps": tuple(entry["steps"])})) for entry in told["entries"]]
        torch.set_rng_state(parts["random"].pop("cpu"))
        if torch.cuda.is_available() and parts["random"]:
            torch.cuda.set_rng_state_all([parts["random"][f"cuda{at}"] for at in range(len(parts["random"]))])

    def _require_same(self, theirs: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(self._call))
        for what in ours:
            require(
                theirs[what] == ours[what],
                f"the checkpoint {self.path.name if self.path else ''!r} is of another call: its {what} are "
                f"{theirs[what]}, this call's {ours[what]}; move it away, or repeat the call it is from",
            )


def _write(path: Path, tensors: dict[str, Tensor], told: str) -> None:
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata={"gradprune.iterate": told})
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        raise


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, value in state.items():
        require(isinstance(value, Tensor), f"{name!r} of the model's state is no tensor, but {type(value).__name__}")
    return state


def _copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _state_of(model).items()}


def _measuring(evaluate: Evaluate | None) -> Callable[[nn.Module], dict[str, float]]:
    def measure(model: nn.Module) -> dict[str, float]:
        if evaluate is None:
            return {}
        value = evaluate(model)
        return {k: float(v) for k, v in value.items()} if isinstance(value, Mapping) else {"score": float(value)}

    return measure


def _bar(rounds: range, done: int) -> Any:
    """The rounds that are left, under a bar where tqdm is installed, in a terminal or a notebook.

    tqdm's own variable TQDM_DISABLE turns it off.
    """
    left = rounds[done:]
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return left
    disable = True if os.environ.get("TQDM_DISABLE") else None
    return tqdm(left, desc="rounds", initial=done, total=len(rounds), disable=disable)

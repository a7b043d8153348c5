"""Train, prune, rewind, repeat: each round does what it says, and a killed loop ends as if it had not been."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune.recovery.history import History, Round

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 6, generator=GENERATOR), torch.randint(0, 3, (64,), generator=GENERATOR)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 3))


def train(model: nn.Module, work: Round) -> None:
    """SGD with momentum and weight decay, batches by the step's number, a learning rate that falls with it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    work.hold(optimizer)
    model.train()
    for step in work.steps:
        optimizer.param_groups[0]["lr"] = 0.1 * 0.98**step
        rows = torch.arange(8) + 8 * (step % 8)
        optimizer.zero_grad()
        functional.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()


def loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(functional.cross_entropy(model(X), Y))


class Watch:
    """A `train` that notes what it was given."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self.before: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module, work: Round) -> None:
        self.rounds.append(work)
        self.before.append({name: value.clone() for name, value in model.state_dict().items()})
        train(model, work)

    @property
    def steps(self) -> list[range]:
        return [work.steps for work in self.rounds]


THREE = gp.Geometric(0.5, every=1, rounds=3)


def test_fine_tuning_goes_on_after_the_last_step() -> None:
    watch, model = Watch(), network()
    history = gp.iterate(model, watch, THREE, steps=10, retrain=4)
    assert watch.steps == [range(10), range(10, 14), range(14, 18), range(18, 22)]
    assert [e.steps for e in history.entries] == [(0, 10), (10, 14), (14, 18), (18, 22)]
    assert [round(e.sparsity * 108) for e in history.entries] == [0, 54, 81, 94]
    assert history.masks.sparsity == pytest.approx(94 / 108)


def test_learning_rate_rewinding_takes_the_last_steps_again_with_the_weights_as_they_are() -> None:
    watch, model = Watch(), network()
    gp.iterate(model, watch, gp.OneShot(0.5), steps=10, retrain=4, rewind="learning rate")
    assert watch.steps == [range(10), range(6, 10)]
    dense = network()
    train(dense, Round(0, range(10), gp.Masks({}), None))
    mask = watch.rounds[1].masks["0.weight"]
    assert torch.equal(watch.before[1]["0.weight"], dense[0].weight * mask)


@pytest.mark.parametrize("start", [0, 4])
def test_weight_rewinding_starts_from_the_weights_of_that_step_with_the_new_mask(start: int) -> None:
    watch, model = Watch(), network()
    gp.iterate(model, watch, THREE, steps=10, rewind="weights", rewind_to=start)
    assert watch.steps == ([range(4)] if start else []) + [range(start, 10)] * 4
    assert [work.number for work in watch.rounds] == ([0] if start else []) + [0, 1, 2, 3]
    early = network()
    train(early, Round(0, range(start), gp.Masks({}), None))
    for work, before in list(zip(watch.rounds, watch.before, strict=True))[-3:]:
        for name, value in early.state_dict().items():
            kept = work.masks.get(name)
            assert torch.equal(before[name], value if kept is None else value * kept), name


def test_what_is_pruned_stays_pruned_and_zero() -> None:
    watch, model = Watch(), network()
    history = gp.iterate(model, watch, THREE, steps=5, rewind="weights")
    for earlier, later in zip(watch.rounds[1:], watch.rounds[2:], strict=False):
        assert all(bool((later.masks[n] <= earlier.masks[n]).all()) for n in later.masks)
    for name, mask in history.masks.items():
        assert model.get_parameter(name)[~mask].count_nonzero() == 0


def test_what_is_evaluated_is_recorded_before_and_after_each_correction() -> None:
    model = network()
    history = gp.iterate(model, train, THREE, steps=20, evaluate=lambda m: {"loss": loss(m), "weights": 1.0})
    assert history[0].pruned == {}
    assert [set(e.pruned) for e in history.entries[1:]] == [{"loss", "weights"}] * 3
    assert history[-1].corrected["loss"] == loss(model)
    rows = history.rows()
    assert rows[3]["loss after correction"] == loss(model)
    assert rows[0].keys() == {"round", "steps", "sparsity", "loss after correction", "weights after correction"}


def test_a_single_number_is_called_score_and_drawn() -> None:
    history = gp.iterate(network(), train, THREE, steps=5, evaluate=loss)
    axes = history.plot().axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert list(lines["after correction"]) == [e.corrected["score"] for e in history.entries[1:]]
    assert list(lines["after pruning"]) == [e.pruned["score"] for e in history.entries[1:]]
    assert list(lines["dense"]) == [history[0].corrected["score"]] * 2
    shares = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert shares["after correction"] == shares["after pruning"] == [1 - e.sparsity for e in history.entries[1:]]
    assert axes.xaxis_inverted()


def test_drawing_without_numbers_or_an_unknown_one_says_what_there_is() -> None:
    with pytest.raises(ValueError, match="give `evaluate`"):
        gp.iterate(network(), train, THREE, steps=2).plot()
    both = gp.iterate(network(), train, THREE, steps=2, evaluate=lambda m: {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got None"):
        both.plot()
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got 'c'"):
        both.plot("c")
    assert [line.get_ydata()[0] for line in both.plot("b").axes[0].get_lines()] == [2.0] * 3
    with pytest.raises(ValueError, match="give `evaluate`"):
        History([], gp.Masks({})).plot()


def test_the_loop_stops_where_it_is_told_to() -> None:
    history = gp.iterate(network(), train, THREE, steps=3, stop=lambda h: h[-1].sparsity > 0.6)
    assert len(history) == 3


def test_the_dense_network_teaches_as_round_0_left_it() -> None:
    watch, model = Watch(), network()
    gp.iterate(model, watch, THREE, steps=6, teacher="dense")
    dense = network()
    train(dense, Round(0, range(6), gp.Masks({}), None))
    assert watch.rounds[0].teacher is None
    for work in watch.rounds[1:]:
        assert work.teacher is not None
        assert not work.teacher.training
        assert not any(p.requires_grad for p in work.teacher.parameters())
        for name, value in work.teacher.state_dict().items():
            assert torch.equal(value, dense.state_dict()[name])


def test_a_teacher_of_ones_own_is_handed_on_untouched() -> None:
    watch, mine = Watch(), network(5)
    gp.iterate(network(), watch, gp.OneShot(0.5), steps=2, teacher=mine)
    assert watch.rounds[1].teacher is mine


def test_training_that_does_not_hold_the_masks_is_an_error_that_says_how() -> None:
    def careless(model: nn.Module, work: Round) -> None:
        train(model, Round(work.number, work.steps, gp.Masks({}), None))

    with pytest.raises(RuntimeError, match=r"pruned weights of '0.weight' other than zero: call round\.hold"):
        gp.iterate(network(), careless, gp.OneShot(0.5), steps=3)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps must be at least 1, got 0"),
    ({"rewind": "both"}, "rewind must be .*'both'"),
    ({"retrain": 0}, "retrain must be at least 1"),
    ({"retrain": 11, "rewind": "learning rate"}, "retrain=11 rewinds beyond the start: training has 10 steps"),
    ({"retrain": 5, "rewind": "weights"}, "retrain has no meaning"),
    ({"rewind_to": 10, "rewind": "weights"}, "below steps=10, got 10"),
    ({"rewind_to": 3}, 'rewind_to=3 needs rewind="weights"'),
    ({"rounds": 0}, "rounds must be at least 1"),
    ({"schedule": lambda r: 0.5}, "Give `rounds`"),
    ({"schedule": lambda r: 1 / r, "rounds": 2}, "the schedule falls"),
    ({"schedule": lambda r: 2.0, "rounds": 1}, r"sparsities in \[0, 1\], got \[2.0\]"),
    ({"teacher": "me"}, "teacher must be a module"),
    ({"scope": {"0.weight": 0.5}}, "exclude each other"),
    ({"include": "nothing*"}, "pattern 'nothing\\*' matches"),
]


@pytest.mark.parametrize(("given", "says"), WRONG, ids=[says[:24] for _, says in WRONG])
def test_a_wrong_argument_is_refused_before_anything_is_trained(given: dict[str, Any], says: str) -> None:
    watch, model = Watch(), network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {"steps": 10, "schedule": THREE} | given
    with pytest.raises(ValueError, match=says):
        gp.iterate(model, watch, given.pop("schedule"), **given)
    assert not watch.rounds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


WRONG_KINDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"retrain": 2.5}, ValueError, r"retrain must be a whole number, got 2\.5"),
    ({"steps": 2.5}, ValueError, "steps must be a whole number"),
    ({"steps": math.nan}, ValueError, "steps must be a whole number, got nan"),
    ({"steps": True}, TypeError, "steps must be a whole number, got True"),
    ({"steps": "10"}, TypeError, "steps must be a whole number, got '10'"),
    ({"steps": None}, TypeError, "steps must be a whole number, got None"),
    ({"rounds": 1.5}, ValueError, "rounds must be a whole number"),
    ({"rounds": "2"}, TypeError, "rounds must be a whole number"),
    ({"rewind_to": 1.5, "rewind": "weights"}, ValueError, "rewind_to must be a whole number"),
    ({"rewind": torch.ones(2)}, ValueError, "rewind must be "),
    ({"rewind": 3}, ValueError, "rewind must be .*3"),
    ({"evaluate": "acc"}, TypeError, "evaluate must be a function, got 'acc'"),
    ({"evaluate": 0.5}, TypeError, "evaluate must be a function"),
    ({"stop": 3}, TypeError, "stop must be a function, got 3"),
    ({"stop": True}, TypeError, "stop must be a function, got True"),
    ({"teacher": 3}, TypeError, 'teacher must be a module, "dense" or None; got int'),
    ({"teacher": [network()]}, TypeError, "teacher must be a module"),
    ({"train": None}, TypeError, "train must be a function, got None"),
    ({"train": 5}, TypeError, "train must be a function"),
    ({"schedule": 0.9}, TypeError, r"schedule must be a function, got 0\.9; .*OneShot"),
    ({"schedule": None}, TypeError, "schedule must be a function"),
    ({"schedule": lambda r: "0.5", "rounds": 1}, TypeError, r"schedule\(1\) must be a number, got '0\.5'"),
    ({"schedule": lambda r: True, "rounds": 1}, TypeError, r"schedule\(1\) must be a number, got True"),
    ({"schedule": lambda r: math.nan, "rounds": 1}, ValueError, r"schedule\(1\) must be a number, got nan"),
    ({"schedule": lambda r: None, "rounds": 1}, TypeError, r"schedule\(1\) must be a number, got None"),
    ({"score": "magnitude"}, TypeError, "score must be a function, got 'magnitude'"),
    ({"score": 0.9}, TypeError, "score must be a function"),
    ({"sparsity": 0.9}, TypeError, "no argument 'sparsity': the schedule says how much is pruned"),
    ({"epochs": 3}, TypeError, "no argument 'epochs'"),
    ({"scope": "all"}, ValueError, "scope must be"),
    ({"granularity": "1:2"}, ValueError, "1:2 is itself a sparsity"),
    ({"checkpoint": 3}, TypeError, "checkpoint must be a path"),
    ({"checkpoint": ""}, ValueError, "checkpoint must name a file"),
    ({"checkpoint": Path("no") / "such" / "folder" / "c"}, ValueError, "checkpoint is in a folder that does not exist"),
    ({"checkpoint": Path(__file__).parent}, ValueError, "checkpoint is a folder"),
    ({"checkpoint": Path(__file__)}, ValueError, "is no checkpoint of iterate: it is no safetensors file"),
    ({"model": None}, TypeError, "model must be a torch.nn.Module, got None"),
    ({"model": network().state_dict()}, TypeError, "looks like a state dict"),
    ({"model": nn.Linear}, TypeError, "Linear is the class"),
    ({"model": nn.Sequential(nn.LazyLinear(3))}, TypeError, "the parameter '0.weight' is lazy"),
    ({"model": nn.Linear(3, 3, device="meta")}, TypeError, "the parameter 'weight' is on the meta device"),
    (
        {"model": nn.ParameterList([nn.Parameter(torch.ones(1, 4).expand(4, 4))])},
        ValueError,
        "entries of the parameter '0' share memory",
    ),
]


@pytest.mark.parametrize(("given", "error", "says"), WRONG_KINDS, ids=[str(at) for at in range(len(WRONG_KINDS))])
def test_whatever_can_be_known_is_known_before_anything_is_trained(
    given: dict[str, Any], error: type[Exception], says: str
) -> None:
    watch = Watch()
    given = {"model": network(), "train": watch, "steps": 10, "schedule": THREE} | given
    random = torch.get_rng_state()
    with pytest.raises(error, match=says):
        gp.iterate(given.pop("model"), given.pop("train"), given.pop("schedule"), **given)
    assert not watch.rounds
    assert torch.equal(torch.get_rng_state(), random)


def test_a_model_cannot_teach_itself() -> None:
    model = network()
    with pytest.raises(ValueError, match=r'teacher is the model itself, .*"dense" is a copy'):
        gp.iterate(model, train, THREE, steps=2, teacher=model)


def test_a_model_that_cannot_be_copied_has_no_dense_teacher() -> None:
    class Alone(nn.Linear):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("there is only one")

    watch = Watch()
    with pytest.raises(TypeError, match="a copy of the model, which cannot be copied: there is only one"):
        gp.iterate(Alone(6, 3), watch, THREE, steps=2, teacher="dense")
    assert not watch.rounds


def test_without_safetensors_a_checkpoint_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    watch = Watch()
    with pytest.raises(ImportError, match="pip install safetensors"):
        gp.iterate(network(), watch, THREE, steps=2, checkpoint=tmp_path / "c")
    assert not watch.rounds


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), np.array(0.5)])
def test_what_evaluate_gives_is_recorded_as_a_plain_float(value: Any) -> None:
    history = gp.iterate(network(), train, gp.OneShot(0.5), steps=1, evaluate=lambda m: value)
    assert [type(e.corrected["score"]) for e in history.entries] == [float, float]
    assert history[-1].corrected == {"score": 0.5}


def test_a_network_that_diverged_is_recorded_as_it_is() -> None:
    history = gp.iterate(network(), train, gp.OneShot(0.5), steps=1, evaluate=lambda m: {"a": math.nan, "b": math.inf})
    assert math.isnan(history[-1].corrected["a"])
    assert history[-1].corrected["b"] == math.inf


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("0.5", r"what evaluate returns \('score'\) must be a number, got '0\.5'"),
        (None, "must be a number, got None"),
        (True, "must be a number, got True"),
        (torch.ones(2), "must be a number, got a tensor"),
        ({"a": "x"}, r"what evaluate returns \('a'\) must be a number"),
        ({0: 0.5}, "evaluate must give numbers by name, got the name 0"),
    ],
)
def test_what_evaluate_must_not_give_is_named(value: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        gp.iterate(network(), train, gp.OneShot(0.5), steps=1, evaluate=lambda m: value)


@pytest.mark.parametrize("value", [None, 1, 0.0, "no", [], torch.ones(2)])
def test_stop_gives_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match="stop must return True or False, got"):
        gp.iterate(network(), train, gp.OneShot(0.5), steps=1, stop=lambda h: value)


@pytest.mark.parametrize("kind", [bool, np.bool_, torch.tensor, np.array])
def test_stop_may_give_the_truth_of_any_library(kind: Any) -> None:
    history = gp.iterate(network(), train, THREE, steps=1, stop=lambda h: kind(len(h) == 3))
    assert [e.failed for e in history.entries] == [False, False, True]


# ------------------------------------------------------------------------------------------------------------ stop


def test_the_network_that_comes_back_is_that_of_the_last_round_that_did_not_fail() -> None:
    watch, model = Watch(), network()
    history = gp.iterate(model, watch, THREE, steps=6, evaluate=loss, stop=lambda h: h[-1].sparsity > 0.8)
    twin = network()
    expected = gp.iterate(twin, train, THREE, steps=6, evaluate=loss, rounds=2)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    assert history.masks == expected.masks
    assert history.masks.sparsity == pytest.approx(0.75, abs=0.01)
    assert history.masks.holds(model)
    assert len(watch.rounds) == 4  # the failed one was trained
    assert history.entries[:-1] == expected.entries
    assert history[-1].failed
    assert history[-1].sparsity > 0.8
    assert [row["failed"] for row in history.rows()] == [False, False, False, True]
    (failed,) = (line for line in history.plot().axes[0].get_lines() if line.get_label() == "failed")
    assert (failed.get_xdata()[0], failed.get_ydata()[0]) == (1 - history[-1].sparsity, history[-1].corrected["score"])
    with history.masks.hold(torch.optim.SGD(model.parameters(), 0.1)):
        pass  # they belong to the model


def test_where_the_first_pruned_round_fails_the_dense_network_comes_back() -> None:
    model = network()
    history = gp.iterate(model, train, THREE, steps=6, stop=lambda h: len(h) > 1)
    dense = network()
    train(dense, Round(0, range(6), gp.Masks({}), None))
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    assert [e.failed for e in history.entries] == [False, True]
    assert history.masks == gp.Masks({})


def test_where_the_dense_network_fails_it_is_what_comes_back() -> None:
    model = network()
    history = gp.iterate(model, train, THREE, steps=6, stop=lambda h: True)
    dense = network()
    train(dense, Round(0, range(6), gp.Masks({}), None))
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    assert [e.failed for e in history.entries] == [True]


def test_a_stop_that_never_comes_changes_nothing() -> None:
    model = network()
    history = gp.iterate(model, train, THREE, steps=6, stop=lambda h: False)
    twin = network()
    expected = gp.iterate(twin, train, THREE, steps=6)
    assert history == expected
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------- extra state


class Versioned(nn.Linear):
    """A layer with state that is no tensor, which it changes in place."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.seen = {"steps": 0, "log": [0]}

    def get_extra_state(self) -> dict[str, Any]:
        return self.seen

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.seen = state


def count(model: nn.Module, work: Round) -> None:
    layer = model[0]
    assert isinstance(layer, Versioned)
    for _ in work.steps:
        layer.seen["steps"] += 1
        layer.seen["log"].append(layer.seen["steps"])
    train(model, work)


@pytest.mark.parametrize("stop", [None, lambda history: len(history) > 2])
def test_extra_state_is_rewound_and_taught_with(stop: Callable[[History], bool] | None) -> None:
    model = nn.Sequential(Versioned(), nn.Linear(6, 3))
    counts = []

    def noting(model: nn.Module, work: Round) -> None:
        counts.append(model[0].seen["steps"])  # type: ignore[index,union-attr]
        if work.teacher is not None:
            assert work.teacher[0].seen == {"steps": 5, "log": list(range(6))}  # type: ignore[index]
        count(model, work)

    gp.iterate(model, noting, THREE, steps=5, rewind="weights", rewind_to=2, teacher="dense", stop=stop)
    assert counts == [0, 2, 2, 2] + ([2] if stop is None else [])
    assert model[0].seen == {"steps": 5, "log": list(range(6))}


def test_extra_state_is_refused_where_a_file_has_to_hold_it(tmp_path: Path) -> None:
    watch = Watch()
    model = nn.Sequential(Versioned(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"'0\._extra_state' of the model's state is no tensor, but dict: .*leave `c"):
        gp.iterate(model, watch, THREE, steps=2, checkpoint=tmp_path / "c")
    assert not watch.rounds
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("schedule", "sparsities"),
    [
        (gp.OneShot(0.9), [0.9]),
        (gp.Linear(0.8, 0, 4), [0.2, 0.4, 0.6, 0.8]),
        (gp.Cubic(0.8, 0, 2), [0.7, 0.8]),
        (gp.Geometric(0.5, every=1, rounds=2), [0.5, 0.75]),
    ],
    ids=["one shot", "linear", "cubic", "geometric"],
)
def test_a_schedule_gives_the_rounds_and_their_sparsities(
    schedule: Callable[[int], float], sparsities: list[float]
) -> None:
    history = gp.iterate(network(), train, schedule, steps=1)
    assert [e.sparsity for e in history.entries[1:]] == pytest.approx(sparsities, abs=0.005)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (gp.Geometric(0.5, every=100, rounds=2), r"every=100, rounds=2\) has 200 rounds, of which 198 prune"),
        (gp.Geometric(0.5, every=2, rounds=1), "has 2 rounds, of which 1 prune nothing more"),
        (gp.OneShot(0.5, at=2), "once a round, not once a step: .* has 2 rounds, of which 1 prune"),
        (gp.Cubic(0.8, begin=2, end=4), "4 rounds, of which 2 prune"),
        (gp.Linear(0.8, begin=0, end=4, every=2), "4 rounds, of which 2 prune"),
        (gp.OneShot(0.0), "1 rounds, of which 1 prune"),
    ],
)
def test_a_schedule_that_counts_steps_is_refused_unless_its_rounds_are_said_to_be_meant(
    schedule: Callable[[int], float], message: str
) -> None:
    watch = Watch()
    with pytest.raises(ValueError, match=f"{message}.*say that they are meant, rounds=") as refused:
        gp.iterate(network(), watch, schedule, steps=1)
    assert not watch.rounds
    rounds = int(str(refused.value).rpartition("rounds=")[2])
    if rounds < 10:
        assert len(gp.iterate(network(), train, schedule, steps=1, rounds=rounds)) == rounds + 1


@pytest.mark.parametrize("end", [100, 101])
def test_more_than_a_hundred_rounds_warn_unless_they_are_said_to_be_meant(end: int) -> None:
    schedule, stop = gp.Linear(0.5, begin=0, end=end), {"stop": lambda history: True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gp.iterate(network(), train, schedule, steps=1, **stop)
    assert [f"has {end} rounds, each a whole training" in str(w.message) for w in caught] == [True] * (end > 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.iterate(network(), train, schedule, steps=1, rounds=end, **stop)


# ------------------------------------------------------------------------------------------------- kill and go on


class KilledError(Exception):
    pass


def run(path: Path | None, *, die_at: int | None = None, **options: Any) -> tuple[History, dict[str, Tensor]]:
    """One loop from the start; with `die_at`, an exception in that optimizer step, counted over all rounds."""
    taken = 0

    def dying(model: nn.Module, work: Round) -> None:
        nonlocal taken
        for at in work.steps:
            if taken == die_at:
                raise KilledError
            taken += 1
            torch.rand(1)  # draws of its own, as data loaders make
            train(model, Round(work.number, range(at, at + 1), work.masks, work.teacher))

    model = network()
    history = gp.iterate(
        model, dying, gp.Geometric(0.4, every=1, rounds=2), steps=5, evaluate=loss, checkpoint=path, **options
    )
    return history, model.state_dict()


OPTIONS: list[dict[str, Any]] = [
    {"retrain": 3},
    {"retrain": 3, "rewind": "learning rate"},
    {"rewind": "weights"},
    {"rewind": "weights", "rewind_to": 2},
    {"retrain": 2, "teacher": "dense", "score": gp.magnitude, "scope": "layer"},
    {"retrain": 2, "stop": lambda h: len(h) == 3},
    {"rewind": "weights", "stop": lambda h: len(h) == 2},
    {
        "rewind": "learning rate",
        "retrain": 2,
        "stop": lambda h: False,
        "include": ["4*", "0*"],
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_loop_that_was_killed_at_any_step_ends_with_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    whole, weights = run(None, **options)
    total = sum(e.steps[1] - e.steps[0] for e in whole.entries)
    for die_at in range(total):
        path = tmp_path / f"{die_at}.safetensors"
        with pytest.raises(KilledError):
            run(path, die_at=die_at, **options)
        again, after = run(path, **options)
        assert again.entries == whole.entries
        assert all(torch.equal(after[name], weights[name]) for name in weights), die_at
        assert all(torch.equal(again.masks[name], whole.masks[name]) for name in whole.masks)


def test_a_finished_loop_is_read_from_its_checkpoint_without_training(tmp_path: Path) -> None:
    whole, weights = run(tmp_path / "c", retrain=3)
    again, after = run(tmp_path / "c", die_at=0, retrain=3)
    assert again.entries == whole.entries
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_a_loop_that_stopped_stays_stopped(tmp_path: Path) -> None:
    first, _ = run(tmp_path / "c", stop=lambda h: len(h) == 2)
    again, _ = run(tmp_path / "c", stop=lambda h: len(h) == 2)
    assert len(first) == len(again) == 2


def test_a_checkpoint_of_another_call_is_refused_by_what_differs(tmp_path: Path) -> None:
    run(tmp_path / "c", retrain=3)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(ValueError, match="another call: its retrain are 3, this call's 4"):
        run(tmp_path / "c", retrain=4)
    with pytest.raises(ValueError, match="another call: its scope"):
        run(tmp_path / "c", retrain=3, scope="layer")
    assert (tmp_path / "c").read_bytes() == before


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    gp.prune(network(), sparsity=0.5).save(tmp_path / "c")
    with pytest.raises(ValueError, match="'c' is no checkpoint of iterate"):
        run(tmp_path / "c")


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KilledError):
        run(tmp_path / "c", die_at=6, retrain=3)
    before = (tmp_path / "c").read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        run(tmp_path / "c", retrain=3)
    assert (tmp_path / "c").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_correct as t
from pathlib import Path
torch.set_num_threads(int(sys.argv[3]))  # sums differ with their number in the last digits
_, weights = t.run(Path(sys.argv[2]), retrain=25)
print("done", float(sum(v.double().sum() for v in weights.values())))
"""


def test_a_process_killed_by_the_system_goes_on_from_its_file(tmp_path: Path) -> None:
    path, here = tmp_path / "c", str(Path(__file__).parent)
    whole, weights = run(None, retrain=25)
    command = [sys.executable, "-c", SCRIPT, here, str(path), str(torch.get_num_threads())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not path.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)  # as soon as round 0 is in the file
    output, _ = process.communicate()
    assert "done" not in output
    again, after = run(path, retrain=25)
    assert again.entries == whole.entries
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_a_stopped_loop_comes_back_from_its_file_with_the_last_good_round(tmp_path: Path) -> None:
    def stop(history: History) -> bool:
        return len(history) == 3

    whole, weights = run(tmp_path / "c", retrain=3, stop=stop)
    random = torch.get_rng_state()
    again, after = run(tmp_path / "c", die_at=0, retrain=3, stop=stop)  # nothing is trained
    assert again == whole
    assert [e.failed for e in again.entries] == [False, False, True]
    assert again.masks.sparsity == pytest.approx(0.4, abs=0.01)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_stopped_loop_goes_on_from_its_file_without_stop_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    run(tmp_path / "c", retrain=3, stop=lambda h: len(h) == 2)
    again, after = run(tmp_path / "c", retrain=3)
    whole, weights = run(None, retrain=3)
    assert again == whole
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_a_file_without_the_last_good_round_cannot_stop_and_says_so(tmp_path: Path) -> None:
    run(tmp_path / "c", retrain=3)
    model = network()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    schedule = gp.Geometric(0.4, every=1, rounds=2)
    with pytest.raises(ValueError, match=r"stop is true of round 2, .*of a call without `stop`"):
        gp.iterate(
            model, train, schedule, steps=5, retrain=3, evaluate=loss, checkpoint=tmp_path / "c", stop=lambda h: True
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    again, _ = run(tmp_path / "c", retrain=3, stop=lambda h: False)
    assert len(again) == 3


def test_a_file_without_the_dense_network_has_no_dense_teacher(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run(tmp_path / "c", die_at=6, retrain=3)
    with pytest.raises(ValueError, match='no dense network to teach: it is of a call without teacher="dense"'):
        run(tmp_path / "c", retrain=3, teacher="dense")


def test_a_model_of_another_dtype_is_another_model(tmp_path: Path) -> None:
    gp.iterate(network(), train, gp.OneShot(0.5), steps=2, checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=r"of another model: its '0\.weight' is .*float32.*, the model's .*float64"):
        gp.iterate(network().double(), train, gp.OneShot(0.5), steps=2, checkpoint=tmp_path / "c")


def rewritten(path: Path, change: Callable[[Any, dict[str, Tensor]], None]) -> None:
    """The checkpoint with something else in it."""
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["gradprune.iterate"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(told, tensors)
    save_file(tensors, path, metadata={"gradprune.iterate": json.dumps(told)})


DAMAGE: dict[str, Callable[[Any, dict[str, Tensor]], object]] = {
    "no call": lambda told, tensors: told.pop("call"),
    "call is text": lambda told, tensors: told.update(call="x"),
    "no entries": lambda told, tensors: told.pop("entries"),
    "entries are text": lambda told, tensors: told.update(entries=["x"]),
    "an entry lacks a key": lambda told, tensors: told["entries"][0].pop("steps"),
    "steps of text": lambda told, tensors: told["entries"][0].update(steps=["a", "b"]),
    "three steps": lambda told, tensors: told["entries"][0].update(steps=[0, 1, 2]),
    "a sparsity of text": lambda told, tensors: told["entries"][1].update(sparsity="0.5"),
    "a sparsity beyond 1": lambda told, tensors: told["entries"][1].update(sparsity=1.5),
    "values of text": lambda told, tensors: told["entries"][1].update(corrected={"score": "x"}),
    "rounds in disorder": lambda told, tensors: told["entries"].reverse(),
    "no shapes": lambda told, tensors: told.pop("shapes"),
    "a mask of no tensor": lambda told, tensors: told["shapes"].update({"4.bias": [3]}),
    "a mask of another shape": lambda told, tensors: told["shapes"].update({"4.weight": [12, 3]}),
    "complex of no tensor": lambda told, tensors: told.update(complex=["model/x"]),
    "complex of a real one": lambda told, tensors: told.update(complex=["model/0.bias"]),
    "no weights": lambda told, tensors: tensors.pop("model/0.weight"),
    "weights of another shape": lambda told, tensors: tensors.update({"model/0.weight": torch.ones(2, 2)}),
    "weights of another name": lambda told, tensors: tensors.update({"model/x": torch.ones(2, 2)}),
    "half of what to rewind to": lambda told, tensors: tensors.pop("rewound/0.weight"),
    "half of the good round": lambda told, tensors: tensors.pop("good/0.weight"),
    "half of the dense network": lambda told, tensors: tensors.pop("dense/0.weight"),
    "no random state": lambda told, tensors: tensors.pop("random/cpu"),
    "a random state that is none": lambda told, tensors: tensors.update(
        {"random/cpu": torch.ones(3, dtype=torch.uint8)}
    ),
    "a random state of floats": lambda told, tensors: tensors.update({"random/cpu": torch.ones(5056)}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_the_model_as_it_was(damage: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rewind": "weights", "teacher": "dense", "stop": lambda h: len(h) == 3}
    run(tmp_path / "c", **options)
    rewritten(tmp_path / "c", DAMAGE[damage])  # type: ignore[arg-type]
    data, watch, model = (tmp_path / "c").read_bytes(), Watch(), network(3)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    schedule = gp.Geometric(0.4, every=1, rounds=2)
    with pytest.raises(ValueError, match=r"^the checkpoint 'c' (is|has) (damaged|of another)"):
        gp.iterate(model, watch, schedule, steps=5, evaluate=loss, checkpoint=tmp_path / "c", **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not watch.rounds
    assert (tmp_path / "c").read_bytes() == data


SAID = {
    "no call": "the state lacks 'call': it is not one of iterate",
    "call is text": "'call' in the state of iterate must be dict, got 'x'",
    "entries are text": "a state of iterate must be a dict",
    "an entry lacks a key": "the state lacks 'steps': it is not one of iterate",
    "steps of text": "a step must be a whole number, got 'a'",
    "a sparsity of text": "'sparsity' in the state of iterate must be float, got '0.5'",
    "a sparsity beyond 1": r"the sparsity of an entry must be in \[0, 1\], got 1.5",
    "values of text": "entry 1 has values that are no numbers",
    "rounds in disorder": "entry 0 of the checkpoint is of round 2",
    "a mask of no tensor": "the checkpoint 'c' has damaged masks: '4.bias'",
}


@pytest.mark.parametrize("damage", SAID)
def test_what_is_damaged_in_a_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    run(tmp_path / "c")
    rewritten(tmp_path / "c", DAMAGE[damage])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=SAID[damage]):
        run(tmp_path / "c")


@pytest.mark.parametrize("size", [0, 1, 7, 30, 1000, -1])
def test_a_checkpoint_that_is_cut_off_is_refused(size: int, tmp_path: Path) -> None:
    run(tmp_path / "c", retrain=3)
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:size])
    with pytest.raises(ValueError, match="'c' is no checkpoint of iterate: it is"):
        run(tmp_path / "c", retrain=3)


@pytest.mark.parametrize("place", ["load_state_dict", "set_rng_state", "apply_"])
def test_an_interrupt_while_a_checkpoint_is_taken_up_leaves_the_model_as_it_was(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KilledError):
        run(tmp_path / "c", die_at=9, retrain=3)
    model = network(3)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    interrupted = []
    owner = {"load_state_dict": nn.Module, "set_rng_state": torch, "apply_": gp.Masks}[place]
    real = getattr(owner, place)

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        done = real(*args, **kwargs)
        if not interrupted:
            interrupted.append(place)
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(owner, place, interrupt)
    schedule = gp.Geometric(0.4, every=1, rounds=2)
    with pytest.raises(KeyboardInterrupt):
        gp.iterate(model, train, schedule, steps=5, retrain=3, evaluate=loss, checkpoint=tmp_path / "c")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_files_beside_the_checkpoint_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "c.part").write_text("mine")
    run(tmp_path / "c", retrain=3)
    with pytest.raises(KilledError):
        run(tmp_path / "d", die_at=9, retrain=3)
    assert (tmp_path / "c.part").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "c.part", "d"]


# ------------------------------------------------------------------------------------------------------ as objects


def test_rounds_entries_and_histories_are_compared_and_hashed_by_what_they_say() -> None:
    masks = gp.prune(network(), sparsity=0.5)
    rounds = [Round(1, range(3), copy.deepcopy(masks), None) for _ in range(2)]
    assert rounds[0] == rounds[1]
    assert hash(rounds[0]) == hash(rounds[1])
    assert rounds[0] != Round(1, range(3), gp.Masks({}), None)
    entries = [gp.Entry(0, (0, 3), 0.0, {}, {"score": 1.0}) for _ in range(2)]
    assert len(set(entries)) == 1
    assert History(entries[:1], masks) == History(entries[1:], copy.deepcopy(masks))
    assert History(entries[:1], masks) != History(entries, masks)
    assert History(entries[:1], masks) != History(entries[:1], gp.Masks({}))


def test_a_checkpoint_holds_complex_weights_bit_for_bit(tmp_path: Path) -> None:
    def run_complex(path: Path | None, die_in: int | None = None) -> tuple[History, Tensor]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3, bias=False, dtype=torch.complex64)
        x = torch.randn(8, 4, dtype=torch.complex64)

        def step(model: nn.Module, work: Round) -> None:
            if work.number == die_in:
                raise KilledError
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            work.hold(optimizer)
            for _ in work.steps:
                optimizer.zero_grad()
                model(x).abs().square().mean().backward()
                optimizer.step()

        history = gp.iterate(model, step, gp.Geometric(0.5, 1, 3), steps=3, rewind="weights", checkpoint=path)
        return history, model.weight.detach().clone()

    whole, weights = run_complex(None)
    with pytest.raises(KilledError):
        run_complex(tmp_path / "c", die_in=2)
    again, after = run_complex(tmp_path / "c")
    assert again == whole
    assert weights.is_complex()
    assert torch.equal(after, weights)


def test_a_set_or_a_tensor_among_the_arguments_is_the_same_call_from_its_file(tmp_path: Path) -> None:
    path, options = tmp_path / "loop", {"exclude": frozenset({"4.*"}), "min_keep": torch.tensor(1)}
    first, bits = run(path, **options)
    again, same = run(path, **options)
    assert first == again
    assert all(torch.equal(bits[name], same[name]) for name in bits)
    with pytest.raises(ValueError, match="its min_keep are 1, this call's 2"):
        run(path, **options | {"min_keep": torch.tensor(2)})
    with pytest.raises(ValueError, match=r"its exclude are \['4.\*'\], this call's \['4.\*', '4.weight'\]"):
        run(path, **options | {"exclude": {"4.weight", "4.*"}})


def test_without_tqdm_the_rounds_run_without_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert run(None)[0] == wanted[0]

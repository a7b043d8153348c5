"""Train, prune, rewind, repeat: each round does what it says, and a killed loop ends as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune.recovery.correct import History, Round

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


def test_drawing_without_numbers_or_an_unknown_one_says_what_there_is() -> None:
    with pytest.raises(ValueError, match="give `evaluate`"):
        gp.iterate(network(), train, THREE, steps=2).plot()
    both = gp.iterate(network(), train, THREE, steps=2, evaluate=lambda m: {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\], got None"):
        both.plot()


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
    ({"rewind": "both"}, "rewind: .*'both'"),
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
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
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
_, weights = t.run(Path(sys.argv[2]), retrain=25)
print("done", float(sum(v.double().sum() for v in weights.values())))
"""


def test_a_process_killed_by_the_system_goes_on_from_its_file(tmp_path: Path) -> None:
    path, here = tmp_path / "c", str(Path(__file__).parent)
    whole, weights = run(None, retrain=25)
    command = [sys.executable, "-c", SCRIPT, here, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not path.exists() and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)  # as soon as round 0 is in the file
    output, _ = process.communicate()
    assert "done" not in output
    again, after = run(path, retrain=25)
    assert again.entries == whole.entries
    assert all(torch.equal(after[name], weights[name]) for name in weights)


# --------------------------------------------------------------------------------------------------- distillation


@given(st.integers(0, 1000), st.floats(0.5, 10.0), st.sampled_from([(3,), (4, 3), (2, 5, 3)]))
def test_the_distillation_loss_is_the_divergence_at_that_temperature(
    seed: int, temperature: float, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
    expected = (p * (p / q).log()).sum(-1).mean() * temperature**2
    torch.testing.assert_close(gp.distill_loss(student, teacher, temperature), expected)


def test_the_distillation_loss_is_zero_for_equals_and_teaches_the_student_only() -> None:
    student, teacher = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    assert gp.distill_loss(student, student.detach(), 3.0).item() == pytest.approx(0.0, abs=1e-6)
    gp.distill_loss(student, teacher).backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_wrong_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        gp.distill_loss(torch.zeros(1, 2), torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2\), \(1, 3\)"):
        gp.distill_loss(torch.zeros(1, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="no logits"):
        gp.distill_loss(torch.zeros(0, 2), torch.zeros(0, 2))

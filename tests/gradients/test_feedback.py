"""Does what waits stay whole, whatever interrupts a step, is loaded, or is copied?"""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.gradients.sparsify import share_of


def made(momentum=0.0, dtype=torch.float32, **rule):
    """A model with feedback that has taken one step, and the next gradients in place."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).to(dtype)
    feedback = gp.ErrorFeedback(model, **(rule or {"density": 0.3}), momentum=momentum)
    backward(model, 1)
    feedback.step()
    backward(model, 2)
    return model, feedback


def backward(model, seed):
    model.zero_grad()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    model(x.to(next(model.parameters()).dtype)).square().sum().backward()


def everything(model, feedback):
    state = feedback.state_dict()
    return copy.deepcopy(
        [state["steps"], *(p.grad for p in model.parameters())]
        + [tensor for kind in ("residuals", "velocities") for tensor in state[kind].values()]
    )


def equal(one, other):
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True)
    )


class Interrupting(torch.overrides.TorchFunctionMode):
    """Raises KeyboardInterrupt at the n-th call into torch."""

    def __init__(self, at):
        self.left = at

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [{"density": 0.3}, {"ratio": 1.0}], ids=str)
def test_an_interrupt_anywhere_in_a_step_leaves_it_whole_or_undone(momentum, dtype, rule):
    model, feedback = made(momentum, dtype, **rule)
    before = everything(model, feedback)
    finished = copy.deepcopy((model, feedback))
    for p, q in zip(model.parameters(), finished[0].parameters(), strict=True):
        q.grad = p.grad.clone()
    finished[1].step()
    after = everything(*finished)
    for at in range(1, 1000):
        try:
            with Interrupting(at):
                feedback.step()
        except KeyboardInterrupt:
            torch.set_grad_enabled(True)  # which torch's own no_grad leaves off where it is interrupted
            if equal(everything(model, feedback), after):  # after the last write
                break
            assert equal(everything(model, feedback), before), at
        else:
            break
    assert at > 30
    assert equal(everything(model, feedback), after)


def test_a_step_that_fails_while_gradients_are_written_is_undone(monkeypatch):
    model, feedback = made()
    before = everything(model, feedback)
    entries = feedback._entries

    class Failing(dict):
        def update(self, *args):
            dict.update(self, *args)
            if not self.failed:
                self.failed = True
                raise MemoryError

    feedback._entries = Failing(entries)
    feedback._entries.failed = False
    with pytest.raises(MemoryError):
        feedback.step()
    assert equal(everything(model, feedback), before)


@pytest.mark.parametrize("order", ["model first", "feedback first"])
def test_a_deep_copy_with_the_model_goes_on_with_the_copy(order):
    model, feedback = made(0.9)
    if order == "model first":
        other, copied = copy.deepcopy((model, feedback))
    else:
        copied, other = copy.deepcopy([feedback, model])
    for seed in (3, 4):
        backward(model, seed)
        backward(other, seed)
        assert feedback.step() == copied.step()
        assert equal(everything(model, feedback), everything(other, copied))
    backward(other, 5)
    before = everything(model, feedback)
    copied.step()
    assert equal(everything(model, feedback), before)


def test_a_copy_whose_parameters_are_gone_says_so():
    _model, feedback = made()
    alone = copy.deepcopy(feedback)
    with pytest.raises(ValueError, match="no parameter lives any more: keep the model, and copy this together with it"):
        alone.step()


def test_it_is_not_pickled_but_its_state_is():
    _model, feedback = made()
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        pickle.dumps(feedback)
    assert pickle.loads(pickle.dumps(feedback.state_dict()))["steps"] == 1


DAMAGED = [
    ({"steps": "x"}, "'steps' in the state of ErrorFeedback must be int"),
    ({"steps": -1}, "steps must be at least 0"),
    ({"steps": True}, "'steps' in the state"),
    ({"residuals": None}, "'residuals' in the state of ErrorFeedback must be Mapping"),
    ({"residuals": [1]}, "'residuals' in the state"),
    ({"residuals": {"0.bias": [0.0] * 6}}, r"residuals of '0\.bias' must be a tensor of float32 or float64, got list"),
    ({"residuals": {"0.bias": torch.zeros(6, dtype=torch.int64)}}, r"float32 or float64, got torch\.int64"),
    ({"residuals": {"0.bias": torch.zeros(1).expand(6)}}, "share memory"),
    ({"velocities": {"0.bias": None}}, "must be a tensor"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_a_damaged_state_changes_nothing(change, message):
    model, feedback = made()
    before = everything(model, feedback)
    with pytest.raises(ValueError, match=message):
        feedback.load_state_dict(feedback.state_dict() | change)
    assert equal(everything(model, feedback), before)


def test_a_state_of_something_else_is_named():
    model, feedback = made()
    for wrong in (None, 3, [feedback.state_dict()]):
        with pytest.raises(TypeError, match=r"a state of ErrorFeedback must be a dict as its state_dict\(\)"):
            feedback.load_state_dict(wrong)
    with pytest.raises(ValueError, match="the state lacks 'steps', 'residuals', 'velocities'"):
        feedback.load_state_dict(model.state_dict())


def test_numbers_of_another_kind_are_named_whoever_gives_them():
    parameter = nn.Parameter(torch.zeros(4))
    for rule in ("density", "threshold", "ratio"):
        for wrong in (True, "0.5", 1j, [0.5], float):
            with pytest.raises(TypeError, match=f"{rule} must be"):
                gp.ErrorFeedback(parameter, **{rule: wrong})
        for wrong in (None, "0.5", True, torch.ones(2)):
            parameter.grad = torch.ones(4)
            feedback = gp.ErrorFeedback(parameter, **{rule: lambda _, wrong=wrong: wrong})
            with pytest.raises(TypeError, match=f"{rule} at step 0 must be"):
                feedback.step()
            assert (parameter.grad == 1).all()
            assert feedback.steps == 0
        gp.ErrorFeedback(parameter, **{rule: lambda _: torch.tensor(0.5)}).step()
    for wrong in (None, "0", True):
        with pytest.raises(TypeError, match="momentum must be"):
            gp.ErrorFeedback(parameter, 0.5, momentum=wrong)
    with pytest.raises(ValueError, match="scope must be one of"):
        gp.ErrorFeedback(parameter, 0.5, scope=None)


@pytest.mark.parametrize(
    ("change", "to", "back"),
    [(torch.set_default_device, "meta", None), (torch.set_default_dtype, torch.bfloat16, torch.float32)],
    ids=["meta", "bfloat16"],
)
@pytest.mark.parametrize("rule", [{"density": 0.3}, {"threshold": 0.3}, {"ratio": 1.1}], ids=str)
def test_torchs_defaults_change_nothing(change, to, back, rule):
    pairs = [made(0.9, torch.bfloat16, **rule) for _ in range(2)]
    for at, (model, feedback) in enumerate(pairs):
        if at:
            change(to)
        try:
            feedback.step()
            if "threshold" in rule:
                gp.threshold_gradients_(model, 0.7)
            gp.threshold_gradients_(model, ratio=0.5)
            gp.keep_top_gradients_(model, 0.2)
        finally:
            if at:
                change(back)
    assert equal(everything(*pairs[0]), everything(*pairs[1]))


def test_the_share_is_over_all_entries_and_nothing_is_not_a_number():
    assert share_of(0, {}) == 1.0
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([math.pi, 0.0, 0.0, 0.0])
    assert gp.ErrorFeedback(parameter, threshold=1.0).step() == 0.25


# ------------------------------------------------------------------------------------------ beside what prunes weights


def test_with_masked_gradients_neither_the_norm_nor_what_is_sent_counts_pruned_weights():
    def shares(masked):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        masks = gp.prune(model, sparsity=0.75, scope="layer")
        feedback = gp.ErrorFeedback(model, density=0.25)
        backward(model, 1)
        if masked:
            masks.mask_gradients_(model)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        alive = {name: grad[masks[name]] if name in masks else grad for name, grad in grads.items()}
        wanted = torch.cat([grad.flatten() for grad in alive.values()]).norm()
        norm = gp.clip_by_norm_(model, 0.1)
        feedback.step()
        lost = sum(int((model.get_parameter(name).grad[~mask] != 0).sum()) for name, mask in masks.items())
        return float(norm / wanted), lost

    assert shares(masked=True) == (pytest.approx(1.0), 0)
    more, lost = shares(masked=False)
    assert more > 1.01
    assert lost > 0


@pytest.mark.parametrize(
    "call", [lambda p, d: gp.ErrorFeedback(p, d), lambda p, d: gp.keep_top_gradients_(p, d)], ids=["feedback", "top"]
)
def test_a_density_of_the_int_1_is_taken_for_a_percentage_and_warned_of(call):
    model = nn.Linear(3, 2)
    backward(nn.Sequential(nn.Linear(4, 3), model), 1)
    with pytest.warns(
        UserWarning, match=r"density=1 keeps everything: it is a fraction, and 0\.01 is one per cent"
    ) as w:
        call(model, 1)
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, 1.0)
        gp.ErrorFeedback(model, threshold=1)

"""Does an overflow under a gradient scaler skip the step and nothing else, and is the same choice everywhere?"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import gradprune as gp

CALLS = {
    "by value": lambda p, **more: gp.clip_by_value_(p, 0.01, **more),
    "by norm": lambda p, **more: gp.clip_by_norm_(p, 0.01, **more),
    "by the largest": lambda p, **more: gp.clip_by_norm_(p, 0.01, norm_type=math.inf, **more),
    "adaptive": lambda p, **more: gp.clip_adaptive_(p, 0.01, **more),
    "auto": lambda p, **more: gp.AutoClip(**more)(p),
    "threshold": lambda p, **more: gp.threshold_gradients_(p, 0.1, **more),
    "ratio": lambda p, **more: gp.threshold_gradients_(p, ratio=1.0, **more),
    "top": lambda p, **more: gp.keep_top_gradients_(p, 0.1, **more),
    "feedback": lambda p, **more: gp.ErrorFeedback(p, 0.1, **more).step(),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
every_bad = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def sick(bad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.randn(5, 3)).square().sum().backward()
    model[1].weight.grad[1, 2] = bad
    return model


def same(model, other):
    return all(torch.equal(a.grad.nan_to_num(), b.grad.nan_to_num()) for a, b in zip(model, other, strict=True))


@every_call
@every_bad
def test_leave_changes_no_bit_and_says_nothing(call, bad):
    model, before = sick(bad), sick(bad)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, nonfinite="leave")
    assert same(model.parameters(), before.parameters())


@every_call
def test_zero_and_skip_zero_one_gradient_or_all_and_warn_here(call):
    for choice, what in (("zero", "it was"), ("skip", "all gradients were")):
        model, rest = sick(math.nan), sick(0.0)
        rest[1].weight.grad.zero_()
        with pytest.warns(RuntimeWarning, match=rf"'1\.weight' is not finite; {what} set to zero") as caught:
            call(model, nonfinite=choice)
        assert caught[0].filename == __file__
        if choice == "zero":
            call(rest)
        else:
            rest.zero_grad(set_to_none=False)
        assert all(torch.allclose(a.grad, b.grad) for a, b in zip(model.parameters(), rest.parameters(), strict=True))


@every_call
def test_what_is_finite_is_treated_alike_under_every_choice(call):
    wanted = sick(1.0)
    call(wanted)
    for choice in ("raise", "zero", "skip", "leave"):
        model = sick(1.0)
        call(model, nonfinite=choice)
        assert same(model.parameters(), wanted.parameters())


@every_call
def test_an_unknown_choice_names_the_four(call):
    model, before = sick(1.0), sick(1.0)
    for wrong in ("ignore", None, True, 3, ["raise"]):
        with pytest.raises(ValueError, match="nonfinite must be one of 'raise', 'zero', 'skip', 'leave'; got"):
            call(model, nonfinite=wrong)
    assert same(model.parameters(), before.parameters())


def test_shares_under_leave_and_skip():
    assert gp.threshold_gradients_(sick(math.nan), 0.1, nonfinite="leave") == 1.0
    assert gp.ErrorFeedback(sick(math.nan), 0.1, nonfinite="leave").step() == 0.0
    with pytest.warns(RuntimeWarning):
        assert gp.keep_top_gradients_(sick(math.nan), 0.1, nonfinite="skip") == 0.0
    with pytest.warns(RuntimeWarning):
        assert gp.ErrorFeedback(sick(math.nan), 0.1, nonfinite="skip").step() == 0.0


def test_a_log_counts_what_is_left_and_calls_it_no_engagement():
    log = gp.ClipLog()
    gp.clip_by_norm_(sick(math.inf), 0.1, nonfinite="leave", log=log)
    assert (log.calls, log.engaged, log.skipped, log.nonfinite) == (1, 0, 0, {"1.weight": 1})
    assert (log.factors, log.shares, log.sizes) == ([1.0], [0.0], [math.inf])


def test_what_is_not_finite_teaches_autoclip_nothing():
    clip_ = gp.AutoClip(nonfinite="leave")
    clip_(sick(math.inf))
    assert clip_.norms == []
    assert clip_.threshold == math.inf


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("choice", ["leave", "skip"])
def test_nothing_that_waits_changes_in_a_step_that_is_left_or_skipped(momentum, choice):
    model = sick(1.0)
    feedback = gp.ErrorFeedback(model, 0.1, momentum=momentum, nonfinite=choice)
    feedback.step()
    before = copy.deepcopy(feedback.state_dict())
    model[0].bias.grad[0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        feedback.step()
    after = feedback.state_dict()
    assert after["steps"] == before["steps"] == 1
    for kind in ("residuals", "velocities"):
        assert all(torch.equal(before[kind][name], after[kind][name]) for name in before[kind])


def test_feedback_under_zero_takes_the_gradient_as_zero_and_sends_what_waits():
    first, second = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    feedback = gp.ErrorFeedback([first, second], threshold=1.0, nonfinite="zero")
    first.grad, second.grad = torch.tensor([0.75, 0.5]), torch.tensor([2.0, 0.5])
    feedback.step()
    first.grad, second.grad = torch.tensor([math.nan, 0.75]), torch.tensor([0.25, 0.75])
    with pytest.warns(RuntimeWarning):
        feedback.step()
    assert first.grad.tolist() == [0.0, 0.0]
    assert second.grad.tolist() == [0.0, 1.25]
    assert feedback.residuals["parameter 0"].tolist() == [0.75, 0.5]


def scaled_training(before_step, factors, **options):
    """Five steps under a gradient scaler, some of whose losses overflow; return weights and scale."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    act = before_step(model)
    for factor in factors:
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 3)).square().sum() * factor).backward()
        scaler.unscale_(optimizer)
        act()
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in model.parameters()], scaler.get_scale()


def feedback(model, **more):
    return gp.ErrorFeedback(model, 0.5, **more).step


RECIPES = {
    "by value": lambda m, **more: lambda: gp.clip_by_value_(m, 0.1, **more),
    "by norm": lambda m, **more: lambda: gp.clip_by_norm_(m, 0.1, **more),
    "adaptive": lambda m, **more: lambda: gp.clip_adaptive_(m, **more),
    "auto": lambda m, **more: (lambda clip_: lambda: clip_(m))(gp.AutoClip(50.0, **more)),
    "threshold": lambda m, **more: lambda: gp.threshold_gradients_(m, ratio=1.0, **more),
    "top": lambda m, **more: lambda: gp.keep_top_gradients_(m, 0.5, **more),
    "feedback": feedback,
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("overflow", [math.inf, math.nan])
def test_with_a_scaler_an_overflow_skips_its_step_and_nothing_else(name, overflow):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights, scale = scaled_training(lambda m: RECIPES[name](m, nonfinite="leave"), (1.0, overflow, 1.0, 1.0))
    without, _ = scaled_training(RECIPES[name], (1.0, 1.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(weights, without, strict=True))
    assert scale == 8.0

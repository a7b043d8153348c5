"""Who steps, and what is a step: wrapped optimizers, halves, closures, skipped steps, torch's own pretences."""

import math

import pytest
import torch
from torch import nn

import gradprune as gp
from examples import Delegating
from gradprune.core import steps


class Halves(torch.optim.Optimizer):
    """As SAM: a climb, then a step of an inner optimizer, one by one or in one call with a closure."""

    def __init__(self, params, **kw):
        super().__init__(params, kw)
        self.base = torch.optim.SGD(self.param_groups, **kw)

    def first_step(self):
        pass

    def second_step(self):
        self.base.step()

    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.first_step()
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.second_step()


class Lookahead(torch.optim.Optimizer):
    """Every second step the weights go half way back to slow ones, outside the inner optimizer's step."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner, self.count = inner, 0
        self.slow = {p: p.detach().clone() for group in inner.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Plain:
    """A wrapper that is no Optimizer, as those with a schedule of their own."""

    def __init__(self, inner):
        self._optimizer = inner

    def step(self):
        self._optimizer.step()


def backward(model, seed=0):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(torch.randn(4, 8)).square().sum()
    loss.backward()
    return loss


def counted(optimizer):
    seen = []
    watch = steps.Steps(
        steps.as_list(optimizer),
        begins=lambda: seen.append("begins"),
        gradients=lambda: seen.append("gradients"),
        taken=lambda: seen.append("taken"),
    )
    return watch, seen


ONE = ["begins", "gradients", "taken"]


@pytest.mark.parametrize("wrap", [lambda o: o, Delegating, Plain, Lookahead, lambda o: Delegating(Lookahead(o))])
def test_a_step_is_told_once_however_it_is_wrapped(wrap):
    model = nn.Linear(8, 8)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    watch, seen = counted(optimizer)
    for _ in range(3):
        backward(model)
        optimizer.step()
    assert seen == 3 * ONE
    watch.remove()
    backward(model)
    optimizer.step()
    assert seen == 3 * ONE


def test_a_step_in_two_halves_is_told_once_called_by_halves_or_by_a_closure():
    model = nn.Linear(8, 8)
    optimizer = Halves(model.parameters(), lr=0.1)
    _, seen = counted(optimizer)
    backward(model)
    optimizer.first_step()
    backward(model)
    optimizer.second_step()
    assert seen == ONE
    optimizer.step(lambda: backward(model))
    assert seen == 2 * ONE


@pytest.mark.parametrize("named", [True, False])
def test_gradients_are_told_after_the_closures_first_call(named):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    norms = []
    steps.Steps([optimizer], gradients=lambda: norms.append(model.weight.grad.norm().item()), taken=lambda: None)
    expected = backward(model, seed=1) and model.weight.grad.norm().item()
    model.zero_grad()
    optimizer.step(closure=lambda: backward(model, seed=1)) if named else optimizer.step(lambda: backward(model, 1))
    assert norms == [expected]


def test_after_an_exception_in_a_step_the_next_one_is_told_whole():
    model = nn.Linear(8, 8)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    _, seen = counted(optimizer)

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    seen.clear()
    backward(model)
    optimizer.step()
    assert seen == ONE


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_a_scaler_skips_is_none(kind, fused):
    model = nn.Linear(8, 8)
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=3))
    recorder = counted(optimizer)[1]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(7):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 8)).sum()).backward()
        if step < 4:
            model.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert pruner.step == max(0, step - 3)
        assert int((model.weight == 0).sum()) == (32 if step == 6 else 0)
    assert recorder.count("taken") == 3


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)])
def test_the_step_by_which_a_checkpoint_makes_state_is_none(make):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = nn.Linear(8, 8)
    optimizer = make(model.parameters())
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=1))
    get_state_dict(model, optimizer)
    assert (pruner.step, pruner.masks.sparsity) == (0, 0.0)
    backward(model)
    optimizer.step()
    assert (pruner.step, pruner.masks.sparsity) == (1, 0.5)


def test_a_first_step_of_a_warm_up_from_zero_is_one():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=1))
    backward(model)
    optimizer.step()
    assert pruner.step == 1


def test_what_cannot_be_ridden_on_is_said():
    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": list(params)}]

        def step(self, closure=None):
            pass

    model = nn.Linear(8, 8)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"Bare cannot be watched.*Pass the torch optimizer"):
        gp.Pruner(model, Bare(model.parameters()), gp.OneShot(0.5))
    for wrong, message in [
        (None, "got NoneType"),
        (model, "got a model, Linear"),
        (torch.optim.SGD, "got the class SGD: make one"),
        (torch.optim.lr_scheduler.StepLR(sgd, 1), "got a scheduler, StepLR: pass its optimizer"),
        ([sgd, 3], "got int"),
        ("adam", "got str"),
    ]:
        with pytest.raises(TypeError, match=message):
            gp.Pruner(model, wrong, gp.OneShot(0.5))
        with pytest.raises(TypeError, match=message):
            gp.prune(nn.Linear(8, 8), sparsity=0.5).hold(wrong)
    with pytest.raises(ValueError, match="list of optimizers is empty"):
        gp.Pruner(model, [], gp.OneShot(0.5))
    assert not sgd._optimizer_step_pre_hooks


def test_hooks_that_cannot_be_added_leave_none_behind():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def refuse(*_, **__):
        raise KeyboardInterrupt

    for method in ("register_step_post_hook", "register_load_state_dict_post_hook", "register_state_dict_pre_hook"):
        setattr(optimizer, method, refuse)
        with pytest.raises(KeyboardInterrupt):
            gp.Pruner(model, optimizer, gp.OneShot(0.5))
        delattr(optimizer, method)
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        assert not optimizer._optimizer_load_state_dict_post_hooks
    gp.Pruner(model, optimizer, gp.OneShot(0.5))


def test_several_optimizers_are_each_held_and_the_last_counts():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first, last = (torch.optim.AdamW(model[i].parameters(), lr=0.1) for i in (0, 1))
    pruner = gp.Pruner(model, [first, last], gp.OneShot(0.75, at=2))
    for step in range(4):
        backward(model)
        first.step()
        assert pruner.step == step
        last.step()
        assert pruner.step == step + 1
        wanted = 96 if pruner.step >= 2 else 0
        assert sum(int((layer.weight == 0).sum()) for layer in model) == wanted


def test_weights_that_a_lookahead_writes_are_zero_when_its_step_returns():
    model = nn.Linear(8, 8)
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=3))
    for step in range(1, 9):
        backward(model, step)
        optimizer.step()
        assert int((model.weight == 0).sum()) == (32 if step >= 3 else 0)
    assert pruner.step == 8


def test_an_optimizer_that_is_reached_in_two_ways_or_in_a_circle_is_ridden_once():
    parameter = nn.Parameter(torch.ones(1))
    outer, inner = (torch.optim.SGD([parameter], lr=0.1) for _ in range(2))
    outer.first = outer.second = inner
    inner.outer = outer
    assert steps.ridden(outer) == [outer, inner]
    assert steps.ridden(inner) == [inner, outer]

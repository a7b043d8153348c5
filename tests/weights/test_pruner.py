"""Whose weights a Pruner prunes, what it starts from, and what happens when model, optimizer or steps change."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradprune as gp
from examples import two_layers


def sgd(model, lr=0.01, **kw):
    return torch.optim.SGD(model.parameters(), lr=lr, **kw)


def train(model, optimizers, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(4, 8, generator=generator)).square().sum().backward()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()


def zeros(model):
    return {name: int((p == 0).sum()) for name, p in model.named_parameters() if p.dim() == 2}


def hooks_of(optimizer):
    return sum(len(v) for k, v in vars(optimizer).items() if k.startswith("_optimizer_"))


# -------------------------------------------------------------------------------------------- whose weights they are


def test_weights_that_another_optimizer_has_are_refused_and_taken_with_both():
    model = two_layers()
    a, b = (torch.optim.SGD(layer.parameters(), lr=0.01) for layer in model)
    with pytest.raises(ValueError, match=r"does not have \['1.weight'\].*as a list, or exclude"):
        gp.Pruner(model, a, gp.OneShot(0.9, at=1))
    assert hooks_of(a) == hooks_of(b) == 0
    pruner = gp.Pruner(model, [a, b], gp.OneShot(0.5, at=1))
    train(model, [a, b], 3)
    assert pruner.masks.sparsity == 0.5
    assert sum(zeros(model).values()) == 64
    only = gp.Pruner(two := two_layers(), torch.optim.SGD(two[0].parameters(), 0.1), gp.OneShot(0.5), exclude="1.*")
    assert list(only.masks) == ["0.weight"]


def test_a_hold_on_one_of_two_optimizers_warns_of_the_others_weights():
    model = two_layers()
    a, b = (torch.optim.SGD(layer.parameters(), lr=0.01) for layer in model)
    masks = gp.prune(model, sparsity=0.5)
    with pytest.warns(UserWarning, match=r"does not have '1.weight'.*masks.hold\(\[first, second\]\)"):
        masks.hold(a).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.hold([a, b])
    train(model, [a, b], 3)
    assert masks.sparsity == sum(zeros(model).values()) / 128


def test_frozen_weights_that_no_optimizer_has_are_no_reason_to_warn():
    model = two_layers()
    masks = gp.prune(model, sparsity=0.5)
    model[1].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.hold(torch.optim.SGD(model[0].parameters(), lr=0.01))


def test_a_layer_frozen_during_training_stays_in_masks_sparsity_and_state():
    model = two_layers()
    optimizer = sgd(model)
    pruner = gp.Pruner(model, optimizer, gp.Linear(0.8, 0, 10), scope="layer")
    for step in range(10):
        model[0].requires_grad_(step < 4)
        train(model, optimizer, 1, seed=step)
    assert sum(zeros(model).values()) == round(0.8 * 128)
    assert pruner.masks.sparsity == round(0.8 * 128) / 128
    assert all(abs(count - 51.2) < 1 for count in zeros(model).values())
    fresh = gp.Pruner(two := two_layers(), sgd(two), gp.Linear(0.8, 0, 10), scope="layer")
    fresh.load_state_dict(pruner.state_dict())
    assert zeros(two) == zeros(model)


def test_a_layer_unfrozen_before_the_first_event_is_not_pruned_and_breaks_nothing():
    model = two_layers()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.01)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=2))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train(model, optimizer, 3)
    assert list(pruner.masks) == ["1.weight"]
    assert zeros(model) == {"0.weight": 0, "1.weight": 32}


def test_a_layer_that_was_replaced_is_warned_of():
    model = two_layers()
    optimizer = sgd(model)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5))
    model[1] = nn.Linear(8, 8)
    optimizer.add_param_group({"params": model[1].parameters()})
    train(model, optimizer, 2)
    with pytest.warns(UserWarning, match="'1.weight' is another parameter than the one that is pruned"):
        assert pruner.masks.sparsity == 0.5
    with pytest.warns(UserWarning, match="another parameter"):
        pruner.state_dict()


def test_a_second_pruner_of_the_same_weights_is_refused_until_the_first_is_removed():
    model = two_layers()
    optimizer = sgd(model)
    first = gp.Pruner(model, optimizer, gp.OneShot(0.8, at=2))
    with pytest.raises(ValueError, match=r"have a pruner already: call its remove\(\)"):
        gp.Pruner(model, optimizer, gp.OneShot(0.5, at=2))
    train(model, optimizer, 3)
    assert sum(zeros(model).values()) == round(0.8 * 128)
    first.remove()
    second = gp.Pruner(model, optimizer, gp.OneShot(0.9, at=2), within=first.masks)
    train(model, optimizer, 3)
    assert second.masks.sparsity == round(0.9 * 128) / 128


def test_two_pruners_of_different_weights_go_together():
    model = two_layers()
    optimizer = sgd(model)
    a = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=1), include="0.*")
    b = gp.Pruner(model, optimizer, gp.OneShot(0.75, at=2), include="1.*")
    train(model, optimizer, 3)
    assert zeros(model) == {"0.weight": 32, "1.weight": 48}
    a.remove()
    train(model, optimizer, 1)
    assert zeros(model)["0.weight"] < 32  # free to move, but where nothing follows
    assert zeros(model)["1.weight"] == 48
    assert b.step == 4


def test_with_the_last_pruner_and_hold_go_all_hooks():
    model = two_layers()
    optimizer = sgd(model)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5))
    assert hooks_of(optimizer)
    pruner.remove()
    pruner.remove()
    assert not hooks_of(optimizer)


# --------------------------------------------------------------------------------------------- what it starts from


def test_a_pruner_of_a_pruned_model_starts_from_what_is_held():
    model = two_layers()
    optimizer = sgd(model)
    masks = gp.prune(model, sparsity=0.8)
    masks.hold(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = gp.Pruner(model, optimizer, gp.OneShot(0.9, at=5))
    train(model, optimizer, 1)
    assert all(torch.equal(pruner.masks[name], masks[name]) for name in masks)
    assert sum(zeros(model).values()) == round(0.8 * 128)
    train(model, optimizer, 4)
    assert sum(zeros(model).values()) == round(0.9 * 128)


def test_a_pruner_of_a_model_with_zeros_keeps_them_and_says_so():
    model = two_layers()
    gp.prune(model, sparsity=0.8)
    with pytest.warns(UserWarning, match="^102 weights of the model are zero already"):
        pruner = gp.Pruner(model, optimizer := sgd(model), gp.Cubic(0.9, 0, 5))
    train(model, optimizer, 2)
    assert pruner.masks.sparsity == 102 / 128
    assert pruner.events == []  # the schedule is not there yet
    train(model, optimizer, 3)
    assert pruner.masks.sparsity == round(0.9 * 128) / 128


def test_within_an_empty_dict_lets_zeros_move():
    model = two_layers()
    gp.prune(model, sparsity=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = gp.Pruner(model, optimizer := sgd(model), gp.OneShot(0.9, at=5), within={})
    train(model, optimizer, 1)
    assert pruner.masks.sparsity == 0.0
    assert sum(zeros(model).values()) < 102


def test_a_layer_that_begins_at_zero_as_a_whole_is_not_taken_as_pruned():
    model = two_layers()
    nn.init.zeros_(model[1].weight)
    pruner = gp.Pruner(model, sgd(model), gp.OneShot(0.5, at=5))
    assert pruner.masks.sparsity == 0.0


def test_within_of_other_names_or_shapes_is_refused():
    model = two_layers()
    for within, message in [
        ({"2.weight": torch.ones(8, 8, dtype=torch.bool)}, "`within` names '2.weight'"),
        ({"1.weight": torch.ones(8, dtype=torch.bool)}, r"shape \(8,\) for '1.weight', the parameter \(8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            gp.Pruner(model, sgd(model), gp.OneShot(0.5), within=within)


# --------------------------------------------------------------------------------------------------- copies, states


@pytest.mark.parametrize("order", ["mop", "pom", "opm"])
def test_a_deep_copy_of_model_optimizer_and_pruner_prunes_and_holds(order):
    def run(model, optimizer, pruner):
        train(model, optimizer, 6)
        return {name: p.clone() for name, p in model.named_parameters()}, pruner.step, pruner.masks.sparsity

    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = gp.Pruner(model, optimizer, gp.Cubic(0.9, 0, 5), regrow=gp.Regrow(gp.gradient, 0.3, every=2))
    train(model, optimizer, 2)
    named = {"m": model, "o": optimizer, "p": pruner}
    twins = dict(zip(order, copy.deepcopy([named[key] for key in order]), strict=True))
    assert twins["p"].model is twins["m"]
    copied, whole = run(twins["m"], twins["o"], twins["p"]), run(model, optimizer, pruner)
    assert copied[1:] == whole[1:] == (8, round(0.9 * 128) / 128)
    assert all(torch.equal(copied[0][name], whole[0][name]) for name in whole[0])


def test_a_deep_copied_hold_holds_the_copies():
    model = two_layers()
    optimizer = sgd(model)
    hold = gp.prune(model, sparsity=0.5).hold(optimizer)
    twin, twin_optimizer, twin_hold = copy.deepcopy((model, optimizer, hold))
    train(twin, twin_optimizer, 2)
    assert sum(zeros(twin).values()) == 64
    twin_hold.remove()
    train(twin, twin_optimizer, 1)
    assert sum(zeros(twin).values()) == 0
    train(model, optimizer, 1)
    assert sum(zeros(model).values()) == 64


@pytest.mark.parametrize("how", [copy.copy, pickle.dumps])
def test_a_pruner_is_not_pickled_or_copied_alone(how):
    model = two_layers()
    pruner = gp.Pruner(model, sgd(model), gp.OneShot(0.5))
    with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
        how(pruner)


def test_a_schedule_of_numpy_numbers_gives_a_state_that_torch_loads():
    model = two_layers()
    optimizer = sgd(model)
    pruner = gp.Pruner(model, optimizer, lambda t: np.float32(min(0.5, 0.125 * t)))
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["amount"] == 0.375
    assert all(type(event.amount) is float for event in pruner.events)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "x"}, "'step' in the state of Pruner must be int, got 'x'"),
        ({"step": 9, "events": [3]}, "a state of an event of a Pruner must be a dict"),
        ({"step": -1}, "step must be at least 0"),
        ({"amount": math.nan}, "amount must be a number, got nan"),
        ({"masks": None}, "'masks' in the state of Pruner must be Mapping"),
        ({"events": [{"step": 1}]}, "the state lacks 'amount'"),
    ],
)
def test_a_damaged_state_changes_nothing(change, message):
    model = two_layers()
    optimizer = sgd(model)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=1))
    train(model, optimizer, 2)
    before = pruner.state_dict(), zeros(model)
    with pytest.raises((ValueError, TypeError), match=message):
        pruner.load_state_dict(pruner.state_dict() | change)
    assert pruner.state_dict()["step"] == before[0]["step"] == 2
    assert pruner.state_dict()["events"] == before[0]["events"]
    assert zeros(model) == before[1]
    for wrong in (None, [], "state"):
        with pytest.raises(TypeError, match="must be a dict as its state_dict"):
            pruner.load_state_dict(wrong)


def test_a_state_saved_after_writes_without_a_step_warns():
    class Own(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            raise AssertionError

        @torch.no_grad()
        def second_step(self):
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad, alpha=-0.01)

    model = two_layers()
    optimizer = Own(model.parameters())
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.8, at=2))
    for step in range(5):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.second_step()
        assert pruner.step == 0, step
    with pytest.warns(UserWarning, match="written 5 times without a step of the optimizer that the Pruner was given"):
        pruner.state_dict()


@pytest.mark.parametrize("look", [repr, lambda p: p.step, lambda p: p.masks.sparsity, lambda p: p.state_dict()])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_optimizer_made_after_the_pruner_is_noticed_where_the_pruner_is_looked_at(look, steps_before):
    model = two_layers()
    first = sgd(model)
    pruner = gp.Pruner(model, first, gp.Linear(0.8, 0, 100))
    train(model, first, steps_before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(pruner)
    train(model, second := sgd(model), 12)
    with pytest.warns(UserWarning, match=rf"written 12 times without a step .*it has seen {steps_before}:"):
        look(pruner)
    state = pruner._step, pruner._masks
    pruner.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pruner.step, pruner.masks) == state  # and is at rest
    again = gp.Pruner(model, second, gp.Linear(0.8, 0, 100), within=state[1])
    train(model, second, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(again)


def test_the_way_to_a_new_optimizer_that_the_warning_names_works():
    model = two_layers()
    first = sgd(model)
    pruner = gp.Pruner(model, first, gp.Linear(0.8, 0, 10))
    train(model, first, 5)
    pruner.remove()
    again = gp.Pruner(model, second := sgd(model), gp.Linear(0.8, 0, 10), within=pruner.masks)
    again.load_state_dict(pruner.state_dict())
    train(model, second, 5)
    assert (again.step, sum(zeros(model).values())) == (10, round(0.8 * 128))


def test_a_layer_that_comes_down_to_its_floor_is_warned_of_at_that_event_alone():
    model = two_layers()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner = gp.Pruner(model, optimizer, gp.Linear(0.9, 0, 18))
        train(model, optimizer, 18)
    assert [str(w.message).partition(",")[2].partition(",")[0] for w in caught] == [" '1.weight' keeps 1 of 64 weights"]
    assert caught[0].filename == __file__
    assert len(pruner.events) == 18


def test_an_average_put_in_and_out_between_steps_is_no_other_optimizer():
    model = two_layers()
    optimizer = sgd(model)
    pruner = gp.Pruner(model, optimizer, gp.Linear(0.8, 0, 100))
    train(model, optimizer, 3)
    average, own = copy.deepcopy(model.state_dict()), copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.load_state_dict(average)
            model.load_state_dict(own)
        assert pruner.step == 3


def test_steps_of_another_optimizer_that_was_given_are_no_sign_of_one_that_was_not():
    model = two_layers()
    critic, other = (torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = gp.Pruner(model, [critic, other], gp.Linear(0.8, 0, 100))
        for taken in range(3):
            train(model, critic, 9)
            assert pruner.step == taken
            train(model, other, 1)
        assert pruner.step == 3


def test_an_optimizer_that_lost_the_weights_is_named_with_them():
    model = two_layers()
    optimizer = sgd(model)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5))
    optimizer.param_groups[0]["params"] = list(model[0].parameters())
    with pytest.warns(UserWarning, match=r"optimizer no longer has '1\.weight'"):
        assert pruner.step == 0


def test_a_state_beyond_the_schedule_is_refused_at_loading_and_changes_nothing():
    model = two_layers()
    optimizer = sgd(model)
    far = gp.Pruner(model, optimizer, gp.Linear(0.9, 0, 4))
    train(model, optimizer, 3)
    state, other = far.state_dict(), two_layers()
    pruner = gp.Pruner(other, sgd(other), gp.Linear(0.5, 0, 4))
    with pytest.raises(ValueError, match=r"at a sparsity of 0\.675 after 3 steps; .* goes back to 0\.5 at the next"):
        pruner.load_state_dict(state)
    assert (pruner.step, pruner.events, zeros(other)) == (0, [], {"0.weight": 0, "1.weight": 0})
    pruner = gp.Pruner(third := two_layers(), sgd(third), gp.Linear(0.675, 0, 4))
    pruner.load_state_dict(state)
    assert zeros(third) == zeros(model)
    falling = {"amount": "threshold", "include": "0.*"}  # a threshold may fall: what is gone stays
    low, fourth = gp.Pruner(model := two_layers(), sgd(model), lambda step: 0.1, **falling), two_layers()
    high = gp.Pruner(fourth, sgd(fourth), lambda step: 0.05, **falling)
    high.load_state_dict(low.state_dict())
    assert high.masks == low.masks


# ----------------------------------------------------------------------------------------- closures, compiling, n:m


def test_growth_with_a_closure_is_that_of_the_plain_loop():
    def run(closed):
        model = two_layers()
        optimizer = sgd(model, lr=0.05)
        regrow = gp.Regrow(by=gp.gradient, every=1)
        pruner = gp.Pruner(model, optimizer, gp.OneShot(0.8), regrow=regrow)
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            x = torch.randn(4, 8, generator=generator)

            def closure(x=x):
                model.zero_grad()
                loss = model(x).square().sum()
                loss.backward()
                return loss

            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return pruner.masks, model.state_dict()

    (plain, weights), (closed, same) = run(False), run(True)
    assert all(torch.equal(plain[name], closed[name]) for name in plain)
    assert all(torch.equal(weights[name], same[name]) for name in weights)


@pytest.mark.parametrize("what", ["step", "model and step"])
def test_a_compiled_step_prunes_and_holds(what):
    model = two_layers()
    optimizer = sgd(model)
    gp.Pruner(model, optimizer, gp.Linear(0.8, 0, 4))
    step = torch.compile(optimizer.step, backend="eager")
    if what == "model and step":

        @torch.compile(backend="eager")
        def step():
            optimizer.step()

    for _ in range(5):
        model.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        step()
    assert sum(zeros(model).values()) == round(0.8 * 128)
    torch._dynamo.reset()


@pytest.mark.parametrize("schedule", [gp.Cubic(0.5, begin=2, end=6), gp.OneShot(0.9, at=3), gp.Linear(0.75, 0, 3)])
def test_n_of_m_with_a_schedule_that_cannot_fit_is_refused_at_construction(schedule):
    model = two_layers()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"granularity 2:4 is itself a sparsity of 0\.5"):
        gp.Pruner(model, optimizer, schedule, granularity="2:4")
    assert not hooks_of(optimizer)
    gp.Pruner(model, optimizer, gp.OneShot(0.5, at=2), granularity="2:4")
    train(model, optimizer, 3)
    assert zeros(model) == {"0.weight": 32, "1.weight": 32}


# ------------------------------------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((0.9,), {}, r"give gp.OneShot\(0.9\)"),
        ((gp.OneShot(0.5), "magnitude"), {}, "give the function itself, gp.magnitude"),
        ((gp.magnitude, gp.OneShot(0.5)), {}, "score is a schedule: the order is"),
        ((gp.OneShot(0.5),), {"regrow": 3}, "regrow must be a gp.Regrow, got int"),
        ((gp.OneShot(0.5),), {"granular": "channel"}, "Pruner has no argument 'granular': did you mean granularity="),
        ((None,), {}, "schedule must be a function, got None"),
        ((lambda t: "half",), {}, "at step 0 the schedule's sparsity must be a number, got 'half'"),
        ((lambda t: True,), {}, "must be a number, got True"),
        ((lambda t: math.nan,), {}, r"must be in \[0, 1\], got nan"),
    ],
)
def test_a_wrong_call_says_what_is_wanted_and_leaves_no_hook(arguments, keywords, message):
    model = two_layers()
    optimizer = sgd(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        gp.Pruner(model, optimizer, *arguments, **keywords)
    assert not hooks_of(optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("wrong", [None, nn.Linear, {"w": torch.zeros(2)}, [nn.Linear(2, 2)]])
def test_a_model_that_is_none_is_named(wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        gp.Pruner(wrong, sgd(two_layers()), gp.OneShot(0.5))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"by": "gradient"}, "by must be a function, got 'gradient'; a score such as gp.gradient or gp.random$"),
        ({"by": gp.random, "every": 1.5}, "every must be a whole number"),
        ({"by": gp.random, "every": 0}, "every must be at least 1"),
        ({"by": gp.random, "fraction": 2}, r"fraction must be in \[0, 1\]"),
        ({"by": gp.random, "fraction": True}, "fraction must be a number"),
    ],
)
def test_regrow_checks_its_arguments(keywords, message):
    with pytest.raises((TypeError, ValueError), match=message):
        gp.Regrow(**keywords)


# -------------------------------------------------------------------------------- what optimizers remember of weights


class Shampoo(torch.optim.Optimizer):
    """State that has a square layer's shape and mixes its entries."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            for at, size in enumerate(p.shape):
                state.setdefault(f"precond_{at}", 1e-3 * torch.eye(size))
            state.setdefault("momentum_buffer", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
            step = p.grad
            for at in range(p.dim()):
                flat = step.movedim(at, 0).flatten(1) if p.dim() > 1 else step.unsqueeze(1)
                state[f"precond_{at}"] += flat @ flat.T
                step = (torch.linalg.pinv(state[f"precond_{at}"]) @ flat).view(step.movedim(at, 0).shape).movedim(0, at)
            p.sub_(self.param_groups[0]["lr"] * step)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 16), (8, 16)])
def test_holding_leaves_a_preconditioner_as_it_is(shape, bias):
    torch.manual_seed(0)
    model = nn.Linear(*shape, bias=bias)
    optimizer = Shampoo(model.parameters())
    gp.prune(model, sparsity=0.5).hold(optimizer)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(4, shape[0])).square().sum().backward()
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    again = optimizer.state_dict()["state"]
    for key in ("precond_0", "precond_1"):
        assert torch.equal(before[0][key], again[0][key])
        assert torch.equal(again[0][key], again[0][key].T)  # half zeroed it would not be symmetric
        assert (again[0][key].diagonal() != 0).all()
    assert not again[0]["momentum_buffer"][model.weight == 0].any()
    assert int((model.weight == 0).sum()) == math.prod(shape) // 2


# ------------------------------------------------------------------------------------------- what has come back alive


def test_weights_that_a_new_optimizer_revived_are_noticed_at_the_next_call():
    model = two_layers()
    first = sgd(model)
    masks = gp.prune(model, sparsity=0.5)
    masks.hold(first)
    train(model, second := sgd(model), 2)
    assert sum(zeros(model).values()) == 0
    with pytest.warns(UserWarning, match=r"held at zero are other than zero.*masks.hold\(optimizer\)"):
        again = gp.prune(model, sparsity=0.5, within=masks)
    again.hold([first, second])
    train(model, [first, second], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.prune(model, sparsity=0.5, within=again)


def test_a_pruner_notices_at_saving_that_weights_were_written_outside_its_steps():
    model = two_layers()
    optimizer = sgd(model)
    dense = copy.deepcopy(model.state_dict())
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5))
    model.load_state_dict(dense)
    with pytest.warns(UserWarning, match="something has written them outside a step"):
        pruner.state_dict()
    pruner.masks.apply_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.state_dict()


def test_a_fraction_of_regrowth_that_is_out_of_range_is_named_with_its_step():
    regrow = gp.Regrow(gp.random, fraction=lambda step: 2.0, every=10.0)
    assert type(regrow.every) is int
    assert regrow.share(5) == 0.0
    with pytest.raises(ValueError, match=r"fraction of regrow at step 10 must be in \[0, 1\], got 2.0"):
        regrow.share(10)


@pytest.mark.parametrize("others", [5, 6])
def test_the_warning_of_what_is_not_held_names_at_most_five(others):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(others + 1)])
    masks = gp.prune(model, sparsity=0.5)
    with pytest.warns(UserWarning, match="what is pruned there is not held") as caught:
        masks.hold(torch.optim.SGD(model[0].parameters(), lr=0.1))
    named = "'1.weight', '2.weight', '3.weight', '4.weight', '5.weight'" + (" and others" if others == 6 else "")
    assert str(caught[0].message).startswith(f"the optimizer does not have {named}: what is pruned there is not held")


def test_weights_that_stay_in_a_swap_were_there_before_whatever_their_score():
    model = two_layers()
    optimizer = sgd(model)
    regrow = gp.Regrow(gp.gradient, fraction=0.5, every=1)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.75), gp.random, regrow=regrow)
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    train(model, optimizer, 1)
    for name, mask in pruner.masks.items():
        kept = int(before[name].sum())
        assert int((mask & before[name]).sum()) == kept - int(0.5 * kept)
        assert int((mask & ~before[name]).sum()) == int(0.5 * kept)


def test_torchs_own_optimizers_forget_all_that_they_know_of_pruned_entries_of_square_layers_too():
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)
    train(model, optimizer, 2)
    masks = gp.prune(model, sparsity=0.5)
    masks.hold(optimizer)
    state = optimizer.state[model.weight]
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert not state[key][~masks["weight"]].any(), key
        assert state[key][masks["weight"]].all(), key


def test_within_of_anything_but_bool_masks_is_refused():
    model = two_layers()
    for within, message in [
        ([1], "`within` must be masks by name, as prune returns them, got list"),
        ({"1.weight": torch.ones(8, 8)}, "`within` must hold bool tensors; that of '1.weight' is Tensor"),
        ({"1.weight": True}, "that of '1.weight' is bool"),
    ]:
        with pytest.raises(TypeError, match=message):
            gp.Pruner(model, sgd(model), gp.OneShot(0.5), within=within)


def test_a_layer_that_is_gone_is_warned_of():
    model = two_layers()
    pruner = gp.Pruner(model, sgd(model), gp.OneShot(0.5))
    del model[1]
    with pytest.warns(UserWarning, match="'1.weight' is another parameter than the one that is pruned"):
        pruner.state_dict()


def test_where_the_second_of_two_optimizers_cannot_be_ridden_on_nothing_hangs_on_the_first(monkeypatch):
    model = two_layers()
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    before = hooks_of(first)

    def refuse(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(second, "register_step_post_hook", refuse)
    with pytest.raises(KeyboardInterrupt):
        gp.Pruner(model, [first, second], gp.OneShot(0.5))
    assert hooks_of(first) == before

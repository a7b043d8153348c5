"""Does a Pruner take whole coupled channels while a network trains, hold them at zero, and end in what shrink cuts?"""

import copy
import io
import sys
import warnings
from pathlib import Path

import pytest
import torch

import gradprune as gp
from gradprune.lab import models

pytest.importorskip("torch_pruning")
sys.path.append(str(Path(__file__).parents[1] / "deploy"))

from networks import IDS, IMAGES, Depthwise, Grouped, Residual, gpt2, size, trained

SIGNALS = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
NETWORKS = {
    "residual": (lambda: models.residual(8), SIGNALS),
    "Residual": (Residual, IMAGES),
    "Depthwise": (Depthwise, IMAGES),
    "Grouped": (Grouped, IMAGES),
    "gpt2": (gpt2, IDS),
}
OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
}
CUBIC = gp.Cubic(0.3, begin=1, end=7, every=2)


def built(network):
    build, x = NETWORKS[network]
    return trained(build), x


def outputs(model, x):
    found = model(x)
    return getattr(found, "logits", found)


def steps(model, optimizer, x, numbers):
    """Train, by data that depend on the number of the step alone, and yield after each step."""
    model.train()
    for number in numbers:
        torch.manual_seed(number)  # of dropout too
        data = torch.randint_like(x, 100) if not x.is_floating_point() else torch.randn_like(x)
        optimizer.zero_grad()
        (outputs(model, data) - 1).square().mean().backward()
        optimizer.step()
        yield number


def train(model, optimizer, x, numbers):
    for _ in steps(model, optimizer, x, numbers):
        pass


def alike(masks, others):
    """Whether they prune the same: a mask that is missing prunes nothing."""
    ones = {name: torch.ones_like(mask) for name, mask in [*masks.items(), *others.items()]}
    return all(torch.equal(masks.get(name, one), others.get(name, one)) for name, one in ones.items())


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_is_that_of_prune_within_what_is_left_and_hold_after_each_event(network, kind):
    model, x = built(network)
    other = copy.deepcopy(model)
    optimizer, another = OPTIMIZERS[kind](model), OPTIMIZERS[kind](other)
    pruner = gp.Pruner(model, optimizer, CUBIC, granularity="group", example=x)
    masks, wanted = gp.Masks({}), 0.0
    for step, _ in zip(steps(model, optimizer, x, range(9)), steps(other, another, x, range(9)), strict=True):
        if CUBIC(step + 1) != wanted:
            wanted = CUBIC(step + 1)
            masks = gp.prune(other, sparsity=wanted, granularity="group", example=x, within=masks)
            masks.hold(another)
        assert pruner.masks.holds(model)
        assert alike(pruner.masks, masks)
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer.state_dict()["state"], another.state_dict()["state"])
    assert {3} < {event.step for event in pruner.events} <= {3, 5, 7}
    assert 0.2 < masks.sparsity < 0.4


@pytest.mark.parametrize("network", NETWORKS)
def test_what_went_is_taken_out_and_the_outputs_stay(network):
    model, x = built(network)
    optimizer = OPTIMIZERS["AdamW"](model)
    pruner = gp.Pruner(model, optimizer, CUBIC, granularity="group", example=x)
    train(model, optimizer, x, range(9))
    model.eval()
    small = gp.shrink(model, x, pruner.masks)
    assert size(small) < 0.9 * size(model)
    with torch.no_grad():
        assert torch.allclose(outputs(small, x), outputs(model, x), atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_a_channel_that_went_is_exactly_zero_after_its_norm_whatever_the_running_statistics_are(training):
    model, x = built("Residual")
    optimizer = OPTIMIZERS["AdamW"](model)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.4, at=2), granularity="group", example=x)
    seen = {}
    for name in ("stem.1", "body.1", "body.4"):
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: out}))
    for _ in steps(model, optimizer, x, range(12)):
        if pruner.step < 2:
            continue
        model.train(training)
        model(torch.randn_like(x))
        for name, out in seen.items():
            gone = ~pruner.masks[f"{name}.weight"]
            assert bool((out[:, gone] == 0).all())
    assert sum(int((~pruner.masks[f"{name}.weight"]).sum()) for name in seen) > 3


def test_a_step_that_a_scaler_skips_is_none():
    model, x = built("Residual")
    optimizer, scaler = OPTIMIZERS["SGD"](model), torch.amp.GradScaler("cpu", init_scale=4.0)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.3, at=2), granularity="group", example=x)
    for number, factor in enumerate([1.0, torch.inf, 1.0]):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert pruner.step == [1, 1, 2][number]
        assert (pruner.masks.sparsity > 0) == (number == 2)
    assert pruner.masks.holds(model)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("network", ["residual", "Grouped", "gpt2"])
def test_a_resumed_run_is_the_same_bit_for_bit(network, kind):
    def start():
        model, x = built(network)
        optimizer = OPTIMIZERS[kind](model)
        return model, optimizer, gp.Pruner(model, optimizer, CUBIC, gp.random, granularity="group", example=x), x

    *whole, x = start()
    train(*whole[:2], x, range(4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in whole], file)
    train(*whole[:2], x, range(4, 9))
    file.seek(0)
    *resumed, x = start()
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed[:2], x, range(4, 9))
    assert same(whole[0].state_dict(), resumed[0].state_dict())
    assert same(whole[1].state_dict(), resumed[1].state_dict())
    assert whole[2].masks == resumed[2].masks
    assert whole[2].events == resumed[2].events


def test_a_deep_copy_goes_on_alike():
    model, x = built("Depthwise")
    optimizer = OPTIMIZERS["AdamW"](model)
    pruner = gp.Pruner(model, optimizer, CUBIC, granularity="group", example=x)
    train(model, optimizer, x, range(4))
    twins = copy.deepcopy((model, optimizer, pruner))
    train(model, optimizer, x, range(4, 9))
    train(*twins[:2], x, range(4, 9))
    assert same(model.state_dict(), twins[0].state_dict())
    assert twins[2].masks == pruner.masks
    assert twins[2].masks.holds(twins[0])


def test_events_say_what_went_with_the_filters_and_only_these_are_counted():
    model, x = built("Residual")
    optimizer = OPTIMIZERS["SGD"](model)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.3, at=1), granularity="group", example=x)
    train(model, optimizer, x, range(2))
    (event,) = pruner.events
    masks = pruner.masks
    assert event.removed == {name: int((~mask).sum()) for name, mask in masks.items()}
    assert event.removed["stem.1.bias"] == event.removed["stem.1.weight"] == event.removed["stem.0.bias"] > 0
    weights = [mask for mask in masks.values() if mask.dim() > 1]
    total, gone = sum(mask.numel() for mask in weights), sum(int((~mask).sum()) for mask in weights)
    assert masks.sparsity == pytest.approx(gone / total)
    assert abs(masks.sparsity - 0.3) < 0.1
    assert f"{total:,} weights" in repr(pruner)


def test_the_scope_is_shared_out_by_groups_and_a_threshold_is_a_schedule_too():
    model, x = built("residual")
    layers = copy.deepcopy(model)
    optimizer = OPTIMIZERS["SGD"](model)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.25), granularity="group", example=x, scope="layer")
    assert alike(pruner.masks, gp.prune(layers, sparsity=0.25, granularity="group", example=x, scope="layer"))
    model, x = built("residual")
    low = copy.deepcopy(model)
    optimizer = OPTIMIZERS["SGD"](model)
    pruner = gp.Pruner(model, optimizer, lambda t: 0.15, granularity="group", example=x, amount="threshold")
    assert alike(pruner.masks, gp.prune(low, threshold=0.15, granularity="group", example=x))
    assert 0 < pruner.masks.sparsity < 1


# ------------------------------------------------------------------------------------------------- what it starts from


def test_channels_that_are_held_stay_gone_with_what_goes_beside_them():
    model, x = built("Residual")
    optimizer = OPTIMIZERS["SGD"](model)
    masks = gp.prune(model, sparsity=0.2, granularity="group", example=x)
    masks.hold(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = gp.Pruner(model, optimizer, gp.OneShot(0.4, at=3), granularity="group", example=x)
    train(model, optimizer, x, range(2))
    assert alike(pruner.masks, masks)
    assert masks.holds(model)
    train(model, optimizer, x, range(2, 4))
    assert masks.holds(model)
    assert pruner.masks.sparsity > masks.sparsity


def test_channels_that_are_zero_stay_gone_although_a_fresh_norm_shifts_by_zeros_alone():
    torch.manual_seed(0)
    model, x = Residual(), IMAGES
    masks = gp.prune(model, sparsity=0.2, granularity="group", example=x)
    assert not model.stem[1].bias.any()
    optimizer = OPTIMIZERS["SGD"](model)
    with pytest.warns(UserWarning, match="weights of the model are zero already and are taken as pruned"):
        pruner = gp.Pruner(model, optimizer, gp.OneShot(0.4, at=5), granularity="group", example=x)
    train(model, optimizer, x, range(3))
    assert alike(pruner.masks, masks)
    assert masks.holds(model)
    assert bool(model.stem[1].bias[masks["stem.1.bias"]].all())


def test_within_takes_the_masks_of_channels_alone_and_an_empty_dict_lets_all_move():
    model, x = built("Residual")
    first = gp.prune(copy.deepcopy(model), sparsity=0.2, granularity="group", example=x)
    filters = {name: mask for name, mask in first.items() if mask.dim() > 1}
    optimizer = OPTIMIZERS["SGD"](model)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.4, at=5), granularity="group", example=x, within=filters)
    assert alike(pruner.masks, first)
    assert first.holds(model)
    pruner.remove()
    with torch.no_grad():
        model.body[0].weight.add_(1 - first["body.0.weight"].float())
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.4, at=5), granularity="group", example=x, within={})
    train(model, optimizer, x, range(2))
    assert pruner.masks.sparsity == 0
    assert bool(model.body[0].weight.all())


def test_frozen_biases_that_no_optimizer_has_are_set_to_zero_and_no_reason_to_refuse():
    model, x = built("Residual")
    frozen = [model.stem[0].bias, *model.stem[1].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    ours = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(ours, lr=0.05, momentum=0.9)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.4, at=1), granularity="group", example=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, x, range(3))
        assert pruner.masks.holds(model)
    gone = ~pruner.masks["stem.1.bias"]
    assert bool(gone.any())
    assert not bool(model.stem[1].bias[gone].any())
    assert bool(model.stem[1].bias[~gone].all())


def test_norms_that_the_optimizer_lacks_although_they_are_trained_are_refused():
    model, x = built("Residual")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.dim() > 1], lr=0.05)
    with pytest.raises(ValueError, match=r"the optimizer does not have \['stem.0.bias', 'stem.1.weight'"):
        gp.Pruner(model, optimizer, gp.OneShot(0.4), granularity="group", example=x)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"example": None}, "needs example="),
        ({"granularity": "weight"}, "example is for granularity='group'; got granularity='weight'"),
        ({"scope": "erk"}, "scope 'global', 'layer' or sparsities by name"),
        ({"scope": {"stem.0.weight": 0.5}}, "a schedule and a scope with sparsities by name exclude each other"),
        ({"min_keep": 2}, "takes no min_keep"),
        ({"regrow": gp.Regrow(gp.gradient)}, "regrow needs granularity 'weight', got 'group'"),
        ({"schedule": gp.OneShot(0.99, at=5)}, "a sparsity of 0.99, which does not fit: .*only .* of coupled channels"),
        ({"within": {"head.bias": torch.ones(4, dtype=torch.bool)}}, "`within` names 'head.bias', which is not among"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(how, said):
    model, x = built("Residual")
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["SGD"](model)
    call = {"schedule": gp.OneShot(0.4), "granularity": "group", "example": x} | how
    with pytest.raises(ValueError, match=said):
        gp.Pruner(model, optimizer, **call)
    assert same(model.state_dict(), before)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_state_of_single_weights_is_none_of_channels():
    model, x = built("Residual")
    optimizer = OPTIMIZERS["SGD"](model)
    single = gp.Pruner(model, optimizer, gp.OneShot(0.2))
    state = single.state_dict()
    single.remove()
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.2, at=4), granularity="group", example=x, within={})
    with pytest.raises(ValueError, match="the state has masks for"):
        pruner.load_state_dict(state)


# --------------------------------------------------------------------------------------------------- rounds and search


@pytest.mark.parametrize("rewind", [None, "weights"])
def test_iterate_prunes_channels_round_by_round(rewind, tmp_path):
    def retrain(model, work):
        optimizer = OPTIMIZERS["SGD"](model)
        work.hold(optimizer)
        train(model, optimizer, x, work.steps)
        assert work.masks.holds(model)

    def go(checkpoint):
        model = trained(Residual)
        how = {"steps": 3, "rewind": rewind, "granularity": "group", "example": x, "checkpoint": checkpoint}
        return model, gp.iterate(model, retrain, gp.Geometric(0.2, every=1, rounds=2), **how)

    x = IMAGES
    model, history = go(tmp_path / "file")
    first, second = (entry.sparsity for entry in history.entries[1:])
    assert first == pytest.approx(0.2, abs=0.05)
    assert second == pytest.approx(0.36, abs=0.05)
    assert history.masks.holds(model)
    assert "stem.1.bias" in history.masks
    assert size(gp.shrink(model.eval(), x, history.masks)) < 0.8 * size(model)
    again, resumed = go(tmp_path / "file")
    assert same(again.state_dict(), model.state_dict())
    assert resumed.masks == history.masks


def test_iterate_refuses_what_channels_cannot_do_before_it_trains():
    def never(model, work):
        raise AssertionError

    for how, said in [
        ({"example": None}, "needs example="),
        ({"granularity": "channel"}, "example is for granularity='group'"),
        ({"schedule": gp.OneShot(0.99)}, "only .* are of coupled channels that can go"),
    ]:
        call = {"schedule": gp.OneShot(0.3), "steps": 2, "granularity": "group", "example": IMAGES} | how
        with pytest.raises(ValueError, match=said):
            gp.iterate(trained(Residual), never, **call)


@pytest.mark.parametrize("network", ["Residual", "gpt2"])
def test_a_search_draws_nothing_from_the_example(network):
    pytest.importorskip("optuna")
    model, x = built(network)
    example = {"input_ids": x} if network == "gpt2" else (x,)
    space = {"sparsity": [0.1, 0.2], "granularity": "group", "example": example}
    study = gp.search(model, lambda m: float(sum((p == 0).sum() for p in m.parameters())), space, sampler="grid")
    assert study.best["sparsity"] == 0.2
    assert len(study) == 2

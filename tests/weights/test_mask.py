"""Pruned weights are exactly zero after every step, in anyone's training loop, and masks survive a trip to disk."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

import gradprune as gp
from gradprune.core.masked import count_alive, count_kept, zero_pruned_
from gradprune.weights.hold import _Held


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 5)
    ).to(dtype)


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 2, 6, 6, generator=generator).to(dtype), torch.randint(0, 5, (8,), generator=generator)


def train(model, optimizer, steps, data=None):
    x, y = data or batch(next(model.parameters()).dtype)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def revived(model, masks):
    parameters = dict(model.named_parameters())
    return {name: int((parameters[name][~mask] != 0).sum()) for name, mask in masks.items()}


def assert_zero(model, masks):
    assert set(revived(model, masks).values()) == {0}


class Own(torch.optim.SGD):
    """A user's own, of which nothing is known but what its state looks like."""


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD one by one": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "a user's own": lambda p: Own(p, 0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.5, max_iter=4, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_weights_stay_zero_whatever_the_optimizer_remembers(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    masks = gp.prune(model, sparsity=0.8)
    masks.hold(optimizer)
    for _ in range(4):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, 1)
        assert_zero(model, masks)
        assert any((p != before[n]).any() for n, p in model.named_parameters())


def assert_state_is_clear(model, optimizer, masks):
    for name, mask in masks.items():
        for value in optimizer.state[model.get_parameter(name)].values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                assert not value[~mask].any()
                assert value[mask].any()


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "LBFGS"])
def test_momentum_and_second_moments_of_pruned_entries_are_cleared(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    masks = gp.prune(model, sparsity=0.8)
    handle = masks.hold(optimizer)
    assert_state_is_clear(model, optimizer, masks)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    assert_state_is_clear(model, optimizer, masks)
    train(model, optimizer, 1)
    optimizer.load_state_dict(saved)
    assert_state_is_clear(model, optimizer, masks)
    train(model, optimizer, 1)
    handle.remove()
    assert_state_is_clear(model, optimizer, masks)


def test_nothing_revives_a_weight_after_the_hold_but_a_gradient():
    model = small_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    masks = gp.prune(model, sparsity=0.8)
    with masks.hold(optimizer):
        train(model, optimizer, 3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_zero(model, masks)


def test_without_a_hold_momentum_revives_what_was_pruned():
    model = small_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    train(model, optimizer, 3)
    masks = gp.prune(model, sparsity=0.8)
    train(model, optimizer, 1)
    assert sum(revived(model, masks).values()) > 0


def test_kept_weights_train_as_if_the_pruned_ones_did_not_exist():
    # The oracle: the same network with weight * mask in its forward pass, trained by plain SGD with momentum.
    torch.manual_seed(0)
    weight, x, y = torch.randn(5, 7), torch.randn(16, 7), torch.randn(16, 5)
    layer = nn.Linear(7, 5, bias=False)
    layer.weight.data.copy_(weight)
    masks = gp.prune(layer, sparsity=0.6)
    optimizer = torch.optim.SGD(layer.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    masks.hold(optimizer)
    mask = masks["weight"].float()
    free = nn.Parameter(weight * mask)
    other = torch.optim.SGD([free], 0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(10):
        for parameter, opt, forward in ((layer.weight, optimizer, layer), (free, other, lambda x: x @ (free * mask).T)):
            opt.zero_grad()
            (forward(x) - y).square().mean().backward()
            opt.step()
            assert parameter.isfinite().all()
    torch.testing.assert_close(layer.weight, free)


def test_a_loaded_optimizer_state_revives_nothing():
    model = small_model()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    train(model, optimizer, 3)
    dense = copy.deepcopy(optimizer.state_dict())
    masks = gp.prune(model, sparsity=0.8)
    masks.hold(optimizer)
    optimizer.load_state_dict(dense)
    assert not optimizer.state[model[4].weight]["exp_avg"][~masks["4.weight"]].any()
    train(model, optimizer, 2)
    assert_zero(model, masks)


@pytest.mark.parametrize("how", ["load_state_dict", "in place", "through .data", "new .data", "one entry"])
def test_weights_written_from_outside_are_zero_again_after_the_next_step(how):
    model = small_model()
    dense = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    masks = gp.prune(model, sparsity=0.8)
    masks.hold(optimizer)
    train(model, optimizer, 1)
    weight = model[4].weight
    if how == "load_state_dict":
        model.load_state_dict(dense)
    elif how == "in place":
        with torch.no_grad():
            weight.add_(1.0)
    elif how == "through .data":
        weight.data.fill_(1.0)
    elif how == "new .data":
        weight.data = torch.ones_like(weight)
    else:
        with torch.no_grad():
            weight[tuple((~masks["4.weight"]).nonzero()[3].tolist())] = 5.0
    assert sum(revived(model, masks).values()) > 0
    train(model, optimizer, 1)
    assert_zero(model, masks)


def test_an_epsilon_of_zero_leaves_zeros_not_nan():
    model = nn.Linear(30, 30)
    optimizer = torch.optim.Adam(model.parameters(), 0.01, eps=0.0)
    masks = gp.prune(model, sparsity=0.5)
    masks.hold(optimizer)
    model(torch.randn(4, 30)).sum().backward()
    optimizer.step()
    assert_zero(model, masks)


def test_an_optimizer_that_mixes_entries_is_held_too():
    class Shift(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(1.0)

    model = nn.Linear(200, 200)
    optimizer = Shift(model.parameters())
    masks = gp.prune(model, sparsity=0.5)
    masks.hold(optimizer)
    optimizer.step()
    assert_zero(model, masks)
    assert (model.weight[masks["weight"]] != 0).all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_held():
    model = nn.Linear(20, 30, bias=False)
    optimizer = torch.optim.Muon(model.parameters(), 0.1)
    masks = gp.prune(model, sparsity=0.5)
    masks.hold(optimizer)
    for _ in range(2):
        model(torch.randn(4, 20)).square().sum().backward()
        optimizer.step()
        assert_zero(model, masks)


def test_holding_touches_no_name_no_module_and_no_forward_pass():
    model = small_model()
    names = list(model.state_dict())
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    gp.prune(model, sparsity=0.8).hold(optimizer)
    train(model, optimizer, 1)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


def test_model_and_optimizer_can_be_copied_after_a_forward_pass():
    model = small_model()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    masks = gp.prune(model, sparsity=0.8)
    masks.hold(optimizer)
    train(model, optimizer, 2)
    twin, twin_optimizer, twin_masks = copy.deepcopy((model, optimizer, masks))
    assert_zero(twin, masks)
    with pytest.raises(ValueError, match=r"belong to no model yet: call masks\.apply_\(model\)"):
        twin_masks.hold(twin_optimizer)
    twin_masks.apply_(twin).hold(twin_optimizer)
    for _ in range(2):
        train(model, optimizer, 1)
        train(twin, twin_optimizer, 1)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert_zero(twin, masks)


def test_masks_and_optimizer_can_be_pickled_while_held():
    model = small_model()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    masks = gp.prune(model, sparsity=0.8)
    masks.hold(optimizer)
    again = pickle.loads(pickle.dumps(masks))
    assert all(torch.equal(again[name], masks[name]) for name in masks)
    torch.save(model, io.BytesIO())
    pickle.dumps(optimizer)


def test_gradients_may_accumulate_over_several_backward_passes():
    model, twin = small_model(), small_model()
    x, y = batch()
    for accumulate, m in ((3, model), (1, twin)):
        optimizer = torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
        masks = gp.prune(m, sparsity=0.8)
        masks.hold(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            for _ in range(accumulate):
                (nn.functional.cross_entropy(m(x), y) / accumulate).backward()
            optimizer.step()
            assert_zero(m, masks)
    torch.testing.assert_close(model[4].weight, twin[4].weight)


def test_an_optimizer_that_mixes_entries_sees_no_gradient_of_pruned_ones():
    class Normalized(torch.optim.SGD):
        """A step of length lr along the gradient: its norm runs over all entries."""

        @torch.no_grad()
        def step(self, closure=None):
            loss = closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad / p.grad.norm(), alpha=self.param_groups[0]["lr"])
            return loss

    layer = nn.Linear(6, 4, bias=False)
    optimizer = Normalized(layer.parameters(), 0.1)
    masks = gp.prune(layer, sparsity=0.5)
    masks.hold(optimizer)
    x = torch.randn(5, 6)
    for call in (lambda closure: optimizer.step(closure), lambda closure: optimizer.step(closure=closure)):
        before = layer.weight.detach().clone()

        def closure():
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            return 0.0

        with torch.enable_grad():
            closure()
        call(torch.enable_grad()(closure))
        assert (layer.weight - before).norm().item() == pytest.approx(0.1, rel=1e-4)
        assert_zero(layer, masks)


def test_a_step_that_amp_skips_changes_nothing_and_the_next_is_held():
    model = small_model()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    masks = gp.prune(model, sparsity=0.8)
    masks.hold(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    x, y = batch()
    model.eval()
    for overflow in (True, False):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if overflow:
            model[0].weight.grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        assert_zero(model, masks)
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same == overflow


def test_infinite_and_nan_gradients_of_pruned_entries_are_zero():
    model = nn.Linear(6, 6, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    masks = gp.prune(model, sparsity=0.5)
    masks.hold(optimizer)
    model.weight.grad = torch.where(masks["weight"], 1.0, math.nan)
    model.weight.grad.view(-1)[int((~masks["weight"]).view(-1).nonzero()[0])] = math.inf
    optimizer.step()
    assert model.weight.isfinite().all()
    assert_zero(model, masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_held(dtype):
    model = nn.Linear(12, 12, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    masks = gp.prune(model, sparsity=0.5)
    masks.hold(optimizer)
    for _ in range(2):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        assert_zero(model, masks)


def test_channels_last_and_transposed_weights_are_held():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6, 6)).to(memory_format=torch.channels_last)
    model[2].weight = nn.Parameter(torch.randn(6, 6).T)
    masks = gp.prune(model, sparsity=0.5)
    assert_zero(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    masks.hold(optimizer)
    for _ in range(2):
        model(torch.randn(2, 4, 3, 3)).sum().backward()
        optimizer.step()
        assert_zero(model, masks)


def test_frozen_and_unused_parameters_are_left_alone():
    model = small_model()
    masks = gp.prune(model, sparsity=0.8)
    model[4].weight.requires_grad_(False)
    optimizer = OPTIMIZERS["AdamW"](p for p in model.parameters() if p.requires_grad)
    masks.hold(optimizer)
    frozen = model[4].weight.clone()
    train(model, optimizer, 2)
    assert torch.equal(model[4].weight, frozen)
    assert_zero(model, masks)


def test_a_tied_tensor_is_masked_once_under_any_of_its_names():
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    model["b"].weight = model["a"].weight
    masks = gp.prune(model, sparsity=0.5)
    assert list(masks) == ["a.weight"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    gp.Masks({"b.weight": masks["a.weight"]}).apply_(model).hold(optimizer)
    for _ in range(3):
        model["b"](model["a"](torch.randn(4, 8))).square().sum().backward()
        optimizer.step()
        assert int((model["a"].weight == 0).sum()) == 32


def test_two_optimizers_each_hold_what_they_own():
    model = small_model()
    first = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
    second = torch.optim.Adam(model[4].parameters(), 0.1)
    masks = gp.prune(model, sparsity=0.8)
    masks.hold(first)
    masks.hold(second)
    x, y = batch()
    for _ in range(2):
        nn.functional.cross_entropy(model(x), y).backward()
        first.step()
        second.step()
        assert_zero(model, masks)


def test_sparse_gradients_are_held():
    table = nn.Embedding(50, 4, sparse=True)
    masks = gp.Masks({"weight": torch.rand(50, 4) < 0.5}).apply_(table)
    optimizer = torch.optim.SGD(table.parameters(), 0.1)
    masks.hold(optimizer)
    table(torch.arange(30)).sum().backward()
    optimizer.step()
    assert_zero(table, masks)


def test_removing_the_hold_lets_weights_move_again():
    model = small_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    masks = gp.prune(model, sparsity=0.8)
    with masks.hold(optimizer) as handle:
        train(model, optimizer, 1)
        assert_zero(model, masks)
    handle.remove()
    train(model, optimizer, 1)
    assert sum(revived(model, masks).values()) > 0
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert not optimizer._optimizer_state_dict_pre_hooks


def test_a_later_hold_replaces_an_earlier_one():
    model = small_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    for sparsity in (0.9, 0.8, 0.7, 0.6, 0.5, 0.95):
        masks = gp.prune(small_model(), sparsity=sparsity).apply_(model)
        masks.hold(optimizer)
        train(model, optimizer, 2)
        assert_zero(model, masks)
        if sparsity == 0.5:  # what came back has moved: the mask of 0.9 is held no longer
            assert all((model.get_parameter(name)[mask] != 0).any() for name, mask in masks.items())
            assert sum(int((model.get_parameter(name) != 0).sum()) for name in masks) > 0.45 * 2904
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert len(optimizer._optimizer_step_post_hooks) == 1


def test_a_hold_keeps_neither_model_nor_optimizer_alive():
    model = small_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    masks = gp.prune(model, sparsity=0.8)
    handle = masks.hold(optimizer)
    watched = [weakref.ref(optimizer), weakref.ref(model)]
    del model, optimizer, handle
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_a_compiled_model_is_held():
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    masks = gp.prune(model, sparsity=0.7)
    masks.hold(optimizer)
    compiled = torch.compile(model, backend="aot_eager")  # inductor would need a compiler; hooks meet neither
    for _ in range(3):
        optimizer.zero_grad()
        compiled(torch.randn(4, 10)).sum().backward()
        optimizer.step()
        assert_zero(model, masks)


def test_the_optimizer_may_have_the_names_but_not_the_parameters():
    model, other = small_model(), small_model()
    masks = gp.prune(model, sparsity=0.5)
    with pytest.raises(
        ValueError, match=r"owns none of the 3 masked parameters \('0.weight', '4.weight', '6.weight'\)"
    ):
        masks.hold(torch.optim.SGD(other.parameters(), 0.1))
    masks.hold(torch.optim.SGD(other.parameters(), 0.1), other)
    assert_zero(other, masks)


# ---------------------------------------------------------------------------------------------------- as a mapping


def test_masks_are_a_mapping_with_a_sparsity():
    masks = gp.Masks({"a": torch.tensor([[True, False, False, False]]), "b": torch.tensor([[True], [True]])})
    assert list(masks) == ["a", "b"]
    assert len(masks) == 2
    assert masks.sparsity == pytest.approx(0.5)
    assert gp.Masks({}).sparsity == 0.0
    assert gp.Masks({**masks, "bias": torch.tensor([False, True])}).sparsity == pytest.approx(0.5)
    assert gp.Masks({"bias": torch.tensor([False, True, True, True])}).sparsity == pytest.approx(0.25)
    assert repr(masks).splitlines()[0] == "Masks(2 tensors, 6 weights, sparsity 0.5000)"
    with pytest.raises(ValueError, match=r"mask of 'a' must be a bool tensor, got torch\.float32"):
        gp.Masks({"a": torch.ones(3)})


def test_applying_writes_plus_zero_whatever_stood_there():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[math.inf, math.nan, -3.0, -2.0]])
    gp.Masks({"weight": torch.tensor([[False, False, False, True]])}).apply_(model)
    assert model.weight.detach().view(torch.int32).tolist()[0][:3] == [0, 0, 0]
    assert model.weight[0, 3] == -2.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nope": torch.ones(3, dtype=torch.bool)}, "no parameter 'nope'; it has '0.weight'"),
        (
            {"4.weight": torch.ones(3, dtype=torch.bool)},
            r"'4.weight' has shape \(3,\), the parameter has shape \(40, 64\)",
        ),
    ],
)
def test_masks_for_another_model_are_refused_before_any_weight_changes(wrong, message):
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    masks = gp.Masks({"0.weight": torch.zeros(4, 2, 3, 3, dtype=torch.bool), **wrong})
    for attempt in (
        lambda: masks.apply_(model),
        lambda: masks.hold(torch.optim.SGD(model.parameters(), 0.1), model),
        lambda: masks.to_torch_(model),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


shapes = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3), min_size=0, max_size=3)


@settings(max_examples=40, deadline=None)
@given(shapes=shapes, seed=st.integers(0, 1000))
def test_state_dict_and_file_bring_the_same_masks_back_at_a_bit_a_weight(shapes, seed, tmp_path_factory):
    generator = torch.Generator().manual_seed(seed)
    masks = gp.Masks({f"layer.{i}": torch.rand(s, generator=generator) < 0.5 for i, s in enumerate(shapes)})
    state = masks.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    masks.save(path)
    for again in (gp.Masks.from_state_dict(torch.load(buffer, weights_only=True)), gp.Masks.load(path)):
        assert list(again) == list(masks)
        assert all(torch.equal(again[name], masks[name]) for name in masks)
    assert all(entry["bits"].numel() == -(-math.prod(entry["shape"]) // 8) for entry in state.values())


def test_a_save_that_fails_leaves_the_file_that_was_there_and_no_other(tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "masks.safetensors"
    first = gp.Masks({"fc": torch.tensor([True, False])})
    first.save(path)

    def half_written(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half_written)
    with pytest.raises(OSError, match="no space left"):
        gp.Masks({"fc": torch.tensor([True, True])}).save(path)
    assert torch.equal(gp.Masks.load(path)["fc"], first["fc"])
    assert list(tmp_path.iterdir()) == [path]


def test_files_and_states_that_hold_no_masks_are_errors(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"without masks saved by Masks\.save"):
        gp.Masks.load(tmp_path / "weights.safetensors")
    state = gp.Masks({"fc": torch.ones(20, dtype=torch.bool)}).state_dict()
    state["fc"]["shape"] = (5, 5)
    with pytest.raises(ValueError, match=r"mask of 'fc' needs 4 bytes for shape \(5, 5\), got 3"):
        gp.Masks.from_state_dict(state)


def test_masks_come_from_and_go_to_torch_nn_utils_prune():
    theirs, ours = small_model(), small_model()
    targets = [(theirs[0], "weight"), (theirs[4], "weight"), (theirs[6], "weight")]
    torch_prune.global_unstructured(targets, torch_prune.L1Unstructured, amount=0.7)
    masks = gp.Masks.from_torch(theirs)
    expected = gp.prune(ours, sparsity=0.7)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)

    optimizer = OPTIMIZERS["SGD"](theirs.parameters())
    train(theirs, optimizer, 2)
    taken = gp.Masks.from_torch_(theirs)
    assert sorted(theirs.state_dict()) == sorted(ours.state_dict())
    taken.hold(optimizer)
    train(theirs, optimizer, 2)
    assert_zero(theirs, masks)

    masks.to_torch_(ours)
    assert torch_prune.is_pruned(ours)
    assert torch.equal(ours[4].weight_mask.bool(), masks["4.weight"])
    with pytest.raises(ValueError, match=r"pruned by torch\.nn\.utils\.prune"):
        gp.Masks.from_torch(small_model())


def test_masked_gradients_leave_the_norm_to_what_can_move():
    model = small_model()
    masks = gp.prune(model, sparsity=0.8)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert masks.mask_gradients_(model) is masks
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name].where(masks[name], 0.0) if name in masks else before[name])
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]) < nn.utils.get_total_norm(before.values())


def test_gradients_that_cannot_be_masked_are_refused_and_missing_ones_passed_over():
    model = small_model()
    masks = gp.prune(model, sparsity=0.8)
    masks.mask_gradients_(model)
    last = list(masks)[-1]
    for name in masks:
        model.get_parameter(name).grad = torch.ones_like(model.get_parameter(name))
    model.get_parameter(last).grad = torch.ones_like(model.get_parameter(last)).to_sparse()
    with pytest.raises(ValueError, match=f"gradient of '{last}' is sparse"):
        masks.mask_gradients_(model)
    assert bool((model.get_parameter(next(iter(masks))).grad == 1).all())


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(), (0,), (1,), (0, 3), (7, 5), (3, 4, 5), (2, 3, 2, 2)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_zeroing_agrees_with_masked_fill(shape, dtype, transposed, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).div(torch.randint(0, 2, shape, generator=generator)).to(dtype)
    mask = torch.rand(shape, generator=generator) < 0.5
    if transposed and len(shape) > 1:
        values, mask = values.transpose(0, -1), mask.transpose(0, -1)
    expected = values.masked_fill(~mask, 0.0)
    zero_pruned_([(values, mask)])
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert count_kept(mask) == int(mask.sum())


def test_zeroing_between_forward_and_backward_is_noticed_by_autograd():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    output = model(torch.randn(2, 4)).sum()
    gp.prune(model, sparsity=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_no_warning_comes_up_in_ordinary_use():
    model = small_model()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.prune(model, sparsity=0.8).hold(optimizer)
        model(batch()[0]).sum().backward()
        optimizer.step()


# ------------------------------------------------------------------------------------------------------ as an object


def test_masks_are_equal_where_names_and_tensors_are():
    mask = torch.tensor([[True, False], [False, True]])
    masks = gp.Masks({"a": mask, "b": ~mask})
    assert masks == gp.Masks({"b": ~mask, "a": mask.clone()})
    assert masks == {"a": mask, "b": ~mask}
    assert gp.Masks({}) == gp.Masks({})
    for other in (
        gp.Masks({"a": mask}),
        gp.Masks({"a": mask, "c": ~mask}),
        gp.Masks({"a": mask, "b": mask}),
        gp.Masks({"a": mask, "b": ~mask[:1]}),
        {"a": mask, "b": ~mask.float().bool() * 1.0},
        masks.state_dict(),
        3,
        None,
    ):
        assert masks != other
    with pytest.raises(TypeError, match="unhashable"):
        hash(masks)


def test_a_copy_keeps_its_model_and_a_deep_copy_or_a_pickle_has_none():
    model = small_model()
    masks = gp.prune(model, sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twin = copy.copy(masks)
    assert twin == masks
    assert all(twin[name] is masks[name] for name in masks)
    with twin.hold(optimizer):
        pass
    for other in (copy.deepcopy(masks), pickle.loads(pickle.dumps(masks))):
        assert other == masks
        with pytest.raises(ValueError, match="belong to no model yet"):
            other.hold(optimizer)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        (None, TypeError, "masks must be a mapping from parameter names to bool tensors, got NoneType"),
        ([torch.ones(2, dtype=torch.bool)], TypeError, "got list"),
        (torch.ones(2, dtype=torch.bool), TypeError, "got Tensor"),
        (nn.Linear(2, 2), TypeError, r"got Linear; gp\.prune\(model, \.\.\.\) makes the masks"),
        ({"a": None}, TypeError, "mask of 'a' must be a bool tensor, got NoneType"),
        ({"a": [True, False]}, TypeError, "mask of 'a' must be a bool tensor, got list"),
        ({0: torch.ones(2, dtype=torch.bool)}, TypeError, "names of masks must be text, got 0"),
        ({"a": torch.ones(2, dtype=torch.uint8)}, ValueError, r"must be a bool tensor, got torch\.uint8"),
        (nn.Linear(2, 2).state_dict(), ValueError, r"mask of 'weight' must be a bool tensor, got torch\.float32"),
        (gp.Masks({"a": torch.ones(2, dtype=torch.bool)}).state_dict(), TypeError, r"by Masks\.from_state_dict"),
        ({"a": torch.ones(2, dtype=torch.bool, device="meta")}, TypeError, "mask of 'a' is on the meta device"),
        ({"a": torch.ones(2, dtype=torch.bool).to_sparse()}, TypeError, "mask of 'a' is sparse"),
    ],
)
def test_masks_of_something_else_are_refused(wrong, error, says):
    with pytest.raises(error, match=says):
        gp.Masks(wrong)


# ------------------------------------------------------------------------------------------- written from outside


def averaged(model, masks, optimizer):
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(small_model())  # begun while the model was dense
    average.update_parameters(model)
    return average


def best_loaded(model, masks, optimizer):
    model.load_state_dict(small_model().state_dict())
    return model


def slow_weights(model, masks, optimizer):
    with torch.no_grad():  # the sync of a Lookahead
        for fast, slow in zip(model.parameters(), small_model().parameters(), strict=True):
            fast.lerp_(slow, 0.5)
    return model


@pytest.mark.parametrize("write", [averaged, best_loaded, slow_weights])
def test_weights_written_outside_a_step_are_told_and_mended(write):
    model = small_model()
    masks = gp.prune(model, sparsity=0.8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.hold(optimizer)
    assert masks.holds(model)
    written = write(model, masks, optimizer)
    assert not masks.holds(written)
    masks.apply_(written)
    assert masks.holds(written)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(), (0, 3), (1,), (7, 5), (3, 4, 5), (2, 3, 2, 2), (300, 1000), (1, 400000), (400000, 1)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]),
    transposed=st.booleans(),
    value=st.sampled_from([1.0, -1e-7, math.nan, math.inf, -0.0]),
    seed=st.integers(0, 1000),
)
def test_one_weight_that_is_not_zero_is_found_wherever_it_is(shape, dtype, transposed, value, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.5
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(shape, dtype=dtype))})
    if transposed and len(shape) > 1:
        mask = mask.transpose(0, -1)
        model["w"] = nn.Parameter(model["w"].detach().transpose(0, -1))
    masks = gp.Masks({"w": mask}).apply_(model)
    assert masks.holds(model)
    pruned = (~mask).nonzero()
    if len(pruned):
        at = tuple(pruned[int(torch.randint(len(pruned), (), generator=generator))].tolist())
        model["w"].data[at] = value
        assert masks.holds(model) == (float(torch.tensor(value, dtype=dtype).real) == 0.0)
        assert count_alive([(model["w"], mask)]) == int((model["w"][~mask] != 0).sum())


def test_asking_changes_nothing_and_takes_what_can_only_be_read():
    with torch.inference_mode():
        model = nn.Linear(8, 8)
    masks = gp.Masks({"weight": torch.rand(8, 8) < 0.5})
    before = copy.deepcopy(model.state_dict())
    assert not masks.holds(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="'weight' was made in inference mode"):
        masks.apply_(model)


# -------------------------------------------------------------------------------- all is checked before the first write


def inference_parameter():
    with torch.inference_mode():
        return nn.Parameter(torch.ones(4, 4))


UNWRITABLE = {
    "expanded": (lambda: nn.Parameter(torch.ones(1, 4).expand(4, 4)), ValueError, "share memory"),
    "inference": (inference_parameter, ValueError, "inference mode"),
    "sparse": (lambda: nn.Parameter(torch.eye(4).to_sparse()), TypeError, "is sparse"),
    "meta": (lambda: nn.Parameter(torch.ones(4, 4, device="meta")), TypeError, "meta device"),
    "lazy": (nn.UninitializedParameter, TypeError, "is lazy"),
    "float8": (
        lambda: nn.Parameter(torch.ones(4, 4).to(torch.float8_e5m2), requires_grad=False),
        TypeError,
        "float8_e5m2",
    ),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_parameter_that_cannot_be_written_is_named_before_another_is(kind):
    make, error, says = UNWRITABLE[kind]
    model = nn.ParameterDict({"first": nn.Parameter(torch.ones(4, 4)), "last": make()})
    masks = gp.Masks({name: torch.zeros(4, 4, dtype=torch.bool) for name in ("first", "last")})
    optimizer = torch.optim.SGD([model["first"]], 0.1)
    for call in (lambda: masks.apply_(model), lambda: masks.hold(optimizer, model), lambda: masks.to_torch_(model)):
        with pytest.raises(error, match=f"'last'.*{says}"):
            call()
    assert bool((model["first"] == 1).all())
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: torch.ones(1, 4).expand(4, 4), ValueError, "share memory"),
        (lambda: torch.complex(torch.ones(4, 4), torch.ones(4, 4)).conj().imag, ValueError, "negative bit"),
        (lambda: torch.eye(4).to_sparse(), ValueError, "is sparse"),
    ],
    ids=["expanded", "negative", "sparse"],
)
def test_a_gradient_that_cannot_be_written_is_named_before_another_is(make, error, says):
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(4, 4)) for name in ("first", "last")})
    model["first"].grad, model["last"].grad = torch.ones(4, 4), make()
    masks = gp.Masks({name: torch.zeros(4, 4, dtype=torch.bool) for name in ("first", "last")})
    with pytest.raises(error, match=f"the gradient of 'last'.*{says}|gradient of 'last' {says}"):
        masks.mask_gradients_(model)
    assert bool((model["first"].grad == 1).all())


@pytest.mark.parametrize("call", ["apply_", "holds", "mask_gradients_", "to_torch_"])
@pytest.mark.parametrize("wrong", [None, [], nn.Linear, nn.Linear(2, 2).state_dict()], ids=str)
def test_what_is_no_model_is_refused_by_every_method(call, wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        getattr(gp.Masks({"w": torch.ones(2, dtype=torch.bool)}), call)(wrong)


@pytest.mark.parametrize("wrong", [None, [], 0.1, nn.Linear(2, 2), torch.optim.SGD], ids=str)
def test_what_is_no_optimizer_cannot_be_held_with(wrong):
    model = nn.Linear(4, 4)
    with pytest.raises((TypeError, ValueError), match=r"must be a torch optimizer.*got|list of optimizers is"):
        gp.prune(model, sparsity=0.5).hold(wrong)


@pytest.mark.parametrize("how", ["expanded", "transposed", "made in inference mode"])
def test_masks_of_any_layout_are_applied(how):
    if how == "made in inference mode":
        with torch.inference_mode():
            mask = torch.rand(4, 4) < 0.5
    else:
        mask = (torch.rand(1, 4) < 0.5).expand(4, 4) if how == "expanded" else (torch.rand(4, 4) < 0.5).T
    model = nn.Linear(4, 4)
    expected = model.weight.detach().masked_fill(~mask, 0.0)
    masks = gp.Masks({"weight": mask}).apply_(model)
    assert torch.equal(model.weight, expected)
    assert masks.sparsity == 1 - int(mask.sum()) / 16
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    masks.hold(optimizer)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    assert masks.mask_gradients_(model).holds(model)


def test_a_parameter_that_can_no_longer_be_written_is_named_when_it_is_to_be_held():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    masks = gp.prune(model, sparsity=0.5)
    model[1].weight.data = torch.ones(1).expand(4, 4)
    with pytest.raises(ValueError, match=r"entries of the parameter '1.weight' share memory"):
        masks.hold(torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_held_mask_and_its_bytes_follow_a_parameter_to_another_device():
    held = _Held(torch.tensor([True, False]))
    assert held.kept_on(torch.device("cpu")).tolist() == [1, 0]
    held.mask.logical_not_()
    assert held.kept_on(torch.device("cpu")).tolist() == [0, 1]
    there = torch.device("meta")
    assert held.kept_on(there).device == held.mask.device == held.kept.device == there
    assert held.kept_on(there).dtype == torch.int8

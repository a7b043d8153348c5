"""Masks come from torch.nn.utils.prune and go there whole, whatever a model shares."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import gradprune as gp


def shared_module():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


def state_of(model):
    return copy.deepcopy(model.state_dict()), [dict(m._forward_pre_hooks) for m in model.modules()]


def assert_untouched(model, state):
    values, hooks = state
    assert model.state_dict().keys() == values.keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_a_module_that_is_used_twice_gives_its_masks_once_and_is_made_plain():
    model, x = shared_module(), torch.randn(3, 8)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.random_unstructured(model[0], "bias", 0.25)
    expected, mask = model(x), model[0].weight_mask.bool()
    assert list(gp.Masks.from_torch(model)) == ["0.weight", "0.bias"]
    masks = gp.Masks.from_torch_(model)
    assert list(masks) == ["0.weight", "0.bias"]
    assert torch.equal(masks["0.weight"], mask)
    assert {name for name, _ in model.named_parameters()} == {"0.bias", "0.weight"}
    assert not model[0]._forward_pre_hooks
    assert torch.equal(model(x), expected)
    masks.hold(torch.optim.SGD(model.parameters(), 0.1))


def test_tied_parameters_that_torch_prunes_alike_are_one():
    model = tied()
    parameter = model[0].weight
    mask = torch.rand(8, 8) < 0.5
    for layer in (model[0], model[2]):
        torch_prune.custom_from_mask(layer, "weight", mask)
    masks = gp.Masks.from_torch_(model)
    assert list(masks) == ["0.weight"]
    assert model[0].weight is model[2].weight is parameter
    assert masks.holds(model)


def test_tied_parameters_that_torch_prunes_in_two_ways_are_refused():
    model = tied()
    mask = torch.rand(8, 8) < 0.5
    torch_prune.custom_from_mask(model[0], "weight", mask)
    torch_prune.custom_from_mask(model[2], "weight", ~mask)
    before = state_of(model)
    for call in (gp.Masks.from_torch, gp.Masks.from_torch_):
        with pytest.raises(ValueError, match=r"'0.weight' and '2.weight' are one parameter.*masks that differ"):
            call(model)
    assert_untouched(model, before)


def test_a_tied_parameter_is_pruned_by_torch_wherever_it_stands():
    model, twin, x = tied(), tied(), torch.randn(3, 8)
    masks = gp.prune(twin, sparsity=0.5)
    masks.to_torch_(model)
    assert torch.equal(model(x), twin(x))
    assert torch_prune.is_pruned(model[2])
    assert gp.Masks.from_torch_(model) == masks
    assert model[0].weight is model[2].weight


def test_the_way_to_torch_and_back_leaves_the_model_as_pruning_leaves_it():
    model, twin = shared_module(), shared_module()
    masks = gp.prune(twin, sparsity=0.7)
    masks.to_torch_(model)
    assert gp.Masks.from_torch(model) == masks
    assert gp.Masks.from_torch_(model) == masks
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_wrapped_model_goes_to_torch_under_its_own_names():
    masks = gp.prune(shared_module(), sparsity=0.7)
    model = nn.DataParallel(shared_module())
    masks.to_torch_(model)
    assert torch.equal(model.module[0].weight_mask.bool(), masks["0.weight"])
    assert list(gp.Masks.from_torch(model)) == ["module.0.weight"]


@pytest.mark.parametrize("spoil", ["no hook", "inference", "expanded", "another shape"])
def test_what_cannot_be_made_plain_is_refused_before_anything_is(spoil):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in model:
        torch_prune.l1_unstructured(layer, "weight", 0.5)
    last = model[1]
    if spoil == "no hook":
        last._forward_pre_hooks.clear()
    elif spoil == "inference":
        with torch.inference_mode():
            last.weight_orig = nn.Parameter(torch.ones(8, 8))
    elif spoil == "expanded":
        last.weight_orig = nn.Parameter(torch.ones(1, 8).expand(8, 8))
    else:
        last.weight_mask = torch.ones(4, 4)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"'1\.weight'"):
        gp.Masks.from_torch_(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("call", [gp.Masks.from_torch, gp.Masks.from_torch_])
@pytest.mark.parametrize("wrong", [None, [1], nn.Linear, nn.Linear(2, 2).state_dict()])
def test_what_is_no_model_is_said_to_be_none(call, wrong):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got"):
        call(wrong)


def test_what_torch_prunes_is_warned_of_and_its_name_explained_afterwards():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(UserWarning, match=r"prune prunes '0\.weight_orig' too.*from_torch_\(model\)"):
        masks = gp.prune(model, sparsity=0.5)
    assert list(masks) == ["0.weight_orig", "1.weight"]
    own = gp.Masks.from_torch_(model)
    with pytest.raises(
        ValueError, match=r"no parameter '0\.weight_orig'.*'0\.weight' is what torch.nn.utils.prune calls"
    ):
        masks.apply_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = gp.prune(model, sparsity=0.5, within={**own, "1.weight": torch.ones(8, 8) > 0})
    assert list(both) == ["0.weight", "1.weight"]


def test_a_mask_of_the_model_s_own_is_none_of_torchs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_buffer("pad_mask", torch.ones(4))
    torch_prune.l1_unstructured(model[1], "weight", 0.5)
    assert list(gp.Masks.from_torch(model)) == ["1.weight"]

"""A mask's name means the model's parameter of that name, or the one that a wrapper renamed; never another."""

import copy
import os
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import gradprune as gp
from gradprune.weights.named import parameters_of


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def group():
    import torch.distributed as dist

    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def part_compiled(model):
    model[2] = torch.compile(model[2], backend="eager")
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "a part compiled": part_compiled,
    "DDP": nn.parallel.DistributedDataParallel,
    "DDP of compiled": lambda m: nn.parallel.DistributedDataParallel(torch.compile(m, backend="eager")),
    "compiled DDP": lambda m: torch.compile(nn.parallel.DistributedDataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masks_of_the_plain_model_work_on_the_wrapped_one(wrapper, group):
    masks = gp.prune(plain(), sparsity=0.5)
    wrapped = WRAPPERS[wrapper](plain())
    assert not masks.holds(wrapped)
    assert masks.apply_(wrapped).holds(wrapped)
    zeros = sum(int((p == 0).sum()) for p in wrapped.parameters() if p.dim() == 2)
    assert zeros == sum(int((~mask).sum()) for mask in masks.values())

    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1, momentum=0.9)
    for hold in (lambda: masks.hold(optimizer), lambda: masks.hold(optimizer, wrapped)):
        with hold():
            wrapped(torch.randn(4, 6)).square().sum().backward()
            masks.mask_gradients_(wrapped)
            assert all(bool((p.grad[p == 0] == 0).all()) for p in wrapped.parameters() if p.dim() == 2)
            optimizer.step()
            assert masks.holds(wrapped)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_masks_of_the_wrapped_model_work_on_the_plain_one(wrapper, group):
    of_wrapped = gp.prune(WRAPPERS[wrapper](plain()), sparsity=0.5)
    of_plain = gp.prune(plain(), sparsity=0.5)
    assert list(of_wrapped) != list(of_plain)
    from_state = gp.Masks.from_state_dict(of_wrapped.state_dict())
    for masks in (of_wrapped, from_state):
        model = plain()
        assert masks.apply_(model).holds(model)
        assert of_plain.holds(model)
        assert all(torch.equal(a, b) for a, b in zip(masks.values(), of_plain.values(), strict=True))
        with masks.hold(torch.optim.SGD(model.parameters(), 0.1)):
            pass


def test_an_exact_name_comes_first():
    model = nn.ModuleDict({"module": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    model.weight = nn.Parameter(torch.ones(4, 4))
    masks = {name: torch.zeros(4, 4, dtype=torch.bool) for name in ("module.weight", "weight")}
    found = parameters_of(model, masks)
    assert found["module.weight"] is model["module"].weight
    assert found["weight"] is model.weight


def test_a_name_that_may_mean_two_parameters_is_refused():
    model = nn.ModuleDict({"module": nn.Linear(4, 4)})
    model.weight = nn.Parameter(torch.ones(4, 4))
    before = copy.deepcopy(model.state_dict())
    masks = gp.Masks({"_orig_mod.weight": torch.zeros(4, 4, dtype=torch.bool)})
    for call in (masks.apply_, masks.holds, masks.mask_gradients_, masks.to_torch_):
        with pytest.raises(ValueError, match=r"'_orig_mod\.weight'; it may be any of 'weight', 'module\.weight'"):
            call(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["model", "submodule", "net"])
def test_prefixes_that_no_wrapper_adds_are_no_match(name):
    masks = gp.prune(plain(), sparsity=0.5)
    with pytest.raises(ValueError, match=rf"the model has no parameter '0\.weight'; it has '{name}\.0\.weight'"):
        masks.apply_(nn.Sequential(OrderedDict({name: plain()})))


def test_two_masks_for_one_tied_parameter_must_agree():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    mask = torch.rand(4, 4) < 0.5
    mask[0, 0] = True
    agree = gp.Masks({"a.weight": mask, "b.weight": mask.clone()})
    assert agree.apply_(model).holds(model)
    before = model["a"].weight.detach().clone()
    differ = gp.Masks({"a.weight": mask, "b.weight": ~mask})
    for call in (differ.apply_, differ.holds, differ.to_torch_):
        with pytest.raises(ValueError, match=r"'a.weight' and 'b.weight' are one parameter .* masks differ"):
            call(model)
    assert torch.equal(model["a"].weight, before)


def test_masks_under_the_plain_and_the_wrapped_name_must_agree_too():
    mask = torch.ones(4, 4, dtype=torch.bool)
    masks = gp.Masks({"weight": mask, "module.weight": ~mask})
    with pytest.raises(ValueError, match="are one parameter of this model, and their masks differ"):
        masks.apply_(nn.Linear(4, 4))


def test_a_model_pruned_by_torch_is_told_to_be_taken_over():
    from torch.nn.utils import prune as torch_prune

    masks, model = gp.prune(plain(), sparsity=0.5), plain()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"no parameter '0.weight'.*take its masks over by Masks.from_torch_\(model\)"):
        masks.apply_(model)


def test_a_model_s_parameters_are_told_where_none_is_meant():
    mask = {"w": torch.ones(2, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"the model has no parameter 'w'; it has none$"):
        parameters_of(nn.Identity(), mask)
    with pytest.raises(ValueError, match=r"it has 'weight', 'bias'$"):
        parameters_of(nn.Linear(2, 2), mask)
    with pytest.raises(ValueError, match=r"it has '0.weight', '0.bias', '1.weight', '1.bias', '2.weight' and 1 more$"):
        parameters_of(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), mask)

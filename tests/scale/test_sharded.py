"""gp.prune on DTensors: the masks of one process, over several."""

import itertools
import warnings

import group
import pytest
import torch
from torch import nn

import gradprune as gp

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VALUES = ("normal", "ties", "zeros", "equal", "extremes")
LAYOUTS = ("fsdp", "rows", "columns", "copies", "mixed")


def made(values, shape):
    if values == "ties":
        return torch.randint(-2, 3, shape) / 2
    if values == "zeros":
        return torch.randn(shape) * (torch.rand(shape) < 0.3) * -1.0
    if values == "equal":
        return torch.full(shape, -1.5)
    if values == "extremes":
        return torch.tensor([0.0, -0.0, 1e-45, torch.inf, -torch.inf, 65504.0])[torch.randint(0, 6, shape)]
    return torch.randn(shape)


def chain(seed, sizes, dtype=torch.float32, values="normal"):
    """Linear layers, equal on all ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)))
    for p in model.parameters():
        p.data = made(values, p.shape).to(dtype)
    return model


def sharded(model, how, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if how == "fsdp":
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    mixed = [Shard(1), Replicate(), Shard(0), None]
    for i, layer in enumerate(model):
        place = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate(), "mixed": mixed[i % 4]}[how]
        if place is not None:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [place]))
    return model


def whole(tensor):
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def in_quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def check_as_one_process(mesh, how, case, **asked):
    alone, spread = chain(*case), sharded(chain(*case), how, mesh)
    wanted, found = in_quiet(gp.prune, alone, **asked), in_quiet(gp.prune, spread, **asked)
    assert list(found) == list(wanted), (how, case, asked)
    for name, mask in found.items():
        parameter = spread.get_parameter(name)
        assert type(mask) is type(parameter.data)
        assert torch.equal(whole(mask), wanted[name]), (how, case, asked, name)
        assert torch.equal(bits(whole(parameter)), bits(alone.get_parameter(name))), (how, case, asked, name)
        if mask.shape != whole(mask).shape:
            assert mask.placements == parameter.placements
    assert found.sparsity == wanted.sparsity
    assert found.holds(spread)


def mesh_of(ranks):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (ranks,))


def as_one_process(rank, ranks):
    mesh = mesh_of(ranks)
    for seed, (how, values) in enumerate(itertools.product(LAYOUTS, VALUES)):
        dtype, other = DTYPES[seed % 4], DTYPES[(seed + 1 + seed // 4) % 4]
        check_as_one_process(mesh, how, (seed, (5, 7, 8, 3), dtype, values), sparsity=0.6)
        check_as_one_process(mesh, how, (seed, (7, 5, 1, 2, 16), other, values), sparsity=0.37, scope="layer")
    for sparsity in (0.0, 1.0, 0.97):
        check_as_one_process(mesh, "fsdp", (1, (5, 7, 4), torch.float32, "ties"), sparsity=sparsity)
    check_as_one_process(mesh, "rows", (1, (9, 7, 4)), sparsity=0.5, scope={"0.weight": 0.2}, exclude="1.*")
    check_as_one_process(mesh, "columns", (1, (9, 7, 4)), sparsity=0.9, min_keep=4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_masks_over_several_ranks_are_those_of_one_process(ranks):
    group.run(as_one_process, ranks)

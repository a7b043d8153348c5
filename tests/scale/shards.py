"""Chains of linear layers, equal on all ranks, and how they are spread over them."""

import itertools
import warnings

import torch
from torch import nn

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


def mesh_of(ranks):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (ranks,))


def local(tensor):
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor

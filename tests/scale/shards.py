"""Chains of linear layers, equal on all ranks, and how they are spread over them."""

import itertools
import warnings

import torch
from torch import nn

HYBRID = ("hsdp", "tp")
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

    if how == "hsdp":  # copies over the first dimension of the mesh, shards over the second
        for layer in model:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if how == "tp":  # tensor parallel over the second, sharded over the first; every third layer is sharded alone
        for i, layer in enumerate(model):
            if i % 3 < 2:
                cut = distribute_tensor(layer.weight.detach(), mesh["second"], [Shard(1 - i % 3)])
                layer.weight = nn.Parameter(cut)
            if i % 4 < 3:  # every fourth is not sharded further
                fully_shard(layer, mesh=mesh["first"])
        return model
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


def cases_for(cases, ranks):
    """All of the cases on three ranks and more; every third on two, where less can be uneven."""
    return list(cases)[:: 3 if ranks == 2 else 1]


def part(whole, beside):
    """What this rank has of a whole tensor that is spread as another is, without a word to the others."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not hasattr(beside, "to_local"):
        return whole
    shape, offset = compute_local_shape_and_global_offset(whole.shape, beside.device_mesh, beside.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


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


def hybrid_mesh(ranks):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("first", "second"))


def blocks_of(wholes, how, mesh):
    """What this rank would hold of whole tensors that are spread as a chain's weights are."""
    wholes = list(wholes)
    model = nn.Sequential(*(nn.Linear(*reversed(w.shape), bias=False) for w in wholes))
    for layer, w in zip(model, wholes, strict=True):
        layer.weight.data = w.detach().double()
    return [local(p) for p in sharded(model, how, mesh).parameters()]


def local(tensor):
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor

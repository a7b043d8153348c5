"""What does one process hold of a tensor that is spread over several, and how do all of them raise together?

A DTensor is cut into blocks, one a rank, or is whole on each. Blocks that several ranks hold are counted by the lowest
of them, their owner. Whatever can go wrong on one rank alone is told to the others before it is raised: a rank that
left would let them wait for ever.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core.agree import Group, agree, meet, require_same
from gradprune.core.checks import is_distributed

T = TypeVar("T")


class Subject(NamedTuple):
    """What an error calls the tensors that it is about, and what it says can be done."""

    called: str
    way_out: str
    equal_copies: str


PARAMETER = Subject(
    "the parameter",
    "prune the model before it is sharded, or shard it over one mesh dimension, by Shard or Replicate",
    "exclude it, or broadcast it first if it is to be the same",
)
GRADIENT = Subject(
    "the gradient of",
    "shard the model over one mesh dimension, by Shard or Replicate",
    "leave its parameter out, or all-reduce it first if it is to be the same",
)


class Shard(NamedTuple):
    """The block of a tensor that this rank holds."""

    local: Tensor  # the tensor's own memory
    shape: tuple[int, ...]  # of the whole
    offset: tuple[int, ...]
    owned: bool  # whether this rank counts it
    shared: bool  # whether all ranks hold it

    @property
    def numel(self) -> int:
        """Entries of the whole."""
        return math.prod(self.shape)

    def positions(self, flat: Tensor) -> Tensor:
        """Return where entries of the block, numbered row by row, stand in the whole, numbered so too."""
        found, stride = torch.zeros_like(flat), 1
        for size, own, start in zip(
            reversed(self.shape), reversed(self.local.shape), reversed(self.offset), strict=True
        ):
            found += (flat % own + start) * stride
            flat, stride = flat // own, stride * size
        return found


class Ranks(NamedTuple):
    """Processes, all of them or those of a group, and the device through which they talk."""

    device: torch.device
    group: Group = None

    def sum(self, numbers: Tensor) -> Tensor:
        """Return the sum over all ranks, on the CPU."""
        total = numbers.to(self.device, copy=True)
        torch.distributed.all_reduce(total, group=self.group)
        return total.cpu()

    def most(self, numbers: Tensor) -> Tensor:
        """Return the largest over all ranks, on the CPU; none of the numbers is NaN."""
        largest = numbers.to(self.device, copy=True)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return largest.cpu()

    def let_first_decide_(self, masks: Sequence[Tensor]) -> None:
        """Make the masks of all ranks those of the first."""
        flat = torch.cat([mask.reshape(-1).cpu() for mask in masks]).numpy()
        bits = self.first(torch.from_numpy(np.packbits(flat)))
        decided = torch.from_numpy(np.unpackbits(bits.numpy(), count=flat.size).view(np.bool_))
        for mask, one in zip(masks, decided.split([mask.numel() for mask in masks]), strict=True):
            mask.copy_(one.view(mask.shape))

    def add(self, number: int) -> int:
        """Return the sum of one number over all ranks."""
        return int(self.sum(torch.tensor([number], dtype=torch.int64, device="cpu")))

    def first(self, values: Tensor) -> Tensor:
        """Return what the first rank has, on the CPU."""
        sent = values.to(self.device, copy=True)
        source = 0 if self.group is None else torch.distributed.get_global_rank(self.group, 0)
        torch.distributed.broadcast(sent, src=source, group=self.group)
        return sent.cpu()


class Block(NamedTuple):
    """What one rank tells the others of its part of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    placement: str
    local: tuple[int, ...]
    offset: tuple[int, ...]
    sums: tuple[float, float] = (0.0, 0.0)  # of a plain tensor: of its values, and of their magnitudes


def is_sharded(model: Any) -> bool:
    """Whether a parameter of the model is a DTensor, or is one between steps; False at once where none can be."""
    loaded = sys.modules.get("torch.distributed.tensor")
    if not hasattr(loaded, "DTensor") or not isinstance(model, nn.Module):
        return False
    plain = all(type(p) is nn.Parameter or not is_distributed(p) for p in model.parameters())
    return not plain or any(True for _ in _fsdp_modules(model))


def reshard_(model: nn.Module) -> None:
    """Let FSDP2 give up gathered parameters, as the root's are after a forward pass: what is written there is lost."""
    for module in _fsdp_modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the tensor's own memory; the tensor itself where that is all."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter or not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def like(whole: Tensor, block: Tensor) -> Tensor:
    """Return a block as part of a DTensor that lies as `whole` does."""
    if not is_distributed(whole):
        return block
    mesh, placements = whole.device_mesh, whole.placements  # type: ignore[attr-defined]
    return type(whole).from_local(  # type: ignore[attr-defined, no-any-return]
        block, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def ranks_of(tensors: Iterable[Tensor], subject: Subject = PARAMETER) -> Ranks:
    """Return all processes, or raise TypeError, on each of a mesh, where the mesh leaves some out."""
    meshes = [t.device_mesh for t in tensors if is_distributed(t)]  # type: ignore[attr-defined]
    largest = max(meshes, key=lambda mesh: int(mesh.size()))
    world = torch.distributed.get_world_size()
    if largest.size() != world:
        raise TypeError(
            f"the model is sharded over {largest.size()} of {world} ranks, which is not supported: {subject.way_out}"
        )
    kind = largest.device_type
    return Ranks(torch.device(kind, getattr(torch, kind).current_device()) if kind != "cpu" else torch.device("cpu"))


def together(
    work: Callable[[], tuple[T, Mapping[str, object], Mapping[str, Tensor]]],
    subject: Subject = PARAMETER,
    called: str = "",
) -> tuple[T, dict[str, Shard]]:
    """Do what each rank does by itself; return its result, and the blocks of its tensors.

    `work` returns a result, what was asked for (compared as text) and the tensors by name. Where it raises on one rank,
    or ranks ask for different things, all ranks raise the same.
    """

    def each() -> tuple[tuple[T, Mapping[str, Tensor]], Mapping[str, object], dict[str, Block]]:
        result, asked, tensors = work()
        return (result, tensors), asked, {name: _block(name, tensor, subject) for name, tensor in tensors.items()}

    if called:
        meet(called)
    (result, tensors), told = agree(called, each)
    alike = [{name: block[:3] for name, block in blocks.items()} for blocks in told]
    require_same(alike, subject.called + " {!r}")
    for name, tensor in tensors.items():
        eps = 0.0 if tensor.dtype == torch.bool else torch.finfo(tensor.dtype).eps
        _require_copies(name, eps, [blocks[name] for blocks in told], subject)
    rank = torch.distributed.get_rank()
    held = {
        name: _held(name, tensor, [blocks[name] for blocks in told], rank, subject) for name, tensor in tensors.items()
    }
    return result, held


def _fsdp_modules(model: nn.Module) -> Iterable[Any]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return (module for module in model.modules() if isinstance(module, kind)) if kind is not None else ()


def _block(name: str, tensor: Tensor, subject: Subject) -> Block:
    """What this rank holds, or TypeError where that is not one block of it."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype)
    if not is_distributed(tensor):
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        values = tensor.detach().double() if tensor.dtype == torch.bool else tensor.detach()
        sums = complex(values.sum(dtype=wide)), float(values.abs().sum(dtype=torch.float64))
        return Block(shape, dtype, "whole", shape, (0,) * len(shape), (sums[0].real + sums[0].imag, sums[1]))
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Sharded
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    layout = f"{subject.called} {name!r} is a DTensor {', '.join(map(str, placements))}"
    if mesh.ndim != 1 or mesh.size() != torch.distributed.get_world_size():
        sizes = " x ".join(map(str, mesh.mesh.shape))
        raise TypeError(f"{layout} on a mesh of {sizes}, which is not supported: {subject.way_out}")
    if type(placements[0]) not in (Sharded, Replicate):
        raise TypeError(f"{layout}, which is not supported: {subject.way_out}")
    found, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
    held = local(tensor)
    if tuple(held.shape) != tuple(found):
        raise TypeError(
            f"{layout}, but its block has shape {tuple(held.shape)}, wanted {tuple(found)}: {subject.way_out}"
        )
    return Block(shape, dtype, str(placements[0]), tuple(found), tuple(offset))


def _require_copies(name: str, eps: float, blocks: Sequence[Block], subject: Subject) -> None:
    """Raise ValueError where a plain tensor is another one on each rank, not a copy but for rounding."""
    sums, sizes = zip(*(block.sums for block in blocks), strict=True)
    tolerance = (1e-5 + eps / max(1, math.prod(blocks[0].shape)) ** 0.5) * max(sizes)
    for rank, other in enumerate(sums):
        if abs(other - sums[0]) > tolerance:
            raise ValueError(
                f"{subject.called} {name!r} is no DTensor, and its values on rank {rank} are not those on rank 0: "
                f"{subject.equal_copies}"
            )


def _held(name: str, tensor: Tensor, blocks: Sequence[Block], rank: int, subject: Subject) -> Shard:
    """The block of a tensor here, once the blocks of all ranks were found to make up the whole."""
    places = [(block.offset, block.local) for block in blocks]
    different = set(places)
    covered = sum(math.prod(shape) for _, shape in different)
    shared = len(different) == 1 and len(blocks) > 1
    whole = math.prod(blocks[rank].shape)
    single = all(places.count(place) == 1 for place in different if math.prod(place[1]))
    if covered != whole or not (shared or single):
        raise TypeError(
            f"the blocks of {name!r} do not make up the whole, each once or on all ranks: {subject.way_out}"
        )
    mine = blocks[rank]
    return Shard(local(tensor), mine.shape, mine.offset, places.index(places[rank]) == rank, shared)

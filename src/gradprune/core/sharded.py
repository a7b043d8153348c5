"""What does one process hold of a tensor that is spread over several, and how do all of them raise together?

A DTensor is cut into blocks, one a rank, or is whole on each. Blocks that several ranks hold are counted by the lowest
of them, their owner. Whatever can go wrong on one rank alone is told to the others before it is raised: a rank that
left would let them wait for ever.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core.agree import agree, equal_on_all, meet, require_same
from gradprune.core.checks import is_distributed

T = TypeVar("T")
Place = tuple[tuple[int, ...], tuple[int, ...]]  # of a block: its offset, and its shape


class Subject(NamedTuple):
    """What an error calls the tensors that it is about, and what it says can be done."""

    called: str
    way_out: str
    equal_copies: str


PARAMETER = Subject(
    "the parameter",
    "prune the model before it is sharded, or shard it by FSDP2, or by Shard and Replicate",
    "exclude it, or broadcast it first if it is to be the same",
)
GRADIENT = Subject(
    "the gradient of",
    "shard the model by FSDP2, or by Shard and Replicate",
    "leave its parameter out, or all-reduce it first if it is to be the same",
)


class Shard(NamedTuple):
    """The block of a tensor that this rank holds."""

    local: Tensor  # the tensor's own memory
    shape: tuple[int, ...]  # of the whole
    offset: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]  # of each block that is not empty the ranks that hold it
    owned: bool  # whether this rank counts it

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
    return not plain or any(True for _ in fsdp_modules(model))


def reshard_(model: nn.Module) -> None:
    """Let FSDP2 give up gathered parameters, as the root's are after a forward pass: what is written there is lost."""
    for module in fsdp_modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the tensor's own memory; the tensor itself where that is all."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter or not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def layout(tensor: Tensor) -> str:
    """Return in words how a tensor is spread, the same for those that lie alike."""
    if not is_distributed(tensor):
        return "whole"
    return _layout(tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=256)
def _layout(mesh: Any, placements: tuple[Any, ...]) -> str:
    """As that is asked of every tensor, and torch makes the ranks of a mesh anew whenever they are asked for."""
    return f"{', '.join(map(str, placements))} over ranks {mesh.mesh.tolist()}"


def like(whole: Tensor, block: Tensor) -> Tensor:
    """Return a block as part of a DTensor that lies as `whole` does."""
    if not is_distributed(whole):
        return block
    mesh, placements = whole.device_mesh, whole.placements  # type: ignore[attr-defined]
    return type(whole).from_local(  # type: ignore[attr-defined, no-any-return]
        block, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def together(
    work: Callable[[], tuple[T, Mapping[str, object], Mapping[str, Tensor]]],
    subject: Subject = PARAMETER,
    called: str = "",
) -> tuple[T, dict[str, Shard]]:
    """Do what each rank does by itself; return its result, and the blocks of its tensors.

    `work` returns a result, what was asked for (compared as text) and the tensors by name. Where it raises on one rank,
    or ranks ask for different things, all ranks raise the same.
    """

    def each() -> tuple[tuple[T, Mapping[str, Tensor], dict[str, Block]], Mapping[str, object], Any]:
        result, asked, tensors = work()
        blocks = {name: _block(name, tensor, subject) for name, tensor in tensors.items()}
        unknown = {name: block for name, block in blocks.items() if not _spans_all(tensors[name])}
        layout = hashlib.blake2b(repr([(name, block[:3]) for name, block in blocks.items()]).encode(), digest_size=16)
        return (result, tensors, blocks), asked, (layout.hexdigest(), unknown)

    if called:
        meet(called)
    (result, tensors, blocks), told = agree(called, each)
    if not equal_on_all([layout for layout, _ in told]):
        every: list[Any] = [None] * len(told)
        torch.distributed.all_gather_object(every, {name: block[:3] for name, block in blocks.items()})
        require_same(every, subject.called + " {!r}", range(len(every)))
    held = {}
    for name, tensor in tensors.items():
        if name in told[0][1]:
            theirs = [unknown[name] for _, unknown in told]
            _require_copies(name, tensor, theirs, subject)
            holders = _holders([(block.offset, block.local) for block in theirs])
        else:
            holders = _holders_by_mesh(blocks[name].shape, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
        held[name] = _held(name, tensor, blocks[name], holders, subject)
    return result, held


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names, shapes and every bit of the values; of masks eight entries a byte."""
    made = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors.items():
        made.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1).cpu()
        bits = np.packbits(flat.numpy()) if tensor.dtype == torch.bool else flat.view(torch.uint8).numpy()
        made.update(bits.data)
    return made.hexdigest()


def fsdp_modules(model: nn.Module) -> Iterable[Any]:
    """Return the modules that ``fully_shard`` was called with."""
    kind = _fsdp_kind()
    return (module for module in model.modules() if isinstance(module, kind)) if kind is not None else ()


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called with this module."""
    kind = _fsdp_kind()
    return kind is not None and isinstance(module, kind)


def _fsdp_kind() -> Any:
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def _block(name: str, tensor: Tensor, subject: Subject) -> Block:
    """What this rank holds, or TypeError where that is not one block of it."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype)
    if not is_distributed(tensor):
        return Block(shape, dtype, "whole", shape, (0,) * len(shape), _sums(tensor))
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    layout = f"{subject.called} {name!r} is a DTensor {', '.join(map(str, placements))}"
    found = None if coordinate is None else ranges(shape, mesh.shape, placements, coordinate)
    if found is None:
        sizes = " x ".join(map(str, mesh.shape))
        raise TypeError(f"{layout} on a mesh of {sizes}, which is not supported: {subject.way_out}")
    held, block = local(tensor), tuple(size for _, size in found)
    if tuple(held.shape) != block:
        raise TypeError(f"{layout}, but its block has shape {tuple(held.shape)}, wanted {block}: {subject.way_out}")
    sums = (0.0, 0.0) if _spans_all(tensor) else _sums(held)  # nothing says that another mesh has equal copies
    called = f"{', '.join(map(str, placements))} on {' x '.join(map(str, mesh.shape))}"
    return Block(shape, dtype, called, block, tuple(start for start, _ in found), sums)


def _spans_all(tensor: Tensor) -> bool:
    """Whether one mesh has all ranks, so that its coordinates say what each of them holds."""
    return is_distributed(tensor) and tensor.device_mesh.size() == torch.distributed.get_world_size()  # type: ignore[attr-defined]


def ranges(
    shape: Sequence[int], mesh: Sequence[int], placements: Sequence[Any], coordinate: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Return from where to how far a rank's block goes, by axis, in a mesh of some sizes; None if that is not known.

    An axis is cut once for each dimension of the mesh that shards it, from the left; but FSDP2 cuts what tensor
    parallelism, further to the right, has cut already, and calls that a strided shard.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import Shard as Sharded

    cuts: dict[int, list[int]] = {}
    for at, placement in reversed(list(enumerate(placements))):
        strided = getattr(placement, "split_factor", None)
        if type(placement) is Replicate:
            continue
        if type(placement) is not Sharded and strided is None:
            return None
        before = cuts.setdefault(placement.dim, [])
        if strided is not None and strided != math.prod(mesh[other] for other in before):
            return None
        before.insert(len(before) if strided is not None else 0, at)
    found = []
    for axis, size in enumerate(shape):
        start = 0
        for at in cuts.get(axis, ()):
            piece = -(-size // mesh[at])
            skipped = min(size, piece * coordinate[at])
            start, size = start + skipped, min(piece, size - skipped)
        found.append((start, size))
    return found


def _sums(tensor: Tensor) -> tuple[float, float]:
    """The sum of the values, and of their magnitudes."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    values = tensor.detach().double() if tensor.dtype == torch.bool else tensor.detach()
    total = complex(values.sum(dtype=wide))
    return total.real + total.imag, float(values.abs().sum(dtype=torch.float64))


def _require_copies(name: str, tensor: Tensor, blocks: Sequence[Block], subject: Subject) -> None:
    """Raise ValueError where the blocks that nothing keeps equal are not copies of each other but for rounding."""
    eps = 0.0 if tensor.dtype == torch.bool else torch.finfo(tensor.dtype).eps
    first: dict[Place, int] = {}
    for rank, block in enumerate(blocks):
        at = first.setdefault((block.offset, block.local), rank)
        (one, size), (other, size_here) = blocks[at].sums, block.sums
        tolerance = (1e-5 + eps / max(1, math.prod(block.local)) ** 0.5) * max(size, size_here)
        if abs(other - one) > tolerance:
            what = "is spread over several meshes" if is_distributed(tensor) else "is no DTensor"
            raise ValueError(
                f"{subject.called} {name!r} {what}, and its values on rank {rank} are not those on rank {at}: "
                f"{subject.equal_copies}"
            )


@functools.lru_cache(maxsize=256)
def _holders_by_mesh(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> dict[Place, tuple[int, ...]]:
    """Which ranks hold each block that is not empty, by the mesh that has them all."""
    places: list[Place] = [((), ())] * mesh.size()
    for coordinate in itertools.product(*map(range, mesh.shape)):
        found = ranges(shape, mesh.shape, placements, coordinate) or []
        places[int(mesh.mesh[coordinate])] = tuple(start for start, _ in found), tuple(size for _, size in found)
    return _holders(places)


def _holders(places: Sequence[Place]) -> dict[Place, tuple[int, ...]]:
    found: dict[Place, list[int]] = {}
    for rank, place in enumerate(places):
        if math.prod(place[1]):
            found.setdefault(place, []).append(rank)
    return {place: tuple(ranks) for place, ranks in found.items()}


def _held(name: str, tensor: Tensor, mine: Block, holders: Mapping[Place, tuple[int, ...]], subject: Subject) -> Shard:
    """The block of a tensor here, once the blocks of all ranks were found to make up the whole."""
    if not _is_grid(list(holders), mine.shape):
        raise TypeError(f"the blocks of {name!r} do not make up the whole, each once or in copies: {subject.way_out}")
    rank = torch.distributed.get_rank()
    owned = holders.get((mine.offset, mine.local), (rank,))[0] == rank
    return Shard(local(tensor), mine.shape, mine.offset, tuple(holders.values()), owned)


def _is_grid(places: Sequence[Place], shape: Sequence[int]) -> bool:
    """Whether different blocks, at their offsets, are all cells of a grid that covers the whole."""
    cells = 1
    for axis, size in enumerate(shape):
        end, ranges = 0, sorted({(offset[axis], sizes[axis]) for offset, sizes in places})
        for start, length in ranges:
            if start != end:
                return False
            end += length
        if end != size and places:
            return False
        cells *= len(ranges)
    return len(places) == cells if places else not math.prod(shape)

"""How is a checkpoint with zeros stored without them, and read again bit for bit (chapter 8)?

A packed file is a safetensors file too. A tensor ``w`` in it that was worth it is two: ``w:bits``, one bit an entry
(the first entry is the highest bit of the first byte, as ``numpy.packbits`` has it), and ``w:values``, the entries
whose bit is 1, in their own dtype and order. A bit is 0 where all bits of the entry are: so -0.0 and NaN are values,
and nothing is lost. Tensors that would not become smaller stand as they are. The metadata is kept, and under
``gradprune.pack`` stands in JSON the version of this format and the header of the file from before, from which that is
made again, byte for byte.

With a code (`coded`), version 2, the tensor ``w`` is ``w:coded``; what is told of it stands in the metadata too, where
the header from before is deflated. Such a tensor is coded and decoded as a whole.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core import checks, files
from gradprune.core.checks import require, require_values
from gradprune.core.encoded import bits_and_values, readable
from gradprune.core.progress import bar
from gradprune.core.threads import behind, mapped, threads_of_torch
from gradprune.deploy import coded
from gradprune.deploy import header as headers
from gradprune.deploy.checkpoint import (
    Checkpoint,
    Memory,
    Part,
    Tensors,
    marked,
    opened,
    pieces,
    spans,
    stored_once,
    unmarked,
)
from gradprune.deploy.header import DTYPES, Entry, Header
from gradprune.deploy.written import Output, target_of, whole
from gradprune.weights.named import some

Array = np.ndarray[Any, np.dtype[Any]]
Seen = Callable[[int], None]

Code = Literal["bits", "book", "entropy"]
CODES = ("bits", "book", "entropy")

KEY, VERSIONS = "gradprune.pack", (1, 2)
BITS, VALUES = ":bits", ":values"
CODED, WORTH = ":coded", 64  # bytes that a code saves at least, since it has to be told of
STEP = 2**18  # entries at a time, a multiple of eight


class Packed(NamedTuple):
    """What ``pack`` wrote; printed, a line.

    Args:
        path: The file, or the folder of a checkpoint in shards.
        bytes_before: Of the checkpoint as it was, or would be.
        bytes_after: Of what was written.
        tensors: How many tensors there are.
        packed: How many of them are packed, as that is smaller.
    """

    path: Path
    bytes_before: int
    bytes_after: int
    tensors: int
    packed: int

    def __str__(self) -> str:
        share = self.bytes_after / max(self.bytes_before, 1)
        return (
            f"{str(self.path)!r}: {readable(self.bytes_after)} instead of {readable(self.bytes_before)} ({share:.1%}); "
            f"{self.packed:,} of {self.tensors:,} tensors are packed"
        )


class _Plan(NamedTuple):
    """A part, and the header that its packed file gets."""

    part: Part
    packed: frozenset[str]
    header: Header
    code: Code


class _Before(NamedTuple):
    """The header of the file from before, and how its tensors are coded."""

    header: Header
    code: dict[str, coded.Told]


def pack(model_or_file: nn.Module | files.StrPath, path: files.StrPath, *, code: Code = "bits") -> Packed:
    """Write a checkpoint without its zeros: one bit an entry, and the entries that are not zero.

    That is smaller from 3.2 % of zeros on in float32 and 6.3 % in bfloat16; other tensors stay as they are.
    What is packed is read piece by piece, so a file may be larger than memory; it is read twice and written once,
    under another name that takes the place of `path` at the end.

    Args:
        model_or_file: A model, whose state dict is packed; or a safetensors file, a folder of shards with its index, or
            a file of ``torch.save(model.state_dict(), ...)``.
        path: The file; for a folder a new folder.
        code: "bits", or in fewer bytes: "book" stores where values are by gaps where that is shorter, and of values
            that are few, as ``share_weights`` leaves them, a list and each one's number in it, in as many bits as
            that takes; "entropy" stores the same by Huffman's code. With these a tensor at a time is in memory.

    Returns:
        A ``Packed``: bytes before and after, and how many tensors are packed.

    Raises:
        TypeError: `model_or_file` is neither a model nor a path, or a tensor of the model has no values (``save`` a
            quantized one, and pack that file).
        FileNotFoundError: There is no such file.
        ValueError: It is no checkpoint, or cut off, or packed already; `path` cannot be written.
        OSError: There is no room on the disk. What stood at `path` is as it was.

    Example:
        >>> model = nn.Linear(512, 512)
        >>> masks = gp.prune(model, sparsity=0.9)
        >>> packed = gp.pack(model, "packed.safetensors")
        >>> packed.bytes_after < 0.15 * packed.bytes_before
        True

    Han et al. (2016), for the codes; chapter 8.
    """
    checks.choice("code", code, CODES)
    with _source(model_or_file) as checkpoint:
        for part in checkpoint.parts:
            require(KEY not in part.header.metadata, f"{part.name!r} is packed already")
        target = target_of(checkpoint, path, "path")
        with bar(2 * checkpoint.size, "packing", unit="B") as progress:
            plans = [_planned(part, code, progress.update) for part in checkpoint.parts]
            size = sum(plan.header.size for plan in plans)
            with whole(checkpoint, target, size, marked) as place:
                for plan in plans:
                    _pack_part(plan, place(plan.part.name), progress.update)
        return Packed(target, checkpoint.size, size, len(checkpoint.tensors), sum(len(plan.packed) for plan in plans))


@overload
def unpack(path: files.StrPath, into: None = None) -> dict[str, Tensor]: ...
@overload
def unpack(path: files.StrPath, into: nn.Module) -> nn.Module: ...
@overload
def unpack(path: files.StrPath, into: files.StrPath) -> Path: ...


def unpack(path: files.StrPath, into: nn.Module | files.StrPath | None = None) -> dict[str, Tensor] | nn.Module | Path:
    """Return what ``pack`` packed, bit for bit: as tensors, in a model, or as the file that it was.

    Args:
        path: What ``pack`` wrote.
        into: None for a dict of tensors; a model, whose state is set; or a path, where the checkpoint of before is
            written, byte for byte and piece by piece, a folder where it was one.

    Returns:
        The tensors by name, on the CPU (of those that were one, each name has it); the model; or the path.

    Raises:
        TypeError: An argument is of another kind.
        FileNotFoundError: There is no such file.
        ValueError: The file was not packed, or is damaged; the model has other names or shapes, and is as it was then;
            the path cannot be written.
        OSError: There is no room on the disk.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> masks = gp.prune(model, sparsity=0.9)
        >>> _ = gp.pack(model, "packed.safetensors")
        >>> torch.equal(gp.unpack("packed.safetensors")["weight"], model.weight)
        True

    Chapter 8.
    """
    if not (into is None or isinstance(into, nn.Module | str | os.PathLike)):
        raise TypeError(f"into must be a model, a path or None, got {type(into).__name__}")
    with opened(path, "path") as checkpoint:
        before = {part.name: _before(part) for part in checkpoint.parts}
        if not isinstance(into, nn.Module) and into is not None:
            return _unpack_files(checkpoint, before, into)
        found = {}
        for part in checkpoint.parts:
            header, code = before[part.name]
            for entry in header.entries.values():
                found[entry.name] = _tensor(part, entry, code)
            for tied, name in header.metadata.items():
                if name in found and tied not in found:
                    found[tied] = found[name]
    if into is None:
        return found
    _load(into, found)
    return into


# ------------------------------------------------------------------------------------------------------------ packing


def _source(model_or_file: Any) -> Checkpoint:
    if not isinstance(model_or_file, nn.Module):
        if not isinstance(model_or_file, str | os.PathLike):
            raise TypeError(
                f"model_or_file must be a model or the path of a checkpoint, got {type(model_or_file).__name__}"
            )
        return opened(model_or_file, "model_or_file")
    return Checkpoint(Path(), [Memory("model", _state_of(model_or_file), {"format": "pt"})])


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, tensor in state.items():
        require(isinstance(tensor, Tensor), f"{name!r} in the model's state is no tensor: its module has extra state")
        require_values(name, tensor)
    return state


def _planned(part: Part, code: Code, seen: Seen) -> _Plan:
    """A first reading: which tensors become smaller, and what the file will look like."""
    packed: set[str] = set()
    told_of: dict[str, coded.Told] = {}
    tensors: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, entry in part.header.entries.items():
        if code != "bits" and entry.itemsize is not None:
            stream, told_of_it = _coded(part, entry, code)
            seen(entry.nbytes)
            if stream.nbytes + WORTH < entry.nbytes:
                packed.add(name)
                told_of[name] = told_of_it
                tensors.append((name + CODED, "U8", (stream.nbytes,), stream.nbytes))
                continue
        else:
            values = _count_values(Tensors(part, entry), seen)
            size = bits_and_values(entry.numel, values, entry.itemsize or 1)
            if entry.itemsize is not None and size < entry.nbytes:
                packed.add(name)
                tensors += [(name + BITS, "U8", (-(-entry.numel // 8),), -(-entry.numel // 8))]
                tensors += [(name + VALUES, entry.dtype, (values,), values * entry.itemsize)]
                continue
        tensors.append((name, entry.dtype, entry.shape, entry.nbytes))
    names = [tensor[0] for tensor in tensors]
    ends = f"{BITS!r} or {VALUES!r}" if code == "bits" else repr(CODED)
    require(len(set(names)) == len(names), f"names of {part.name!r} end in {ends} as packed ones do")
    told: dict[str, Any] = {"version": 1, "header": part.header.text.decode()}
    if code != "bits":
        deflated = base64.b64encode(zlib.compress(part.header.text, 9)).decode()
        told = {"version": 2, "header": deflated, "code": told_of}
    header = headers.laid_out(tensors, part.header.metadata | {KEY: json.dumps(told, separators=(",", ":"))})
    return _Plan(part, frozenset(packed), header, code)


def _coded(part: Part, entry: Entry, code: Code) -> tuple[Array, coded.Told]:
    raw = part.read(entry, 0, entry.nbytes)
    return coded.coded(_units(raw, entry.itemsize or 1), entropy=code == "entropy")


def _count_values(tensor: Tensors, seen: Seen) -> int:
    size = tensor.entry.itemsize or 1

    def count(span: tuple[int, int]) -> tuple[int, int]:
        return int(np.count_nonzero(_units(tensor.part.read(tensor.entry, *span), size))), span[1] - span[0]

    values = 0
    for found, read in mapped(count, spans(tensor.entry, STEP * size), threads_of_torch()):
        values += found
        seen(read)
    return values


def _pack_part(plan: _Plan, path: Path, seen: Seen) -> None:
    with Output(path, plan.header) as output:
        for name, entry in plan.part.header.entries.items():
            if name in plan.packed and plan.code != "bits":
                output.write(name + CODED, 0, _coded(plan.part, entry, plan.code)[0])
                seen(entry.nbytes)
                continue
            at, size = 0, entry.itemsize or 1
            encode = partial(_bits_of, plan.part, entry) if name in plan.packed else partial(_whole, plan.part, entry)
            for start, read, bits, values in mapped(encode, spans(entry, STEP * size), threads_of_torch()):
                if bits is None:
                    output.write(name, start, values)
                else:
                    output.write(name + BITS, start // size // 8, bits)
                    output.write(name + VALUES, at, values)
                    at += values.nbytes
                seen(read)
        plan.part.check()


def _bits_of(part: Part, entry: Entry, span: tuple[int, int]) -> tuple[int, int, Array | None, Array]:
    units = _units(part.read(entry, *span), entry.itemsize or 1)
    alive = units != 0
    values = units.take(np.flatnonzero(alive))  # several times faster than by a mask
    return span[0], units.nbytes, np.packbits(alive), values


def _whole(part: Part, entry: Entry, span: tuple[int, int]) -> tuple[int, int, Array | None, Array]:
    raw = part.read(entry, *span)
    return span[0], raw.size, None, raw


def _units(raw: Array, size: int) -> Array:
    """The entries' bits, as integers."""
    return raw.view(f"u{size}")


# ---------------------------------------------------------------------------------------------------------- unpacking


def _before(part: Part) -> _Before:
    """The header of the file from before; ValueError where the packed file does not hold what it needs."""
    text = part.header.metadata.get(KEY)
    wrong = f"{part.name!r} is damaged"
    require(text is not None, f"{part.name!r} was not packed: its metadata has no {KEY!r}")
    try:
        told = json.loads(text or "")
        version, header = told["version"], told["header"].encode()
        if version == 2:
            header = zlib.decompress(base64.b64decode(header, validate=True))
        code = {name: coded.Told(*map(int, of)) for name, of in told.get("code", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, zlib.error):
        raise ValueError(f"{wrong}: what its metadata says of {KEY!r} cannot be read") from None
    newest = VERSIONS[-1]
    require(version in VERSIONS, f"{part.name!r} is packed in version {version!r}; this gradprune reads up to {newest}")
    before, entries = headers.parsed(header, part.name), part.header.entries
    for name, entry in before.entries.items():
        bits, values, dense = entries.get(name + BITS), entries.get(name + VALUES), entries.get(name)
        if name in code:
            fits = name + CODED in entries and entry.itemsize is not None
        elif bits is not None and values is not None:
            fits = bits.nbytes == -(-entry.numel // 8) and values.dtype == entry.dtype and values.numel <= entry.numel
        else:
            fits = dense is not None and (dense.dtype, dense.shape) == (entry.dtype, entry.shape)
        require(fits, f"{wrong}: {name!r} is not there, or not what it was")
    return _Before(before, code)


def _decoded(part: Part, entry: Entry, told: coded.Told) -> Array:
    """The bytes of a coded tensor."""
    it, size = part.header.entries[entry.name + CODED], entry.itemsize or 1
    try:
        return coded.decoded(part.read(it, 0, it.nbytes), told, entry.numel, size).view(np.uint8)
    except ValueError as error:
        raise ValueError(f"{part.name!r} is damaged: of {entry.name!r}, {error}") from None


def _whole_pieces(part: Part, entry: Entry, code: dict[str, coded.Told]) -> Iterator[tuple[int, Array]]:
    """The bytes of a tensor from before, in order, each time with where they begin."""
    if entry.name in code:
        yield 0, _decoded(part, entry, code[entry.name])
        return
    bits = part.header.entries.get(entry.name + BITS)
    if bits is None or entry.name + VALUES not in part.header.entries:
        yield from pieces(Tensors(part, part.header.entries[entry.name]), STEP * (entry.itemsize or 1))
        return
    values, size, at = part.header.entries[entry.name + VALUES], entry.itemsize or 1, 0
    for start in range(0, entry.numel, STEP):
        number = min(STEP, entry.numel - start)
        raw = part.read(bits, start // 8, -(-(start + number) // 8))
        alive = np.unpackbits(raw, count=number).view(np.bool_)
        where = np.flatnonzero(alive)
        stop = at + where.size * size
        require(stop <= values.nbytes, f"{part.name!r} is damaged: {entry.name!r} has more bits than values")
        dense = np.zeros(number, f"u{size}")
        dense[where] = _units(part.read(values, at, stop), size)
        at = stop
        yield start * size, dense.view(np.uint8)
    require(at == values.nbytes, f"{part.name!r} is damaged: {entry.name!r} has fewer bits than values")


def _tensor(part: Part, entry: Entry, code: dict[str, coded.Told]) -> Tensor:
    require(entry.dtype in DTYPES, f"{entry.name!r} is {entry.dtype}, which torch does not know: unpack into a file")
    found = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="cpu")
    flat = found.view(-1).view(torch.uint8).numpy()
    for start, raw in _whole_pieces(part, entry, code):
        flat[start : start + raw.size] = raw
    part.check()
    return found


def _unpack_files(checkpoint: Checkpoint, before: dict[str, _Before], into: files.StrPath) -> Path:
    target = target_of(checkpoint, into, "into")
    size = sum(each.header.size for each in before.values())
    with bar(size, "unpacking", unit="B") as progress, whole(checkpoint, target, size, unmarked) as place:
        for part in checkpoint.parts:
            header, code = before[part.name]
            with Output(place(part.name), header) as output, behind(threads_of_torch()) as later:
                for entry in header.entries.values():
                    for start, raw in _whole_pieces(part, entry, code):
                        later(output.write, entry.name, start, raw)
                        progress.update(raw.size)
                part.check()
    return target


def _load(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Set a model's state, or raise ValueError with nothing changed."""
    state = _state_of(model)
    first = stored_once(state)[1]  # of a tied tensor one name is enough
    there = {first.get(name, name) for name in found}
    lacking = [name for name in state if first.get(name, name) not in there]
    more = [name for name in found if name not in state]
    require(
        not lacking and not more,
        f"the model is another one: the file lacks {some(lacking)}, and has besides {some(more)}",
    )
    for name, tensor in found.items():
        own = tuple(state[name].shape)
        require(own == tuple(tensor.shape), f"{name!r} has shape {tuple(tensor.shape)}, the model's has {own}")
    model.load_state_dict(found, strict=False)

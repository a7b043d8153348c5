"""How is a packed checkpoint read again, bit for bit (`packed` has the format)?"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core import files
from gradprune.core import header as headers
from gradprune.core.checkpoint import Checkpoint, Part, Tensors, opened, pieces, stored_once, unmarked
from gradprune.core.checks import require
from gradprune.core.header import DTYPES, Entry, Header
from gradprune.core.progress import bar
from gradprune.core.threads import behind, threads_of_torch
from gradprune.core.written import Output, target_of, whole
from gradprune.deploy import coded
from gradprune.deploy.packed import BITS, CODED, KEY, STEP, VALUES, VERSIONS, Array, state_of, units
from gradprune.weights.named import some


class _Before(NamedTuple):
    """The header of the file from before, and how its tensors are coded."""

    header: Header
    code: dict[str, coded.Told]


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
        dense[where] = units(part.read(values, at, stop), size)
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
    state = state_of(model)
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

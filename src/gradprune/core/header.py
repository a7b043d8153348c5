"""What does a safetensors file say that it holds, and can that be?

A file is eight bytes with the length of its header, the header in JSON, and the tensors' bytes one after the other. A
header is believed only where it fits the file to the byte: what is cut off, overlaps or lies is refused by what it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

LONGEST = 100_000_000  # bytes of a header, as the library has it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of a file: what it is, and where its bytes lie, counted from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they take."""
        return self.stop - self.start

    @property
    def itemsize(self) -> int | None:
        """Bytes of one entry; None for a kind that torch does not know."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else None


class Header(NamedTuple):
    """What stands before the tensors, and what it says."""

    text: bytes
    entries: dict[str, Entry]
    metadata: dict[str, str]

    @property
    def start(self) -> int:
        """Where the tensors' bytes begin in the file."""
        return 8 + len(self.text)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.start + max((entry.stop for entry in self.entries.values()), default=0)

    @property
    def opening(self) -> bytes:
        """The bytes of the file before its tensors."""
        return len(self.text).to_bytes(8, "little") + self.text


def laid_out(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None) -> Header:
    """Return the header of a new file, from (name, dtype, shape, bytes) of its tensors.

    Larger entries come first, so that each tensor begins where a processor can read it.
    """
    given = sorted(tensors, key=lambda t: (-(DTYPES[t[1]].itemsize if t[1] in DTYPES else 1), t[0]))
    entries, stop = {}, 0
    for name, dtype, shape, nbytes in given:
        entries[name] = Entry(name, dtype, tuple(shape), stop, stop + nbytes)
        stop += nbytes
    told: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    told |= {e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": (e.start, e.stop)} for e in entries.values()}
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST:
        raise ValueError(f"the header would take {len(text):,} bytes, more than a safetensors file may have")
    return Header(text, entries, dict(metadata or {}))


def read(path: Path) -> Header:
    """Return the header of a file, checked; ValueError where it is no whole safetensors file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        opening = file.read(8)
        length = int.from_bytes(opening, "little")
        start = file.read(1)
        if len(opening) < 8 or start != b"{":
            raise ValueError(f"{path.name!r} is no safetensors file: {_instead(opening, size)}")
        if length > min(size - 8, LONGEST):
            raise ValueError(
                f"{path.name!r} is cut off or damaged: its header should take {length:,} bytes, the file has {size:,}"
            )
        text = start + file.read(length - 1)
    header = parsed(text, path.name)
    if header.size != size:
        cut = "cut off" if size < header.size else "longer than it says"
        raise ValueError(
            f"{path.name!r} is {cut}: by its header it has {header.size:,} bytes, the file has {size:,}; "
            "copy or download it again"
        )
    return header


def parsed(text: bytes, name: str) -> Header:
    """Return what a header says; ValueError, with the file's name, where it contradicts itself."""
    wrong = f"the header of {name!r} is damaged"
    try:
        told = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wrong}: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"{wrong}: it is no object")
    metadata = told.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{wrong}: its metadata is no mapping from text to text")
    entries = {tensor: _entry(tensor, said, wrong) for tensor, said in told.items()}
    stop = 0
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != stop:
            what = "overlaps the one before it" if entry.start < stop else "leaves a hole before it"
            raise ValueError(f"{wrong}: {entry.name!r} {what}")
        stop = entry.stop
    return Header(text, entries, metadata)


def _entry(name: str, said: Any, wrong: str) -> Entry:
    try:
        dtype, shape, (start, stop) = said["dtype"], said["shape"], said["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{wrong}: {name!r} lacks its dtype, shape or place") from None
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not isinstance(dtype, str) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers) or stop < start:
        raise ValueError(f"{wrong}: {name!r} has a dtype, shape or place that cannot be")
    entry = Entry(name, dtype, tuple(shape), start, stop)
    if entry.itemsize is not None and entry.numel * entry.itemsize != entry.nbytes:
        raise ValueError(
            f"{wrong}: {name!r}, {dtype} of shape {shape}, takes {entry.numel * entry.itemsize:,} bytes, and has "
            f"{entry.nbytes:,}"
        )
    return entry


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} stands in it twice")
    return found


def _instead(opening: bytes, size: int) -> str:
    """What a file seems to be that begins otherwise."""
    if size == 0:
        return "it is empty"
    if opening.startswith((b"PK", b"\x80")):
        return (
            "it is a pickle or an archive; one that torch.save wrote is read where its name ends in .pt, .pth or .bin"
        )
    if opening.startswith(b"GGUF"):
        return "it is a GGUF file"
    if opening.startswith(b"version "):
        return "it is the pointer of Git LFS to one: git lfs pull fetches the file itself"
    return "it does not begin as one does"

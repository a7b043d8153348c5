"""Which tensors does a checkpoint have, a file or a folder of shards, and how are their bytes read piece by piece?

A checkpoint is one or more parts, each a safetensors file (or tensors in memory, which are laid out as one would be).
Nothing is read but what is asked for, and nothing is mapped: what is in memory is what a caller holds.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gradprune.core import files
from gradprune.core import header as headers
from gradprune.core.header import NAMES, Entry, Header

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
MARK = ".packed"  # in the names of a folder's packed files, so that nobody loads them for what they are not
WEIGHTS = (*PICKLES, SUFFIX, INDEX, ".bin.index.json", ".h5", ".msgpack", ".onnx", ".gguf", ".part")


class Part(Protocol):
    """One file of a checkpoint, or what would be one."""

    name: str
    header: Header

    def read(self, entry: Entry, start: int, stop: int) -> Bytes:
        """Return bytes of a tensor, counted from its first; the array is the caller's."""

    def check(self) -> None:
        """Raise OSError where the file is no longer the one that was opened."""

    def close(self) -> None:
        """Let go of the file."""


class Tensors(NamedTuple):
    """A tensor of a checkpoint, and the part that has it."""

    part: Part
    entry: Entry


class Checkpoint:
    """The parts of a checkpoint and their tensors by name; closed at the end of a `with` block."""

    def __init__(self, path: Path, parts: list[Part], *, folder: Path | None = None, index: str | None = None) -> None:
        self.path, self.parts, self.folder, self.index = path, parts, folder, index
        self.tensors: dict[str, Tensors] = {}
        for part in parts:
            for name, entry in part.header.entries.items():
                if name in self.tensors:
                    raise ValueError(f"{name!r} is in {self.tensors[name].part.name!r} and in {part.name!r}: in which?")
                self.tensors[name] = Tensors(part, entry)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        for part in self.parts:
            part.close()

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.header.size for part in self.parts)

    def beside(self) -> list[Path]:
        """The files of the folder that hold no weights: configuration, tokenizer, licence."""
        if self.folder is None:
            return []
        found = (path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("."))
        return sorted(path for path in found if not path.name.endswith(WEIGHTS))

    def config(self) -> dict[str, Any]:
        """What config.json beside the weights says; nothing where there is none."""
        path = (self.folder or self.path.parent) / "config.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}


def opened(path: Any, name: str = "the checkpoint") -> Checkpoint:
    """Return a checkpoint: a safetensors file, its index, a folder with one of both, or a file that torch.save wrote.

    FileNotFoundError where there is none; ValueError where it is none, or what it consists of is not whole.
    """
    given = files.checked_path(name, path)
    if not given.exists():
        raise FileNotFoundError(f"there is no file or folder {str(given)!r}")
    if given.is_dir():
        return _folder(given)
    if not given.is_file():
        raise ValueError(f"{str(given)!r} is no ordinary file")
    if given.name.endswith(INDEX):
        return _sharded(given)
    if given.name.endswith(PICKLES):
        tensors, metadata = _unpickled(given)
        return Checkpoint(given, [Memory(given.stem + SUFFIX, tensors, metadata)])
    return Checkpoint(given, [File(given)])


def _folder(folder: Path) -> Checkpoint:
    indices = sorted(folder.glob(f"*{INDEX}"))
    single = sorted(folder.glob(f"*{SUFFIX}"))
    if len(indices) == 1:
        return _sharded(indices[0])
    if not indices and len(single) == 1:
        return Checkpoint(folder, [File(single[0])], folder=folder)
    if indices or single:
        many = [path.name for path in indices or single]
        raise ValueError(f"{str(folder)!r} holds {len(many)} checkpoints, {', '.join(many)[:200]}: name one of them")
    pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLES))
    hint = f"; {pickles[0]!r} is one that torch.save wrote: name it" if pickles else ""
    raise ValueError(f"{str(folder)!r} holds no safetensors file{hint}")


def _sharded(index: Path) -> Checkpoint:
    wrong = f"the index {index.name!r} is damaged"
    try:
        told = json.loads(index.read_text(encoding="utf-8"))
        where = told["weight_map"]
        names = list(dict.fromkeys(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        raise ValueError(f"{wrong}: it has no weight_map from tensors to files") from None
    packed = index.name.endswith(MARK + INDEX)  # a copy of the index from before
    if not names or not all(isinstance(name, str) and name == os.path.basename(name) and name for name in names):
        raise ValueError(f"{wrong}: a file that it names is none of its folder")
    names = [marked(name) for name in names] if packed else names
    for name in names:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.name!r} names the file {name!r}, which is not there")
    parts: list[Part] = []
    try:
        parts += [File(index.parent / name) for name in sorted(names)]
        found = {tensor: part.name for part in parts for tensor in part.header.entries}
        for tensor, name in where.items() if not packed else ():
            if found.get(tensor) != name:
                raise ValueError(f"{wrong}: it says that {tensor!r} is in {name!r}, which does not have it")
        if not packed and (unnamed := sorted(found.keys() - where.keys())):
            raise ValueError(f"{wrong}: it does not name {unnamed[0]!r}, which {found[unnamed[0]]!r} has")
        return Checkpoint(index.parent, parts, folder=index.parent, index=index.name)
    except BaseException:
        for part in parts:
            part.close()
        raise


class File:
    """A safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed by `close`
        self._alone = Lock()  # threads read it, each from a place of its own
        try:
            self.header = headers.read(path)
            self.version = self._now()
        except BaseException:
            self.close()
            raise

    def read(self, entry: Entry, start: int, stop: int) -> Bytes:
        """Return bytes of a tensor, counted from its first."""
        found = np.empty(stop - start, np.uint8)
        view = memoryview(found.data)
        with self._alone:
            self._file.seek(self.header.start + entry.start + start)
            while len(view):
                got = self._file.readinto(view)
                if not got:
                    raise OSError(f"{self.name!r} was cut off while it was read")
                view = view[got:]
        return found

    def check(self) -> None:
        """Raise OSError where the file was written meanwhile."""
        if self._now() != self.version:
            raise OSError(f"{self.name!r} was written while it was read: nothing was made of it")

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_mtime_ns, found.st_size


class Memory:
    """Tensors that are in memory, or mapped, as the file that they would be; each is stored once."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self.name = name
        kept, tied = stored_once(tensors)
        files.require_storable(kept)
        self._tensors = {n: t.detach().resolve_conj().resolve_neg().contiguous() for n, t in kept.items()}
        told = (
            (n, _called(n, t.dtype), tuple(t.shape), t.numel() * t.element_size()) for n, t in self._tensors.items()
        )
        self.header = headers.laid_out(told, {**metadata, **tied})

    def read(self, entry: Entry, start: int, stop: int) -> Bytes:
        """Return bytes of a tensor, counted from its first."""
        tensor = self._tensors[entry.name]
        if entry.nbytes == 0:
            return np.empty(0, np.uint8)
        size = tensor.element_size()
        some = tensor.view(-1)[start // size : -(-stop // size)].cpu().view(torch.uint8).numpy()
        return some[start % size : start % size + stop - start].copy()

    def check(self) -> None:
        """Nothing else writes it."""

    def close(self) -> None:
        """Nothing is open."""


def _called(name: str, dtype: torch.dtype) -> str:
    if dtype not in NAMES:
        raise ValueError(f"{name!r} is {dtype}, which is not stored")
    return NAMES[dtype]


def stored_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors without those that are another one, and for these (tied ones) which: as save_model does."""
    first: dict[Any, str] = {}
    kept, tied = {}, {}
    for name, tensor in tensors.items():
        key: Any = id(tensor)
        if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if first.setdefault(key, name) == name:
            kept[name] = tensor
        else:
            tied[name] = first[key]
    return kept, tied


def marked(name: str) -> str:
    """Return what a file of a packed folder is called."""
    suffix = INDEX if name.endswith(INDEX) else SUFFIX
    return name.removesuffix(suffix) + MARK + suffix


def unmarked(name: str) -> str:
    """Return what it was called before."""
    suffix = INDEX if name.endswith(INDEX) else SUFFIX
    return name.removesuffix(MARK + suffix) + suffix if name.endswith(MARK + suffix) else name


def _unpickled(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file that torch.save wrote, mapped where that can be; nothing in it is run."""
    wrong = f"{path.name!r} cannot be read"
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True if zipped else None)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f", {kind[1]}" if kind else ""
        raise ValueError(
            f"{wrong}: it holds more than tensors{held}, and reading it could run code. Load it where you trust it, "
            "and save model.state_dict() with safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{wrong}: it is damaged, or nothing that torch.save wrote ({error!s:.200})") from None
    if isinstance(found, Tensor) or not isinstance(found, Mapping):
        raise ValueError(f"{wrong}: it holds a {type(found).__name__}, no state dict (a mapping from names to tensors)")
    others = [name for name, value in found.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if others:
        inside = [name for name in others if isinstance(found[name], Mapping)]
        hint = f"; its {inside[0]!r} may be the state dict: save that alone" if inside else ""
        raise ValueError(f"{wrong}: {others[0]!r} in it is of type {type(found[others[0]]).__name__}, no tensor{hint}")
    return dict(found), {"format": "pt"}


def spans(entry: Entry, most: int) -> Iterator[tuple[int, int]]:
    """Yield where a tensor's pieces begin and end, in order, counted from its first byte."""
    for start in range(0, entry.nbytes, most):
        yield start, min(start + most, entry.nbytes)


def pieces(tensor: Tensors, most: int) -> Iterator[tuple[int, Bytes]]:
    """Yield a tensor's bytes in order, each time with where they begin."""
    for start, stop in spans(tensor.entry, most):
        yield start, tensor.part.read(tensor.entry, start, stop)

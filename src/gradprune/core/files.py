"""How is a file written whole or not at all, and how is one read that may be anything?

Files are safetensors: tensors, and one piece of metadata that says in JSON what they are. A file is written under a new
name in its folder and then renamed; a process that is killed in between may leave it there (``.gradprune-....part``, or
the library's own ``.tmp...``).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

StrPath = str | os.PathLike[str]
PREFIX = ".gradprune-"  # of names that are renamed when they are whole


class Kind(NamedTuple):
    """What a file of ours is: its key in the metadata, what errors call it, what makes it one, where a pickle goes."""

    key: str
    name: str
    content: str
    pickled: str = ""


def safetensors() -> ModuleType:
    """Return the library, or raise ImportError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("files are written and read by safetensors: pip install safetensors") from error
    return safetensors


def checked_path(name: str, value: Any) -> Path:
    """Return a path; TypeError where it is neither text nor a path, ValueError where it is empty."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path (str or pathlib.Path), got {type(value).__name__}")
    text = os.fsdecode(value)
    if not text or "\0" in text:
        raise ValueError(f"{name} must name a file, got {text!r}")
    return Path(text)


def place(name: str, value: Any) -> Path:
    """Return a path where a file can be written now; errors as for ``checked_path``, ValueError where none can."""
    path = checked_path(name, value)
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{name} is a folder, {str(path)!r}: give the name of a file in it")
    if target.exists() and not target.is_file():
        raise ValueError(f"{name} is no ordinary file: {str(path)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"{name} is in a folder that does not exist: {str(target.parent)!r}")
    try:
        with contextlib.closing(_New(target.parent)):
            pass
    except OSError as error:
        raise ValueError(f"{name} is in a folder that cannot be written to: {str(target.parent)!r} ({error})") from None
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a new file, which takes the place of `path` where the block ends without an exception.

    Else it is gone, and what stood at `path` still does. The mode is that of the file before, or a new file's.
    """
    target = Path(os.path.realpath(path))
    with contextlib.closing(_New(target.parent)) as new:
        mode = (target if target.exists() else new.path).stat().st_mode
        yield new.path
        if new.path.stat().st_mode != mode:  # the library makes a file that only its owner can read
            os.chmod(new.path, stat.S_IMODE(mode))
        sync(new.path, os.O_RDWR)
        os.replace(new.path, target)
    with contextlib.suppress(OSError):  # not every system can do that, and the file is there
        sync(target.parent, os.O_RDONLY)


def write(path: Path, kind: Kind, told: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and what is told of them, whole or not at all."""
    library = safetensors()
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as part:
        try:
            library.torch.save_file(plain, part, metadata={kind.key: json.dumps(told)})
        except library.SafetensorError as error:
            raise OSError(f"{str(path)!r} could not be written: {error}") from error


def read(path: Path, kind: Kind) -> tuple[Any, dict[str, Tensor]]:
    """Return what is told and the tensors, on the CPU and in memory of their own.

    FileNotFoundError where there is no such file, ValueError where it is not one of the kind.
    """
    for _ in range(100):
        version = _version(path)
        try:
            found = _read(path, kind)
        except ValueError:
            if _version(path) == version:
                raise
        else:
            if _version(path) == version:  # the library opens a file anew for each tensor: it may be another by then
                return found
    raise OSError(f"{str(path)!r} is written again and again while it is read")


def _version(path: Path) -> tuple[int, int, int]:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path, kind: Kind) -> tuple[Any, dict[str, Tensor]]:
    library = safetensors()
    wrong = f"{path.name!r} is no {kind.name}"
    if not path.is_file():
        raise ValueError(f"{wrong}: it is {'a folder' if path.is_dir() else 'no ordinary file'}")
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(kind.key)
            if text is None:
                raise ValueError(f"{wrong}: it is a safetensors file without {kind.content}")
            return _parsed(text, wrong), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f"{wrong}: {_guess(path, kind)} ({error})") from None


def require_storable(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming it, where a tensor is of a kind that the files cannot hold."""
    library = safetensors()
    seen = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name!r} is sparse or quantized, which a safetensors file cannot hold")
        if tensor.dtype in seen or tensor.is_complex():  # complex ones are stored as pairs
            continue
        seen.add(tensor.dtype)
        try:
            library.torch.save({"x": torch.empty(0, dtype=tensor.dtype, device="cpu")})
        except (library.SafetensorError, ValueError, KeyError, TypeError):
            raise ValueError(f"{name!r} is {tensor.dtype}, which a safetensors file cannot hold") from None


class _New:
    """A new empty file in a folder, gone at ``close`` unless it was renamed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{PREFIX}{secrets.token_hex(8)}.part"
        handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)  # less what the umask takes
        os.close(handle)

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def sync(path: Path, how: int) -> None:
    """Wait until a file, or a folder's list of names, is on the disk; `how` it is opened, as for ``os.open``."""
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parsed(text: str, wrong: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{wrong}: its metadata is damaged") from None


def _guess(path: Path, kind: Kind) -> str:
    """What a file that safetensors cannot read seems to be."""
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        return "it is empty"
    if start.startswith(b"PK") or start.startswith(b"\x80"):
        return f"it is a pickle, as torch.save writes, or an archive{kind.pickled}"
    if start[8:] == b"{":
        return "it is a safetensors file that is cut off or damaged"
    return "it is no safetensors file"

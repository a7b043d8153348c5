"""How is a checkpoint written, a file or a folder, so that whoever looks finds the old one or the new one?

Under a new name beside the target, synced to the disk, then renamed. A process that is killed in between leaves the
new name there (``.gradprune-....part``), and nothing else changed. A folder must be new: no system replaces one that
holds files in one step. What takes hours is ``Resumed``: what is done stays, in ``<target>.unfinished``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gradprune.core import files
from gradprune.core.checkpoint import PICKLES, SUFFIX, Checkpoint
from gradprune.core.encoded import readable
from gradprune.core.header import Header

Place = Callable[[str], Path]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def target_of(source: Checkpoint, path: Any, name: str = "the output") -> Path:
    """Return where a checkpoint like the source can be written now; errors as of ``core.files.place``.

    A folder becomes a folder, which must be new or empty, a file a file, of safetensors also where it was none.
    """
    if source.folder is None:
        place = files.place(name, path)
        if place.name.endswith(PICKLES):  # by which it would be read as a pickle
            meant = place.with_suffix(SUFFIX).name
            raise ValueError(f"{name} is written as safetensors, which {place.name!r} does not say: call it {meant!r}")
        return place
    target = files.checked_path(name, path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{name} must be a folder, as the checkpoint is one: {str(target)!r} is a file")
    if target.is_dir() and next(target.iterdir(), None) is not None:
        raise ValueError(
            f"{name} is a folder that holds files, {str(target)!r}: a folder cannot be replaced in one step, so name "
            "a new one"
        )
    parent = Path(os.path.realpath(target)).parent
    if not parent.is_dir():
        raise ValueError(f"{name} is in a folder that does not exist: {str(parent)!r}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{name} is in a folder that cannot be written to: {str(parent)!r}")
    return target


@contextlib.contextmanager
def whole(source: Checkpoint, target: Path, size: int, renamed: Callable[[str], str] = str) -> Iterator[Place]:
    """Yield where each part is to be written; all of it takes its place where the block ends without an exception.

    Args:
        source: what it is made from, whose index and further files a folder takes along.
        target: a file, or a folder, from ``target_of``.
        size: bytes that will be written; OSError before anything is where the disk has fewer.
        renamed: what a file of weights, or their index, is called in the new folder.
    """
    require_room(target, size)
    with _clear_about_the_disk(target, size):
        if source.folder is None:
            with files.replacing(target) as part:
                yield lambda _: part
        else:
            with _replacing_folder(target) as folder:
                yield lambda name: folder / renamed(name)
                _take_along(source, folder, renamed)


class Resumed:
    """A checkpoint that is written bit by bit, by one process or by several after each other.

    It stands in the folder ``<target>.unfinished`` and takes its place at the end of a `with` block; where that raises
    or the process is killed, the folder stays. ``done`` is what was noted last.

    Args:
        source: what it is made from: each part has the header of one of its.
        target: a file or a folder, from ``target_of``.
        call: of what it depends on, by what it is; ValueError where what stands there is of another call.
    """

    def __init__(self, source: Checkpoint, target: Path, call: Mapping[str, Any]) -> None:
        self._source, self._target = source, Path(os.path.realpath(target))
        self.folder = self._target.with_name(self._target.name + ".unfinished")
        self._files, self._note = self.folder / "files", self.folder / "done.json"
        self._call = json.loads(json.dumps(call))  # as it will come back
        self.done: Any = None
        if self._note.exists():
            told = json.loads(self._note.read_text(encoding="utf-8"))
            self._require_same(told["call"])
            if all(self.path(part.name).exists() for part in source.parts):  # else they have taken their place
                self.done = told["done"]
        else:
            others = (p for p in self.folder.rglob("*") if p != self._files and not p.name.startswith(files.PREFIX))
            if self.folder.exists() and not (self.folder.is_dir() and next(others, None) is None):
                raise ValueError(f"{str(self.folder)!r} is needed to write {target.name!r}: move away what is there")
            require_room(target, source.size)
        self.outputs: dict[str, Output] = {}

    def path(self, name: str) -> Path:
        """Where a part is written."""
        return self._files / name

    def note(self, done: Any) -> None:
        """Note what is done, once it is on the disk."""
        for output in self.outputs.values():
            output.sync()
        with files.replacing(self._note) as new:
            new.write_text(json.dumps({"call": self._call, "done": done}), encoding="utf-8")

    def __enter__(self) -> Resumed:
        self._files.mkdir(parents=True, exist_ok=True)
        if self.done is None:
            self.note(None)
        for part in self._source.parts:
            self.outputs[part.name] = Output(self.path(part.name), part.header, whole=True)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for output in self.outputs.values():
            output.__exit__(kind)
        if kind is not None:
            return
        if self._source.folder is None:
            with files.replacing(self._target) as new:
                os.replace(self.path(self._source.parts[0].name), new)
        else:
            _take_along(self._source, self._files, str)
            _take_place(self._files, self._target)
        shutil.rmtree(self.folder)

    def _require_same(self, theirs: Mapping[str, Any]) -> None:
        for what, ours in self._call.items():
            if theirs.get(what) != ours:
                raise ValueError(
                    f"what stands unfinished in {str(self.folder)!r} is of another call: {what} differ. Repeat that "
                    "call, or delete the folder"
                )


class Output:
    """A safetensors file of known layout, whose bytes may come in any order; `whole`, it has its size at once."""

    def __init__(self, path: Path, header: Header, *, whole: bool = False) -> None:
        self.header = header
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._write(0, memoryview(header.opening))
        if whole:
            os.truncate(path, header.size)

    def write(self, name: str, start: int, data: Any) -> None:
        """Write bytes of a tensor, from a place counted from its first."""
        entry = self.header.entries[name]
        view = memoryview(data).cast("B")
        if start + len(view) > entry.nbytes:
            raise ValueError(f"{name!r} has {entry.nbytes:,} bytes, {start + len(view):,} were to be written")
        self._write(self.header.start + entry.start + start, view)

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._handle)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            if kind is None and os.fstat(self._handle).st_size != self.header.size:
                raise ValueError("fewer bytes were written than the header says")
            if kind is None:
                self.sync()
        finally:
            os.close(self._handle)

    def _write(self, at: int, view: memoryview) -> None:
        os.lseek(self._handle, at, os.SEEK_SET)
        while len(view):
            view = view[os.write(self._handle, view) :]


@contextlib.contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(target))
    folder = real.parent / f"{files.PREFIX}{secrets.token_hex(8)}.part"
    folder.mkdir()
    try:
        yield folder
        _take_place(folder, real)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _take_place(folder: Path, target: Path) -> None:
    """Give a folder that is finished its name."""
    _sync(folder)
    if os.name != "posix" and target.is_dir():  # there an empty folder is in the way
        target.rmdir()
    os.rename(folder, target)
    _sync(target.parent)


def _take_along(source: Checkpoint, folder: Path, renamed: Callable[[str], str]) -> None:
    """Copy the index, and what else belongs to the checkpoint, unchanged."""
    assert source.folder is not None
    names = [path.name for path in source.beside()]
    if source.index is not None:
        names.append(source.index)
    for name in names:
        copy = folder / (renamed(name) if name == source.index else name)
        shutil.copyfile(source.folder / name, copy)
        files.sync(copy, os.O_RDWR)


def require_room(target: Path, size: int) -> None:
    """Raise OSError that says how much is needed where the disk of a target has less room."""
    if shutil.disk_usage(_folder_of(target)).free < size:
        raise OSError(errno.ENOSPC, _no_room(target, size))


def _no_room(target: Path, size: int, more: str = "") -> str:
    folder = _folder_of(target)
    free = readable(shutil.disk_usage(folder).free)
    return (
        f"no room for {readable(size)} in {str(folder)!r}, where {free} are free{more}; what stood there is as it was"
    )


def _folder_of(target: Path) -> Path:
    return Path(os.path.realpath(target)).parent


@contextlib.contextmanager
def _clear_about_the_disk(target: Path, size: int) -> Iterator[None]:
    """Let an error of a full disk say what was needed and what there is."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        limit = " (and files may not be as large)" if error.errno == errno.EFBIG else ""
        raise OSError(error.errno, _no_room(target, size, limit)) from None


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can do that
        files.sync(folder, os.O_RDONLY)

"""What is in a checkpoint, and in what do two differ: tensors, zeros, bytes, read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradprune.core.checkpoint import Bytes, Checkpoint, Tensors, opened, pieces
from gradprune.core.encoded import bits_and_values
from gradprune.core.header import DTYPES
from gradprune.core.progress import bar
from gradprune.deploy import names

STEP = 2**18  # entries at a time


class Content(NamedTuple):
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    entries: int
    zeros: int | None  # None where the dtype is not known
    bytes: int
    bytes_packed: int
    reason: str  # why it is no weight by its name and shape, empty where it is one


@dataclass(frozen=True)
class Contents:
    """What ``contents`` found in a checkpoint."""

    rows: tuple[Content, ...]
    parts: int
    bytes: int
    metadata: dict[str, str]

    @property
    def bytes_packed(self) -> int:
        """About what ``pack`` would write: the tensors' bytes without their headers."""
        return sum(row.bytes_packed for row in self.rows)


class Difference(NamedTuple):
    """In what one tensor differs between two checkpoints."""

    name: str
    what: str  # "same", "values", "shape", "dtype", "only in the first", "only in the second"
    entries: int = 0
    changed: int = 0  # entries with other bits
    became_zero: int = 0
    came_back: int = 0  # zero in the first, not in the second
    largest: float | None = None  # change of a value


def contents(path: Any) -> Contents:
    """Return what is in a checkpoint, having read it once."""
    with opened(path) as checkpoint, bar(checkpoint.size, "reading", unit="B") as progress:
        every = names.known([t.entry for t in checkpoint.tensors.values()], checkpoint.config())
        rows = []
        for name, it in every.items():
            entry, zeros = it.entry, 0
            for raw in _values(checkpoint.tensors[name]):
                zeros += raw.size // (entry.itemsize or 1) - _nonzeros(raw, entry.dtype)
                progress.update(raw.size)
            known = entry.itemsize is not None
            packed = bits_and_values(entry.numel, entry.numel - zeros, entry.itemsize or 1) if known else entry.nbytes
            rows.append(
                Content(
                    name,
                    entry.dtype,
                    entry.shape,
                    entry.numel,
                    zeros if known else None,
                    entry.nbytes,
                    min(packed, entry.nbytes),
                    it.reason,
                )
            )
        metadata = {key: text for part in checkpoint.parts for key, text in part.header.metadata.items()}
        return Contents(tuple(rows), len(checkpoint.parts), checkpoint.size, metadata)


def differences(first: Any, second: Any) -> tuple[Difference, ...]:
    """Return what differs between two checkpoints, tensor by tensor, bit for bit; each is read once."""
    with opened(first, "the first") as a, opened(second, "the second") as b:
        order = sorted({*a.tensors, *b.tensors}, key=names.in_order)
        with bar(a.size + b.size, "comparing", unit="B") as progress:
            return tuple(_difference(name, a, b, progress) for name in order)


def _difference(name: str, a: Checkpoint, b: Checkpoint, progress: Any) -> Difference:
    one, other = a.tensors.get(name), b.tensors.get(name)
    if one is None or other is None:
        there = one or other
        return Difference(name, "only in the first" if other is None else "only in the second", there.entry.numel)  # type: ignore[union-attr]
    entry, size = one.entry, one.entry.itemsize or 1
    if entry.shape != other.entry.shape or entry.dtype != other.entry.dtype:
        return Difference(name, "shape" if entry.shape != other.entry.shape else "dtype", entry.numel)
    changed = became = back = 0
    largest: float | None = None
    for before, after in zip(_values(one), _values(other), strict=True):
        progress.update(before.size + after.size)
        where = np.flatnonzero(before.view(f"u{size}") != after.view(f"u{size}"))
        if not where.size:
            continue
        changed += where.size
        if entry.dtype in DTYPES:
            x, y = (torch.from_numpy(raw).view(DTYPES[entry.dtype])[torch.from_numpy(where)] for raw in (before, after))
            x, y = _wide(x), _wide(y)
            became += int(((x != 0) & (y == 0)).sum())
            back += int(((x == 0) & (y != 0)).sum())
            here = float((x - y).abs().nan_to_num(nan=float("inf")).max())
            largest = here if largest is None else max(largest, here)
    return Difference(name, "values" if changed else "same", entry.numel, changed, became, back, largest)


def _values(tensor: Tensors) -> Iterator[Bytes]:
    for _, raw in pieces(tensor, STEP * (tensor.entry.itemsize or 1)):
        yield raw


def _nonzeros(raw: Bytes, dtype: str) -> int:
    """How many entries are other than zero; -0.0 is not, NaN is."""
    if dtype in ("BF16", "F16"):
        return int(np.count_nonzero(raw.view(np.uint16) << 1))
    if dtype in ("F32", "F64"):
        return int(np.count_nonzero(raw.view("f4" if dtype == "F32" else "f8")))
    if dtype not in DTYPES:
        return raw.size
    if dtype in ("C64",) or dtype.startswith("F8"):
        return int(torch.count_nonzero(_wide(torch.from_numpy(raw).view(DTYPES[dtype]))))
    return int(np.count_nonzero(raw.view(f"u{DTYPES[dtype].itemsize}")))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)

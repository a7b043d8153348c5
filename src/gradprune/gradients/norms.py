"""How large are gradients, right also where powers of their entries leave the range of the dtype (chapter 2)?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SMALL = 2**14
"""Tensors of at most so many entries are joined where one call can then serve all of them."""
HALF = {torch.float16, torch.bfloat16}
CHUNK = 2**17  # entries that stay in cache


def norm_of(values: Sequence[Tensor], p: float) -> float:
    """The p-norm of all entries: in one pass, and in a second one, scaled, where powers may have left the range.

    The bounds leave room for 10^8 entries of which each lost all its digits. nan or inf where an entry is.
    """
    if p == math.inf:
        return most_of(largest_of(values))
    norms = [_plain_norm(here, p) for here in grouped_by_device(values).values()]
    norm = norms[0] if len(norms) == 1 else combined_norm(norms, p)
    tiny = torch.finfo(torch.float32).tiny
    if (tiny * 1e15) ** (1 / p) < norm < math.inf:
        return norm
    most = most_of(largest_of(values))
    if not 0 < most < math.inf:
        return most
    scaled = [float(torch.linalg.vector_norm(widened(v) / most, p)) if v.numel() else 0.0 for v in values]
    norm = most * combined_norm(scaled, p)
    if norm == math.inf:
        raise ValueError(f"the norm of order {p} of these gradients is beyond float64; take a larger norm_type")
    return norm


def _plain_norm(values: list[Tensor], p: float) -> float:
    """The p-norm of tensors on one device; half precision is summed in float32."""
    half, full = [], values
    if not HALF.isdisjoint({v.dtype for v in values}):
        half, full = [v for v in values if v.dtype in HALF], [v for v in values if v.dtype not in HALF]
    norms = [*torch._foreach_norm(full, p)] if full else []
    for value in half:
        if value.device.type != "cpu" or not value.is_contiguous():
            norms.append(torch.linalg.vector_norm(value, p, dtype=torch.float32))
            continue
        copy = torch.empty(min(value.numel(), CHUNK))  # of a piece: a float32 copy of all would leave the cache
        for chunk in value.view(-1).split(CHUNK):
            norms.append(torch.linalg.vector_norm(copy[: len(chunk)].copy_(chunk), p))
    return float(torch.linalg.vector_norm(torch.stack(norms), p))


def combined_norm(norms: Sequence[float], p: float) -> float:
    """The p-norm of what has these norms."""
    most = most_of(norms)
    if not 0 < most < math.inf:
        return most
    return most * float(math.fsum((norm / most) ** p for norm in norms) ** (1 / p))


def most_of(largest: Sequence[float]) -> float:
    """The largest, or nan where one is."""
    return math.nan if any(map(math.isnan, largest)) else max(largest, default=0.0)


def largest_of(values: Sequence[Tensor], *, join: bool = False) -> list[float]:
    """The largest magnitude of each tensor; nan or inf where an entry is. One transfer a device.

    With `join`, small tensors of one dtype are looked at as one, which takes less time; what is returned is then in no
    particular order.
    """
    if join:
        values = _joined(values)
    found: list[float] = [0.0] * len(values)
    places: dict[torch.device, list[int]] = {}
    for at, value in enumerate(values):
        if value.numel():
            places.setdefault(value.device, []).append(at)
    for here in places.values():
        ends = [end for at in here for end in _ends(values[at])]
        read = torch.stack(ends).tolist()
        for place, low, high in zip(here, read[::2], read[1::2], strict=True):
            found[place] = max(-low, high) if low == low and high == high else math.nan
    return found


def _joined(values: Sequence[Tensor]) -> list[Tensor]:
    """All entries: the small tensors of one dtype and device in one vector, the others as they are."""
    alike: dict[Any, list[Tensor]] = {}
    for value in values:
        alike.setdefault((value.dtype, value.device) if value.numel() <= SMALL else id(value), []).append(value)
    return [same[0] if len(same) == 1 else torch.cat([v.reshape(-1) for v in same]) for same in alike.values()]


def _ends(value: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(widened(value).abs() if value.is_complex() else value)
    return (low, high) if value.dtype not in HALF else (low.float(), high.float())


def widened(value: Tensor) -> Tensor:
    """Return a copy in double precision, on the CPU where the device has none."""
    dtype = torch.complex128 if value.is_complex() else torch.float64
    return value.cpu().to(dtype) if value.device.type == "mps" else value.to(dtype)


def grouped_by_device(values: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Return the tensors by the device they are on."""
    if len(devices := {value.device for value in values}) == 1:
        return {devices.pop(): list(values)}
    groups: dict[torch.device, list[Tensor]] = {}
    for value in values:
        groups.setdefault(value.device, []).append(value)
    return groups


def count_over(value: Tensor, limit: float) -> int:
    """Return how many entries are larger in magnitude."""
    chunks = value.view(-1).split(CHUNK) if value.is_contiguous() else [value]
    return sum(int(torch.count_nonzero(chunk.abs() > limit)) for chunk in chunks)

"""How large are tensors, right whatever the size of their entries and however many there are (chapters 1 and 2)?

A sum of squares in float32 loses digits with every million entries, and overflows for entries above 1e19. So sums are
taken over short rows and added in float64; where powers may have left the range, the entries are scaled by the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SMALL = 2**14
"""Tensors of at most so many entries are joined where one call can then serve all of them."""
HALF = {torch.float16, torch.bfloat16}
CHUNK = 2**20  # entries that are converted at a time
ROW = 2**9  # entries that are summed in their own dtype: of equal ones, too, the sum is right to 3e-7
_CONVERTED = {*HALF, torch.complex64, torch.complex128}
_WHOLE = 2**12  # up to so many in one go, together with other tensors: 2e-6 then

Scalar = Tensor | float  # on an accelerator a tensor that nobody has waited for yet


@torch.no_grad()
def norms_of(values: Sequence[Tensor]) -> list[Scalar]:
    """Return the 2-norm of each tensor, right also where the squares of its entries leave the range of its dtype.

    On the CPU, where looking at a number is free, only the norms that come out suspiciously are computed again; on an
    accelerator, where looking means waiting for it, all are summed in float64 (float32 where it has no float64).
    """
    values = [entries(value) for value in values]
    if any(value.device.type != "cpu" for value in values):
        return [torch.linalg.vector_norm(_wide(value), dtype=_sum_dtype(value)) for value in values]
    small, of_small, of_large = _norms_in_rows(values, 2.0)
    found: list[Scalar] = [0.0] * len(values)
    for at, norm in zip(small, of_small.tolist(), strict=True):
        found[at] = norm
    for at, norms in of_large.items():
        found[at] = float(torch.linalg.vector_norm(torch.cat(norms).double()))
    return [
        norm if _in_range(float(norm), 2.0) else _scaled_norm([value], 2.0)
        for norm, value in zip(found, values, strict=True)
    ]


def norm_of(values: Sequence[Tensor], p: float) -> float:
    """Return the p-norm of all entries, nan or inf where an entry is: one pass, or two where powers leave the range."""
    if p == math.inf:
        return most_of(largest_of(values))
    norm = combined_norm([_plain_norm(here, p) for here in grouped_by_device(values).values()], p)
    return norm if _in_range(norm, p) else _scaled_norm(values, p)


def _in_range(norm: float, p: float) -> bool:
    """Whether no power can have been lost: there is room for 10^8 entries of which each lost all its digits."""
    return bool((torch.finfo(torch.float32).tiny * 1e15) ** (1 / p) < norm < math.inf)


def _plain_norm(values: list[Tensor], p: float) -> float:
    """The p-norm of tensors on one device, of powers in their own dtype, or in float32 for half precision."""
    if values[0].device.type == "cpu":
        _, of_small, of_large = _norms_in_rows(values, p)
        norms = [of_small, *(norm for norms in of_large.values() for norm in norms)]
        return float(torch.linalg.vector_norm(torch.cat(norms).double(), p))
    half = [value for value in values if value.dtype in HALF]
    full = [value for value in values if value.dtype not in HALF] if half else values
    found = [*torch._foreach_norm(full, p)] if full else []
    found += [torch.linalg.vector_norm(value, p, dtype=torch.float32) for value in half]
    return float(torch.linalg.vector_norm(torch.stack([norm.float() for norm in found]), p))


def _norms_in_rows(values: Sequence[Tensor], p: float) -> tuple[list[int], Tensor, dict[int, list[Tensor]]]:
    """Which tensors were taken whole, their p-norms, and of every other tensor the norms of its rows; on the CPU."""
    small, whole, of_large = list(range(len(values))), list(values), {}
    sizes = [*map(Tensor.numel, values)]
    if max(sizes, default=0) > _WHOLE or {value.dtype for value in values} - {torch.float32, torch.float64}:
        large = [at for at in small if sizes[at] > _WHOLE or (sizes[at] and values[at].dtype in _CONVERTED)]
        of_large = {
            at: [norm for piece in _real_pieces(values[at], p) for norm in _row_norms(piece, p)] for at in large
        }
        small = [at for at in small if at not in of_large]
        whole = [values[at] for at in small]
    of_small = (
        torch.stack(torch._foreach_norm(whole, p)) if whole else torch.zeros(0, dtype=torch.float32, device="cpu")
    )
    return small, of_small, of_large


def _row_norms(entries_: Tensor, p: float) -> list[Tensor]:
    """The p-norms of the rows into which a vector is cut, and that of what is left over."""
    left = len(entries_) % ROW
    rows = (entries_[:-left] if left else entries_).view(-1, ROW)
    found = [_norms_of_rows(rows, p)] if len(rows) else []
    return [*found, torch.linalg.vector_norm(entries_[-left:], p).view(1)] if left else found


def _norms_of_rows(rows: Tensor, p: float) -> Tensor:
    if p != 1:
        norms: Tensor = torch.linalg.vector_norm(rows, p, dim=1)
        return norms
    # Added up pair by pair, as torch's sum does, it is more accurate than its norm, and faster.
    sizes = torch.empty(min(len(rows), CHUNK // ROW), ROW, dtype=rows.dtype, device=rows.device)
    return torch.cat([torch.abs(chunk, out=sizes[: len(chunk)]).sum(1) for chunk in rows.split(len(sizes))])


def _real_pieces(value: Tensor, p: float) -> Iterator[Tensor]:
    """The entries as vectors of float32 or float64 that have the same p-norm."""
    flat = _flat(value)
    if flat.is_complex():
        if p == 2:
            yield torch.view_as_real(flat.resolve_conj()).view(-1)
        else:
            yield from (chunk.abs() for chunk in flat.split(CHUNK))
    elif flat.dtype in HALF:
        copy = torch.empty(min(len(flat), CHUNK), dtype=torch.float32, device=flat.device)
        for chunk in flat.split(CHUNK):
            yield copy[: len(chunk)].copy_(chunk)
    else:
        yield flat


def _flat(value: Tensor) -> Tensor:
    """All entries as a vector, in the order of memory where that needs no copy."""
    if value.is_contiguous():
        return value.view(-1)
    by_stride = sorted(range(value.ndim), key=lambda axis: value.stride()[axis], reverse=True)
    return value.permute(by_stride).reshape(-1).contiguous()


def _scaled_norm(values: Sequence[Tensor], p: float) -> float:
    """The p-norm of the entries over their largest, times that: no power leaves the range."""
    most = most_of(largest_of(values))
    if not 0 < most < math.inf:
        return most
    pieces = [piece for value in values for piece in _flat(value).split(CHUNK) if value.numel()]
    scaled = [float(torch.linalg.vector_norm(widened(piece) / most, p)) for piece in pieces]
    norm = most * combined_norm(scaled, p)
    if norm == math.inf:
        raise ValueError(f"the norm of order {p} of these gradients is beyond float64; take a larger norm_type")
    return norm


def combined_norm(norms: Sequence[float], p: float) -> float:
    """Return the p-norm of what has these norms."""
    most = most_of(norms)
    if not 0 < most < math.inf:
        return most
    try:
        return most * float(math.fsum((norm / most) ** p for norm in norms) ** (1 / p))
    except OverflowError:
        return math.inf


def unit_norms(rows: Tensor) -> Tensor:
    """Return the 2-norm of each row of a matrix of float32 or float64, the sums of long rows taken in short ones."""
    length = rows.shape[1]
    if length <= _WHOLE:
        plain: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return plain
    whole = length // ROW * ROW
    norms = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, ROW)), dim=2)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True) if whole < length else norms[:, :0]
    joined = torch.cat([norms, rest], dim=1)
    of_rows: Tensor = torch.linalg.vector_norm(joined if rows.device.type == "mps" else joined.double(), dim=1)
    return of_rows


def most_of(largest: Sequence[float]) -> float:
    """Return the largest, or nan where one is."""
    return math.nan if any(map(math.isnan, largest)) else max(largest, default=0.0)


def largest_of(values: Sequence[Tensor], *, join: bool = False) -> list[float]:
    """Return the largest magnitude of each tensor; nan or inf where an entry is. One transfer a device.

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
        numbers = torch.stack(ends).tolist()
        for place, low, high in zip(here, numbers[::2], numbers[1::2], strict=True):
            found[place] = max(abs(low), abs(high)) if low == low and high == high else math.nan
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
    if {value.is_cpu for value in values} == {True}:  # a quicker look than at their devices
        return {torch.device("cpu"): list(values)}
    groups: dict[torch.device, list[Tensor]] = {}
    for value in values:
        groups.setdefault(value.device, []).append(value)
    return groups


def count_over(value: Tensor, limit: float) -> int:
    """Return how many entries are larger in magnitude; `limit` is a number of their dtype."""
    chunks = value.view(-1).split(CHUNK) if value.is_contiguous() else [value]
    return sum(int(torch.count_nonzero(chunk.abs() > limit)) for chunk in chunks)


def entries(value: Tensor) -> Tensor:
    """Return the stored entries of a sparse tensor, each place once; a dense one as it is."""
    if value.layout == torch.sparse_coo:
        return value.coalesce().values()
    return value if value.layout in (torch.strided, torch.jagged) else value.values()


def read(scalars: Sequence[Scalar]) -> list[float]:
    """Read scalars with one transfer a device instead of one a scalar."""
    numbers = [0.0 if isinstance(scalar, Tensor) else scalar for scalar in scalars]
    unread = [(i, scalar) for i, scalar in enumerate(scalars) if isinstance(scalar, Tensor)]
    for device in {scalar.device for _, scalar in unread}:
        here = [(i, scalar) for i, scalar in unread if scalar.device == device]
        for (i, _), number in zip(here, torch.stack([scalar for _, scalar in here]).tolist(), strict=True):
            numbers[i] = number
    return numbers


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def _sum_dtype(tensor: Tensor) -> torch.dtype | None:
    if tensor.device.type == "mps":
        return None
    return torch.complex128 if tensor.is_complex() else torch.float64

"""In which precision is a score kept, so that its order survives?

In the parameter's dtype, float32 at least; in float64 where an entry would leave the range of that, as the square of
1e-25 does; and not at all where float64 cannot hold it either, for it would be all equal, and positions would decide.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

AT_A_TIME = 2**17  # entries, which stay in cache


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of a dtype are summed: float32 (complex64) for the narrower ones."""
    return torch.promote_types(dtype, torch.float32)


def product(name: str, w: Tensor, g: Tensor, scale: float = 1.0, *, exact_at_once: bool = False) -> Tensor:
    """w g times a power of two, entry by entry; of complex numbers what their parts' products add up to."""
    w, g = w.to(wide(w.dtype)), g.to(wide(g.dtype))
    result = (w.conj() * g).real if w.is_complex() else w * g
    if not exact_at_once and _in_range(result, w, g):
        result = result if scale == 1.0 else result.mul_(scale)
        if scale == 1.0 or _in_range(result, w, g):
            return result
    exact = (_double(w).conj() * _double(g)).real * scale if w.is_complex() else w.double() * g.double() * scale
    require_finite(name, exact)
    if not exact.any() and (w.bool() & g.bool()).any() and not w.is_complex():
        raise ValueError(f"the score of {name!r} is too small for float64: scale the loss or the inputs up")
    return exact


def add_products_(total: Tensor, a: Tensor, b: Tensor, sign: float = 1.0) -> None:
    """Add a b, formed in float64, to a float64 total; of complex numbers what their parts' products add up to."""
    if a.is_complex():
        total.add_((_double(a).conj() * _double(b)).real, alpha=sign)
        return
    for part, x, y in _parts(total, a, b):
        part.addcmul_(x.double(), y.double(), value=sign)


def narrowed(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A real float64 tensor in the parameter's dtype, float32 at least, unless an entry would under- or overflow."""
    require_finite(name, exact)
    if wide(dtype) in (torch.float64, torch.complex128):
        return exact
    narrow = exact.float()
    return narrow if _in_range(narrow, exact, exact) else exact


def require_finite(name: str, score: Tensor) -> None:
    """Raise ValueError where an entry is not finite."""
    if not bool(score.isfinite().all()):
        raise ValueError(
            f"the score of {name!r} contains NaN or infinities: its weight, its gradient or its input does, "
            "or their product is too large for float64"
        )


def _in_range(result: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether no entry has over- or underflowed: all finite, and none but those with a factor of zero near zero."""
    tiny = torch.finfo(result.dtype).tiny
    for part, x, y in _parts(result, a, b):
        size = part.abs()
        if size.numel() and not bool(size.max().isfinite()):  # NaN is the largest, too
            return False
        if size.numel() and bool(size.min() < tiny) and bool(((size < tiny) & (x != 0) & (y != 0)).any()):
            return False
    return True


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in pieces that stay in cache, where they lie in one order on the CPU."""
    if all(t.device.type == "cpu" and t.is_contiguous() for t in tensors):
        yield from zip(*(t.view(-1).split(AT_A_TIME) for t in tensors), strict=True)
    else:
        yield tensors


def _double(value: Tensor) -> Tensor:
    return value.to(torch.complex128)

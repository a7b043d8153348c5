"""In which precision is a score kept, so that its order survives?

Products and sums are formed in float64 and returned in the dtype they are compared in, float32 at least, where no entry
leaves its range; for float32 numbers that is bit for bit what a product in float32 is. Where one does, as the square of
1e-25 would, they stay in float64. A score that float64 cannot hold is refused, for it would be all equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradprune.core.checks import require


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of a dtype are summed: float32 (complex64) for the narrower ones."""
    single = torch.complex64 if dtype.is_complex else torch.float32
    return torch.promote_types(dtype, single)


def product(w: Tensor, g: Tensor) -> Tensor:
    """w g in float64, entry by entry; of complex numbers what their parts' products add up to."""
    if w.is_complex():
        return (w.to(torch.complex128).conj() * g).real
    return w.double() * g


def narrowed(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """A real float64 tensor in the parameter's dtype, float32 at least, unless an entry would under- or overflow."""
    size = exact.abs()
    largest = size.max() if size.numel() else exact.new_zeros(())
    if not bool(largest.isfinite()):  # NaN is the largest, too
        raise ValueError(f"the score of {name!r} contains NaN or infinities: its gradient or its weight does")
    if wide(dtype) in (torch.float64, torch.complex128):
        return exact
    limits = torch.finfo(torch.float32)
    least = torch.where(size > 0, size, largest).min() if size.numel() else largest
    in_range = bool((largest <= limits.max) & ((least >= limits.tiny) | (largest == 0)))
    return exact.float() if in_range else exact


def require_order(name: str, result: Tensor, *factors: Tensor) -> None:
    """Raise where a product is zero throughout though its factors are not: too small for float64."""
    if result.numel() and not result.any():
        met = torch.stack([f.bool() for f in factors]).all(dim=0).any()
        require(not bool(met), f"the score of {name!r} is too small for float64: scale the loss up")

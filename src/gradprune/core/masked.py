"""How are the entries that a mask prunes counted and set to zero, at the speed of memory?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradprune.core.order import INTEGER_OF_SIZE
from gradprune.core.sharded import local
from gradprune.core.threads import in_shares, threads_of_torch
from gradprune.core.uncompiled import uncompiled

PIECE = 2**18  # entries that a cache holds; the wide masks of larger ones come from the system, page by page
SHARED = 2**24  # entries from which on threads of our own are worth their start


@uncompiled
def zero_pruned_(tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set each tensor to +0.0 where its mask is False, at the speed of memory, whatever stands there.

    The pairs are of one shape and one device, and the tensors can be written (``checks.require_writable``); of a
    DTensor the mask is that of the block held here. A mask may be given as its bytes, in int8. All pairs are taken
    before the first is written, and an interrupt is let through once all are.
    """
    with torch.no_grad():  # which costs less than a detached view of each
        pairs = [_as_integers(local(tensor), mask) for tensor, mask in tensors]
        try:
            _multiply_(pairs)
        except BaseException:  # a signal's, between two tensors: no half of the masks
            _multiply_(pairs)
            raise


@uncompiled
def count_kept(mask: Tensor) -> int:
    """Return how many entries are True."""
    # NumPy counts bytes a dozen times faster than torch does on the CPU.
    return int(np.count_nonzero(mask.detach().numpy()) if _on_cpu(mask) else mask.sum())


@uncompiled
def count_alive(tensors: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Return how many entries of the tensors are other than zero where their mask is False; NaN is, -0.0 is not.

    The pairs are of one shape and one device, as in ``zero_pruned_``. No temporary is as large as a tensor, and a
    device is waited for once.
    """
    alive, waiting = 0, dict[torch.device, Tensor]()
    for tensor, mask in tensors:
        for values, kept in pieces(local(tensor).detach(), mask.detach()):
            if _on_cpu(values):
                alive += int(np.count_nonzero(_nonzero(values) > kept.numpy()))
            else:
                count = (values != 0).logical_and_(~kept).sum()
                waiting[count.device] = waiting.get(count.device, 0) + count
    return alive + sum(int(count) for count in waiting.values())


def _nonzero(values: Tensor) -> Any:
    """Where they are other than zero, by NumPy: several times faster than torch on what a cache holds."""
    values = values.resolve_conj().resolve_neg()
    if (
        values.is_floating_point() and values.element_size() == 2
    ):  # NumPy has no bfloat16; without the sign, as -0.0 is 0
        return (values.view(torch.int16).numpy() << 1) != 0
    return (values.float() if values.is_floating_point() and values.element_size() == 1 else values).numpy() != 0


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _as_integers(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same memory as integers, which times 0 are 0 and times 1 the same bits, unlike -1.0, infinity and NaN."""
    kept = mask if mask.dtype == torch.int8 else mask.view(torch.int8)
    if tensor.is_conj():
        tensor = tensor.conj()  # the same memory, and zero is its own conjugate
    integer = INTEGER_OF_SIZE.get(tensor.element_size())
    if integer is None:  # complex128
        tensor, kept = torch.view_as_real(tensor), kept.unsqueeze(-1).expand(*kept.shape, 2)
        integer = INTEGER_OF_SIZE[tensor.element_size()]
    return tensor.view(integer), kept


def _multiply_(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    parts: list[tuple[Tensor, Tensor]] = []
    for bits, kept in pairs:  # the mask is widened a piece at a time
        parts += [(bits, kept)] if bits.numel() <= PIECE else pieces(bits, kept)
    if sum(bits.numel() for bits, _ in pairs) < SHARED or not all(_on_cpu(bits) for bits, _ in pairs):
        if parts:  # one call for all: of small tensors the calls cost as much as the work
            torch._foreach_mul_([part for part, _ in parts], [stays for _, stays in parts])
        return
    in_shares(_multiply_by_numpy_, [(part.numpy(), stays.numpy()) for part, stays in parts], threads_of_torch())
    for bits, _ in pairs:
        bits.unsqueeze(0)[:0].zero_()  # writes nothing; autograd notices it


def _multiply_by_numpy_(parts: Iterable[tuple[Any, Any]]) -> None:
    for part, stays in parts:
        np.multiply(part, stays, out=part)


def pieces(values: Tensor, kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of both that a cache holds, whatever their strides."""
    most = PIECE if _on_cpu(values) else 64 * PIECE
    if values.numel() <= most:
        yield values, kept
        return
    if values.is_contiguous() and kept.is_contiguous():
        values, kept = values.view(-1), kept.view(-1)
    longest = max(range(values.dim()), key=values.shape.__getitem__)
    count = -(-values.numel() // most)
    for piece, of_mask in zip(values.chunk(count, longest), kept.chunk(count, longest), strict=True):
        yield from pieces(piece, of_mask)

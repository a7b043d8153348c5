"""How are the entries that a mask prunes counted and set to zero, at the speed of memory?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def zero_pruned_(tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set each tensor to +0.0 where its mask is False, at the speed of memory, whatever stands there.

    The pairs are of one shape and one device. Multiplying the numbers would keep the sign of zero and turn infinity
    into NaN; multiplying their bits, read as an integer, by 0 or 1 does neither.
    """
    for tensor, mask in tensors:
        tensor, kept = tensor.detach(), mask.view(torch.int8)
        if tensor.is_conj():
            tensor = tensor.conj()  # the same memory, and zero is its own conjugate
        if tensor.element_size() not in _INTEGER_OF_SIZE:  # complex128
            tensor, kept = torch.view_as_real(tensor), kept.unsqueeze(-1)
        tensor.view(_INTEGER_OF_SIZE[tensor.element_size()]).mul_(kept)


def count_kept(mask: Tensor) -> int:
    """How many entries are True."""
    # NumPy counts bytes a dozen times faster than torch does on the CPU.
    return int(np.count_nonzero(mask.detach().numpy()) if mask.device.type == "cpu" else mask.sum())


def count_alive(tensors: Iterable[tuple[Tensor, Tensor]]) -> int:
    """How many entries of the tensors are other than zero where their mask is False; NaN is, -0.0 is not.

    The pairs are of one shape and one device. No temporary is as large as a tensor, and a device is waited for once.
    """
    alive, waiting = 0, dict[torch.device, Tensor]()
    for tensor, mask in tensors:
        for values, kept in _pieces(tensor.detach(), mask):
            revived = (values != 0).logical_and_(~kept)
            if revived.device.type == "cpu":
                alive += count_kept(revived)
            else:
                waiting[revived.device] = waiting.get(revived.device, 0) + revived.sum()
    return alive + sum(int(count) for count in waiting.values())


def _pieces(values: Tensor, kept: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both that a cache holds, whatever their strides."""
    most = 2**17 if values.device.type == "cpu" else 2**24
    if values.numel() <= most:
        yield values, kept
        return
    if values.is_contiguous() and kept.is_contiguous():
        values, kept = values.view(-1), kept.view(-1)
    longest = max(range(values.dim()), key=values.shape.__getitem__)
    count = -(-values.numel() // most)
    for piece, of_mask in zip(values.chunk(count, longest), kept.chunk(count, longest), strict=True):
        yield from _pieces(piece, of_mask)

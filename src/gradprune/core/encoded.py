"""How many bytes does a tensor with zeros take, where its zeros are not stored, and how is that number read?"""

from __future__ import annotations

import math

from torch import Tensor


def bitmask_bytes(tensor: Tensor, nonzeros: int) -> int:
    """Return the bytes of one bit an entry and the nonzeros; of one dimension, the dense bytes."""
    if tensor.dim() < 2:
        return tensor.numel() * tensor.element_size()
    return bits_and_values(tensor.numel(), nonzeros, tensor.element_size())


def bits_and_values(entries: int, values: int, itemsize: int) -> int:
    """Return the bytes of one bit an entry, and of so many values."""
    return -(-entries // 8) + values * itemsize


def readable(size: int) -> str:
    """Return bytes with a prefix of 1000: 999 B, 1.00 kB, 12.3 MB."""
    if size < 1000:
        return f"{size} B"
    power = min(int(math.log10(size)) // 3, 4)
    value = size / 1000**power
    return f"{value:.{2 - min(int(math.log10(value)), 2)}f} {' kMGT'[power]}B"

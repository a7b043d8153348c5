"""Which integers compare as the values of a dtype do?

An IEEE number without its sign bit, read as an integer, grows with its magnitude; negating it where the sign bit was
set orders all numbers, makes the two zeros equal, and leaves every NaN beyond the infinities. One code then serves
every dtype.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

By = Literal["value", "magnitude"]

INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INFINITY = {  # its bits: the highest key of a number
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F80_0000,
    torch.float64: 0x7FF0_0000_0000_0000,
}
_PLAIN_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def compared_as(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype whose bits order well and which holds every value of `dtype` exactly."""
    if dtype in _INFINITY or dtype in _PLAIN_INTEGERS:
        return dtype
    if dtype.is_complex:  # by its modulus
        return dtype.to_real()
    if dtype.is_floating_point:
        return torch.float32  # eight-bit floats
    return torch.uint8 if dtype == torch.bool else torch.int64  # unsigned 16 and 32 bits


class Order(NamedTuple):
    """The order of one dtype's values, or of their magnitudes, told by integer keys."""

    dtype: torch.dtype  # what the values are compared as
    by: By

    @property
    def is_float(self) -> bool:
        """Whether the values are floating."""
        return self.dtype.is_floating_point

    @property
    def integer(self) -> torch.dtype:
        """The dtype of the keys."""
        return INTEGER_OF_SIZE[self.dtype.itemsize] if self.is_float else self.dtype

    @property
    def magnitude_bits(self) -> int:
        """All bits but the sign."""
        return int(torch.iinfo(self.integer).max)

    @property
    def highest(self) -> int:
        """The key of the largest value."""
        return _INFINITY[self.dtype] if self.is_float else int(torch.iinfo(self.dtype).max)

    @property
    def lowest(self) -> int:
        """The key of the smallest value."""
        if not self.is_float:
            return int(torch.iinfo(self.dtype).min)
        return 0 if self.by == "magnitude" else -self.highest

    @property
    def barred(self) -> int:
        """A key below all others, for entries that must not stay."""
        return self.lowest - 1

    def compared(self, values: Tensor) -> Tensor:
        """Return the values in the dtype in which they are compared; complex ones are their modulus."""
        if not values.is_complex():
            return values.to(self.dtype)
        # NaN where either part is: beside an infinity the modulus would lose it.
        return values.abs().masked_fill_(values.isnan(), math.nan).to(self.dtype)

    def keys(self, values: Tensor) -> Tensor:
        """Return the keys of values that are compared in this dtype, on their device."""
        if not self.is_float:
            return values
        bits = values.view(self.integer)
        magnitude = bits & self.magnitude_bits
        return magnitude if self.by == "magnitude" else torch.where(bits < 0, -magnitude, magnitude)

    def values(self, keys: Tensor) -> Tensor:
        """Return the values of keys, on their device; those one beyond the infinities are NaN."""
        if not self.is_float:
            return keys.to(self.dtype)
        size = keys.abs().to(self.integer).view(self.dtype)
        return torch.where(keys < 0, -size, size)

"""Which number of a dtype stands for a limit, so that comparing with it is comparing with the limit itself?"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BITS_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by the size of the floating numbers whose bits they read."""


def at_least(limit: float, dtype: torch.dtype) -> float:
    """Return the smallest number of a real floating dtype that is not below a limit of at least 0."""
    nearest = _nearest(limit, dtype)
    return float(neighbour(nearest, 1) if nearest.double() < limit else nearest)


def at_most(limit: float, dtype: torch.dtype) -> float:
    """Return the largest number of a real floating dtype that is not above a limit of at least 0."""
    nearest = _nearest(limit, dtype)
    return float(neighbour(nearest, -1) if nearest.double() > limit else nearest)


def neighbour(value: Tensor, way: Literal[1, -1]) -> Tensor:
    """Return the next larger or smaller number of the dtype; `value` is not negative. torch's own lacks half."""
    return (value.view(BITS_OF_SIZE[value.element_size()]) + way).view(value.dtype)


def _nearest(limit: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(limit, dtype=torch.float64, device="cpu").to(dtype)

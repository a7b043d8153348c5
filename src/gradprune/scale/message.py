"""How do the entries that one rank sends become bytes, and the bytes of all ranks entries again?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ZERO, FINITE, NOT_FINITE = 0, 1, 2
"""What a rank says of each parameter's gradient: all its entries are zero, or finite, or some are NaN or infinite."""


class Message(NamedTuple):
    """What ranks send: a word on each parameter, and the places in the bucket and the values of what was chosen.

    Of one rank; or of all, with a row for each.
    """

    words: Tensor
    places: Tensor
    values: Tensor

    def packed(self) -> Tensor:
        """The message as bytes, so that one collective carries all of it."""
        return torch.cat([part.contiguous().view(torch.uint8) for part in self])

    def unpacked(self, rows: Tensor) -> Message:
        """The messages of all ranks, from a row of bytes for each, which has this one's form."""
        sizes = [part.numel() * part.element_size() for part in self]
        # A copy starts where its dtype may start; a part of the row need not.
        parts = [
            part.clone(memory_format=torch.contiguous_format).view(own.dtype)
            for part, own in zip(rows.split(sizes, dim=1), self, strict=True)
        ]
        return Message(*parts)


def places_of(chosen: Tensor) -> Tensor:
    """Return the positions of what is True in a flat mask, in integers that are as short as they can be."""
    short = chosen.numel() <= torch.iinfo(torch.int32).max
    return chosen.nonzero().view(-1).to(torch.int32 if short else torch.int64)


def averaged(received: Message, entries: int, dtype: torch.dtype) -> Tensor:
    """Return the average over ranks of what they sent, flat, computed in this dtype.

    Added up rank by rank, in the same order on all of them: so all have the same bits.
    """
    total = torch.zeros(entries, dtype=dtype, device=received.values.device)
    for places, values in zip(received.places, received.values.to(dtype), strict=True):
        total.index_add_(0, places, values)
    return total.div_(len(received.places))

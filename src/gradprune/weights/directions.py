"""How does each row of a weight_norm's direction keep a weight (chapter 4)?

The layer divides by the norm of a row, so the network is NaN where one is emptied. The best weight of such a row stays
then, in place of the worst that its layer can spare.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradprune.core.layers import Weight


def rows_of(weight: Weight) -> int:
    """How many rows have a norm of their own; 0 where the weight is no direction."""
    if weight.direction is None:
        return 0
    return math.prod(size for axis, size in enumerate(weight.parameter.shape) if axis not in weight.direction)


def with_no_row_empty(
    weight: Weight, mask: Tensor, scores: Tensor, allowed: Tensor | None, *, in_place_of_others: bool
) -> Tensor:
    """Return a mask that leaves each row a weight other than zero, where that can be; of as many, if so asked.

    `scores` and `allowed`, which may stay, are of the mask's shape and device.
    """
    assert weight.direction is not None
    axes = [axis for axis in range(mask.dim()) if axis not in weight.direction] + list(weight.direction)

    def by_row(tensor: Tensor) -> Tensor:
        return tensor.permute(axes).reshape(rows_of(weight), -1)

    kept, nonzero = by_row(mask), by_row(weight.parameter.detach() != 0)
    empty = ~(kept & nonzero).any(1)
    if not bool(empty.any()):
        return mask
    wide = torch.float32 if mask.device.type == "mps" else torch.float64
    score = by_row(scores).to(wide).clamp(torch.finfo(wide).min, torch.finfo(wide).max)  # no score is infinite
    can_come = nonzero & ~kept & empty.unsqueeze(1)
    if allowed is not None:
        can_come &= by_row(allowed)
    come = _best_of_each(score, can_come)
    can_go = kept & ~_best_of_each(score, kept & nonzero)
    count = int(come.sum()) if in_place_of_others else 0
    if int(can_go.sum()) < count:
        return mask
    gone = score.masked_fill(~can_go, math.inf).flatten().argsort()[:count]
    changed = (kept | come).flatten().index_fill(0, gone, False)
    stored = torch.empty_like(mask)
    stored.permute(axes).copy_(changed.view([mask.shape[axis] for axis in axes]))
    return stored


def _best_of_each(score: Tensor, among: Tensor) -> Tensor:
    """True for the highest entry of each row, of those of a row that has any."""
    best = score.masked_fill(~among, -math.inf).argmax(1, keepdim=True)
    return torch.zeros_like(among).scatter_(1, best, among.any(1, keepdim=True))

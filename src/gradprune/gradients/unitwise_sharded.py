"""Bound the gradient of each unit where a unit's entries may be on several processes (chapter 2).

A block has rows, which are the units themselves or, where another axis than theirs is cut too, parts of them. Of such
parts the largest norm is found over all ranks first, then the sum of squares over it, so that no square leaves the
range. Units that lie on one rank are never sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradprune.core.checks import is_distributed, require
from gradprune.core.ranks import Ranks
from gradprune.core.sharded import Shard, local
from gradprune.gradients.params import with_gradient
from gradprune.gradients.unitwise import groups_of_transposed, norms_of_units, room_for_rounding

# By name this rank's block, and the groups of a transposed convolution, or 0.
Weights = Mapping[str, tuple[Tensor, int]]


class _Rows(NamedTuple):
    """The rows of a block, how many axes number them, and which unit each is, or is a part of."""

    gradient: Tensor
    weight: Tensor
    axes: int
    unit: Tensor
    units: int
    owned: bool


def weights_beside(params: Any) -> Weights:
    """Return what this rank holds of the weights whose gradients are clipped; TypeError where they lie otherwise."""
    groups = groups_of_transposed(params) if isinstance(params, nn.Module) else {}
    found = {}
    for name, p in with_gradient(params).items():
        if p.grad is not None and is_distributed(p) != is_distributed(p.grad):
            raise TypeError(f"of {name!r} either the weights or the gradient are a DTensor, wanted both or neither")
        if p.grad is not None and is_distributed(p) and p.placements != p.grad.placements:  # type: ignore[attr-defined]
            theirs, own = (", ".join(map(str, t.placements)) for t in (p.grad, p))  # type: ignore[attr-defined]
            raise TypeError(
                f"the gradient of {name!r} is a DTensor {theirs}, which is not supported where its weights are {own}"
            )
        found[name] = local(p).detach(), groups.get(id(p), 0)
    return found


def ratios_over_ranks(
    shards: Mapping[str, Shard], weights: Weights, ranks: Ranks, eps: float, *, precise: bool
) -> list[Tensor]:
    """Return for the rows of each block the norm of their unit's gradient over that of its weights, in float64."""
    every = [_rows(shard, *weights[name]) for name, shard in shards.items()]
    norms = [tuple(_norms(t, rows.axes, precise) for t in (rows.gradient, rows.weight)) for rows in every]
    parts = ranks.on_any(_in_parts(shard, rows) for shard, rows in zip(shards.values(), every, strict=True))
    split = [at for at, is_split in enumerate(parts) if is_split]
    whole: dict[int, tuple[Tensor, ...]] = {at: norms[at] for at in range(len(every)) if at not in split}
    whole |= zip(split, _joined([every[at] for at in split], [norms[at] for at in split], ranks), strict=True)
    found = []
    for at in range(len(every)):
        of_gradient, of_weight = whole[at]
        bounds = of_weight.where(of_weight.isfinite(), math.nan).clamp_(min=eps)  # a share of infinity bounds nothing
        found.append(of_gradient / bounds)
    return found


def scale_rows_(shards: Mapping[str, Shard], weights: Weights, ratios: Sequence[Tensor], factor: float) -> float:
    """Scale the rows of units that are over the factor, so that they are at it; return the least scale."""
    least = 1.0
    for (name, shard), ratio in zip(shards.items(), ratios, strict=True):
        over = ratio > factor
        if bool(over.any()):
            rows = _rows(shard, *weights[name])
            scale = torch.where(over, factor / ratio * (1 - room_for_rounding(shard.local.dtype)), 1.0)
            least = min(least, float((factor / ratio[over]).min()))
            wide = scale.to(shard.local.device, torch.promote_types(shard.local.dtype.to_real(), torch.float32))
            sizes = (*rows.gradient.shape[: rows.axes], *(1,) * (rows.gradient.ndim - rows.axes))
            rows.gradient.mul_(wide.view(sizes))
    return least


def units_over(
    shards: Mapping[str, Shard], weights: Weights, ratios: Sequence[Tensor], factor: float, ranks: Ranks
) -> tuple[int, int]:
    """Return how many units are over the factor, and how many there are."""
    over, total = [], 0
    for (name, shard), ratio in zip(shards.items(), ratios, strict=True):
        rows = _rows(shard, *weights[name])
        flags = torch.zeros(rows.units, dtype=torch.int64, device="cpu")
        flags[rows.unit[(ratio > factor).cpu()]] = 1
        over.append(flags)
        total += rows.units
    return int(ranks.most(torch.cat(over)).sum()) if over else 0, total


def _rows(shard: Shard, weight: Tensor, groups: int) -> _Rows:
    gradient, shape, start = shard.local, shard.shape, shard.offset
    if len(shape) < 2:
        return _Rows(gradient, weight, 0, torch.zeros(1, dtype=torch.int64, device="cpu"), 1, shard.owned)
    first = torch.arange(gradient.shape[0], device="cpu") + start[0]
    if not groups:
        return _Rows(gradient, weight, 1, first, shape[0], shard.owned)
    second = torch.arange(gradient.shape[1], device="cpu") + start[1]
    unit = (first // (shape[0] // groups) * shape[1]).unsqueeze(1) + second
    return _Rows(gradient, weight, 2, unit.view(-1), groups * shape[1], shard.owned)


def _in_parts(shard: Shard, rows: _Rows) -> bool:
    """Whether a row here is less than a unit."""
    if rows.axes == 2 or not rows.axes:
        return rows.axes == 2 or shard.local.shape != shard.shape
    return shard.local.shape[1:] != shard.shape[1:]


def _norms(block: Tensor, axes: int, precise: bool) -> Tensor:
    if not block.numel():
        return torch.zeros(block.shape[:axes].numel(), dtype=torch.float64, device="cpu")
    return norms_of_units([block], axes, precise).double().cpu()


def _joined(every: Sequence[_Rows], norms: Sequence[Sequence[Tensor]], ranks: Ranks) -> list[tuple[Tensor, ...]]:
    """The norms of the units of which each rank has parts, for each part; gradients' and weights'."""
    if not every:
        return []
    starts = [0]
    for rows in every:
        starts.append(starts[-1] + rows.units)
    unit = torch.cat([rows.unit + start for rows, start in zip(every, starts, strict=False)])
    counted = torch.cat([torch.full(rows.unit.shape, rows.owned, device="cpu") for rows in every])
    own = torch.stack([torch.cat([some[i] for some in norms]) for i in (0, 1)])
    own = own.where(~own.isnan(), math.inf)  # no maximum is taken of NaN
    index = unit.expand(2, -1)
    most = ranks.most(
        torch.zeros(2, starts[-1], dtype=torch.float64, device="cpu").scatter_reduce_(1, index, own, "amax")
    )
    over_most = (own / most.gather(1, index)).nan_to_num(nan=0.0).where(counted, 0.0)
    sums = ranks.sum(
        torch.zeros(2, starts[-1], dtype=torch.float64, device="cpu").scatter_add_(1, index, over_most.square())
    )
    whole = (most * sums.sqrt()).where(most.isfinite(), most).gather(1, index)
    return [tuple(part) for part in whole.split([len(rows.unit) for rows in every], dim=1)]


def require_finite_weights_over_ranks(weights: Weights, names: Sequence[str], ranks: Ranks) -> None:
    """Raise ValueError, on all ranks, for weights that are not finite on one."""
    not_finite = ranks.on_any(not bool(weights[name][0].isfinite().all()) for name in names)
    for name, wrong in zip(names, not_finite, strict=True):
        message = f"the weights of {name!r} are not finite, so no share of their norm can bound a gradient"
        require(not wrong, message)

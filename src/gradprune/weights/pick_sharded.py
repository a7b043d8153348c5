"""How are the largest chosen, and masks counted, of weights that are spread over several processes (chapter 9)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradprune.core import copies, select_sharded
from gradprune.core.checks import require
from gradprune.core.collect import Kept
from gradprune.core.layers import Weight
from gradprune.core.order import By
from gradprune.core.ranks import Ranks
from gradprune.core.select_sharded import Ranking
from gradprune.core.sharded import Shard
from gradprune.weights.granularity import Pick, Units, shape_of


def pick_over(shards: Mapping[str, Shard], ranks: Ranks) -> Pick:
    """Return how one process chooses, for all ranks together: of values, one a shard, that lie as the shards do."""
    counted: dict[int, tuple[Tensor, int]] = {}  # the masks last chosen, and what stays of each, by their identity

    def held(values: Mapping[str, Tensor]) -> dict[str, Shard]:
        return {name: shards[name]._replace(local=some) for name, some in values.items()}

    def keep(values: Mapping[str, Tensor], k: int, *, by: By, among: Sequence[Tensor] | None) -> Kept:
        counted.clear()  # of a choice that is made again the masks before need not be held
        return chosen([Ranking(held(values), k, among)], by)[0]

    def each(
        values: Mapping[str, Tensor], counts: Mapping[str, int], *, by: By, among: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        rankings = []
        for name, k in counts.items():
            allowed = among[name]
            rankings.append(Ranking(held({name: values[name]}), k, None if allowed is None else [allowed]))
        return {name: kept.masks[0] for name, kept in zip(counts, chosen(rankings, by), strict=True)}

    def chosen(rankings: Sequence[Ranking], by: By) -> list[Kept]:
        found = select_sharded.keep_each(rankings, ranks, by)
        for kept in found:
            counted.update((id(mask), (mask, number)) for mask, number in zip(kept.masks, kept.at_least, strict=True))
        return found

    def stay(masks: Mapping[str, Tensor]) -> dict[str, int]:
        known = {name: counted[id(mask)][1] for name, mask in masks.items() if id(mask) in counted}
        others = [name for name in masks if name not in known]
        if others:
            counts = copies.count([shards[name] for name in others], [masks[name] for name in others], ranks)
            known |= dict(zip(others, counts, strict=True))
        return {name: known[name] for name in masks}

    def check(values: Mapping[str, Tensor]) -> None:
        has_nan = ranks.on_any(bool(some.isnan().any()) for some in values.values())
        for name, wrong in zip(values, has_nan, strict=True):
            require(not wrong, f"the score of {name!r} contains NaN")

    def nearest(
        values: Mapping[str, Tensor], costs: Mapping[str, int], wanted: int, *, by: By, among: Sequence[Tensor] | None
    ) -> int:
        """What ``granularity.nearest`` finds, by halving: the highest units hold the more weights the more they are."""

        def weights(k: int) -> int:
            counts = keep(values, k, by=by, among=among).at_least
            return sum(count * costs[name] for name, count in zip(values, counts, strict=True))

        most = sum(shards[name].numel for name in values)
        if among is not None:
            most = sum(stay(dict(zip(values, among, strict=True))).values())
        low, high = 0, most
        if len(set(costs.values())) == 1:
            low = high = min(most, wanted // max(1, *costs.values()))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if weights(middle) <= wanted else (low, middle - 1)
        if low < most and weights(low + 1) - wanted < wanted - weights(low):
            low += 1
        return low

    def least(numbers: Tensor) -> int:
        own = int(numbers.min()) if numbers.numel() else 2**62
        smallest = -int(ranks.most(torch.tensor([-own], dtype=torch.int64, device="cpu")))
        return smallest if smallest < 2**62 else 0

    return Pick(keep, each, stay, check, nearest, least, ranks.sum, ranks.most, lambda name: shards[name].owned)


def unit_shards(units: Units, shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """Return the shards of a layer's units, one entry a unit, where each rank has whole units."""
    found = {}
    for name, shard in shards.items():
        weight, tile = units.layers[name], units.tile(name)
        shape, offset = shape_of(weight), _offset(weight, shard)
        grid, place = (tuple(x // t for x, t in zip(some, tile, strict=False)) for some in (shape, offset))
        found[name] = shard._replace(shape=grid, offset=place)
    return found


def require_whole_units(
    units: Units, n_of_m: tuple[int, int] | None, *, rows: bool, shards: Mapping[str, Shard], ranks: Ranks
) -> None:
    """Raise ValueError on all ranks where a rank has only a part of what goes or stays together, naming the weight."""
    cut = []
    for name, shard in shards.items():
        weight = units.layers[name]
        sizes = shape_of(weight)
        if rows or n_of_m is not None:
            assert weight.axes is not None
            depth = weight.axes.depth
            whole = sizes[depth + 1 :] if rows else (n_of_m[1], *(1 for _ in sizes[depth + 2 :])) if n_of_m else ()
            unit = (1,) * (depth + 1) + tuple(whole)
        else:
            tile = units.tile(name)
            unit = tile + tuple(sizes[len(tile) :])
        here = shape_of(units.held(name)) if len(shard.holders) > 1 else sizes
        ends = zip(unit, _offset(weight, shard), here, strict=True)
        in_groups = weight.axes is not None and weight.axes.groups > 1 and len(shard.holders) > 1
        cut.append(in_groups or any(start % max(1, u) or size % max(1, u) for u, start, size in ends))
    what = "rows" if rows else f"groups of {n_of_m[1]}" if n_of_m is not None else "channels or blocks"
    for name, wrong in zip(shards, ranks.on_any(cut), strict=True):
        require(
            not wrong,
            f"{what} of {name!r} are cut by its shards, so that no rank has whole ones: shard it along another axis or "
            "in other sizes, exclude it, or prune before you shard",
        )


def _offset(weight: Weight, shard: Shard) -> tuple[int, ...]:
    """Where a block begins, in the canonical order; only of one that is the whole where that order splits an axis."""
    axes, sizes = weight.axes, len(shard.offset)
    assert axes is not None
    if axes.groups > 1:
        return (0,) * (sizes + 1)
    first = [*axes.stack, axes.output, axes.input]
    return tuple(shard.offset[axis] for axis in [*first, *(a for a in range(sizes) if a not in first)])

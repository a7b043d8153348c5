"""Set small entries of gradients to zero that are spread over several processes, as one process would (chapter 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gradprune.core import select_sharded
from gradprune.core.masked import zero_pruned_
from gradprune.core.ranks import Ranks
from gradprune.core.sharded import Shard
from gradprune.gradients.nonfinite import NonFinite, known, warn_of_zeroed
from gradprune.gradients.sparsify import Scope, magnitudes, number_kept, require_finite, require_numbers, zero_below_
from gradprune.gradients.spread import Read, largest_over_ranks, spread


def threshold_over_ranks_(params: Read, nonfinite: NonFinite, check: Callable[[], tuple[str, float]]) -> float:
    """Do what ``threshold_gradients_`` does, on all ranks together; `check` returns which argument was given."""
    (name, amount), shards, ranks, most, done = _settled(params, nonfinite, check)
    if done is not None:
        return done
    cuts = (
        [amount] * len(shards)
        if name == "threshold"
        else [amount * mean for mean in means_over_ranks(shards, most, ranks)]
    )
    kept = 0
    for shard, cut in zip(shards.values(), cuts, strict=True):
        here = zero_below_(shard.local, cut)
        kept += here if shard.owned else 0
    return _share(ranks.add(kept), shards)


def keep_top_over_ranks_(params: Read, nonfinite: NonFinite, check: Callable[[], tuple[float, Scope]]) -> float:
    """Do what ``keep_top_gradients_`` does, on all ranks together."""
    (density, scope), shards, ranks, _, done = _settled(params, nonfinite, check)
    if done is not None:
        return done
    masks, kept = largest_of_all(shards, ranks, density, scope)
    zero_pruned_((shard.local, mask) for shard, mask in zip(shards.values(), masks, strict=True))
    return _share(kept, shards)


def largest_of_all(
    shards: Mapping[str, Shard], ranks: Ranks, density: float, scope: Scope
) -> tuple[list[torch.Tensor], int]:
    """Return this rank's blocks of masks that are True for the largest magnitudes, and how many entries stay."""
    groups = [shards] if scope == "global" else [{name: shard} for name, shard in shards.items()]
    sizes = [sum(shard.numel for shard in group.values()) for group in groups]
    asked = [select_sharded.Ranking(g, number_kept(density, size)) for g, size in zip(groups, sizes, strict=True)]
    found = select_sharded.keep_each(asked, ranks)
    return [mask for kept in found for mask in kept.masks], sum(n for kept in found for n in kept.at_least)


class _Settled(NamedTuple):
    """What was asked of which gradients, once what is not finite was dealt with."""

    asked: Any
    shards: dict[str, Shard]
    ranks: Ranks
    most: list[float]  # the largest magnitude of each whole
    done: float | None  # the share kept, where nothing is left to do


def _settled(params: Read, nonfinite: NonFinite, check: Callable[[], Any]) -> _Settled:
    given, shards, ranks = spread(params, lambda: {"amount": check(), "nonfinite": known(nonfinite)}, require_numbers)
    largest = largest_over_ranks(list(shards.values()), ranks)
    wrong = [name for name, most in zip(shards, largest, strict=True) if not most < float("inf")]
    require_finite(wrong, nonfinite)
    if not wrong or nonfinite == "leave":
        return _Settled(given["amount"], shards, ranks, largest, 1.0 if wrong else None)
    warn_of_zeroed(wrong[0], nonfinite, "Find out where it comes from")
    for name in wrong if nonfinite == "zero" else shards:
        shards[name].local.zero_()
    most = [0.0 if name in wrong else most for name, most in zip(shards, largest, strict=True)]
    return _Settled(given["amount"], shards, ranks, most, None if nonfinite == "zero" else 0.0)


def means_over_ranks(shards: Mapping[str, Shard], most: Sequence[float], ranks: Ranks) -> list[float]:
    """Return the mean magnitude of each whole, summed in float64, never above the largest."""
    own = [magnitudes(shard.local) if shard.owned else 0.0 for shard in shards.values()]
    sums = ranks.sum(torch.tensor(own, dtype=torch.float64, device="cpu")).tolist()
    return [min(s / max(1, shard.numel), m) for s, shard, m in zip(sums, shards.values(), most, strict=True)]


def _share(kept: int, shards: Mapping[str, Shard]) -> float:
    total = sum(shard.numel for shard in shards.values())
    return kept / total if total else 1.0

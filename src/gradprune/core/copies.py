"""Where several ranks hold a copy of one block, who counts it, and whose mask is it?

The lowest of them counts. Copies may differ in their last bits: then the lowest rank's mask is sent to the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradprune.core.masked import count_kept
from gradprune.core.ranks import Ranks
from gradprune.core.sharded import Shard, digest


def count(shards: Iterable[Shard], masks: Iterable[Tensor], ranks: Ranks) -> list[int]:
    """Return how many entries of each whole mask are True."""
    own = [count_kept(m) if s.owned else 0 for s, m in zip(shards, masks, strict=True)]
    return ranks.sum(torch.tensor(own, dtype=torch.int64, device="cpu")).tolist()


def let_owners_decide_(shards: Sequence[Shard], masks: Sequence[Tensor], ranks: Ranks) -> None:
    """Give the copies of a block the mask of the lowest rank that holds it; they may differ in their last bits."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    copied = [at for at, shard in enumerate(shards) if any(len(holders) > 1 for holders in shard.holders)]
    if not copied:
        return
    mine = {str(at): masks[at] for at in copied if any(rank in h and len(h) > 1 for h in shards[at].holders)}
    hashes: list[Any] = [None] * size
    torch.distributed.all_gather_object(hashes, digest(mine))
    if all(hashes[h[0]] == hashes[other] for at in copied for h in shards[at].holders for other in h):
        return
    told: list[Any] = [None] * size
    torch.distributed.all_gather_object(told, [(tuple(masks[at].shape), digest({"": masks[at]})) for at in copied])
    for i, at in enumerate(copied):
        for owner, *others in shards[at].holders:
            shape, _ = told[owner][i]
            if any(told[other][i] != told[owner][i] for other in others):
                here = rank == owner or rank in others
                decided = ranks.mask_of(
                    masks[at] if here else torch.zeros(shape, dtype=torch.bool, device="cpu"), owner
                )
                if here:
                    masks[at].copy_(decided)

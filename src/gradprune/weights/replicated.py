"""How do processes that hold a copy of one model each (DistributedDataParallel) get one and the same mask (chapter 9)?

Scores that differ between ranks, as those of each rank's own batches do, are averaged over them; those of
``gp.random`` are the first rank's. The masks are compared by a hash, and where the copies of the weights differ in
their last bits, and the masks with them, the first rank's masks are sent to all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gradprune.core.agree import agree, equal_on_all, meet
from gradprune.core.ranks import Ranks
from gradprune.core.sharded import digest
from gradprune.weights.mask import Masks
from gradprune.weights.request import Score, checked_score
from gradprune.weights.score import magnitude, random


def decided(
    called: str,
    ranks: Ranks,
    score: Score,
    choose: Callable[[Score], Masks],
    asked: Callable[[], Mapping[str, object]],
) -> Masks:
    """Return masks that are the same on all ranks; what is wrong on one of them, or is asked otherwise, all raise.

    `choose` returns this rank's masks by a score, which it gets as one over all ranks; `asked` returns what all ranks
    must ask alike.
    """
    meet(called, ranks.group)

    def each() -> tuple[Masks, Mapping[str, object], str]:
        masks = choose(over_ranks(score, ranks, called))
        return masks, asked(), digest(masks)

    masks, told = agree(called, each, ranks.group)
    if not equal_on_all(told):
        return Masks({name: ranks.mask_of(mask, ranks.source).to(mask.device) for name, mask in masks.items()})
    return masks


def over_ranks(score: Score, ranks: Ranks, called: str) -> Score:
    """Return a score that is the same on all ranks: the mean over them where it differs, of chance the first's."""
    if checked_score(score) is magnitude:
        return score
    by_chance = getattr(score, "func", score) is random

    def of_all(model: nn.Module) -> Mapping[str, Tensor]:
        def own() -> tuple[Mapping[str, Tensor], Mapping[str, object], str]:
            found = score(model)
            if not isinstance(found, Mapping) or not all(isinstance(s, Tensor) for s in found.values()):
                return found, {}, ""  # whoever asked for it says what is wrong
            return found, {repr(n): (tuple(s.shape), s.dtype) for n, s in found.items()}, digest(found)

        found, told = agree(called, own, ranks.group, what="the score of {}")
        if equal_on_all(told):
            return found
        return {name: _first(s, ranks) if by_chance else _mean(s, ranks) for name, s in found.items()}

    return functools.wraps(score)(of_all)


def _first(values: Tensor, ranks: Ranks) -> Tensor:
    return ranks.first(values.detach()).to(values.device)


def _mean(values: Tensor, ranks: Ranks) -> Tensor:
    exact = torch.float64 if not values.dtype.is_floating_point else torch.promote_types(values.dtype, torch.float32)
    total = values.detach().to(ranks.device, exact, copy=True)
    torch.distributed.all_reduce(total, group=ranks.group)
    return (total / torch.distributed.get_world_size(ranks.group)).to(values.device)

"""Do all processes that hold a copy of one model (DistributedDataParallel) do the same to it, with the same masks?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from gradprune.core.agree import agree, meet
from gradprune.core.ranks import Ranks
from gradprune.core.sharded import digest

T = TypeVar("T")


def replicas_of(model: object) -> Ranks | None:
    """Return the ranks among which DistributedDataParallel replicates a model; None where it is one process's own."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not started or not isinstance(model, nn.Module):
        return None
    found = next((m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    if found is None or torch.distributed.get_world_size(found.process_group) == 1:
        return None
    return Ranks(next(found.parameters()).device, found.process_group)


def alike(called: str, ranks: Ranks | None, asked: Callable[[], Mapping[str, object]], work: Callable[[], T]) -> T:
    """Do what each rank does by itself; raise on all what is wrong on one, and where they ask for different things."""
    if ranks is None or not torch.distributed.is_initialized():
        return work()
    meet(called, ranks.group)
    result, _ = agree(called, lambda: (work(), asked(), None), ranks.group)
    return result


def by_hash(masks: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the masks as what all ranks must have alike."""
    return {"masks (by their hash)": digest(masks)}

"""What are the gradients of the mean loss over all replicas (DistributedDataParallel), without a backward pass?"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gradprune.core.agree import agree, meet
from gradprune.core.ranks import Ranks


def mean_over_replicas(
    called: str, ranks: Ranks, parameters: Mapping[str, Tensor], gradients: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the mean over the ranks of the gradients, by name, as DistributedDataParallel takes it in its backward.

    `gradients` returns this rank's own; what it raises on one rank all raise. One that only some ranks have is zero on
    the others.
    """
    meet(called, ranks.group)

    def each() -> tuple[Mapping[str, Tensor], dict[str, object], list[str]]:
        found = gradients()
        return found, {}, list(found)

    own, told = agree(called, each, ranks.group)
    mean = {}
    for name in (name for name in parameters if any(name in names for names in told)):
        gradient = own[name].to_dense() if name in own else torch.zeros_like(parameters[name])
        mean[name] = gradient.detach() / len(told)
        torch.distributed.all_reduce(mean[name], group=ranks.group)
    return mean

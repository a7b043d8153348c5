"""What is pruned already when a pruner begins (chapter 5)?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradprune.core.checks import require, warn
from gradprune.core.masked import count_kept
from gradprune.weights.hold import held_mask
from gradprune.weights.mask import Masks


def masks_before(layers: Mapping[str, nn.Parameter], within: Mapping[str, Tensor] | None) -> Masks:
    """Return what may stay: by `within`, or all but what is held at zero or is zero in a layer that has others."""
    if within is not None:
        if not isinstance(within, Mapping):
            raise TypeError(f"`within` must be masks by name, as prune returns them, got {type(within).__name__}")
        whole_layers = {name: torch.ones(p.shape, dtype=torch.bool, device=p.device) for name, p in layers.items()}
        for name, mask in within.items():
            require(name in layers, f"`within` names {name!r}, which is not among {list(layers)}")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise TypeError(f"`within` must hold bool tensors; that of {name!r} is {type(mask).__name__}")
            shapes = tuple(mask.shape), tuple(layers[name].shape)
            require(shapes[0] == shapes[1], f"`within` has shape {shapes[0]} for {name!r}, the parameter {shapes[1]}")
            whole_layers[name] = mask.to(layers[name].device)
        return Masks(whole_layers)
    masks, zeros = {}, 0
    for name, p in layers.items():
        held = held_mask(p)
        nonzero = p.detach() != 0 if held is None else held.clone()
        kept = count_kept(nonzero)
        masks[name] = nonzero if kept else torch.ones_like(nonzero)
        zeros += p.numel() - kept if held is None and kept else 0
    if zeros:
        warn(
            f"{zeros} weights of the model are zero already and are taken as pruned: they stay zero. "
            "within={} lets them move"
        )
    return Masks(masks)

"""What is pruned already when a pruner begins (chapter 5)?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from gradprune.core.checks import require, warn
from gradprune.core.sharded import layout, local
from gradprune.weights.granularity import stay_each
from gradprune.weights.hold import held_mask


def stated_before(layers: Mapping[str, nn.Parameter], within: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what may stay by `within`, and all of the layers that it does not name: what is held here of each mask."""
    if not isinstance(within, Mapping):
        raise TypeError(f"`within` must be masks by name, as prune returns them, got {type(within).__name__}")
    masks = {name: torch.ones_like(local(p), dtype=torch.bool) for name, p in layers.items()}
    for name, mask in within.items():
        require(name in layers, f"`within` names {name!r}, which is not among {list(layers)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"`within` must hold bool tensors; that of {name!r} is {type(mask).__name__}")
        shapes = tuple(mask.shape), tuple(layers[name].shape)
        require(shapes[0] == shapes[1], f"`within` has shape {shapes[0]} for {name!r}, the parameter {shapes[1]}")
        own, wanted = layout(mask), layout(layers[name])
        require(own == wanted, f"`within` lies as {own} for {name!r}, the parameter as {wanted}: shard both alike")
        masks[name] = local(mask).to(layers[name].device)
    return masks


def found_before(
    layers: Mapping[str, nn.Parameter],
    stay: Callable[[Mapping[str, Tensor]], dict[str, int]] = stay_each,
    on_any: Callable[[Iterable[bool]], list[bool]] = list,
) -> dict[str, Tensor]:
    """Return all but what is held at zero or is zero in a layer that has others: what is held here of each mask.

    `stay` counts the entries of masks that are True, `on_any` says which flags are set on any rank.
    """
    holding = on_any(held_mask(p) is not None for p in layers.values())
    pairs = zip(layers.items(), holding, strict=True)
    held = {name: held_mask(p, whole=True) if anywhere else None for (name, p), anywhere in pairs}
    nonzero = {}
    for name, p in layers.items():
        mask = held[name]
        nonzero[name] = local(p).detach() != 0 if mask is None else mask.clone()
    kept = stay(nonzero)
    zeros = sum(p.numel() - kept[name] for name, p in layers.items() if held[name] is None and kept[name])
    if zeros:
        warn(
            f"{zeros} weights of the model are zero already and are taken as pruned: they stay zero. "
            "within={} lets them move"
        )
    return {name: mask if kept[name] else torch.ones_like(mask) for name, mask in nonzero.items()}

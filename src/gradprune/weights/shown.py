"""How many weights stay, in all and layer by layer, in a few lines?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

MOST = 12  # layers that are shown


def weights_among(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of two dimensions or more, not the biases and norms that go with a channel; all where there are none."""
    return {name: mask for name, mask in masks.items() if mask.dim() > 1} or dict(masks)


def in_all(masks: Mapping[str, Tensor], kept_of: Mapping[str, int]) -> str:
    """The number of tensors and weights, and the share that is pruned, by how many of each stay."""
    counted = weights_among(masks)
    total = sum(mask.numel() for mask in counted.values())
    kept = sum(kept_of[name] for name in counted)
    return f"{len(masks)} tensors, {total:,} weights, sparsity {1 - kept / total if total else 0.0:.4f}"


def by_layer(masks: Mapping[str, Tensor], kept_of: Mapping[str, int]) -> str:
    """A line for each of the first layers: how many of its weights stay."""
    lines = [f"{name}: {kept_of[name]:,} of {masks[name].numel():,} stay" for name in list(masks)[:MOST]]
    if len(masks) > MOST:
        lines.append(f"... and {len(masks) - MOST} more")
    return "".join(f"\n  {line}" for line in lines)

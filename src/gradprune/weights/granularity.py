"""What goes or stays together: single weights, n of every m, channels, blocks (chapter 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradprune.core.checks import require
from gradprune.core.masked import count_kept
from gradprune.core.order import By

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)

Granularity = Literal["weight", "channel"] | str | tuple[int, ...]


class Ranked(NamedTuple):
    """One tensor of scores a layer; weights themselves, ranked by magnitude, are spared a copy."""

    values: dict[str, Tensor]
    by: By = "value"

    def scores(self) -> dict[str, Tensor]:
        """What is ranked, a copy where weights are ranked by magnitude."""
        return {name: v.abs() if self.by == "magnitude" else v for name, v in self.values.items()}


class Units(NamedTuple):
    """What goes or stays together: single weights, or the tiles of a block shape (a channel is the tile (1,))."""

    layers: Mapping[str, nn.Parameter]
    block: tuple[int, ...] | None
    within: Mapping[str, Tensor] | None

    def cost(self, name: str) -> int:
        """Weights in one unit."""
        if self.block is None:
            return 1
        return math.prod(self.block) * math.prod(self.layers[name].shape[len(self.block) :])

    def number(self, name: str) -> int:
        """Units in the layer."""
        return self.layers[name].numel() // self.cost(name)

    def allowed(self, name: str) -> Tensor | None:
        """Which units may stay; None where all may."""
        if self.within is None:
            return None
        return self.within[name] if self.block is None else _over_tiles(self.within[name], self.block).any(dim=-1)

    def available(self, name: str) -> int:
        """Units that may stay."""
        allowed = self.allowed(name)
        return self.number(name) if allowed is None else count_kept(allowed)

    def rank(self, ranked: Ranked) -> Ranked:
        """The units' own scores: the mean over their weights'."""
        if self.block is None:
            return ranked
        means = {}
        for name, values in ranked.values.items():
            tiles = _over_tiles(values, self.block)
            tiles = tiles.abs() if ranked.by == "magnitude" else tiles
            means[name] = tiles.mean(dim=-1, dtype=torch.promote_types(tiles.dtype, torch.float32))
        return Ranked(means)

    def expand(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks over units as masks over weights."""
        if self.block is None:
            return dict(masks)
        return {name: _repeat_tiles(mask, self.block, self.layers[name].shape) for name, mask in masks.items()}


def _over_tiles(values: Tensor, block: tuple[int, ...]) -> Tensor:
    """One row for each tile, its entries along the last dimension."""
    split = [n for size, b in zip(values.shape, block, strict=False) for n in (size // b, b)]
    tiled = values.reshape(*split, -1)
    outer, inner = range(0, 2 * len(block), 2), range(1, 2 * len(block) + 1, 2)
    return tiled.permute(*outer, *inner, tiled.dim() - 1).flatten(len(block))


def _repeat_tiles(mask: Tensor, block: tuple[int, ...], shape: torch.Size) -> Tensor:
    for dim, b in enumerate(block):
        mask = mask.repeat_interleave(b, dim)
    rest = (1,) * (len(shape) - len(block))
    return mask.view(*mask.shape, *rest).expand(shape).contiguous()


def parse_granularity(granularity: Granularity) -> tuple[tuple[int, int] | None, tuple[int, ...] | None]:
    """What it means: n of m, or a block; neither for single weights."""
    if granularity == "weight":
        return None, None
    if granularity == "channel":
        return None, (1,)
    numbers: tuple[Any, ...] = ()
    n_of_m = False
    if isinstance(granularity, str):
        n_of_m = ":" in granularity
        numbers = tuple(int(x) if x.isdecimal() else x for x in granularity.split(":" if n_of_m else "x"))
    elif isinstance(granularity, tuple):
        numbers = granularity
        n_of_m = len(numbers) == 2 and all(isinstance(x, int) for x in numbers) and 0 < numbers[0] < numbers[1]
    whole = bool(numbers) and all(isinstance(x, int) and x > 0 for x in numbers)
    if not whole or (n_of_m and (len(numbers) != 2 or numbers[0] > numbers[1])):
        raise ValueError(
            'granularity must be "weight", "channel", (n, m) or "n:m" with n <= m, or a block shape such as (16, 16) '
            f'or "1x4"; got {granularity!r}'
        )
    return ((numbers[0], numbers[1]), None) if n_of_m else (None, numbers)


def check_divides(
    layers: Mapping[str, nn.Parameter], n_of_m: tuple[int, int] | None, block: tuple[int, ...] | None
) -> None:
    """Raise ValueError where a layer has a dimension that m, or the block, does not divide."""
    sizes = (1, n_of_m[1]) if n_of_m is not None else block or ()
    for name, p in layers.items():
        require(
            len(sizes) <= p.dim(), f"a block of shape {sizes} does not fit {name!r}, which has shape {tuple(p.shape)}"
        )
        for dim, (size, b) in enumerate(zip(p.shape, sizes, strict=False)):
            require(
                size % b == 0,
                f"{name!r} has {size} entries along dimension {dim}, not a multiple of {b}; exclude it, or choose a "
                f"granularity that divides its shape {tuple(p.shape)}",
            )


def check_channels(model: nn.Module, layers: Mapping[str, nn.Parameter], granularity: Granularity) -> None:
    """Raise ValueError where the rows of a parameter are no output units, and units are what is to go.

    A gate's rows are a part of each unit of a recurrent layer, the rest of which is in the other gates and the other
    matrix; an attention layer's queries, keys and values act only together.
    """
    if granularity != "channel":
        return
    names = {id(p): name for name, p in layers.items()}
    for module in model.modules():
        for own, p in module.named_parameters(recurse=False):
            if id(p) not in names:
                continue
            if isinstance(module, _RECURRENT) and own.startswith(("weight_ih", "weight_hh")):
                raise ValueError(
                    f"a row of {names[id(p)]!r} is no unit: each unit of a recurrent layer is spread over the rows of "
                    "all its gates in weight_ih and in weight_hh. Exclude both, or prune single weights"
                )
            if isinstance(module, nn.MultiheadAttention) and own == "in_proj_weight":
                raise ValueError(
                    f"a row of {names[id(p)]!r} is no unit: it packs the queries, keys and values of all heads. "
                    f"Exclude it, or take the granularity ({module.head_dim},), with which the queries, the keys or "
                    "the values of one head go as a whole"
                )

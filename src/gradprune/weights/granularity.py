"""What goes or stays together: single weights, n of every m, channels, blocks (chapter 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.checks import require
from gradprune.core.collect import Kept
from gradprune.core.layers import Axes, Weight
from gradprune.core.masked import count_kept
from gradprune.core.order import By
from gradprune.core.select import keep_and_count
from gradprune.core.sharded import local
from gradprune.weights.lamp import of_one

Granularity = Literal["weight", "channel"] | str | tuple[int, ...]


class Ranked(NamedTuple):
    """One tensor of scores a layer; weights themselves, ranked by magnitude, are spared a copy."""

    values: dict[str, Tensor]
    by: By = "value"

    def scores(self) -> dict[str, Tensor]:
        """What is ranked, a copy where weights are ranked by magnitude."""
        return {name: v.abs() if self.by == "magnitude" else v for name, v in self.values.items()}


def keep_each(
    values: Mapping[str, Tensor], counts: Mapping[str, int], *, by: By, among: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Return the masks of the largest of each tensor by itself."""
    found = {}
    for name, count in counts.items():
        allowed = among[name]
        one = None if allowed is None else [allowed]
        found[name] = keep_and_count({name: values[name]}, count, by=by, among=one).masks[0]
    return found


def stay_each(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many entries of each mask are True."""
    return {name: count_kept(mask) for name, mask in masks.items()}


def require_no_nan(scores: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a score is NaN."""
    for name, values in scores.items():
        require(not bool(values.isnan().any()), f"the score of {name!r} contains NaN")


def nearest(
    values: Mapping[str, Tensor], costs: Mapping[str, int], wanted: int, *, by: By, among: Sequence[Tensor] | None
) -> int:
    """Return how many of the highest units hold the number of weights nearest to `wanted`; the fewer among equals."""
    assert by == "value"
    flat = torch.cat([v.reshape(-1).cpu() for v in values.values()])
    cost = torch.cat([torch.full((v.numel(),), costs[name], device="cpu") for name, v in values.items()])
    if among is not None:
        allowed = torch.cat([a.reshape(-1).cpu() for a in among])
        flat, cost = flat[allowed], cost[allowed]
    held = cost[flat.sort(stable=True).indices.flip(0)].cumsum(0)
    distances = (torch.cat([torch.zeros(1, dtype=held.dtype, device="cpu"), held]) - wanted).abs()
    return int(distances.argmin())


def least_of(numbers: Tensor) -> int:
    """Return the smallest number; 0 where there is none."""
    return int(numbers.min()) if numbers.numel() else 0


class Pick(NamedTuple):
    """How the largest are chosen by name, and what is counted for it: in one process, or over several.

    How many entries of masks stay, that no score is NaN, how many units are nearest to a number of weights, and which
    number of all is the smallest. For other choices: the sum of numbers over all processes, the largest, and whether it
    is this process that counts what it holds of a parameter.
    """

    keep: Callable[..., Kept] = keep_and_count
    each: Callable[..., dict[str, Tensor]] = keep_each
    stay: Callable[[Mapping[str, Tensor]], dict[str, int]] = stay_each
    check: Callable[[Mapping[str, Tensor]], None] = require_no_nan
    nearest: Callable[..., int] = nearest
    least: Callable[[Tensor], int] = least_of
    total: Callable[[Tensor], Tensor] = of_one
    most: Callable[[Tensor], Tensor] = of_one
    counts: Callable[[str], bool] = lambda name: True


ONE_PROCESS = Pick()


class Units(NamedTuple):
    """What goes or stays together: single weights, or the tiles of a block shape (a channel is the tile (1,)).

    A block lies over the output axis, the input axis and the further ones, in this order, whatever the storage's.
    Where weights are spread over several processes, scores and masks are those of what is held here.
    """

    layers: Mapping[str, Weight]
    block: tuple[int, ...] | None
    within: Mapping[str, Tensor] | None
    pick: Pick = ONE_PROCESS

    def held(self, name: str) -> Weight:
        """The weight, with what this process has of it."""
        weight = self.layers[name]
        return weight._replace(parameter=cast(nn.Parameter, local(weight.parameter)))

    def cost(self, name: str) -> int:
        """Weights in one unit."""
        if self.block is None:
            return 1
        shape, tile = shape_of(self.layers[name]), self.tile(name)
        return math.prod(tile) * math.prod(shape[len(tile) :])

    def number(self, name: str) -> int:
        """Units in the layer."""
        cost = self.cost(name)
        return self.layers[name].parameter.numel() // cost if cost else 0

    def weights(self, name: str) -> int:
        """Weights in all units of the layer."""
        return self.number(name) * self.cost(name)

    def stay(self, name: str, sparsity: float) -> int:
        """How many units ``prune`` leaves."""
        weights = self.layers[name].parameter.numel()
        return round((weights - round(sparsity * weights)) / max(self.cost(name), 1))

    def allowed(self, name: str) -> Tensor | None:
        """Which units may stay; None where all may."""
        if self.within is None or self.block is None:
            return None if self.within is None else self.within[name]
        return _over_tiles(canonical(self.layers[name], self.within[name]), self.tile(name)).any(dim=-1)

    def available(self, name: str) -> int:
        """Units that may stay."""
        allowed = self.allowed(name)
        return self.number(name) if allowed is None else self.pick.stay({name: allowed})[name]

    def rank(self, ranked: Ranked) -> Ranked:
        """The units' own scores: the mean over their weights'."""
        if self.block is None:
            return ranked
        means = {}
        for name, values in ranked.values.items():
            tiles = _over_tiles(canonical(self.layers[name], values), self.tile(name))
            tiles = tiles.abs() if ranked.by == "magnitude" else tiles
            wide = torch.promote_types(tiles.dtype, torch.float32)
            means[name] = tiles.mean(dim=-1, dtype=wide) if tiles.numel() else tiles.sum(dim=-1, dtype=wide)
        return Ranked(means)

    def expand(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks over units as masks over weights."""
        if self.block is None:
            return dict(masks)
        found = {}
        for name, mask in masks.items():
            held = self.held(name)
            found[name] = as_stored(held, _repeat_tiles(mask, self.tile(name), shape_of(held)))
            if self.within is not None:  # a unit may stay of which a part is gone
                found[name] &= self.within[name]
        return found

    def tile(self, name: str) -> tuple[int, ...]:
        """The sizes of a unit along the first axes of the canonical order; along the others it has all."""
        return (1,) * _axes(self.layers[name]).depth + (self.block or ())


def canonical(weight: Weight, tensor: Tensor) -> Tensor:
    """Return a view of a tensor of the weight's shape as (stack..., output, input, rest...)."""
    return _axes(weight).canonical(tensor.detach())


def shape_of(weight: Weight) -> torch.Size:
    """Return the weight's shape in the canonical order."""
    return canonical(weight, torch.empty(weight.parameter.shape, device="meta")).shape


def as_stored(weight: Weight, mask: Tensor) -> Tensor:
    """Return a mask of the canonical shape in the order in which the weight is stored."""
    stored = torch.empty(weight.parameter.shape, dtype=torch.bool, device=mask.device)
    canonical(weight, stored).copy_(mask)
    return stored


def _axes(weight: Weight) -> Axes:
    assert weight.axes is not None  # see check_fits
    return weight.axes


def _over_tiles(values: Tensor, block: tuple[int, ...]) -> Tensor:
    """One row for each tile, its entries along the last dimension."""
    split = [n for size, b in zip(values.shape, block, strict=False) for n in (size // b, b)]
    tiled = values.reshape(*split, math.prod(values.shape[len(block) :]))
    outer, inner = range(0, 2 * len(block), 2), range(1, 2 * len(block) + 1, 2)
    return tiled.permute(*outer, *inner, tiled.dim() - 1).flatten(len(block))


def _repeat_tiles(mask: Tensor, block: tuple[int, ...], shape: torch.Size) -> Tensor:
    for dim, b in enumerate(block):
        mask = mask.repeat_interleave(b, dim)
    rest = (1,) * (len(shape) - len(block))
    return mask.view(*mask.shape, *rest).expand(shape)


def parse_granularity(granularity: Granularity) -> tuple[tuple[int, int] | None, tuple[int, ...] | None]:
    """What it means: n of m, or a block; neither for single weights."""
    if isinstance(granularity, str) and granularity == "weight":
        return None, None
    if isinstance(granularity, str) and granularity == "channel":
        return None, (1,)
    require(
        not (isinstance(granularity, str) and granularity == "group"),
        'granularity "group", coupled channels, needs an example and chooses over all layers at once: it is for '
        "gp.prune, gp.Pruner, gp.iterate, gp.sensitivity and gp.fit_budget",
    )
    numbers: tuple[Any, ...] = ()
    n_of_m = False
    if isinstance(granularity, str):
        n_of_m = ":" in granularity
        numbers = tuple(int(x) if x.isdecimal() else x for x in granularity.split(":" if n_of_m else "x"))
    elif isinstance(granularity, tuple):
        numbers = granularity
        n_of_m = len(numbers) == 2 and all(map(_positive, numbers)) and numbers[0] < numbers[1]
    if not numbers or not all(map(_positive, numbers)) or (n_of_m and (len(numbers) != 2 or numbers[0] > numbers[1])):
        raise ValueError(
            'granularity must be "weight", "channel", (n, m) with n < m, "n:m" with n <= m, or a block shape such as '
            f'(16, 16) or "1x4"; got {granularity!r}'
        )
    return ((numbers[0], numbers[1]), None) if n_of_m else (None, numbers)


def _positive(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number > 0


def with_axes(layers: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights with axes where they are not known: [out, in] for matrices, with a warning; an error for others."""
    taken = [weight for weight in layers.values() if weight.axes is None]
    for weight in taken:
        shape, kind = tuple(weight.parameter.shape), type(weight.module).__name__
        require(
            len(shape) == 2,
            f"which axis of {weight.name!r}, {shape} in a {kind}, is the output and which the input is not known: say "
            f"it by axes={{{weight.name!r}: (output, input)}}, or exclude it",
        )
    if taken:
        names = ", ".join(f"{weight.name!r} of a {type(weight.module).__name__}" for weight in taken)
        checks.warn(f"taken as [out, in], as the kind of layer is not known: {names}; axes= says otherwise")
    return {name: w if w.axes is not None else w._replace(axes=Axes()) for name, w in layers.items()}


def check_fits(layers: Mapping[str, Weight], n_of_m: tuple[int, int] | None, block: tuple[int, ...] | None) -> None:
    """Raise ValueError where a layer has a dimension that m, or the block, does not divide."""
    sizes = (1, n_of_m[1]) if n_of_m is not None else block or ()
    for name, weight in layers.items():
        axes, shape = _axes(weight), tuple(weight.parameter.shape)
        within = shape_of(weight)[axes.depth :]
        require(len(sizes) <= len(within), f"a block of shape {sizes} does not fit {name!r}, which has shape {shape}")
        for at, (size, b) in enumerate(zip(within, sizes, strict=False)):
            dim = (axes.output, axes.input)[at] if at < 2 else at + len(axes.stack)
            each = f"{size} entries a group" if axes.groups > 1 and at == 1 else f"{size} entries"
            require(
                size % b == 0,
                f"{name!r} has {each} along dimension {dim}, not a multiple of {b}; exclude it, or choose a "
                f"granularity that divides its shape {shape}",
            )


def check_channels(layers: Mapping[str, Weight]) -> None:
    """Raise ValueError where the rows of a parameter are no output units.

    A gate's rows are a part of each unit of a recurrent layer, the rest of which is in the other gates and the other
    matrix; an attention layer's queries, keys and values act only together.
    """
    for name, weight in layers.items():
        require(not weight.packed, f"a row of {name!r} is no unit: {weight.packed}")

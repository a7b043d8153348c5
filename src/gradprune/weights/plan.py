"""How do an amount and a scope become masks, once the scores are there (chapter 4)?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gradprune.core.checks import fraction, require
from gradprune.core.masked import count_kept
from gradprune.core.select import keep_and_count, keep_largest, keep_n_of_m
from gradprune.weights import allocate
from gradprune.weights.eligible import Patterns, eligible
from gradprune.weights.granularity import Granularity, Ranked, Units, check_channels, check_divides, parse_granularity

Scope = Literal["global", "layer", "erk", "lamp"] | Mapping[str, float]
Choose = Callable[[Ranked], dict[str, Tensor]]


def prepare(
    model: nn.Module,
    sparsity: float | None = None,
    threshold: float | None = None,
    scope: Scope = "global",
    granularity: Granularity = "weight",
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    min_keep: int | None = None,
    within: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, nn.Parameter], Choose]:
    """The eligible parameters and the way from their scores to masks, with every argument checked."""
    layers = eligible(model, include, exclude)
    n_of_m, block = parse_granularity(granularity)
    _check_amount(sparsity, threshold, scope, n_of_m)
    _check_scope(scope, layers)
    _check_within(within, layers)
    check_divides(layers, n_of_m, block)
    check_channels(model, layers, granularity)
    whole = min_keep is None or (isinstance(min_keep, int) and min_keep >= 0)
    require(whole, f"min_keep must be a whole number from 0, got {min_keep!r}")
    return layers, _plan(Units(layers, block, within), sparsity, threshold, scope, n_of_m, min_keep)


def _plan(
    units: Units,
    sparsity: float | None,
    threshold: float | None,
    scope: Scope,
    n_of_m: tuple[int, int] | None,
    min_keep: int | None,
) -> Choose:
    """How to get from scores to masks. Whatever can be refused without the scores is refused here, before them."""
    if n_of_m is not None:
        return partial(_keep_n_of_m, *n_of_m)
    if threshold is not None:
        return partial(_keep_at_least, units, threshold, _floors(units, min_keep or 0))
    if isinstance(scope, Mapping):
        counts = {name: _stay(p.numel(), scope.get(name, sparsity or 0.0)) for name, p in units.layers.items()}
        return partial(_keep_per_layer, units, _whole_units(units, counts))
    assert sparsity is not None
    budget = _stay(sum(p.numel() for p in units.layers.values()), sparsity)
    floors = _affordable_floors(units, budget, min_keep)
    if scope in ("layer", "erk"):
        return partial(_keep_per_layer, units, _whole_units(units, _allocate(units, scope, budget, floors)))
    most = sum(units.available(name) * units.cost(name) for name in units.layers)
    require(budget <= most, f"sparsity {sparsity} lets {budget} weights stay, but `within` allows only {most}")
    return partial(_keep_over_all, units, budget, floors, allocate.lamp if scope == "lamp" else None)


def _stay(weights: int, sparsity: float) -> int:
    return weights - round(sparsity * weights)


def _floors(units: Units, min_keep: int) -> dict[str, int]:
    """The least number of units of each layer."""
    return {name: min(-(-min_keep // units.cost(name)), units.available(name)) for name in units.layers}


def _affordable_floors(units: Units, budget: int, min_keep: int | None) -> dict[str, int]:
    floors = _floors(units, 1 if min_keep is None else min_keep)
    needed = sum(floor * units.cost(name) for name, floor in floors.items())
    if needed <= budget:
        return floors
    if min_keep is not None:
        raise ValueError(f"min_keep={min_keep} needs {needed} weights over all layers, the sparsity leaves {budget}")
    if budget > 0:
        warnings.warn(
            f"the sparsity leaves {budget} weights for {len(floors)} layers: some layers become empty",
            stacklevel=5,
        )
    return dict.fromkeys(floors, 0)


def _allocate(units: Units, scope: Scope, budget: int, floors: Mapping[str, int]) -> dict[str, int]:
    names = list(units.layers)
    low = [floors[name] * units.cost(name) for name in names]
    high = [units.available(name) * units.cost(name) for name in names]
    shapes = [units.layers[name].shape for name in names]
    if scope == "erk":
        counts = allocate.erk(shapes, budget, low=low, high=high)
    else:
        counts = allocate.uniform([math.prod(s) for s in shapes], budget, low=low, high=high)
    return dict(zip(names, counts, strict=True))


def _whole_units(units: Units, weights: Mapping[str, int]) -> dict[str, int]:
    counts = {name: round(count / units.cost(name)) for name, count in weights.items()}
    for name, count in counts.items():
        available = units.available(name)
        require(count <= available, f"{name!r} is to keep {count} units, but `within` allows only {available}")
    return counts


def _keep_n_of_m(n: int, m: int, ranked: Ranked) -> dict[str, Tensor]:
    return {name: keep_n_of_m(v, n, m, by=ranked.by, name=repr(name)) for name, v in ranked.values.items()}


def _keep_at_least(units: Units, threshold: float, floors: Mapping[str, int], ranked: Ranked) -> dict[str, Tensor]:
    ranked = units.rank(ranked)
    masks = {}
    for name, values in ranked.values.items():
        require(not bool(values.isnan().any()), f"the score of {name!r} contains NaN")
        values = values.abs() if values.is_complex() else values  # a complex weight that is ranked by magnitude
        keep = values >= threshold
        if ranked.by == "magnitude":
            keep = keep.logical_or_(values <= -threshold) if threshold > 0 else torch.ones_like(keep)
        if count_kept(keep) < floors[name]:
            keep = _largest(units, ranked, {name: floors[name]})[name]
        masks[name] = keep
    return units.expand(masks)


def _keep_per_layer(units: Units, counts: Mapping[str, int], ranked: Ranked) -> dict[str, Tensor]:
    return units.expand(_largest(units, units.rank(ranked), counts))


def _keep_over_all(
    units: Units,
    budget: int,
    floors: Mapping[str, int],
    transform: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None,
    ranked: Ranked,
) -> dict[str, Tensor]:
    """All layers ranked together; one that would fall below its floor gets it, and the others share what is left."""
    ranked = units.rank(ranked)
    if transform is not None:
        ranked = Ranked(transform(ranked.scores()))
    at_floor: dict[str, int] = {}
    while True:
        left = budget - sum(count * units.cost(name) for name, count in at_floor.items())
        free = [name for name in units.layers if name not in at_floor]
        values = {name: ranked.values[name] for name in free}
        among = None if units.within is None else [_known(units.allowed(name)) for name in free]
        count = _units_nearest(units, values, among, left)
        kept = keep_and_count(values, count, by=ranked.by, among=among)
        masks = dict(zip(free, kept.masks, strict=True))
        doubtful = [name for name, least in zip(free, kept.at_least, strict=True) if least < floors[name]]
        short = {name: floors[name] for name in doubtful if count_kept(masks[name]) < floors[name]}
        if not short:
            masks |= _largest(units, ranked, at_floor)
            return units.expand({name: masks[name] for name in units.layers})
        at_floor |= short


def _largest(units: Units, ranked: Ranked, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The given number of units of each layer by itself."""
    masks = {}
    for name, count in counts.items():
        allowed = units.allowed(name)
        among = None if allowed is None else [allowed]
        masks[name] = keep_largest({name: ranked.values[name]}, count, by=ranked.by, among=among)[0]
    return masks


def _units_nearest(units: Units, values: Mapping[str, Tensor], among: Sequence[Tensor] | None, weights: int) -> int:
    """How many of the highest units hold the number of weights nearest to `weights`; the fewer among equals."""
    if units.block is None:
        return weights
    flat = torch.cat([v.reshape(-1).cpu() for v in values.values()])
    costs = torch.cat([torch.full((v.numel(),), units.cost(name)) for name, v in values.items()])
    if among is not None:
        allowed = torch.cat([a.reshape(-1).cpu() for a in among])
        flat, costs = flat[allowed], costs[allowed]
    held = costs[flat.sort(stable=True).indices.flip(0)].cumsum(0)
    distances = (torch.cat([torch.zeros(1, dtype=held.dtype), held]) - weights).abs()
    return int(distances.argmin())


def _known(allowed: Tensor | None) -> Tensor:
    assert allowed is not None
    return allowed


def _check_amount(
    sparsity: float | None, threshold: float | None, scope: Scope, n_of_m: tuple[int, int] | None
) -> None:
    if sparsity is not None:
        fraction("sparsity", sparsity)
    if threshold is not None:
        require(not math.isnan(threshold), "threshold must be a number, got NaN")
    if n_of_m is not None:
        n, m = n_of_m
        given = threshold is not None or (sparsity is not None and not math.isclose(sparsity, 1 - n / m))
        require(not given, f"granularity {n}:{m} is itself a sparsity of {1 - n / m:g}: give no other, nor a threshold")
        require(scope in ("global", "layer"), f"granularity {n}:{m} leaves nothing to allocate; got scope={scope!r}")
    elif isinstance(scope, Mapping):
        require(threshold is None, "a scope that gives sparsities by name does not go with a threshold")
    elif (sparsity is None) == (threshold is None):
        both = "neither" if sparsity is None else "both"
        raise ValueError(f"give exactly one of sparsity and threshold; got {both}")
    elif threshold is not None:
        require(scope in ("global", "layer"), f"scope={scope!r} shares out a sparsity; it does not go with a threshold")


def _check_scope(scope: Scope, layers: Mapping[str, nn.Parameter]) -> None:
    if not isinstance(scope, Mapping):
        known = ("global", "layer", "erk", "lamp")
        require(scope in known, f"scope must be one of {known} or a dict of sparsities by name, got {scope!r}")
        return
    for name, sparsity in scope.items():
        require(name in layers, f"scope names {name!r}, which is not eligible; eligible are {list(layers)}")
        require(0.0 <= sparsity <= 1.0, f"the sparsity of {name!r} must be in [0, 1], got {sparsity}")


def _check_within(within: Mapping[str, Tensor] | None, layers: Mapping[str, nn.Parameter]) -> None:
    if within is None:
        return
    for name, p in layers.items():
        require(name in within, f"`within` has no mask for {name!r}; exclude the parameter, or give a mask of all True")
        shape = tuple(within[name].shape)
        require(shape == tuple(p.shape), f"`within` has shape {shape} for {name!r}, the parameter {tuple(p.shape)}")

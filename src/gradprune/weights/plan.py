"""How do an amount and a scope become masks, once the scores are there (chapter 4)?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradprune.core import checks
from gradprune.core.checks import require
from gradprune.core.layers import Weight
from gradprune.core.order import By, Order, compared_as
from gradprune.core.select import keep_n_of_m
from gradprune.weights import allocate
from gradprune.weights.directions import rows_of
from gradprune.weights.granularity import Ranked, Units, as_stored, canonical, shape_of
from gradprune.weights.lamp import Layer, Read, lamp_counts

Scope = Literal["global", "layer", "row", "erk", "lamp"] | Mapping[str, float]
Choose = Callable[[Ranked], dict[str, Tensor]]
LONG_ROW = 32  # from here on, finding one number of a row costs less than sorting it
ROWS_AT_A_TIME = 2**22  # weights: sorting a row's takes several times their memory


def plan(
    units: Units,
    sparsity: float | None,
    threshold: float | None,
    scope: Scope,
    n_of_m: tuple[int, int] | None,
    min_keep: int | None,
) -> Choose:
    """How to get from scores to masks. Whatever can be refused without the scores is refused here, before them."""
    if n_of_m is not None:
        return partial(_keep_n_of_m, units, *n_of_m)
    if threshold is not None:
        return partial(_keep_at_least, units, threshold, _floors(units, min_keep or 0))
    if isinstance(scope, Mapping) or scope in ("layer", "erk"):
        counts, warning = kept_of_layers(units, sparsity, scope, min_keep)
        return partial(_keep_per_layer, units, counts, warning)
    assert sparsity is not None
    if scope == "row":
        return _plan_rows(units, sparsity, min_keep)
    return partial(_keep_by_lamp if scope == "lamp" else _keep_over_all, units, _Shared.of(units, sparsity, min_keep))


class _Shared(NamedTuple):
    """What layers that are ranked together share: how many weights may stay, and how many units of each at least."""

    budget: int
    floors: dict[str, int]
    warning: str
    noticed: float  # a layer at its floor is warned of where that is less than half of this share

    @classmethod
    def of(cls, units: Units, sparsity: float, min_keep: int | None) -> _Shared:
        total = sum(weight.parameter.numel() for weight in units.layers.values())
        budget = kept_of(total, sparsity)
        floors, warning = affordable_floors(units, budget, min_keep)
        most = sum(units.available(name) * units.cost(name) for name in units.layers)
        require(budget <= most, f"sparsity {sparsity} lets {budget} weights stay, but `within` allows only {most}")
        noticed = 0.0 if warning or min_keep is not None else budget / max(total, 1)  # who sets the floor knows of it
        return cls(budget, floors, warning, noticed)

    def left(self, units: Units, at_floor: Mapping[str, int]) -> int:
        """How many weights the others share, where so many units of some layers stay."""
        return self.budget - sum(count * units.cost(name) for name, count in at_floor.items())

    def short(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The layers that keep fewer units than they must, and how many they must."""
        return {name: self.floors[name] for name, count in counts.items() if count < self.floors[name]}


def kept_of_layers(
    units: Units, sparsity: float | None, scope: Scope, min_keep: int | None = None
) -> tuple[dict[str, int], str]:
    """Return how many units each layer keeps where no scores are needed, and a warning; by a dict, layer or erk."""
    sizes = {name: weight.parameter.numel() for name, weight in units.layers.items()}
    if isinstance(scope, Mapping):
        counts = {name: kept_of(size, scope.get(name, sparsity or 0.0)) for name, size in sizes.items()}
        return _whole_units(units, counts), ""
    budget = kept_of(sum(sizes.values()), sparsity or 0.0)
    floors, warning = affordable_floors(units, budget, min_keep)
    return _shared_out(units, scope, budget, floors), warning


def kept_of(weights: int, sparsity: float) -> int:
    """Return how many of so many weights a sparsity keeps."""
    return weights - round(sparsity * weights)


def _floors(units: Units, min_keep: int) -> dict[str, int]:
    """The least number of units of each layer."""
    return {name: min(-(-min_keep // max(units.cost(name), 1)), units.available(name)) for name in units.layers}


def affordable_floors(units: Units, budget: int, min_keep: int | None) -> tuple[dict[str, int], str]:
    """Return the least number of units of each layer, and a warning where the budget does not allow for it."""
    floors = _floors(units, 1 if min_keep is None else min_keep)
    if units.block is None:
        higher = {name: max(floor, rows_of(units.layers[name])) for name, floor in floors.items()}
        floors = higher if sum(higher.values()) <= budget else floors
    needed = sum(floor * units.cost(name) for name, floor in floors.items())
    if needed <= budget:
        return floors, ""
    if min_keep is not None:
        raise ValueError(f"min_keep={min_keep} needs {needed} weights over all layers, the sparsity leaves {budget}")
    warning = f"the sparsity leaves {budget} weights for {len(floors)} layers: some layers become empty"
    return dict.fromkeys(floors, 0), warning if budget > 0 else ""


def _shared_out(units: Units, scope: Scope, budget: int, floors: Mapping[str, int]) -> dict[str, int]:
    """How many units each layer keeps by itself, by a scope that is "layer" or "erk"."""
    names = list(units.layers)
    low = [floors[name] * units.cost(name) for name in names]
    high = [units.available(name) * units.cost(name) for name in names]
    if scope == "erk":
        shapes, copies = [], []
        for weight in units.layers.values():
            shape, stack = weight.parameter.shape, weight.axes.stack if weight.axes is not None else ()
            shapes.append([size for axis, size in enumerate(shape) if axis not in stack])
            copies.append(math.prod(shape[axis] for axis in stack))
        counts = allocate.erk(shapes, budget, low=low, high=high, stacked=copies)
    else:
        sizes = [units.layers[name].parameter.numel() for name in names]
        counts = allocate.uniform(sizes, budget, low=low, high=high)
    return _whole_units(units, dict(zip(names, counts, strict=True)))


def _whole_units(units: Units, weights: Mapping[str, int]) -> dict[str, int]:
    counts = {name: round(count / max(units.cost(name), 1)) for name, count in weights.items()}
    for name, count in counts.items():
        available = units.available(name)
        require(count <= available, f"{name!r} is to keep {count} units, but `within` allows only {available}")
    return counts


# ------------------------------------------------------------------------------------------------ from scores to masks


def _keep_n_of_m(units: Units, n: int, m: int, ranked: Ranked) -> dict[str, Tensor]:
    masks = {}
    for name in units.layers:
        weight = units.held(name)
        values, allowed = canonical(weight, ranked.values[name]), units.allowed(name)
        dim = weight.axes.depth + 1 if weight.axes is not None else 1
        if allowed is None:
            mask = keep_n_of_m(values, n, m, dim=dim, by=ranked.by, name=repr(name))
        else:
            grouped = values.movedim(dim, -1)
            among = canonical(weight, allowed).movedim(dim, -1).reshape(-1, m)
            mask = keep_in_rows(name, grouped.reshape(-1, m), n, ranked.by, among).logical_and_(among)
            mask = mask.view(grouped.shape).movedim(-1, dim)
        masks[name] = as_stored(weight, mask)
    return masks


def _keep_at_least(units: Units, threshold: float, floors: Mapping[str, int], ranked: Ranked) -> dict[str, Tensor]:
    ranked = units.rank(ranked)
    units.pick.check(ranked.values)
    masks = {}
    for name, values in ranked.values.items():
        values = values.abs() if values.is_complex() else values  # a complex weight that is ranked by magnitude
        keep = at_least(values, threshold)
        if ranked.by == "magnitude":
            keep = keep.logical_or_(at_least(-values, threshold)) if threshold > 0 else torch.ones_like(keep)
        allowed = units.allowed(name)
        masks[name] = keep if allowed is None else keep & allowed
    counts = units.pick.stay({name: mask for name, mask in masks.items() if floors[name]})
    short = {name: floors[name] for name, count in counts.items() if count < floors[name]}
    if short:
        masks |= _largest(units, ranked, short)
    return units.expand(masks)


def at_least(values: Tensor, threshold: float) -> Tensor:
    """Where values are at least a threshold, compared exactly: it is not rounded to their dtype."""
    if not values.dtype.is_floating_point:
        whole = math.ceil(threshold) if math.isfinite(threshold) else None
        if whole is None or not -(2**63) <= whole < 2**63:
            return torch.full(values.shape, threshold < 0, device=values.device)
        return values.to(torch.int64) >= whole
    if values.element_size() == 1:
        values = values.float()  # eight-bit floats cannot be compared
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bound = torch.tensor(threshold, dtype=torch.float64, device="cpu").to(values.dtype)
    if float(bound) < threshold:  # the next larger number of the dtype has the next bits, or the previous ones
        bits = int(bound.view(integer))
        bound = torch.tensor(bits + (1 if float(bound) >= 0 else -1), dtype=integer, device="cpu").view(values.dtype)
    return values >= bound.to(values.device)


def _keep_per_layer(units: Units, counts: Mapping[str, int], warning: str, ranked: Ranked) -> dict[str, Tensor]:
    if warning:
        checks.warn(warning)
    return units.expand(_largest(units, units.rank(ranked), counts))


def _keep_over_all(units: Units, shared: _Shared, ranked: Ranked) -> dict[str, Tensor]:
    """All layers ranked together; one that would fall below its floor gets it, and the others share what is left.

    Warns of layers that come down to their floors and keep less than half of what is noticed.
    """
    if shared.warning:
        checks.warn(shared.warning)
    ranked = units.rank(ranked)
    at_floor: dict[str, int] = {}
    while True:
        left = shared.left(units, at_floor)
        free = [name for name in units.layers if name not in at_floor]
        values = {name: ranked.values[name] for name in free}
        among = None if units.within is None else [_known(units.allowed(name)) for name in free]
        count = left
        if units.block is not None:
            count = units.pick.nearest(values, {n: units.cost(n) for n in free}, left, by=ranked.by, among=among)
        kept = units.pick.keep(values, count, by=ranked.by, among=among)
        masks = dict(zip(free, kept.masks, strict=True))
        least = {n: shared.floors[n] + (shared.noticed > 0) for n in free}
        doubtful = [n for n, number in zip(free, kept.at_least, strict=True) if number < least[n]]
        counts = units.pick.stay({name: masks[name] for name in doubtful})
        short = shared.short(counts)
        if not short:
            _warn_of_floors(units, at_floor | {n: c for n, c in counts.items() if c == shared.floors[n]}, shared)
            masks |= _largest(units, ranked, at_floor)
            return units.expand({name: masks[name] for name in units.layers})
        at_floor |= short


def _keep_by_lamp(units: Units, shared: _Shared, ranked: Ranked) -> dict[str, Tensor]:
    """As above, by the scores of LAMP: they rank a layer as its own do, and say how many each keeps."""
    ranked, pick = units.rank(ranked), units.pick
    is_integer = {name: not (v.is_floating_point() or v.is_complex()) for name, v in ranked.values.items()}
    ranked = ranked._replace(values={n: v.double() if is_integer[n] else v for n, v in ranked.values.items()})
    layers = {
        name: Layer(values, units.number(name), units.cost(name), units.allowed(name), pick.counts(name))
        for name, values in ranked.values.items()
    }
    counts = _lamp_counts(units, shared, layers, partial(lamp_counts, by=ranked.by, total=pick.total, most=pick.most))
    return units.expand(_largest(units, ranked, counts))


def kept_by_lamp(
    units: Units, sparsity: float, min_keep: int | None, values: Mapping[str, Read], cells: int
) -> dict[str, int]:
    """Return how many weights of each layer stay by LAMP, of magnitudes that are read piece by piece."""
    layers = {name: Layer(some, units.number(name)) for name, some in values.items()}
    count = partial(lamp_counts, by="magnitude", cells=cells)
    return _lamp_counts(units, _Shared.of(units, sparsity, min_keep), layers, count)


def _lamp_counts(
    units: Units, shared: _Shared, layers: Mapping[str, Layer], count: Callable[..., dict[str, int]]
) -> dict[str, int]:
    if shared.warning:
        checks.warn(shared.warning)
    at_floor: dict[str, int] = {}
    while True:
        free = {name: layer for name, layer in layers.items() if name not in at_floor}
        counts = count(free, shared.left(units, at_floor))
        short = shared.short(counts)
        if not short:
            _warn_of_floors(units, at_floor | {n: c for n, c in counts.items() if c == shared.floors[n]}, shared)
            counts |= at_floor
            return {name: counts[name] for name in layers}
        at_floor |= short


def _warn_of_floors(units: Units, at_floor: Mapping[str, int], shared: _Shared) -> None:
    """Warn of layers that came down to so many units now, where that is less than half of the share noticed."""
    sizes = {name: weight.parameter.numel() for name, weight in units.layers.items()}
    kept = {n: count * units.cost(n) for n, count in at_floor.items() if count < units.available(n)}
    few = {name: count for name, count in kept.items() if count < shared.noticed * sizes[name] / 2}
    fallen = [f"{name!r} keeps {count:,} of {sizes[name]:,} weights" for name, count in few.items()]
    if fallen:
        more = f" and {len(fallen) - 5} more layers" if len(fallen) > 5 else ""
        checks.warn(
            f"ranked with the others, {', '.join(fallen[:5])}{more}, the least that is allowed: scores of different "
            'layers may not compare, as before training. scope="layer" or "erk" leaves more; min_keep= sets the least'
        )


def _largest(units: Units, ranked: Ranked, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The given number of units of each layer by itself."""
    among = {name: units.allowed(name) for name in counts}
    return units.pick.each(ranked.values, counts, by=ranked.by, among=among)


def _known(allowed: Tensor | None) -> Tensor:
    assert allowed is not None
    return allowed


# ------------------------------------------------------------------------------------------------------------- rows


def _plan_rows(units: Units, sparsity: float, min_keep: int | None) -> Choose:
    """Each output unit keeps the same number of its weights; those of a stack or group have each their own."""
    counts = {}
    empty = []
    for name, weight in units.layers.items():
        number, length = _rows(weight, shape_of(weight))
        counts[name] = kept_of(length, sparsity)
        most = length if units.within is None else units.pick.least(rows_in(weight, units.within[name]).sum(1))
        require(
            counts[name] <= most,
            f"each row of {name!r} is to keep {counts[name]} weights, but `within` allows only {most} in one",
        )
        kept = counts[name] * number
        require(
            min_keep is None or kept >= min(min_keep, weight.parameter.numel()),
            f"{name!r} keeps {kept} weights, {counts[name]} a row, fewer than min_keep={min_keep}",
        )
        if not kept and sparsity < 1 and weight.parameter.numel():
            empty.append(name)
    warning = f"rows are too short for a sparsity of {sparsity}: {empty} become empty" if empty else ""
    return partial(_keep_per_row, units, counts, warning)


def _keep_per_row(units: Units, counts: Mapping[str, int], warning: str, ranked: Ranked) -> dict[str, Tensor]:
    if warning:
        checks.warn(warning)
    masks = {}
    for name, count in counts.items():
        allowed = None if units.within is None else rows_in(units.layers[name], units.within[name])
        held = units.held(name)
        mask = keep_in_rows(name, rows_in(held, ranked.values[name]), count, ranked.by, allowed)
        masks[name] = as_stored(held, mask.view(shape_of(held)))
    return masks


def keep_in_rows(name: str, values: Tensor, count: int, by: By, allowed: Tensor | None) -> Tensor:
    """Return a mask of the `count` largest of each row, of those allowed first; the later of equals stays."""
    require(not bool(values.isnan().any()), f"the score of {name!r} contains NaN")
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    step = max(1, ROWS_AT_A_TIME // max(values.shape[1], 1))
    by_keys = allowed is None and values.is_floating_point() and values.device.type == "cpu"
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        if by_keys and values.shape[1] >= LONG_ROW:
            mask[part] = _largest_of_rows(values[part].detach(), count, by)
            continue
        size = values[part].abs() if by == "magnitude" else values[part]
        order = size.sort(dim=1, stable=True).indices
        if allowed is not None:  # what may not stay goes first
            order = order.gather(1, allowed[part].gather(1, order).sort(dim=1, stable=True).indices)
        mask[part] = torch.ones_like(mask[part]).scatter_(1, order[:, : values.shape[1] - count], False)
    return mask


def _largest_of_rows(values: Tensor, count: int, by: By) -> Tensor:
    """The same of floats on the processor, unsorted: all above the last that goes, and the later of its equals."""
    order = Order(compared_as(values.dtype), by)
    keys = order.keys(order.compared(values).contiguous()).numpy()
    gone = keys.shape[1] - count
    if not gone or not count:
        return torch.full(values.shape, not gone, dtype=torch.bool, device="cpu")
    edge = np.partition(keys, gone - 1, axis=1)[:, gone - 1 : gone]
    mask = keys > edge
    missing = count - np.count_nonzero(mask, axis=1)
    short = np.flatnonzero(missing)
    row, column = np.nonzero(keys[short] == edge[short])  # row by row, so that the place of one tells how many follow
    last = np.searchsorted(row, row, side="right")
    stay = last - np.arange(len(row)) <= missing[short][row]
    mask[short[row[stay]], column[stay]] = True
    return torch.from_numpy(mask)


def rows_in(weight: Weight, tensor: Tensor) -> Tensor:
    """Return a tensor of the weight's shape with one row an output unit."""
    seen = canonical(weight, tensor)
    return seen.reshape(_rows(weight, seen.shape))


def _rows(weight: Weight, shape: Sequence[int]) -> tuple[int, int]:
    """How many rows a weight of some canonical shape has, and how long they are."""
    depth = weight.axes.depth + 1 if weight.axes is not None else 1
    return math.prod(shape[:depth]), math.prod(shape[depth:])

"""What of each tensor of a checkpoint stays, said slab by slab as its bytes pass?

By a rule for single weights that are ranked together (`threshold`); by itself for a layer, a row or a group of m, in a
slab that memory holds; by scores of a first reading for channels and blocks. Memory is bounded, whatever the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.checkpoint import Tensors, pieces
from gradprune.core.checks import require
from gradprune.core.collect import raise_nan
from gradprune.core.header import DTYPES
from gradprune.core.layers import Axes, Weight
from gradprune.core.order import Order
from gradprune.core.select import keep_largest
from gradprune.deploy.threshold import VALUES, Rule, keys_of, order_of, rules
from gradprune.weights.granularity import Ranked, Units, as_stored, canonical
from gradprune.weights.named import some
from gradprune.weights.plan import (
    Choose,
    Scope,
    affordable_floors,
    at_least,
    keep_in_rows,
    kept_by_lamp,
    kept_of,
    kept_of_layers,
    plan,
    rows_in,
)

Array = np.ndarray[Any, np.dtype[Any]]
Seen = Callable[[int], None]

IN_MEMORY = 2**26  # bytes of a tensor that is decided on as a whole
TURNED = 2**28  # bytes of one that has to be, as its rows are no units
SLAB = 2**24  # bytes of whole rows
MOST_UNITS = 2**25  # channels or blocks whose scores are held
MOST_HELD = 2**26  # weights that are ranked in memory, for what takes that
LAMP_CELLS = 2**21  # the more of them, the fewer weights have to be held
LAMP_READINGS = 3  # for the largest, for the cells, and for what lies in those that are open


class Way(NamedTuple):
    """How a tensor is decided on: bytes of a slab, and what stays of one that begins so many bytes from the first.

    That is said of each value, or of each run of as many: of rows, say.
    """

    slab: int
    decide: Callable[[Array, int], Array]


def ways(
    tensors: Mapping[str, Tensors],
    units: Units,
    sparsity: float | None,
    scope: Scope,
    n_of_m: tuple[int, int] | None,
    seen: Seen,
    *,
    threshold: float | None = None,
    min_keep: int | None = None,
) -> dict[str, Way]:
    """Return how each tensor is decided on; `seen` is told how many bytes are read for it now or later."""
    if n_of_m is not None:
        return {name: _n_of_m(name, t, units.layers[name], *n_of_m) for name, t in tensors.items()}
    if units.block is None and is_ranked_in_memory(scope, threshold, min_keep):
        return _in_memory(tensors, units, plan(units, sparsity, threshold, scope, None, min_keep), seen)
    if units.block is None and scope == "lamp":
        assert sparsity is not None
        counts = kept_by_lamp(units, sparsity, min_keep, {n: _Pieces(t, seen) for n, t in tensors.items()}, LAMP_CELLS)
        return {name: _layer(name, t, counts[name], seen) for name, t in tensors.items()}
    if threshold is not None and units.block is None:
        return {name: _above(name, t, threshold) for name, t in tensors.items()}
    if units.block is not None:
        return _by_units(tensors, units, sparsity, threshold, scope, min_keep, seen)
    assert sparsity is not None
    if scope == "row":
        plan(units, sparsity, None, scope, None, min_keep)  # which refuses what cannot be
        return {name: _slab_by_slab(t, units.layers[name], partial(_rows, sparsity)) for name, t in tensors.items()}
    if scope != "global":
        counts, warning = kept_of_layers(units, sparsity, scope, min_keep)
        if warning:
            checks.warn(warning)
        return {name: _layer(name, t, counts[name], seen) for name, t in tensors.items()}
    keep = kept_of(sum(t.entry.numel for t in tensors.values()), sparsity)
    floors, warning = affordable_floors(units, keep, None)
    if warning:
        checks.warn(warning)
    order = order_of(tensors)
    common, alone = rules(tensors, keep, floors, order, seen)
    if alone:
        checks.warn(
            f"ranked with the others, {some(alone, 3)} would become empty, and one weight stays in each: "
            "scope layer or erk leaves more"
        )
    ties = _Ties(lambda: common)
    own = {name: _Ties(partial(alone.__getitem__, name)) for name in alone}
    return {name: _by_rule(t, order, own.get(name, ties)) for name, t in tensors.items()}


def is_ranked_in_memory(scope: Scope, threshold: float | None, min_keep: int | None) -> bool:
    """Whether single weights cannot be decided on as they pass."""
    return min_keep is not None and (scope == "global" or threshold is not None)


def read_before(
    tensors: Mapping[str, Tensors],
    block: bool,
    scope: Scope,
    n_of_m: bool,
    threshold: float | None = None,
    min_keep: int | None = None,
) -> int:
    """Return the bytes that are read to decide, before they are read to be written; a sample aside."""
    if n_of_m or scope == "row":
        return 0
    sizes = [t.entry.nbytes for t in tensors.values()]
    if not block and is_ranked_in_memory(scope, threshold, min_keep):
        return sum(sizes)
    if not block and threshold is not None:
        return 0
    lamp = LAMP_READINGS * sum(sizes) if scope == "lamp" and not block else 0
    return lamp + sum(size for size in sizes if block or scope == "global" or size > IN_MEMORY)


# ---------------------------------------------------------------------------------------------------- single weights


@dataclass
class _Ties:
    """A rule on its way through its tensors, found when it is first asked for, and how many ties are still to go."""

    find: Callable[[], Rule]
    left: int = 0

    @cached_property
    def key(self) -> int:
        """What stays is above it; asked for before `left`."""
        key, self.left = self.find()
        return key


def _by_rule(t: Tensors, order: Order, ties: _Ties) -> Way:
    dtype = DTYPES[t.entry.dtype]

    def decide(raw: Array, _: int) -> Array:
        keys = keys_of(raw, dtype, order)
        key = keys.dtype.type(ties.key)
        kept: Array = keys > key if ties.left else keys >= key
        if ties.left:
            where = np.flatnonzero(keys == key)
            kept[where[ties.left :]] = True
            ties.left -= min(ties.left, where.size)
        return kept

    return Way(VALUES * dtype.itemsize, decide)


def _layer(name: str, t: Tensors, count: int, seen: Seen) -> Way:
    """The largest of one tensor."""
    dtype = DTYPES[t.entry.dtype]
    if t.entry.nbytes > IN_MEMORY:
        order = order_of({name: t})
        return _by_rule(t, order, _Ties(lambda: rules({name: t}, count, {name: 0}, order, seen)[0]))

    def decide(raw: Array, _: int) -> Array:
        values = torch.from_numpy(raw).view(dtype)
        return keep_largest({name: values}, count, by="magnitude")[0].numpy()

    return Way(max(t.entry.nbytes, 1), decide)


class _Pieces(NamedTuple):
    """The values of a tensor, read piece by piece."""

    t: Tensors
    seen: Seen

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.t.entry.dtype]

    def pieces(self) -> Iterator[Tensor]:
        """As often as they are asked for."""
        for _, raw in pieces(self.t, VALUES * self.dtype.itemsize):
            self.seen(raw.size)
            yield torch.from_numpy(raw).view(self.dtype)


def _above(name: str, t: Tensors, threshold: float) -> Way:
    """Those of at least a magnitude."""
    dtype = DTYPES[t.entry.dtype]

    def decide(raw: Array, _: int) -> Array:
        values = torch.from_numpy(raw).view(dtype)
        require(not bool(values.isnan().any()), f"the score of {name!r} contains NaN")
        values = values.abs() if values.is_complex() else values
        kept = at_least(values, threshold)
        return (kept.logical_or_(at_least(-values, threshold)) if threshold > 0 else torch.ones_like(kept)).numpy()

    return Way(VALUES * dtype.itemsize, decide)


def _in_memory(tensors: Mapping[str, Tensors], units: Units, choose: Choose, seen: Seen) -> dict[str, Way]:
    """By ``prune`` itself, on the values."""
    number = sum(t.entry.numel for t in tensors.values())
    require(
        number <= MOST_HELD,
        f"min_keep over all layers ranks the weights in memory, at most {MOST_HELD:,}, and these are {number:,}: take "
        "scope layer, erk or lamp, or load the model and call gp.prune",
    )
    values = {}
    for name, t in tensors.items():
        raw = t.part.read(t.entry, 0, t.entry.nbytes)
        values[name] = torch.from_numpy(raw).view(DTYPES[t.entry.dtype]).view(t.entry.shape)
        seen(raw.size)
    masks = {name: mask.reshape(-1).numpy() for name, mask in choose(Ranked(values, "magnitude")).items()}

    def decide(name: str, size: int, raw: Array, start: int) -> Array:
        return masks[name][start // size : (start + raw.size) // size]

    sizes = {name: DTYPES[t.entry.dtype].itemsize for name, t in tensors.items()}
    return {name: Way(VALUES * size, partial(decide, name, size)) for name, size in sizes.items()}


def _n_of_m(name: str, t: Tensors, weight: Weight, n: int, m: int) -> Way:
    """The n largest of every m consecutive along the input; of equal ones the later."""
    assert weight.axes is not None
    dtype, shape, axis = DTYPES[t.entry.dtype], t.entry.shape, weight.axes.input
    order, inner = order_of({name: t}), math.prod(shape[axis + 1 :])
    row = t.entry.nbytes // max(shape[0], 1)
    whole = m if axis == 0 else 1
    rows = whole * max(1, VALUES * dtype.itemsize // max(row * whole, 1))

    def decide(raw: Array, _: int) -> Array:
        keys = keys_of(raw, dtype, order)
        if keys.max(initial=0) > order.highest:
            raise_nan(repr(name))
        place = np.ascontiguousarray(keys.reshape(-1, m, inner).swapaxes(0, 1))  # one row for each place in a group
        outranked = np.zeros(place.shape, np.uint8 if m < 256 else np.int64)
        for i in range(m):
            for j in range(i + 1, m):
                later = place[j] >= place[i]
                outranked[i] += later
                outranked[j] += ~later
        return np.ascontiguousarray((outranked < n).swapaxes(0, 1)).reshape(-1)

    return Way(max(rows * row, 1), decide)


# ------------------------------------------------------------------------------------------------------ slabs of rows


class _Slabs(NamedTuple):
    """A tensor cut along its first axis, so that no unit is cut."""

    t: Tensors
    weight: Weight
    rows: int  # of a slab, along the first axis

    @classmethod
    def of(cls, t: Tensors, weight: Weight, tile: int = 1) -> _Slabs:
        """Slabs of whole tiles along the output, or of whole matrices of a stack; else all is one slab."""
        axes, height = weight.axes, max(t.entry.shape[0], 1)
        row = t.entry.nbytes // height
        stacked = axes is not None and axes.stack[:1] == (0,)
        if axes == Axes() or stacked:
            tile = 1 if stacked else tile
            rows = tile * max(1, SLAB // max(row * tile, 1))
        else:  # its rows are no units
            rows = height
        rows = min(rows, height)
        require(
            rows * row <= TURNED,
            f"{t.entry.name!r} cannot be cut where no unit is cut, and {rows * row:,} bytes of it are too many to be "
            "held at once: exclude it, or prune single weights",
        )
        return cls(t, weight, rows)

    @property
    def rows_are_units(self) -> bool:
        """Whether the values of a channel lie side by side."""
        axes = self.weight.axes
        return axes is not None and axes == Axes(
            stack=tuple(range(axes.depth)), output=axes.depth, input=axes.depth + 1
        )

    @property
    def step(self) -> int:
        """Bytes of a slab."""
        return max(1, self.rows * (self.t.entry.nbytes // max(self.t.entry.shape[0], 1)))

    def tensor(self, raw: Array) -> Tensor:
        """The values of a slab."""
        return torch.from_numpy(raw).view(DTYPES[self.t.entry.dtype]).view(-1, *self.t.entry.shape[1:])

    def part(self, values: Tensor) -> Weight:
        """The weight, as if it were only the slab."""
        empty = torch.empty(values.shape, dtype=values.dtype, device="meta")
        return self.weight._replace(parameter=nn.Parameter(empty, requires_grad=False))

    def read(self, seen: Seen) -> Iterator[Tensor]:
        """All slabs in order."""
        for start in range(0, self.t.entry.nbytes, self.step):
            raw = self.t.part.read(self.t.entry, start, min(start + self.step, self.t.entry.nbytes))
            seen(raw.size)
            yield self.tensor(raw)


def _slab_by_slab(t: Tensors, weight: Weight, mask: Callable[[Weight, Tensor], Tensor]) -> Way:
    """Where what stays of a slab can be said by itself."""
    slabs = _Slabs.of(t, weight)

    def decide(raw: Array, _: int) -> Array:
        values = slabs.tensor(raw)
        return mask(slabs.part(values), values).reshape(-1).numpy()

    return Way(slabs.step, decide)


def _rows(sparsity: float, weight: Weight, values: Tensor) -> Tensor:
    rows = rows_in(weight, values)
    mask = keep_in_rows(weight.name, rows, kept_of(rows.shape[1], sparsity), "magnitude", None)
    return as_stored(weight, mask.view(canonical(weight, values).shape))


# -------------------------------------------------------------------------------------------------- channels and blocks


class _Scored(Units):
    """Units that are ranked by scores of their own, and whose masks stay masks over units."""

    def rank(self, ranked: Ranked) -> Ranked:
        """Return the scores as they are: they are the units' already."""
        return ranked

    def expand(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks as they are."""
        return dict(masks)


def _by_units(
    tensors: Mapping[str, Tensors],
    units: Units,
    sparsity: float | None,
    threshold: float | None,
    scope: Scope,
    min_keep: int | None,
    seen: Seen,
) -> dict[str, Way]:
    """Channels or blocks: their scores are held, and their weights read again."""
    block = units.block or (1,)
    number = sum(units.number(name) for name in tensors)
    require(
        number <= MOST_UNITS, f"{number:,} blocks are more than are held in memory ({MOST_UNITS:,}): take larger ones"
    )
    slabs = {name: _Slabs.of(t, units.layers[name], block[0]) for name, t in tensors.items()}
    scores = {}
    for name, cut in slabs.items():
        means = [
            Units({name: cut.part(values)}, block, None).rank(Ranked({name: values}, "magnitude")).values[name]
            for values in cut.read(seen)
        ]
        scores[name] = torch.cat(means) if means else torch.empty(0)
    masks = plan(_Scored(*units), sparsity, threshold, scope, None, min_keep)(Ranked(scores))

    def decide(name: str, raw: Array, start: int) -> Array:
        cut, mask = slabs[name], masks[name]
        part = cut.part(cut.tensor(raw))
        if cut.rows < cut.t.entry.shape[0]:
            tile = 1 if part.axes is not None and part.axes.stack else block[0]
            first = start // cut.step * cut.rows // tile
            mask = mask[first : first + part.parameter.shape[0] // tile]
        if block == (1,) and cut.rows_are_units:
            return mask.reshape(-1).numpy()
        return Units({name: part}, block, None).expand({name: mask})[name].reshape(-1).numpy()

    return {name: Way(cut.step, partial(decide, name)) for name, cut in slabs.items()}

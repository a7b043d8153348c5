"""How is a checkpoint pruned that need not fit in memory, to the masks of ``prune`` on the loaded model, bit for bit?

Single weights by one rule (`threshold`): the files are read once for it and once more to write. What is decided within
a layer, a row or a group of m is decided in a slab that memory holds, and read once. Channels and blocks are scored in
a first reading. What is not pruned is copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradprune.core import checks
from gradprune.core.checks import require
from gradprune.core.layers import Axes, Weight
from gradprune.core.order import Order
from gradprune.core.progress import bar
from gradprune.core.select import keep_largest, keep_n_of_m
from gradprune.deploy import names
from gradprune.deploy.checkpoint import Checkpoint, Tensors, opened
from gradprune.deploy.header import DTYPES
from gradprune.deploy.threshold import VALUES, Rule, keys_of, order_of, rule
from gradprune.deploy.written import Output, target_of, whole
from gradprune.weights.granularity import (
    Granularity,
    Ranked,
    Units,
    as_stored,
    canonical,
    check_fits,
    parse_granularity,
)
from gradprune.weights.named import some
from gradprune.weights.plan import Scope, affordable_floors, keep_in_rows, plan, rows_in, shared_out, stay

Array = np.ndarray[Any, np.dtype[Any]]
Decide = Callable[[Array, int], Array]  # bytes of a slab and where they begin -> what stays, as bool
Seen = Callable[[int], None]

SCOPES = ("global", "layer", "row", "erk")
IN_MEMORY = 2**26  # bytes of a tensor that is decided on as a whole
SLAB = 2**24  # bytes of whole rows
MOST_UNITS = 2**25  # channels or blocks whose scores are held


class Row(NamedTuple):
    """What is done with one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    weights: int
    kept: int | None  # None where it is not pruned, or not yet
    reason: str = ""  # why it is not pruned


@dataclass(frozen=True)
class Pruning:
    """What was done with a checkpoint, or would be."""

    rows: tuple[Row, ...]
    goal: int  # weights that go; of n:m by itself
    size: int  # bytes, before and after
    notes: tuple[str, ...] = ()
    done: bool = True

    @property
    def weights(self) -> int:
        """Weights that could go."""
        return sum(row.weights for row in self.rows if not row.reason)

    @property
    def pruned(self) -> int:
        """Weights that went."""
        return sum(row.weights - row.kept for row in self.rows if row.kept is not None)


class _Way(NamedTuple):
    """How a tensor is decided on: bytes of a slab, and what stays of one."""

    slab: int
    decide: Decide


@dataclass
class _Job:
    """A checkpoint, what of it is to be pruned, and how."""

    source: Checkpoint
    chosen: dict[str, names.Known]
    units: Units
    sparsity: float | None
    scope: Scope
    n_of_m: tuple[int, int] | None
    notes: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, Tensors]:
        """What is pruned."""
        return {name: self.source.tensors[name] for name in self.chosen}

    @property
    def read_before(self) -> int:
        """Bytes that are read before they are read again to be written, a sample aside."""
        sizes = [t.entry.nbytes for t in self.tensors.values()]
        if self.n_of_m is not None or self.scope == "row":
            return 0
        return sum(n for n in sizes if self.units.block is not None or self.scope == "global" or n > IN_MEMORY)

    @property
    def goal(self) -> int:
        """Weights that go; with channels and blocks, about so many."""
        weights = self.units.layers
        if self.n_of_m is not None:
            n, m = self.n_of_m
            return sum(w.parameter.numel() // m * (m - n) for w in weights.values())
        assert self.sparsity is not None
        if self.scope == "row":
            rows = [rows_in(w, w.parameter).shape for w in weights.values()]
            return sum(height * (width - stay(width, self.sparsity)) for height, width in rows)
        total = sum(w.parameter.numel() for w in weights.values())
        return total - stay(total, self.sparsity)


def prune_file(
    source: Any,
    target: Any = None,
    *,
    sparsity: float | None = None,
    scope: str = "global",
    granularity: Granularity = "weight",
    include: Any = None,
    exclude: Any = None,
    dry_run: bool = False,
) -> Pruning:
    """Write a pruned copy of a checkpoint, whole or not at all, and return what was done; arguments as of ``prune``.

    `source` is a safetensors file, a folder of one or its index, or a state dict of torch.save's; `target` a file, or
    for a folder a new folder. A file may be its own target.
    """
    with opened(source) as checkpoint:
        job = _job(checkpoint, sparsity, scope, granularity, include, exclude)
        every = names.known([t.entry for t in checkpoint.tensors.values()], checkpoint.config())
        if dry_run:
            return _told(job, every, None)
        path = target_of(checkpoint, target)
        with bar(checkpoint.size + job.read_before, "pruning", unit="B") as progress:
            ways = _ways(job, progress.update)
            with whole(checkpoint, path, checkpoint.size) as place:
                kept = _write(checkpoint, list(every), ways, place, progress.update)
        return _told(job, every, kept)


def _job(
    checkpoint: Checkpoint, sparsity: Any, scope: Any, granularity: Granularity, include: Any, exclude: Any
) -> _Job:
    """Everything that can be refused before a tensor is read is refused here."""
    n_of_m, block = parse_granularity(granularity)
    require(
        isinstance(scope, str) and scope in SCOPES,
        f"scope must be one of {', '.join(SCOPES)} for files, got {scope!r}"
        + ("; LAMP sorts whole layers: load the model and call gp.prune" if scope == "lamp" else ""),
    )
    if n_of_m is not None:
        n, m = n_of_m
        require(scope in ("global", "layer"), f"granularity {n}:{m} leaves nothing to allocate; got scope={scope!r}")
        require(
            sparsity is None or abs(sparsity - (1 - n / m)) < 1e-9,
            f"granularity {n}:{m} is itself a sparsity of {1 - n / m:g}: give no other",
        )
    else:
        require(sparsity is not None, "a sparsity is missing: the fraction of the weights that goes, such as 0.5")
        sparsity = checks.fraction("sparsity", sparsity)
    require(scope != "row" or block is None, f"scope='row' prunes single weights; got granularity={granularity!r}")
    config = checkpoint.config()
    chosen = names.chosen(names.known([t.entry for t in checkpoint.tensors.values()], config), include, exclude)
    notes = ["which tensors are weights was decided by their names: --dry-run lists them"]
    layers = {name: it.weight for name, it in chosen.items()}
    if n_of_m is not None or block is not None or scope == "row":
        layers = _with_axes(layers)
        check_fits(layers, n_of_m, block)
        if not config:
            notes.append("no config.json lies beside it: matrices are taken as stored [out, in]")
    elif len(layers) > 1:
        notes.append("between equal magnitudes of two tensors, the order of names decides")
    return _Job(checkpoint, chosen, Units(layers, block, None), sparsity, scope, n_of_m, notes)


def _with_axes(layers: Mapping[str, Weight]) -> dict[str, Weight]:
    for name, weight in layers.items():
        require(
            weight.axes is not None,
            f"which axis of {name!r}, {tuple(weight.parameter.shape)}, is the output and which the input is not known "
            "from a file: exclude it, or load the model and call gp.prune",
        )
    return dict(layers)


# ------------------------------------------------------------------------------------------------ what stays of each


def _ways(job: _Job, seen: Seen) -> dict[str, _Way]:
    units, tensors = job.units, job.tensors
    if job.n_of_m is not None:
        return {
            name: _in_slabs(t, units.layers[name], partial(_n_of_m, name, *job.n_of_m)) for name, t in tensors.items()
        }
    assert job.sparsity is not None
    if job.scope == "row":
        decide = partial(_in_each_row, job.sparsity)
        return {name: _in_slabs(t, units.layers[name], partial(decide, name)) for name, t in tensors.items()}
    if units.block is not None:
        return _of_units(job, seen)
    total = sum(t.entry.numel for t in tensors.values())
    keep = stay(total, job.sparsity)
    floors, warning = affordable_floors(units, keep, None)
    if warning:
        checks.warn(warning)
    if job.scope == "global":
        order, rules = order_of(list(tensors.values())), rule(tensors, keep, floors, seen)
        common = _most_common(rules)
        _warn_of_floors([name for name, found in rules.items() if found != common])
        ties = _Ties(lambda: common)
        alone = {name: _Ties(partial(rules.__getitem__, name)) for name in rules if rules[name] != common}
        return {name: _by_rule(t, order, alone.get(name, ties)) for name, t in tensors.items()}
    counts = shared_out(units, job.scope, keep, floors)
    return {name: _within_layer(name, t, counts[name], seen) for name, t in tensors.items()}


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


def _by_rule(t: Tensors, order: Order, ties: _Ties) -> _Way:
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

    return _Way(VALUES * dtype.itemsize, decide)


def _within_layer(name: str, t: Tensors, count: int, seen: Seen) -> _Way:
    dtype = DTYPES[t.entry.dtype]
    if t.entry.nbytes > IN_MEMORY:
        order = order_of([t])
        return _by_rule(t, order, _Ties(lambda: rule({name: t}, count, {name: 0}, seen)[name]))

    def decide(raw: Array, _: int) -> Array:
        values = torch.from_numpy(raw).view(dtype)
        return keep_largest({name: values}, count, by="magnitude")[0].numpy()

    return _Way(max(t.entry.nbytes, 1), decide)


def _in_slabs(t: Tensors, weight: Weight, decide: Callable[[Weight, Tensor], Tensor]) -> _Way:
    """Whole rows of the storage at a time, of which what stays can be said by itself."""
    shape, dtype = t.entry.shape, DTYPES[t.entry.dtype]
    row = t.entry.nbytes // max(shape[0], 1)
    step = max(1, SLAB // max(row, 1))
    if weight.axes != Axes():  # stored [in, out]: rows are no units, and a slab is the whole
        require(
            t.entry.nbytes <= 4 * IN_MEMORY,
            f"{t.entry.name!r} is stored [in, out] and has {t.entry.nbytes:,} bytes, too many to turn in memory",
        )
        step = shape[0]

    def as_flat(raw: Array, _: int) -> Array:
        values = torch.from_numpy(raw).view(dtype).view(-1, *shape[1:])
        part = weight._replace(parameter=_without_values(values))
        return decide(part, values).reshape(-1).numpy()

    return _Way(max(step * row, 1), as_flat)


def _without_values(values: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(values.shape, dtype=values.dtype, device="meta"), False)


def _n_of_m(name: str, n: int, m: int, weight: Weight, values: Tensor) -> Tensor:
    mask = keep_n_of_m(canonical(weight, values), n, m, by="magnitude", name=repr(name))
    return as_stored(weight, mask)


def _in_each_row(sparsity: float, name: str, weight: Weight, values: Tensor) -> Tensor:
    rows = rows_in(weight, values)
    mask = keep_in_rows(name, rows, stay(rows.shape[1], sparsity), "magnitude", None)
    return as_stored(weight, mask.view(canonical(weight, values).shape))


class _Scored(Units):
    """Units that are ranked by scores of their own, and whose masks stay masks over units."""

    def rank(self, ranked: Ranked) -> Ranked:
        """Return the scores as they are: they are the units' already."""
        return ranked

    def expand(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks as they are."""
        return dict(masks)


def _of_units(job: _Job, seen: Seen) -> dict[str, _Way]:
    """Channels or blocks: their scores are held, and their weights read again."""
    units, tensors = job.units, job.tensors
    number = sum(units.number(name) for name in tensors)
    require(
        number <= MOST_UNITS, f"{number:,} blocks are more than are held in memory ({MOST_UNITS:,}): take larger ones"
    )
    scores: dict[str, list[Tensor]] = {name: [] for name in tensors}
    ways = {}
    for name, t in tensors.items():
        weight, tile = units.layers[name], (units.block or (1,))[0]
        dtype, shape = DTYPES[t.entry.dtype], t.entry.shape
        row = t.entry.nbytes // max(shape[0], 1)
        step = tile * max(1, SLAB // max(row * tile, 1)) if weight.axes == Axes() else shape[0]
        require(step * row <= 4 * IN_MEMORY, f"{name!r} has rows of {row:,} bytes, too many to be held in memory")
        for start in range(0, t.entry.nbytes, max(step * row, 1)):
            raw = t.part.read(t.entry, start, min(start + step * row, t.entry.nbytes))
            values = torch.from_numpy(raw).view(dtype).view(-1, *shape[1:])
            part = Units({name: weight._replace(parameter=_without_values(values))}, units.block, None)
            scores[name].append(part.rank(Ranked({name: values}, "magnitude")).values[name])
            seen(raw.size)
        ways[name] = (max(step * row, 1), weight, row, tile)
    joined = {name: torch.cat(parts) for name, parts in scores.items()}
    choose = plan(_Scored(*units), job.sparsity, None, job.scope, None, None)
    masks = choose(Ranked(joined))

    def decide(name: str, raw: Array, start: int) -> Array:
        _, weight, row, tile = ways[name]
        slab = torch.empty(
            (raw.size // max(row, 1), *weight.parameter.shape[1:]), dtype=weight.parameter.dtype, device="meta"
        )
        part = Units({name: weight._replace(parameter=torch.nn.Parameter(slab, False))}, units.block, None)
        first, mask = start // max(row, 1) // tile, masks[name]
        if weight.axes == Axes():
            mask = mask[first : first + slab.shape[0] // tile]
        return part.expand({name: mask})[name].reshape(-1).numpy()

    return {name: _Way(ways[name][0], partial(decide, name)) for name in tensors}


def _most_common(rules: Mapping[str, Rule]) -> Rule:
    return Counter(rules.values()).most_common(1)[0][0]


def _warn_of_floors(alone: list[str]) -> None:
    """Warn of tensors that keep but their largest weight."""
    if alone:
        checks.warn(
            f"ranked with the others, {some(alone, 3)} would become empty, and one weight stays in each: "
            "scope layer or erk leaves more"
        )


# ------------------------------------------------------------------------------------------------------- and writing


def _write(
    checkpoint: Checkpoint, order: Iterable[str], ways: Mapping[str, _Way], place: Callable[[str], Any], seen: Seen
) -> dict[str, int]:
    """Write all parts, tensors in the given order; return how many weights stay of those that are pruned."""
    kept = dict.fromkeys(ways, 0)
    outputs = {part.name: Output(place(part.name), part.header) for part in checkpoint.parts}
    with _all(outputs.values()):
        for name in order:
            t, way = checkpoint.tensors[name], ways.get(name)
            slab = VALUES * 4 if way is None else way.slab
            for start in range(0, t.entry.nbytes, slab):
                raw = t.part.read(t.entry, start, min(start + slab, t.entry.nbytes))
                if way is not None:
                    mask = way.decide(raw, start)
                    kept[name] += int(np.count_nonzero(mask))
                    bits = raw.view(f"i{DTYPES[t.entry.dtype].itemsize}")
                    np.multiply(bits, mask.view(np.int8), out=bits)
                outputs[t.part.name].write(name, start, raw)
                seen(raw.size)
        for part in checkpoint.parts:
            part.check()
    return kept


class _all:
    """Several outputs, each ended as the block is."""

    def __init__(self, outputs: Iterable[Output]) -> None:
        self._outputs = list(outputs)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *how: Any) -> None:
        for output in self._outputs:
            output.__exit__(*how)


def _told(job: _Job, every: Mapping[str, names.Known], kept: Mapping[str, int] | None) -> Pruning:
    def rows() -> Iterator[Row]:
        for name, it in every.items():
            entry = it.entry
            reason = "" if name in job.chosen else it.reason or "is left out by include or exclude"
            left = None if kept is None or name not in kept else kept[name]
            yield Row(name, entry.dtype, entry.shape, entry.numel, left, reason)

    return Pruning(tuple(rows()), job.goal, job.source.size, tuple(job.notes), kept is not None)

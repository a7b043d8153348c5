"""Which magnitude is the k-th smallest, exactly, over tensors in files that no memory holds?

As ``core.select_cpu`` does it for tensors in memory: a sample brackets the k-th value, one pass over the bytes counts
what lies below the bracket and what lies inside it, key by key. So the files are read once, and again only where the
bracket missed (noticed by its counts) or is too wide to count every key in it. Memory is that of the counts, whatever
the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch

from gradprune.core.checkpoint import Tensors, spans
from gradprune.core.collect import raise_nan
from gradprune.core.header import DTYPES
from gradprune.core.order import Order, compared_as
from gradprune.core.threads import mapped, threads_of_torch

Array = np.ndarray[Any, np.dtype[Any]]
Seen = Callable[[int], None]  # told how many bytes were read

VALUES = 2**18  # of a piece: what is done to it is done in a cache
BLOCKS, IN_BLOCK = 4096, 512  # of the sample: places, and values that are read at each
WORTH = 16  # neighbours are alike: a block tells as much of the whole as so many values would
DEVIATIONS = 4  # of the sample's rank, to either side
BINS = 2**22  # keys that are counted one by one
GATHERED = 2**24  # keys that are kept, where the bracket is wider


class Rule(NamedTuple):
    """What stays of tensors that are ranked together: keys above this one, and its ties but for the first `surplus`."""

    key: int
    surplus: int


def order_of(tensors: Mapping[str, Tensors]) -> Order:
    """Return the order in which the magnitudes of all tensors stand."""
    dtypes = [DTYPES[t.entry.dtype] for t in tensors.values()]
    return Order(compared_as(reduce(torch.promote_types, dtypes)), "magnitude")


def keys_of(raw: Array, dtype: torch.dtype, order: Order) -> Array:
    """Return the keys of a tensor's bytes: its magnitudes as integers, in the order that may be a wider dtype's."""
    if dtype == order.dtype:
        bits = raw.view(f"i{dtype.itemsize}")
        found: Array = np.bitwise_and(bits, bits.dtype.type(order.magnitude_bits))
        return found
    return order.keys(order.compared(torch.from_numpy(raw).view(dtype))).numpy()


def rules(
    tensors: Mapping[str, Tensors], keep: int, floors: Mapping[str, int], order: Order, seen: Seen
) -> tuple[Rule, dict[str, Rule]]:
    """Return what stays where the largest `keep` of all tensors taken as one do, the later of equals first.

    A tensor that would keep fewer than its floor (at most 1) keeps its largest instead, by a rule of its own, and the
    others share the rest: what ``weights.plan`` does in memory. Each look costs one reading; mostly one is enough.
    """
    alone: dict[str, Rule] = {}
    while True:
        free = {name: t for name, t in tensors.items() if name not in alone}
        found, tops = _look(free, keep - len(alone), order, seen)
        short = _short(free, floors, tops, found, order, seen)
        if not short:
            return found, alone
        alone |= {name: Rule(tops[name].key, tops[name].times - 1) for name in short}


class _Top(NamedTuple):
    """The largest key of a tensor, and how many entries have it."""

    key: int
    times: int


def _look(tensors: Mapping[str, Tensors], keep: int, order: Order, seen: Seen) -> tuple[Rule, dict[str, _Top]]:
    """The rule for the largest `keep`, and each tensor's largest."""
    total = sum(t.entry.numel for t in tensors.values())
    rank = total - keep + 1 if keep else total  # of the smallest that stays, 1-based
    low, high, under = 0, order.highest + 1, 0  # the key lies in [low, high); so many lie under it
    tops: dict[str, _Top] = {}
    guess = True
    while True:
        a, b = _bracket(tensors, order, rank / max(total, 1)) if guess and total else (low, high)
        guess = False
        count = _count(tensors, order, a, b, seen)
        tops = tops or count.tops
        inside = rank - count.under
        if inside <= 0:
            high = a
        elif inside > count.inside:
            low = b
        else:
            under = count.under
            low, high, below, equal = count.locate(inside)
            if high - low == 1:
                break
    if not keep:
        return Rule(order.highest, total), tops
    above = total - under - below - equal
    return Rule(low, equal - (keep - above)), tops  # of the ties, as many go as are not needed


def _bracket(tensors: Mapping[str, Tensors], order: Order, fraction: float) -> tuple[int, int]:
    """Two keys between which the one of that rank should lie, by a sample."""
    sample = np.sort(np.concatenate([*_sample(tensors, order)]))
    worth = max(1.0, sample.size * WORTH / IN_BLOCK)
    slack = DEVIATIONS * math.sqrt(fraction * (1 - fraction) / worth) * sample.size + 2
    first, last = math.floor(fraction * sample.size - slack), math.ceil(fraction * sample.size + slack)
    low = int(sample[first]) if first >= 0 else 0
    high = int(sample[last]) + 1 if last < sample.size else order.highest + 1
    return max(0, min(low, order.highest)), min(high, order.highest + 1)


def _sample(tensors: Mapping[str, Tensors], order: Order) -> Iterator[Array]:
    """Keys of short blocks, evenly spread over all tensors, at places that are the same each time."""
    total = sum(t.entry.numel for t in tensors.values())
    step = max(IN_BLOCK, total // BLOCKS)
    rng, at = np.random.default_rng(0), 0
    for t in tensors.values():
        size = DTYPES[t.entry.dtype].itemsize
        for stratum in range(-(-at // step) * step - at, t.entry.numel, step):
            start = min(stratum + int(rng.integers(max(1, step - IN_BLOCK + 1))), max(0, t.entry.numel - IN_BLOCK))
            stop = min(start + IN_BLOCK, t.entry.numel)
            yield keys_of(t.part.read(t.entry, start * size, stop * size), DTYPES[t.entry.dtype], order)
        at += t.entry.numel
    yield np.empty(0, f"i{order.dtype.itemsize}")


@dataclass
class _Count:
    """What a pass saw of a bracket [low, high)."""

    low: int
    high: int
    under: int = 0
    inside: int = 0
    tops: dict[str, _Top] = field(default_factory=dict)
    gathered: list[Array] = field(default_factory=list)
    waiting: int = 0
    bins: Array | None = None

    @property
    def width(self) -> int:
        """Keys in one bin, a power of two."""
        return 1 << max(0, (self.high - self.low - 1).bit_length() - BINS.bit_length() + 1)

    def add(self, keys: Array) -> None:
        """Count keys that lie inside."""
        self.inside += keys.size
        self.gathered.append(keys)
        self.waiting += keys.size
        if self.waiting > (2**20 if self.width == 1 else GATHERED):
            self.fold()

    def fold(self) -> None:
        """Count in bins what was gathered."""
        if self.bins is None:
            self.bins = np.zeros(-(-(self.high - self.low) // self.width), np.int64)
        shift = self.width.bit_length() - 1
        for keys in self.gathered:
            places = (keys - keys.dtype.type(self.low)) >> keys.dtype.type(shift)
            if places.size * 8 > self.bins.size:
                self.bins += np.bincount(places, minlength=self.bins.size)
            else:
                np.add.at(self.bins, places, 1)
        self.gathered, self.waiting = [], 0

    def locate(self, rank: int) -> tuple[int, int, int, int]:
        """Narrow the place of the key with this rank inside: [low, high), how many inside lie below it, and in it."""
        if self.bins is None and self.width > 1:
            keys = np.concatenate(self.gathered)
            keys.partition(rank - 1)
            key = int(keys[rank - 1])
            return key, key + 1, int(np.count_nonzero(keys < key)), int(np.count_nonzero(keys == key))
        self.fold()
        assert self.bins is not None
        up_to = np.cumsum(self.bins)
        at = int(np.searchsorted(up_to, rank))
        low = self.low + at * self.width
        return low, min(low + self.width, self.high), int(up_to[at] - self.bins[at]), int(self.bins[at])


def _count(tensors: Mapping[str, Tensors], order: Order, low: int, high: int, seen: Seen) -> _Count:
    """One pass over all bytes."""
    count = _Count(low, high, tops=dict.fromkeys(tensors, _Top(-1, 0)))
    pieces = (piece for t in tensors.values() for piece in _pieces(t))
    for name, size, one in mapped(partial(_counted, order, low, high), pieces, threads_of_torch()):
        if one.top.key > order.highest:
            raise_nan(repr(name))
        top = count.tops[name]
        if one.top.key >= top.key:
            count.tops[name] = one.top if one.top.key > top.key else _Top(top.key, top.times + one.top.times)
        count.under += one.under
        if one.inside.size:
            count.add(one.inside)
        seen(size)
    return count


class _Piece(NamedTuple):
    """What was seen of a piece of a tensor."""

    top: _Top
    under: int
    inside: Array


def _counted(order: Order, low: int, high: int, piece: tuple[Tensors, int, int]) -> tuple[str, int, _Piece]:
    t, start, stop = piece
    keys = keys_of(t.part.read(t.entry, start, stop), DTYPES[t.entry.dtype], order)
    largest = keys.max()
    top = _Top(int(largest), int(np.count_nonzero(keys == largest)))
    if largest < low:
        return t.entry.name, stop - start, _Piece(top, keys.size, keys[:0])
    inside = keys >= keys.dtype.type(low)
    under = keys.size - int(np.count_nonzero(inside))
    if high <= order.highest:
        inside &= keys < keys.dtype.type(high)
    return t.entry.name, stop - start, _Piece(top, under, keys[np.flatnonzero(inside)])


def _pieces(t: Tensors) -> Iterator[tuple[Tensors, int, int]]:
    for start, stop in spans(t.entry, VALUES * DTYPES[t.entry.dtype].itemsize):
        yield t, start, stop


def _keys(t: Tensors, order: Order, seen: Seen) -> Iterator[Array]:
    for _, start, stop in _pieces(t):
        seen(stop - start)
        yield keys_of(t.part.read(t.entry, start, stop), DTYPES[t.entry.dtype], order)


def _short(
    tensors: Mapping[str, Tensors],
    floors: Mapping[str, int],
    tops: Mapping[str, _Top],
    found: Rule,
    order: Order,
    seen: Seen,
) -> list[str]:
    """The tensors of which the rule leaves fewer than their floors."""
    none_above = [name for name, top in tops.items() if floors[name] and top.key <= found.key]
    tied = [name for name in none_above if tops[name].key == found.key]
    if not tied or not found.surplus:
        return [name for name in none_above if name not in tied]
    short, surplus = [], found.surplus
    for name, t in tensors.items():  # the first ties go, tensor by tensor
        ties = sum(int(np.count_nonzero(keys == keys.dtype.type(found.key))) for keys in _keys(t, order, seen))
        if name in none_above and ties <= surplus:
            short.append(name)
        surplus = max(0, surplus - ties)
    return short

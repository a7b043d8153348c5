"""How is the k-th smallest found, and the largest marked, in the memory of the CPU?

Sorting a hundred million weights to learn one threshold is waste. A small sample brackets the k-th value between two
of its order statistics; one pass over the weights counts what lies below the bracket and gathers the few values inside
it; the k-th value is found among those. A bracket that missed is noticed by its counts, and moved: the answer is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradprune.core.collect import Kept, Values, raise_nan
from gradprune.core.threads import in_shares, threads_of_torch

Array = np.ndarray[Any, np.dtype[Any]]
R = TypeVar("R")

CHUNK = 2**18  # values: a chunk's buffers stay in cache, and threads seldom wait for the interpreter's lock
SAMPLE = 2**17  # values that place the bracket
DEVIATIONS = 4  # of the sample's rank, to either side: one bracket in 16,000 misses, and costs a second pass
GATHER_ALL = 2**18  # this few candidates are gathered without a bracket
PARALLEL = 2**19  # values: below this a second thread costs more than it brings


class _Piece(NamedTuple):
    tensor: int  # position in the list of tensors
    where: slice


class Inside(NamedTuple):
    """What of a piece lies inside the bracket."""

    piece: _Piece
    keys: Array
    positions: Array  # within the piece, ascending; empty where no masks are wanted


class Located(NamedTuple):
    """The k-th smallest key, how many keys lie strictly below it, and how many are equal to it."""

    key: int
    below: int
    equal: int
    inside: list[Inside] | None = None  # where the masks mark all above a bracket: what lies in it, ties and all
    above: Sequence[int] = ()  # and how many they mark in each tensor


def locate(values: Values, k: int, masks: list[Array] | None = None) -> Located:
    """Narrow (below, above), whose counts are known, until it holds one key, or few enough to gather.

    What lies above the last bracket is True in `masks`, and the rest False.
    """
    chunks, order = Chunks(values), values.order
    floor = order.lowest if values.among is None else order.barred
    below, up_to_below = floor - 1, 0
    above, under_above = order.highest + 1, values.total
    few = max(GATHER_ALL, values.total // 32)
    rng = np.random.default_rng(0)  # its own: torch's generators stay as they are, and a call repeats
    attempt = 0
    while True:
        candidates = under_above - up_to_below
        low, high = below, above
        if candidates > few:
            rank = (k - up_to_below) / candidates
            low, high = _bracket(_sample(chunks, rng), below, above, rank) if attempt < 4 else (below, above)
            if (low, high) == (below, above):  # no help from the sample: halve, which ends in at most 64 passes
                low = (below + above) // 2
                high = low + 1
        seen = count_between(chunks, low, high, few if high - low > 2 else 0, masks, check=attempt == 0)
        if seen.first_nan is not None:
            raise_nan(values.names[seen.first_nan])
        attempt += 1
        if k <= seen.up_to_low:
            above, under_above = low + 1, seen.up_to_low
        elif k > seen.below_high:
            below, up_to_below = high - 1, seen.below_high
        elif seen.inside is not None:
            located = _kth_inside([part.keys for part in seen.inside], k - seen.up_to_low, seen.up_to_low)
            return located if masks is None else located._replace(inside=seen.inside, above=seen.above)
        else:
            below, up_to_below, above, under_above = low, seen.up_to_low, high, seen.below_high
        if above - below == 2:
            return Located(below + 1, up_to_below, under_above - up_to_below)


def keep(values: Values, k: int) -> Kept:
    """Keys above the k-th largest stay, and of those equal to it the last."""
    if k == 0:
        locate(values, values.total)  # NaN is an error, all the same
        none = [torch.zeros(t.shape, dtype=torch.bool, device="cpu") for t in values.tensors]
        return Kept(none, [0] * len(none))
    masks = [np.empty(t.numel(), np.bool_) for t in values.tensors]  # NumPy asks for huge pages: half the time
    found = locate(values, values.total - k + 1, masks)
    stay = k - (values.total - found.below - found.equal)  # of the ties
    if found.inside is None:
        _mark(values, masks, found, stay)
        counts = [int(np.count_nonzero(m)) for m in masks]
    else:
        counts = list(found.above)
        for part, stays in _stay_inside(found.inside, found.key, found.equal - stay):
            masks[part.piece.tensor][part.piece.where][part.positions] = stays
            counts[part.piece.tensor] += int(np.count_nonzero(stays))
    shaped = [torch.from_numpy(m).view(t.shape) for m, t in zip(masks, values.tensors, strict=True)]
    return Kept(shaped, counts)


def _stay_inside(inside: list[Inside], key: int, surplus: int) -> Iterator[tuple[Inside, Array]]:
    """Which of those inside the bracket stay: what is above the key, and its ties but for the first `surplus`."""
    for part in inside:
        stays = part.keys >= key
        if surplus:
            ties = np.flatnonzero(part.keys == key)
            stays[ties[:surplus]] = False
            surplus -= min(surplus, ties.size)
        yield part, stays


def _mark(values: Values, masks: list[Array], found: Located, stay: int) -> None:
    """Let all keys above the one found stay, and the last of its ties, in a pass over all values."""
    chunks = Chunks(values)
    # Whatever the ties are at first, the fewer of them are then set right one by one.
    surplus = found.equal - stay
    mark = np.greater if stay < surplus else np.greater_equal

    def work(pieces: Sequence[_Piece], buffers: _Buffers) -> None:
        for piece in pieces:
            keys = chunks.barred_keys(piece, buffers)
            mark(keys, keys.dtype.type(found.key), out=masks[piece.tensor][piece.where])

    chunks.each(work)
    if stay < surplus:
        _set_ties(chunks, masks, found.key, stay, reversed(chunks.pieces), kept=True)
    else:
        _set_ties(chunks, masks, found.key, surplus, chunks.pieces, kept=False)


class _Buffers:
    """What one thread needs to look at `size` values at a time."""

    def __init__(self, integer: torch.dtype, size: int) -> None:
        dtype = torch.empty(0, dtype=integer, device="cpu").numpy().dtype
        self.keys, self.signs = np.empty(size, dtype), np.empty(size, dtype)
        self.low, self.high = np.empty(size, np.bool_), np.empty(size, np.bool_)


class Chunks:
    """The values, chunk by chunk, as NumPy keys; NumPy releases the interpreter's lock, so threads share the work."""

    def __init__(self, values: Values) -> None:
        self.values, self.order = values, values.order
        self.pieces = [
            _Piece(i, slice(start, min(start + CHUNK, t.numel())))
            for i, t in enumerate(values.tensors)
            for start in range(0, t.numel(), CHUNK)
        ]
        self.bits = [self._flat_bits(t) for t in values.tensors]
        self.among = None if values.among is None else [a.contiguous().view(-1).numpy() for a in values.among]

    def _flat_bits(self, tensor: Tensor) -> Array | None:
        """The tensor's own memory as integers in logical order; None where a chunk has to be copied or converted."""
        if not tensor.is_contiguous() or tensor.dtype != self.order.dtype:
            return None
        return tensor.view(-1).view(self.order.integer).numpy()

    def _bits(self, tensor: int, positions: slice | Array) -> Array:
        flat = self.bits[tensor]
        if flat is not None:
            return flat[positions]
        whole = self.values.tensors[tensor]
        if whole.is_contiguous():
            index = positions if isinstance(positions, slice) else torch.from_numpy(positions)
            taken = whole.view(-1)[index]
        else:
            if isinstance(positions, slice):
                positions = np.arange(positions.start, positions.stop)
            taken = torch.take(whole, torch.from_numpy(positions))
        return self.order.compared(taken).view(self.order.integer).numpy()

    def keys(self, tensor: int, positions: slice | Array, buffers: _Buffers) -> Array:
        """Keys of one tensor at flat positions, at most a chunk of them; the result may be the buffer."""
        bits = self._bits(tensor, positions)
        if not self.order.is_float:
            return bits
        keys = buffers.keys[: bits.size]
        np.bitwise_and(bits, self.order.magnitude_bits, out=keys)
        if self.order.by == "value":
            signs = np.right_shift(bits, 8 * bits.itemsize - 1, out=buffers.signs[: bits.size])  # 0 or -1
            np.bitwise_xor(keys, signs, out=keys)
            np.subtract(keys, signs, out=keys)
        return keys

    def bar(self, keys: Array, tensor: int, positions: slice | Array) -> Array:
        """Set the keys of entries that may not stay below all others, in place."""
        if self.among is not None:
            keys -= keys.dtype.type(self.order.barred)  # wraps around, and back
            keys *= self.among[tensor][positions]
            keys += keys.dtype.type(self.order.barred)
        return keys

    def barred_keys(self, piece: _Piece, buffers: _Buffers) -> Array:
        """Keys of a piece, those of entries that may not stay below all others."""
        return self.bar(self.keys(piece.tensor, piece.where, buffers), piece.tensor, piece.where)

    def has_nan(self, keys: Array) -> bool:
        """Whether one of the keys is that of a NaN."""
        if not self.order.is_float:
            return False
        return bool(keys.max() > self.order.highest or (self.order.by == "value" and keys.min() < self.order.lowest))

    def each(self, work: Callable[[Sequence[_Piece], _Buffers], R]) -> list[R]:
        """Run `work` over contiguous shares of the pieces, on several threads where that pays; results in order."""
        threads = threads_of_torch() if self.values.total >= PARALLEL else 1
        longest = max((t.numel() for t in self.values.tensors), default=0)
        spare = [_Buffers(self.order.integer, min(CHUNK, longest)) for _ in range(threads)]

        def with_buffers(pieces: Sequence[_Piece]) -> R:
            buffers = spare.pop()
            try:
                return work(pieces, buffers)
            finally:
                spare.append(buffers)

        return in_shares(with_buffers, self.pieces, threads)


@dataclass
class Count:
    """What a pass over the values saw of the bracket (low, high)."""

    above: list[int]  # keys >= high, of each tensor
    up_to_low: int = 0
    below_high: int = 0
    first_nan: int | None = None
    inside: list[Inside] | None = None


def _sample(chunks: Chunks, rng: np.random.Generator) -> Array:
    """Sorted keys at random positions, one in each of `SAMPLE` equal strata."""
    sizes = [t.numel() for t in chunks.values.tensors]
    strata = np.arange(SAMPLE) + rng.random(SAMPLE)
    positions = (strata * (sum(sizes) / SAMPLE)).astype(np.int64).clip(max=sum(sizes) - 1)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    cuts = np.searchsorted(positions, ends)
    buffers = _Buffers(chunks.order.integer, SAMPLE)
    picked = []
    for i, part in enumerate(np.split(positions, cuts[:-1])):
        if part.size:
            part = part - starts[i]
            picked.append(chunks.bar(chunks.keys(i, part, buffers).copy(), i, part))
    return np.sort(np.concatenate(picked))


def _bracket(sample: Array, below: int, above: int, rank: float) -> tuple[int, int]:
    """Two keys some standard deviations of the sample's rank to either side of where the k-th should lie."""
    inside = sample[np.searchsorted(sample, below, "right") : np.searchsorted(sample, above, "left")]
    if inside.size < 64:
        return below, above
    centre, slack = rank * inside.size, DEVIATIONS * math.sqrt(inside.size * rank * (1 - rank)) + 2
    first, last = math.floor(centre - slack), math.ceil(centre + slack)
    low = int(inside[first]) if first >= 0 else below
    high = int(inside[last]) if last < inside.size else above
    if high - low < 2:  # ties, or an end of all keys: there is nothing strictly between
        low, high = max(below, low - 1), min(above, high + 1)
    return low, high


def count_between(
    chunks: Chunks, low: int, high: int, few: int, masks: list[Array] | None = None, *, check: bool
) -> Count:
    """Return of one pass how many keys are <= low and < high, and those strictly between while they are at most `few`.

    The masks become True for keys >= high, and False for others. Where `check` finds a NaN nothing else is true.
    """
    found, lock = [0], Lock()  # keys inside the bracket so far, over all threads

    def work(pieces: Sequence[_Piece], buffers: _Buffers) -> Count:
        seen, inside = Count([0] * len(chunks.bits)), []
        for piece in pieces:
            keys = chunks.keys(piece.tensor, piece.where, buffers)
            if check and chunks.has_nan(keys):
                seen.first_nan = piece.tensor
                break
            keys = chunks.bar(keys, piece.tensor, piece.where)
            kept = buffers.high[: keys.size] if masks is None else masks[piece.tensor][piece.where]
            above = _compare(np.greater_equal, keys, high, kept)
            up_to_low = _compare(np.less_equal, keys, low, buffers.low[: keys.size])
            n_above = int(np.count_nonzero(above))
            n_low, n_high = int(np.count_nonzero(up_to_low)), keys.size - n_above
            seen.above[piece.tensor] += n_above
            seen.up_to_low += n_low
            seen.below_high += n_high
            if few and n_high > n_low:
                with lock:
                    found[0] += n_high - n_low
                if found[0] <= few:
                    between = np.equal(up_to_low, above, out=up_to_low)  # neither
                    where = np.flatnonzero(between)
                    wanted = where.astype(np.int32) if masks is not None else where[:0]
                    inside.append(Inside(piece, keys[where], wanted))
        seen.inside = inside
        return seen

    counts = chunks.each(work)
    nans = [c.first_nan for c in counts if c.first_nan is not None]
    complete = few > 0 and found[0] <= few
    return Count(
        [sum(c.above[i] for c in counts) for i in range(len(chunks.bits))],
        sum(c.up_to_low for c in counts),
        sum(c.below_high for c in counts),
        min(nans, default=None),
        inside=[part for c in counts for part in c.inside or []] if complete else None,
    )


def _compare(ufunc: np.ufunc, keys: Array, bound: int, out: Array) -> Array:
    """`ufunc(keys, bound)`, where the bound may lie one beyond what the keys' dtype can hold."""
    limits = np.iinfo(keys.dtype)
    if limits.min <= bound <= limits.max:
        ufunc(keys, keys.dtype.type(bound), out=out)
    else:
        out.fill(ufunc(0, bound))
    return out


def _kth_inside(inside: list[Array], k: int, below: int) -> Located:
    candidates = np.concatenate(inside)
    candidates.partition(k - 1)
    key = candidates[k - 1]
    return Located(int(key), below + int(np.count_nonzero(candidates < key)), int(np.count_nonzero(candidates == key)))


def _set_ties(chunks: Chunks, masks: list[Array], key: int, left: int, pieces: Iterable[_Piece], *, kept: bool) -> None:
    """Let the first `left` ties of these pieces go, or, from their end, the last stay."""
    buffers = _Buffers(chunks.order.integer, CHUNK)
    for piece in pieces:
        if left == 0:
            return
        keys, mask = chunks.barred_keys(piece, buffers), masks[piece.tensor][piece.where]
        ties = np.equal(keys, keys.dtype.type(key), out=buffers.low[: keys.size])
        number = int(np.count_nonzero(ties))
        if number > left:
            where, number = np.flatnonzero(ties), left
            mask[where[-left:] if kept else where[:left]] = kept
        elif number:
            (np.logical_or if kept else np.greater)(mask, ties, out=mask)  # greater: and not
        left -= number

"""Which k values are the largest, exactly, over many tensors taken as one (chapter 4).

Sorting a hundred million weights to learn one threshold is waste. A small sample brackets the k-th value between two
of its order statistics; one pass over the weights counts what lies below the bracket and gathers the few values inside
it; the k-th value is found among those. A bracket that missed is noticed by its counts, and moved: the answer is exact.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Tensors = Tensor | Iterable[Tensor] | Mapping[str, Tensor]
By = Literal["value", "magnitude"]
Array = np.ndarray[Any, np.dtype[Any]]

CHUNK = 2**18  # values: a chunk's buffers stay in cache, and threads seldom wait for the interpreter's lock
DEVICE_CHUNK = 2**25  # values: large enough to keep an accelerator busy, small beside its memory
SAMPLE = 2**16  # values that place the bracket
GATHER_ALL = 2**18  # this few candidates are gathered without a bracket
PARALLEL = 2**19  # values: below this a second thread costs more than it brings
MAX_THREADS = 8  # more only wait for the interpreter's lock

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ORDERED_BITS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_INDEXED = {*_ORDERED_BITS, *_PLAIN_INTEGERS}  # others lack torch.take, and are widened whole: they are narrow


def kth_smallest(tensors: Tensors, k: int, *, by: By = "value") -> Tensor:
    """The k-th smallest value (1-based) of all tensors taken as one, exactly.

    `tensors` is one tensor, an iterable of tensors or a mapping from names to tensors, of any shapes, on the CPU or on
    accelerators; nothing is joined or sorted as a whole. ``by="magnitude"`` ranks floating values by what they are
    without their sign, complex ones by their modulus. Returns a 0-d tensor of the common dtype (the modulus's, of
    complex values), on the device of the first tensor.
    Raises ValueError where k is not between 1 and the number of values, where a value is NaN (the tensor is named),
    and where integers and floating values are mixed.
    Floyd and Rivest (1975), algorithm SELECT, for the bracket from a sample; chapter 4.
    """
    values = _collect(tensors, by)
    k = operator.index(k)
    if not 1 <= k <= values.total:
        raise ValueError(f"k must be between 1 and the number of values, which is {values.total}; got {k}")
    found = _locate(values, k)
    return values.order.value(found.key).to(device=values.tensors[0].device, dtype=values.dtype)


def keep_largest(tensors: Tensors, k: int, *, by: By = "value", among: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Bool masks that are True for exactly the k largest of all values; among equals the later position stays.

    "Later" runs through the tensors in the order given, and through each in its logical (row-major) order. `tensors`
    and `by` are as in ``kth_smallest``. `among`, bool tensors of the same shapes, bars every entry that is False
    there (floating values only). Returns one mask a tensor, of its shape and on its device.
    Raises ValueError where k is not between 0 and the number of values (with `among`, of those not barred), and where
    a value is NaN (the tensor is named).
    Chapter 4.
    """
    values = _collect(tensors, by, among)
    k = operator.index(k)
    limit = values.total if among is None else sum(int(allowed.sum()) for allowed in among)
    if not 0 <= k <= limit:
        raise ValueError(f"k must be between 0 and the number of values, which is {limit}; got {k}")
    if values.total == 0:
        return [torch.ones_like(t, dtype=torch.bool) for t in values.tensors]
    found = _locate(values, max(values.total - k + 1, 1) if k else values.total)
    if k == 0:
        return [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in values.tensors]
    surplus_ties = (values.total - found.below) - k
    return (_masks_on_cpu if values.on_cpu else _masks_on_device)(values, found.key, surplus_ties)


def keep_n_of_m(tensor: Tensor, n: int, m: int, *, dim: int = 1, by: By = "value", name: str = "tensor") -> Tensor:
    """A bool mask that is True for the n largest of every m consecutive values along `dim`; the later of equals stays.

    `by` as in ``kth_smallest``; `name` is what an error calls the tensor. Returns a mask of the tensor's shape.
    Raises ValueError where not 0 <= n <= m, where m does not divide the dimension, and where a value is NaN.
    Mishra et al. (2021), section 3, for 2 of 4; chapter 4.
    """
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n of m needs 0 <= n <= m and m >= 1, got {n}:{m}")
    if tensor.shape[dim] % m:
        raise ValueError(f"{name}: dimension {dim} has {tensor.shape[dim]} entries, not a multiple of m = {m}")
    groups = tensor.detach().movedim(dim, -1)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=tensor.device)
    flat_groups, flat_mask = groups.reshape(-1, m), mask.view(-1, m)
    later = torch.ones(m, m, dtype=torch.bool, device=tensor.device).triu(1)
    rows = max(1, 2**21 // (m * m))
    for values, out in zip(torch.split(flat_groups, rows), torch.split(flat_mask, rows), strict=True):
        if bool(values.isnan().any()):
            _raise_nan(name)
        values = values.abs() if by == "magnitude" else values
        own, other = values.unsqueeze(2), values.unsqueeze(1)
        outranked_by = ((other > own) | ((other == own) & later)).sum(dim=2)
        torch.lt(outranked_by, n, out=out)
    return mask.movedim(-1, dim)


class Located(NamedTuple):
    """The k-th smallest key, and how many keys lie strictly below it."""

    key: int
    below: int


# ------------------------------------------------------------------------------------------------------------ order


class _Order(NamedTuple):
    """Integer keys that compare as the values do, so that one code serves every dtype.

    An IEEE number without its sign bit, read as an integer, grows with its magnitude; negating it where the sign bit
    was set orders all numbers, makes the two zeros equal, and leaves every NaN beyond the infinities.
    """

    dtype: torch.dtype  # what the values are compared as
    by: By

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def integer(self) -> torch.dtype:
        return _INTEGER_OF_SIZE[self.dtype.itemsize] if self.is_float else self.dtype

    @property
    def magnitude_bits(self) -> int:
        return int(torch.iinfo(self.integer).max)

    @property
    def highest(self) -> int:
        if not self.is_float:
            return int(torch.iinfo(self.dtype).max)
        return int(torch.tensor(math.inf, dtype=self.dtype).view(self.integer))

    @property
    def lowest(self) -> int:
        if not self.is_float:
            return int(torch.iinfo(self.dtype).min)
        return 0 if self.by == "magnitude" else -self.highest

    @property
    def barred(self) -> int:
        """A key below all others, for entries that must not stay."""
        return self.lowest - 1

    def value(self, key: int) -> Tensor:
        if not self.is_float:
            return torch.tensor(key, dtype=self.dtype)
        value = torch.tensor(abs(key), dtype=self.integer).view(self.dtype)
        return -value if key < 0 else value

    def keys(self, values: Tensor) -> Tensor:
        """The keys of a tensor, on its device."""
        values = values.to(self.dtype)
        if not self.is_float:
            return values
        bits = values.view(self.integer)
        magnitude = bits & self.magnitude_bits
        return magnitude if self.by == "magnitude" else torch.where(bits < 0, -magnitude, magnitude)


class _Values(NamedTuple):
    names: list[str]
    tensors: list[Tensor]
    among: Sequence[Tensor] | None
    order: _Order
    dtype: torch.dtype  # of the answer
    total: int

    @property
    def on_cpu(self) -> bool:
        return all(t.device.type == "cpu" for t in self.tensors)


def _collect(tensors: Tensors, by: By, among: Sequence[Tensor] | None = None) -> _Values:
    if by not in ("value", "magnitude"):
        raise ValueError(f'by must be "value" or "magnitude", got {by!r}')
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    if isinstance(tensors, Mapping):
        names, given = [repr(name) for name in tensors], list(tensors.values())
    else:
        given = list(tensors)
        names = [f"tensor {i} of {len(given)} (counted from 0)" for i in range(len(given))]
    for name, tensor in zip(names, given, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if by == "magnitude":
        given = [_modulus(t.detach()) if t.is_complex() else t for t in given]
    dtype = _common_dtype(names, given)
    found = [t.detach() if t.dtype in _INDEXED else t.detach().to(_compared_as(t.dtype)) for t in given]
    order = _Order(_compared_as(dtype), by)
    if by == "magnitude" and not order.is_float:
        raise ValueError(f'by="magnitude" ranks floating values, got {dtype}')
    if among is not None:
        _check_among(names, found, among, order)
    return _Values(names, found, among, order, dtype, sum(t.numel() for t in found))


def _modulus(values: Tensor) -> Tensor:
    """The modulus of complex values, NaN where either part is: beside an infinity it would be lost."""
    return values.abs().masked_fill_(values.isnan(), math.nan)


def _common_dtype(names: list[str], tensors: list[Tensor]) -> torch.dtype:
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.is_complex() or tensor.dtype == torch.uint64:
            raise ValueError(
                f"{name} is {tensor.dtype}; values must be real numbers, or integers of at most 63 bits"
                + ("; by='magnitude' ranks complex ones by their modulus" if tensor.is_complex() else "")
            )
    dtypes = {t.dtype for t in tensors}
    if len({d.is_floating_point for d in dtypes}) > 1:
        raise ValueError(f"values must be all floating or all integer, got {sorted(map(str, dtypes))}")
    if len(dtypes) <= 1:
        return dtypes.pop() if dtypes else torch.float32
    return reduce(torch.promote_types, [_compared_as(d) for d in dtypes])


def _compared_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose bits order well and which holds every value of `dtype` exactly."""
    if dtype in _ORDERED_BITS or dtype in _PLAIN_INTEGERS:
        return dtype
    if dtype.is_floating_point:
        return torch.float32  # eight-bit floats
    return torch.uint8 if dtype == torch.bool else torch.int64  # unsigned 16 and 32 bits


def _check_among(names: list[str], tensors: list[Tensor], among: Sequence[Tensor], order: _Order) -> None:
    if not order.is_float:
        raise ValueError(f"`among` needs floating values, got {order.dtype}")
    if len(among) != len(tensors):
        raise ValueError(f"`among` must hold one bool tensor for each of {len(tensors)} tensors, got {len(among)}")
    for name, tensor, allowed in zip(names, tensors, among, strict=True):
        if allowed.dtype != torch.bool or allowed.shape != tensor.shape:
            raise ValueError(
                f"`among` for {name} must be bool of shape {tuple(tensor.shape)}, "
                f"got {allowed.dtype} of shape {tuple(allowed.shape)}"
            )


def _raise_nan(name: str) -> None:
    raise ValueError(f"{name} contains NaN, which has no place in an order; find out where it comes from first")


def _locate(values: _Values, k: int) -> Located:
    return (_locate_on_cpu if values.on_cpu else _locate_on_device)(values, k)


# -------------------------------------------------------------------------------------------------------------- CPU


class _Piece(NamedTuple):
    tensor: int  # position in the list of tensors
    start: int
    stop: int


class _Buffers:
    """What one thread needs to look at `size` values at a time."""

    def __init__(self, integer: torch.dtype, size: int) -> None:
        dtype = torch.empty(0, dtype=integer).numpy().dtype
        self.keys, self.signs = np.empty(size, dtype), np.empty(size, dtype)
        self.low, self.high = np.empty(size, np.bool_), np.empty(size, np.bool_)


class _Chunks:
    """The values, chunk by chunk, as NumPy keys; NumPy releases the interpreter's lock, so threads share the work."""

    def __init__(self, values: _Values) -> None:
        self.values, self.order = values, values.order
        self.pieces = [
            _Piece(i, start, min(start + CHUNK, t.numel()))
            for i, t in enumerate(values.tensors)
            for start in range(0, t.numel(), CHUNK)
        ]
        self.bits = [self._flat_bits(t) for t in values.tensors]
        self.among = None if values.among is None else [_flat_bool(a) for a in values.among]

    def _flat_bits(self, tensor: Tensor) -> Array | None:
        """The tensor's own memory as integers in logical order; None where a chunk has to be copied or converted."""
        if not tensor.is_contiguous() or tensor.dtype != self.order.dtype:
            return None
        return tensor.view(-1).view(self.order.integer).numpy()

    def _bits(self, tensor: int, positions: slice | Array) -> Array:
        flat = self.bits[tensor]
        if flat is not None:
            return flat[positions]
        if isinstance(positions, slice):
            positions = np.arange(positions.start, positions.stop)
        taken = torch.take(self.values.tensors[tensor], torch.from_numpy(positions))
        return taken.to(self.order.dtype).view(self.order.integer).numpy()

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

    def has_nan(self, keys: Array) -> bool:
        if not self.order.is_float:
            return False
        return bool(keys.max() > self.order.highest or (self.order.by == "value" and keys.min() < self.order.lowest))

    def each(self, work: Callable[[Iterable[_Piece], _Buffers], Any]) -> list[Any]:
        """Run `work` over all pieces, on as many threads as torch itself would use; each gets a contiguous share."""
        threads = min(torch.get_num_threads(), MAX_THREADS) if self.values.total >= PARALLEL else 1
        share = -(-len(self.pieces) // threads)
        shares = [self.pieces[i : i + share] for i in range(0, len(self.pieces), share)]
        buffers = [_Buffers(self.order.integer, CHUNK) for _ in shares]
        if len(shares) == 1:
            return [work(shares[0], buffers[0])]
        with ThreadPoolExecutor(len(shares)) as pool:
            return list(pool.map(work, shares, buffers))


def _flat_bool(mask: Tensor) -> Array:
    return mask.detach().contiguous().view(-1).numpy()


@dataclass
class _Count:
    """What a pass over the values saw of the bracket (low, high)."""

    up_to_low: int = 0
    below_high: int = 0
    first_nan: int | None = None
    inside: list[Array] | None = None


def _locate_on_cpu(values: _Values, k: int) -> Located:
    """Narrow (below, above), whose counts are known, until it holds one key, or few enough to gather."""
    chunks, order = _Chunks(values), values.order
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
        seen = _count(chunks, low, high, few if high - low > 2 else 0, check=attempt == 0)
        attempt += 1
        if k <= seen.up_to_low:
            above, under_above = low + 1, seen.up_to_low
        elif k > seen.below_high:
            below, up_to_below = high - 1, seen.below_high
        elif seen.inside is not None:
            return _kth_inside(seen.inside, k - seen.up_to_low, seen.up_to_low)
        else:
            below, up_to_below, above, under_above = low, seen.up_to_low, high, seen.below_high
        if above - below == 2:
            return Located(below + 1, up_to_below)


def _sample(chunks: _Chunks, rng: np.random.Generator) -> Array:
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
    """Two keys five standard deviations of the sample's rank to either side of where the k-th should lie."""
    inside = sample[np.searchsorted(sample, below, "right") : np.searchsorted(sample, above, "left")]
    if inside.size < 64:
        return below, above
    centre, slack = rank * inside.size, 5 * math.sqrt(inside.size * rank * (1 - rank)) + 2
    first, last = math.floor(centre - slack), math.ceil(centre + slack)
    low = int(inside[first]) if first >= 0 else below
    high = int(inside[last]) if last < inside.size else above
    return (low - 1, high + 1) if low == high else (low, high)


def _count(chunks: _Chunks, low: int, high: int, few: int, *, check: bool) -> _Count:
    """One pass: how many keys are <= low and < high, and those strictly between while they are at most `few`."""
    gathered: list[list[Array]] = []
    found, lock = [0], Lock()  # keys inside the bracket so far, over all threads

    def work(pieces: Iterable[_Piece], buffers: _Buffers) -> _Count:
        seen, inside = _Count(), []
        for piece in pieces:
            where = slice(piece.start, piece.stop)
            keys = chunks.keys(piece.tensor, where, buffers)
            if check and chunks.has_nan(keys):
                seen.first_nan = piece.tensor
                break
            keys = chunks.bar(keys, piece.tensor, where)
            up_to_low = _compare(np.less_equal, keys, low, buffers.low)
            below_high = _compare(np.less, keys, high, buffers.high)
            n_low, n_high = np.count_nonzero(up_to_low), np.count_nonzero(below_high)
            seen.up_to_low += int(n_low)
            seen.below_high += int(n_high)
            if few and n_high > n_low:
                with lock:
                    found[0] += int(n_high - n_low)
                if found[0] <= few:
                    inside.append(keys[np.not_equal(up_to_low, below_high, out=up_to_low)])
        gathered.append(inside)
        return seen

    counts = chunks.each(work)
    nans = [c.first_nan for c in counts if c.first_nan is not None]
    if nans:
        _raise_nan(chunks.values.names[min(nans)])
    complete = few > 0 and found[0] <= few
    return _Count(
        sum(c.up_to_low for c in counts),
        sum(c.below_high for c in counts),
        inside=[keys for part in gathered for keys in part] if complete else None,
    )


def _compare(ufunc: np.ufunc, keys: Array, bound: int, out: Array) -> Array:
    """`ufunc(keys, bound)`, where the bound may lie one beyond what the keys' dtype can hold."""
    limits = np.iinfo(keys.dtype)
    out = out[: keys.size]
    if limits.min <= bound <= limits.max:
        ufunc(keys, keys.dtype.type(bound), out=out)
    else:
        out.fill(bound > limits.max)
    return out


def _kth_inside(inside: list[Array], k: int, below: int) -> Located:
    candidates = np.concatenate(inside)
    inside.clear()
    candidates.partition(k - 1)
    key = candidates[k - 1]
    return Located(int(key), below + int(np.count_nonzero(candidates < key)))


def _masks_on_cpu(values: _Values, key: int, surplus_ties: int) -> list[Tensor]:
    """Keys at or above `key` stay, save the first `surplus_ties` of those equal to it."""
    chunks = _Chunks(values)
    masks = [np.empty(t.numel(), np.bool_) for t in values.tensors]  # NumPy asks for huge pages: half the time

    def work(pieces: Iterable[_Piece], buffers: _Buffers) -> None:
        for piece in pieces:
            where = slice(piece.start, piece.stop)
            keys = chunks.bar(chunks.keys(piece.tensor, where, buffers), piece.tensor, where)
            np.greater_equal(keys, keys.dtype.type(key), out=masks[piece.tensor][where])

    chunks.each(work)
    _drop_first_ties(chunks, masks, key, surplus_ties)
    return [torch.from_numpy(m).view(t.shape) for m, t in zip(masks, values.tensors, strict=True)]


def _drop_first_ties(chunks: _Chunks, masks: list[Array], key: int, surplus: int) -> None:
    buffers = _Buffers(chunks.order.integer, CHUNK)
    for piece in chunks.pieces:
        if surplus == 0:
            return
        where = slice(piece.start, piece.stop)
        keys = chunks.bar(chunks.keys(piece.tensor, where, buffers), piece.tensor, where)
        ties = np.flatnonzero(keys == key)[:surplus]
        masks[piece.tensor][where][ties] = False
        surplus -= ties.size


# ----------------------------------------------------------------------------------------------------- accelerators


def _key_chunks(values: _Values) -> Iterable[tuple[int, slice, Tensor]]:
    for i, tensor in enumerate(values.tensors):
        flat = tensor.reshape(-1)
        allowed = None if values.among is None else values.among[i].reshape(-1)
        for start in range(0, flat.numel(), DEVICE_CHUNK):
            where = slice(start, start + DEVICE_CHUNK)
            keys = values.order.keys(flat[where])
            yield i, where, keys if allowed is None else torch.where(allowed[where], keys, values.order.barred)


def _locate_on_device(values: _Values, k: int) -> Located:
    """Halve the range of keys, one pass a bit; every number stays on the device until the answer is read."""
    order, home = values.order, values.tensors[0].device
    _check_nan_on_device(values, home)
    low = torch.tensor(order.lowest if values.among is None else order.barred, device=home)
    high = torch.tensor(order.highest, device=home)
    for _ in range(8 * order.dtype.itemsize):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        enough = _count_on_device(values, torch.le, middle) >= k
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    key, below = torch.stack([high, _count_on_device(values, torch.lt, high)]).tolist()
    return Located(key, below)


def _count_on_device(values: _Values, compare: Callable[[Tensor, Tensor], Tensor], bound: Tensor) -> Tensor:
    count = torch.zeros((), dtype=torch.int64, device=bound.device)
    for _, _, keys in _key_chunks(values):
        # The bound as a tensor of the keys' dtype: a 64-bit one would not widen the keys, yet must not be read here.
        count += compare(keys, bound.to(keys.device, keys.dtype)).sum().to(bound.device, non_blocking=True)
    return count


def _check_nan_on_device(values: _Values, home: torch.device) -> None:
    if values.order.is_float:
        flags = [torch.isnan(t.to(values.order.dtype)).any().to(home, non_blocking=True) for t in values.tensors]
        for name, found in zip(values.names, torch.stack(flags).tolist(), strict=True):
            if found:
                _raise_nan(name)


def _masks_on_device(values: _Values, key: int, surplus_ties: int) -> list[Tensor]:
    masks = [torch.empty(t.numel(), dtype=torch.bool, device=t.device) for t in values.tensors]
    dropped: Tensor | int = 0
    for i, where, keys in _key_chunks(values):
        torch.ge(keys, key, out=masks[i][where])
        if surplus_ties:
            ties = keys == key
            rank = ties.cumsum(0) + (dropped.to(keys.device) if isinstance(dropped, Tensor) else dropped)
            masks[i][where] &= ~(ties & (rank <= surplus_ties))
            dropped = rank[-1]
    return [m.view(t.shape) for m, t in zip(masks, values.tensors, strict=True)]

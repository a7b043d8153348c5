"""How are the largest marked in an accelerator's memory, with every weight read once and one wait?

A sample brackets the k-th value from both sides, as on the CPU; here an end of the bracket is a value *and* a position,
so that ties do not widen it. One pass marks what lies above the bracket and compacts the few entries inside it into
arrays of a size known beforehand, so that the device need not be waited for. Then the counts are read: the only wait.
They say whether the bracket holds the k-th value; if so the largest among those few are marked too, else the pass is
taken again with a wider one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gradprune.core.collect import Kept, Values, raise_nan
from gradprune.core.order import Order

CHUNK = 2**24  # values: large enough to keep an accelerator busy, small beside its memory
ROW = 2**12  # values that are compared with one bound
SAMPLE = (2**12, 2**20)  # the fewest and the most values that place the bracket
RATE = 64  # one value in so many is sampled, within those
ROOM = 5  # times what the sample has inside: a fifth of all values may hold all of it, and is not looked at again
GATHER_ALL = 2**18  # this few values are all compacted, without a bracket


def kth_smallest(values: Values, k: int) -> Tensor:
    """The k-th smallest value, 0-d, on the first tensor's device."""
    k = values.total - k + 1  # among the largest
    found = _narrow(values, k, None)
    keys = found.keys.sort().values
    return values.order.values(keys[keys.numel() - (k - found.above)])


def keep(values: Values, k: int) -> Kept:
    """The k largest stay, of equal ones the last."""
    if values.among is not None:
        values = values._replace(among=[allowed.contiguous() for allowed in values.among])
    masks = [torch.empty(t.numel(), dtype=torch.bool, device=t.device) for t in values.tensors]
    found = _narrow(values, k, masks)
    ascending = found.keys.sort(stable=True).indices  # equal ones by position
    stay = torch.zeros(found.keys.shape, dtype=torch.bool, device=found.keys.device)
    stay.index_fill_(0, ascending[ascending.numel() - (k - found.above) :], True)
    for part, stays in zip(found.inside, stay.split([part.positions.numel() for part in found.inside]), strict=True):
        mask = masks[part.piece.tensor][part.piece.where]
        mask[part.positions] = stays.to(mask.device, non_blocking=True)
    shaped = [m.view(t.shape) for m, t in zip(masks, values.tensors, strict=True)]
    return Kept(shaped, found.above_by_tensor)


class _Bound(NamedTuple):
    """One end of the bracket: a key and a position, 0-d on the device. Equal keys are ordered by position."""

    key: Tensor
    position: Tensor

    def on(self, device: torch.device) -> _Bound:
        return _Bound(self.key.to(device, non_blocking=True), self.position.to(device, non_blocking=True))


class _Piece(NamedTuple):
    tensor: int  # position in the list of tensors
    where: slice
    start: int  # the position of its first entry, over all tensors
    values: Tensor  # flat


class _Inside(NamedTuple):
    """What of a piece lies inside the bracket."""

    piece: _Piece
    positions: Tensor  # within the piece, ascending
    keys: Tensor


class _Found(NamedTuple):
    above: int  # how many entries lie above the bracket
    above_by_tensor: list[int]
    inside: list[_Inside]
    keys: Tensor  # of all inside, by position


class _Bracket(NamedTuple):
    low: _Bound
    high: _Bound
    share: float  # of all entries that are inside, as the sample has it


def _narrow(values: Values, k: int, masks: list[Tensor] | None) -> _Found:
    """Mark what lies above a bracket around the k-th largest, and return what lies inside, the k-th among it."""
    deviations, every = 4.0, max(values.total // SAMPLE[1], min(values.total // SAMPLE[0], RATE))
    while True:
        every = _prime_up_to(every)
        bracket = _bracket(values, k, deviations, every)
        found = _pass(values, k, bracket, masks)
        if found is not None:
            return found
        deviations, every = deviations * 4, every - 1  # up to all of the sample, and then there are no bounds


def _bracket(values: Values, k: int, deviations: float, every: int) -> _Bracket:
    """Bounds some standard deviations of the sample's rank to either side of the k-th largest."""
    low, high = _bound(values, values.order.lowest, 0), _bound(values, values.order.highest, values.total)
    if values.total <= GATHER_ALL:
        return _Bracket(low, high, 1.0)
    keys = _sample(values, every)
    size, rank = keys.numel(), 1 - k / values.total
    slack = deviations * math.sqrt(size * rank * (1 - rank)) + 4
    first, last = math.floor(rank * size - slack), math.ceil(rank * size + slack)
    order = keys.sort(stable=True).indices
    if first >= 0:
        found = _at(keys, order, first, every)
        barred = found.key < values.order.lowest
        low = _Bound(*(torch.where(barred, ours, theirs) for ours, theirs in zip(low, found, strict=True)))
    if last < size:
        high = _at(keys, order, last, every)
    return _Bracket(low, high, min(1.0, (last - first) / size))


def _at(sample: Tensor, order: Tensor, rank: int, every: int) -> _Bound:
    index = order[rank : rank + 1]  # an index of no dimension would be waited for
    return _Bound(sample[index].to(torch.int64).view(()), (index * every).view(()))


def _bound(values: Values, key: int, position: int) -> _Bound:
    home = values.tensors[0].device
    return _Bound(*(torch.full((), number, dtype=torch.int64, device=home) for number in (key, position)))


def _sample(values: Values, every: int) -> Tensor:
    """Keys of every n-th value of all, from the first; n is a prime, so that it goes round the columns of a matrix."""
    home = values.tensors[0].device
    keys, start = [], 0
    for i, tensor in enumerate(values.tensors):
        first = -start % every
        if first < tensor.numel():
            taken = values.order.keys(values.order.compared(_taken(tensor, first, every)))
            if values.among is not None:
                barred = _taken(values.among[i], first, every).logical_not()
                taken = taken.masked_fill(barred, values.order.barred)
            keys.append(taken.to(home, non_blocking=True))
        start += tensor.numel()
    return torch.cat(keys)


def _taken(tensor: Tensor, first: int, every: int) -> Tensor:
    if tensor.is_contiguous():
        return tensor.view(-1)[first::every]
    return torch.take(tensor, torch.arange(first, tensor.numel(), every, dtype=torch.int64, device=tensor.device))


def _prime_up_to(number: int) -> int:
    while number > 1 and any(number % d == 0 for d in range(2, math.isqrt(number) + 1)):
        number -= 1
    return max(1, number)


def _pieces(values: Values) -> Iterator[_Piece]:
    """All values in logical order, at most `CHUNK` at a time."""
    start = 0
    for i, tensor in enumerate(values.tensors):
        offset = 0
        for part in _parts(tensor):
            yield _Piece(i, slice(offset, offset + part.numel()), start + offset, part)
            offset += part.numel()
        start += offset


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's values, flat, each part whole rows or a single shorter one; only what is strided is copied."""
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        whole = flat.numel() - flat.numel() % ROW
        for start in range(0, whole, CHUNK):
            yield flat[start : min(start + CHUNK, whole)]
        if whole < flat.numel():
            yield flat[whole:]
    elif tensor.numel() <= CHUNK:
        yield from _parts(tensor.contiguous())
    else:
        step = max(1, CHUNK * tensor.shape[0] // tensor.numel())
        for start in range(0, tensor.shape[0], step):
            some = tensor[start : start + step]
            yield from _parts(some[0] if step == 1 and some.dim() > 1 else some)


def _pass(values: Values, k: int, bracket: _Bracket, masks: list[Tensor] | None) -> _Found | None:
    """Look at every value once, and wait once; None where the bracket misses the k-th largest."""
    home = values.tensors[0].device
    inside: list[_Inside] = []
    numbers: list[Tensor] = []
    for piece in _pieces(values):
        size = piece.values.numel()
        mask = None if masks is None else masks[piece.tensor][piece.where]
        entries, above, rest, allowed, nan = _compare(values, piece, bracket, mask)
        positions = _positions(rest, min(size, math.ceil(ROOM * bracket.share * size) + 64))
        keys = values.order.keys(entries[positions])
        if values.order.is_float:
            least, most = keys.aminmax()
            nan = [*nan, (most > values.order.highest) | (least < -values.order.highest)]
        numbers.append(_stack(home, piece.values.device, above.sum(), rest.sum(), allowed, *nan))
        inside.append(_Inside(piece, positions, keys))
    ends = torch.stack([*bracket.low, *bracket.high])
    counts, (low_key, low_position, high_key, high_position) = _read(torch.stack(numbers), ends)
    for part, (_, _, _, *flags) in zip(inside, counts, strict=True):
        if any(flags):
            raise_nan(values.names[part.piece.tensor])
    if k > (limit := sum(allowed for _, _, allowed, *_ in counts)):
        raise ValueError(f"k must be between 0 and the number of values, which is {limit}; got {k}")
    above_by_tensor = [0] * len(values.tensors)
    for part, (number, *_) in zip(inside, counts, strict=True):
        above_by_tensor[part.piece.tensor] += number
    if not 0 <= k - sum(above_by_tensor) <= sum(found for _, found, *_ in counts):
        return None
    # Beyond the ends of an integer's range there is no bound that would leave equal ones out.
    exact = values.order.is_float or values.order.lowest < low_key < values.order.highest
    rows = (low_position, high_position) if low_key == high_key and exact else (0, values.total)
    whole = [_whole(values, part, found, bracket, *rows) for part, (_, found, *_) in zip(inside, counts, strict=True)]
    keys = torch.cat([part.keys.to(home, non_blocking=True) for part in whole])
    return _Found(sum(above_by_tensor), above_by_tensor, whole, keys)


def _compare(
    values: Values, piece: _Piece, bracket: _Bracket, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | int, list[Tensor]]:
    """What is compared, which lie above the bracket (the mask), which inside, how many may stay, whether one is NaN."""
    order, flat = values.order, piece.values
    entries = _entries(order, flat).view(-1, min(ROW, flat.numel()))
    above = _above(order, entries, bracket.high, piece.start, None if mask is None else mask.view(entries.shape))
    rest = _below(order, entries, bracket.low, piece.start)
    if values.among is None:
        rest.eq_(above)  # neither below nor above; as is NaN, which its key then tells
        return entries.view(-1), above, rest.view(-1), flat.numel(), []
    allowed = values.among[piece.tensor].view(-1)[piece.where].view(entries.shape)
    rest.logical_not_().logical_and_(allowed)
    above.logical_and_(allowed)
    rest.logical_xor_(above)
    return entries.view(-1), above, rest.view(-1), allowed.sum(), [entries.amax().isnan()]


def _entries(order: Order, flat: Tensor) -> Tensor:
    """What is compared: numbers of a dtype whose order is theirs."""
    if order.is_float:
        compared = order.compared(flat)
        return compared.abs() if order.by == "magnitude" and not flat.is_complex() else compared
    # Eight bits need a bound below the least of them.
    return flat.to(torch.int16 if order.dtype.itemsize == 1 else order.dtype)


def _above(order: Order, entries: Tensor, high: _Bound, start: int, out: Tensor | None) -> Tensor:
    """Which entries lie above the bracket for certain."""
    key, position = high.on(entries.device)
    bound = key + (_row_starts(entries, start) < position)  # there, equal ones lie below the bracket's end, or may
    if order.is_float:
        return torch.ge(entries, order.values(bound).unsqueeze(1), out=out)
    least = torch.iinfo(entries.dtype).min
    return torch.gt(entries, (bound - 1).clamp(min=least).to(entries.dtype).unsqueeze(1), out=out)


def _below(order: Order, entries: Tensor, low: _Bound, start: int) -> Tensor:
    """Which entries lie below the bracket for certain."""
    key, position = low.on(entries.device)
    before = _row_starts(entries, start) + entries.shape[1] <= position
    bound = key + (before & (key < order.highest))
    bound = order.values(bound) if order.is_float else bound.to(entries.dtype)
    return torch.lt(entries, bound.unsqueeze(1))


def _row_starts(entries: Tensor, start: int) -> Tensor:
    rows, length = entries.shape
    return torch.arange(start, start + rows * length, length, dtype=torch.int64, device=entries.device)


def _positions(flags: Tensor, number: int) -> Tensor:
    """The first positions where flags are True, ascending; -1 for those that are lacking."""
    try:
        return torch.nonzero_static(flags, size=number, fill_value=-1).view(-1)
    except NotImplementedError:  # for this device: its answer must be waited for
        found = flags.nonzero().view(-1)[:number]
        return torch.nn.functional.pad(found, (0, number - found.numel()), value=-1)


def _whole(values: Values, part: _Inside, found: int, bracket: _Bracket, first: int, last: int) -> _Inside:
    """All that is inside: cut, or looked for again where there was no room. Positions from `first` to `last` only."""
    piece, room = part.piece, part.positions.numel()
    if found <= room:
        return part._replace(positions=part.positions[:found], keys=part.keys[:found])
    size = piece.values.numel()
    start = max(0, first - piece.start) // ROW * ROW
    stop = min(size, -(-(last - piece.start) // ROW) * ROW)
    where = slice(piece.where.start + start, piece.where.start + stop)
    some = _Piece(piece.tensor, where, piece.start + start, piece.values[start:stop])
    entries, _, rest, *_ = _compare(values, some, bracket, None)
    positions = _positions(rest, found)
    return _Inside(some, positions, values.order.keys(entries[positions]))


def _stack(home: torch.device, device: torch.device, *numbers: Tensor | int) -> Tensor:
    whole = [
        n.to(torch.int64) if isinstance(n, Tensor) else torch.full((), n, dtype=torch.int64, device=device)
        for n in numbers
    ]
    return torch.stack(whole).to(home, non_blocking=True)


def _read(counts: Tensor, ends: Tensor) -> tuple[list[list[int]], list[int]]:
    """Wait for the device: the only time."""
    flat = torch.cat([ends, counts.view(-1)]).cpu().tolist()
    width = counts.shape[1]
    return [flat[i : i + width] for i in range(ends.numel(), len(flat), width)], flat[: ends.numel()]

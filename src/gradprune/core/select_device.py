"""How are the largest marked in an accelerator's memory, with every weight read once and one wait?

A sample brackets the k-th value from both sides, as on the CPU; here an end of the bracket is a value *and* a position,
so that ties do not widen it. One pass marks what lies above the bracket and compacts the few entries inside it into
arrays of a size known beforehand, so that the device need not be waited for. Then the counts are read: the only wait.
They say whether the bracket holds the k-th value and the arrays all that is inside; if so the largest among those few
are marked too, else the pass is taken again with more room.
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
    complete: bool  # whether there was room for all inside
    allowed: int  # how many entries may stay at all


def _narrow(values: Values, k: int, masks: list[Tensor] | None) -> _Found:
    """Mark what lies above a bracket around the k-th largest, and return what lies inside, the k-th among it."""
    generators: dict[torch.device, torch.Generator] = {}
    deviations, wait = 4.0, False
    while True:
        low, high, share = _bracket(values, k, deviations, generators)
        found = _pass(values, low, high, None if wait else max(3 * share, 2**-6), masks)
        if k > found.allowed:
            raise ValueError(f"k must be between 0 and the number of values, which is {found.allowed}; got {k}")
        if not found.complete:
            wait = True  # from now on each piece is asked how many entries are inside
        elif 0 <= k - found.above <= found.keys.numel():
            return found
        else:
            deviations *= 4  # up to all of the sample, and then there are no bounds


def _bracket(
    values: Values, k: int, deviations: float, generators: dict[torch.device, torch.Generator]
) -> tuple[_Bound, _Bound, float]:
    """Bounds some standard deviations of the sample's rank to either side of the k-th largest; the share between."""
    low, high = _bound(values, values.order.lowest, 0), _bound(values, values.order.highest, values.total)
    if values.total <= GATHER_ALL:
        return low, high, 1.0
    keys, positions = _sample(values, generators)
    size, rank = keys.numel(), 1 - k / values.total
    slack = deviations * math.sqrt(size * rank * (1 - rank)) + 4
    first, last = math.floor(rank * size - slack), math.ceil(rank * size + slack)
    order = keys.sort(stable=True).indices
    if first >= 0:
        key = keys[order[first]]
        barred = key < values.order.lowest
        low = _Bound(torch.where(barred, low.key, key), torch.where(barred, low.position, positions[order[first]]))
    if last < size:
        high = _Bound(keys[order[last]], positions[order[last]])
    return low, high, min(1.0, (last - first) / size)


def _bound(values: Values, key: int, position: int) -> _Bound:
    home = values.tensors[0].device
    return _Bound(*(torch.full((), number, dtype=torch.int64, device=home) for number in (key, position)))


def _sample(values: Values, generators: dict[torch.device, torch.Generator]) -> tuple[Tensor, Tensor]:
    """Keys and positions of values picked at random, one in each of equal strata, by position."""
    size = max(SAMPLE[0], min(values.total // 256, SAMPLE[1]))
    home = values.tensors[0].device
    keys, positions, start = [], [], 0
    for i, tensor in enumerate(values.tensors):
        strata = (start + tensor.numel()) * size // values.total - start * size // values.total
        if strata:
            device = tensor.device
            if device not in generators:  # its own: torch's generators stay as they are, and a call repeats
                generators[device] = torch.Generator(device)
                generators[device].manual_seed(0)
            within = torch.rand(strata, generator=generators[device], dtype=torch.float64, device=device)
            at = torch.arange(strata, dtype=torch.float64, device=device).add_(within).mul_(tensor.numel() / strata)
            at = at.to(torch.int64).clamp_(max=tensor.numel() - 1)
            taken = values.order.keys(values.order.compared(_take(tensor, at))).to(torch.int64)
            if values.among is not None:
                taken.masked_fill_(_take(values.among[i], at).logical_not_(), values.order.barred)
            keys.append(taken.to(home, non_blocking=True))
            positions.append(at.add_(start).to(home, non_blocking=True))
        start += tensor.numel()
    return torch.cat(keys), torch.cat(positions)


def _take(tensor: Tensor, positions: Tensor) -> Tensor:
    return tensor.view(-1)[positions] if tensor.is_contiguous() else torch.take(tensor, positions)


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
        yield from _parts(tensor.reshape(-1))
    else:
        step = max(1, CHUNK * tensor.shape[0] // tensor.numel())
        for start in range(0, tensor.shape[0], step):
            some = tensor[start : start + step]
            yield from _parts(some[0] if step == 1 and some.dim() > 1 else some)


def _pass(values: Values, low: _Bound, high: _Bound, room: float | None, masks: list[Tensor] | None) -> _Found:
    """Look at every value once. `room` is the share of a piece's entries that may be inside; None: as many as are."""
    home, order = values.tensors[0].device, values.order
    inside: list[_Inside] = []
    numbers: list[Tensor] = []
    for piece in _pieces(values):
        size = piece.values.numel()
        entries = _entries(order, piece.values).view(-1, min(ROW, size))
        mask = None if masks is None else masks[piece.tensor][piece.where].view(entries.shape)
        above, rest = _above(order, entries, high, piece.start, mask), _below(order, entries, low, piece.start)
        if values.among is None:
            rest.eq_(above)  # neither below nor above: inside, or NaN
            allowed_nan: list[Tensor | int] = [size, 0]
        else:
            allowed = values.among[piece.tensor].view(-1)[piece.where].view(entries.shape)
            rest.logical_not_().logical_and_(allowed)
            above.logical_and_(allowed)
            rest.logical_xor_(above)
            allowed_nan = [allowed.sum(), entries.amax().isnan()]
        most = size if room is None else min(size, math.ceil(size * room) + 2 * ROW)
        positions = _positions(rest.view(-1), None if room is None else most)
        keys = order.keys(entries.view(-1)[positions]).to(torch.int64)
        filled = positions >= 0
        nan = (keys.abs() > order.highest).any() if order.is_float else 0
        numbers.append(_stack(home, piece.values.device, above.sum(), filled.sum(), *allowed_nan, nan))
        inside.append(_Inside(piece, positions, keys))
    return _read(values, inside, torch.stack(numbers), room)


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


def _positions(flags: Tensor, most: int | None) -> Tensor:
    """Where flags are True, ascending: `most` numbers, the last of them -1, or as many as there are."""
    if most is not None:
        try:
            return torch.nonzero_static(flags, size=most, fill_value=-1).view(-1)
        except NotImplementedError:  # by this device: its answer must be waited for
            pass
    return flags.nonzero().view(-1)


def _stack(home: torch.device, device: torch.device, *numbers: Tensor | int | bool) -> Tensor:
    whole = [
        n.to(torch.int64) if isinstance(n, Tensor) else torch.full((), n, dtype=torch.int64, device=device)
        for n in numbers
    ]
    return torch.stack(whole).to(home, non_blocking=True)


def _read(values: Values, inside: list[_Inside], numbers: Tensor, room: float | None) -> _Found:
    """Wait for the device, check what it counted, and cut the arrays to what they hold."""
    above_by_tensor, allowed, complete, cut = [0] * len(values.tensors), 0, True, []
    for part, (above, found, may_stay, *nan) in zip(inside, numbers.tolist(), strict=True):
        if any(nan):
            raise_nan(values.names[part.piece.tensor])
        above_by_tensor[part.piece.tensor] += above
        allowed += may_stay
        complete &= room is None or found < part.positions.numel() or found == part.piece.values.numel()
        cut.append(part._replace(positions=part.positions[:found], keys=part.keys[:found]))
    keys = torch.cat([part.keys.to(numbers.device, non_blocking=True) for part in cut])
    return _Found(sum(above_by_tensor), above_by_tensor, cut, keys, complete, allowed)

"""Which k values are the largest, exactly, over tensors that are spread over several processes?

A sample says between which keys of ``order`` the wanted one most likely lies. Each rank counts what is below them and
takes what is between, or all where the sample missed or too many are equal. Of these the wanted key is found digit by
digit: how often each value of the upper 15 bits occurs on all ranks says in which of them it lies, the same of the next
bits inside it says the key. Each rank sends counts, never its values. Of values equal to the key the later stay, by
their place in the whole: where some of them must go, the place of the first that stays is found in the same way. So the
masks are those of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from gradprune.core.collect import Kept, collect, raise_nan
from gradprune.core.masked import count_kept
from gradprune.core.order import Order
from gradprune.core.sharded import Ranks, Shard
from gradprune.core.uncompiled import uncompiled

FIRST, NEXT = 15, 16  # bits of a digit
PIECE = 2**17  # entries at a time, which a cache holds
SAMPLE = 2**16  # entries of all ranks
MOST_BETWEEN = 0.25  # of a rank's entries that are copied
Numbers = Callable[[], Iterator[Tensor]]


@uncompiled
def keep_and_count(shards: Mapping[str, Shard], ranks: Ranks, k: int) -> Kept:
    """Return this rank's blocks of the masks that are True for the k largest magnitudes, and how many each whole keeps.

    All ranks call it with the same names and k. Of shared tensors the lowest rank's values decide for all. Raises
    ValueError on all ranks, naming the tensor, where one of them holds a NaN.
    """
    names, parts = list(shards), list(shards.values())
    order = collect([s.local for s in parts], "magnitude", names=names).order
    total = sum(part.numel for part in parts)
    if total == 0:
        return Kept([torch.ones_like(p.local, dtype=torch.bool) for p in parts], [0] * len(parts))
    # With no value to stay, the largest is looked for all the same: NaN is an error.
    key, below, equal = _locate(names, parts, order, min(total, total - k + 1), ranks)
    if k == 0:
        return Kept([torch.zeros_like(p.local, dtype=torch.bool) for p in parts], [0] * len(parts))
    first = _first_to_stay(parts, order, key, equal - (k - (total - below - equal)), ranks)
    masks = [_mask(part, order, key, start) for part, start in zip(parts, first, strict=True)]
    _let_first_decide_(parts, masks, ranks)
    return Kept(masks, count(parts, masks, ranks))


def count(shards: Iterable[Shard], masks: Iterable[Tensor], ranks: Ranks) -> list[int]:
    """Return how many entries of each whole mask are True."""
    own = [count_kept(m) if s.owned else 0 for s, m in zip(shards, masks, strict=True)]
    return ranks.sum(torch.tensor(own, dtype=torch.int64, device="cpu")).tolist()


def _keys(shard: Shard, order: Order) -> Iterator[Tensor]:
    for piece in shard.local.detach().resolve_neg().reshape(-1).split(PIECE):
        if piece.numel():
            yield order.keys(order.compared(piece))


def _locate(names: list[str], parts: list[Shard], order: Order, k: int, ranks: Ranks) -> tuple[int, int, int]:
    """The k-th smallest key of all, how many are below it, and how many equal it."""
    low, high = _bracket(parts, order, k, ranks)
    between: list[Tensor] = []
    most = sum(part.local.numel() for part in parts) * MOST_BETWEEN
    nan, below, inside, left = [0] * len(parts), 0, 0, 0
    for i, part in enumerate(parts):
        for keys in _keys(part, order):
            nan[i] |= int(keys.max()) > order.highest
            if part.owned:
                below += count_kept(keys < low)
                within = (keys >= low).logical_and_(keys <= high)
                number = count_kept(within)
                inside += number
                if inside <= most:
                    between.append(_where(keys, within) - low)
                else:
                    left = 1
    told = ranks.sum(torch.tensor([*nan, below, inside, left], dtype=torch.int64, device="cpu")).tolist()
    *nan, below, inside, left = told
    for name, found in zip(names, nan, strict=True):
        if found:
            raise_nan(repr(name))
    if left or not below < k <= below + inside:  # many are equal, or the sample missed
        every = lambda: (keys for part in parts if part.owned for keys in _keys(part, order))  # noqa: E731
        return _kth_smallest(every, order.magnitude_bits.bit_length(), k, ranks)
    key, lower, equal = _kth_smallest(lambda: iter(between), (high - low).bit_length(), k - below, ranks)
    return key + low, below + lower, equal


def _bracket(parts: list[Shard], order: Order, k: int, ranks: Ranks) -> tuple[int, int]:
    """Two keys between which the k-th smallest very likely lies, by the upper bits of a sample."""
    step = -(-sum(part.numel for part in parts) // SAMPLE)
    bits = order.magnitude_bits.bit_length()
    shift = max(0, bits - FIRST)
    counts = torch.zeros(2**FIRST, dtype=torch.int64, device=ranks.device)
    for part in parts:
        if part.owned:
            some = order.keys(order.compared(part.local.detach().resolve_neg().reshape(-1)[::step].contiguous()))
            counts += torch.bincount(some >> shift, minlength=2**FIRST).to(ranks.device)
    up_to = ranks.sum(counts).cumsum(0)
    number = int(up_to[-1])
    middle, margin = k / sum(part.numel for part in parts) * number, 4 * number**0.5
    ends = torch.searchsorted(up_to, torch.tensor([max(1.0, middle - margin), min(number, middle + margin)]).long())
    low, high = ends.clamp_(0, 2**FIRST - 1).tolist()
    return low << shift, ((high + 1) << shift) - 1


def _where(keys: Tensor, within: Tensor) -> Tensor:
    """The keys where a mask is True, faster than by the mask where that is seldom and the keys are on the CPU."""
    if keys.device.type != "cpu":
        return keys[within]
    return torch.from_numpy(keys.numpy()[np.flatnonzero(within.numpy())])


def _kth_smallest(numbers: Numbers, bits: int, k: int, ranks: Ranks) -> tuple[int, int, int]:
    """The k-th smallest of all ranks' numbers, which have so many bits; how many are below it, how many equal it."""
    digit, step, shift, below = 0, min(bits, FIRST), max(0, bits - FIRST), 0
    first = True
    while True:
        counts = torch.zeros(2**step, dtype=torch.int64, device=ranks.device)
        for some in numbers():
            if not first:
                some = some[some >> (shift + step) == digit]
            here = torch.bincount((some >> shift) & (2**step - 1), minlength=2**step)
            counts += here.to(ranks.device)
        counts = ranks.sum(counts)
        up_to = counts.cumsum(0)
        found = int(torch.searchsorted(up_to, k - below))
        below += int(up_to[found] - counts[found])
        digit, first = digit << step | found, False
        if shift == 0:
            return digit, below, int(counts[found])
        step = min(shift, NEXT)
        shift -= step


def _first_to_stay(parts: list[Shard], order: Order, key: int, going: int, ranks: Ranks) -> list[int]:
    """For each tensor the place from which on values equal to the key stay, so that the first `going` of all go."""
    if going == 0:
        return [0] * len(parts)
    ties = [sum(count_kept(keys == key) for keys in _keys(p, order)) if p.owned else 0 for p in parts]
    ties = ranks.sum(torch.tensor(ties, dtype=torch.int64, device="cpu")).tolist()
    first = []
    for part, number in zip(parts, ties, strict=True):
        if going >= number:
            first.append(part.numel)
        elif going == 0:
            first.append(0)
        else:
            first.append(_kth_smallest(_places(part, order, key), part.numel.bit_length(), going + 1, ranks)[0])
        going -= min(going, number)
    return first


def _places(part: Shard, order: Order, key: int) -> Numbers:
    """The places in the whole of the values that equal the key."""

    def places() -> Iterator[Tensor]:
        for i, keys in enumerate(_keys(part, order) if part.owned else ()):
            yield part.positions((keys == key).nonzero().view(-1) + i * PIECE)

    return places


def _mask(part: Shard, order: Order, key: int, first: int) -> Tensor:
    mask = torch.empty(part.local.shape, dtype=torch.bool, device=part.local.device)
    for i, (keys, stays) in enumerate(zip(_keys(part, order), mask.view(-1).split(PIECE), strict=False)):
        (torch.gt if first >= part.numel else torch.ge)(keys, key, out=stays)
        if 0 < first < part.numel:
            ties = (keys == key).nonzero().view(-1)
            stays[ties] = part.positions(ties + i * PIECE) >= first
    return mask


def _let_first_decide_(parts: list[Shard], masks: list[Tensor], ranks: Ranks) -> None:
    """Copies of one tensor may differ in their last bits, and the masks must not."""
    shared = [mask for part, mask in zip(parts, masks, strict=True) if part.shared]
    if not shared:
        return
    flat = torch.cat([mask.view(-1).cpu() for mask in shared]).numpy()
    bits = ranks.first(torch.from_numpy(np.packbits(flat)))
    decided = torch.from_numpy(np.unpackbits(bits.numpy(), count=flat.size).view(np.bool_))
    for mask, one in zip(shared, decided.split([mask.numel() for mask in shared]), strict=True):
        mask.copy_(one.view(mask.shape))

"""Which k values are the largest, exactly, over tensors that are spread over several processes?

The tensors come in groups, each ranked by itself; all groups go through every step together, so that the ranks talk as
often for a hundred groups as for one. A sample says between which keys of ``order`` the wanted one of a group most
likely lies. Each rank counts what is below them and takes what is between, or all where the sample missed or too many
are equal. Of these the wanted key is found digit by digit: how often each value of the upper bits occurs on all ranks
says in which of them it lies, the same of the next bits inside it says the key. Each rank sends counts, never its
values. Of values equal to the key the later stay, by their place in the whole: where some of them must go, the place of
the first that stays is found in the same way. So the masks are those of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradprune.core.collect import Kept, Values, collect, raise_nan
from gradprune.core.copies import let_owners_decide_
from gradprune.core.masked import count_kept
from gradprune.core.order import By, Order
from gradprune.core.ranks import Ranks
from gradprune.core.select_cpu import Chunks, count_between
from gradprune.core.sharded import Shard
from gradprune.core.uncompiled import uncompiled

DIGIT = 11, 6  # bits of a digit: at most, and at least
COUNTS = 2**17  # that are sent at a time: 64 groups have digits of 11 bits, more have shorter ones
UPPER = 16  # bits of a key by which a sample is looked at, at once for few groups: COUNTS // 2**UPPER
PIECE = 2**17  # entries at a time, which a cache holds
SAMPLE = 2**17, 2**14  # entries of all ranks: of all groups together, but at least so many of each
DEVIATIONS = 4  # of the place in a sample, to either side: one bracket in 16,000 misses, and costs three passes
MOST_BETWEEN = 0.25  # of a rank's entries of a group that are copied
Numbers = Callable[[], Iterator[Tensor]]


class Ranking(NamedTuple):
    """Tensors that are ranked together, how many of their entries stay, and which may (blocks of masks)."""

    shards: Mapping[str, Shard]
    k: int
    among: Sequence[Tensor] | None = None


@uncompiled
def keep_each(rankings: Iterable[Ranking], ranks: Ranks, by: By = "magnitude") -> list[Kept]:
    """Return of each ranking this rank's blocks of the masks that are True for the k largest, by all ranks together.

    With each how many entries of the whole masks stay. However many rankings there are, the ranks talk as often. All
    ranks call it with the same names and k, at most as many as may stay. Of shared tensors the lowest rank's values
    decide for all. Raises ValueError on all ranks, naming the tensor, where one of them holds a NaN.
    """
    every = [_Group.of(ranking, by) for ranking in rankings]
    ranked = [group for group in every if group.total]
    if not ranked:
        return [_all_of(group) for group in every]
    found, near = _locate(ranked, ranks)
    answers = iter(zip(found, _first_to_stay(ranked, found, near, ranks), near, strict=True))
    own = [_masks(group, *next(answers)) if group.total else _all_of(group) for group in every]
    parts = [part for group in every for part in group.parts]
    let_owners_decide_(parts, [mask for kept in own for mask in kept.masks], ranks)
    here = zip(parts, (number for kept in own for number in kept.at_least), strict=True)
    counts = ranks.sum(torch.tensor([number if part.owned else 0 for part, number in here], device="cpu")).tolist()
    whole = iter(counts)
    return [Kept(kept.masks, [next(whole) for _ in kept.masks]) for kept in own]


class _Group(NamedTuple):
    """Tensors that are ranked together."""

    names: list[str]
    parts: list[Shard]
    values: Values
    stay: int
    total: int

    @classmethod
    def of(cls, ranking: Ranking, by: By) -> _Group:
        names, parts = list(ranking.shards), list(ranking.shards.values())
        values = collect([part.local for part in parts], by, ranking.among, names=list(map(repr, names)))
        return cls(names, parts, values, ranking.k, sum(part.numel for part in parts))

    @property
    def among(self) -> Sequence[Tensor] | None:
        """Which of them may stay."""
        return self.values.among

    @property
    def order(self) -> Order:
        """In which all of them stand."""
        return self.values.order

    @property
    def rank(self) -> int:
        """Which of all, from the smallest, is the last to stay; the largest where none stays, as NaN is an error."""
        return min(self.total, self.total - self.stay + 1)

    @property
    def signed(self) -> bool:
        """Whether keys may be negative."""
        return self.order.lowest < 0 or self.among is not None

    @property
    def bits(self) -> int:
        """Bits of a key."""
        return self.order.magnitude_bits.bit_length() + self.signed

    def keys(self) -> Iterator[Tensor]:
        """The keys of what this rank counts."""
        return (keys for at, part in enumerate(self.parts) if part.owned for keys in self.keys_of(at))

    def keys_of(self, at: int) -> Iterator[Tensor]:
        """The keys of a tensor, piece by piece; what may not stay is below all others."""
        return (barred for _, barred in self.pieces_of(at))

    def pieces_of(self, at: int, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys of every `step`-th entry of a tensor, by pieces, and with those barred that may not stay."""
        flat = self.parts[at].local.detach().resolve_neg().reshape(-1)[::step]
        allowed = None if self.among is None else self.among[at].reshape(-1)[::step].split(PIECE)
        for i, piece in enumerate(flat.split(PIECE)):
            if piece.numel():
                keys = self.order.keys(self.order.compared(piece.contiguous()))
                keys = keys if self.order.is_float else keys.to(torch.int64)
                yield keys, keys if allowed is None else keys.masked_fill(~allowed[i], self.order.barred)

    def is_nan(self, keys: Tensor) -> bool:
        """Whether one of the keys is that of a NaN, which is beyond the infinities, on either side."""
        order = self.order
        return order.is_float and (
            int(keys.max()) > order.highest or (order.by == "value" and int(keys.min()) < order.lowest)
        )


class _Search(NamedTuple):
    """Which of all ranks' numbers is the k-th smallest? They have so many bits, the first for the sign if signed."""

    numbers: Numbers
    bits: int
    k: int | Callable[[int], int]  # or which it is of so many
    most: int  # how many there are at most
    signed: bool = False


class _Found(NamedTuple):
    number: int
    below: int  # how many are smaller


def _locate(groups: Sequence[_Group], ranks: Ranks) -> tuple[list[_Found], list[_Near | None]]:
    """The key of the last to stay of each group, and what of it was seen beside that key."""
    brackets = _brackets(groups, ranks)
    taken = [_between(group, *ends) for group, ends in zip(groups, brackets, strict=True)]
    widths = [(high - low).bit_length() for low, high in brackets]
    inside = [_Search(one.numbers, w, g.rank, g.total) for one, w, g in zip(taken, widths, groups, strict=True)]
    bits = [min(width, DIGIT[0], _digit(2 * len(groups))) for width in widths]
    first = [_histogram(search, 0, search.bits, b) for search, b in zip(inside, bits, strict=True)]
    numbers = torch.tensor([number for one in taken for number in one.told], dtype=torch.int64, device="cpu")
    summed = ranks.sum(torch.cat([numbers, *(counts.to("cpu") for counts in first)]).to(_sums_of(inside)))
    told = iter(summed[: len(numbers)].tolist())
    counts = summed[len(numbers) :].split([len(some) for some in first])
    near: list[_Near | None] = []
    searches, offsets = [], []
    seen: list[Tensor | None] = []
    for group, (low, _), one, search, some in zip(groups, brackets, taken, inside, counts, strict=True):
        for name in group.names:
            if next(told):
                raise_nan(repr(name))
        below, number, left = next(told), next(told), next(told)
        if left or not below < group.rank <= below + number:  # many are equal, or the sample missed
            searches.append(_Search(group.keys, group.bits, group.rank, group.total, group.signed))
            offsets.append((0, 0))
            near.append(None)
            seen.append(None)
        else:
            searches.append(search._replace(k=group.rank - below))
            offsets.append((low, below))
            near.append(one.near)
            seen.append(some)
    found = _kth_smallest(searches, ranks, seen=seen)
    return [_Found(one.number + low, one.below + below) for one, (low, below) in zip(found, offsets, strict=True)], near


class _Near(NamedTuple):
    """Of tensors that this rank counts, by their place in a group: what lies above two keys, and what between."""

    above: dict[int, tuple[Tensor, int]]  # masks, and how many they mark
    keys: dict[int, Tensor]
    places: dict[int, Tensor]  # of these keys, in the block held here


class _Between(NamedTuple):
    keys: list[Tensor]  # those between two keys, less the lower
    told: list[int]  # of each tensor if it holds a NaN; how many keys are below and between; if some are left
    near: _Near | None = None

    def numbers(self) -> Iterator[Tensor]:
        return iter(self.keys)


def _between(group: _Group, low: int, high: int) -> _Between:
    if group.values.on_cpu:
        return _between_on_cpu(group, low, high)
    found: list[Tensor] = []
    most = sum(part.local.numel() for part in group.parts) * MOST_BETWEEN
    width = (high - low).bit_length()
    nan, below, inside, left = [0] * len(group.parts), 0, 0, int(width > 63)
    for i, part in enumerate(group.parts):
        for keys, barred in group.pieces_of(i):
            nan[i] |= group.is_nan(keys)
            if part.owned:
                below += count_kept(barred < low)
                within = (barred >= low).logical_and_(barred <= high)
                inside += count_kept(within)
                if inside <= most and not left:
                    found.append(_less(barred[within], low, width))
                else:
                    left = 1
    return _Between(found, [*nan, below, inside, left])


def _between_on_cpu(group: _Group, low: int, high: int) -> _Between:
    """The same in one pass, which also marks what lies above."""
    owned = [at for at, part in enumerate(group.parts) if part.owned]
    nan = [0] * len(group.parts)
    for at in set(range(len(group.parts))).difference(owned):
        nan[at] = int(any(group.is_nan(keys) for keys, _ in group.pieces_of(at)))
    width, values = (high - low).bit_length(), group.values
    counted = values._replace(
        names=[values.names[at] for at in owned],
        tensors=[values.tensors[at] for at in owned],
        among=None if values.among is None else [values.among[at] for at in owned],
        total=sum(values.tensors[at].numel() for at in owned),
    )
    masks = [np.empty(tensor.numel(), np.bool_) for tensor in counted.tensors]
    few = int(counted.total * MOST_BETWEEN) if width <= 63 else 0
    seen = count_between(Chunks(counted), low - 1, high + 1, few, masks, check=True)
    if seen.first_nan is not None:
        nan[owned[seen.first_nan]] = 1
    inside = seen.below_high - seen.up_to_low
    told = [*nan, seen.up_to_low, inside, int(seen.inside is None and inside > 0)]
    near = _Near({}, {}, {})
    for at, (i, mask) in enumerate(zip(owned, masks, strict=True)):
        parts = [part for part in seen.inside or () if part.piece.tensor == at]
        near.above[i] = torch.from_numpy(mask).view(group.parts[i].local.shape), seen.above[at]
        if parts:
            near.keys[i] = torch.from_numpy(np.concatenate([part.keys for part in parts]))
            places = np.concatenate([part.positions.astype(np.int64) + part.piece.where.start for part in parts])
            near.places[i] = torch.from_numpy(places)
    return _Between([_less(keys, low, width) for keys in near.keys.values()], told, near)


def _less(keys: Tensor, low: int, width: int) -> Tensor:
    """Keys less the lower end, in a dtype that holds as many bits."""
    return (keys.to(torch.int64) if width >= 8 * keys.element_size() else keys) - low


def _brackets(groups: Sequence[_Group], ranks: Ranks) -> list[tuple[int, int]]:
    """Two keys between which the last to stay of each group very likely lies, by the upper bits of a sample."""
    size = max(SAMPLE[0] // len(groups), SAMPLE[1])
    shifts = [max(0, group.bits - UPPER) for group in groups]
    samples = [partial(iter, _sample(group, size, shift)) for group, shift in zip(groups, shifts, strict=True)]
    searches = [
        _Search(sample, group.bits - shift, partial(_end, group, side), group.total, group.signed)
        for group, sample, shift in zip(groups, samples, shifts, strict=True)
        for side in (-1, 1)
    ]
    ends = [one.number for one in _kth_smallest(searches, ranks, UPPER)]
    return [
        (low << shift, ((high + 1) << shift) - 1)
        for low, high, shift in zip(ends[::2], ends[1::2], shifts, strict=True)
    ]


def _end(group: _Group, side: int, number: int) -> int:
    """Which of so many keys in a sample ends the bracket, on the side of the smaller ones (-1) or the larger (1)."""
    share = group.rank / group.total
    margin = DEVIATIONS * (number * share * (1 - share)) ** 0.5 + 2
    return min(max(1, int(share * number + side * margin)), number)


def _sample(group: _Group, size: int, shift: int) -> list[Tensor]:
    """The upper bits of about so many keys over all ranks."""
    step = -(-group.total // size)
    owned = (at for at, part in enumerate(group.parts) if part.owned)
    return [keys >> shift for at in owned for _, keys in group.pieces_of(at, step)]


def _sums_of(searches: Iterable[_Search]) -> torch.dtype:
    """In which their counts are sent."""
    return torch.int32 if max(search.most for search in searches) < 2**31 else torch.int64


def _digit(searches: int) -> int:
    """How many bits of a key so many searches look at together."""
    return max((COUNTS // searches).bit_length() - 1, 1)


def _kth_smallest(
    searches: Sequence[_Search], ranks: Ranks, most: int = DIGIT[0], seen: Sequence[Tensor | None] = ()
) -> list[_Found]:
    """What each search looks for: one reduction a digit of `most` bits, for all of them.

    Of some the first digits were counted already, on all ranks, and are `seen`.
    """
    found = [_Found(0, 0) for _ in searches]
    left, wanted = [search.bits for search in searches], [search.k for search in searches]

    def narrow(i: int, some: Tensor) -> None:
        """Find a digit by how often each of its values occurs."""
        digits, below = found[i]
        bits = len(some).bit_length() - 1
        up_to = some.cumsum(0)  # in 64 bits
        k = wanted[i]
        if callable(k):
            k = wanted[i] = k(int(up_to[-1]))
        digit = int(torch.searchsorted(up_to, k - below))
        upper = digits << bits | digit
        if searches[i].signed and left[i] == searches[i].bits:
            upper -= 2 ** (bits - 1)
        found[i] = _Found(upper, below + int(up_to[digit] - some[digit]))
        left[i] -= bits

    for i, counts in enumerate(seen):
        if counts is not None:
            narrow(i, counts)
    while active := [i for i in range(len(searches)) if left[i]]:
        alike: dict[tuple[int, int, int], list[int]] = {}  # who counts the same counts it once
        for i in active:
            alike.setdefault((id(searches[i].numbers), found[i].number, left[i]), []).append(i)
        step = max(min(_digit(len(alike)), most), DIGIT[1])
        first = [i for i, *_ in alike.values()]
        here = [_histogram(searches[i], found[i].number, left[i], min(left[i], step)) for i in first]
        summed = ranks.sum(torch.cat([c.to(ranks.device) for c in here]).to(_sums_of(searches[i] for i in active)))
        for several, some in zip(alike.values(), summed.split([len(counts) for counts in here]), strict=True):
            for i in several:
                narrow(i, some)
    return found


def _histogram(search: _Search, digits: int, left: int, bits: int) -> Tensor:
    """How often each value of the next bits occurs among this rank's numbers that begin with the digits found."""
    counts, shift = None, left - bits
    for some in search.numbers():
        first = left == search.bits
        some = (some if first else some[some >> left == digits]) >> shift
        some = some.to(torch.int32) if bits >= 8 * some.element_size() else some  # half precision has no more
        upper = some + 2 ** (bits - 1) if first and search.signed else some & (2**bits - 1)
        here = torch.bincount(upper, minlength=2**bits)
        counts = here if counts is None else counts.add_(here.to(counts.device))
    return counts if counts is not None else torch.zeros(2**bits, dtype=torch.int64, device="cpu")


def _first_to_stay(
    groups: Sequence[_Group], found: Sequence[_Found], near: Sequence[_Near | None], ranks: Ranks
) -> list[list[int]]:
    """For each tensor the place from which on values equal to the key stay, so that the first of all of them go."""
    first = [[0] * len(group.parts) for group in groups]
    going = [group.total - one.below - group.stay for group, one in zip(groups, found, strict=True)]
    cut = [at for at, number in enumerate(going) if number]
    if not cut:
        return first
    parts = [(at, i, part) for at in cut for i, part in enumerate(groups[at].parts)]
    own = [_ties(groups[at], i, found[at].number, near[at]) if part.owned else 0 for at, i, part in parts]
    ties = ranks.sum(torch.tensor(own, dtype=torch.int64, device="cpu")).tolist()
    where, searches = [], []
    for (at, i, part), number in zip(parts, ties, strict=True):
        if going[at] >= number:
            first[at][i] = part.numel
        elif going[at] > 0:
            places = _places(groups[at], i, found[at].number, near[at])
            searches.append(_Search(places, part.numel.bit_length(), going[at] + 1, part.numel))
            where.append((at, i))
        going[at] -= min(going[at], number)
    for (at, i), one in zip(where, _kth_smallest(searches, ranks), strict=True):
        first[at][i] = one.number
    return first


def _ties(group: _Group, at: int, key: int, near: _Near | None) -> int:
    return sum(count_kept(keys == key) for keys, _ in _seen(group, at, near))


def _places(group: _Group, at: int, key: int, near: _Near | None) -> Numbers:
    """The places in the whole of the values that equal the key."""
    part = group.parts[at]

    def places() -> Iterator[Tensor]:
        for keys, where in _seen(group, at, near) if part.owned else ():
            yield part.positions(where((keys == key).nonzero().view(-1)))

    return places


def _seen(group: _Group, at: int, near: _Near | None) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Keys of a tensor among which all ties are, and where in its block they lie."""
    if near is None:
        for i, keys in enumerate(group.keys_of(at)):
            yield keys, partial(torch.add, i * PIECE)
    elif at in near.keys:
        yield near.keys[at], near.places[at].__getitem__


def _all_of(group: _Group) -> Kept:
    return Kept([torch.ones_like(part.local, dtype=torch.bool) for part in group.parts], [0] * len(group.parts))


def _masks(group: _Group, found: _Found, first: list[int], near: _Near | None) -> Kept:
    """This rank's blocks of the masks, and how many entries of each block stay."""
    masks, counts = zip(*(_mask(group, at, found.number, start, near) for at, start in enumerate(first)), strict=True)
    return Kept(list(masks), list(counts))


def _mask(group: _Group, at: int, key: int, first: int, near: _Near | None) -> tuple[Tensor, int]:
    part = group.parts[at]

    def stay(keys: Tensor, out: Tensor, where: Callable[[Tensor], Tensor]) -> int:
        (torch.gt if first >= part.numel else torch.ge)(keys, key, out=out)
        if 0 < first < part.numel:
            ties = (keys == key).nonzero().view(-1)
            out[ties] = part.positions(where(ties)) >= first
        return count_kept(out)

    if near is not None and at in near.above:
        mask, number = near.above[at]
        if at in near.keys:
            stays = torch.empty(near.keys[at].shape, dtype=torch.bool, device="cpu")
            number += stay(near.keys[at], stays, near.places[at].__getitem__)
            mask.view(-1)[near.places[at]] = stays
        return mask, number
    mask = torch.empty(part.local.shape, dtype=torch.bool, device=part.local.device)
    pieces = enumerate(zip(group.keys_of(at), mask.view(-1).split(PIECE), strict=False))
    return mask, sum(stay(keys, stays, partial(torch.add, i * PIECE)) for i, (keys, stays) in pieces)

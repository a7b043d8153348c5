"""How many weights does LAMP leave each layer, exactly, without a sort and whoever holds them (chapter 4)?

The larger of two weights of a layer has the higher score, so that all there is to decide is how many each layer keeps.
A weight's score is its square over the sum of the squares that outlive it. Squares are rounded to two parts, each to a
grid so fine and so coarse that sums of all of them are exact in float64, whatever their order: so a score is one
number, the same for one process and for any number of ranks that add up what they hold.

Each layer's keys of ``order`` are counted in cells, with the sums of their squares, from which follows between which
scores those of a cell lie. A cell whose scores are all above that of the first weight that goes stays, one below goes;
what lies between is counted anew in finer cells. Of a cell of one key, n equal weights, the scores follow from n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gradprune.core.order import By, Order, compared_as
from gradprune.core.uncompiled import uncompiled

Array = np.ndarray[Any, np.dtype[Any]]

CELLS = 2**13, 2**4  # that are counted at a time: in all layers, and in each at least; 24 bytes each
OCTAVES = 24  # below the largest weight of a layer that are told apart at first
PIECE = 2**17  # entries at a time, which a cache holds
PARTS = 16  # into which a run of equal weights is cut
ALL = 64  # bits of a key, before the first cells
SLACK = 2.0**-40  # of the bounds of a cell's scores, for their rounding


class Read(Protocol):
    """Scores that are not all in memory, in their order piece by piece, as often as they are asked for."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the scores."""

    def pieces(self) -> Iterator[Tensor]:
        """Each of one axis."""


class Layer(NamedTuple):
    """What this process holds of a layer's scores, which of them may stay, and whether it is this one that counts."""

    values: Tensor | Read
    size: int  # of the whole layer
    cost: int = 1  # of one that stays
    among: Tensor | None = None
    counts: bool = True


def of_one(numbers: Tensor) -> Tensor:
    """Return the numbers: those of one process are those of all."""
    return numbers


@uncompiled
def lamp_counts(
    layers: Mapping[str, Layer],
    wanted: int,
    *,
    by: By = "value",
    total: Callable[[Tensor], Tensor] = of_one,
    most: Callable[[Tensor], Tensor] = of_one,
    cells: int = CELLS[0],
) -> dict[str, int]:
    """Return how many of each layer's entries stay, so that their costs add up as nearly to `wanted` as can be.

    Those of the highest LAMP scores stay; of equal ones those of the later layer, and there the later. Where two sums
    are as near the smaller is taken. `total` and `most` give the sum and the largest of numbers over all processes, on
    the CPU; so many `cells` are counted at a time, and the keys of those that are left are held.

    Raises ValueError where a score is negative or NaN, naming the layer.
    """
    searches, left = _begun(layers, by, most), max(wanted, 0)
    while searches:
        _count([search for search in searches if search.open], total, cells)
        left = _settle(searches, left)
        if _is_tied(searches):
            _cut_ties(searches, left)
            break
        for search in searches:
            search.refine()
    return dict.fromkeys(layers, 0) | {search.name: search.kept for search in searches}


# ------------------------------------------------------------------------------------------------------------ squares


class Squares(NamedTuple):
    """The squares of one layer's scores, as shares of one near the largest, and how they are added up exactly."""

    order: Order
    scales: tuple[float, float]  # powers of two, in two steps that do not overflow; none where the largest is infinite
    bits: int  # of the number of entries

    @classmethod
    def of(cls, order: Order, top: int, size: int) -> Squares:
        """Return those of a layer with so many entries, the largest of which has the key `top`."""
        largest = float(order.values(torch.tensor(max(top, 0), dtype=torch.int64, device="cpu")))
        exponent = math.frexp(largest)[1]
        scales = (2.0 ** -(exponent // 2), 2.0 ** (exponent // 2 - exponent))
        return cls(order, scales if math.isfinite(largest) else (0.0, 0.0), max(8, (size - 1).bit_length()))

    def __call__(self, keys: Tensor) -> Tensor:
        """Return the squares of keys, in float64."""
        values = keys.to(self.order.integer).view(self.order.dtype).double()
        if not self.scales[0]:  # beside an infinity nothing counts
            return values.isinf().double()
        return (values * self.scales[0]).mul_(self.scales[1]).square_()

    def parts(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Return squares rounded to a grid, and what that takes off them to a finer one; sums of either are exact."""
        coarse = 2.0 ** (self.bits - 53)
        shift = 1.5 * 2.0**52 * coarse  # what is added to it loses what is finer than the grid
        high = (squares + shift).sub_(shift)
        shift *= coarse / 2
        return high, (squares - high).add_(shift).sub_(shift)


def lamp_scores(scores: Tensor, name: str) -> Tensor:
    """Return the LAMP score of each entry of a layer, in float64."""
    search = _begun({name: Layer(scores, scores.numel())}, "value", of_one)
    if not search:
        return torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)
    (one,) = search
    flat = torch.cat(list(one.keys_of_all()))
    descending, where = flat.flip(0).sort(stable=True, descending=True)
    squares = one.squares(descending)
    high, low = one.squares.parts(squares)
    ranked = _ratio(squares, high.cumsum(0) + low.cumsum(0))
    return torch.empty_like(ranked).scatter_(0, flat.numel() - 1 - where, ranked).view(scores.shape)


def _ratio(squares: Any, sums: Any) -> Any:
    """Scores; 0 for what is zero."""
    return squares / (sums + (squares == 0))


# ------------------------------------------------------------------------------------------------------------- search


class _Cells(NamedTuple):
    """Of the keys of a layer, from the largest: where each cell begins and ends, how many lie there, and their squares.

    Those of a cell of one key may be a part of all that equal it.
    """

    first: Array
    last: Array
    number: Array
    above: Array  # sums of the squares, in two parts, of what is before the cell
    sums: Array  # of what is in it


_NO_CELLS = _Cells(*(np.zeros(0, np.int64) for _ in range(3)), *(np.zeros((2, 0)) for _ in range(2)))


@dataclass
class _Search:
    name: str
    layer: Layer
    order: Order
    squares: Squares
    ends: tuple[int, int]  # keys between which is counted
    cells: _Cells
    above: Array = field(default_factory=lambda: np.zeros(2))  # sums of the squares of what is above them
    shift: int = ALL  # bits of a key that a cell does not tell; 0 for cells of one key
    open: bool = True  # whether finer cells are to be counted
    finest: int = 0  # and how many at least
    zeros: _Cells = _NO_CELLS  # what is below the ends, of which nothing is open
    kept: int = 0
    found: list[Tensor] | None = None  # the keys between the ends

    def keys_of_all(self) -> Iterator[Tensor]:
        """The keys of what this process holds, by pieces."""
        return _keys(self.layer, self.order)

    def keys(self) -> Iterator[Tensor]:
        """Of those that are counted here the ones between the ends."""
        if self.shift == ALL:
            return self._allowed()
        low, high = self.ends
        before = self._allowed() if self.found is None else iter(self.found)
        self.found = [keys[(keys >= low).logical_and_(keys <= high)] for keys in before]
        return iter(self.found)

    def _allowed(self) -> Iterator[Tensor]:
        if not self.layer.counts:
            return
        if self.layer.among is None:
            yield from self.keys_of_all()
            return
        for keys, allowed in zip(self.keys_of_all(), _pieces(self.layer.among), strict=True):
            yield keys[allowed]

    def bounds(self) -> tuple[Array, Array]:
        """Between which scores those of each cell lie; of a cell of one key its lowest and its highest."""
        first, last = (self.squares(torch.from_numpy(keys)) for keys in (self.cells.first, self.cells.last))
        own = np.stack([part.numpy() for part in self.squares.parts(last)])
        low = _ratio(first.numpy(), (self.cells.above + self.cells.sums).sum(0))
        high = _ratio(last.numpy(), (self.cells.above + own).sum(0))
        return (low * (1 - SLACK), high * (1 + SLACK)) if self.shift else (low, high)

    def refine(self) -> None:
        """Look closer at what is left, unless its scores are known."""
        low, high = self.bounds()
        unknown = int((low < high).sum())  # none is below one that is known: there are zeros, or equal weights
        self.open = self.shift > 0 and unknown > 0
        if not self.open:
            self.cells = self._cut(self.cells, low < high)
            return
        cells, self.zeros = (_Cells(*(some[..., part] for some in self.cells)) for part in _at(unknown))
        self.ends, self.above = (int(cells.first[-1]), int(cells.last[0])), cells.above[:, 0]
        span = self.ends[1] - self.ends[0]
        if int(cells.last[-1]) - self.ends[0] >> self.shift:  # that of all below the first cells
            self.shift = span.bit_length()
        else:
            self.finest = 2 * (1 + (span >> self.shift))

    def _cut(self, cells: _Cells, unknown: Array) -> _Cells:
        """Runs of equal weights in parts."""
        parts = np.where(unknown, np.minimum(cells.number, PARTS), 1)
        at = np.repeat(np.arange(len(parts)), parts)
        part = np.arange(len(at)) - np.repeat(parts.cumsum() - parts, parts)
        number, many = cells.number[at], parts[at]
        start, end = number * part // many, number * (part + 1) // many
        one = np.stack([p.numpy() for p in self.squares.parts(self.squares(torch.from_numpy(cells.first[at])))])
        return _Cells(
            cells.first[at], cells.last[at], end - start, cells.above[:, at] + one * start, one * (end - start)
        )


def _at(place: int) -> tuple[slice, slice]:
    return slice(place), slice(place, None)


def _keys(layer: Layer, order: Order) -> Iterator[Tensor]:
    values = layer.values
    for piece in _pieces(values.detach().resolve_neg()) if isinstance(values, Tensor) else values.pieces():
        yield order.keys(order.compared(piece.contiguous()))


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.reshape(-1).split(PIECE) if tensor.numel() else ()


def _begun(layers: Mapping[str, Layer], by: By, most: Callable[[Tensor], Tensor]) -> list[_Search]:
    """A search for each layer that is not empty."""
    held, told = list[tuple[str, Layer, Order]](), list[int]()
    for name, layer in layers.items():
        if not layer.size:
            continue
        dtype = compared_as(layer.values.dtype)
        order = Order(dtype if dtype.is_floating_point else torch.float64, by)
        held.append((name, layer, order))
        told += _top(layer, order)
    found = most(torch.tensor(told, dtype=torch.int64, device="cpu")).tolist()
    searches = []
    for (name, layer, order), top, wrong in zip(held, found[::2], found[1::2], strict=True):
        if wrong:
            raise ValueError(f"LAMP needs scores that are neither negative nor NaN; {name!r} has others")
        squares = Squares.of(order, top, layer.size)
        searches.append(_Search(name, layer, order, squares, (0, top), _NO_CELLS))
    return searches


def _top(layer: Layer, order: Order) -> tuple[int, bool]:
    """The largest key that is counted here, and whether a score is negative or NaN."""
    top, wrong = -1, False
    allowed = None if layer.among is None else _pieces(layer.among)
    for at, keys in enumerate(_keys(layer, order)):
        wrong |= int(keys.max()) > order.highest or int(keys.min()) < 0
        some = keys if allowed is None else keys[allowed[at]]
        if layer.counts and some.numel():
            top = max(top, int(some.max()))
    return top, wrong


def _count(searches: Sequence[_Search], total: Callable[[Tensor], Tensor], cells: int) -> None:
    """Count all that is left of these layers in finer cells: one sum over all processes."""
    if not searches:
        return
    each = max(cells // len(searches), CELLS[1])
    counted, starts = [], []
    for search in searches:
        keys, (low, high) = search.keys(), search.ends
        start = low
        if search.shift == ALL:
            start = max(low, high - OCTAVES * round(1 / torch.finfo(search.order.dtype).eps))
        shift = ((high - start) // max(each, search.finest)).bit_length()
        search.shift = max(min(search.shift - 1, shift), int(start > low))  # the first of these cells has all below
        starts.append(start)
        counted.append(_histogram(search, keys, start))
    sums = total(torch.cat(counted, 1)).numpy()
    at = 0
    for search, start, one in zip(searches, starts, counted, strict=True):
        search.cells = _cells(search, start, sums[:, at : at + one.shape[1]])
        at += one.shape[1]


def _histogram(search: _Search, every: Iterable[Tensor], start: int) -> Tensor:
    """How many keys lie in each cell, and the two parts of the sums of their squares."""
    cells = (search.ends[1] - start >> search.shift) + 1
    found = torch.zeros(3, cells, dtype=torch.float64, device="cpu")
    for keys in every:
        if keys.numel():
            where = (keys - start >> search.shift).clamp_(min=0)
            for row, weights in zip(found, (None, *search.squares.parts(search.squares(keys))), strict=True):
                row += torch.bincount(where, weights, minlength=cells).to("cpu")
    return found


def _cells(search: _Search, start: int, sums: Array) -> _Cells:
    """The cells with something in them, from the largest keys."""
    at = np.flatnonzero(sums[0])[::-1]
    first = start + (at << search.shift)
    last = np.minimum(first + (1 << search.shift) - 1, search.ends[1])
    first[at == 0] = search.ends[0]
    squares = sums[1:, at]
    up_to = squares.cumsum(1) + search.above[:, None]
    found = _Cells(first, last, sums[0, at].astype(np.int64), up_to - squares, squares)
    return _Cells(*(np.concatenate(some, -1) for some in zip(found, search.zeros, strict=True)))


def _settle(searches: Sequence[_Search], left: int) -> int:
    """Let what is above all that the first to go may score stay, and what is below go; return what is left to spend."""
    bounds = [search.bounds() for search in searches]
    weights = np.concatenate([s.cells.number * s.layer.cost for s in searches])
    least, greatest = (_first_over(np.concatenate(some), weights, left) for some in zip(*bounds, strict=True))
    for search, (low, high) in zip(searches, bounds, strict=True):
        stays, open_ = low > greatest, (low <= greatest) & (high >= least)
        number = int(search.cells.number[stays].sum())
        search.kept += number
        left -= number * search.layer.cost
        search.cells = _Cells(*(some[..., open_] for some in search.cells))
    return left


def _first_over(scores: Array, weights: Array, left: int) -> float:
    """The highest score at which all from there on weigh more than is left; below all where they never do."""
    order = np.argsort(-scores, kind="stable")
    over = weights[order].cumsum() > left
    return float(scores[order[over.argmax()]]) if over.any() else -1.0


def _is_tied(searches: Sequence[_Search]) -> bool:
    """Whether all that is left is known to have one score."""
    return not any(np.ptp(search.bounds(), 0).any() for search in searches)


def _cut_ties(searches: Sequence[_Search], left: int) -> None:
    """Let the last of equal scores stay."""
    for search in reversed(searches):
        for number in search.cells.number.tolist():
            stay = min(number, left // search.layer.cost)
            search.kept += stay
            left -= stay * search.layer.cost
            if stay < number:
                search.kept += search.layer.cost - left < left
                return

"""Which few values stand best for all the weights of a layer (chapter 8)?

The k values with the least sum of squared distances: k-means in one dimension, where it has an exact answer. Sorted,
each cluster is a run; the best cost of the first j weights in m runs is the least, over where the last run begins, of
the best cost of what is before it in m - 1 runs and its own. Where the last run begins best never moves back as j
grows, so that all j of one m are found by halving: the middle one first, then each half between the answers beside it.

Wu (1991), for the halving; Han et al. (2016), section 3, for what it is good for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.encoded import readable
from gradprune.core.layers import uncompiled_network
from gradprune.core.progress import bar
from gradprune.core.tables import Table
from gradprune.weights.eligible import Patterns, eligible
from gradprune.weights.mask import Masks

Array = np.ndarray[Any, np.dtype[Any]]
MOST_LEVELS = 2**16
EXACT, GROUPS = 2**17, 2**15  # distinct values of a layer; above, groups of neighbours
STEPS = 1000


class Layer(NamedTuple):
    """What became of one layer's weights."""

    name: str
    weights: int
    nonzeros: int
    values_before: int  # distinct, zero aside
    values: int
    error: float  # root mean square, as a share of that of the weights that are not zero
    bytes: int
    bytes_shared: int  # of the numbers of the values, and the values


@dataclass(frozen=True)
class Shared(Table):
    """What ``share_weights`` did, layer by layer; printed, a table.

    Args:
        layers: Of each layer its name, weights, those that are not zero, how many distinct values these had and have,
            the error, and the bytes before and of the numbers in their place, where the zeros are not counted.
        levels: What was asked for.
    """

    layers: tuple[Layer, ...]
    levels: int
    _named_by: ClassVar[str | None] = "name"

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row for each layer."""
        return [layer._asdict() for layer in self.layers]

    def _notes(self) -> list[str]:
        before, after = (sum(getattr(each, what) for each in self.layers) for what in ("bytes", "bytes_shared"))
        return [
            f"at most {self.levels} values a layer: {readable(after)} for their numbers instead of {readable(before)}, "
            "where the zeros are not counted"
        ]


def share_weights(
    model: nn.Module,
    levels: int = 16,
    *,
    masks: Mapping[str, Tensor] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Return a copy in which the weights of each layer that are not zero have at most so many values; zeros stay zeros.

    The values are those with the least sum of squared changes that there is, no local optimum; in a layer with more
    than 131,072 distinct values they come close to that. All tensors stay dense and of their dtypes; bytes are saved in
    a file, by ``pack`` with a code. What became of each layer is in the copy's attribute ``shared``, a ``Shared``.

    Args:
        model: The network; it is not changed.
        levels: How many values a layer may have beside zero, from 1 to 65536; 16 are numbers of four bits.
        masks: What is zero, as ``prune`` returns it; None where the weights are zero already.
        include: Glob patterns over parameter names, as of ``prune``.
        exclude: Glob patterns, as of ``prune``.

    Returns:
        The copy. A training step takes its weights apart again.

    Raises:
        TypeError: The model is no module, or a weight cannot be written.
        ValueError: `levels` is out of range, a pattern matches nothing, a mask is not the model's, or a weight is
            infinite, NaN or complex.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> masks = gp.prune(model, sparsity=0.5)
        >>> shared = gp.share_weights(model, levels=16)
        >>> len(shared[0].weight.unique()), masks.holds(shared)
        (17, True)

    Han et al. (2016), section 3; chapter 8.
    """
    levels = checks.whole("levels", levels, least=1, most=MOST_LEVELS)
    found = eligible(model, include, exclude)
    given = None if masks is None else Masks(masks)
    for name, weight in found.items():
        values = weight.parameter
        checks.require(not values.is_complex(), f"{name!r} is complex: its values have no order")
        checks.require(bool(values.isfinite().all()), f"{name!r} has weights that are infinite or NaN")
    twin = copy.deepcopy(uncompiled_network(model))
    names = dict(twin.named_parameters(remove_duplicate=False))
    if given is not None:
        given.apply_(twin)
    layers = []
    with bar(len(found), "sharing") as progress, torch.no_grad():
        for name in found:
            own = names[name.removeprefix("_orig_mod.")]
            layers.append(_share_(name, own, levels))
            progress.update(1)
    twin.__dict__["shared"] = Shared(tuple(layers), levels)
    return twin


def _share_(name: str, weight: Tensor, levels: int) -> Layer:
    """Give the entries of a weight that are not zero at most so many values, in place."""
    where = weight != 0
    alive = weight[where]
    before, numbers, counts = alive.unique(return_inverse=True, return_counts=True)
    exact = before.double().cpu().numpy()
    of_value, centers = clusters(exact, counts.cpu().numpy(), levels)
    values = torch.from_numpy(centers).to(weight)
    values = torch.where(values == 0, torch.finfo(weight.dtype).tiny, values)  # what is not zero stays so
    new = values[torch.from_numpy(of_value).to(weight.device)[numbers]]
    error = float((new.double() - alive.double()).square().sum().sqrt())
    size = float(alive.double().square().sum().sqrt())
    weight[where] = new
    bits = math.ceil(math.log2(max(len(values), 2)))
    stored = -(-alive.numel() * bits // 8) + len(values) * weight.element_size() if alive.numel() else 0
    return Layer(
        name,
        weight.numel(),
        alive.numel(),
        len(before),
        len(values),
        error / size if size else 0.0,
        weight.numel() * weight.element_size(),
        stored,
    )


def clusters(values: Array, counts: Array, most: int) -> tuple[Array, Array]:
    """Return the cluster of each of ascending distinct values that occur so often, and the clusters' means.

    The sum of squared distances to the means is the least that `most` clusters can have, up to rounding in double; of
    more than `EXACT` values, as near to it as groups of neighbours and then Lloyd's steps come.
    """
    n = len(values)
    if n <= most:
        return np.arange(n), values.astype(np.float64)
    sums = _Sums(values, counts)
    if n <= EXACT:
        edges = _best_edges(sums, most)
    else:
        number = max(GROUPS, 4 * most) + 1
        of_equal_size = np.linspace(0, n, number).astype(np.int64)
        of_equal_width = np.searchsorted(values, np.linspace(values[0], values[-1], number))
        groups = np.unique(np.concatenate([of_equal_size, of_equal_width]))
        edges = _settled(values, sums, groups[_best_edges(sums.of(groups), most)])
    return np.repeat(np.arange(most), np.diff(edges)), sums.mean(edges[:-1], edges[1:])


class _Sums:
    """Of the first values, for each number of them: how often they occur, their sum, the sum of their squares."""

    def __init__(self, values: Array, counts: Array) -> None:
        weights = counts.astype(np.float64)
        self.center = float((values * weights).sum() / weights.sum())  # sums of squares lose less near their mean
        x = values - self.center
        self.number, self.sum, self.squares = (
            np.concatenate([[0.0], np.cumsum(each)]) for each in (weights, weights * x, weights * x * x)
        )

    def of(self, edges: Array) -> _Sums:
        """The same of groups of neighbours."""
        twin = copy.copy(self)
        twin.number, twin.sum, twin.squares = self.number[edges], self.sum[edges], self.squares[edges]
        return twin

    def mean(self, start: Array, stop: Array) -> Array:
        found: Array = self.center + (self.sum[stop] - self.sum[start]) / (self.number[stop] - self.number[start])
        return found


def _best_edges(sums: _Sums, most: int) -> Array:
    """Where the clusters of the least cost begin, and the last one ends."""
    n = len(sums.number) - 1
    one = np.maximum(sums.number, 1.0)
    best = np.maximum(sums.squares - sums.sum**2 / one, 0.0)  # of the first values in one cluster
    begins = []
    for m in range(2, most + 1):
        best, begin = _one_more(best, sums, m, n if m == most else m)
        begins.append(begin)
    stops = [n]
    for begin in reversed(begins):
        stops.append(int(begin[stops[-1]]))
    return np.array([0, *stops[::-1]])


def _one_more(best: Array, sums: _Sums, m: int, first: int) -> tuple[Array, Array]:
    """The best cost of the first j values in m clusters, for j from `first` on, and where the last one begins."""
    n = len(best) - 1
    before = best - sums.squares
    new, begin = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    # Each row: the range of j that is open, and between which two places its answers lie.
    low, high = np.array([first]), np.array([n])
    least, last = np.array([m - 1]), np.array([n - 1])
    while low.size:
        middle = (low + high) // 2
        sizes = np.minimum(last, middle - 1) - least + 1
        ends = np.cumsum(sizes)
        places = np.arange(ends[-1]) + np.repeat(least - (ends - sizes), sizes)
        total = np.repeat(sums.sum[middle], sizes) - sums.sum[places]
        costs = before[places] - total * total / (np.repeat(sums.number[middle], sizes) - sums.number[places])
        lowest = np.minimum.reduceat(costs, ends - sizes)
        hits = np.flatnonzero(costs == np.repeat(lowest, sizes))
        at = places[hits[np.searchsorted(hits, ends - sizes)]]  # the first of equal ones
        new[middle], begin[middle] = np.maximum(lowest + sums.squares[middle], 0.0), at
        low, high = np.concatenate([low, middle + 1]), np.concatenate([middle - 1, high])
        least, last = np.concatenate([least, at]), np.concatenate([at, last])
        open_to = low <= high
        low, high, least, last = low[open_to], high[open_to], least[open_to], last[open_to]
    return new, begin


def _settled(values: Array, sums: _Sums, edges: Array) -> Array:
    """Edges moved halfway between the means of their neighbours, until none moves; the cost falls each time."""
    for _ in range(STEPS):
        means = sums.mean(edges[:-1], edges[1:])
        moved = np.array([0, *np.searchsorted(values, (means[1:] + means[:-1]) / 2), len(values)])
        if np.array_equal(moved, edges) or bool((np.diff(moved) < 1).any()):
            break
        edges = moved
    return edges

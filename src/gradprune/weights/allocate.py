"""How layers share the budget of weights that stay (chapter 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from gradprune.weights.lamp import lamp_scores


def uniform(sizes: Sequence[int], keep: int, *, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Share a budget so that every layer keeps the same fraction of its weights.

    Args:
        sizes: the layers' numbers of weights.
        keep: how many weights stay in all.
        low: the least that each layer keeps.
        high: the most that each layer keeps.

    Returns:
        How many weights each layer keeps; they add up to `keep` exactly.

    Raises:
        ValueError: where the bounds do not allow `keep`.

    Example:
        >>> uniform([100, 300], 40, low=[0, 0], high=[100, 300])
        [10, 30]

    Chapter 4.
    """
    return share_out([float(n) for n in sizes], keep, low=low, high=high)


def erk(
    shapes: Sequence[Sequence[int]],
    keep: int,
    *,
    low: Sequence[int],
    high: Sequence[int],
    stacked: Sequence[int] | None = None,
) -> list[int]:
    """Share a budget by Erdős–Rényi-Kernel: a layer's density is the sum of its dimensions over their product.

    The number of weights that stay is proportional to the sum, so small layers stay denser. Layers that would need
    more than they have stay whole, and the others share the rest.

    Args:
        shapes: the shapes of the layers' weights.
        keep: how many weights stay in all.
        low: the least that each layer keeps.
        high: the most that each layer keeps.
        stacked: how many matrices of that shape a layer holds; 1 each unless given.

    Returns:
        How many weights each layer keeps; they add up to `keep` exactly.

    Raises:
        ValueError: where the bounds do not allow `keep`.

    Example:
        >>> erk([(10, 10), (30, 10)], 60, low=[0, 0], high=[100, 300])
        [20, 40]

    Evci et al. (2020), section 3(1); Mocanu et al. (2018), equation 3, for fully connected layers; chapter 4.
    """
    counts = [1] * len(shapes) if stacked is None else stacked
    shares = [float(sum(shape) * count) for shape, count in zip(shapes, counts, strict=True)]
    return share_out(shares, keep, low=low, high=high)


def lamp(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return layer-adaptive scores: each squared, over the sum of the squares that outlive it in its layer.

    Ranked over all layers, they never empty one, as the largest of each layer scores 1. Among equals the later position
    outlives the earlier. The sums are exact: their order changes no score.

    Args:
        scores: one tensor a layer, none negative.

    Returns:
        float64 tensors of the same shapes, between 0 and 1.

    Raises:
        ValueError: where a score is negative or NaN (its tensor is named).

    Example:
        >>> lamp({"layer": torch.tensor([1.0, 2.0])})
        {'layer': tensor([0.2000, 1.0000], dtype=torch.float64)}

    Lee et al. (2021), equation 4; chapter 4.
    """
    return {name: lamp_scores(score, name) for name, score in scores.items()}


def share_out(shares: Sequence[float], total: int, *, low: Sequence[int], high: Sequence[int]) -> list[int]:
    """Return whole numbers proportional to `shares` as far as the bounds allow, which add up to `total` exactly.

    All shares are scaled by one factor and bounded, the factor being the one that gives `total`; what rounding down
    leaves over goes to the largest remainders, the earlier first among equals.

    Args:
        shares: non-negative numbers.
        total: what the results add up to.
        low: the least of each.
        high: the most of each.

    Returns:
        One whole number for each share.

    Raises:
        ValueError: where `total` is not between the sums of `low` and of `high`.

    Example:
        >>> share_out([1.0, 2.0], 7, low=[0, 0], high=[9, 4])
        [3, 4]
    """
    if not sum(low) <= total <= sum(high):
        raise ValueError(f"cannot share {total} between bounds that add up to {sum(low)} and {sum(high)}")

    def bounded(factor: float) -> list[float]:
        return [min(max(factor * s, a), b) for s, a, b in zip(shares, low, high, strict=True)]

    smaller, larger = 0.0, max((b / s for s, b in zip(shares, high, strict=True) if s > 0), default=0.0)
    for _ in range(200):  # halving a double's range to nothing
        factor = (smaller + larger) / 2
        smaller, larger = (factor, larger) if math.fsum(bounded(factor)) < total else (smaller, factor)
    ideal = bounded(larger)
    counts = [max(math.floor(x), a) for x, a in zip(ideal, low, strict=True)]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - ideal[i])
    while sum(counts) < total:
        for i in by_remainder:
            if counts[i] < high[i] and sum(counts) < total:
                counts[i] += 1
    while sum(counts) > total:  # rounding errors of the factor
        for i in reversed(by_remainder):
            if counts[i] > low[i] and sum(counts) > total:
                counts[i] -= 1
    return counts

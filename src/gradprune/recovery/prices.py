"""What does a network cost, layer by layer, when some of a layer's units stay (chapter 6)?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gradprune.core.checks import number, require_values
from gradprune.core.encoded import bitmask_bytes
from gradprune.core.flops import count_flops, nonzeros
from gradprune.recovery.seconds import falling, seconds_here
from gradprune.weights.granularity import Units
from gradprune.weights.groups import Groups
from gradprune.weights.request import Request

Cost = Literal["parameters", "flops", "bytes", "latency"]
Losses = Mapping[str, Mapping[float, float]]


@dataclass(frozen=True)
class Price:
    """What all but the layers costs, and what a layer costs with some of its units, in what adds up.

    That is the cost itself, or with `whole`, the dense network's cost, the logarithm of the share of it that is left.
    """

    fixed: float
    of: Callable[[str, int], float]
    whole: float | None = None
    tried: Mapping[str, Collection[int]] | None = None  # the numbers of units that alone may be planned

    def cost(self, summed: float) -> float:
        """Return the cost of what adds up to this."""
        return summed if self.whole is None else self.whole * math.exp(summed)

    def summed(self, cost: float) -> float:
        """Return what has to add up to this for the cost."""
        return cost if self.whole is None else math.log(cost / self.whole)


def priced(
    cost: Cost,
    model: nn.Module,
    example: Any,
    request: Request,
    losses: Losses,
    seconds: Callable[[str, float], float] | None,
    units: Units | Groups,
) -> Price:
    """Return the price of a network of which the layers of `losses` are planned, in units of `cost`."""
    if cost == "latency":
        counts = {name: {units.stay(name, s) for s in row} | {units.number(name)} for name, row in losses.items()}
        if seconds is None:
            return _timed(model, example, request, counts)
        return _told(seconds, units, counts)
    assert isinstance(units, Units)
    planned = {name: request.layers[name].parameter for name in losses}
    if cost == "flops":
        count = count_flops(model, example)
        all_of = {name: count.by_weight.get(p, 0) for name, p in planned.items()}
        now = sum(all_of[name] * nonzeros(p.detach()) / p.numel() for name, p in planned.items() if p.numel())
        fixed = sum(found.effective for found in count.by_module.values()) - now
        return Price(fixed, lambda name, kept: all_of[name] * kept / units.number(name))
    others = [p for p in model.parameters() if not any(p is own for own in planned.values())]
    for name, parameter in model.named_parameters():
        require_values(name, parameter)
    if cost == "parameters":
        return Price(sum(nonzeros(p.detach()) for p in others), lambda name, kept: kept * units.cost(name))
    fixed = sum(bitmask_bytes(p, nonzeros(p.detach())) for p in others)
    fixed += sum(bitmask_bytes(p, 0) for p in planned.values())
    return Price(fixed, lambda name, kept: kept * units.cost(name) * planned[name].element_size())


def _timed(model: nn.Module, example: Any, request: Request, counts: Mapping[str, set[int]]) -> Price:
    """Seconds of the layers as they run here, with those numbers of their units, and of all the rest."""
    whole, times = seconds_here(model, example, {name: request.layers[name] for name in counts}, counts)
    fixed = whole - sum(row[max(row)] for row in times.values())
    fixed = max(0.0, fixed)  # a layer that is timed by itself may by chance take longer than in the model
    return Price(fixed, lambda name, kept: _between(times[name], kept))


def _told(seconds: Callable[[str, float], float], units: Units | Groups, counts: Mapping[str, set[int]]) -> Price:
    """Shares of the seconds that a function tells of the whole network with one layer narrower, as logarithms."""
    asked = {
        name: falling(
            {n: number(f"the seconds with {name!r}", seconds(name, n / units.number(name)), above=0.0) for n in wanted}
        )
        for name, wanted in counts.items()
    }
    whole = statistics.median(row[max(row)] for row in asked.values())

    def share(name: str, kept: int) -> float:
        return math.log(_between(asked[name], kept) / asked[name][max(asked[name])])

    return Price(0.0, share, whole, counts)


def _between(times: Mapping[int, float], count: int) -> float:
    """The seconds of a number of units, in proportion between those that are known."""
    below = max((n for n in times if n <= count), default=min(times))
    above = min((n for n in times if n >= count), default=max(times))
    if below == above:
        return times[below]
    return times[below] + (times[above] - times[below]) * (count - below) / (above - below)

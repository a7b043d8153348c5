"""What does a network cost, layer by layer, when some of a layer's units stay (chapter 6)?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from gradprune.core.checks import number, require_values
from gradprune.core.encoded import bitmask_bytes
from gradprune.core.flops import count_flops, nonzeros
from gradprune.recovery.seconds import layer_seconds, model_seconds
from gradprune.weights.granularity import Units
from gradprune.weights.request import Request

Cost = Literal["parameters", "flops", "bytes", "latency"]
Losses = Mapping[str, Mapping[float, float]]


@dataclass(frozen=True)
class Price:
    """What all but the layers costs, and what a layer costs with some of its units."""

    fixed: float
    of: Callable[[str, int], float]


def priced(
    cost: Cost,
    model: nn.Module,
    example: Any,
    request: Request,
    losses: Losses,
    seconds: Callable[[str, float], float] | None,
) -> Price:
    """Return the price of a network of which the layers of `losses` are planned, in units of `cost`."""
    units = Units(request.layers, request.block, None)
    planned = {name: request.layers[name].parameter for name in losses}
    if cost == "latency":
        counts = {name: {stay(units, name, s) for s in row} | {units.number(name)} for name, row in losses.items()}
        return _timed(model, example, units, counts) if seconds is None else _told(seconds, units, counts)
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


def _timed(model: nn.Module, example: Any, units: Units, counts: Mapping[str, set[int]]) -> Price:
    """Seconds of the layers as they run here, with those numbers of their units, and of all the rest."""
    times = layer_seconds(model, example, {name: units.layers[name] for name in counts}, counts)
    fixed = model_seconds(model, example) - sum(row[max(row)] for row in times.values())
    fixed = max(0.0, fixed)  # a layer that is timed by itself may by chance take longer than in the model
    return Price(fixed, lambda name, kept: _between(times[name], kept))


def _told(seconds: Callable[[str, float], float], units: Units, counts: Mapping[str, set[int]]) -> Price:
    """Seconds of the layers as a function tells them."""

    def told(name: str, count: int) -> float:
        return number(f"the seconds of {name!r}", seconds(name, count / units.number(name)), least=0.0)

    times = {name: {count: told(name, count) for count in wanted} for name, wanted in counts.items()}
    return Price(0.0, lambda name, kept: _between(times[name], kept))


def _between(times: Mapping[int, float], count: int) -> float:
    """The seconds of a number of units, in proportion between those that are known."""
    below = max((n for n in times if n <= count), default=min(times))
    above = min((n for n in times if n >= count), default=max(times))
    if below == above:
        return times[below]
    return times[below] + (times[above] - times[below]) * (count - below) / (above - below)


def stay(units: Units, name: str, sparsity: float) -> int:
    """Return how many units ``prune`` leaves."""
    weights = units.layers[name].parameter.numel()
    return round((weights - round(sparsity * weights)) / max(units.cost(name), 1))

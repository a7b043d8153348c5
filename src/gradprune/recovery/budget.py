"""Which sparsity for which layer, so that a cost is met with the least loss (chapter 6)?"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradprune.core.checks import fraction, function, module, number, require
from gradprune.core.words import in_our_words
from gradprune.recovery.hull import Point, Segment, loss_at, lower_hull, steps_to
from gradprune.recovery.outcome import Measure
from gradprune.recovery.planned import UNIT, Plan
from gradprune.recovery.prices import Cost, Losses, Price, priced
from gradprune.recovery.scan import SPARSITIES, Sensitivity, sensitivity
from gradprune.weights.eligible import Patterns, StatedAxes
from gradprune.weights.granularity import Granularity, Units
from gradprune.weights.groups import Groups
from gradprune.weights.request import Request, Score, checked_score
from gradprune.weights.score import magnitude


@in_our_words
def fit_budget(
    model: nn.Module,
    example: Any = None,
    *,
    parameters: float | None = None,
    flops: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    evaluate: Measure | None = None,
    sensitivities: Sensitivity | Losses | None = None,
    seconds: Callable[[str, float], float] | None = None,
    score: Score | None = None,
    granularity: Granularity | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    axes: StatedAxes = None,
    file: str | os.PathLike[str] | None = None,
) -> Plan:
    """Return sparsities by layer that meet a cost with the least predicted loss; nothing is pruned yet.

    The losses of the layers, each pruned alone, are taken to add up; a gain counts as no loss. Between two sparsities
    that were tried a loss is the one in proportion, beyond the highest nothing is planned. The cost is that of
    the whole network as ``report`` counts it, met exactly, or from below as nearly as whole units allow.

    Args:
        model: the network; it is left as it was.
        example: its input, a tensor, or a tuple or dict of its arguments; for FLOPs and latency.
        parameters: the most entries other than zero. Give exactly one of the four.
        flops: the most effective FLOPs of a forward pass on `example`: those with weights that stay. What a
            pruned channel saves in the next layer, once it is cut out, is not counted.
        bytes: the most bytes with one bit a weight and the nonzeros (``bytes_bitmask`` of a report).
        latency: the most seconds of a forward pass on `example`, with the pruned channels cut out; only for
            ``granularity="channel"`` and ``"group"``, as zeros alone save no time.
        evaluate: as for ``sensitivity``, which is then called, once it is known that the cost can be met.
        sensitivities: what ``sensitivity`` returned, or losses, layer -> {sparsity: loss}; give either this or
            `evaluate`. Layers that are not in it stay as they are.
        seconds: for `latency`: a function from a layer's name and the share of its channels that stay to the seconds of
            the whole network with that layer alone so narrow, as cut by ``shrink``. The shares of the time that are
            left are then taken to multiply, since what one layer loses its neighbour no longer reads; and only what
            was asked for is planned, as the time of a width says little about the next. Unless given, which only
            ``"channel"`` allows, linear layers and plain convolutions are timed here by themselves, at the sparsities
            tried: what is saved elsewhere (in the next layer, in a norm) is not counted, and layers whose channels
            cannot be cut out, as of one side of a residual sum, must be excluded.
        score: as for ``prune``; what `sensitivities` says, else ``magnitude``.
        granularity: as for ``prune``, but not n of m; what `sensitivities` says, else ``"weight"``. ``"group"`` goes
            with `latency` and `seconds`, and each group has the name of the first weight of its filters.
        include: as for ``prune``; what `sensitivities` says, else None.
        exclude: as for ``prune``; what `sensitivities` says, else None.
        axes: as for ``prune``; what `sensitivities` says, else None.
        file: as for ``sensitivity``, where `evaluate` is given.

    Returns:
        A ``Plan``, a mapping from layers to sparsities for ``prune(model, scope=plan)``.

    Raises:
        TypeError: where an argument is of a wrong kind.
        ValueError: where one is out of range, none or several costs are given, a layer is not eligible, or the cost
            cannot be met: the message says the least that can.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
        >>> losses = {"0.weight": {0.5: 0.1, 0.9: 0.5}, "1.weight": {0.5: 0.0, 0.9: 0.1}}
        >>> plan = gp.fit_budget(model, parameters=90, sensitivities=losses)
        >>> {name: round(sparsity, 2) for name, sparsity in plan.items()}, round(plan.loss, 4)
        ({'0.weight': 0.5, '1.weight': 0.6}, 0.125)
        >>> masks = gp.prune(model, scope=plan)
        >>> gp.report(model).total.nonzeros
        90

    Everett (1963), for one multiplier; chapter 6.
    """
    module(model)
    cost, limit = _one_cost(parameters, flops, bytes, latency)
    given = {"include": include, "exclude": exclude, "axes": axes}
    way = _way(sensitivities, score, granularity, given)
    coupled = isinstance(way.granularity, str) and way.granularity == "group"
    request = Request.of(model, granularity="channel" if coupled else way.granularity, **way.eligible)
    require(request.n_of_m is None, f"granularity={way.granularity!r} is itself a sparsity: there is nothing to share")
    if seconds is not None:
        function("seconds", seconds)
    if cost == "latency":
        require(
            coupled or way.granularity == "channel",
            'zeros alone save no time: latency needs granularity="channel" or "group"',
        )
    require(
        not coupled or (cost == "latency" and seconds is not None),
        'granularity="group" goes with latency and seconds: what coupled channels cost is measured, not counted',
    )
    require(cost not in ("flops", "latency") or example is not None, f"{cost} needs an example: the model's input")
    require(sensitivities is None or evaluate is None, "give either evaluate or sensitivities, not both")
    require(sensitivities is None or file is None, "file is where the scan of evaluate is written down: give evaluate")
    units: Units | Groups = Units(request.layers, request.block, None)
    if coupled:
        units = Groups.of(model, example, **way.eligible)
    known = list(units.numbers if isinstance(units, Groups) else request.layers)
    if sensitivities is None:
        require(evaluate is not None, "give evaluate, or the sensitivities that gp.sensitivity returned")
        measure = function("evaluate", evaluate)
        tried: Losses = {name: dict.fromkeys(SPARSITIES, 0.0) for name in known}
        price = priced(cost, model, example, request, tried, seconds, units)
        _require_met(cost, limit, _layers(tried, units), price)
        traced = {"example": example} if coupled else {}
        as_planned = {"score": way.score, "granularity": way.granularity, "file": file} | dict(way.eligible) | traced
        losses: Losses = sensitivity(model, measure, **as_planned).losses()
    else:
        losses = sensitivities.losses() if isinstance(sensitivities, Sensitivity) else _checked(sensitivities, known)
        price = priced(cost, model, example, request, losses, seconds, units)
        _require_met(cost, limit, _layers(losses, units), price)
    return _planned(cost, limit, _layers(losses, units), way, price)


@dataclass(frozen=True)
class _Way:
    """How the layers are pruned."""

    score: Score
    granularity: Granularity
    eligible: Mapping[str, Any]


@dataclass(frozen=True)
class _Layer:
    """One layer: how many units and weights it has, and what it loses with fewer."""

    units: int
    all_weights: int
    losses: dict[int, float]  # units that stay -> loss

    def weights(self, units: int) -> int:
        """Weights in so many units; nearly where those of a group are of several sizes."""
        return round(units * self.all_weights / max(1, self.units))


def _one_cost(parameters: Any, flops: Any, bytes: Any, latency: Any) -> tuple[Cost, float]:
    every: dict[Cost, Any] = {"parameters": parameters, "flops": flops, "bytes": bytes, "latency": latency}
    given = [name for name, limit in every.items() if limit is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of parameters, flops, bytes and latency; got {', '.join(given) or 'none'}")
    return given[0], number(given[0], every[given[0]], above=0.0)


def _way(sensitivities: Any, score: Any, granularity: Any, given: dict[str, Any]) -> _Way:
    """What the sensitivities were measured with, or else what is given."""
    if not isinstance(sensitivities, Sensitivity):
        if sensitivities is not None and not isinstance(sensitivities, Mapping):
            raise TypeError(
                "sensitivities must be what gp.sensitivity returned, or a dict layer -> {sparsity: loss}, got "
                f"{type(sensitivities).__name__}"
            )
        score = magnitude if score is None else checked_score(score)
        return _Way(score, "weight" if granularity is None else granularity, given)
    again = [n for n, v in (given | {"score": score, "granularity": granularity}).items() if v is not None]
    require(not again, f"the sensitivities say already with which {' and '.join(again)} they were measured")
    return _Way(sensitivities.score, sensitivities.granularity, sensitivities.eligible)


def _checked(losses: Mapping[str, Any], known: list[str]) -> dict[str, dict[float, float]]:
    """The losses by name, as plain numbers."""
    require(bool(losses), "sensitivities is empty")
    found = {}
    for name, row in losses.items():
        require(name in known, f"sensitivities names {name!r}, which is not eligible: {known}")
        if not isinstance(row, Mapping):
            raise TypeError(
                f"the sensitivities of {name!r} must be a dict {{sparsity: loss}}, got {type(row).__name__}"
            )
        found[name] = {
            fraction(f"a sparsity of {name!r}", s): number(f"the loss of {name!r} at {s}", loss)
            for s, loss in row.items()
        }
    return found


def _layers(losses: Losses, units: Units | Groups) -> dict[str, _Layer]:
    """The layers in units; a gain counts as no loss, and whole it loses nothing."""
    return {
        name: _Layer(
            units.number(name),
            units.weights(name),
            {units.stay(name, s): max(loss, 0.0) for s, loss in row.items()} | {units.number(name): 0.0},
        )
        for name, row in losses.items()
    }


def _require_met(cost: Cost, limit: float, layers: Mapping[str, _Layer], price: Price) -> None:
    """Raise ValueError where even the fewest units cost more."""
    cheapest = (min(price.of(name, units) for units in layer.losses) for name, layer in layers.items())
    least = price.cost(price.fixed + sum(cheapest))
    require(
        least <= limit,
        f"{cost}={limit:,.10g} cannot be met: at the highest sparsities that were tried the least is {least:,.10g}",
    )


def _planned(cost: Cost, limit: float, layers: Mapping[str, _Layer], way: _Way, price: Price) -> Plan:
    """The steps down the hulls until the limit is met, and back up as far as it allows."""
    hulls = {
        name: lower_hull([Point(units, price.of(name, units), loss) for units, loss in layer.losses.items()])
        for name, layer in layers.items()
    }
    most = price.summed(limit) - price.fixed
    kept = {name: hull[0].units for name, hull in hulls.items()}
    taken = steps_to(hulls, most)
    for step in taken:
        kept[step.name] = step.end.units
    left = most - sum(price.of(name, units) for name, units in kept.items())
    for step in reversed(taken):
        if kept[step.name] != step.end.units:  # not the last step of its layer
            continue
        if price.tried is None:
            kept[step.name], left = _raised(step.name, step.start.units, kept[step.name], left, price)
        else:
            kept[step.name], left = _tried(step, layers[step.name].losses, price.tried[step.name], left, price)
    dense = price.cost(price.fixed + sum(price.of(name, layer.units) for name, layer in layers.items()))
    predicted = price.cost(price.fixed + sum(price.of(name, units) for name, units in kept.items()))
    rows: tuple[dict[str, Any], ...] = tuple(
        {
            "layer": name,
            "weights": layer.weights(layer.units),
            "stay": layer.weights(kept[name]),
            "sparsity": 1 - kept[name] / layer.units if layer.units else 0.0,
            f"{UNIT[cost]} dense": price.cost(price.of(name, layer.units)),
            f"{UNIT[cost]} planned": price.cost(price.of(name, kept[name])),
            "loss": loss_at(hulls[name], kept[name]) if price.tried is None else layer.losses[kept[name]],
        }
        for name, layer in layers.items()
    )
    slope = taken[-1].slope if taken else 0.0
    return Plan(
        {row["layer"]: row["sparsity"] for row in rows},
        cost,
        limit,
        predicted,
        dense,
        sum(row["loss"] for row in rows),
        slope if price.whole is None else slope / predicted,
        rows,
        way.granularity,
        way.score,
        way.eligible,
    )


def _tried(
    step: Segment, losses: Mapping[int, float], tried: Collection[int], left: float, price: Price
) -> tuple[int, float]:
    """The units of least loss along a step, among those whose cost is known and within what is left; what is left."""
    within = {
        units: price.of(step.name, units) - step.end.cost
        for units in tried
        if step.end.units <= units <= step.start.units and price.of(step.name, units) - step.end.cost <= left
    }
    best = min(within, key=lambda units: (losses[units], -units))
    return best, left - within[best]


def _raised(name: str, most: int, least: int, left: float, price: Price) -> tuple[int, float]:
    """As many units between the two as what is left of the cost allows, and what is left then."""
    start = price.of(name, least)
    low, high = least, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if price.of(name, middle) - start <= left else (low, middle - 1)
    return low, left - (price.of(name, low) - start)

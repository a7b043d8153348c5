"""Which sparsity for which layer, so that a cost is met with the least loss (chapter 6)?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from gradprune.core.checks import fraction, function, module, number, require
from gradprune.core.tables import Table
from gradprune.core.words import in_our_words
from gradprune.recovery.hull import Point, Segment, loss_at, lower_hull, steps_to
from gradprune.recovery.outcome import Measure
from gradprune.recovery.prices import Cost, Losses, Price, priced
from gradprune.recovery.scan import Sensitivity, sensitivity
from gradprune.weights.eligible import Patterns, StatedAxes
from gradprune.weights.granularity import Granularity, Units
from gradprune.weights.groups import Groups
from gradprune.weights.mask import Masks
from gradprune.weights.prune import prune
from gradprune.weights.request import Request, Score, checked_score
from gradprune.weights.score import magnitude

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNIT = {"parameters": "parameters", "flops": "FLOPs", "bytes": "bytes", "latency": "seconds"}


@dataclass(frozen=True, eq=False)
class Plan(Table, Mapping[str, float]):
    """A sparsity for each layer, as ``prune(model, scope=plan)`` takes it, and what it is predicted to cost.

    Printed, it is a table.

    Args:
        sparsities: layer -> sparsity; the plan is a mapping of these.
        cost: which cost is bounded: ``"parameters"``, ``"flops"``, ``"bytes"`` or ``"latency"``.
        limit: what the whole network may cost.
        predicted: what it will cost, at most `limit`.
        dense: what it costs with all of these weights.
        loss: the predicted loss in what was evaluated, the sum over the layers; a sum is a guess, so evaluate what
            comes out.
        multiplier: the loss per cost saved of the last step: what a little more of the cost is worth.
        layers: one row a layer.
        granularity: what goes together; to be given to ``prune`` too where it is not ``"weight"``.
        score: what ranks the weights.
        eligible: which layers took part, as arguments of ``prune``.

    Chapter 6.
    """

    _named_by: ClassVar[str | None] = "layer"

    sparsities: dict[str, float]
    cost: Cost
    limit: float
    predicted: float
    dense: float
    loss: float
    multiplier: float
    layers: tuple[dict[str, Any], ...]
    granularity: Granularity = "weight"
    score: Score = magnitude
    eligible: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.sparsities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sparsities)

    def __len__(self) -> int:
        return len(self.sparsities)

    def apply_(self, model: nn.Module, example: Any = None) -> Masks:
        """Prune a model by this plan: ``prune`` with its sparsities, score and granularity.

        Args:
            model: the network that was planned for; its weights are changed in place.
            example: its input, as for ``prune``, where the granularity is ``"group"``.

        Returns:
            The masks.

        Raises:
            TypeError: as ``prune``.
            ValueError: as ``prune``, before anything is changed.
        """
        as_planned = {"scope": self, "granularity": self.granularity, "example": example} | dict(self.eligible)
        return prune(model, self.score, **as_planned)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a layer: its weights, how many stay, its cost before and after, its predicted loss."""
        return [dict(row) for row in self.layers]

    def __repr__(self) -> str:
        return (
            f"Plan({_UNIT[self.cost]} {self.predicted:,.6g} of {self.dense:,.6g}, at most {self.limit:,.6g}; predicted "
            f"loss {self.loss:.4g}; {len(self)} layers)"
        )

    def plot(self) -> Figure:
        """Draw the sparsity of each layer. Needs matplotlib.

        Returns:
            The figure, which no window shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from gradprune.gradients.plotting import new_figure

        figure = new_figure(1.0 + 0.22 * max(len(self), 4))
        axes = figure.subplots()
        names = list(self)[::-1]
        axes.barh(names, [self[name] for name in names])
        axes.set(xlim=(0, 1), xlabel=f"sparsity, for at most {self.limit:,.4g} {_UNIT[self.cost]}")
        axes.tick_params(axis="y", labelsize="small")
        return figure


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
        evaluate: as for ``sensitivity``, which is then called.
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
    if sensitivities is None:
        require(evaluate is not None, "give evaluate, or the sensitivities that gp.sensitivity returned")
        assert evaluate is not None
        function("evaluate", evaluate)
        traced = {"example": example} if coupled else {}
        as_planned = {"score": way.score, "granularity": way.granularity} | dict(way.eligible) | traced
        sensitivities = sensitivity(model, evaluate, **as_planned)
    else:
        require(evaluate is None, "give either evaluate or sensitivities, not both")
    units: Units | Groups = Units(request.layers, request.block, None)
    if coupled:
        units = Groups.of(model, example, **way.eligible)
    known = units.numbers if isinstance(units, Groups) else request.layers
    losses = sensitivities.losses() if isinstance(sensitivities, Sensitivity) else _checked(sensitivities, list(known))
    price = priced(cost, model, example, request, losses, seconds, units)
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


def _planned(cost: Cost, limit: float, layers: Mapping[str, _Layer], way: _Way, price: Price) -> Plan:
    """The steps down the hulls until the limit is met, and back up as far as it allows."""
    hulls = {
        name: lower_hull([Point(units, price.of(name, units), loss) for units, loss in layer.losses.items()])
        for name, layer in layers.items()
    }
    least = price.cost(price.fixed + sum(hull[-1].cost for hull in hulls.values()))
    require(
        least <= limit,
        f"{cost}={limit:,.10g} cannot be met: at the highest sparsities that were tried the least is {least:,.10g}",
    )
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
            f"{_UNIT[cost]} dense": price.cost(price.of(name, layer.units)),
            f"{_UNIT[cost]} planned": price.cost(price.of(name, kept[name])),
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

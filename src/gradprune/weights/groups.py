"""Which coupled channels matter least, over all layers (chapters 4 and 8)?

A channel here is all that the network couples to it (``core.coupled``): its filters in each layer that adds to it, and
what goes with them, biases and norms' scales and shifts, so that it is exactly zero and can be taken out. Only the
filters' weights are ranked and counted.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gradprune.core.checks import require
from gradprune.core.coupled import coupled
from gradprune.core.layers import TRANSPOSED, Weight
from gradprune.core.units import Part, Unit, is_depthwise, place, reads, writes
from gradprune.weights.eligible import Patterns, StatedAxes, as_patterns, eligible
from gradprune.weights.mask import Masks
from gradprune.weights.request import (
    Score,
    check_made_for,
    checked_amount,
    checked_scope,
    checked_score,
    ranked_by,
    require_one_amount,
)

Index = tuple[Any, ...]


@dataclass
class _Channel:
    """What goes as one: entries of eligible weights, entries of others, and the group it belongs to."""

    group: int
    place: tuple[int, ...]  # in which groups of grouped convolutions, which lose equally many each
    counted: list[tuple[str, Index]]
    beside: list[tuple[str, Index]]
    weights: int = 0
    score: float = 0.0


def prune_groups(
    model: nn.Module,
    score: Score,
    example: Any,
    *,
    sparsity: float | None,
    threshold: float | None,
    scope: Any,
    include: Patterns,
    exclude: Patterns,
    within: Mapping[str, Tensor] | None,
    axes: StatedAxes,
) -> Masks:
    """Return the masks by which whole coupled channels go; arguments and errors as of ``prune``."""
    score = checked_score(score)
    shared = isinstance(scope, Mapping) or (isinstance(scope, str) and scope in ("global", "layer"))
    require(shared, f"granularity='group' goes with scope 'global', 'layer' or sparsities by name, got {scope!r}")
    if isinstance(scope, Mapping):
        check_made_for(scope, "group")
        require(threshold is None, "a scope that gives sparsities by name does not go with a threshold")
    else:
        require_one_amount(sparsity, threshold)
    sparsity, threshold = checked_amount(sparsity, threshold)
    groups = Groups.of(model, example, include, exclude, axes)
    scope = groups.by_number(scope, sparsity or 0.0) if isinstance(scope, Mapping) else scope
    ranked = ranked_by(score, model, groups.parameters).scores()
    return groups.masks(ranked, None if within is None else Masks(within), sparsity, threshold, scope)


@dataclass(frozen=True)
class Groups:
    """The coupled channels of a network that can go."""

    layers: Mapping[str, Weight]
    channels: list[_Channel]
    others: Mapping[str, nn.Parameter]  # all parameters by name: what goes beside the filters is among them

    @classmethod
    def of(
        cls, model: nn.Module, example: Any, include: Patterns = None, exclude: Patterns = None, axes: StatedAxes = None
    ) -> Groups:
        """Find them by a trace on the example; errors as of ``prune``."""
        require(example is not None, "granularity='group' needs example=, the model's input: what is coupled is traced")
        include = None if include is None else as_patterns("include", include)
        exclude = None if exclude is None else as_patterns("exclude", exclude)
        layers = eligible(model, include, exclude, axes)
        names = {id(p): name for name, p in model.named_parameters()}
        twin = copy.deepcopy(model)  # a trace leaves its hooks where it fails
        channels = list(_channels(twin, example, layers, names, dict(model.named_modules())))
        require(
            bool(channels),
            "the network couples no channels that can go: its layers are its outputs, stand under norms over channels, "
            "or are excluded",
        )
        return cls(layers, channels, dict(model.named_parameters()))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights that are ranked, by name."""
        return {name: weight.parameter for name, weight in self.layers.items()}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each group by the name of the first weight of its filters."""
        of = {name: channel.group for channel in self.channels for name, _ in channel.counted}
        first: dict[int, str] = {}
        for name in self.layers:
            if name in of:
                first.setdefault(of[name], name)
        return {name: number for number, name in first.items()}

    def number(self, name: str) -> int:
        """Return how many channels, or heads, a group has that go one by one; one always stays."""
        return len(self._together[self.numbers[name]])

    def stay(self, name: str, sparsity: float) -> int:
        """Return how many of them ``prune`` leaves."""
        number = self.number(name)
        return max(1, number - math.floor(sparsity * number + 0.5))

    @cached_property
    def _together(self) -> dict[int, list[_Channel]]:
        return _together(self.channels)

    def weights(self, name: str) -> int:
        """Return how many weights the filters of a group have."""
        number = self.numbers[name]
        names = {name for channel in self.channels if channel.group == number for name, _ in channel.counted}
        return sum(self.layers[name].parameter.numel() for name in names)

    def by_number(self, scope: Mapping[str, float], otherwise: float) -> dict[int, float]:
        """Return the sparsity of each group, from sparsities by the name of any of its filters' weights."""
        given = checked_scope(scope, self.layers)
        assert isinstance(given, dict)
        found: dict[int, tuple[str, float]] = {}
        known = set()
        for channel in self.channels:
            for name, _ in channel.counted:
                known.add(name)
                if name in given:
                    first, sparsity = found.setdefault(channel.group, (name, given[name]))
                    require(
                        sparsity == given[name],
                        f"scope gives {first!r} and {name!r}, whose channels go together, different sparsities, "
                        f"{sparsity} and {given[name]}",
                    )
        for name, sparsity in given.items():
            require(name in known or not sparsity, f"scope names {name!r}, whose channels cannot go: they stay")
        return {channel.group: found.get(channel.group, ("", otherwise))[1] for channel in self.channels}

    def masks(
        self,
        ranked: Mapping[str, Tensor],
        allowed: Masks | None,
        sparsity: float | None,
        threshold: float | None,
        scope: str | Mapping[int, float],
    ) -> Masks:
        """Return the masks by which the channels of the lowest scores go, with all that goes with them."""
        gone = _chosen(self.channels, ranked, self.layers, allowed, sparsity, threshold, scope)
        keep = {n: torch.ones(p.shape, dtype=torch.bool, device=p.device) for n, p in self.parameters.items()}
        for channel in gone:
            for name, index in (*channel.counted, *channel.beside):
                if name not in keep:
                    beside = self.others[name]
                    keep[name] = torch.ones(beside.shape, dtype=torch.bool, device=beside.device)
                keep[name][index] = False
        if allowed is not None:
            keep = {n: mask & allowed[n].to(mask.device) if n in allowed else mask for n, mask in keep.items()}
            keep |= {name: mask for name, mask in allowed.items() if name not in keep}
        return Masks(keep)


def _channels(
    twin: nn.Module,
    example: Any,
    layers: Mapping[str, Weight],
    names: Mapping[int, str],
    modules: Mapping[str, nn.Module],
) -> Iterator[_Channel]:
    """The channels that can go, each group's as many as can."""
    for number, group in enumerate(coupled(twin, example, "granularity='group'")):
        if group.stays or not any(map(reads, group.parts)) or any(map(_is_never_zero, group.parts)):
            continue
        filters = [names.get(id(_weight(part, modules)), "") for part in group.parts if writes(part)]
        if not filters or not all(name in layers for name in filters):
            continue
        for unit in group.units:
            yield _Channel(number, place(group, unit), *_entries(unit, layers, names, modules))


def _is_never_zero(part: Part) -> bool:
    """Whether it is a norm that shifts by its statistics and has no scale to be set to zero."""
    return isinstance(part.module, _BatchNorm | _InstanceNorm) and part.module.weight is None


def _weight(part: Part, modules: Mapping[str, nn.Module]) -> Any:
    return modules[part.name]._parameters.get("weight")


def _entries(
    unit: Unit, layers: Mapping[str, Weight], names: Mapping[int, str], modules: Mapping[str, nn.Module]
) -> tuple[list[tuple[str, Index]], list[tuple[str, Index]]]:
    counted: list[tuple[str, Index]] = []
    beside: list[tuple[str, Index]] = []
    for part, channels in unit.items():
        if reads(part) or isinstance(part.module, nn.PReLU):
            continue
        places = list(channels)
        if part.side == "parameter":
            beside.append((part.name, (slice(None),) * part.dim + (places,)))
            continue
        module: Any = modules[part.name]
        name = names[id(module.weight)]
        if not writes(part):
            beside.append((name, (slice(None), places) if isinstance(module, nn.Embedding) else (places,)))
        else:
            counted += [(name, index) for index in _rows(module, name, layers, places)]
        if getattr(module, "bias", None) is not None:
            beside.append((names[id(module.bias)], (places,)))
    return counted, beside


def _rows(module: Any, name: str, layers: Mapping[str, Weight], places: list[int]) -> list[Index]:
    """Where the weights of these outputs are stored."""
    if isinstance(module, TRANSPOSED) and module.groups > 1 and not is_depthwise(module):
        each, inputs = module.out_channels // module.groups, module.in_channels // module.groups
        return [(slice(c // each * inputs, (c // each + 1) * inputs), c % each) for c in places]
    if is_depthwise(module):
        return [(places,)]
    axes = layers[name].axes
    axis = 0 if axes is None else axes.output
    return [(slice(None),) * axis + (places,)]


# --------------------------------------------------------------------------------------------------- which of them go


def _chosen(
    channels: list[_Channel],
    scores: Mapping[str, Tensor],
    layers: Mapping[str, Weight],
    allowed: Masks | None,
    sparsity: float | None,
    threshold: float | None,
    scope: str | Mapping[int, float],
) -> list[_Channel]:
    for name, values in scores.items():
        require(not bool(values.isnan().any()), f"the score of {name!r} contains NaN")
    for channel in channels:
        parts = [scores[name][index].double() for name, index in channel.counted]
        channel.weights = sum(part.numel() for part in parts)
        channel.score = float(sum(part.sum() for part in parts)) / max(1, channel.weights)
        if allowed is not None and any(
            name in allowed and not bool(allowed[name][index].all()) for name, index in channel.counted
        ):
            channel.score = -torch.inf  # it is gone in part, and goes first
    groups = _together(channels)
    if threshold is not None:
        return [c for group in groups.values() for c in _in_order(group)[:-1] if c.score < threshold]
    if scope == "layer" or isinstance(scope, Mapping):
        shares = scope if isinstance(scope, Mapping) else dict.fromkeys(groups, sparsity or 0.0)
        of_groups = [
            _nearest(_in_order(group)[:-1], shares.get(number, 0.0) * sum(c.weights for c in group))
            for number, group in groups.items()
        ]
        return [channel for group in of_groups for channel in group]
    assert sparsity is not None
    total = sum(weight.parameter.numel() for weight in layers.values())
    candidates = _in_order([channel for group in groups.values() for channel in _in_order(group)[:-1]])
    most = sum(channel.weights for channel in candidates)
    wanted = round(sparsity * total)
    largest = max((channel.weights for channel in candidates), default=0)
    require(
        wanted <= most + largest / 2,
        f"sparsity {sparsity} is {wanted} of {total} weights, but only {most} are of coupled channels that can go with "
        "one left in each group",
    )
    return _nearest(candidates, wanted)


def _together(channels: list[_Channel]) -> dict[int, list[_Channel]]:
    """By group; where grouped convolutions lose equally many in each of theirs, the lowest of each are one."""
    by_place: dict[int, dict[tuple[int, ...], list[_Channel]]] = defaultdict(lambda: defaultdict(list))
    for channel in channels:
        by_place[channel.group][channel.place].append(channel)
    return {
        group: [_joined(some) for some in zip(*map(_in_order, places.values()), strict=False)]
        for group, places in by_place.items()
    }


def _joined(channels: tuple[_Channel, ...]) -> _Channel:
    first, weights = channels[0], sum(channel.weights for channel in channels)
    score = sum(channel.score * channel.weights for channel in channels) / max(1, weights)
    counted = [entry for channel in channels for entry in channel.counted]
    beside = [entry for channel in channels for entry in channel.beside]
    return _Channel(first.group, first.place, counted, beside, weights, score)


def _in_order(channels: list[_Channel]) -> list[_Channel]:
    """The lowest first, and of equal ones the earlier."""
    return sorted(channels, key=lambda channel: channel.score)


def _nearest(channels: list[_Channel], wanted: float) -> list[_Channel]:
    """The first ones that hold nearest to so many weights."""
    chosen: list[_Channel] = []
    sum_of = 0
    for channel in channels:
        if abs(sum_of + channel.weights - wanted) > abs(sum_of - wanted):
            break
        chosen.append(channel)
        sum_of += channel.weights
    return chosen

"""Which coupled channels matter least, over all layers (chapters 4 and 8)?

A channel here is all that the network couples to it (``core.coupled``): its filters in each layer that adds to it, and
what goes with them, biases and norms' scales and shifts, so that it is exactly zero and can be taken out. Only the
filters' weights are ranked and counted.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gradprune.core.checks import require
from gradprune.core.coupled import coupled
from gradprune.core.layers import Axes, Weight
from gradprune.core.units import Part, Unit, place, reads, width, writes
from gradprune.weights.eligible import Patterns, StatedAxes, as_patterns, eligible
from gradprune.weights.mask import Masks
from gradprune.weights.request import checked_scope

Scope = str | Mapping[int, float]  # sparsities by the numbers of groups


@dataclass
class _Channel:
    """What goes as one: outputs of filters, entries of what goes beside them, and the group it belongs to."""

    group: int
    place: tuple[int, ...]  # in which groups of grouped convolutions, which lose equally many each
    counted: list[tuple[str, list[int]]]
    beside: list[tuple[str, list[int]]]
    weights: int = 0
    score: float = 0.0


@dataclass(frozen=True)
class Groups:
    """The coupled channels of a network that can go."""

    layers: Mapping[str, Weight]
    channels: list[_Channel]
    beside: Mapping[str, int]  # what goes beside the filters, and which of its axes has the channels
    others: Mapping[str, nn.Parameter]  # all parameters by name: what goes beside is among them

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
        beside: dict[str, int] = {}
        channels = list(_channels(twin, example, layers, names, dict(model.named_modules()), beside))
        require(
            bool(channels),
            "the network couples no channels that can go: its layers are its outputs, stand under norms over channels, "
            "or are excluded",
        )
        return cls(layers, channels, beside, dict(model.named_parameters()))

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

    def require_enough(self, sparsity: float) -> None:
        """Raise ValueError where the channels that can go have not so many weights, whatever their scores."""
        weights = [[channel.weights for channel in group] for group in self._together.values()]
        most = sum(sum(group) - min(group) for group in weights)
        self._require_enough(sparsity, most, max(map(max, weights)))

    def _require_enough(self, sparsity: float, most: int, largest: int) -> int:
        total = sum(weight.parameter.numel() for weight in self.layers.values())
        wanted = round(sparsity * total)
        require(
            wanted <= most + largest / 2,
            f"sparsity {sparsity} is {wanted} of {total} weights, but only {most} are of coupled channels that can go "
            "with one left in each group",
        )
        return wanted

    def masks(
        self,
        ranked: Mapping[str, Tensor],
        allowed: Mapping[str, Tensor] | None,
        sparsity: float | None,
        threshold: float | None,
        scope: Scope,
    ) -> Masks:
        """Return the masks by which the channels of the lowest scores go, with all that goes with them."""
        keep = {n: torch.ones(p.shape, dtype=torch.bool, device=p.device) for n, p in self.parameters.items()}
        if allowed is not None:
            keep = {n: mask & allowed[n].to(mask.device) if n in allowed else mask for n, mask in keep.items()}
        gone = self._chosen(ranked, keep, sparsity, threshold, scope)
        for name, places in _gathered(entry for channel in gone for entry in channel.counted).items():
            keep[name] = without(keep[name], places, _axes(self.layers[name]))
        others = {name: mask for name, mask in (allowed or {}).items() if name not in keep}
        return Masks(self.with_beside(keep | others))

    def with_beside(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return masks by which biases, scales and shifts go with the channels whose filters have gone."""
        found = dict(masks)
        left = {name: by_output(masks[name], _axes(weight)) for name, weight in self.layers.items()}
        gone = (channel for channel in self.channels if channel.weights and not _total(channel, left))
        for name, places in _gathered(entry for channel in gone for entry in channel.beside).items():
            like = self.others[name]
            before = (
                found.get(name, torch.ones((), dtype=torch.bool, device=like.device)).to(like.device).expand(like.shape)
            )
            found[name] = without(before, places, Axes(self.beside[name]))
        return found

    def _chosen(
        self,
        scores: Mapping[str, Tensor],
        allowed: Mapping[str, Tensor],
        sparsity: float | None,
        threshold: float | None,
        scope: Scope,
    ) -> list[_Channel]:
        """The channels that go; one that has gone in part goes first."""
        for name, values in scores.items():
            require(not bool(values.isnan().any()), f"the score of {name!r} contains NaN")
        sums = {name: by_output(values, _axes(self.layers[name])) for name, values in scores.items()}
        left = {name: by_output(allowed[name], _axes(self.layers[name])) for name in scores}
        for channel in self.channels:
            in_part = _total(channel, left) < channel.weights
            channel.score = -math.inf if in_part else _total(channel, sums) / max(1, channel.weights)
        groups = _together(self.channels)
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
        candidates = _in_order([channel for group in groups.values() for channel in _in_order(group)[:-1]])
        weights = [channel.weights for channel in candidates]
        return _nearest(candidates, self._require_enough(sparsity, sum(weights), max(weights, default=0)))


def _axes(weight: Weight) -> Axes:
    return weight.axes or Axes()


def by_output(values: Tensor, axes: Axes) -> list[float]:
    """Return the sum over each output's values."""
    by_channel = axes.canonical(values)
    by_channel = by_channel.flatten(0, 1) if axes.groups > 1 else by_channel
    return by_channel.flatten(1).sum(1, dtype=torch.float64).tolist()


def without(mask: Tensor, outputs: list[int], axes: Axes) -> Tensor:
    """Return a mask by which all of some outputs goes too."""
    stays = torch.ones(mask.shape[axes.output] * axes.groups, dtype=torch.bool, device=mask.device)
    stays[outputs] = False
    if axes.groups == 1:
        return mask & stays.view([-1 if axis == axes.output else 1 for axis in range(mask.dim())])
    each = stays.view(axes.groups, -1).repeat_interleave(mask.shape[0] // axes.groups, 0)  # [inputs, outputs of one]
    return mask & each.view(*each.shape, *(1,) * (mask.dim() - 2))


def _gathered(entries: Iterable[tuple[str, list[int]]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for name, places in entries:
        found[name] += places
    return found


def _total(channel: _Channel, by: Mapping[str, list[float]]) -> float:
    return sum(by[name][place] for name, places in channel.counted for place in places)


def _channels(
    twin: nn.Module,
    example: Any,
    layers: Mapping[str, Weight],
    names: Mapping[int, str],
    modules: Mapping[str, nn.Module],
    axes_beside: dict[str, int],
) -> Iterator[_Channel]:
    """The channels that can go, each group's as many as can."""
    for number, group in enumerate(coupled(twin, example, "granularity='group'")):
        if group.stays or not any(map(reads, group.parts)) or any(map(_is_never_zero, group.parts)):
            continue
        filters = [names.get(id(_weight(part, modules)), "") for part in group.parts if writes(part)]
        if not filters or not all(name in layers for name in filters):
            continue
        for unit in group.units:
            yield _Channel(number, place(group, unit), *_entries(unit, layers, names, modules, axes_beside))


def _is_never_zero(part: Part) -> bool:
    """Whether it is a norm that shifts by its statistics and has no scale to be set to zero."""
    return isinstance(part.module, _BatchNorm | _InstanceNorm) and part.module.weight is None


def _weight(part: Part, modules: Mapping[str, nn.Module]) -> Any:
    return modules[part.name]._parameters.get("weight")


def _entries(
    unit: Unit,
    layers: Mapping[str, Weight],
    names: Mapping[int, str],
    modules: Mapping[str, nn.Module],
    axes_beside: dict[str, int],
) -> tuple[list[tuple[str, list[int]]], list[tuple[str, list[int]]], int]:
    """The outputs of filters, what goes beside them, of which the axis is noted, and how many weights are counted."""
    counted: list[tuple[str, list[int]]] = []
    beside: list[tuple[str, list[int]]] = []
    weights = 0
    for part, channels in unit.items():
        if reads(part) or isinstance(part.module, nn.PReLU):
            continue
        places = list(channels)
        if part.side == "parameter":
            beside.append((part.name, places))
            axes_beside[part.name] = part.dim
            continue
        module: Any = modules[part.name]
        name = names[id(module.weight)]
        if writes(part):
            counted.append((name, places))
            weights += len(places) * (layers[name].parameter.numel() // width(part))
        else:
            beside.append((name, places))
            axes_beside[name] = int(isinstance(module, nn.Embedding))
        if getattr(module, "bias", None) is not None:
            beside.append((names[id(module.bias)], places))
            axes_beside[names[id(module.bias)]] = 0
    return counted, beside, weights


# --------------------------------------------------------------------------------------------------- which of them go


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

"""How does a network lose the channels that are zero, and stay the same function (chapter 8)?

Channels that the network couples go together (``core.coupled``). Such a unit can go where each layer that reads it
gets a constant whatever the input (``deploy.constant``), or reads it with weights that are all zero. A constant other
than zero moves into the bias of what reads it. What was taken out is checked against the masked network on the example
and on other inputs, and a group of channels for which the outputs would differ is put back.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gradprune.core import checks
from gradprune.core.checks import require, require_values
from gradprune.core.coupled import OUTPUTS, coupled
from gradprune.core.evaluate import as_written, call_on, evaluated, tensors_in
from gradprune.core.layers import require_layers, uncompiled_network
from gradprune.core.traced import torch_pruning
from gradprune.core.units import Coupled, Part, Unit, groups_of, place, reads, width, writes
from gradprune.deploy.constant import constants, inputs_like
from gradprune.deploy.cut import Undo, columns, cut_, replace_, rows
from gradprune.deploy.widths import remember_dense_
from gradprune.weights.mask import Masks

# How far outputs may be apart, as a share of the largest: sums of other lengths are rounded otherwise.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Constants = Mapping[Part, tuple[Tensor, Tensor]]  # which channels that enter a layer are constant, and their values


def shrink(model: nn.Module, example: Any, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return the network without the channels that are zero: narrower layers, the same function.

    Channels that the network couples (residual sums, batch norms, depthwise and grouped convolutions, concatenations,
    whole heads of attention, gated MLPs) go together, with their biases and their norms' scales and shifts. A channel
    goes where it is constant whatever the input because the weights that write it are zero, or where nothing reads it.
    A constant other than zero is added into the bias of the layers that read it. The outputs are compared with the
    masked model's, in eval mode, on the example and on noisy copies of it.

    What cannot go exactly stays, and a warning says why: channels over which a layer, group or RMS norm takes its
    statistics, single channels of an attention's head, heads of ``nn.MultiheadAttention`` (its forward pass wants
    ``embed_dim`` of them), a part of the outputs. At least one channel of each layer stays. A grouped convolution loses
    the same number of channels in each group.

    Args:
        model: The network; it is not changed.
        example: Its input, a tensor, or a tuple or dict of its arguments, of the sizes that are to come: what a
            pooling layer makes of a constant at its padded edges depends on them.
        masks: What is zero, as ``prune`` returns it; None where the weights are zero already.

    Returns:
        A copy, narrower, of the same classes, dtypes, device and modes, and with its parameters' ``requires_grad``, but
        no gradients. It needs a new optimizer; ``save`` and ``load`` keep it in a file.

    Raises:
        ImportError: Torch-Pruning is not installed (``pip install 'gradprune[deploy]'``).
        TypeError: The model is no module, or one whose layers cannot be told (scripted, exported, FSDP), or masks are
            none.
        ValueError: A mask is not the model's, the network raises on the example or cannot be traced, or a channel is
            constant but not zero and a layer that reads it pads with zeros; the message names it.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> masks = gp.prune(model, sparsity=0.5, granularity="channel", include="0.*")
        >>> gp.shrink(model, torch.ones(1, 4), masks)[0]
        Linear(in_features=4, out_features=4, bias=True)

    Fang et al. (2023), for what is coupled; chapter 8.
    """
    require_layers(checks.module(model))
    torch_pruning("gp.shrink")
    for name, parameter in model.named_parameters():
        require_values(name, parameter)
    given = None if masks is None else Masks(masks)
    small = copy.deepcopy(uncompiled_network(model))
    for parameter in small.parameters():
        parameter.grad = None
    if given is not None:
        given.apply_(small)
    remember_dense_(small)
    reference = _outputs(small, example)
    done = _Shrinking(small, example, reference)
    while done.once():  # a layer whose outputs nobody reads any more reads nothing itself
        pass
    done.warn()
    return small


class _Shrinking:
    """A copy of a network that is being cut, and what it has to give."""

    def __init__(self, model: nn.Module, example: Any, reference: list[Any]) -> None:
        self.model, self.example, self.reference = model, example, reference
        self.stay: dict[str, str] = {}  # layer -> why its zero channels stay, as of the last round
        self.refused: dict[frozenset[str], tuple[str, str]] = {}  # groups that do not come out equal: the same of them
        self.tied = _tied(model)

    def once(self) -> bool:
        """Take out whatever can go now; say whether anything did."""
        self.stay = {}
        groups = coupled(self.model, self.example, "gp.shrink")
        open_to = [group for group in groups if self._open(group)]
        looked_at = (part for group in open_to for part in group.parts if reads(part) or writes_in_place(part))
        found = constants(self.model, self.example, dict.fromkeys(looked_at))
        plans = [(group, units) for group in open_to if (units := _removable(group, found))]
        self._explain(open_to, found)
        if not plans:
            return False
        if self._attempt(plans, found):
            return True
        attempts = [self._attempt([plan], found, alone=True) for plan in plans]
        return any(attempts)

    def warn(self) -> None:
        """Say what is zero and stays."""
        for layer, why in {**self.stay, **dict(self.refused.values())}.items():
            checks.warn(f"channels of {layer!r} are zero and stay: {why}")

    def _open(self, group: Coupled) -> bool:
        if _key(group) in self.refused:
            return False
        if not group.stays:
            return any(reads(part) for part in group.parts)
        dead = [unit for unit in group.units if _is_written(unit) and _dead(unit)]
        if dead and group.stays != OUTPUTS:
            self.stay[_first(dead[0])] = group.stays
        return False

    def _explain(self, groups: Iterable[Coupled], found: Constants) -> None:
        """Raise where a channel has no weights and cannot go for the zeros that a filter pads with; remember others."""
        for group in groups:
            for unit in group.units:
                if not _dead(unit) or _goes(unit, found):
                    continue
                for part, cs in unit.items():
                    if writes_in_place(part) and part in found and bool(rows(part, cs).any()):
                        constant, value = (of_all[list(cs)] for of_all in found[part])
                        if bool((constant & (value != 0)).any()):
                            _require_foldable(unit, part, float(value[constant & (value != 0)][0]))
                if all(not bool(rows(part, cs).any()) for part, cs in unit.items() if writes(part)):
                    self.stay.setdefault(
                        _first(unit), "what reads them gets no constant; something between depends on the position"
                    )

    def _attempt(self, plans: Sequence[tuple[Coupled, list[Unit]]], found: Constants, *, alone: bool = False) -> bool:
        """Cut, compare, and put it back where the outputs differ."""
        folds = [_folds(units, found) for _, units in plans]
        undo = Undo(self.model.modules())
        try:
            for fold in folds:  # before any cut: a layer may lose outputs too
                _fold_(fold)
            for group, units in plans:
                _cut_(group, units)
            self._tie_()
            why = _difference(self.reference, _outputs(self.model, self.example))
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            why = f"without them the forward pass fails ({type(error).__name__}: {error!s:.200})"
        except BaseException:
            undo()
            raise
        if not why:
            return True
        undo()
        if alone:
            group, units = plans[0]
            self.refused[_key(group)] = _first(units[0]), why
        return False

    def _tie_(self) -> None:
        """Make one again what was one parameter in several places."""
        for places in self.tied:
            (module, attribute), *others = places
            first = module._parameters[attribute]
            for other, name in others:
                held = other._parameters[name]
                if held is not first:
                    same = held is not None and first is not None and torch.equal(held, first)
                    require(same, f"{name} is shared by layers that would lose different channels of it")
                    other._parameters[name] = first


# -------------------------------------------------------------------------------------------------- what can go


def _dead(unit: Unit) -> bool:
    """Whether one of its filters, at least, has no weights."""
    return any(writes(part) and not bool(rows(part, cs).any(1).all()) for part, cs in unit.items())


def _is_written(unit: Unit) -> bool:
    return any(writes(part) for part in unit)


def writes_in_place(part: Part) -> bool:
    """Whether it is a depthwise convolution."""
    return part.side == "both" and writes(part)


def _removable(group: Coupled, found: Constants) -> list[Unit]:
    """The units that go: constant or unread everywhere, one at least of each layer left, equal numbers in each group of
    a grouped convolution."""
    units = [unit for unit in group.units if _goes(unit, found)]
    left = Counter({part: width(part) for part in group.parts})
    fixed = [part for part in group.parts if groups_of(part) > 1]
    if fixed:
        units = _balanced(group, units, fixed)
    chosen = []
    for unit in units:
        if fixed or all(left[part] > len(cs) for part, cs in unit.items()):
            left.subtract({part: len(cs) for part, cs in unit.items()})
            chosen.append(unit)
    return chosen


def _goes(unit: Unit, found: Constants) -> bool:
    readers = [(part, list(cs)) for part, cs in unit.items() if reads(part)]
    if not readers:
        return False
    unread = [not bool(columns(part, cs).any()) for part, cs in readers]
    constant = [part in found and bool(found[part][0][cs].all()) for part, cs in readers]
    return all(u or c for u, c in zip(unread, constant, strict=True)) and (all(unread) or _dead(unit))


def _balanced(group: Coupled, units: list[Unit], fixed: Sequence[Part]) -> list[Unit]:
    """As many units as leave each group of every grouped convolution with equally many channels, and one at least."""
    every: dict[tuple[int, ...], int] = Counter(place(group, unit) for unit in group.units)
    by_place: dict[tuple[int, ...], list[Unit]] = defaultdict(list)
    for unit in units:
        by_place[place(group, unit)].append(unit)
    most = min((min(len(by_place.get(at, ())), count - 1) for at, count in every.items()), default=0)
    chosen = [unit for at in every for unit in by_place.get(at, ())[:most]]
    for part in fixed:
        counts = Counter(c // (width(part) // groups_of(part)) for unit in chosen for c in unit.get(part, ()))
        if len({counts[g] for g in range(groups_of(part))}) > 1:
            return []
    return chosen


# ------------------------------------------------------------------------------------------------------- constants


def _folds(units: Iterable[Unit], found: Constants) -> dict[Part, Tensor]:
    """What each layer's bias gains when constants that are not zero go; raise where that is not exact."""
    gained: dict[Part, Tensor] = {}
    for unit in units:
        for part, cs in unit.items():
            if not reads(part) or part not in found:
                continue
            weight, value = columns(part, cs), found[part][1][list(cs)].to(rows_dtype(part))
            alive = (value != 0) & weight.flatten(1).any(1)
            if bool(alive.any()):
                _require_foldable(unit, part, float(value[alive][0]))
                product = (weight.sum(2).double() * value.double().unsqueeze(1))[alive].sum(0)
                gained[part] = gained[part] + product if part in gained else product
    return gained


def rows_dtype(part: Part) -> torch.dtype:
    """The dtype of a layer's weight."""
    module: Any = part.module
    return module.weight.dtype  # type: ignore[no-any-return]


def _require_foldable(unit: Unit, part: Part, value: float) -> None:
    module: Any = part.module
    if isinstance(module, _ConvTransposeNd):
        exact, how = all(k == 1 for k in module.kernel_size), "is transposed, so that its edges get less of it"
    elif isinstance(module, _ConvNd):
        padded = module.padding not in ("valid", (0,) * len(module.kernel_size)) and module.padding_mode == "zeros"
        padded = padded and not (module.padding == "same" and all(k == 1 for k in module.kernel_size))
        exact, how = not padded, "pads its input with zeros, so that its edges get less of it"
    else:
        return
    dead = ((p, cs) for p, cs in unit.items() if writes(p) and not bool(rows(p, cs).any()))
    first, channels = next(dead, (part, unit[part]))
    require(
        exact,
        f"channel {channels[0]} of {first.name!r} has no weights and still comes out as {value:.4g}, by its bias or "
        f"its norm's shift, and {part.name!r} ({type(module).__name__}) {how}: it cannot be folded into that "
        "layer's bias. Set the bias, and the norm's scale and shift, of such channels to zero too, as "
        "gp.prune(..., granularity='group', example=...) does",
    )


def _fold_(gained: Mapping[Part, Tensor]) -> None:
    for part, product in gained.items():
        module: Any = part.module
        weight = module.weight
        if module.bias is None:
            module._parameters["bias"] = nn.Parameter(product.to(weight.dtype), requires_grad=weight.requires_grad)
        else:
            replace_(module, "bias", (module.bias.detach().double() + product).to(weight.dtype))


# ------------------------------------------------------------------------------------------------------- the cut


def _cut_(group: Coupled, units: Collection[Unit]) -> None:
    gone: dict[Part, set[int]] = defaultdict(set)
    for unit in units:
        for part, cs in unit.items():
            gone[part] |= set(cs)
    for part, channels in gone.items():
        cut_(part, channels)
    if group.owner is not None:
        for attribute, of_one in group.sizes.items():
            setattr(group.owner, attribute, getattr(group.owner, attribute) - len(units) * of_one)


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                places[id(p)].append((module, attribute))
    return [found for found in places.values() if len(found) > 1]


def _key(group: Coupled) -> frozenset[str]:
    return frozenset(f"{part.name} {part.side}" for part in group.parts)


def _first(unit: Unit) -> str:
    return next((part.name for part in unit if writes(part)), next(iter(unit)).name)


# ------------------------------------------------------------------------------------------------------ comparing


def _outputs(model: nn.Module, example: Any) -> list[list[Tensor]]:
    with evaluated(model), as_written(), torch.no_grad():
        found = []
        for i, inputs in enumerate(inputs_like(example)):
            try:
                found.append([t.detach().clone() for t in tensors_in(call_on(model, inputs))])
            except Exception:
                if i == 0:  # the example itself; noise may be what the model does not take
                    raise
                found.append([])
    require(bool(found[0]), f"{type(model).__name__} returns no tensor for the example")
    return found


def _difference(reference: list[list[Tensor]], outputs: list[list[Tensor]]) -> str:
    """What differs between two networks' outputs, or nothing."""
    for before, after in zip(reference, outputs, strict=True):
        if len(before) != len(after):
            return f"without them {len(after)} tensors come out, not {len(before)}"
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            if a.shape != b.shape:
                return f"without them output {i} has shape {tuple(b.shape)}, not {tuple(a.shape)}"
            if not a.is_floating_point():
                if not torch.equal(a, b):
                    return f"without them output {i} differs"
                continue
            finite = a.isfinite()
            if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
                return f"without them output {i} differs where it is not finite"
            apart = (a[finite].double() - b[finite].double()).abs()
            size = a[finite].double().abs()
            if apart.numel() and not bool(apart.max() <= TOLERANCE.get(a.dtype, 1e-4) * size.max()):
                most, largest = float(apart.max()), float(size.max())
                return f"without them output {i} differs by {most:.2g}, and is at most {largest:.2g}"
    return ""

"""Choose the weights that matter least and set them to zero, once or on a schedule (chapters 4 and 5)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprune import allocate
from gradprune.mask import Hold, Masks, count_kept
from gradprune.score import magnitude
from gradprune.select import By, keep_largest, keep_n_of_m

Score = Callable[[nn.Module], Mapping[str, Tensor]]
Scope = Literal["global", "layer", "erk", "lamp"] | Mapping[str, float]
Granularity = Literal["weight", "channel"] | str | tuple[int, ...]
Patterns = str | Sequence[str] | None


def prune(
    model: nn.Module,
    score: Score = magnitude,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    scope: Scope = "global",
    granularity: Granularity = "weight",
    include: Patterns = None,
    exclude: Patterns = None,
    min_keep: int | None = None,
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Set the lowest-scoring weights of `model` to zero and return the masks that say which.

    Exactly one of `sparsity`, the fraction of the eligible weights that goes, and `threshold` (what scores less goes)
    is given. Of N eligible weights exactly ``round(sparsity * N)`` become zero; among equal scores the later position
    stays.

    `score` is a function from the model to one tensor a parameter (``gradprune.score``).

    `scope` says how the layers share: ``"global"`` ranks all weights together, ``"layer"`` takes the same fraction of
    each, ``"erk"`` and ``"lamp"`` are those of ``gradprune.allocate``, and a dict gives sparsities by parameter
    name, in which case `sparsity` is for the layers it does not name (without it they stay dense).

    `granularity` says what goes together: single weights; ``"channel"``, all weights of an output unit or filter;
    ``(n, m)`` with n < m or ``"n:m"``, n of every m consecutive weights along the input dimension stay, and neither
    sparsity nor threshold is given; any other tuple, or a string such as ``"4x4"``, is the shape of a block over the
    first dimensions, with the further ones whole. A channel or block is ranked by the mean of its scores (for
    magnitudes its L1 norm over its size), and as many go as come nearest to the wanted number of weights. A dimension
    that the block, or m, does not divide is an error.

    Eligible are floating, trainable parameters of two dimensions or more, neither an embedding's nor a
    normalisation's; a tied tensor counts once. `include` and `exclude`, glob patterns over parameter names, narrow
    that down.

    A sparsity empties no layer: each keeps at least `min_keep` weights, 1 unless given; 0 lets layers be emptied, as
    do a threshold, a sparsity by name, and a sparsity that leaves fewer weights than there are layers (with a
    warning). `within`, earlier masks, says which weights may stay at all.

    Raises ValueError, before anything is changed, where an argument is out of range, a pattern matches nothing,
    nothing is eligible, or a score is missing, of another shape, or NaN. Chapter 4.
    """
    layers, choose = _prepare(
        model, sparsity, threshold, scope, granularity, include, exclude, min_keep=min_keep, within=within
    )
    keep = choose(_rank(score, model, layers))
    if within is not None:
        keep = {name: mask & within[name].to(mask.device) for name, mask in keep.items()}
    return Masks({name: mask.to(layers[name].device) for name, mask in keep.items()}).apply_(model)


@dataclass(frozen=True)
class Regrow:
    """Let pruned weights come back: every `every` steps each layer swaps a fraction of its weights.

    Of the k weights that a layer keeps, the ``int(fraction * k)`` with the lowest score go, and as many come back, at
    zero, from among those pruned before: the ones that score highest by `by`. ``by=gp.gradient`` grows where the
    gradient is large, which is RigL; ``by=gp.random`` grows anywhere, which is SET. `fraction` is a number in [0, 1] or
    a function of the step, such as a decay to 0.
    Raises ValueError where `every` is not positive or a number given as `fraction` is not in [0, 1].
    Evci et al. (2020), section 3; Mocanu et al. (2018), algorithm 1; chapter 5.
    """

    by: Score
    fraction: float | Callable[[int], float] = 0.3
    every: int = 100

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"every must be at least 1, got {self.every}")
        if not callable(self.fraction):
            _require(0.0 <= self.fraction <= 1.0, f"fraction must be in [0, 1], got {self.fraction}")

    def share(self, step: int) -> float:
        """The fraction to swap after `step` steps; 0 between the events."""
        if step % self.every:
            return 0.0
        return self.fraction(step) if callable(self.fraction) else self.fraction


class Event(NamedTuple):
    """What one pruning event changed: how many weights of each parameter went, and how many came back."""

    step: int
    amount: float
    removed: dict[str, int]
    regrown: dict[str, int]


class Pruner:
    """Prune `model` while `optimizer` trains it, by a schedule; it rides on the optimizer's own step hook.

    `schedule` is a function from the number of steps taken to the wanted amount (``gradprune.schedule``, or any
    callable); where its value changes, ``prune`` is called with that amount and the new masks are held. Step 0 is
    the construction. `amount` says what the schedule gives: ``"sparsity"`` or ``"threshold"``. Pruned weights stay
    pruned unless `regrow` is given. A step that an AMP scaler skips is no step. The further arguments are those of
    ``prune``: scope, granularity, include, exclude, min_keep.

    ``masks`` are the masks now, ``step`` the steps taken, ``events`` the list of what each event removed where.
    With ``state_dict`` and ``load_state_dict``, beside the model's and the optimizer's own, a run resumed from a
    checkpoint goes on with the same masks and weights, bit for bit.

    Raises ValueError, before anything is changed, as ``prune`` does. A schedule that falls is a ValueError at the
    step where it does. Zhu and Gupta (2017); chapter 5.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: Callable[[int], float],
        score: Score = magnitude,
        *,
        amount: Literal["sparsity", "threshold"] = "sparsity",
        regrow: Regrow | None = None,
        scope: Scope = "global",
        granularity: Granularity = "weight",
        include: Patterns = None,
        exclude: Patterns = None,
        min_keep: int | None = None,
    ) -> None:
        _require(amount in ("sparsity", "threshold"), f'amount must be "sparsity" or "threshold", got {amount!r}')
        _require(
            regrow is None or granularity == "weight",
            f"regrow needs granularity 'weight', got {granularity!r}",
        )
        _require(not isinstance(scope, Mapping), "a schedule and a scope with sparsities by name exclude each other")
        self.model, self.schedule, self.score, self.regrow = model, schedule, score, regrow
        self._kind, self._optimizer = amount, optimizer
        self._as_prune: dict[str, Any] = {
            "scope": scope,
            "granularity": granularity,
            "include": include,
            "exclude": exclude,
            "min_keep": min_keep,
        }
        first = schedule(0)
        layers, _ = _prepare(model, **self._amount(first), **self._as_prune)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        _require(any(id(p) in owned for p in layers.values()), f"the optimizer owns none of {list(layers)}")
        self.step, self.amount = 0, 0.0
        self.events: list[Event] = []
        self.masks = Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in layers.items()})
        self._growth: Mapping[str, Tensor] | None = None
        # In this order: growth is scored on the gradients as they are, before the hold masks them, and an event comes
        # after the hold's look at the weights.
        before = optimizer.register_step_pre_hook(self._before_step)
        self._hold: Hold = self.masks.apply_(model).hold(optimizer)
        self._hooks = [before, optimizer.register_step_post_hook(self._after_step)]
        if first:
            try:
                self._prune_to(first)
            except BaseException:
                self.remove()
                raise

    def remove(self) -> None:
        """Stop pruning and holding; masks, events and weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hold.remove()

    def state_dict(self) -> dict[str, Any]:
        """Step, amount, events and bit-packed masks: what ``load_state_dict`` needs to go on from here."""
        return {
            "step": self.step,
            "amount": self.amount,
            "masks": self.masks.state_dict(),
            "events": [event._asdict() for event in self.events],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken: its masks are applied to the model and held.

        Raises ValueError, before anything is changed, where the masks are not for this pruner's parameters.
        """
        masks = Masks.from_state_dict(state["masks"])
        if {n: m.shape for n, m in masks.items()} != {n: m.shape for n, m in self.masks.items()}:
            raise ValueError(f"the state has masks for {list(masks)}, this pruner prunes {list(self.masks)}")
        masks = Masks({name: mask.to(self.masks[name].device) for name, mask in masks.items()})
        self.step, self.amount = state["step"], state["amount"]
        self.events = [Event(**event) for event in state["events"]]
        self._hold_from_now(masks)

    def _amount(self, value: float) -> dict[str, Any]:
        """As an argument of prune. N:M is a sparsity by itself, reached at whatever step the schedule leaves 0."""
        n_of_m, _ = _parse_granularity(self._as_prune["granularity"])
        return {} if n_of_m is not None and value == 0 else {self._kind: value}

    def _before_step(self, *_: Any) -> None:
        if self.regrow is not None and self.regrow.share(self.step + 1) > 0 and self.masks.sparsity > 0:
            self._growth = self.regrow.by(self.model)  # now, as the hold is about to mask the gradients

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        wanted = self.schedule(self.step)
        if wanted != self.amount:
            self._prune_to(wanted)
        if self._growth is not None and self.regrow is not None:
            growth, self._growth = self._growth, None
            self._swap(growth, self.regrow.share(self.step))

    def _prune_to(self, amount: float) -> None:
        if amount < self.amount and self._kind == "sparsity":
            raise ValueError(
                f"the schedule falls from {self.amount} to {amount} at step {self.step}; pruned weights come back only "
                "by regrow"
            )
        within = self.masks if self.masks.sparsity else None
        masks = prune(self.model, self.score, **self._amount(amount), **self._as_prune, within=within)
        self.amount = amount
        self._log(masks)
        self._hold_from_now(masks)

    def _swap(self, growth: Mapping[str, Tensor], share: float) -> None:
        layers = {name: self.model.get_parameter(name) for name in self.masks}
        ranked = _rank(self.score, self.model, layers)
        masks = {}
        for name, active in self.masks.items():
            count = min(int(share * count_kept(active)), active.numel() - count_kept(active))
            stay = keep_largest({name: ranked.values[name]}, count_kept(active) - count, by=ranked.by, among=[active])[
                0
            ]
            masks[name] = stay | keep_largest({name: growth[name].detach()}, count, among=[~active])[0]
        self._log(Masks(masks))
        self._hold_from_now(Masks(masks))

    def _log(self, masks: Masks) -> None:
        removed = {name: count_kept(self.masks[name] & ~mask) for name, mask in masks.items()}
        regrown = {name: count_kept(mask & ~self.masks[name]) for name, mask in masks.items()}
        self.events.append(Event(self.step, self.amount, removed, regrown))

    def _hold_from_now(self, masks: Masks) -> None:
        self.masks = masks.apply_(self.model)
        self._hold = masks.hold(self._optimizer)  # replaces the one before


class _Ranked(NamedTuple):
    """One tensor of scores a layer; weights themselves, ranked by magnitude, are spared a copy."""

    values: dict[str, Tensor]
    by: By = "value"

    def scores(self) -> dict[str, Tensor]:
        return {name: v.abs() if self.by == "magnitude" else v for name, v in self.values.items()}


Choose = Callable[[_Ranked], dict[str, Tensor]]


def _rank(score: Score, model: nn.Module, layers: Mapping[str, nn.Parameter]) -> _Ranked:
    if score is magnitude:
        return _Ranked({name: p.detach() for name, p in layers.items()}, "magnitude")
    scores = score(model)
    for name, p in layers.items():
        if name not in scores:
            raise ValueError(f"the score has no value for {name!r}; give it one, or exclude the parameter")
        if scores[name].shape != p.shape:
            raise ValueError(f"the score of {name!r} has shape {tuple(scores[name].shape)}, wanted {tuple(p.shape)}")
    return _Ranked({name: scores[name].detach() for name in layers})


# ------------------------------------------------------------------------------------------------------------ units


class _Units(NamedTuple):
    """What goes or stays together: single weights, or the tiles of a block shape (a channel is the tile (1,))."""

    layers: Mapping[str, nn.Parameter]
    block: tuple[int, ...] | None
    within: Mapping[str, Tensor] | None

    def cost(self, name: str) -> int:
        """Weights in one unit."""
        if self.block is None:
            return 1
        return math.prod(self.block) * math.prod(self.layers[name].shape[len(self.block) :])

    def number(self, name: str) -> int:
        return self.layers[name].numel() // self.cost(name)

    def allowed(self, name: str) -> Tensor | None:
        """Which units may stay; None where all may."""
        if self.within is None:
            return None
        return self.within[name] if self.block is None else _over_tiles(self.within[name], self.block).any(dim=-1)

    def available(self, name: str) -> int:
        allowed = self.allowed(name)
        return self.number(name) if allowed is None else count_kept(allowed)

    def rank(self, ranked: _Ranked) -> _Ranked:
        """The units' own scores: the mean over their weights'."""
        if self.block is None:
            return ranked
        means = {}
        for name, values in ranked.values.items():
            tiles = _over_tiles(values, self.block)
            tiles = tiles.abs() if ranked.by == "magnitude" else tiles
            means[name] = tiles.mean(dim=-1, dtype=torch.promote_types(tiles.dtype, torch.float32))
        return _Ranked(means)

    def expand(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks over units as masks over weights."""
        if self.block is None:
            return dict(masks)
        return {name: _repeat_tiles(mask, self.block, self.layers[name].shape) for name, mask in masks.items()}


def _over_tiles(values: Tensor, block: tuple[int, ...]) -> Tensor:
    """One row for each tile, its entries along the last dimension."""
    split = [n for size, b in zip(values.shape, block, strict=False) for n in (size // b, b)]
    tiled = values.reshape(*split, -1)
    outer, inner = range(0, 2 * len(block), 2), range(1, 2 * len(block) + 1, 2)
    return tiled.permute(*outer, *inner, tiled.dim() - 1).flatten(len(block))


def _repeat_tiles(mask: Tensor, block: tuple[int, ...], shape: torch.Size) -> Tensor:
    for dim, b in enumerate(block):
        mask = mask.repeat_interleave(b, dim)
    rest = (1,) * (len(shape) - len(block))
    return mask.view(*mask.shape, *rest).expand(shape).contiguous()


# ------------------------------------------------------------------------------------------- from amounts to masks


def _prepare(
    model: nn.Module,
    sparsity: float | None = None,
    threshold: float | None = None,
    scope: Scope = "global",
    granularity: Granularity = "weight",
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    min_keep: int | None = None,
    within: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, nn.Parameter], Choose]:
    """The eligible parameters and the way from their scores to masks, with every argument checked."""
    layers = _eligible(model, include, exclude)
    n_of_m, block = _parse_granularity(granularity)
    _check_amount(sparsity, threshold, scope, n_of_m)
    _check_scope(scope, layers)
    _check_within(within, layers)
    _check_divides(layers, n_of_m, block)
    whole = min_keep is None or (isinstance(min_keep, int) and min_keep >= 0)
    _require(whole, f"min_keep must be a whole number from 0, got {min_keep!r}")
    return layers, _plan(_Units(layers, block, within), sparsity, threshold, scope, n_of_m, min_keep)


def _plan(
    units: _Units,
    sparsity: float | None,
    threshold: float | None,
    scope: Scope,
    n_of_m: tuple[int, int] | None,
    min_keep: int | None,
) -> Choose:
    """How to get from scores to masks. Whatever can be refused without the scores is refused here, before them."""
    if n_of_m is not None:
        return partial(_keep_n_of_m, *n_of_m)
    if threshold is not None:
        return partial(_keep_at_least, units, threshold, _floors(units, min_keep or 0))
    if isinstance(scope, Mapping):
        counts = {name: _stay(p.numel(), scope.get(name, sparsity or 0.0)) for name, p in units.layers.items()}
        return partial(_keep_per_layer, units, _whole_units(units, counts))
    assert sparsity is not None
    budget = _stay(sum(p.numel() for p in units.layers.values()), sparsity)
    floors = _affordable_floors(units, budget, min_keep)
    if scope in ("layer", "erk"):
        return partial(_keep_per_layer, units, _whole_units(units, _allocate(units, scope, budget, floors)))
    most = sum(units.available(name) * units.cost(name) for name in units.layers)
    _require(budget <= most, f"sparsity {sparsity} lets {budget} weights stay, but `within` allows only {most}")
    return partial(_keep_over_all, units, budget, floors, allocate.lamp if scope == "lamp" else None)


def _stay(weights: int, sparsity: float) -> int:
    return weights - round(sparsity * weights)


def _floors(units: _Units, min_keep: int) -> dict[str, int]:
    """The least number of units of each layer."""
    return {name: min(-(-min_keep // units.cost(name)), units.available(name)) for name in units.layers}


def _affordable_floors(units: _Units, budget: int, min_keep: int | None) -> dict[str, int]:
    floors = _floors(units, 1 if min_keep is None else min_keep)
    needed = sum(floor * units.cost(name) for name, floor in floors.items())
    if needed <= budget:
        return floors
    if min_keep is not None:
        raise ValueError(f"min_keep={min_keep} needs {needed} weights over all layers, the sparsity leaves {budget}")
    if budget > 0:
        warnings.warn(
            f"the sparsity leaves {budget} weights for {len(floors)} layers: some layers become empty",
            stacklevel=5,
        )
    return dict.fromkeys(floors, 0)


def _allocate(units: _Units, scope: Scope, budget: int, floors: Mapping[str, int]) -> dict[str, int]:
    names = list(units.layers)
    low = [floors[name] * units.cost(name) for name in names]
    high = [units.available(name) * units.cost(name) for name in names]
    shapes = [units.layers[name].shape for name in names]
    if scope == "erk":
        counts = allocate.erk(shapes, budget, low=low, high=high)
    else:
        counts = allocate.uniform([math.prod(s) for s in shapes], budget, low=low, high=high)
    return dict(zip(names, counts, strict=True))


def _whole_units(units: _Units, weights: Mapping[str, int]) -> dict[str, int]:
    counts = {name: round(count / units.cost(name)) for name, count in weights.items()}
    for name, count in counts.items():
        available = units.available(name)
        _require(count <= available, f"{name!r} is to keep {count} units, but `within` allows only {available}")
    return counts


def _keep_n_of_m(n: int, m: int, ranked: _Ranked) -> dict[str, Tensor]:
    return {name: keep_n_of_m(v, n, m, by=ranked.by, name=repr(name)) for name, v in ranked.values.items()}


def _keep_at_least(units: _Units, threshold: float, floors: Mapping[str, int], ranked: _Ranked) -> dict[str, Tensor]:
    ranked = units.rank(ranked)
    masks = {}
    for name, values in ranked.values.items():
        _require(not bool(values.isnan().any()), f"the score of {name!r} contains NaN")
        keep = values >= threshold
        if ranked.by == "magnitude":
            keep = keep.logical_or_(values <= -threshold) if threshold > 0 else torch.ones_like(keep)
        if count_kept(keep) < floors[name]:
            keep = _largest(units, ranked, {name: floors[name]})[name]
        masks[name] = keep
    return units.expand(masks)


def _keep_per_layer(units: _Units, counts: Mapping[str, int], ranked: _Ranked) -> dict[str, Tensor]:
    return units.expand(_largest(units, units.rank(ranked), counts))


def _keep_over_all(
    units: _Units,
    budget: int,
    floors: Mapping[str, int],
    transform: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None,
    ranked: _Ranked,
) -> dict[str, Tensor]:
    """All layers ranked together; one that would fall below its floor gets it, and the others share what is left."""
    ranked = units.rank(ranked)
    if transform is not None:
        ranked = _Ranked(transform(ranked.scores()))
    at_floor: dict[str, int] = {}
    while True:
        left = budget - sum(count * units.cost(name) for name, count in at_floor.items())
        free = [name for name in units.layers if name not in at_floor]
        values = {name: ranked.values[name] for name in free}
        among = None if units.within is None else [_known(units.allowed(name)) for name in free]
        count = _units_nearest(units, values, among, left)
        masks = dict(zip(free, keep_largest(values, count, by=ranked.by, among=among), strict=True))
        short = {name: floors[name] for name, mask in masks.items() if count_kept(mask) < floors[name]}
        if not short:
            masks |= _largest(units, ranked, at_floor)
            return units.expand({name: masks[name] for name in units.layers})
        at_floor |= short


def _largest(units: _Units, ranked: _Ranked, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """The given number of units of each layer by itself."""
    masks = {}
    for name, count in counts.items():
        allowed = units.allowed(name)
        among = None if allowed is None else [allowed]
        masks[name] = keep_largest({name: ranked.values[name]}, count, by=ranked.by, among=among)[0]
    return masks


def _units_nearest(units: _Units, values: Mapping[str, Tensor], among: Sequence[Tensor] | None, weights: int) -> int:
    """How many of the highest units hold the number of weights nearest to `weights`; the fewer among equals."""
    if units.block is None:
        return weights
    flat = torch.cat([v.reshape(-1).cpu() for v in values.values()])
    costs = torch.cat([torch.full((v.numel(),), units.cost(name)) for name, v in values.items()])
    if among is not None:
        allowed = torch.cat([a.reshape(-1).cpu() for a in among])
        flat, costs = flat[allowed], costs[allowed]
    held = costs[flat.sort(stable=True).indices.flip(0)].cumsum(0)
    distances = (torch.cat([torch.zeros(1, dtype=held.dtype), held]) - weights).abs()
    return int(distances.argmin())


def _known(allowed: Tensor | None) -> Tensor:
    assert allowed is not None
    return allowed


# ----------------------------------------------------------------------------------------------------------- checks

_NEVER = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def _eligible(model: nn.Module, include: Patterns, exclude: Patterns) -> dict[str, nn.Parameter]:
    never = {id(p) for m in model.modules() if isinstance(m, _NEVER) for p in m.parameters(recurse=False)}
    every = dict(model.named_parameters())
    layers = {
        name: p
        for name, p in every.items()
        if p.is_floating_point() and p.requires_grad and p.dim() >= 2 and id(p) not in never
    }
    if not layers:
        raise ValueError(
            f"the model has nothing to prune: none of its {len(every)} parameters is floating, trainable, of two "
            "dimensions or more, and neither an embedding's nor a normalisation's"
        )
    included = _matching("include", include, layers, every) if include is not None else set(layers)
    excluded = _matching("exclude", exclude, every, every) if exclude is not None else set()
    chosen = {name: p for name, p in layers.items() if name in included and name not in excluded}
    _require(bool(chosen), f"include={include!r} and exclude={exclude!r} leave nothing of {list(layers)}")
    return chosen


def _matching(argument: str, patterns: Patterns, names: Iterable[str], every: Iterable[str]) -> set[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            ineligible = [name for name in every if fnmatchcase(name, pattern)]
            reason = f"only {ineligible}, not eligible" if ineligible else f"none of {list(every)}"
            raise ValueError(f"{argument} pattern {pattern!r} matches {reason}")
        found |= matched
    return found


def _parse_granularity(granularity: Granularity) -> tuple[tuple[int, int] | None, tuple[int, ...] | None]:
    """What it means: n of m, or a block; neither for single weights."""
    if granularity == "weight":
        return None, None
    if granularity == "channel":
        return None, (1,)
    numbers: tuple[Any, ...] = ()
    n_of_m = False
    if isinstance(granularity, str):
        n_of_m = ":" in granularity
        numbers = tuple(int(x) if x.isdecimal() else x for x in granularity.split(":" if n_of_m else "x"))
    elif isinstance(granularity, tuple):
        numbers = granularity
        n_of_m = len(numbers) == 2 and all(isinstance(x, int) for x in numbers) and 0 < numbers[0] < numbers[1]
    whole = bool(numbers) and all(isinstance(x, int) and x > 0 for x in numbers)
    if not whole or (n_of_m and (len(numbers) != 2 or numbers[0] > numbers[1])):
        raise ValueError(
            'granularity must be "weight", "channel", (n, m) or "n:m" with n <= m, or a block shape such as (16, 16) '
            f'or "1x4"; got {granularity!r}'
        )
    return ((numbers[0], numbers[1]), None) if n_of_m else (None, numbers)


def _check_amount(
    sparsity: float | None, threshold: float | None, scope: Scope, n_of_m: tuple[int, int] | None
) -> None:
    if sparsity is not None:
        _require(0.0 <= sparsity <= 1.0, f"sparsity must be in [0, 1], got {sparsity}")
    if threshold is not None:
        _require(not math.isnan(threshold), "threshold must be a number, got NaN")
    if n_of_m is not None:
        n, m = n_of_m
        given = threshold is not None or (sparsity is not None and not math.isclose(sparsity, 1 - n / m))
        _require(
            not given, f"granularity {n}:{m} is itself a sparsity of {1 - n / m:g}: give no other, nor a threshold"
        )
        _require(scope in ("global", "layer"), f"granularity {n}:{m} leaves nothing to allocate; got scope={scope!r}")
    elif isinstance(scope, Mapping):
        _require(threshold is None, "a scope that gives sparsities by name does not go with a threshold")
    elif (sparsity is None) == (threshold is None):
        both = "neither" if sparsity is None else "both"
        raise ValueError(f"give exactly one of sparsity and threshold; got {both}")
    elif threshold is not None:
        _require(
            scope in ("global", "layer"), f"scope={scope!r} shares out a sparsity; it does not go with a threshold"
        )


def _check_scope(scope: Scope, layers: Mapping[str, nn.Parameter]) -> None:
    if not isinstance(scope, Mapping):
        known = ("global", "layer", "erk", "lamp")
        _require(scope in known, f"scope must be one of {known} or a dict of sparsities by name, got {scope!r}")
        return
    for name, sparsity in scope.items():
        _require(name in layers, f"scope names {name!r}, which is not eligible; eligible are {list(layers)}")
        _require(0.0 <= sparsity <= 1.0, f"the sparsity of {name!r} must be in [0, 1], got {sparsity}")


def _check_within(within: Mapping[str, Tensor] | None, layers: Mapping[str, nn.Parameter]) -> None:
    if within is None:
        return
    for name, p in layers.items():
        _require(
            name in within, f"`within` has no mask for {name!r}; exclude the parameter, or give a mask of all True"
        )
        shape = tuple(within[name].shape)
        _require(shape == tuple(p.shape), f"`within` has shape {shape} for {name!r}, the parameter {tuple(p.shape)}")


def _check_divides(
    layers: Mapping[str, nn.Parameter], n_of_m: tuple[int, int] | None, block: tuple[int, ...] | None
) -> None:
    sizes = (1, n_of_m[1]) if n_of_m is not None else block or ()
    for name, p in layers.items():
        _require(
            len(sizes) <= p.dim(), f"a block of shape {sizes} does not fit {name!r}, which has shape {tuple(p.shape)}"
        )
        for dim, (size, b) in enumerate(zip(p.shape, sizes, strict=False)):
            _require(
                size % b == 0,
                f"{name!r} has {size} entries along dimension {dim}, not a multiple of {b}; exclude it, or choose a "
                f"granularity that divides its shape {tuple(p.shape)}",
            )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)

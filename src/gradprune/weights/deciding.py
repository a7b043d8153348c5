"""Who decides what a Pruner prunes: one process, replicas that agree, or ranks with a part each (chapters 5 and 9)?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from gradprune.core.agree import meet
from gradprune.core.checks import is_distributed
from gradprune.core.masked import count_kept
from gradprune.core.ranks import Ranks, ranks_of
from gradprune.core.replicas import alike, by_hash, replicas_of
from gradprune.core.sharded import is_sharded, local, reshard_, together
from gradprune.weights.granularity import ONE_PROCESS, Pick, Ranked
from gradprune.weights.mask import Masks
from gradprune.weights.mask_sharded import ShardedMasks
from gradprune.weights.pick_sharded import pick_over
from gradprune.weights.replicated import decided, over_ranks
from gradprune.weights.request import Request, Score, ranked_by
from gradprune.weights.request_groups import requested
from gradprune.weights.sharded import (
    Held,
    masks_over_ranks,
    ranked_over_ranks,
    request_over_ranks,
    require_no_example,
    sharded_masks,
)
from gradprune.weights.start import found_before, stated_before

T = TypeVar("T")
Layers = Mapping[str, nn.Parameter]
_EVENT = "an event of gp.Pruner"


class Now(NamedTuple):
    """What an event decides on: the checked arguments, the model, by which score, the masks until now, and the step."""

    request: Request
    model: nn.Module
    score: Score
    masks: Masks
    step: int


class OneProcess:
    """Decides by itself, of a model of its own."""

    ranks: Ranks | None = None  # that hold copies of the model
    every: Ranks | None = None  # that decide together

    def request(self, model: nn.Module, example: Any, **asked: Any) -> Request:
        """The checked arguments of ``prune``."""
        return requested(model, example, **asked)

    def alike(self, called: str, asked: Callable[[], Mapping[str, object]], work: Callable[[], T]) -> T:
        """Do what each rank does by itself; all raise what is wrong on one, and where they ask for different things."""
        return alike(called, self.every, asked, work)

    def look_around(self, model: nn.Module) -> None:
        """Called before the model's parameters are looked at by name."""

    def before(self, request: Request, within: Mapping[str, Tensor] | None) -> Masks:
        """What may stay when a pruner begins."""
        weights = {name: weight.parameter for name, weight in request.layers.items()}
        found = found_before(weights) if within is None else stated_before(request.parameters, within)
        return Masks(request.with_beside(found))

    def choose(self, now: Now, amounts: Mapping[str, Any]) -> Masks:
        """The masks for an amount, of what stays now."""
        before = now.masks

        def chosen(score: Score) -> Masks:
            masks = now.request.masks(now.model, score, within=before if before.sparsity else None, **amounts)
            return Masks({**before, **{name: mask & before[name] for name, mask in masks.items()}})

        return self._decided(chosen, now)

    def growth(self, by: Score, model: nn.Module, layers: Layers) -> dict[str, Tensor]:
        """The score of what may come back."""
        return ranked_by(by, model, layers).scores()

    def swap(self, now: Now, growth: Mapping[str, Tensor], share: float) -> Masks:
        """The masks once a share of each layer's weights has gone and as many have come."""

        def swapped(score: Score) -> Masks:
            ranked = ranked_by(score, now.model, now.request.parameters)
            masks = _swapped(now, ranked, growth, share, ONE_PROCESS)
            return Masks(now.request.with_directions(masks, ranked, None, in_place_of_others=True))

        return self._decided(swapped, now)

    def changes(self, before: Masks, after: Masks) -> tuple[dict[str, int], dict[str, int]]:
        """How many weights of each parameter went, and how many came back."""
        removed = {name: count_kept(before[name] & ~mask) for name, mask in after.items()}
        regrown = {name: count_kept(mask & ~before[name]) for name, mask in after.items()}
        return removed, regrown

    def restored(self, state: Mapping[str, Any], layers: Layers) -> Masks:
        """The masks of a state."""
        masks = Masks.from_state_dict(state)
        return Masks({name: mask.to(layers[name].device) if name in layers else mask for name, mask in masks.items()})

    def _decided(self, choose: Callable[[Score], Masks], now: Now) -> Masks:
        return choose(now.score)


class Replicas(OneProcess):
    """Ranks that have a copy of the model each (DistributedDataParallel) get the same masks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = self.every = ranks

    def growth(self, by: Score, model: nn.Module, layers: Layers) -> dict[str, Tensor]:
        """The same on all ranks."""
        assert self.ranks is not None
        meet(_EVENT, self.ranks.group)
        return super().growth(over_ranks(by, self.ranks, _EVENT), model, layers)

    def _decided(self, choose: Callable[[Score], Masks], now: Now) -> Masks:
        assert self.ranks is not None
        return decided(_EVENT, self.ranks, now.score, choose, lambda: {"step": now.step, **by_hash(now.masks)})


class Shards(OneProcess):
    """Ranks that have a part each of the parameters (DTensors) choose together what one process would."""

    def __init__(self, every: Ranks) -> None:
        self.every: Ranks = every
        self._held = Held({}, every)

    def request(self, model: nn.Module, example: Any, **asked: Any) -> Request:
        """The checked arguments of ``prune``."""
        require_no_example(example)
        reshard_(model)
        return request_over_ranks(model, **asked)

    def look_around(self, model: nn.Module) -> None:
        """Let the model have its own parameters again, which a forward pass may have left gathered."""
        reshard_(model)

    def before(self, request: Request, within: Mapping[str, Tensor] | None) -> Masks:
        """What may stay when a pruner begins."""
        layers = request.parameters

        def each() -> tuple[dict[str, Tensor] | None, dict[str, object], Layers]:
            stated = None if within is None else stated_before(layers, within)
            return stated, {"within": within is not None}, layers

        blocks, shards = together(each)
        self._held = Held(shards, self.every)
        if blocks is None:
            blocks = found_before(layers, pick_over(shards, self.every).stay, self.every.on_any)
        return sharded_masks(layers, blocks, self._held)

    def choose(self, now: Now, amounts: Mapping[str, Any]) -> Masks:
        """The masks for an amount, of what stays now, by all ranks together."""
        self._meet(now.model, now.request.parameters, {"step": now.step, **amounts})
        within = now.masks if now.masks.sparsity else None
        return masks_over_ranks(now.request, now.model, now.score, self._held, _EVENT, within=within, **amounts)

    def growth(self, by: Score, model: nn.Module, layers: Layers) -> dict[str, Tensor]:
        """What this rank holds of it."""
        meet(_EVENT)
        reshard_(model)
        return ranked_over_ranks(by, model, layers, _EVENT, "growth score").scores()

    def swap(self, now: Now, growth: Mapping[str, Tensor], share: float) -> Masks:
        """The masks once a share of each layer's weights has gone and as many have come."""
        layers = now.request.parameters
        self._meet(now.model, layers, {"step": now.step, "the share that is swapped": share})
        ranked = ranked_over_ranks(now.score, now.model, layers, _EVENT)
        pick = pick_over(self._held.shards, self.every)
        return sharded_masks(layers, _swapped(now, ranked, growth, share, pick), self._held)

    def changes(self, before: Masks, after: Masks) -> tuple[dict[str, int], dict[str, int]]:
        """How many weights of each whole parameter went, and how many came back."""
        common = {name: local(before[name]) & local(mask) for name, mask in after.items()}
        both, old, new = pick_over(self._held.shards, self.every).stay(common), before._counts(), after._counts()
        return {name: old[name] - both[name] for name in both}, {name: new[name] - both[name] for name in both}

    def restored(self, state: Mapping[str, Any], layers: Layers) -> Masks:
        """The masks of a state, of one process too, of which each rank takes its blocks."""
        if any(isinstance(value, Tensor) and is_distributed(value) for value in state.values()):
            return ShardedMasks._read(state)
        masks = Masks.from_state_dict(state)
        if (of := {name: mask.shape for name, mask in masks.items()}) != {n: p.shape for n, p in layers.items()}:
            raise ValueError(f"the state has masks for {list(of)}, this pruner prunes {list(layers)}")
        _, shards = together(lambda: (None, {}, layers))
        blocks = {}
        for name, shard in shards.items():
            ends = zip(shard.offset, shard.local.shape, strict=True)
            blocks[name] = masks[name][tuple(slice(start, start + size) for start, size in ends)]
        return sharded_masks(layers, blocks, Held(shards, self.every))

    def _meet(self, model: nn.Module, layers: Layers, asked: dict[str, object]) -> None:
        """Wait for all ranks, and look anew at what this one holds."""
        reshard_(model)
        _, shards = together(lambda: (None, asked, layers), called=_EVENT)
        self._held = Held(shards, self.every)


def deciding_of(model: object) -> OneProcess:
    """Return who decides what is pruned of a model."""
    if is_sharded(model):
        assert isinstance(model, nn.Module)
        return Shards(ranks_of(model.parameters()))
    ranks = replicas_of(model)
    return OneProcess() if ranks is None else Replicas(ranks)


def _swapped(now: Now, ranked: Ranked, growth: Mapping[str, Tensor], share: float, pick: Pick) -> dict[str, Tensor]:
    active = {name: local(mask) for name, mask in now.masks.items()}
    kept, sizes = now.masks._counts(), {name: p.numel() for name, p in now.request.parameters.items()}
    swaps = {name: min(int(share * kept[name]), size - kept[name]) for name, size in sizes.items()}
    left = {name: kept[name] - count for name, count in swaps.items()}
    stay = pick.each(ranked.values, left, by=ranked.by, among=active)
    come = pick.each(growth, swaps, by="value", among={name: ~mask for name, mask in active.items()})
    return {name: stay[name] | come[name] for name in active}

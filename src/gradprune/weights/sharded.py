"""Prune a model whose parameters are spread over several processes, as one process would (chapter 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gradprune.core import select_sharded
from gradprune.core.checks import is_distributed, require, state
from gradprune.core.collect import Kept
from gradprune.core.order import By
from gradprune.core.sharded import Ranks, Shard, like, local, ranks_of, reshard_, together
from gradprune.weights.eligible import Patterns, StatedAxes, as_patterns
from gradprune.weights.granularity import Granularity, Pick, Ranked
from gradprune.weights.hold import warn_of_revived
from gradprune.weights.mask import Masks
from gradprune.weights.named import parameters_of
from gradprune.weights.plan import Scope
from gradprune.weights.request import (
    ZEROS_NOTICED,
    Request,
    Score,
    checked_amount,
    checked_score,
    warn_of_zeros,
    zeros_by_a_sample,
    zeros_that_stay,
)
from gradprune.weights.score import magnitude
from gradprune.weights.shown import weights_among


def prune_sharded(
    model: nn.Module,
    score: Score,
    *,
    sparsity: float | None,
    threshold: float | None,
    scope: Scope,
    granularity: Granularity,
    include: Patterns,
    exclude: Patterns,
    min_keep: int | None,
    within: Mapping[str, Tensor] | None,
    axes: StatedAxes,
) -> ShardedMasks:
    """Do what ``prune`` does, on all ranks together, which must ask the same.

    Raises on all ranks what ``prune`` would on one of them; TypeError for a layout, ValueError for an argument that is
    not supported on sharded parameters.
    """
    reshard_(model)
    ranks = ranks_of(model.parameters())

    def each() -> tuple[tuple[Request, dict[str, Any]], dict[str, object], dict[str, nn.Parameter]]:
        _refuse(checked_score(score) is not magnitude, "a score other than gp.magnitude")
        _refuse(within is not None, "`within`")
        _refuse(granularity != "weight", f"granularity={granularity!r}")
        _refuse(isinstance(scope, str) and scope in ("row", "lamp"), f"scope={scope!r}")
        patterns = [None if p is None else as_patterns(n, p) for n, p in (("include", include), ("exclude", exclude))]
        request = Request.of(
            model, scope=scope, include=patterns[0], exclude=patterns[1], min_keep=min_keep, axes=axes, held=local
        )
        for name, weight in request.layers.items():
            _refuse(weight.direction is not None, f"{name!r}, the direction of a weight_norm,")
        amounts: dict[str, Any] = dict(zip(("sparsity", "threshold"), checked_amount(sparsity, threshold), strict=True))
        request.plan(**amounts)
        asked = amounts | {"scope": request.scope, "min_keep": request.min_keep}
        return (request, amounts), asked | dict(zip(("include", "exclude"), patterns, strict=True)), request.parameters

    (request, amounts), shards = together(each, called="gp.prune")
    warn_of_revived(request.parameters)
    ranked = Ranked({name: shard.local.detach() for name, shard in shards.items()}, "magnitude")
    keep = replace(request, pick=_pick(shards, ranks)).plan(**amounts)(ranked)
    if threshold is not None:
        select_sharded.let_owners_decide_(list(shards.values()), [keep[name] for name in shards], ranks)
    kept = _counted(shards, keep, ranks)
    masks = ShardedMasks({name: like(p, keep[name]) for name, p in request.parameters.items()}, kept)
    masks.apply_(model)
    return masks


class ShardedMasks(Masks):
    """Masks of parameters that are DTensors: DTensors of bool that lie as the parameters do.

    Each rank holds the masks of its own blocks, and knows how many entries of each whole mask stay.
    """

    def __init__(self, masks: Mapping[str, Tensor], kept: Mapping[str, int]) -> None:
        super().__init__({name: local(mask) for name, mask in masks.items()})
        self._masks = dict(masks)
        self._kept = dict(kept)

    def __eq__(self, other: object) -> bool:
        """Whether the blocks of this rank are equal."""
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(
            _layout(mask) == _layout(other[name]) and torch.equal(local(mask), local(other[name]))
            for name, mask in self.items()
        )

    __hash__ = None

    def __repr__(self) -> str:
        weights = sum(mask.numel() for mask in weights_among(self).values())
        return f"Masks({len(self)} tensors, {weights:,} weights, sparsity {self.sparsity:.4f}, sharded)"

    def __copy__(self) -> ShardedMasks:
        twin = ShardedMasks(self._masks, self._kept)
        twin._parameters = dict(self._parameters)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedMasks:
        return ShardedMasks({name: like(mask, local(mask).clone()) for name, mask in self.items()}, self._kept)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"sharded masks are not pickled: {_SAVE}")

    @property
    def sparsity(self) -> float:
        """The share of the entries of the whole masks that are pruned; no rank waits for another."""
        counted = weights_among(self)
        total = sum(mask.numel() for mask in counted.values())
        return 1 - sum(self._kept[name] for name in counted) / total if total else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The masks by name, as torch.distributed.checkpoint saves them and loads them on any number of ranks."""
        return dict(self)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> ShardedMasks:
        """Return masks from DTensors of bool by name; all ranks call it together."""

        def each() -> tuple[Mapping[str, Tensor], dict[str, object], Mapping[str, Tensor]]:
            found = state(state_dict, dict.fromkeys(state_dict, Tensor), "Masks")
            Masks({name: local(mask) for name, mask in found.items()})
            return found, {}, found

        ranks = ranks_of(state_dict.values())
        found, shards = together(each, called="Masks.from_state_dict")
        blocks = [shard.local for shard in shards.values()]
        counts = select_sharded.count(shards.values(), blocks, ranks)
        return cls(found, dict(zip(shards, counts, strict=True)))

    def save(self, path: Any) -> None:
        """Refuse: each rank has only its own blocks."""
        raise TypeError(f"sharded masks are not saved to one file: {_SAVE}")

    def to_torch_(self, model: nn.Module) -> None:
        """Refuse: torch.nn.utils.prune knows no DTensors."""
        raise TypeError(
            "torch.nn.utils.prune does not take sharded parameters: hold the masks by masks.hold(optimizer)"
        )

    def _held(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def _beside(self, tensor: Tensor, name: str) -> Tensor:
        return local(self[name]).to(local(tensor).device)

    def _of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if isinstance(model, nn.Module):
            reshard_(model)
        parameters = parameters_of(model, self, local)
        for name, parameter in parameters.items():
            mask, own = _layout(self[name]), _layout(parameter)
            require(mask == own, f"the mask of {name!r} lies as {mask}, the parameter as {own}: shard both alike")
        return parameters

    def _alive(self, model: nn.Module) -> int:
        alive = super()._alive(model)
        return ranks_of(self.values()).add(alive)


_SAVE = "give masks.state_dict() to torch.distributed.checkpoint, and what it loads to Masks.from_state_dict"


def _refuse(asked: bool, what: str) -> None:
    """Raise ValueError where something is asked that is not there for sharded parameters."""
    require(
        not asked,
        f"{what} is not supported where parameters are DTensors (FSDP2, tensor parallel): there gp.prune takes single "
        'weights by magnitude, with scope "global", "layer", "erk" or a dict. Prune before you shard',
    )


def _pick(shards: Mapping[str, Shard], ranks: Ranks) -> Pick:
    """How the largest are chosen over all ranks."""

    def keep(values: Mapping[str, Tensor], k: int, *, by: By, among: Sequence[Tensor] | None) -> Kept:
        assert by == "magnitude"
        assert among is None
        return select_sharded.keep_and_count({name: shards[name] for name in values}, ranks, k)

    def each(
        values: Mapping[str, Tensor], counts: Mapping[str, int], *, by: By, among: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        found = select_sharded.keep_each([({name: shards[name]}, k) for name, k in counts.items()], ranks)
        return {name: kept.masks[0] for name, kept in zip(counts, found, strict=True)}

    def stay(masks: Mapping[str, Tensor]) -> dict[str, int]:
        if not masks:
            return {}
        counts = select_sharded.count([shards[name] for name in masks], masks.values(), ranks)
        return dict(zip(masks, counts, strict=True))

    def check(values: Mapping[str, Tensor]) -> None:
        has_nan = ranks.on_any(bool(shards[name].local.isnan().any()) for name in values)
        for name, wrong in zip(values, has_nan, strict=True):
            require(not wrong, f"the score of {name!r} contains NaN")

    return Pick(keep, each, stay, check)


def _counted(shards: Mapping[str, Shard], keep: Mapping[str, Tensor], ranks: Ranks) -> dict[str, int]:
    """How many entries of each whole stay; warns where many of them are zero already."""
    counts = select_sharded.count(shards.values(), [keep[name] for name in shards], ranks)
    total = sum(shard.numel for shard in shards.values())
    own = {name: shard.local.detach() for name, shard in shards.items() if shard.owned}
    if ranks.add(zeros_by_a_sample(own, total)) > ZEROS_NOTICED / 2 * total:
        warn_of_zeros(ranks.add(zeros_that_stay(own, keep)), total)
    return dict(zip(shards, counts, strict=True))


def _layout(tensor: Tensor) -> str:
    if not is_distributed(tensor):
        return "whole"
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return f"{', '.join(map(str, tensor.placements))} over ranks {mesh.mesh.tolist()}"  # type: ignore[attr-defined]

"""Prune a model whose parameters are spread over several processes, as one process would (chapter 9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradprune.core import copies
from gradprune.core.agree import agree
from gradprune.core.checks import require
from gradprune.core.ranks import Ranks, ranks_of
from gradprune.core.sharded import Shard, like, local, reshard_, together
from gradprune.weights.eligible import Patterns, StatedAxes, as_patterns
from gradprune.weights.granularity import Granularity, Ranked, Units
from gradprune.weights.hold import warn_of_revived
from gradprune.weights.mask_sharded import ShardedMasks
from gradprune.weights.pick_sharded import pick_over, require_whole_units, unit_shards
from gradprune.weights.plan import Scope
from gradprune.weights.request import (
    Request,
    Score,
    checked_amount,
    checked_score,
    checked_within,
    ranked_by,
    warn_of_unnamed_outputs,
)
from gradprune.weights.score import magnitude
from gradprune.weights.zeros import ZEROS_NOTICED, warn_of_zeros, zeros_by_a_sample, zeros_that_stay

Stay = Callable[[Mapping[str, Tensor]], dict[str, int]]


class Held(NamedTuple):
    """What this rank holds of the parameters that are pruned, and all ranks."""

    shards: dict[str, Shard]
    ranks: Ranks


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
        checked_score(score)
        patterns = [None if p is None else as_patterns(n, p) for n, p in (("include", include), ("exclude", exclude))]
        request = request_over_ranks(
            model,
            scope=scope,
            granularity=granularity,
            include=patterns[0],
            exclude=patterns[1],
            min_keep=min_keep,
            axes=axes,
        )
        amounts: dict[str, Any] = dict(zip(("sparsity", "threshold"), checked_amount(sparsity, threshold), strict=True))
        request.plan(**amounts)
        checked_within(within, request.parameters)
        asked = amounts | {"scope": request.scope, "granularity": granularity, "min_keep": request.min_keep}
        asked |= dict(zip(("include", "exclude"), patterns, strict=True)) | {"axes": axes, "within": within is not None}
        return (request, amounts), asked, request.parameters

    (request, amounts), shards = together(each, called="gp.prune")
    warn_of_revived(request.parameters)
    masks = masks_over_ranks(request, model, score, Held(shards, ranks), "gp.prune", within=within, **amounts)
    masks.apply_(model)
    return masks


def request_over_ranks(model: nn.Module, **asked: Any) -> Request:
    """Return the checked arguments of ``prune``; raise for what is not supported on sharded parameters."""
    granularity = asked.get("granularity", "weight")
    _refuse(isinstance(granularity, str) and granularity == "group", f"granularity={granularity!r}")
    request = Request.of(model, **asked, held=local)
    for name, weight in request.layers.items():
        _refuse(weight.direction is not None, f"{name!r}, the direction of a weight_norm,")
    return request


def require_no_example(example: Any) -> None:
    """Raise ValueError where one is given."""
    require(example is None, f"example is not supported where parameters are DTensors; got {type(example).__name__}")


def ranked_over_ranks(
    score: Score, model: nn.Module, parameters: Mapping[str, nn.Parameter], called: str, at: str = "score"
) -> Ranked:
    """Return what this rank holds of the scores, once nothing is wrong with them on any."""
    if score is magnitude:
        return ranked_by(score, model, parameters)

    def own() -> tuple[Ranked, dict[str, object], None]:
        ranked = ranked_by(score, model, parameters)
        return ranked, {repr(name): values.dtype for name, values in ranked.values.items()}, None

    try:
        ranked, _ = agree(called, own, what=f"the {at} of {{}}")
    finally:
        reshard_(model)
    return ranked


def masks_over_ranks(
    request: Request,
    model: nn.Module,
    score: Score,
    held: Held,
    called: str,
    *,
    within: Mapping[str, Tensor] | None,
    **amounts: Any,
) -> ShardedMasks:
    """Return what ``Request.masks`` would in one process, on all ranks together; nothing is written."""
    shards, ranks = held
    units = Units(request.layers, request.block, None)
    rows = request.scope == "row"
    if rows or request.n_of_m is not None or request.block is not None:
        require_whole_units(units, request.n_of_m, rows=rows, shards=shards, ranks=ranks)
    pick = pick_over(shards if request.block is None else unit_shards(units, shards), ranks)
    ranked = ranked_over_ranks(score, model, request.parameters, called)
    if rows or request.n_of_m is not None:  # chosen by each rank for itself
        pick.check(ranked.values)
    keep = replace(request, pick=pick).plan(**amounts, within=within)(ranked)
    masks = sharded_masks(request.parameters, keep, held, pick.stay)
    if request.outputs:
        warn_of_unnamed_outputs(request.outputs, masks._counts()[request.outputs], masks[request.outputs].numel())
    if within is None:
        _look_for_zeros(shards, keep, ranks)
    return masks


def sharded_masks(
    parameters: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor], held: Held, stay: Stay | None = None
) -> ShardedMasks:
    """Return masks of the blocks held here; of copies the lowest rank's decide. `stay` says how many of each stay."""
    here = {name: keep[name].to(shard.local.device) for name, shard in held.shards.items()}
    copies.let_owners_decide_(list(held.shards.values()), list(here.values()), held.ranks)
    counts = (stay or pick_over(*held).stay)(here)
    return ShardedMasks({name: like(parameters[name], mask) for name, mask in here.items()}, counts)


def _refuse(asked: bool, what: str) -> None:
    """Raise ValueError where something is asked that is not there for sharded parameters."""
    require(
        not asked,
        f"{what} is not supported where parameters are DTensors (FSDP2, tensor parallel): prune before you shard",
    )


def _look_for_zeros(shards: Mapping[str, Shard], keep: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Warn where many of the weights that stay are zero already."""
    total = sum(shard.numel for shard in shards.values())
    own = {name: shard.local.detach() for name, shard in shards.items() if shard.owned}
    if ranks.add(zeros_by_a_sample(own, total)) > ZEROS_NOTICED / 2 * total:
        warn_of_zeros(ranks.add(zeros_that_stay(own, keep)), total)

"""What is to be pruned, and how, where channels that the network couples go together (``weights.groups``)?"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.checks import require
from gradprune.weights.eligible import Patterns, StatedAxes
from gradprune.weights.groups import Groups
from gradprune.weights.hold import held_mask
from gradprune.weights.mask import Masks
from gradprune.weights.plan import Choose, Scope
from gradprune.weights.request import (
    Request,
    Score,
    check_made_for,
    checked_amount,
    checked_score,
    checked_within,
    ranked_by,
    require_one_amount,
)


def requested(model: nn.Module, example: Any, **asked: Any) -> Request:
    """Return the checked arguments of ``prune``, of which `example` is for coupled channels alone."""
    granularity = asked.get("granularity", "weight")
    if isinstance(granularity, str) and granularity == "group":
        return GroupRequest.of_groups(model, example, **asked)
    require(example is None, f"example is for granularity='group'; got granularity={granularity!r}")
    return Request.of(model, **asked)


@dataclass(frozen=True)
class GroupRequest(Request):
    """A checked way to prune coupled channels, traced once; masks are also of what goes beside their filters."""

    groups: Groups = field(kw_only=True)

    @classmethod
    def of_groups(
        cls,
        model: nn.Module,
        example: Any,
        *,
        scope: Scope = "global",
        granularity: str = "group",
        include: Patterns = None,
        exclude: Patterns = None,
        min_keep: int | None = None,
        axes: StatedAxes = None,
    ) -> GroupRequest:
        """Check the arguments, which are those of ``prune``, against the model; errors as there."""
        require(min_keep is None, "granularity='group' leaves one channel of each group and takes no min_keep")
        shared = isinstance(scope, Mapping) or (isinstance(scope, str) and scope in ("global", "layer"))
        require(shared, f"granularity='group' goes with scope 'global', 'layer' or sparsities by name, got {scope!r}")
        if isinstance(scope, Mapping):
            check_made_for(scope, granularity)
        groups = Groups.of(model, example, include, exclude, axes)
        return cls(groups.layers, scope, None, None, None, groups=groups)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, those beside the filters too."""
        beside = {name: p for name, p in self.groups.others.items() if name in self.groups.beside}
        return self.groups.parameters | beside

    @property
    def moved(self) -> dict[str, nn.Parameter]:
        """Without what goes beside and is frozen."""
        return {name: p for name, p in self.parameters.items() if name in self.layers or p.requires_grad}

    def masks(
        self,
        model: nn.Module,
        score: Score,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        within: Mapping[str, Tensor] | None = None,
    ) -> Masks:
        """Return the masks for an amount; nothing is written. Errors as of ``prune``."""
        score = checked_score(score)
        choose = self.plan(sparsity=sparsity, threshold=threshold, within=within)
        return Masks(choose(ranked_by(score, model, self.groups.parameters)))

    def plan(
        self,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        within: Mapping[str, Tensor] | None = None,
    ) -> Choose:
        """Return the way from scores to masks for an amount; whatever needs no score to be refused is refused here."""
        sparsity, threshold = checked_amount(sparsity, threshold)
        if isinstance(self.scope, Mapping):
            require(threshold is None, "a scope that gives sparsities by name does not go with a threshold")
            scope: Any = self.groups.by_number(self.scope, sparsity or 0.0)
        else:
            require_one_amount(sparsity, threshold)
            scope = self.scope
            if sparsity is not None and scope == "global":
                self.groups.require_enough(sparsity)
        allowed = None if within is None else self._allowed(within)
        return lambda ranked: dict(self.groups.masks(ranked.scores(), allowed, sparsity, threshold, scope))

    def _allowed(self, within: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks that say what may stay, checked; what they lack may, and others go along."""
        checked_within(within, {})
        own = checked_within(within, {name: p for name, p in self.parameters.items() if name in within})
        return dict(Masks(within)) | (own or {})

    def sparsity(self, masks: Masks) -> float:
        """Return the share of the counted weights that masks prune: those of filters."""
        return Masks({name: masks[name] for name in self.layers}).sparsity

    def with_beside(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return masks of all parameters: what has no mask stays but where it is held, or its channel has gone."""
        found = dict(masks)
        for name, p in self.parameters.items():
            if name not in found:
                held = held_mask(p)
                found[name] = torch.ones_like(p, dtype=torch.bool) if held is None else held.clone()
        return self.groups.with_beside(found)

    def copied(self, memo: dict[int, Any]) -> Request:
        """Return the same request about the copy of the model."""
        twin = super().copied(memo)
        others = {name: copy.deepcopy(p, memo) for name, p in self.groups.others.items()}
        return replace(twin, groups=replace(self.groups, layers=twin.layers, others=others))  # type: ignore[call-arg]

"""Which entries of gradients, with what waited for them, are sent: in one process, or over several (chapter 3)?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradprune.core import copies
from gradprune.core.masked import count_kept
from gradprune.gradients.params import with_gradient
from gradprune.gradients.representable import at_least
from gradprune.gradients.sparsify import (
    Gradients,
    Scope,
    checked,
    extreme,
    largest,
    mean_magnitude,
    not_finite,
    share_of,
)
from gradprune.gradients.sparsify_sharded import largest_of_all, means_over_ranks
from gradprune.gradients.spread import largest_over_ranks, spread


class Sums:
    """The gradients of one step; `asked` are the arguments that `asked()` returned."""

    def __init__(
        self,
        living: Mapping[str, Tensor],
        asked: Callable[[], Mapping[str, Any]],
        fit: Callable[[Mapping[str, Tensor]], object],
    ) -> None:
        self.gradients: Gradients = checked(with_gradient(living.items()))
        fit(self.gradients)
        self.asked = asked()

    def not_finite(self) -> list[str]:
        """The names of the gradients that are not finite."""
        return not_finite(self.gradients)

    def beyond(self, sums: Gradients) -> list[str]:
        """The names of the gradients whose dtype cannot hold the sum."""
        pairs = ((name, values, self.gradients[name].dtype) for name, values in sums.items() if values.numel())
        return [name for name, values, dtype in pairs if not bool(extreme(values) <= torch.finfo(dtype).max)]

    def largest(self, sums: Gradients, density: float, scope: Scope) -> dict[str, Tensor]:
        """Masks that are True for the largest magnitudes."""
        return largest(sums, density, scope)

    def at_least(self, sums: Gradients, cut: float, *, of_mean: bool) -> dict[str, Tensor]:
        """Masks that are True from a magnitude on, of each tensor's mean magnitude if so said."""
        cuts = {name: cut * mean_magnitude(s) if of_mean else cut for name, s in sums.items()}
        return {name: s.abs() >= at_least(cuts[name], s.dtype) for name, s in sums.items()}

    def share(self, masks: Mapping[str, Tensor]) -> float:
        """The share of the entries that is sent."""
        return share_of(sum(map(count_kept, masks.values())), self.gradients)


class SumsOverRanks(Sums):
    """The blocks held here; what is told of them is the whole's, on all ranks alike. All ranks make it together."""

    def __init__(
        self,
        living: Mapping[str, Tensor],
        asked: Callable[[], Mapping[str, Any]],
        fit: Callable[[Mapping[str, Tensor]], object],
    ) -> None:
        self.asked, self._shards, self._ranks = spread(list(living.items()), asked, fit)
        self.gradients = {name: shard.local for name, shard in self._shards.items()}

    def not_finite(self) -> list[str]:
        """The names of the gradients that are not finite on any rank."""
        most = largest_over_ranks(list(self._shards.values()), self._ranks)
        return [name for name, size in zip(self._shards, most, strict=True) if not math.isfinite(size)]

    def beyond(self, sums: Gradients) -> list[str]:
        """The names of the gradients whose dtype cannot hold the sum, on any rank."""
        here = super().beyond(sums)
        anywhere = self._ranks.on_any(name in here for name in sums)
        return [name for name, wrong in zip(sums, anywhere, strict=True) if wrong]

    def largest(self, sums: Gradients, density: float, scope: Scope) -> dict[str, Tensor]:
        """This rank's blocks of the masks."""
        masks, _ = largest_of_all(self._of(sums), self._ranks, density, scope)
        return dict(zip(sums, masks, strict=True))

    def at_least(self, sums: Gradients, cut: float, *, of_mean: bool) -> dict[str, Tensor]:
        """This rank's blocks of the masks."""
        shards = self._of(sums)
        most = largest_over_ranks(list(shards.values()), self._ranks) if of_mean else []
        means = means_over_ranks(shards, most, self._ranks) if of_mean else [1.0] * len(shards)
        masks = {n: s.abs() >= at_least(cut * m, s.dtype) for (n, s), m in zip(sums.items(), means, strict=True)}
        copies.let_owners_decide_(list(shards.values()), list(masks.values()), self._ranks)
        return masks

    def share(self, masks: Mapping[str, Tensor]) -> float:
        """The share of the entries of all ranks that is sent."""
        total = sum(shard.numel for shard in self._shards.values())
        kept = copies.count([self._shards[name] for name in masks], masks.values(), self._ranks)
        return sum(kept) / total if total else 1.0

    def _of(self, sums: Gradients) -> dict[str, Any]:
        return {name: self._shards[name]._replace(local=values) for name, values in sums.items()}

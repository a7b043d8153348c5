"""How large are gradients that are spread over several processes (chapter 2)?

Each rank looks at its own blocks, of copies the lowest rank's count, and a reduction tells all of them the same number:
what they do to their blocks then is what one process would do to the whole. Whatever may be wrong on one rank is told
before anything is written.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradprune.core.checks import is_distributed, require
from gradprune.core.ranks import Ranks, ranks_of
from gradprune.core.sharded import GRADIENT, Shard, is_sharded, local, reshard_, together
from gradprune.gradients.cliplog import ClipLog
from gradprune.gradients.gathered import Gathered, require_clippable, require_log
from gradprune.gradients.nonfinite import NonFinite, known
from gradprune.gradients.norms import combined_norm, count_over, largest_of, most_of, norm_of
from gradprune.gradients.params import Params, read_once, tensors_in, with_gradient
from gradprune.gradients.unitwise_sharded import (
    ratios_over_ranks,
    require_finite_weights_over_ranks,
    scale_rows_,
    units_over,
    weights_beside,
)

_BEYOND = -1.0  # told in place of a norm that float64 cannot hold
Read = Tensor | nn.Module | list[Any]


class Spread(NamedTuple):
    """The gradients of one call: what was asked for, the blocks held here by name, and all ranks."""

    given: Mapping[str, Any]
    shards: dict[str, Shard]
    ranks: Ranks


def gathered(
    params: Params, nonfinite: NonFinite, log: ClipLog | None, kind: str, check: Callable[[], Mapping[str, float]]
) -> tuple[Gathered, Mapping[str, float]]:
    """Return the gradients to clip, in one process or over several, and the arguments that `check` returns."""
    if "torch.distributed.tensor" in sys.modules:
        params = read_once(params)
        if over_ranks(params):
            found = GatheredOverRanks(params, nonfinite, log, kind, check)
            return found, found.given
    given = check()
    return Gathered(params, nonfinite, log, kind), given


def over_ranks(params: Read) -> bool:
    """Whether a parameter is a DTensor."""
    if not hasattr(sys.modules.get("torch.distributed.tensor"), "DTensor"):
        return False
    if isinstance(params, nn.Module):
        return is_sharded(params)
    return any(map(is_distributed, _tensors(params)))


def _tensors(params: Tensor | list[Any]) -> Iterable[Any]:
    return [params] if isinstance(params, Tensor) else tensors_in(params)


def spread(
    params: Read, check: Callable[[], Mapping[str, Any]], fit: Callable[[Mapping[str, Tensor]], object]
) -> Spread:
    """Return what this rank holds of the gradients, once all ranks ask the same and nothing is wrong on any.

    `check` returns the arguments, `fit` looks at this rank's blocks; what they raise on one rank all ranks raise.
    """
    if isinstance(params, nn.Module):
        reshard_(params)
        ranks = ranks_of(params.parameters())
    else:
        ranks = ranks_of(_tensors(params))

    def each() -> tuple[Mapping[str, Any], Mapping[str, object], dict[str, Tensor]]:
        given = check()
        gradients = {name: p.grad for name, p in with_gradient(params).items() if p.grad is not None}
        for name, gradient in gradients.items():
            sparse = gradient.layout != torch.strided
            require(not sparse, f"the gradient of {name!r} is sparse, which is not supported beside DTensors")
        fit({name: _ready(local(gradient)) for name, gradient in gradients.items()})
        return given, given, gradients

    given, shards = together(each, GRADIENT)
    return Spread(given, {n: s._replace(local=_ready(s.local).detach()) for n, s in shards.items()}, ranks)


def largest_over_ranks(shards: Sequence[Shard], ranks: Ranks) -> list[float]:
    """Return the largest magnitude of each whole tensor; nan or inf where an entry is, of any copy."""
    if not shards:
        return []
    own = largest_of([shard.local for shard in shards])
    told = [0.0 if math.isnan(most) else most for most in own] + [float(math.isnan(most)) for most in own]
    most = ranks.most(torch.tensor(told, dtype=torch.float64, device="cpu")).tolist()
    return [math.nan if nan else size for size, nan in zip(most[: len(own)], most[len(own) :], strict=True)]


def norms_over_ranks(model: nn.Module, check: Callable[[Mapping[str, Tensor]], object]) -> dict[str, float]:
    """Return the 2-norm of each whole gradient of a model; `check` looks at the blocks of this rank."""
    _, shards, ranks = spread(model, dict, check)
    own = [_norm(shard.local) if shard.owned else 0.0 for shard in shards.values()]
    by_rank = _by_rank(torch.tensor(own, dtype=torch.float64, device="cpu"), ranks).T.tolist()
    norms = {name: combined_norm(norms, 2.0) for name, norms in zip(shards, by_rank, strict=True)}
    for name, some in zip(shards, by_rank, strict=True):
        beyond = norms[name] == math.inf and math.inf not in some
        require(min(some) != _BEYOND and not beyond, f"the norm of the gradient of {name!r} is beyond float64")
    return norms


def _norm(block: Tensor) -> float:
    try:
        return norm_of([block], 2.0)
    except ValueError:  # on this rank alone: all of them raise once they were told
        return _BEYOND


class GatheredOverRanks(Gathered):
    """Gradients as ``Gathered`` has them: `values` are the blocks of this rank, what is told of them is the whole's."""

    def __init__(
        self,
        params: Read,
        nonfinite: NonFinite,
        log: ClipLog | None,
        kind: str,
        check: Callable[[], Mapping[str, float]],
    ) -> None:
        def checked() -> Mapping[str, Any]:
            given = check()
            if log is not None:
                require_log(log)._require_kind(kind)
            if kind == "adaptive":
                weights.update(weights_beside(params))
            return {**given, "nonfinite": known(nonfinite)}

        weights: dict[str, tuple[Tensor, int]] = {}
        self.given, shards, self._ranks = spread(params, checked, require_clippable)
        self._by_name, self._weights = shards, weights
        self._shards = list(shards.values())
        self.nonfinite, self.log, self.kind = nonfinite, log, kind
        self._names, self._summed = list(shards), []
        self.values = self.grads = [shard.local for shard in self._shards]
        self.dtypes = {value.dtype for value in self.values}
        self.double = any(value.dtype in (torch.float64, torch.complex128) for value in self.values)

    @property
    def sizes(self) -> list[int]:
        """Entries of each whole."""
        return [shard.numel for shard in self._shards]

    @property
    def counts(self) -> bool:
        """Whether it matters how many entries were bounded: a log may be on another rank, which waits for this one."""
        return True

    def norm(self, p: float) -> float:
        """The p-norm of all entries of all ranks, added in float64."""
        if p == math.inf:
            return most_of(self.largest())
        try:
            own = norm_of([shard.local for shard in self._shards if shard.owned], p)
            copies = norm_of([shard.local for shard in self._shards if not shard.owned], p)
        except ValueError:  # beyond float64 on one rank alone
            own = copies = math.inf
        told = torch.tensor([own if math.isfinite(copies) else math.nan], dtype=torch.float64, device="cpu")
        norm = combined_norm(_by_rank(told, self._ranks).view(-1).tolist(), p)
        if not math.isfinite(norm) and math.isfinite(most_of(self.largest())):
            raise ValueError(f"the norm of order {p} of these gradients is beyond float64; take a larger norm_type")
        return norm

    def largest(self, *, join: bool = False) -> list[float]:
        """The largest magnitude of each whole gradient."""
        return largest_over_ranks(self._shards, self._ranks)

    def over(self, limits: Mapping[torch.dtype, float]) -> int:
        """How many entries of all ranks are larger in magnitude than their dtype's limit."""
        return self._ranks.add(sum(count_over(s.local, limits[s.local.dtype]) for s in self._shards if s.owned))

    def clip_units_(self, factor: float, eps: float) -> None:
        """Do what ``clip_adaptive_`` does."""
        shards, weights, ranks = self._by_name, self._weights, self._ranks
        size, by_tensor, ratios = 0.0, [0.0], []
        for precise in (factor * eps < 1e-12, True):  # rather a sum of squares out of range than a gradient: look again
            ratios = ratios_over_ranks(shards, weights, ranks, eps, precise=precise)
            own = [float(r.nan_to_num(nan=math.inf, posinf=math.inf).max()) if len(r) else 0.0 for r in ratios]
            by_tensor = ranks.most(torch.tensor(own, dtype=torch.float64, device="cpu")).tolist() if own else []
            size = most_of(by_tensor)
            if math.isfinite(size):
                break
        if not math.isfinite(size):
            require_finite_weights_over_ranks(weights, self.names, ranks)
            if self.settle(by_tensor):
                return self.note_settled(size, factor)
            ratios = [ratio.where(ratio.isfinite(), 0.0) for ratio in ratios]
        bounded, units = units_over(shards, weights, ratios, factor, ranks)
        scale = scale_rows_(shards, weights, ratios, factor)
        least = -float(ranks.most(torch.tensor([-scale], dtype=torch.float64, device="cpu")))
        return self.note(size, factor, least, bounded / max(1, units))

    def _not_finite(self, at: int) -> int:
        shard = self._shards[at]
        # Of copies the worst: NaN may be in one alone.
        own = torch.tensor([int(torch.isfinite(shard.local).logical_not().sum())], dtype=torch.int64, device="cpu")
        counts = _by_rank(own, self._ranks).view(-1).tolist()
        return sum(max(counts[rank] for rank in holders) for holders in shard.holders)


def _by_rank(numbers: Tensor, ranks: Ranks) -> Tensor:
    """What each rank has, one row a rank."""
    rows = torch.zeros(torch.distributed.get_world_size(), len(numbers), dtype=numbers.dtype, device="cpu")
    rows[torch.distributed.get_rank()] = numbers
    return ranks.sum(rows)


def _ready(block: Tensor) -> Tensor:
    """A block whose communication has ended: tensor parallel layers may leave it under way."""
    return block.wait() if type(block).__name__ == "AsyncCollectiveTensor" else block  # type: ignore[attr-defined]

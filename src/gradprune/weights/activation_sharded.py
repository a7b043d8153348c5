"""How large is what each weight multiplies, where several ranks have a part of it each (chapter 9)?

What a weight multiplies is seen while its module runs, when FSDP2's blocks of it are together; the squares of all ranks
are added up when the module returns, and each rank keeps those of its block.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.agree import agree
from gradprune.core.batches import inputs_of, items
from gradprune.core.blockwise import Blockwise, Cut, Names
from gradprune.core.checks import is_distributed, require
from gradprune.core.evaluate import as_written, call_on_batch, evaluated
from gradprune.core.ranks import ranks_of
from gradprune.core.sharded import local, reshard_
from gradprune.weights.differentiate import floating
from gradprune.weights.input_norms import NO_SAMPLE, REACH_NONE, InputNorms, seen_kernels
from gradprune.weights.passes import agreed_batches, on_device
from gradprune.weights.precision import narrowed, product
from gradprune.weights.score_sharded import CALLED, settled


def activation_over_ranks(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return what ``activation`` would of one process that has the batches of all ranks."""
    reshard_(model)
    blockwise = _Seen(model)
    norms, some = blockwise.norms, next(iter(blockwise.cuts.values()), None)
    ranks = ranks_of(model.parameters())

    def each() -> list[Any]:
        floating(model, sharded=True)
        return items(inputs_of(batches), "an iterable of batches")

    kept = agreed_batches(each, some)

    def run(batch: Any, number: int) -> tuple[None, dict[str, object], None]:
        call_on_batch(model, on_device(batch, some), number)
        return None, {}, None

    with evaluated(model), as_written(), torch.no_grad(), seen_kernels(model), blockwise.running(), norms.watching():
        for number, batch in enumerate(kept):
            agree(CALLED, lambda: run(batch, number))  # noqa: B023 (used at once)

    def seen() -> tuple[None, dict[str, object], None]:
        require(not norms.found, next(iter(norms.found), ""))
        return None, {}, None

    agree(CALLED, seen)
    parameters = {n: p for n, p in floating(model, sharded=True).items() if p.dim() >= 2 and p.layout == torch.strided}
    totals = blockwise.of_all(parameters, some)

    def scores(exact: frozenset[str]) -> dict[str, Tensor]:
        found = {}
        for name, squares in totals.items():
            w = local(parameters[name]).detach().abs()
            value = product(name, w.double(), torch.stack([s.to(w.device).sqrt() for s in squares]).sum(dim=0))
            found[name] = value if name in exact else narrowed(name, value, w.dtype)
        return found

    found = settled(scores, parameters)
    require(bool(found), REACH_NONE)
    require(ranks.on_any([norms.entries > 0])[0], NO_SAMPLE)
    return found


class _Norms(InputNorms):
    """Adds up the squares of what is held here, of DTensors too; what is wrong is told later, to all ranks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: list[str] = []

    def wrong(self, message: str) -> None:
        self.found.append(message)

    def multiplied(self, owner: nn.Module, x: Any, weight: Any) -> None:
        if is_distributed(weight):
            x = _beside(x, weight)
        super().multiplied(owner, local(x), local(weight))

    def convolved(self, owner: nn.Module, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> None:
        if is_distributed(weight):
            self.wrong("a convolution that tensor parallelism splits is not supported here: score it before you shard")
            return
        super().convolved(owner, x, weight, options)

    def taken(self, key: int, whole: Tensor) -> dict[nn.Module, Tensor]:
        """The squares of what a whole tensor multiplied, by the layer, which are then forgotten here."""
        found = dict[nn.Module, Tensor]()
        for owner, total in self.totals(whole):
            found[owner] = found[owner] + total if owner in found else total
        self._squares = {k: total for k, total in self._squares.items() if k[0] != key}
        return found


class _Seen(Blockwise):
    """Adds up, over the ranks, the squares of what parameters multiply that are together while a module runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.norms = _Norms(model)
        self._ranks = ranks_of(model.parameters())
        self._keys: dict[str, int] = {}
        self._squares: dict[tuple[str, nn.Module], Tensor] = {}
        self._holders: dict[str, list[nn.Module]] = {}
        names = {id(p): name for name, p in model.named_parameters()}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                holders = self._holders.setdefault(names[id(p)], [])
                if module not in holders:
                    holders.append(module)

    def opened(self, names: Names) -> None:
        for name in names:
            if self.open[name].dim() >= 2:
                self._keys[name] = self.norms.stand_in(self.open[name], self._holders[name])

    def closed(self, names: Names) -> None:
        matrices = [name for name in names if self.open[name].dim() >= 2]
        here = {name: self.norms.taken(self._keys[name], self.open[name]) for name in matrices}
        for name, owner in self._on_any(here):
            whole = here[name].get(owner)
            if whole is None:
                whole = torch.zeros(self.open[name].shape, device=self.open[name].device)
            block = self.cuts[name].summed(whole.double())
            before = self._squares.get((name, owner))
            self._squares[name, owner] = block if before is None else before + block
        for name in matrices:
            self.norms.no_more(self._keys.pop(name))

    def of_all(self, parameters: dict[str, Any], some: Cut | None) -> dict[str, list[Tensor]]:
        """The squares by name, of those parameters that multiplied something on any rank; a tensor for each layer."""
        others = {name: p for name, p in parameters.items() if name not in self.cuts}
        here = {name: dict(self.norms.totals(p)) for name, p in others.items()}
        for name, owner in self._on_any(here):
            held = local(others[name])
            total = here[name].get(owner)
            total = torch.zeros(held.shape, device=held.device) if total is None else total
            total = total.double()
            self._squares[name, owner] = total if some is None else Cut.of_copies(some, total).summed(total)
        found: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for (name, _), total in self._squares.items():
            if name in found:
                found[name].append(total)
        return {name: totals for name, totals in found.items() if totals}

    def _on_any(self, here: dict[str, dict[nn.Module, Tensor]]) -> list[tuple[str, nn.Module]]:
        """Of the parameters and the layers that have them, those where something was multiplied on any rank."""
        pairs = [(name, owner) for name in here for owner in self._holders[name]]
        if not pairs:
            return []
        met = self._ranks.on_any(owner in here[name] for name, owner in pairs)
        return [pair for pair, is_met in zip(pairs, met, strict=True) if is_met]


def _beside(x: Any, weight: Any) -> Any:
    """What a weight (..., inputs, outputs) multiplies, cut along inputs and the axes before as the weight is."""
    from torch.distributed.tensor import Replicate, Shard

    if not is_distributed(x):
        return x
    last, wanted = weight.dim() - 1, []
    for placement in weight.placements:
        dim = getattr(placement, "dim", last)
        wanted.append(Replicate() if dim == last else Shard(x.dim() - 1 if dim == last - 1 else dim))
    return x.redistribute(weight.device_mesh, wanted)

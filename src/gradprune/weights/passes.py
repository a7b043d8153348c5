"""How does a score pass batches through a model, whether one process has it or several have a part each?

A score is written once, for ``Passes``: weights, the loss of a batch, and the gradients of what all ranks pass, the
mean over those with different data. One process is the case of a single rank. All ranks pass as many batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.agree import agree
from gradprune.core.blockwise import Back, Blockwise, Cut, Summed, sums
from gradprune.core.checks import is_distributed, require
from gradprune.core.evaluate import tensors_in
from gradprune.core.ranks import ranks_of
from gradprune.core.sharded import digest, is_sharded, layout, local, reshard_
from gradprune.weights.differentiate import (
    Batches,
    Loss,
    gradients_of,
    loss_of,
    map_tensors,
    pairs,
    run_with,
    trainable,
)
from gradprune.weights.precision import add_products_, wide
from gradprune.weights.score_sharded import CALLED, settled

Scored = Callable[[str, Tensor, bool], Tensor]


class Passes:
    """Passes batches through a model that this process has."""

    ranks = 1  # with different data

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, copies: bool = False) -> None:
        self.parameters = parameters
        self._run: Callable[..., Any] = model
        self.weights: dict[str, Tensor] = dict(parameters)
        if copies:
            self.weights = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
            self._run = functools.partial(run_with, model, self.weights)

    def batches(self, batches: Batches) -> list[tuple[Any, Any]]:
        """Return the batches as pairs (inputs, targets)."""
        return pairs(batches)

    def same(self, what: str, of: Callable[[], Any]) -> Any:
        """Return what must be the same on all ranks."""
        return of()

    def require_twice(self, score: str) -> None:
        """Raise TypeError where a gradient cannot be differentiated once more."""

    def loss(self, batch: tuple[Any, Any], loss: Loss) -> Tensor:
        """Return the loss of a batch at the weights."""
        return loss_of(self._run, batch, loss)

    def gradients(self, value: Tensor, *, create_graph: bool = False) -> list[Tensor]:
        """Return the gradients, by the weights, of the mean of what each rank has."""
        return gradients_of(value, list(self.weights.values()), create_graph=create_graph)

    def gradients_of_sum(self, value: Tensor) -> list[Tensor]:
        """Return the gradients of the sum of what each rank has."""
        return self.gradients(value)

    def step_(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Take a step of gradient descent."""
        for w, g in zip(self.weights.values(), gradients, strict=True):
            w.sub_(g, alpha=lr)

    def add_squares_(self, value: Tensor, totals: Sequence[Tensor]) -> None:
        """Add the squares of a sample's gradients, of all ranks that have one, to totals in float64."""
        for total, w, g in zip(totals, self.weights.values(), self.gradients(value), strict=True):
            change = _change(w.detach(), g)
            add_products_(total, change, change)

    def largest(self, number: float) -> float:
        """Return the largest over all ranks."""
        return number

    def scores(self, scored: Scored, of: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the score of each parameter from a tensor; `scored` is told whether another rank needs float64."""
        return {name: scored(name, t, False) for name, t in zip(self.parameters, of, strict=True)}


class Shared(Passes):
    """Passes batches through a model of which this rank has blocks, each rank its own batches."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], *, copies: bool = False) -> None:
        self.parameters, self.blockwise = parameters, _Squares(model, self)
        self._cuts = self.blockwise.cuts
        self._some = next(iter(self._cuts.values()), None)
        self.ranks = 1 if self._some is None else self._some.ranks
        self._every = ranks_of(model.parameters())
        self._leaves = {name: self._leaf(name, p, copies=copies) for name, p in parameters.items()}
        self.blockwise.take(self._leaves)
        self.weights = {name: local(leaf).detach() for name, leaf in self._leaves.items()}
        self._squared: dict[str, Tensor] | None = None
        self._pending: dict[str, Tensor] = {}

    def batches(self, batches: Batches) -> list[tuple[Any, Any]]:
        """Return this rank's batches, of which all ranks have as many; those that share data, the same."""

        return agreed_batches(lambda: pairs(batches), self._some)

    def same(self, what: str, of: Callable[[], Any]) -> Any:
        """Return what must be the same on all ranks."""

        def each() -> tuple[Any, dict[str, object], None]:
            found = of()
            return found, {what: found}, None

        return agree(CALLED, each)[0]

    def require_twice(self, score: str) -> None:
        """Raise TypeError where layers are split: what tensor parallelism adds up on the way back has no way back."""
        for name, p in self.parameters.items():
            if self._cuts[name].is_part if name in self._cuts else is_distributed(p):
                raise TypeError(
                    f"{score} differentiates a gradient, which torch cannot do where {name!r} is split by tensor "
                    "parallelism: score it before you split, or by another score"
                )

    def loss(self, batch: tuple[Any, Any], loss: Loss) -> Tensor:
        """Return the loss of this rank's batch."""
        batch = on_device(batch, self._some)
        return agree(CALLED, lambda: (loss_of(self.blockwise, batch, loss), {}, None))[0]

    def gradients(self, value: Tensor, *, create_graph: bool = False) -> list[Tensor]:
        """Return what is held here of the gradients of the mean of what each rank has."""
        found = self._summed(value, create_graph=create_graph)
        return found if self.ranks == 1 else [g / self.ranks for g in found]

    def gradients_of_sum(self, value: Tensor) -> list[Tensor]:
        """Return what is held here of the gradients of the sum of what each rank has."""
        return self._summed(value)

    def step_(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Take a step of gradient descent, rounded as the parameters are."""
        for (name, w), g in zip(self.weights.items(), gradients, strict=True):
            dtype = self.parameters[name].dtype
            w.copy_(w.to(dtype, copy=True).sub_(g.to(dtype), alpha=lr))

    def add_squares_(self, value: Tensor, totals: Sequence[Tensor]) -> None:
        """Add the squares of the gradients of one sample of each rank."""
        self._squared, self._pending = dict(zip(self._leaves, totals, strict=True)), {}
        try:
            gradients = gradients_of(value, list(self._leaves.values()))
            for (name, leaf), g in zip(self._leaves.items(), gradients, strict=True):
                if name in self._pending:
                    self.add_square_(name, self._pending.pop(name))
                elif name not in self._cuts:
                    self.add_square_(name, as_it_lies(g, leaf))
        finally:
            self._squared, self._pending = None, {}
            self.blockwise.forget()

    def add_square_(self, name: str, g: Tensor) -> None:
        """Add the squares of all ranks' gradients, each of the whole, to the own block's total."""
        assert self._squared is not None
        cut, w = self._cuts.get(name), self.weights[name]
        if w.is_complex() and cut is not None:
            w = cut.together(w.to(cut.device))
        square = torch.zeros(g.shape, dtype=torch.float64, device=g.device)
        change = _change(w, g)
        add_products_(square, change, change)
        if cut is None and self._some is not None:
            cut = Cut.of_copies(self._some, g)
        total = self._squared[name]
        total.add_((square if cut is None else cut.summed(square)).to(total.device))

    def later(self, name: str, g: Tensor) -> None:
        """Keep a part of the gradient of a weight that is used more than once."""
        self._pending[name] = self._pending[name] + g if name in self._pending else g

    @property
    def squaring(self) -> bool:
        """Whether it is the squares of each rank's own gradients that are wanted."""
        return self._squared is not None

    def largest(self, number: float) -> float:
        """Return the largest over all ranks."""
        return float(self._every.most(torch.tensor([number], dtype=torch.float64, device="cpu")))

    def scores(self, scored: Scored, of: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the scores, spread as their parameters are."""
        held = dict(zip(self.parameters, of, strict=True))
        return settled(lambda exact: {n: scored(n, t, n in exact) for n, t in held.items()}, self.parameters)

    def _summed(self, value: Tensor, *, create_graph: bool = False) -> list[Tensor]:
        found = []
        gradients = gradients_of(value, list(self._leaves.values()), create_graph=create_graph)
        for (name, leaf), g in zip(self._leaves.items(), gradients, strict=True):
            held = as_it_lies(g, leaf)
            if name not in self._cuts and self._some is not None:
                (held,) = Summed.apply([Cut.of_copies(self._some, held)], [(held.dtype, held.device)], held)
            found.append(held)
        if not create_graph:
            self.blockwise.forget()
        return found

    def _leaf(self, name: str, p: Any, *, copies: bool) -> Tensor:
        """A weight to differentiate by: a block in the dtype in which gradients are added up."""
        w = local(p).detach().to(wide(p.dtype)) if name in self._cuts else p.detach()
        return (w.clone() if copies else w).requires_grad_()


class _Squares(Blockwise):
    """Sends gradients back as they are added up over the ranks, or, of one sample each, as the sum of their squares."""

    def __init__(self, model: nn.Module, passes: Shared) -> None:
        super().__init__(model)
        self._passes = passes

    def _back_of(self, names: Sequence[str]) -> Back:
        passes, uses = self._passes, self.uses

        def back(cuts: Sequence[Cut], blocks: Sequence[Any], wholes: Sequence[Tensor]) -> Sequence[Tensor | None]:
            if not passes.squaring:
                return sums(cuts, blocks, wholes)
            for name, whole in zip(names, wholes, strict=True):
                if uses[name] > 1:
                    passes.later(name, whole)
                else:
                    passes.add_square_(name, whole)
            return [None] * len(wholes)

        return back


@contextmanager
def passes(model: nn.Module, *, copies: bool = False) -> Iterator[Passes]:
    """Pass batches through a model, in eval mode and as it was written; through one with `copies` of its weights."""
    over_ranks = is_sharded(model)
    if over_ranks:
        reshard_(model)
    with trainable(model, sharded=over_ranks) as parameters:
        found = (Shared if over_ranks else Passes)(model, parameters, copies=copies)
        with found.blockwise.running() if isinstance(found, Shared) else nullcontext():
            yield found


def agreed_batches(kept: Callable[[], list[Any]], cut: Cut | None) -> list[Any]:
    """Return this rank's batches; raise unless all have as many, and those the same whose data must be.

    `cut` says which ranks have data of their own: without one, none has.
    """
    at = cut.at if cut is not None else ()
    alone = cut is not None and cut.ranks == torch.distributed.get_world_size()

    def each() -> tuple[list[Any], dict[str, object], Any]:
        found = kept()
        return found, {"batches, by their number,": len(found)}, (at, "" if alone else _hash_of(found))

    found, told = agree(CALLED, each)
    first: dict[Any, tuple[int, str]] = {}
    for rank, (place, made) in enumerate(told):
        other, wanted = first.setdefault(place, (rank, made))
        require(
            made == wanted,
            f"ranks {other} and {rank} have parts of the same layers (tensor parallelism), and must be given the same "
            "batches",
        )
    return found


def on_device(batch: Any, cut: Cut | None) -> Any:
    """Return a batch where parameters are put together, as FSDP2 has it."""
    return batch if cut is None else map_tensors(lambda t: t.to(cut.device), batch)


def as_it_lies(g: Any, leaf: Tensor) -> Tensor:
    """Return what is held here of a gradient, once it lies as its parameter does; it can be differentiated further."""
    if layout(g) != layout(leaf):
        g = g.redistribute(leaf.device_mesh, leaf.placements)  # type: ignore[attr-defined]
    held: Any = g.to_local() if g is not local(g) else g
    return held.wait() if type(held).__name__ == "AsyncCollectiveTensor" else held  # type: ignore[no-any-return]


def _change(w: Tensor, g: Tensor) -> Tensor:
    """What of w g changes from sample to sample: a real weight is a factor of the whole sum."""
    return (w.to(torch.complex128).conj() * g).real if w.is_complex() else g


def _hash_of(batches: list[Any]) -> str:
    return digest({str(n): tensor for n, tensor in enumerate(tensors_in(batches))})

"""How large is what each entry of a weight multiplies?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.evaluate import plain_attention, plain_kernels
from gradprune.core.owners import Place, aten, place
from gradprune.core.products import Products

REACH_NONE = "the batches reach no weight: nothing of two dimensions or more multiplies what they hold"
NO_SAMPLE = "batches held no sample"
_SQUARES_FROM = 1e-30  # sums of squares in float32 below it may have lost some


def seen_kernels(model: nn.Module) -> AbstractContextManager[Any]:
    """Return those kernels of the model's layers in which products are seen."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    return plain_kernels() if recurrent else plain_attention()


class InputNorms(Products):
    """Adds up the squares of what each entry of a weight multiplies, by the memory of the weight and the layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.entries = 0
        self._squares: dict[tuple[int, int, nn.Module], Tensor] = {}

    def of(self, parameter: Tensor) -> Tensor | None:
        """The norm of what each entry multiplied, summed over the layers that have it; None where it met nothing."""
        norms = [total.sqrt() for _, total in self.totals(parameter)]
        return torch.stack(norms).sum(dim=0) if norms else None

    def totals(self, parameter: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
        """The sums of the squares of what each entry multiplied, by the layer."""
        at = place(parameter)
        for (key, entries, owner), total in self._squares.items():
            if key == at.memory and entries == at.entries:
                yield owner, total.as_strided(at.size, at.stride, at.offset)
            elif key == at.memory and parameter.is_complex() and entries == 2 * at.entries:
                both = total.view(-1, 2).sum(-1)  # a product that torch forms of real and imaginary parts
                yield owner, both.as_strided(at.size, at.stride, at.offset)

    def wrong(self, message: str) -> None:
        """Called where an input is not what can be squared."""
        raise ValueError(message)

    def multiplied(self, owner: nn.Module, x: Tensor, weight: Tensor) -> None:
        """Add the squares of the columns."""
        self._add(owner, weight, self._sums(x, -2).unsqueeze(-1))

    def convolved(self, owner: nn.Module, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> None:
        """Add the squares of the channels."""
        *_, transposed, _, groups = options
        channels = self._sums(x.transpose(0, 1).flatten(1), 1).view(groups, -1, *[1] * (weight.dim() - 2))
        if transposed:  # [in, out / groups, ...]
            self._add(owner, weight, channels.flatten(0, 1).unsqueeze(1))
        else:  # group g of the filters sees the g-th share of the channels
            self._add(owner, weight, channels.repeat_interleave(weight.shape[0] // groups, dim=0))

    def _sums(self, x: Tensor, dim: int) -> Tensor:
        """The sums of the squares over a dimension, in float32, or in float64 where that has not the range."""
        self.entries += x.numel()
        x = x if x.layout == torch.strided else x.to_dense()
        size = x.abs() if x.is_complex() else x
        if size.dtype == torch.float64:
            sums = size.square().sum(dim)
            lost = (sums < torch.finfo(sums.dtype).tiny) & (size.amax(dim) > 0) if size.numel() else sums.new_zeros(())
            if bool(lost.any()):
                self.wrong(f"{self._input()} is too small to be squared: scale it up")
            return self._finite(sums, size)
        sums = size.float().square().sum(dim)
        unsure = ~((sums >= _SQUARES_FROM) & sums.isfinite())
        if not bool(unsure.any()):
            return sums
        exact = size.double().square().sum(dim)
        return sums if not bool((exact[unsure] > 0).any()) and bool(exact.isfinite().all()) else self._finite(exact, x)

    def _finite(self, sums: Tensor, x: Tensor) -> Tensor:
        if not bool(sums.isfinite().all()):
            what = "is too large to be squared" if bool(x.isfinite().all()) else "contains NaN or infinities"
            self.wrong(f"{self._input()} {what}")
        return sums

    def _input(self) -> str:
        name = next((name for name, m in self._model.named_modules() if m is self.running), "")
        return f"what the weight of {name or '(model)'!r} multiplies"

    def _add(self, owner: nn.Module, weight: Tensor, squares: Tensor) -> None:
        """Add to the squares of the entries of the weight, through its copies to the parameter itself."""
        if weight.layout == torch.strided:
            self._add_at(owner, place(weight), squares.expand(weight.shape))

    def _add_at(self, owner: nn.Module, at: Place, squares: Tensor) -> None:
        copy = self.copied_from(at)
        if copy is not None:
            total = _added(None, at, squares)
            back = total.as_strided(copy.result.size, copy.result.stride, copy.result.offset)
            if copy.indices is not None:
                gathered = back.new_zeros(copy.source.size)
                # as an operator it takes None, for an axis that was taken whole; as a method it does not
                back = aten.index_put_(gathered, list(copy.indices), back, True)
            self._add_at(owner, copy.source, back)
        elif at.memory in self.parameters:
            key = (at.memory, at.entries, owner)
            self._squares[key] = _added(self._squares.get(key), at, squares)


def _added(total: Tensor | None, at: Place, squares: Tensor) -> Tensor:
    """The squares added to a total over the whole of a memory, at a place in it."""
    if total is None:
        total = torch.zeros(at.entries, dtype=squares.dtype, device=squares.device)
    total = total.to(torch.promote_types(total.dtype, squares.dtype))
    if _overlaps(at):  # entries that share memory, as where one matrix is expanded over a batch
        entries = torch.arange(at.entries, device=total.device).as_strided(at.size, at.stride, at.offset)
        return total.index_add_(0, entries.reshape(-1), squares.reshape(-1).to(total.dtype))
    total.as_strided(at.size, at.stride, at.offset).add_(squares)
    return total


def _overlaps(at: Place) -> bool:
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(at.stride, at.size, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False

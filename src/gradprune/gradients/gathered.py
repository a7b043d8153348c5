"""Which gradients does one clip bound, and may they be written? All are looked at before the first is (chapter 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.gradients.cliplog import Call, ClipLog
from gradprune.gradients.nonfinite import NonFinite, known, warn_of_zeroed
from gradprune.gradients.norms import count_over, largest_of, norm_of
from gradprune.gradients.params import Params, read_once, require_trainable, with_gradient

_is_contiguous, _is_neg = Tensor.is_contiguous, Tensor.is_neg
_is_inference, _data_ptr = Tensor.is_inference, Tensor.data_ptr
_DOUBLE = {torch.float64, torch.complex128}
_NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


class Gathered:
    """The gradients of one call: `values` are dense tensors to read and to write, `commit` makes the writing count."""

    def __init__(self, params: Params, nonfinite: NonFinite, log: ClipLog | None, kind: str) -> None:
        self.nonfinite, self.log, self.kind = known(nonfinite), log, kind
        if log is not None:
            require_log(log)._require_kind(kind)
        self._params = read_once(params)
        self._names: list[str] | None = None  # of 200 tensors, names alone would take a third of the time of a norm
        pairs = _plain(self._params)
        if pairs is None:
            held = with_gradient(self._params)
            pairs, self._names = [(p, p.grad) for p in held.values() if p.grad is not None], list(held)
        self.parameters: list[Tensor] = [parameter for parameter, _ in pairs]
        self.values = self.grads = [grad for _, grad in pairs]
        self._summed: list[tuple[Tensor, Tensor]] = []
        if not ({grad.dtype for grad in self.grads} <= _NUMBERS and _all_ordinary(self.grads)):
            require_clippable(dict(zip(self.names, self.grads, strict=True)))
            if any(grad.is_sparse for grad in self.grads):
                self.values = [self._dense(grad) for grad in self.grads]
        self.dtypes = {value.dtype for value in self.values}
        self.double = not _DOUBLE.isdisjoint(self.dtypes)

    @property
    def names(self) -> list[str]:
        """The names of the gradients' parameters, or their positions."""
        if self._names is None:
            self._names = list(with_gradient(self._params))
        return self._names

    @property
    def sizes(self) -> list[int]:
        """How many entries each gradient has."""
        return [grad.numel() for grad in self.grads]

    @property
    def counts(self) -> bool:
        """Whether it matters how many entries were bounded."""
        return self.log is not None

    def norm(self, p: float) -> float:
        """The p-norm of all entries."""
        return norm_of(self.values, p)

    def largest(self, *, join: bool = False) -> list[float]:
        """The largest magnitude of each gradient, as ``largest_of`` returns them."""
        return largest_of(self.values, join=join)

    def over(self, limits: Mapping[torch.dtype, float]) -> int:
        """How many entries are larger in magnitude than their dtype's limit."""
        return sum(count_over(value, limits[value.dtype]) for value in self.values)

    def _not_finite(self, at: int) -> int:
        return int(torch.isfinite(self.values[at]).logical_not().sum())

    def _dense(self, grad: Tensor) -> Tensor:
        if not grad.is_sparse:
            return grad
        summed = grad.coalesce()
        if summed is not grad:
            self._summed.append((grad, summed))
        return summed.values()

    def settle(self, largest: Sequence[float]) -> bool:
        """Deal with the gradients whose `largest` is not finite; return whether the call has nothing left to do."""
        bad = [at for at, most in enumerate(largest) if not math.isfinite(most)]
        if self.nonfinite == "raise":
            at = bad[0]
            count = self._not_finite(at)
            others = f", and those of {len(bad) - 1} others neither" if len(bad) > 1 else ""
            raise ValueError(
                f"the gradient of {self.names[at]!r} is not finite in {count} of {self.sizes[at]} entries"
                f"{others}; nothing was changed. nonfinite='zero' sets such a gradient to zero, 'skip' all of them, "
                "'leave' leaves all to a gradient scaler that skips the step"
            )
        if self.log is not None:
            for at in bad:
                self.log.nonfinite[self.names[at]] = self.log.nonfinite.get(self.names[at], 0) + 1
        elif self.nonfinite != "leave":
            warn_of_zeroed(self.names[bad[0]], self.nonfinite, "Pass log=gp.ClipLog() to count such cases instead")
        zeroed = {"zero": bad, "skip": range(len(self.grads)), "leave": []}[self.nonfinite]
        for at in zeroed:
            self.grads[at].zero_()
            if self.values[at] is not self.grads[at]:
                self.values[at].zero_()
        return self.nonfinite != "zero"

    def commit(self) -> None:
        """Give the sparse gradients that had to be summed what was written into their sums."""
        for grad, summed in self._summed:
            grad.copy_(summed)

    def note(self, size: float, bound: float, factor: float, share: float) -> None:
        """Note in the log what the call did."""
        if self.log is not None:
            self.log._note(self.kind, Call(size, bound, factor, share), skipped=False)

    def note_settled(self, size: float, bound: float) -> None:
        """Note a call that ended because a gradient was not finite."""
        skipped = self.nonfinite == "skip"
        if self.log is not None:
            self.log._note(self.kind, Call(size, bound, *((0.0, 1.0) if skipped else (1.0, 0.0))), skipped=skipped)


def require_log(log: Any) -> ClipLog:
    """Return a log, or raise TypeError."""
    if not isinstance(log, ClipLog):
        raise TypeError(f"log must be a gp.ClipLog() or None, got {type(log).__name__}")
    return log


def _plain(params: Tensor | nn.Module | list[Any]) -> list[tuple[Tensor, Tensor]] | None:
    """Parameters and gradients of those that have one, where `params` is no more than tensors, each once; else None."""
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    tensors = [params] if isinstance(params, Tensor) else params
    if {*map(type, tensors)} - {Tensor, nn.Parameter} or len({*map(id, tensors)}) < len(tensors):
        return None
    found = [(tensor, grad) for tensor in tensors if (grad := tensor.grad) is not None]
    if not found:
        require_trainable(tensors)
    return found


def _all_ordinary(grads: list[Tensor]) -> bool:
    """Whether nothing can be wrong with any, by looks that take a quarter of a microsecond a tensor."""
    if {*map(type, grads)} - {Tensor} or {grad.layout for grad in grads} - {torch.strided}:
        return False
    places = {*map(_data_ptr, grads)}  # 0 of an empty one, and of one on the meta device
    return (
        len(places) == len(grads)
        and 0 not in places
        and {*map(_is_contiguous, grads)} <= {True}
        and not (True in map(_is_neg, grads) or True in map(_is_inference, grads))
    )


def require_clippable(grads: Mapping[str, Tensor]) -> None:
    """Raise, naming it, where a gradient cannot be read and written in place, or two are on one memory."""
    for name, grad in grads.items():
        if grad.layout == torch.sparse_coo and type(grad) is Tensor and not grad.is_meta:
            checks.require_writable(name, grad._values(), "gradient of")
        elif type(grad) is Tensor and grad.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(f"the gradient of {name!r} is of layout {grad.layout}; only dense and COO can be clipped")
        else:
            checks.require_writable(name, grad, "gradient of")
        if grad.dtype not in _NUMBERS:
            raise TypeError(f"the gradient of {name!r} is {grad.dtype}; only floating and complex ones can be bounded")
    require_own_memory((n, g) for n, g in grads.items() if type(g) is Tensor and not g.is_sparse)


def require_own_memory(grads: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError, naming both, where two gradients begin at one place in memory."""
    owners: dict[tuple[torch.device, int], str] = {}
    for name, grad in grads:
        owner = owners.setdefault((grad.device, grad.data_ptr()), name) if grad.numel() else name
        if owner != name:
            raise ValueError(f"the gradients of {owner!r} and {name!r} are on one memory: give each a clone of its own")

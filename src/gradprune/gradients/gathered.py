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
from gradprune.gradients.params import Params, read_once, require_trainable, with_gradient

_NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}


class Gathered:
    """The gradients of one call: `values` are dense tensors to read and to write, `commit` makes the writing count."""

    def __init__(self, params: Params, nonfinite: NonFinite, log: ClipLog | None, kind: str) -> None:
        self.nonfinite, self.log, self.kind = known(nonfinite), log, kind
        if log is not None:
            require_log(log).require_kind(kind)
        self._params = read_once(params)
        self._names: list[str] | None = None  # of 200 tensors, names alone would take a third of the time of a norm
        parameters = _plain(self._params)
        if parameters is None:
            held = with_gradient(self._params)
            parameters, self._names = list(held.values()), list(held)
        self.parameters = parameters
        self.grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        if not _all_ordinary(self.grads):
            require_clippable(dict(zip(self.names, self.grads, strict=True)))
        self.values = self.grads
        self._summed: list[tuple[Tensor, Tensor]] = []
        if any(grad.is_sparse for grad in self.grads):
            self.values = [self._dense(grad) for grad in self.grads]
        self._settled = False

    @property
    def names(self) -> list[str]:
        """The names of the gradients' parameters, or their positions."""
        if self._names is None:
            self._names = list(with_gradient(self._params))
        return self._names

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
            count = int(torch.isfinite(self.values[at]).logical_not().sum())
            others = f", and those of {len(bad) - 1} others neither" if len(bad) > 1 else ""
            raise ValueError(
                f"the gradient of {self.names[at]!r} is not finite in {count} of {self.grads[at].numel()} entries"
                f"{others}; nothing was changed. nonfinite='zero' sets such a gradient to zero, 'skip' all of them, "
                "'leave' leaves all to a gradient scaler that skips the step"
            )
        if self.log is not None:
            for at in bad:
                self.log.nonfinite[self.names[at]] = self.log.nonfinite.get(self.names[at], 0) + 1
        elif self.nonfinite != "leave":
            remedy = "Pass log=gp.ClipLog() to count such cases instead"
            warn_of_zeroed(self.names[bad[0]], self.nonfinite, remedy, 5 if self.kind == "norm" else 4)
        self._settled = self.nonfinite != "zero"
        zeroed = {"zero": bad, "skip": range(len(self.grads)), "leave": []}[self.nonfinite]
        for at in zeroed:
            self.grads[at].zero_()
            if self.values[at] is not self.grads[at]:
                self.values[at].zero_()
        return self._settled

    def commit(self) -> None:
        """Give the sparse gradients that had to be summed what was written into their sums."""
        for grad, summed in self._summed:
            grad.copy_(summed)

    def note(self, size: float, bound: float, factor: float, share: float) -> None:
        """Note in the log what the call did."""
        if self.log is not None:
            self.log.note(self.kind, Call(size, bound, factor, share), skipped=False)

    def note_settled(self, size: float, bound: float) -> None:
        """Note a call that ended because a gradient was not finite."""
        skipped = self.nonfinite == "skip"
        if self.log is not None:
            self.log.note(self.kind, Call(size, bound, *((0.0, 1.0) if skipped else (1.0, 0.0))), skipped=skipped)


def require_log(log: Any) -> ClipLog:
    """Return a log, or raise TypeError."""
    if not isinstance(log, ClipLog):
        raise TypeError(f"log must be a gp.ClipLog() or None, got {type(log).__name__}")
    return log


def _plain(params: Tensor | nn.Module | list[Any]) -> list[Tensor] | None:
    """The parameters with gradients, where `params` is no more than tensors, each once; else None."""
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    tensors = [params] if isinstance(params, Tensor) else params
    if {*map(type, tensors)} - {Tensor, nn.Parameter} or len({*map(id, tensors)}) < len(tensors):
        return None
    found = [tensor for tensor in tensors if tensor.grad is not None]
    if not found:
        require_trainable(tensors)
    return found


def _all_ordinary(grads: list[Tensor]) -> bool:
    """Whether nothing can be wrong with any, by looks that take a quarter of a microsecond a tensor."""
    return (
        {*map(type, grads)} <= {Tensor}
        and {grad.dtype for grad in grads} <= _NUMBERS
        and {grad.layout for grad in grads} <= {torch.strided}
        and all(map(Tensor.is_contiguous, grads))
        and not any(map(Tensor.is_neg, grads))
        and not any(map(Tensor.is_inference, grads))
        and not any(grad.is_meta for grad in grads)
        and len({grad.data_ptr() for grad in grads}) == len(grads)
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

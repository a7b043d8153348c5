"""How large a step may a gradient cause? Bound it by value, by norm or by unit before the step (chapter 2)."""

from __future__ import annotations

import bisect
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gradprune.gradients.cliplog import Call, ClipLog, checked_window, require_keys
from gradprune.gradients.norms import SMALL, count_over, grouped_by_device, largest_of, most_of, norm_of
from gradprune.gradients.params import Params, with_gradient
from gradprune.gradients.unitwise import (
    absent_units,
    cut_by_tensor,
    ratios_of,
    require_finite_weights,
    scale_units_,
    units_of,
)

NonFinite = Literal["raise", "zero", "skip"]
_DOUBLE = {torch.float64, torch.complex128}


@torch.no_grad()
def clip_by_value_(params: Params, limit: float, *, nonfinite: NonFinite = "raise", log: ClipLog | None = None) -> None:
    """Bound every gradient entry to [-limit, limit], in place; of a complex entry the modulus, and it keeps its phase.

    Changes the direction of the step: large entries lose more than small ones. `params` is a tensor, an iterable of
    tensors or of (name, tensor) pairs, or a model; what has no gradient is passed over, sparse gradients are summed
    first. `log` notes how often and how hard it engaged.

    `nonfinite` says what becomes of a gradient with an entry that is not finite: "raise" leaves everything as it was
    and raises, "zero" sets that whole gradient to zero, "skip" sets all of them to zero; momentum and weight
    decay still act in the step that follows. The last two count in `log`, and warn where there is none.

    Raises ValueError where limit <= 0, where `log` is of another kind of clipping, and where an entry is not finite
    under "raise", naming the parameter; TypeError for a gradient that is neither dense nor sparse COO.
    Chapter 2, equation 2.2; Mikolov (2012).
    """
    limit = _require_positive("limit", limit)
    found = _Gradients(params, nonfinite, log, "value")
    size = most = most_of(largest_of(found.values, join=True))
    if not math.isfinite(size):
        if found.settle(largest_of(found.values)):
            return found.note(size, limit, 0.0, 1.0)
        most = most_of(largest_of(found.values))
    if most <= limit:
        return found.note(size, limit, 1.0, 0.0)
    share = 0.0
    if log is not None:
        share = sum(count_over(v, limit) for v in found.values) / sum(g.numel() for g in found.grads)
    _clamp_(found.values, limit)
    found.commit()
    return found.note(size, limit, limit / most, share)


@torch.no_grad()
def clip_by_norm_(
    params: Params,
    max_norm: float,
    *,
    norm_type: float = 2.0,
    nonfinite: NonFinite = "raise",
    log: ClipLog | None = None,
) -> Tensor:
    """Scale all gradients by one factor, in place, so that their common norm is at most `max_norm`; return it before.

    Keeps the direction of the step. The factor is min(1, max_norm / (norm + 1e-6)), as in
    ``torch.nn.utils.clip_grad_norm_``, and where it is 1 nothing is written. `norm_type` is any p > 0, or infinity. The
    norm is that of all gradients as one vector, a 0-d tensor on the first one's device, of float32, or of float64 where
    a gradient is or where float32 could not hold it; it is right also where powers of the entries leave the range of
    their dtype. `params`, `nonfinite` and `log` are as for :func:`clip_by_value_`; the norm returned is not finite
    where a gradient was not. An accelerator is waited for once a call, which is what raising before the change costs.

    Raises ValueError where max_norm <= 0 or norm_type <= 0, and where an entry is not finite under "raise", naming the
    parameter. Chapter 2, equation 2.3; Pascanu et al. (2013), algorithm 1.
    """
    max_norm = _require_positive("max_norm", max_norm)
    return _clip_by_norm_(_Gradients(params, nonfinite, log, "norm"), lambda _: max_norm, norm_type)


@torch.no_grad()
def clip_adaptive_(
    params: Params,
    factor: float = 0.01,
    *,
    eps: float = 1e-3,
    nonfinite: NonFinite = "raise",
    log: ClipLog | None = None,
) -> None:
    """Bound the gradient of each unit by `factor` times the norm of that unit's weights, but at least of `eps`.

    A unit is what one output is computed from: a row of a linear layer's weight, a filter of a convolution, the vector
    of one entry of an embedding, and a bias or any other 1-d or 0-d tensor as a whole. That is the first axis, except
    in transposed convolutions, which are told apart only where `params` is a model. Each unit keeps its direction; the
    step as a whole does not. Brock et al. do not clip the last linear layer: leave it out of `params` to do as they.
    `params`, `nonfinite` and `log` are as for :func:`clip_by_value_`.

    Raises ValueError where factor <= 0 or eps <= 0, where weights are not finite, where an entry of a gradient is not
    under "raise", naming the parameter, and for a sparse gradient whose rows are not whole.
    Chapter 2, equation 2.4; Brock et al. (2021), equation 3.
    """
    factor, eps = _require_positive("factor", factor), _require_positive("eps", eps)
    found = _Gradients(params, nonfinite, log, "adaptive")
    units = units_of(found, params)
    ratios, order = ratios_of(units, eps, precise=factor * eps < 1e-12)
    size = float(ratios.max()) if len(ratios) else 0.0
    if not math.isfinite(size):  # rather a sum of squares out of range than a gradient: look again
        ratios, order = ratios_of(units, eps, precise=True)
        by_tensor = [float(ratio.max()) if len(ratio) else 0.0 for ratio in cut_by_tensor(ratios, order)]
        size = most_of(by_tensor)
        if not math.isfinite(size):
            require_finite_weights(found.names, units)
            if found.settle(by_tensor):
                return found.note(size, factor, 0.0, 1.0)
            ratios = ratios.where(ratios.isfinite(), 0.0)
    bounded, least = 0, 1.0
    over = (ratios > factor).cpu()
    if bool(over.any()):
        scales = torch.where(ratios > factor, factor / ratios, 1.0)
        scale_units_(units, scales, over, order)
        found.commit()
        bounded, least = int(over.sum()), float(scales.min())
    return found.note(size, factor, least, bounded / max(1, len(over) + absent_units(found)))


class AutoClip:
    """Clip by norm at a percentile of the norms seen so far: ``clip_ = gp.AutoClip(10.0)``, then ``clip_(params)``.

    A call takes the norm of the gradients into its history, finds the `percentile`-th percentile of it by linear
    interpolation, clips to that, and returns the norm before. The history is the last `window` norms; norms that are
    not finite or zero do not enter it, since they say nothing about what is usual. `threshold` is what was clipped to
    last. `nonfinite` and `log` are as for :func:`clip_by_value_`.

    Raises ValueError where percentile is not in [0, 100], where window < 1, and in a call as :func:`clip_by_norm_`.
    Chapter 2; Seetharaman et al. (2020), who keep all norms.
    """

    def __init__(
        self,
        percentile: float = 10.0,
        *,
        window: int = 1000,
        nonfinite: NonFinite = "raise",
        log: ClipLog | None = None,
    ) -> None:
        self.percentile, self.window = _percentile(percentile), checked_window(window)
        self.nonfinite, self.log = _known(nonfinite), log
        self.threshold = math.inf
        self._norms: deque[float] = deque(maxlen=self.window)
        self._sorted: list[float] = []

    @property
    def norms(self) -> list[float]:
        """The history, oldest first."""
        return list(self._norms)

    @torch.no_grad()
    def __call__(self, params: Params) -> Tensor:
        """Clip the gradients of `params` in place; return their norm before."""
        return _clip_by_norm_(_Gradients(params, self.nonfinite, self.log, "norm"), self._learn, 2.0)

    def _learn(self, norm: float) -> float:
        """Take the norm into the history; return what to clip to now."""
        if norm > 0:
            if len(self._norms) == self.window:
                self._sorted.pop(bisect.bisect_left(self._sorted, self._norms[0]))
            self._norms.append(norm)
            bisect.insort(self._sorted, norm)
        if self._sorted:
            at = self.percentile / 100 * (len(self._sorted) - 1)
            low, high = self._sorted[math.floor(at)], self._sorted[math.ceil(at)]
            self.threshold = low + (high - low) * (at - math.floor(at))
        return self.threshold

    def state_dict(self) -> dict[str, Any]:
        """Percentile, window, threshold and history: what ``load_state_dict`` needs to go on from here."""
        return {
            "percentile": self.percentile,
            "window": self.window,
            "threshold": self.threshold,
            "norms": self.norms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Raises ValueError, before anything is changed, where it is not a state of this class.
        """
        require_keys(state, self.state_dict())
        percentile, window = _percentile(state["percentile"]), checked_window(state["window"])
        norms = [float(norm) for norm in state["norms"]]
        if len(norms) > window or not all(0 < norm < math.inf for norm in norms):
            raise ValueError(f"the state's norms must be at most {window}, each positive and finite")
        self.percentile, self.window, self.threshold = percentile, window, float(state["threshold"])
        self._norms, self._sorted = deque(norms, maxlen=window), sorted(norms)


class _Gradients:
    """The gradients of one call: `values` are dense tensors to read and to write, `commit` makes the writing count."""

    def __init__(self, params: Params, nonfinite: NonFinite, log: ClipLog | None, kind: str) -> None:
        self.nonfinite, self.log, self.kind = _known(nonfinite), log, kind
        if log is not None:
            log._require_kind(kind)
        self._params = params if isinstance(params, Tensor | nn.Module) else list(params)  # a generator is read once
        self._names: list[str] | None = None  # of 200 tensors, names alone would take a third of the time of a norm
        plain = _plain(self._params)
        if plain is None:
            held = with_gradient(self._params)
            plain, self._names = list(held.values()), list(held)
        self.parameters = plain
        self.grads: list[Tensor] = [p.grad for p in self.parameters if p.grad is not None]
        self.values = self.grads
        self._summed: list[tuple[Tensor, Tensor]] = []
        if {grad.layout for grad in self.grads} - {torch.strided}:
            self.values = [self._dense(name, grad) for name, grad in zip(self.names, self.grads, strict=True)]
        self._skipped = False

    @property
    def names(self) -> list[str]:
        """The names of the gradients' parameters, or their positions."""
        if self._names is None:
            self._names = list(with_gradient(self._params))
        return self._names

    def _dense(self, name: str, grad: Tensor) -> Tensor:
        if grad.layout == torch.strided:
            return grad
        if grad.layout != torch.sparse_coo:
            raise TypeError(f"the gradient of {name!r} is of layout {grad.layout}; only dense and COO can be clipped")
        summed = grad.coalesce()
        if summed is not grad:
            self._summed.append((grad, summed))
        return summed.values()

    def settle(self, largest: Sequence[float]) -> bool:
        """Deal with the gradients whose `largest` is not finite; return whether the call has nothing left to do."""
        bad = [at for at, most in enumerate(largest) if not math.isfinite(most)]
        if self.nonfinite == "raise":
            at = bad[0]
            entries = int(torch.isfinite(self.values[at]).logical_not().sum())
            others = f", and those of {len(bad) - 1} others neither" if len(bad) > 1 else ""
            raise ValueError(
                f"the gradient of {self.names[at]!r} is not finite in {entries} of {self.grads[at].numel()} entries"
                f"{others}; nothing was changed. nonfinite='zero' sets such a gradient to zero, 'skip' all of them"
            )
        if self.log is None:
            what = "it was" if self.nonfinite == "zero" else "all gradients were"
            warnings.warn(
                f"the gradient of {self.names[bad[0]]!r} is not finite; {what} set to zero. Pass log=gp.ClipLog() to "
                "count such cases instead",
                RuntimeWarning,
                stacklevel=5 if self.kind == "norm" else 4,
            )
        else:
            for at in bad:
                self.log.nonfinite[self.names[at]] = self.log.nonfinite.get(self.names[at], 0) + 1
        self._skipped = self.nonfinite == "skip"
        for at in range(len(self.grads)) if self._skipped else bad:
            self.grads[at].zero_()
            if self.values[at] is not self.grads[at]:
                self.values[at].zero_()
        return self._skipped

    def commit(self) -> None:
        """Give the sparse gradients that had to be summed what was written into their sums."""
        for grad, summed in self._summed:
            grad.copy_(summed)

    def note(self, size: float, bound: float, factor: float, share: float) -> None:
        if self.log is not None:
            self.log._note(self.kind, Call(size, bound, factor, share), skipped=self._skipped)


def _plain(params: Tensor | nn.Module | list[Any]) -> list[Tensor] | None:
    """The parameters with gradients, where `params` is no more than tensors, each once; else None."""
    if isinstance(params, nn.Module):
        params = list(params.parameters())
    tensors = [params] if isinstance(params, Tensor) else params
    if {*map(type, tensors)} - {Tensor, nn.Parameter} or len({*map(id, tensors)}) < len(tensors):
        return None
    return [tensor for tensor in tensors if tensor.grad is not None]


def _clip_by_norm_(found: _Gradients, bound: Callable[[float], float], norm_type: float) -> Tensor:
    """Clip to `bound` of the norm; return the norm before."""
    p = _order(norm_type)
    if not found.grads:
        found.note(0.0, bound(0.0), 1.0, 0.0)
        return torch.tensor(0.0)
    norm = rest = norm_of(found.values, p)
    if not math.isfinite(norm):
        if found.settle(largest_of(found.values)):
            found.note(norm, bound(0.0), 0.0, 1.0)
            return _as_tensor(norm, found.values)
        rest = norm_of(found.values, p)
    max_norm = bound(norm if rest == norm else 0.0)  # what is left of a norm says nothing about what is usual
    factor = min(1.0, max_norm / (rest + 1e-6))
    if factor < 1:
        _scale_(found.values, factor)
        found.commit()
    found.note(norm, max_norm, factor, float(rest > max_norm))
    return _as_tensor(norm, found.values)


def _as_tensor(norm: float, values: Sequence[Tensor]) -> Tensor:
    beyond = math.isfinite(norm) and not (1e-37 < norm < 3e38 or norm == 0)
    double = beyond or not _DOUBLE.isdisjoint({v.dtype for v in values})
    device = values[0].device
    return torch.tensor(norm, dtype=torch.float64 if double and device.type != "mps" else torch.float32, device=device)


def _scale_(values: Sequence[Tensor], factor: float) -> None:
    """Multiply by a factor; a tiny one in steps, since as a float32 it would be zero or have few digits."""
    while factor < 1e-30:
        _scale_(values, 1e-30)
        factor *= 1e30
    double = not _DOUBLE.isdisjoint({v.dtype for v in values})
    for device, here in grouped_by_device(values).items():
        # On the CPU a tensor of their dtype saves a conversion for each of them; elsewhere a number saves a transfer.
        scalar = torch.tensor(factor, dtype=torch.float64 if double else torch.float32)
        torch._foreach_mul_(here, scalar if device.type == "cpu" else factor)


def _clamp_(values: Sequence[Tensor], limit: float) -> None:
    """Clamp to [-limit, limit]; a large tensor on the CPU in one pass instead of two."""
    together = list(values)
    if any(v.is_complex() or v.numel() > SMALL for v in values):
        together = [v for v in values if not (v.is_complex() or (v.numel() > SMALL and v.device.type == "cpu"))]
        for value in values:
            if value.is_complex():
                value.mul_(limit / value.abs().clamp_(min=limit))
            elif value.numel() > SMALL and value.device.type == "cpu":
                value.clamp_(-limit, limit)
    for here in grouped_by_device(together).values() if together else ():
        torch._foreach_clamp_min_(here, -limit)
        torch._foreach_clamp_max_(here, limit)


def _require_positive(what: str, value: float) -> float:
    number = float(value)
    if not number > 0:
        raise ValueError(f"{what} must be positive, not {value}")
    return number


def _order(norm_type: float) -> float:
    p = float(norm_type)
    if not p > 0:
        raise ValueError(f"norm_type must be positive, or infinity, not {norm_type}")
    return p


def _known(nonfinite: NonFinite) -> NonFinite:
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f"nonfinite must be 'raise', 'zero' or 'skip', not {nonfinite!r}")
    return nonfinite


def _percentile(value: float) -> float:
    if not 0 <= float(value) <= 100:
        raise ValueError(f"percentile must be between 0 and 100, not {value}")
    return float(value)

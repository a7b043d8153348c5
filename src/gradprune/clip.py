"""How large a step may a gradient cause? Bound it by value, by norm or by unit before the step (chapter 2)."""

from __future__ import annotations

import bisect
import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.gradients import Params, with_gradient

NonFinite = Literal["raise", "zero", "skip"]

SMALL = 2**14
"""Tensors of at most so many entries are joined where one call can then serve all of them."""

_HALF = {torch.float16, torch.bfloat16}
_DOUBLE = {torch.float64, torch.complex128}
_CHUNK = 2**17  # entries that stay in cache


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
    size = most = _most(_largest(found.values, join=True))
    if not math.isfinite(size):
        if found.settle(_largest(found.values)):
            return found.note(size, limit, 0.0, 1.0)
        most = _most(_largest(found.values))
    if most <= limit:
        return found.note(size, limit, 1.0, 0.0)
    share = 0.0
    if log is not None:
        share = sum(_count_over(v, limit) for v in found.values) / sum(g.numel() for g in found.grads)
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
    units = _units(found, params)
    ratios, order = _ratios(units, eps, precise=factor * eps < 1e-12)
    size = float(ratios.max()) if len(ratios) else 0.0
    if not math.isfinite(size):  # rather a sum of squares out of range than a gradient: look again
        ratios, order = _ratios(units, eps, precise=True)
        by_tensor = [float(ratio.max()) if len(ratio) else 0.0 for ratio in _by_tensor(ratios, order)]
        size = _most(by_tensor)
        if not math.isfinite(size):
            _require_finite_weights(found.names, units)
            if found.settle(by_tensor):
                return found.note(size, factor, 0.0, 1.0)
            ratios = ratios.where(ratios.isfinite(), 0.0)
    bounded, least = 0, 1.0
    over = (ratios > factor).cpu()
    if bool(over.any()):
        scales = torch.where(ratios > factor, factor / ratios, 1.0)
        _scale_units_(units, scales, over, order)
        found.commit()
        bounded, least = int(over.sum()), float(scales.min())
    return found.note(size, factor, least, bounded / max(1, len(over) + _absent(found)))


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
        self.percentile, self.window = _percentile(percentile), _window(window)
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
        _require_keys(state, self.state_dict())
        percentile, window = _percentile(state["percentile"]), _window(state["window"])
        norms = [float(norm) for norm in state["norms"]]
        if len(norms) > window or not all(0 < norm < math.inf for norm in norms):
            raise ValueError(f"the state's norms must be at most {window}, each positive and finite")
        self.percentile, self.window, self.threshold = percentile, window, float(state["threshold"])
        self._norms, self._sorted = deque(norms, maxlen=window), sorted(norms)


class _Call(NamedTuple):
    size: float
    bound: float
    factor: float
    share: float


class ClipLog:
    """How often and how hard did clipping engage? Pass one as ``log=`` to a clip, call after call, and plot its lists.

    Counted over all calls: `calls`; `engaged`, those in which something was scaled down or skipped; `skipped`, those in
    which "skip" set everything to zero; and `nonfinite`, how often each parameter's gradient was not finite, by name.
    Kept of the last `window` calls, one list entry for each: `steps`, their numbers from 0; `sizes`, what was bounded,
    before (the norm; by value, the largest magnitude; adaptive, the largest norm of a unit's gradient over that of its
    weights); `bounds`, what it was bounded to; `factors`, the smallest factor that anything was scaled by (1 where
    nothing was, 0 where all was skipped); `shares`, how much was scaled (by norm, all or nothing; by value, of the
    entries; adaptive, of the units).

    A log is for one kind of clipping, since sizes of different kinds do not compare; it raises ValueError for a second
    kind, before anything is changed, and where window < 1. Chapter 2 reads one.
    """

    def __init__(self, window: int = 10_000) -> None:
        self.kind: str | None = None
        self.calls = self.engaged = self.skipped = 0
        self.nonfinite: dict[str, int] = {}
        self._rows: deque[_Call] = deque(maxlen=_window(window))

    @property
    def steps(self) -> list[int]:
        """The numbers of the calls that are kept, from 0."""
        return list(range(self.calls - len(self._rows), self.calls))

    @property
    def sizes(self) -> list[float]:
        """What was bounded, before it was."""
        return [row.size for row in self._rows]

    @property
    def bounds(self) -> list[float]:
        """What it was bounded to."""
        return [row.bound for row in self._rows]

    @property
    def factors(self) -> list[float]:
        """The smallest factor that anything was scaled by."""
        return [row.factor for row in self._rows]

    @property
    def shares(self) -> list[float]:
        """How much was scaled, 0 to 1."""
        return [row.share for row in self._rows]

    @property
    def rate(self) -> float:
        """The share of all calls in which clipping engaged; 0.0 before the first."""
        return self.engaged / self.calls if self.calls else 0.0

    def _require_kind(self, kind: str) -> None:
        if self.kind not in (None, kind):
            raise ValueError(f"this log is of clipping by {self.kind}; clipping by {kind} needs one of its own")

    def _note(self, kind: str, row: _Call, *, skipped: bool) -> None:
        self.kind = kind
        self.calls += 1
        self.engaged += row.share > 0
        self.skipped += skipped
        self._rows.append(row)

    def __repr__(self) -> str:
        least = min(self.factors, default=1.0)
        bad, kind = sum(self.nonfinite.values()), f"by {self.kind}, " if self.kind else ""
        return (
            f"ClipLog({kind}{self.calls} calls, engaged in {self.engaged} ({100 * self.rate:.1f} %), smallest factor "
            f"{least:.3g}, {bad} gradients not finite, {self.skipped} calls skipped)"
        )

    def state_dict(self) -> dict[str, Any]:
        """All counts and the kept calls: what ``load_state_dict`` needs to go on from here."""
        return {
            "kind": self.kind,
            "calls": self.calls,
            "engaged": self.engaged,
            "skipped": self.skipped,
            "nonfinite": dict(self.nonfinite),
            "window": self._rows.maxlen,
            "rows": [list(row) for row in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Raises ValueError, before anything is changed, where it is not a state of this class.
        """
        _require_keys(state, self.state_dict())
        window, rows = _window(state["window"]), [_Call(*row) for row in state["rows"]]
        if len(rows) > min(window, state["calls"]):
            raise ValueError(f"the state keeps {len(rows)} calls, of {state['calls']} and at most {window}")
        self.kind, self.nonfinite = state["kind"], dict(state["nonfinite"])
        self.calls, self.engaged, self.skipped = state["calls"], state["engaged"], state["skipped"]
        self._rows = deque(rows, maxlen=window)


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
            self.log._note(self.kind, _Call(size, bound, factor, share), skipped=self._skipped)


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
    norm = rest = _norm(found.values, p)
    if not math.isfinite(norm):
        if found.settle(_largest(found.values)):
            found.note(norm, bound(0.0), 0.0, 1.0)
            return _as_tensor(norm, found.values)
        rest = _norm(found.values, p)
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
    for device, here in _by_device(values).items():
        # On the CPU a tensor of their dtype saves a conversion for each of them; elsewhere a number saves a transfer.
        scalar = torch.tensor(factor, dtype=torch.float64 if double else torch.float32)
        torch._foreach_mul_(here, scalar if device.type == "cpu" else factor)


def _by_device(values: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    if len(devices := {value.device for value in values}) == 1:
        return {devices.pop(): list(values)}
    groups: dict[torch.device, list[Tensor]] = {}
    for value in values:
        groups.setdefault(value.device, []).append(value)
    return groups


def _norm(values: Sequence[Tensor], p: float) -> float:
    """The p-norm of all entries: in one pass, and in a second one, scaled, where powers may have left the range.

    The bounds leave room for 10^8 entries of which each lost all its digits. nan or inf where an entry is.
    """
    if p == math.inf:
        return _most(_largest(values))
    norms = [_plain_norm(here, p) for here in _by_device(values).values()]
    norm = norms[0] if len(norms) == 1 else _combined(norms, p)
    tiny = torch.finfo(torch.float32).tiny
    if (tiny * 1e15) ** (1 / p) < norm < math.inf:
        return norm
    most = _most(_largest(values))
    if not 0 < most < math.inf:
        return most
    scaled = [float(torch.linalg.vector_norm(_wide(v) / most, p)) if v.numel() else 0.0 for v in values]
    norm = most * _combined(scaled, p)
    if norm == math.inf:
        raise ValueError(f"the norm of order {p} of these gradients is beyond float64; take a larger norm_type")
    return norm


def _plain_norm(values: list[Tensor], p: float) -> float:
    """The p-norm of tensors on one device; half precision is summed in float32."""
    half, full = [], values
    if not _HALF.isdisjoint({v.dtype for v in values}):
        half, full = [v for v in values if v.dtype in _HALF], [v for v in values if v.dtype not in _HALF]
    norms = [*torch._foreach_norm(full, p)] if full else []
    for value in half:
        if value.device.type != "cpu" or not value.is_contiguous():
            norms.append(torch.linalg.vector_norm(value, p, dtype=torch.float32))
            continue
        copy = torch.empty(min(value.numel(), _CHUNK))  # of a piece: a float32 copy of all would leave the cache
        for chunk in value.view(-1).split(_CHUNK):
            norms.append(torch.linalg.vector_norm(copy[: len(chunk)].copy_(chunk), p))
    return float(torch.linalg.vector_norm(torch.stack(norms), p))


def _combined(norms: Sequence[float], p: float) -> float:
    """The p-norm of what has these norms."""
    most = _most(norms)
    if not 0 < most < math.inf:
        return most
    return most * float(math.fsum((norm / most) ** p for norm in norms) ** (1 / p))


def _wide(value: Tensor) -> Tensor:
    dtype = torch.complex128 if value.is_complex() else torch.float64
    return value.cpu().to(dtype) if value.device.type == "mps" else value.to(dtype)


def _largest(values: Sequence[Tensor], *, join: bool = False) -> list[float]:
    """The largest magnitude of each tensor; nan or inf where an entry is. One transfer a device.

    With `join`, small tensors of one dtype are looked at as one, which takes less time; what is returned is then in no
    particular order.
    """
    if join:
        values = _joined(values)
    found: list[float] = [0.0] * len(values)
    places: dict[torch.device, list[int]] = {}
    for at, value in enumerate(values):
        if value.numel():
            places.setdefault(value.device, []).append(at)
    for here in places.values():
        ends = [end for at in here for end in _ends(values[at])]
        read = torch.stack(ends).tolist()
        for place, low, high in zip(here, read[::2], read[1::2], strict=True):
            found[place] = max(-low, high) if low == low and high == high else math.nan
    return found


def _joined(values: Sequence[Tensor]) -> list[Tensor]:
    """All entries: the small tensors of one dtype and device in one vector, the others as they are."""
    alike: dict[Any, list[Tensor]] = {}
    for value in values:
        alike.setdefault((value.dtype, value.device) if value.numel() <= SMALL else id(value), []).append(value)
    return [same[0] if len(same) == 1 else torch.cat([v.reshape(-1) for v in same]) for same in alike.values()]


def _ends(value: Tensor) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(_wide(value).abs() if value.is_complex() else value)
    return (low, high) if value.dtype not in _HALF else (low.float(), high.float())


def _most(largest: Sequence[float]) -> float:
    """The largest, or nan where one is."""
    return math.nan if any(map(math.isnan, largest)) else max(largest, default=0.0)


def _count_over(value: Tensor, limit: float) -> int:
    chunks = value.view(-1).split(_CHUNK) if value.is_contiguous() else [value]
    return sum(int(torch.count_nonzero(chunk.abs() > limit)) for chunk in chunks)


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
    for here in _by_device(together).values() if together else ():
        torch._foreach_clamp_min_(here, -limit)
        torch._foreach_clamp_max_(here, limit)


_Unit = tuple[Tensor, Tensor, int]
"""A gradient, and the weights it belongs to, seen so that the first so many axes number the units."""


def _units(found: _Gradients, params: Params) -> list[_Unit]:
    groups = {}
    if isinstance(params, nn.Module):
        for module in params.modules():
            if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                groups[id(module.weight)] = module.groups
    if not groups and found.values is found.grads:
        return [(g, w, 1 if g.ndim > 1 else 0) for g, w in zip(found.grads, found.parameters, strict=True)]
    units: list[_Unit] = []
    for weight, grad, value in zip(found.parameters, found.grads, found.values, strict=True):
        if value.ndim < 2 and value is grad:
            units.append((value, weight, 0))
        elif id(weight) in groups:
            count = groups[id(weight)]
            units.append((_outputs_first(value, count), _outputs_first(weight, count), 2))
        elif value is grad:
            units.append((value, weight, 1))
        elif grad.ndim == 1:
            units.append((value, weight, 0))
        elif grad.sparse_dim() == 1:
            units.append((value, weight.index_select(0, grad.coalesce().indices()[0]), 1))
        else:
            raise ValueError(
                f"the sparse gradient of {found.names[len(units)]!r} has {grad.sparse_dim()} sparse axes; clipping by "
                "unit needs one, so that what it holds are whole rows"
            )
    return units


def _absent(found: _Gradients) -> int:
    """How many units the sparse gradients do not hold, since theirs is zero."""
    if found.values is found.grads:
        return 0
    pairs = zip(found.grads, found.values, strict=True)
    return sum(len(grad) - len(value) for grad, value in pairs if grad.is_sparse and grad.ndim > 1)


def _outputs_first(weight: Tensor, groups: int) -> Tensor:
    """See a transposed convolution's weight (in, out / groups, ...) as (groups, out / groups, in / groups, ...)."""
    seen: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return seen


def _require_finite_weights(names: Sequence[str], units: Sequence[_Unit]) -> None:
    for name, (_, weight, _) in zip(names, units, strict=True):
        if not bool(weight.isfinite().all()):
            raise ValueError(f"the weights of {name!r} are not finite, so no share of their norm can bound a gradient")


_Order = tuple[list[int], list[int]]
"""Of a vector over all units: the tensors in the order in which theirs come, and how many units each has."""


def _ratios(units: Sequence[_Unit], eps: float, *, precise: bool) -> tuple[Tensor, _Order]:
    """The norm of each unit's gradient over that of its weights, in one vector, and which tensor they belong to.

    Small tensors whose units have one shape are joined, so that two calls serve them all. With `precise`, the norms are
    right also where squares leave the range of the dtype.
    """
    alike: dict[Any, list[int]] = {}
    for at, (gradient, weight, axes) in enumerate(units):
        key: Any = (gradient.shape[axes:], axes, gradient.dtype, gradient.device)
        alike.setdefault(at if gradient.numel() > SMALL or weight.shape != gradient.shape else key, []).append(at)
    for key in [key for key, places in alike.items() if len(places) == 1 and not units[places[0]][2]]:
        (at,) = alike.pop(key)  # a unit by itself, and of a shape that no other has
        alike.setdefault(units[at][0].device, []).append(at)
    if not units:
        return torch.zeros(0), ([], [])
    of_gradients, of_weights = [], []
    for places in alike.values():
        axes = units[places[0]][2]
        of_gradients.append(_unit_norms([units[at][0] for at in places], axes, precise))
        of_weights.append(_unit_norms([units[at][1] for at in places], axes, precise))
    device = units[0][0].device
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    norms, weights = (torch.cat([n.to(device) for n in vectors]) for vectors in (of_gradients, of_weights))
    weights = weights.where(weights.isfinite(), math.nan).clamp_(min=eps)  # a share of infinity bounds nothing
    places = [at for group in alike.values() for at in group]
    counts = [
        grad.shape[0] if axes == 1 else grad.shape[:axes].numel() for grad, _, axes in (units[at] for at in places)
    ]
    return norms / weights, (places, counts)


def _unit_norms(tensors: list[Tensor], axes: int, precise: bool) -> Tensor:
    """The norms of the units of tensors, in one vector; the units have one shape, or each tensor is one."""
    if not axes and len({t.shape for t in tensors}) > 1:
        if precise:
            return torch.tensor([_norm([t], 2.0) for t in tensors], dtype=torch.float64, device=tensors[0].device)
        return torch.stack(torch._foreach_norm([t.float() if t.dtype in _HALF else t for t in tensors]))
    if len(tensors) == 1:
        (rows,) = tensors
    else:
        if not axes:  # a tensor is a unit
            rows = torch.stack(tensors)
        elif tensors[0].ndim == 2:
            rows = torch.cat(tensors)
        else:
            rows = torch.cat([t.flatten(0, axes - 1) for t in tensors])
        axes = 1
    units, rest = rows.shape[:axes], tuple(range(axes, rows.ndim))
    if not rows.numel():
        return torch.zeros(units.numel(), device=rows.device)
    if not rest:  # an entry is a unit
        return rows.abs().flatten()
    of_rows: Tensor
    if precise:
        rows = _wide(rows)
        most = rows.abs().amax(dim=rest, keepdim=True)
        most = most.where(most > 0, 1.0)
        of_rows = torch.linalg.vector_norm(rows / most, dim=rest) * most.view(units)
    else:
        of_rows = torch.linalg.vector_norm(rows.float() if rows.dtype in _HALF else rows, dim=rest)
    return of_rows.flatten()


def _by_tensor(joined: Tensor, order: _Order) -> list[Tensor]:
    """Cut a vector over all units into one a tensor, in the tensors' own order."""
    found = dict(zip(order[0], joined.split(order[1]), strict=True))
    return [found[place] for place in sorted(found)]


def _scale_units_(units: Sequence[_Unit], scales: Tensor, over: Tensor, order: _Order) -> None:
    """Multiply the units by their scales, in the tensors in which one is over its bound."""
    places, counts = order
    engaged = np.bincount(np.repeat(np.arange(len(counts)), counts)[over.numpy()], minlength=len(counts)).nonzero()[0]
    pieces = scales.split(counts)
    grads, factors = [], []
    for at in engaged.tolist():
        gradient, _, axes = units[places[at]]
        factor = pieces[at]
        if gradient.ndim == 2:
            factor = factor.unsqueeze(1)
        elif gradient.ndim != 1:
            factor = factor.view((*gradient.shape[:axes], *(1,) * (gradient.ndim - axes)))
        grads.append(gradient)
        if gradient.device != scales.device:
            factor = factor.to(gradient.device, torch.float32 if gradient.device.type == "mps" else scales.dtype)
        factors.append(factor)
    torch._foreach_mul_(grads, factors)


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


def _window(value: int | None) -> int:
    if value is None or value != int(value) or value < 1:
        raise ValueError(f"window must be a whole number of at least 1, not {value}")
    return int(value)


def _require_keys(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if missing := wanted.keys() - state.keys():
        raise ValueError(f"the state lacks {', '.join(map(repr, sorted(missing)))}: it is not one of this class")

"""Which entries of a gradient take part in the step, and what becomes of the others (chapter 3)?

Thresholding sets the small entries of a gradient to zero before the step. It makes the update sparse, not the model:
no parameter changes its value because its gradient was set to zero. What is left out is lost, unless ``ErrorFeedback``
keeps it for later. Every function reads all gradients first and changes them only when nothing is wrong with any.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradprune.core.checks import fraction
from gradprune.core.masked import count_kept, zero_pruned_
from gradprune.core.select import keep_largest
from gradprune.gradients.params import Params, by_name, with_gradient

Amount = float | Callable[[int], float]
Scope = Literal["global", "layer"]
Gradients = dict[str, Tensor]

PIECE = 2**18  # values that are summed at a time: their magnitudes stay in cache

_BITS_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def threshold_gradients_(params: Params, threshold: float | None = None, *, ratio: float | None = None) -> float:
    """Set every gradient entry with ``|g| < threshold`` to zero, in place; return the fraction kept.

    Exactly one of `threshold`, in the unit of the gradient, and `ratio` is given; ``ratio`` sets a threshold for each
    tensor, ``ratio`` times the mean of its ``|g|``. Kept entries keep every bit. For a threshold that changes, pass
    ``schedule(step)``. `params` is a tensor, an iterable of tensors or of (name, tensor) pairs, or a model; what has
    no gradient is left alone. Returns a number between 0 and 1, counted over all entries: 1.0 where there is none, and
    where the threshold is 0, as nothing lies below it.

    Raises ValueError, before any gradient is changed, where neither or both are given, where the number is negative
    or not finite, and where a gradient is sparse, complex or not finite (the parameter is named).
    Chapter 3, equations 3.1 and 3.3.
    """
    name, amount = _one_of(threshold=threshold, ratio=ratio)
    _require_not_negative(name, amount)
    gradients = _checked(with_gradient(params))
    cuts = [amount if ratio is None else amount * _mean_magnitude(g) for g in gradients.values()]
    kept = sum(_zero_below_(g, cut) for g, cut in zip(gradients.values(), cuts, strict=True))
    return _share(kept, gradients)


def keep_top_gradients_(params: Params, density: float, *, scope: Scope = "global") -> float:
    """Keep the `density` largest of all gradient entries by magnitude, exactly, set the others to zero, in place.

    Of N entries ``round(density * N)`` stay, and at least one where `density` is not 0; among equals the later
    position stays. ``scope="global"`` ranks the entries of all tensors together, ``"layer"`` keeps the same fraction
    of each. `params` as for ``threshold_gradients_``. Returns the fraction kept, 1.0 where there is no gradient.

    Raises ValueError, before any gradient is changed, where `density` is not in [0, 1], for an unknown scope, and
    where a gradient is sparse, complex or not finite (the parameter is named).
    Aji and Heafield (2017), for all tensors as one; chapter 3.
    """
    fraction("density", density)
    _require_scope(scope)
    gradients = _checked(with_gradient(params))
    masks = _largest(gradients, density, scope)
    zero_pruned_((g, masks[name]) for name, g in gradients.items())
    return _share(sum(map(count_kept, masks.values())), gradients)


class ErrorFeedback:
    """Send the large entries of the gradients, and let what is left out wait and be added to the next ones.

    Between ``backward()`` and the optimizer's step, ``step()`` adds to each gradient what waits for it, keeps the
    largest entries of the sum in ``.grad``, and lets the others wait. Nothing is lost: what was sent and what waits
    add up to the sum of all gradients, to the rounding of those additions.

    `params` is a tensor, an iterable of tensors or of (name, tensor) pairs, or a model. Exactly one rule is given:
    `density`, the fraction of the entries to send (as ``keep_top_gradients_``, with `scope`), or `threshold` or
    `ratio` (as ``threshold_gradients_``, of the sum). Each is a number or a function of the number of steps taken.
    The schedules of ``gradprune.schedule`` give the fraction to leave out: ``density=lambda t: 1 - schedule(t)``.

    With `momentum` m > 0 it is what waits that has momentum, not the optimizer: u = m u + g is kept for each entry
    and added to what waits; where an entry is sent, its u starts again from zero. Use a plain SGD without momentum of
    its own then. Deep Gradient Compression has two more parts: clip the gradients before ``step()``, to the norm
    over the square root of the number of workers (``clip_by_norm_``); and warm up, with a density that falls to its
    last value over the first epochs, such as ``lambda t: max(0.001, 0.25 ** (1 + t // steps_per_epoch))``.

    Memory: one residual for each parameter that has had a gradient, two with momentum, in float32 for half precision;
    during a step as much again. It holds no parameter alive, and drops the residual with the parameter. A parameter
    without a gradient takes no part in a step: what waits for it goes on waiting. What rounding to half precision
    takes off an entry that is sent waits, too.

    Call it once for each optimizer step: with accumulation, on the accumulated gradient; with an AMP scaler, after
    ``scaler.unscale_(optimizer)``.

    Raises ValueError, before anything is changed, for numbers out of range, an unknown scope, no parameters, and not
    exactly one rule. Seide et al. (2014) and Strom (2015) for the residual, Karimireddy et al. (2019) for why it helps,
    Lin et al. (2018), section 3, for momentum, clipping and warm-up. Chapter 3, equations 3.5 and 3.6.
    """

    def __init__(
        self,
        params: Params,
        density: Amount | None = None,
        *,
        threshold: Amount | None = None,
        ratio: Amount | None = None,
        scope: Scope = "global",
        momentum: float = 0.0,
    ) -> None:
        self._rule, self._given = _one_of(density=density, threshold=threshold, ratio=ratio)
        if not callable(self._given):
            _require_amount(self._rule, self._rule, self._given)
        _require_scope(scope)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self._scope: Scope = scope
        self._momentum = momentum
        self._steps = 0
        self._entries: dict[str, _Entry] = {}
        named = by_name(params)
        if not named:
            raise ValueError("params is empty; an iterator that was used up before cannot be used again")
        for name, parameter in named.items():
            self._entries[name] = _Entry(_reference(parameter, name, self._entries), {})

    def step(self) -> float:
        """Replace the gradients by what is sent now, in place; return its share of the entries, between 0 and 1.

        1.0 where no parameter has a gradient. Raises ValueError, before any gradient or residual is changed, where a
        gradient is sparse, complex, not finite or of another shape than what waits for it, where the sum leaves the
        range of the gradient's dtype, and where a schedule's number is out of range.
        """
        gradients = _checked(with_gradient(self._living().items()))
        amount = self._given(self._steps) if callable(self._given) else self._given
        _require_amount(f"{self._rule} at step {self._steps}", self._rule, amount)
        waiting = {name: self._waiting_with(name, gradient) for name, gradient in gradients.items()}
        sums = {name: kept["residuals"] for name, kept in waiting.items()}
        _require_in_range(sums, gradients)
        masks = self._choose(sums, amount)
        zero_pruned_((kept["velocities"], ~masks[name]) for name, kept in waiting.items() if "velocities" in kept)
        for name, gradient in gradients.items():
            gradient.copy_(sums[name])
        zero_pruned_((gradient, masks[name]) for name, gradient in gradients.items())
        for name, gradient in gradients.items():
            sums[name].sub_(gradient)  # exact: the entry is either the sum, rounded to the gradient's dtype, or zero
            self._entries[name].waiting.update(waiting[name])
        self._steps += 1
        return _share(sum(map(count_kept, masks.values())), gradients)

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self._steps

    @property
    def residuals(self) -> Mapping[str, Tensor]:
        """What waits for each parameter that has had a gradient, by name; to look at, not to change."""
        return MappingProxyType(self._all("residuals"))

    def state_dict(self) -> dict[str, Any]:
        """Steps, residuals and, with momentum, velocities: what ``load_state_dict`` needs to go on from here."""
        return {"steps": self._steps, "residuals": self._all("residuals"), "velocities": self._all("velocities")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken, bit for bit.

        Raises ValueError, before anything is changed, where it names a parameter that is not here, where a shape
        differs or a value is not finite, and where it has velocities and this has no momentum, or the reverse.
        """
        living = self._living()
        for kind in _KINDS:
            for name, tensor in state[kind].items():
                if name not in living:
                    raise ValueError(f"the state has {kind} of {name!r}, which is not among the parameters here")
                _require_shape(f"the state's {kind} of {name!r}", tensor, living[name])
            wrong = _not_finite(state[kind])
            if wrong is not None:
                raise ValueError(f"the state's {kind} of {wrong!r} are not finite")
        if state["residuals"] and bool(state["velocities"]) != bool(self._momentum):
            has = "has velocities" if state["velocities"] else "has no velocities"
            raise ValueError(f"the state {has}, and momentum here is {self._momentum}")
        self._steps = int(state["steps"])
        for name, entry in self._entries.items():
            entry.waiting.clear()
            entry.waiting.update({kind: state[kind][name].clone() for kind in _KINDS if name in state[kind]})

    def _living(self) -> dict[str, Tensor]:
        referents = {name: entry.parameter() for name, entry in self._entries.items()}
        return {name: parameter for name, parameter in referents.items() if parameter is not None}

    def _all(self, kind: str) -> dict[str, Tensor]:
        return {name: entry.waiting[kind] for name, entry in self._entries.items() if kind in entry.waiting}

    @torch.no_grad()
    def _waiting_with(self, name: str, gradient: Tensor) -> dict[str, Tensor]:
        """What would wait for this parameter if nothing was sent, in new tensors."""
        before = self._entries[name].waiting
        for kind, tensor in before.items():
            _require_shape(f"the {kind} of {name!r}", tensor, gradient)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        found, last = {}, gradient.to(wide)
        if self._momentum:
            if "velocities" in before:
                last = last + self._momentum * before["velocities"].to(gradient.device)
            found["velocities"] = last.clone() if last is gradient else last
        residual = before.get("residuals")
        found["residuals"] = last.clone() if residual is None else residual.to(gradient.device) + last
        return found

    def _choose(self, sums: Gradients, amount: float) -> dict[str, Tensor]:
        if self._rule == "density":
            return _largest(sums, amount, self._scope)
        cuts = {n: amount if self._rule == "threshold" else amount * _mean_magnitude(s) for n, s in sums.items()}
        return {name: s.abs() >= _at_least(cuts[name], s.dtype) for name, s in sums.items()}


class _Entry(NamedTuple):
    parameter: weakref.ref[Tensor]
    waiting: dict[str, Tensor]


_KINDS = ("residuals", "velocities")


def _reference(parameter: Tensor, name: str, entries: dict[str, _Entry]) -> weakref.ref[Tensor]:
    """A weak reference that takes the parameter's entry with it."""
    return weakref.ref(parameter, lambda _: entries.pop(name, None))


# ------------------------------------------------------------------------------------------------- what they share


def _checked(parameters: Mapping[str, Tensor]) -> Gradients:
    """The gradients by name, detached, once nothing is wrong with any of them."""
    gradients: Gradients = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        gradient = parameter.grad.detach()
        if gradient.layout != torch.strided:
            raise ValueError(
                f"the gradient of {name!r} is sparse ({gradient.layout}) already; leave that parameter out, "
                "or make its gradient dense first"
            )
        if not gradient.is_floating_point():
            raise ValueError(f"the gradient of {name!r} is {gradient.dtype}; thresholds are for real floating numbers")
        if any(stride == 0 and size > 1 for stride, size in zip(gradient.stride(), gradient.shape, strict=True)):
            raise ValueError(f"entries of the gradient of {name!r} share memory (it was expanded): clone it first")
        gradients[name] = gradient
    wrong = _not_finite(gradients)
    if wrong is not None:
        raise ValueError(
            f"the gradient of {wrong!r} is not finite (NaN or infinity): find out where it comes from, "
            "or bound it before it is thresholded"
        )
    return gradients


def _not_finite(values: Mapping[str, Tensor]) -> str | None:
    """The first name whose tensor has a NaN or an infinity: one pass each, no copy, one wait for an accelerator."""
    flags = {name: _extreme(v).isfinite() for name, v in values.items() if v.numel()}
    if not flags:
        return None
    home = next(iter(flags.values())).device
    finite = torch.stack([flag.to(home, non_blocking=True) for flag in flags.values()]).tolist()
    return next((name for name, fine in zip(flags, finite, strict=True) if not fine), None)


def _extreme(values: Tensor) -> Tensor:
    """The largest magnitude, without a copy; NaN where there is one."""
    return torch.stack(torch.aminmax(values)).abs().amax()


def _largest(values: Gradients, density: float, scope: Scope) -> dict[str, Tensor]:
    groups = [values] if scope == "global" else [{name: v} for name, v in values.items()]
    masks: dict[str, Tensor] = {}
    for group in groups:
        total = sum(v.numel() for v in group.values())
        count = max(round(density * total), min(1, total)) if density else 0
        masks |= zip(group, keep_largest(group, count, by="magnitude"), strict=True)
    return masks


def _mean_magnitude(values: Tensor) -> float:
    """The mean of |values|, summed in float64, and never above the largest of them, as rounding might have it."""
    if not values.numel():
        return 0.0
    if values.device.type == "cpu":
        pieces = values.reshape(-1).split(PIECE)
        as_numpy = (p.numpy() if p.dtype != torch.bfloat16 else p.float().numpy() for p in pieces)
        total = sum(float(np.abs(piece).sum(dtype=np.float64)) for piece in as_numpy)
    else:
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        total = float(torch.linalg.vector_norm(values, 1, dtype=wide))
    return min(total / values.numel(), float(_extreme(values)))


def _at_least(cut: float, dtype: torch.dtype) -> float:
    """The smallest number of `dtype` that is not below `cut`: comparing with it is comparing with `cut` exactly."""
    nearest = torch.tensor(cut, dtype=torch.float64).to(dtype)
    return float(_neighbour(nearest, 1) if nearest.double() < cut else nearest)


def _neighbour(value: Tensor, way: Literal[1, -1]) -> Tensor:
    """The next larger or smaller number of the dtype; `value` is not negative. torch's own lacks half precision."""
    return (value.view(_BITS_OF_SIZE[value.element_size()]) + way).view(value.dtype)


def _zero_below_(values: Tensor, cut: float) -> int:
    """Zero what is below `cut` in magnitude, in one pass at the speed of memory; return how many entries stay."""
    if cut == 0:
        return values.numel()
    at_least = torch.tensor(_at_least(cut, values.dtype), dtype=values.dtype)
    torch.hardshrink(values, float(_neighbour(at_least, -1)), out=values)  # zeroes what is at most that
    if values.device.type == "cpu":  # what stays is not zero; NumPy counts much faster than torch
        return int(np.count_nonzero(values.view(_BITS_OF_SIZE[values.element_size()]).numpy()))
    return int(torch.count_nonzero(values))


def _share(kept: int, gradients: Gradients) -> float:
    total = sum(g.numel() for g in gradients.values())
    return kept / total if total else 1.0


def _one_of(**given: Any) -> tuple[str, Any]:
    """The name and value of the one argument that is not None."""
    found = [(name, value) for name, value in given.items() if value is not None]
    if len(found) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}; got {', '.join(n for n, _ in found) or 'none'}")
    return found[0]


def _require_amount(called: str, rule: str, value: float) -> None:
    (fraction if rule == "density" else _require_not_negative)(called, value)


def _require_not_negative(called: str, value: float) -> None:
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{called} must be a finite number of at least 0, got {value}")


def _require_scope(scope: str) -> None:
    if scope not in ("global", "layer"):
        raise ValueError(f'scope must be "global" or "layer", got {scope!r}')


def _require_shape(called: str, tensor: Tensor, wanted: Tensor) -> None:
    if tensor.shape != wanted.shape:
        raise ValueError(f"{called} have shape {tuple(tensor.shape)}, the parameter has shape {tuple(wanted.shape)}")


def _require_in_range(sums: Gradients, gradients: Gradients) -> None:
    for name, values in sums.items():
        dtype = gradients[name].dtype
        if values.numel() and not bool(_extreme(values) <= torch.finfo(dtype).max):
            raise ValueError(f"the gradient of {name!r} plus what waits for it leaves the range of {dtype}")

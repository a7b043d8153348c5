"""How large a step may a gradient cause? Bound it by value, by norm or by unit before the step (chapter 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradprune.core import checks
from gradprune.core.words import in_our_words
from gradprune.gradients.cliplog import ClipLog
from gradprune.gradients.gathered import Gathered
from gradprune.gradients.nonfinite import NonFinite
from gradprune.gradients.norms import SMALL, grouped_by_device, most_of
from gradprune.gradients.params import Params
from gradprune.gradients.representable import at_most
from gradprune.gradients.spread import GatheredOverRanks, gathered
from gradprune.gradients.unitwise import (
    absent_units,
    cut_by_tensor,
    ratios_of,
    require_finite_weights,
    room_for_rounding,
    scale_units_,
    units_of,
)

_AS_TORCH = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm before it divides


@in_our_words
@torch.no_grad()
def clip_by_value_(params: Params, limit: float, *, nonfinite: NonFinite = "raise", log: ClipLog | None = None) -> None:
    """Bound every gradient entry to [-limit, limit], in place; of a complex entry the modulus, and it keeps its phase.

    Changes the direction of the step: large entries lose more than small ones. No entry is above `limit` afterwards,
    also where the dtype has no such number: then it is the next one below.

    Args:
        params: a tensor, an iterable of tensors or of (name, tensor) pairs, or a model. What has no gradient is passed
            over; sparse COO gradients are summed first.
            Where parameters are DTensors (FSDP2, hybrid sharding, tensor parallel), all ranks call this together
            and ask the same, and each does to its blocks what one process would do.
        limit: the largest magnitude, positive, in the unit of the gradient.
        nonfinite: what becomes of a gradient with an entry that is NaN or infinite. "raise" changes nothing and raises;
            "zero" sets that whole gradient to zero; "skip" sets all of them to zero (momentum and weight decay still
            act in the step that follows); "leave" changes nothing, for a gradient scaler that skips the step itself:
            ``scaler.unscale_(optimizer)``, clip with "leave", ``scaler.step(optimizer)``, ``scaler.update()``. "zero"
            and "skip" warn where there is no `log`.
        log: where to note how often and how hard it engaged.

    Raises:
        TypeError: for arguments of another kind, and a gradient that is neither dense nor sparse COO.
        ValueError: for a limit that is not positive, a `log` of another kind of clipping, an iterator that was used up,
            a gradient that cannot be written, and, under "raise", an entry that is not finite. Nothing is changed then.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -0.5])
        >>> gp.clip_by_value_(weight, 1.0)
        >>> weight.grad
        tensor([ 1.0000, -0.5000])

    Mikolov (2012); chapter 2, equation 2.5.
    """
    asked = lambda: {"limit": checks.number("limit", limit, above=0.0, finite=False)}  # noqa: E731
    found, given = gathered(params, nonfinite, log, "value", asked)
    limit = given["limit"]
    size = most = most_of(found.largest(join=True))
    if not math.isfinite(size):
        if found.settle(found.largest()):
            return found.note_settled(size, limit)
        most = most_of(found.largest())
    if most <= limit:
        return found.note(size, limit, 1.0, 0.0)
    limits = {dtype: at_most(limit, dtype.to_real()) for dtype in found.dtypes}
    share = 0.0
    if found.counts:
        share = found.over(limits) / sum(found.sizes)
    for dtype, largest in limits.items():
        _clamp_([value for value in found.values if value.dtype == dtype], largest)
    found.commit()
    return found.note(size, limit, limit / most, share)


@in_our_words
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

    Keeps the direction of the step. A norm of at most `max_norm` leaves all as it is. Above it the factor is
    ``max_norm / (norm + 1e-6)``, as in ``torch.nn.utils.clip_grad_norm_``. The norm is that of all gradients as one
    vector, right for any number of entries and also where their powers leave the range of their dtype; the bound holds
    to 1e-6, in half precision to the rounding of the entries.

    Args:
        params: as for :func:`clip_by_value_`. Beside a ``Pruner`` the norm counts the gradients of pruned weights too,
            unless ``pruner.masks.mask_gradients_(model)`` comes first.
        max_norm: the bound, positive; infinity only measures.
        norm_type: the order p of the norm, any p > 0, or infinity.
        nonfinite: as for :func:`clip_by_value_`.
        log: where to note how often and how hard it engaged.

    Returns:
        The norm before, a 0-d tensor on the first gradient's device: of float32, or of float64 where a gradient is or
        where float32 could not hold it; not finite where a gradient was not. 0.0 where nothing has a gradient.

    Raises:
        TypeError, ValueError: as for :func:`clip_by_value_`, and where `norm_type` is not positive.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gp.clip_by_norm_(weight, 1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))

    Pascanu et al. (2013), algorithm 1; chapter 2, equation 2.3.
    """

    def asked() -> dict[str, float]:
        return {
            "max_norm": checks.number("max_norm", max_norm, above=0.0, finite=False),
            "norm_type": checks.number("norm_type", norm_type, above=0.0, finite=False),
        }

    found, given = gathered(params, nonfinite, log, "norm", asked)
    return scale_to_norm_(found, lambda _: given["max_norm"], given["norm_type"], extra=_AS_TORCH)


@in_our_words
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
    step as a whole does not.

    Args:
        params: as for :func:`clip_by_value_`. Brock et al. do not clip the last linear layer: leave it out to do as
            they.
        factor: the bound on a unit's gradient, over the norm of its weights; positive.
        eps: the least norm that a unit's weights count as; positive.
        nonfinite: as for :func:`clip_by_value_`.
        log: where to note how often and how hard it engaged.

    Raises:
        TypeError, ValueError: as for :func:`clip_by_value_`, and where weights are not finite, and for a sparse
            gradient whose rows are not whole.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> weight.grad = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> gp.clip_adaptive_(weight, 0.5)
        >>> weight.grad
        tensor([[0.0000, 1.0000],
                [0.0000, 0.2500]])

    Brock et al. (2021), equation 3; chapter 2, equation 2.4.
    """

    def asked() -> dict[str, float]:
        return {
            "factor": checks.number("factor", factor, above=0.0, finite=False),
            "eps": checks.number("eps", eps, above=0.0, finite=False),
        }

    found, given = gathered(params, nonfinite, log, "adaptive", asked)
    factor, eps = given["factor"], given["eps"]
    if isinstance(found, GatheredOverRanks):
        return found.clip_units_(factor, eps)
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
                return found.note_settled(size, factor)
            ratios = ratios.where(ratios.isfinite(), 0.0)
    bounded, least = 0, 1.0
    over = (ratios > factor).cpu()
    if bool(over.any()):
        scales = torch.where(ratios > factor, factor / ratios, 1.0)
        scale_units_(units, scales, over, order)
        found.commit()
        bounded, least = int(over.sum()), float(scales.min())
    return found.note(size, factor, least, bounded / max(1, len(over) + absent_units(found)))


def scale_to_norm_(found: Gathered, bound: Callable[[float], float], p: float, *, extra: float = 0.0) -> Tensor:
    """Scale to ``bound(norm)`` where the p-norm is above it; return the norm before. `extra` is added to it."""
    if not found.grads:
        found.note(0.0, bound(0.0), 1.0, 0.0)
        return torch.tensor(0.0, dtype=torch.float32, device="cpu")
    norm = rest = found.norm(p)
    if not math.isfinite(norm):
        if found.settle(found.largest()):
            found.note_settled(norm, bound(0.0))
            return _as_tensor(norm, found)
        rest = found.norm(p)
    max_norm = bound(norm if rest == norm else 0.0)  # what is left of a norm says nothing about what is usual
    factor = 1.0
    if rest > max_norm:
        factor = max_norm / (rest + extra) * (1 - max(map(room_for_rounding, found.dtypes)))
        _scale_(found.values, factor, torch.float64 if found.double else torch.float32)
        found.commit()
    found.note(norm, max_norm, factor, float(factor < 1))
    return _as_tensor(norm, found)


def _as_tensor(norm: float, found: Gathered) -> Tensor:
    beyond = math.isfinite(norm) and not (1e-37 < norm < 3e38 or norm == 0)
    device = found.values[0].device
    double = (beyond or found.double) and device.type != "mps"
    return torch.tensor(norm, dtype=torch.float64 if double else torch.float32, device=device)


def _scale_(values: Sequence[Tensor], factor: float, dtype: torch.dtype) -> None:
    """Multiply by a factor; a tiny one in steps, since as a float32 it would be zero or have few digits."""
    while 0 < factor < 1e-30:
        _scale_(values, 1e-30, dtype)
        factor *= 1e30
    for device, here in grouped_by_device(values).items():
        # On the CPU a tensor of their dtype saves a conversion for each of them; elsewhere a number saves a transfer.
        scalar = torch.tensor(factor, dtype=dtype, device="cpu")
        torch._foreach_mul_(here, scalar if device.type == "cpu" else factor)


def _clamp_(values: Sequence[Tensor], limit: float) -> None:
    """Clamp values of one dtype to [-limit, limit]; a large tensor on the CPU in one pass instead of two."""
    together = list(values)
    if any(v.is_complex() or v.numel() > SMALL for v in values):
        together = [v for v in values if not (v.is_complex() or (v.numel() > SMALL and v.device.type == "cpu"))]
        for value in values:
            if value.is_complex():
                room = 4 * torch.finfo(value.dtype).eps  # for the rounding of the modulus, the factor, the product
                value.mul_((limit * (1 - room) / value.abs()).where(value.abs() > limit, 1.0))
            elif value.numel() > SMALL and value.device.type == "cpu":
                value.clamp_(-limit, limit)
    for here in grouped_by_device(together).values() if together else ():
        torch._foreach_clamp_min_(here, -limit)
        torch._foreach_clamp_max_(here, limit)

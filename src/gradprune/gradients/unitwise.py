"""Which entries of a gradient belong to one unit, and how large is each unit's beside its weights (chapter 2)?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core.layers import TRANSPOSED
from gradprune.gradients.norms import HALF, ROW, SMALL, norm_of, norms_of, read, unit_norms, widened
from gradprune.gradients.params import Params


class Gradients(Protocol):
    """The gradients of one call, with what they belong to, in one order."""

    parameters: list[Tensor]
    grads: list[Tensor]
    values: list[Tensor]

    @property
    def names(self) -> list[str]:
        """The parameters' names."""


Unit = tuple[Tensor, Tensor, int]
"""A gradient, and the weights it belongs to, seen so that the first so many axes number the units."""


def units_of(found: Gradients, params: Params) -> list[Unit]:
    """Return each gradient with its weights and the number of axes that number the units."""
    groups = groups_of_transposed(params) if isinstance(params, nn.Module) else {}
    if not groups and found.values is found.grads:
        return [(g, w, 1 if g.ndim > 1 else 0) for g, w in zip(found.grads, found.parameters, strict=True)]
    units: list[Unit] = []
    for weight, grad, value in zip(found.parameters, found.grads, found.values, strict=True):
        if value.ndim < 2 and value is grad:
            units.append((value, weight, 0))
        elif id(weight) in groups and value is grad:
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


def groups_of_transposed(model: nn.Module) -> dict[int, int]:
    """Return the groups of the weights whose outputs are on their second axis, by the weights' ids."""
    return {id(module.weight): module.groups for module in model.modules() if isinstance(module, TRANSPOSED)}


def absent_units(found: Gradients) -> int:
    """How many units the sparse gradients do not hold, since theirs is zero."""
    if found.values is found.grads:
        return 0
    pairs = zip(found.grads, found.values, strict=True)
    return sum(len(grad) - len(value) for grad, value in pairs if grad.is_sparse and grad.ndim > 1)


def _outputs_first(weight: Tensor, groups: int) -> Tensor:
    """See a transposed convolution's weight (in, out / groups, ...) as (groups, out / groups, in / groups, ...)."""
    seen: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return seen


def require_finite_weights(names: Sequence[str], units: Sequence[Unit]) -> None:
    """Raise ValueError for weights that are not finite, naming them."""
    for name, (_, weight, _) in zip(names, units, strict=True):
        if not bool(weight.isfinite().all()):
            raise ValueError(f"the weights of {name!r} are not finite, so no share of their norm can bound a gradient")


Order = tuple[list[int], list[int]]
"""Of a vector over all units: the tensors in the order in which theirs come, and how many units each has."""


def ratios_of(units: Sequence[Unit], eps: float, *, precise: bool) -> tuple[Tensor, Order]:
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
        return torch.zeros(0, dtype=torch.float64, device="cpu"), ([], [])
    of_gradients, of_weights = [], []
    for places in alike.values():
        axes = units[places[0]][2]
        of_gradients.append(norms_of_units([units[at][0] for at in places], axes, precise))
        of_weights.append(norms_of_units([units[at][1] for at in places], axes, precise))
    device = units[0][0].device
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    norms, weights = (torch.cat([n.to(device).double() for n in vectors]) for vectors in (of_gradients, of_weights))
    weights = weights.where(weights.isfinite(), math.nan).clamp_(min=eps)  # a share of infinity bounds nothing
    places = [at for group in alike.values() for at in group]
    counts = [
        grad.shape[0] if axes == 1 else grad.shape[:axes].numel() for grad, _, axes in (units[at] for at in places)
    ]
    return norms / weights, (places, counts)


def norms_of_units(tensors: list[Tensor], axes: int, precise: bool) -> Tensor:
    """Return the norms of the units of tensors, in one vector; the units have one shape, or each tensor is one."""
    if not axes and (len({t.shape for t in tensors}) > 1 or tensors[0].numel() > SMALL):
        numbers = [norm_of([t], 2.0) for t in tensors] if precise else read(norms_of(tensors))
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
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
    of_rows: Tensor
    if not rows.numel():
        return rows.new_zeros(units.numel(), dtype=torch.float32)
    if not rest:  # an entry is a unit
        return rows.abs().flatten()
    if precise:
        rows = widened(rows)
        most = rows.abs().amax(dim=rest, keepdim=True)
        most = most.where(most > 0, 1.0)
        of_rows = torch.linalg.vector_norm(rows / most, dim=rest) * most.view(units)
        return of_rows.flatten()
    rows = rows.float() if rows.dtype in HALF else rows
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj()).flatten(-2)
    if rows.shape[axes:].numel() > 8 * ROW:
        return unit_norms(rows.flatten(axes).flatten(0, axes - 1) if axes else rows.reshape(1, -1))
    of_rows = torch.linalg.vector_norm(rows, dim=rest)
    return of_rows.flatten()


def cut_by_tensor(joined: Tensor, order: Order) -> list[Tensor]:
    """Cut a vector over all units into one a tensor, in the tensors' own order."""
    found = dict(zip(order[0], joined.split(order[1]), strict=True))
    return [found[place] for place in sorted(found)]


def room_for_rounding(dtype: torch.dtype) -> float:
    """Return by how much a factor must be less, so that its rounding and that of single-precision products is made up.

    Of half precision no more: the rounding of its entries goes both ways, and to outdo it would cost 0.4 % of a norm.
    """
    return 3 * (2.0**-53 if dtype in (torch.float64, torch.complex128) else 2.0**-24)


def scale_units_(units: Sequence[Unit], scales: Tensor, over: Tensor, order: Order) -> None:
    """Multiply the units by their scales, less room for rounding, in the tensors in which one is over its bound."""
    places, counts = order
    engaged = np.bincount(np.repeat(np.arange(len(counts)), counts)[over.numpy()], minlength=len(counts)).nonzero()[0]
    dtypes = {gradient.dtype for gradient, _, _ in units}
    scales = scales * (1 - max(map(room_for_rounding, dtypes)) * over.to(scales.device))
    if not dtypes & {torch.float64, torch.complex128}:
        scales = scales.float()
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
            single = gradient.device.type == "mps"  # pragma: no mutate: it has no float64
            factor = factor.to(gradient.device, torch.float32 if single else scales.dtype)
        factors.append(factor)
    torch._foreach_mul_(grads, factors)

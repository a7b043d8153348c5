"""Which directions does a function stretch, and how far? The singular values of its Jacobian (chapter 1)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradprune.core import checks

EXACT_ENTRIES = 2**24
"""The largest Jacobian, in entries, that :func:`jacobian_singular_values` writes out in full (64 MiB in float32)."""


def jacobian_singular_values(
    f: Callable[[Tensor], Tensor], x: Tensor, *, k: int | None = None, tolerance: float = 1e-3, max_rounds: int = 100
) -> Tensor:
    """Return the singular values of the Jacobian of `f` at `x`, descending.

    `x` has n entries, `f(x)` has m; the Jacobian is m by n. Without `k` it is written out by reverse-mode passes, and
    its singular values are exact to rounding. With `k` it is only multiplied with (block Krylov with Rayleigh-Ritz):
    each value returned is within `tolerance` times the largest of a singular value; that none of the largest is passed
    over is not proven but made likely, by a random start and by going on until a round changes nothing.

    Args:
        f: a function of one tensor that returns one. A module is differentiated as it stands, so put it in `eval` mode
            where its mode matters. With `k` it is differentiated twice.
        x: one input, of any shape and a floating dtype. Half precision is decomposed in float32, but its products carry
            its own rounding.
        k: how many of the largest to return; None for all min(m, n).
        tolerance: how near the `k` are, over the largest; positive.
        max_rounds: how many rounds of products to try.

    Returns:
        The values, a vector without a graph of float32 or float64.

    Raises:
        TypeError: where `f` is no function of a tensor that returns a tensor, and for arguments of another kind.
        ValueError: for an `x` that is not floating, a complex `f(x)`, a `k` outside 1 .. min(m, n), a tolerance that is
            not positive, a Jacobian of more than 2^24 entries without `k`, an `f` that does not depend on `x`
            differentiably, and a result that is not finite.
        RuntimeError: where `max_rounds` do not reach the tolerance.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 2.0])
        >>> gp.jacobian_singular_values(lambda x: x**2, x)
        tensor([6., 4., 2.])

    Halko et al. (2011); Pennington et al. (2017); chapter 1.
    """
    checks.function("f", f)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype to be differentiated, not {x.dtype}")
    if x.is_meta or x.element_size() == 1 or x.layout != torch.strided or type(x) not in (Tensor, nn.Parameter):
        checks.require_writable("x", x, "input")
    k = None if k is None else checks.whole("k", k)
    tolerance = checks.number("tolerance", tolerance, above=0.0)
    max_rounds = checks.whole("max_rounds", max_rounds, least=0)
    with torch.inference_mode(False), torch.enable_grad():
        return _singular_values(f, x.detach().clone().requires_grad_(True), k, tolerance, max_rounds)


def _singular_values(
    f: Callable[[Tensor], Tensor], x: Tensor, k: int | None, tolerance: float, max_rounds: int
) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        y = f(x.clone())  # a clone, since f may change its argument in place
    if not isinstance(y, Tensor):
        raise TypeError(f"f must return a tensor, not {type(y).__name__}; for a part of it pass lambda x: f(x)[0]")
    if y.layout != torch.strided:
        raise TypeError(f"f must return a dense tensor, not one of layout {y.layout}; pass lambda x: f(x).to_dense()")
    if y.is_complex():
        raise ValueError("f(x) is complex; pass its real and imaginary parts, as torch.view_as_real gives them")
    if not y.requires_grad:
        raise ValueError(_NOT_DIFFERENTIABLE)
    if not torch.isfinite(y).all():
        raise ValueError("f(x) is not finite, so its Jacobian has no singular values")
    m, n = y.numel(), x.numel()
    if k is None:
        if m * n > EXACT_ENTRIES:
            raise ValueError(f"the Jacobian has {m} x {n} entries; pass k to get its k largest singular values")
        every: Tensor = torch.linalg.svdvals(_require_finite(_jacobian(y, x)))
        return every
    if not m * n:
        raise ValueError(f"the Jacobian has {m} x {n} entries, and so no k largest singular values")
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k must be between 1 and {min(m, n)}, the smaller side of the Jacobian, not {k}")
    return _largest_singular_values(_Products(y, x), k, tolerance, max_rounds)


_NOT_DIFFERENTIABLE = "f(x) does not depend on x in a way that autograd can follow"


def _working_dtype(y: Tensor, x: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(y.dtype, x.dtype), torch.float32)


def _jacobian(y: Tensor, x: Tensor) -> Tensor:
    m, n = y.numel(), x.numel()
    if 4 * n < m:  # a tall one is cheaper column by column, where f has a second derivative
        with contextlib.suppress(RuntimeError):
            return _Products(y, x).push(torch.eye(n, dtype=_working_dtype(y, x), device=x.device))
    rows_at_once = max(1, min(256, 2**22 // max(m, n, 1)))
    jacobian = torch.empty(m, n, dtype=_working_dtype(y, x), device=x.device)
    for first in range(0, m, rows_at_once):
        rows = torch.zeros(min(rows_at_once, m - first), m, dtype=y.dtype, device=y.device)
        rows.diagonal(first).fill_(1)
        jacobian[first : first + len(rows)] = _pull_back(y, x, rows)
    return jacobian


def _pull_back(y: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """`rows @ J`: each of the rows, of y's entries, back through the graph, at once where the graph allows it."""
    cotangents = rows.reshape(len(rows), *y.shape).to(y.dtype)
    try:
        (pulled,) = torch.autograd.grad(y, x, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True)
    except RuntimeError:  # an operation of a user's own may not be batched; what else is wrong shows again here
        singly = [torch.autograd.grad(y, x, row, retain_graph=True, allow_unused=True)[0] for row in cotangents]
        pulled = None if singly[0] is None else torch.stack(singly)
    if pulled is None:
        raise ValueError(_NOT_DIFFERENTIABLE)
    return pulled.reshape(len(rows), -1)


class _Products:
    """`J v` and `u J` for the Jacobian J of `y` with respect to `x`, many vectors at once.

    `J v` is the derivative of `u J v` with respect to u, so that reverse mode alone serves every differentiable module.
    """

    def __init__(self, y: Tensor, x: Tensor) -> None:
        self.y, self.x, self.dtype = y, x, _working_dtype(y, x)
        self.u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, self.u, create_graph=True, allow_unused=True)
        if pulled is None:
            raise ValueError(_NOT_DIFFERENTIABLE)
        self.pulled = pulled + 0 * self.u.sum().to(pulled.dtype)  # depends on u also where the derivative is zero

    def push(self, columns: Tensor) -> Tensor:
        """Return J @ columns for columns of shape (n, c)."""
        return _require_finite(_pull_back(self.pulled, self.u, columns.T).T.to(self.dtype))

    def pull(self, columns: Tensor) -> Tensor:
        """Return J.T @ columns for columns of shape (m, c)."""
        return _require_finite(_pull_back(self.y, self.x, columns.T).T.to(self.dtype))


def _largest_singular_values(products: _Products, k: int, tolerance: float, max_rounds: int) -> Tensor:
    spare = 4  # pragma: no mutate: directions beside those wanted, which save rounds
    n, width = products.x.numel(), min(k + spare, products.x.numel(), products.y.numel())
    values: Tensor
    generator = torch.Generator("cpu").manual_seed(0)  # of its own: a probe leaves the global one alone
    start = torch.randn(n, width, generator=generator, dtype=products.dtype, device="cpu").to(products.x.device)
    basis = torch.linalg.qr(start).Q
    image = products.push(basis)
    before = torch.full((k,), math.inf, dtype=image.dtype, device=image.device)
    for _ in range(max_rounds):
        left, values, right = torch.linalg.svd(image, full_matrices=False)
        left, values, right = left[:, :k], values[:k].abs(), basis @ right.T[:, :k]  # abs: an SVD may give -0
        if basis.shape[1] == n:  # the whole space: the values are exact
            return values
        residual = products.pull(left) - right * values
        error = torch.maximum(torch.linalg.vector_norm(residual, dim=0).max(), (values - before).abs().max())
        if bool(error <= tolerance * values[0]):
            return values
        before = values
        fresh = _orthonormal_beyond(basis, residual, values[0])
        if not fresh.shape[1]:  # nothing of J acts outside the basis, to rounding
            break
        basis = torch.cat([basis, fresh], dim=1)
        image = torch.cat([image, products.push(fresh)], dim=1)
    # A residual at rounding leaves nothing to add, and then one round is as steady as two.
    if max_rounds > 0 and bool(torch.linalg.vector_norm(residual, dim=0).max() <= tolerance * values[0]):
        return values
    raise RuntimeError(
        f"{max_rounds} rounds did not bring the {k} largest singular values within {tolerance} of the first; "
        f"allow more rounds or a larger tolerance"
    )


def _orthonormal_beyond(basis: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
    """An orthonormal basis of what `columns` add to `basis`, but for what is rounding beside `scale`."""
    outside = columns - basis @ (basis.T @ columns)
    directions, sizes, _ = torch.linalg.svd(outside, full_matrices=False)
    directions = directions[:, sizes > 10 * torch.finfo(basis.dtype).eps * scale][:, : len(basis) - basis.shape[1]]
    again = directions - basis @ (basis.T @ directions)  # what was small beside `columns` is at an angle after one
    orthonormal: Tensor = torch.linalg.qr(again).Q
    return orthonormal


def _require_finite(tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError("the Jacobian of f at x has entries that are not finite")
    return tensor.detach()

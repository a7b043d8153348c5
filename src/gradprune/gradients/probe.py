"""Where do gradients vanish or explode? Watch them, without changing what is watched (chapter 1)."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

_Scalar = Tensor | float  # on an accelerator a tensor that nobody has waited for yet

EXACT_ENTRIES = 2**24
"""The largest Jacobian, in entries, that :func:`jacobian_singular_values` writes out in full (64 MiB in float32)."""


def gradient_norms(model: nn.Module, loss: Tensor | None = None) -> dict[str, float]:
    """Return the Euclidean norm of each parameter's gradient, by parameter name.

    After ``loss.backward()``, call it with the model alone: it reads ``.grad``, and leaves out parameters that have
    none. Given a scalar `loss` it computes the gradients itself and changes no ``.grad``; it keeps the graph, so
    ``backward`` can still follow. A norm that is not finite is returned as it is: seeing it is what a probe is for.
    It is right also where the squares of the entries are too small or too large for their dtype.

    Raises ValueError where no parameter has a gradient, and where `loss` is not a real scalar that depends on the
    model. Chapter 1.
    """
    if loss is None:
        named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        if not named:
            raise ValueError("no parameter of the model has a gradient; call loss.backward() first, or pass the loss")
    else:
        named = _gradients_of(loss, model)
    return dict(zip(named, _read(_norms(list(named.values()))), strict=True))


def _gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, not of shape {tuple(loss.shape)}; take its mean or its sum first")
    if loss.is_complex():
        raise ValueError("loss must be real, not complex; take its absolute value or its real part first")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient")
    if not loss.requires_grad:
        raise ValueError("loss does not depend on the model: it was computed without gradients, or detached")
    with torch.enable_grad():
        scalar = loss.reshape(())
    grads = torch.autograd.grad(scalar, list(trainable.values()), retain_graph=True, allow_unused=True)
    found = {name: grad for name, grad in zip(trainable, grads, strict=True) if grad is not None}
    if not found:
        raise ValueError("loss depends on no parameter of the model")
    return found


@torch.no_grad()
def _norms(tensors: Sequence[Tensor]) -> list[_Scalar]:
    """The 2-norm of each tensor, right also where the squares of its entries leave the range of its dtype.

    On the CPU, where looking at a number is free, only the norms that come out suspiciously are computed again; on an
    accelerator, where looking means waiting for it, all are summed in float64 (float32 where it has no float64).
    """
    dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    if any(tensor.device.type != "cpu" for tensor in dense):
        return [torch.linalg.vector_norm(_wide(tensor), dtype=_sum_dtype(tensor)) for tensor in dense]
    norms = [norm.item() for norm in torch._foreach_norm([_wide(tensor) for tensor in dense])] if dense else []
    return [
        norm if 1e-12 < norm < math.inf else _scaled_norm(tensor) for norm, tensor in zip(norms, dense, strict=True)
    ]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _sum_dtype(tensor: Tensor) -> torch.dtype | None:
    if tensor.device.type == "mps":
        return None
    return torch.complex128 if tensor.is_complex() else torch.float64


def _scaled_norm(tensor: Tensor) -> float:
    """The norm of the tensor over its largest entry, times that entry: no square leaves the range."""
    if not tensor.numel():
        return 0.0
    sizes = tensor.abs().double()
    largest = float(sizes.max())
    return float(torch.linalg.vector_norm(sizes / largest)) * largest if 0 < largest < math.inf else largest


def _read(scalars: Sequence[_Scalar]) -> list[float]:
    """Read scalars with one transfer a device instead of one a scalar."""
    numbers = [0.0 if isinstance(scalar, Tensor) else scalar for scalar in scalars]
    unread = [(i, scalar) for i, scalar in enumerate(scalars) if isinstance(scalar, Tensor)]
    for device in {scalar.device for _, scalar in unread}:
        here = [(i, scalar) for i, scalar in unread if scalar.device == device]
        read = torch.stack([scalar for _, scalar in here]).tolist()
        for (i, _), number in zip(here, read, strict=True):
            numbers[i] = number
    return numbers


def jacobian_singular_values(
    f: Callable[[Tensor], Tensor], x: Tensor, *, k: int | None = None, tolerance: float = 1e-3, max_rounds: int = 100
) -> Tensor:
    """Return the singular values of the Jacobian of `f` at `x`, descending.

    `x` is one input of any shape with n entries, `f(x)` has m; the Jacobian is m by n.
    Without `k`, all min(m, n) of them, from the Jacobian written out by reverse-mode passes: exact to rounding.
    With `k`, the `k` largest, by Jacobian-vector products only (block Krylov with Rayleigh-Ritz, Halko et al. 2011):
    each returned value is within ``tolerance`` times the largest of a singular value; that none of the largest is
    passed over is not proven but made likely, by a random start and by going on until a round changes nothing. The
    products differentiate `f` twice. A module `f` is differentiated as it stands, so put it in `eval` mode where its
    mode matters. Half precision is decomposed in float32, but its products carry its own rounding.

    Raises TypeError where `f` does not return a tensor; ValueError for an `x` that is not floating, a complex `f(x)`, a
    `k` outside 1 .. min(m, n), a tolerance that is not positive, a Jacobian of more than 2^24 entries without `k`, an
    `f` that does not depend on `x` differentiably, and a result that is not finite; RuntimeError where `max_rounds` do
    not reach the tolerance. Chapter 1; Pennington et al. (2017).
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype to be differentiated, not {x.dtype}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, not {tolerance}")
    with torch.inference_mode(False), torch.enable_grad():
        return _singular_values(f, x.detach().clone().requires_grad_(True), k, tolerance, max_rounds)


def _singular_values(
    f: Callable[[Tensor], Tensor], x: Tensor, k: int | None, tolerance: float, max_rounds: int
) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
        y = f(x.clone())  # a clone, since f may change its argument in place
    if not isinstance(y, Tensor):
        raise TypeError(f"f must return a tensor, not {type(y).__name__}; for a part of it pass lambda x: f(x)[0]")
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
    n, width = products.x.numel(), min(k + 4, products.x.numel(), products.y.numel())
    values: Tensor
    generator = torch.Generator().manual_seed(0)  # of its own: a probe leaves the global one alone
    start = torch.randn(n, width, generator=generator, dtype=products.dtype).to(products.x.device)
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


class _Watch:
    """Shows one module's outputs to a recorder. Copied or pickled with the module, it watches nothing."""

    def __init__(self, recorder: Recorder, name: str, module: nn.Module) -> None:
        self._recorder, self._name, self._module = weakref.ref(recorder), name, weakref.ref(module)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self._recorder()
        if recorder is None or recorder._step % recorder._every or not torch.is_grad_enabled():
            return
        if module is self._module():
            recorder._see(self._name, output)

    def __reduce__(self) -> tuple[Callable[[], _Blind], tuple[()]]:
        return _Blind, ()


class _Blind:
    """A forward hook that does nothing."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        pass


@dataclass
class Trace:
    """What a :class:`Recorder` saw: one list entry for each recorded step.

    `steps`: the step numbers, from 0. `gradients[parameter]`: the norm of its gradient before the step.
    `updates[parameter]`: the norm of the change that the step made, over the norm of the parameter before it; inf where
    a parameter left zero, nan where it stayed there. `activations[module][statistic]`: of the module's output, over all
    its entries, "mean", "std" (of the entries, not an estimate) and "zero", the share that is exactly zero.
    """

    steps: list[int] = field(default_factory=list)
    gradients: dict[str, list[float]] = field(default_factory=dict)
    updates: dict[str, list[float]] = field(default_factory=dict)
    activations: dict[str, dict[str, list[float]]] = field(default_factory=dict)


_STATISTICS = ("mean", "std", "zero")
_Row = tuple[int, dict[str, _Scalar], dict[str, _Scalar], dict[str, list[_Scalar]]]


class Recorder:
    """Record gradients, updates and activations, layer by layer, while a model trains in its own loop.

    ``recorder = gp.Recorder(model, optimizer, every=10)`` before the loop, ``recorder.trace`` after it. It rides on the
    optimizer's step hooks and on forward hooks of the modules without children: `every`-th step is recorded, on the
    others a hook returns at once. Only forward passes with gradients enabled count, and of several before one step the
    last. Where `step` is given a closure, the gradients are those of its first call. Parameters given to the optimizer
    later are recorded from then on. Gradients are taken as the optimizer finds them: after clipping, and under loss
    scaling still scaled unless they were unscaled before. Numbers stay on their device as scalars until `trace` is
    read or 64 steps have come together. A copy of the model records nothing; nothing in the state of model or optimizer
    changes. `updates=False` spares the copy of the parameters that measuring updates needs.

    Use it as a context manager, or call `close`, to remove the hooks. Raises ValueError where `every` is below 1, and
    where the optimizer holds none of the model's parameters. Chapter 1 shows the traces. On one
    thread of a busy machine, recording every step took 1.26 of the time of a small perceptron's step (1.14 of a small
    convolutional net's), every tenth 1.13 (1.01); see `tests/bench/bench_probe.py`.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int = 1, updates: bool = True
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        self._model, self._optimizer = model, optimizer
        self._every, self._with_updates, self._step = every, updates, 0
        self._parameters: dict[str, nn.Parameter] = {}
        self._held: set[int] = set()
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        self._norms: dict[str, _Scalar] = {}
        self._before: list[Tensor] = []
        self._sizes: list[_Scalar] = []
        self._seen: dict[str, list[_Scalar]] = {}
        self._rows: list[_Row] = []
        self._trace = Trace()
        self._look_for_parameters()
        if not self._parameters:
            self.close()
            raise ValueError("the optimizer holds none of the model's parameters, so none of its steps can be recorded")
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _look_for_parameters(self) -> None:
        """Find the model's parameters that the optimizer holds, and watch the modules; again where it holds others."""
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        if held == self._held:
            return
        self._held = held
        self._parameters = {name: p for name, p in self._model.named_parameters() if id(p) in held}
        for name, module in self._model.named_modules():
            if _is_leaf(name, module) and module not in self._watched:
                self._watched.add(module)
                self._handles.append(module.register_forward_hook(_Watch(self, name, module)))

    @torch.no_grad()
    def _see(self, name: str, output: Any) -> None:
        if isinstance(output, tuple) and output:  # recurrent modules return their states too
            output = output[0]
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            self._seen[name] = _statistics(output.detach())

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._step % self._every:
            return None
        self._look_for_parameters()
        if self._with_updates:
            self._copy_parameters()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._take_gradients()
            return None
        self._norms = {}

        def first_watched() -> Any:  # the gradients of this step do not exist before it is called
            loss = closure()
            if not self._norms:
                self._take_gradients()
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": first_watched}
        return (args[0], first_watched, *args[2:]), kwargs

    @torch.no_grad()
    def _copy_parameters(self) -> None:
        """Copy them to where they were copied before: fresh memory for each step costs more than the copy."""
        parameters = [p.detach() for p in self._parameters.values()]
        if not all(map(_alike, self._before, parameters)) or len(self._before) != len(parameters):
            self._before = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(self._before, parameters)
        self._sizes = _norms(self._before)

    def _take_gradients(self) -> None:
        grads = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        self._norms = dict(zip(grads, _norms(list(grads.values())), strict=True))

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._step % self._every == 0:
            updates: dict[str, _Scalar] = {}
            if self._with_updates:
                torch._foreach_sub_(self._before, [p.detach() for p in self._parameters.values()])
                ratios = map(_ratio, _norms(self._before), self._sizes)
                updates = dict(zip(self._parameters, ratios, strict=True))
            self._rows.append((self._step, self._norms, updates, self._seen))
            if len(self._rows) == 64:
                self._read_rows()
        self._seen = {}
        self._step += 1

    @property
    def trace(self) -> Trace:
        """What has been recorded so far; a parameter or module that one step missed has nan there."""
        self._read_rows()
        return self._trace

    def _read_rows(self) -> None:
        trace = self._trace
        scalars = [
            scalar
            for _, norms, updates, seen in self._rows
            for scalar in (*norms.values(), *updates.values(), *(s for statistics in seen.values() for s in statistics))
        ]
        numbers = iter(_read(scalars))
        for step, norms, updates, seen in self._rows:
            at = len(trace.steps)
            trace.steps.append(step)
            _append(trace.gradients, {name: next(numbers) for name in norms}, at)
            _append(trace.updates, {name: next(numbers) for name in updates}, at)
            rows = {name: {statistic: next(numbers) for statistic in _STATISTICS} for name in seen}
            for name in dict.fromkeys((*trace.activations, *rows)):
                columns = trace.activations.setdefault(name, {statistic: [] for statistic in _STATISTICS})
                _append(columns, rows.get(name, {}), at)
        self._rows = []

    def close(self) -> None:
        """Stop recording: remove every hook. What was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._before = [], []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _is_leaf(name: str, module: nn.Module) -> bool:
    """Whether the module has no modules inside, but for those that make its weights of other weights."""
    return "parametrizations" not in name.split(".") and all(
        child == "parametrizations" for child, _ in module.named_children()
    )


def _statistics(output: Tensor) -> list[_Scalar]:
    """Mean, standard deviation and share of zeros."""
    output = _wide(output)
    if output.device.type != "cpu":
        unread = output.mean()
        return [unread, _spread(output, unread), torch.count_nonzero(output == 0) / output.numel()]
    values = output.numpy()
    zero = np.count_nonzero(values == 0) / values.size  # by NumPy, which counts ten times as fast as torch
    mean = output.mean().item()
    mean_square = torch.linalg.vector_norm(output).item() ** 2 / values.size
    variance = mean_square - mean**2
    if variance > 0.1 * mean_square and 1e-24 < mean_square < math.inf:
        return [mean, math.sqrt(variance), zero]
    return [mean, _spread(output, mean), zero]


def _spread(values: Tensor, mean: _Scalar) -> _Scalar:
    """The standard deviation, with the mean taken off first: a difference of squares would cancel."""
    (norm,) = _norms([values - mean])
    return norm / math.sqrt(values.numel())


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _ratio(change: _Scalar, size: _Scalar) -> _Scalar:
    if isinstance(size, Tensor) or size:
        return change / size
    return math.inf if change else math.nan


def _append(columns: dict[str, list[float]], row: dict[str, float], at: int) -> None:
    for name in dict.fromkeys((*columns, *row)):
        column = columns.setdefault(name, [])
        column.extend([math.nan] * (at - len(column)))
        column.append(row.get(name, math.nan))

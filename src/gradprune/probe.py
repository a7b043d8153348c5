"""Where do gradients vanish or explode? Watch them, without changing what is watched (chapter 1)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

EXACT_ENTRIES = 2**24
"""The largest Jacobian, in entries, that :func:`jacobian_singular_values` writes out in full (64 MiB in float32)."""


def gradient_norms(model: nn.Module, loss: Tensor | None = None) -> dict[str, float]:
    """Return the Euclidean norm of each parameter's gradient, by parameter name.

    After ``loss.backward()``, call it with the model alone: it reads ``.grad``, and leaves out parameters that have
    none. Given a scalar `loss` it computes the gradients itself and changes no ``.grad``; it keeps the graph, so
    ``backward`` can still follow. A norm that is not finite is returned as it is: seeing it is what a probe is for.

    Raises ValueError where no parameter has a gradient, and where `loss` is not a scalar that depends on the model.
    Chapter 1.
    """
    if loss is None:
        named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        if not named:
            raise ValueError("no parameter of the model has a gradient; call loss.backward() first, or pass the loss")
    else:
        named = _gradients_of(loss, model)
    return _to_floats(dict(zip(named, _norms(list(named.values())), strict=True)))


def _gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, not of shape {tuple(loss.shape)}; take its mean or its sum first")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient")
    if not loss.requires_grad:
        raise ValueError("loss does not depend on the model: it was computed without gradients, or detached")
    grads = torch.autograd.grad(loss.reshape(()), list(trainable.values()), retain_graph=True, allow_unused=True)
    found = {name: grad for name, grad in zip(trainable, grads, strict=True) if grad is not None}
    if not found:
        raise ValueError("loss depends on no parameter of the model")
    return found


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, right also where its square has no number in float32."""
    dense = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors]
    if all(tensor.is_cuda for tensor in dense):
        return list(torch._foreach_norm(dense, 2.0, dtype=torch.float64))  # costs nothing there, and no round trip
    norms = list(torch._foreach_norm(dense, 2.0))
    return [norm if 1e-15 < norm < 1e15 else _scaled_norm(tensor) for norm, tensor in zip(norms, dense, strict=True)]


def _scaled_norm(tensor: Tensor) -> Tensor:
    """The 2-norm of a tensor whose squared entries may underflow or overflow: largest entry times a norm near one."""
    if not tensor.numel():
        return tensor.new_zeros(())
    largest = tensor.abs().max()
    if largest == 0 or not torch.isfinite(largest):
        return largest
    wide = largest.device.type != "mps"  # which has no float64
    norm = torch.linalg.vector_norm((tensor / largest).float())
    scaled: Tensor = largest.double() * norm if wide else largest.float() * norm
    return scaled


def _to_floats(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Read scalars with one transfer a device instead of one a scalar."""
    floats: dict[str, float] = {}
    for device in {scalar.device for scalar in scalars.values()}:
        here = {name: scalar.detach() for name, scalar in scalars.items() if scalar.device == device}
        dtype = torch.float32 if device.type == "mps" else torch.float64
        floats |= dict(zip(here, torch.stack([scalar.to(dtype) for scalar in here.values()]).tolist(), strict=True))
    return {name: floats[name] for name in scalars}


def jacobian_singular_values(
    f: Callable[[Tensor], Tensor], x: Tensor, *, k: int | None = None, tolerance: float = 1e-3, max_rounds: int = 100
) -> Tensor:
    """Return the singular values of the Jacobian of `f` at `x`, descending.

    `x` is one input of any shape with n entries, `f(x)` has m; the Jacobian is m by n.
    Without `k`, all min(m, n) of them, from the Jacobian written out by reverse-mode passes: exact to rounding.
    With `k`, the `k` largest, by Jacobian-vector products only (block Krylov with Rayleigh-Ritz, Halko et al. 2011):
    each returned value is within ``tolerance`` times the largest of a singular value. A module `f` is differentiated as
    it stands, so put it in `eval` mode where its mode matters.

    Raises ValueError for an `x` that is not floating, a `k` outside 1 .. min(m, n), a Jacobian of more than 2^24
    entries without `k`, an `f` that does not depend on `x` differentiably, and a result that is not finite;
    RuntimeError where `max_rounds` do not reach the tolerance. Chapter 1; Pennington et al. (2017).
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating dtype to be differentiated, not {x.dtype}")
    x = x.detach().requires_grad_(True)
    with torch.enable_grad():
        y = f(x)
    if not y.requires_grad:
        raise ValueError("f(x) does not depend on x in a way that autograd can follow")
    if not torch.isfinite(y).all():
        raise ValueError("f(x) is not finite, so its Jacobian has no singular values")
    m, n = y.numel(), x.numel()
    if k is None:
        if m * n > EXACT_ENTRIES:
            raise ValueError(f"the Jacobian has {m} x {n} entries; pass k to get its k largest singular values")
        return _require_finite(torch.linalg.svdvals(_require_finite(_jacobian(y, x))))
    if not 1 <= k <= min(m, n):
        raise ValueError(f"k must be between 1 and {min(m, n)}, the smaller side of the Jacobian, not {k}")
    return _largest_singular_values(_Products(y, x), k, tolerance, max_rounds)


def _jacobian(y: Tensor, x: Tensor, rows_at_once: int = 256) -> Tensor:
    basis = torch.eye(y.numel(), dtype=y.dtype, device=y.device)
    return torch.cat([_pull_back(y, x, rows) for rows in basis.split(rows_at_once)])


def _pull_back(y: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """`rows @ J`: each of the rows, of y's entries, back through the graph at once."""
    cotangents = rows.reshape(len(rows), *y.shape)
    (pulled,) = torch.autograd.grad(y, x, cotangents, retain_graph=True, is_grads_batched=True)
    return pulled.reshape(len(rows), -1)


class _Products:
    """`J v` and `u J` for the Jacobian J of `y` with respect to `x`, many vectors at once.

    `J v` is the derivative of `u J v` with respect to u, so that reverse mode alone serves every differentiable module.
    """

    def __init__(self, y: Tensor, x: Tensor) -> None:
        self.y, self.x = y, x
        self.u = torch.zeros_like(y, requires_grad=True)
        (self.pulled,) = torch.autograd.grad(y, x, self.u, create_graph=True)

    def push(self, columns: Tensor) -> Tensor:
        """Return J @ columns for columns of shape (n, c)."""
        return _pull_back(self.pulled, self.u, columns.T).T

    def pull(self, columns: Tensor) -> Tensor:
        """Return J.T @ columns for columns of shape (m, c)."""
        return _pull_back(self.y, self.x, columns.T).T


def _largest_singular_values(products: _Products, k: int, tolerance: float, max_rounds: int) -> Tensor:
    x = products.x
    generator = torch.Generator().manual_seed(0)  # of its own: a probe leaves the global one alone
    start = torch.randn(x.numel(), k, generator=generator, dtype=x.dtype).to(x.device)
    basis = torch.linalg.qr(start).Q
    image = products.push(basis)
    for _ in range(max_rounds):
        left, values, right = torch.linalg.svd(_require_finite(image), full_matrices=False)
        left, values, right = left[:, :k], values[:k], basis @ right.T[:, :k]
        pulled = products.pull(left)
        residual = torch.linalg.vector_norm(pulled - right * values, dim=0)
        if bool((residual <= tolerance * values[0]).all()):
            largest: Tensor = values.detach()
            return largest
        fresh = (pulled - right * values)[:, residual > tolerance * values[0]]
        fresh = fresh - basis @ (basis.T @ fresh)  # again, since one projection is orthogonal to rounding only
        directions, sizes, _ = torch.linalg.svd(fresh, full_matrices=False)
        fresh = directions[:, sizes > 1e-6 * sizes[0]]
        basis = torch.cat([basis, fresh], dim=1)
        image = torch.cat([image, products.push(fresh)], dim=1)
    raise RuntimeError(
        f"{max_rounds} rounds did not bring the {k} largest singular values within {tolerance} of the first"
    )


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
        if recorder is not None and module is self._module():
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
    `updates[parameter]`: the norm of the change that the step made, over the norm of the parameter before it.
    `activations[module][statistic]`: of the module's output, over all its entries, "mean", "std" and "zero", the share
    that is exactly zero.
    """

    steps: list[int] = field(default_factory=list)
    gradients: dict[str, list[float]] = field(default_factory=dict)
    updates: dict[str, list[float]] = field(default_factory=dict)
    activations: dict[str, dict[str, list[float]]] = field(default_factory=dict)


class Recorder:
    """Record gradients, updates and activations, layer by layer, while a model trains in its own loop.

    ``recorder = gp.Recorder(model, optimizer, every=10)`` before the loop, ``recorder.trace`` after it. It rides on the
    optimizer's step hooks and on forward hooks of the modules without children: `every`-th step is recorded, on the
    others a hook returns at once. Only forward passes that build a graph count, and of several before one step the
    last. Numbers stay on their device as scalars until `trace` is read. A copy of the model records nothing; nothing in
    the state of model or optimizer changes. `updates=False` spares the copy of the parameters that measuring updates
    needs.

    Use it as a context manager, or call `close`, to remove the hooks. Raises ValueError where `every` is below 1, and
    where the optimizer holds none of the model's parameters. Chapter 1 shows the traces and what recording costs.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int = 1, updates: bool = True
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._parameters = {name: p for name, p in model.named_parameters() if id(p) in held}
        if not self._parameters:
            raise ValueError("the optimizer holds none of the model's parameters, so none of its steps can be recorded")
        self._every, self._with_updates, self._step = every, updates, 0
        self._seen: dict[str, Tensor] = {}
        self._before: list[Tensor] = []
        self._rows: list[tuple[int, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []
        self._trace = Trace()
        leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
        self._handles = [module.register_forward_hook(_Watch(self, name, module)) for name, module in leaves]
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _see(self, name: str, output: Any) -> None:
        if self._step % self._every or not torch.is_grad_enabled():
            return
        if isinstance(output, tuple) and output:  # recurrent modules return their states too
            output = output[0]
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            with torch.no_grad():
                mean_square = torch.linalg.vector_norm(output, dtype=torch.float32).square() / output.numel()
                mean = output.mean(dtype=torch.float32)
                zero = 1 - torch.count_nonzero(output) / output.numel()
                self._seen[name] = torch.stack([mean, (mean_square - mean.square()).clamp_min(0).sqrt(), zero])

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._step % self._every == 0:
            with_grad = {name: p for name, p in self._parameters.items() if p.grad is not None}
            grads = [p.grad for p in with_grad.values() if p.grad is not None]
            self._norms = dict(zip(with_grad, _norms(grads), strict=True)) if grads else {}
            if self._with_updates:
                self._before = [p.detach().clone() for p in self._parameters.values()]

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._step % self._every == 0:
            updates: dict[str, Tensor] = {}
            if self._with_updates:
                sizes = torch._foreach_norm(self._before)
                after = [p.detach() for p in self._parameters.values()]
                changes = torch._foreach_norm(torch._foreach_sub(after, self._before))
                updates = dict(zip(self._parameters, torch._foreach_div(changes, sizes), strict=True))
                self._before = []
            self._rows.append((self._step, self._norms, updates, self._seen))
        self._seen = {}
        self._step += 1

    @property
    def trace(self) -> Trace:
        """What has been recorded so far; a parameter or module that one step missed has nan there."""
        for step, norms, updates, seen in self._rows:
            at = len(self._trace.steps)
            self._trace.steps.append(step)
            for columns, scalars in ((self._trace.gradients, norms), (self._trace.updates, updates)):
                _append(columns, _to_floats(scalars) if scalars else {}, at)
            for name in dict.fromkeys([*self._trace.activations, *seen]):
                row = dict(zip(("mean", "std", "zero"), seen[name].tolist(), strict=True)) if name in seen else {}
                _append(self._trace.activations.setdefault(name, {"mean": [], "std": [], "zero": []}), row, at)
        self._rows = []
        return self._trace

    def close(self) -> None:
        """Stop recording: remove every hook. What was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _append(columns: dict[str, list[float]], row: dict[str, float], at: int) -> None:
    for name in dict.fromkeys([*columns, *row]):
        column = columns.setdefault(name, [])
        column.extend([float("nan")] * (at - len(column)))
        column.append(row.get(name, float("nan")))

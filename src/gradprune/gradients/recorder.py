"""Where do gradients vanish or explode while a model trains? Record them, layer by layer (chapter 1)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Tuple  # noqa: UP035  the scripting compiler knows no other tuple in a signature

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprune.core import checks
from gradprune.core.steps import Steps, as_list, parameters_of
from gradprune.gradients.norms import HALF, Scalar, norms_of, read
from gradprune.gradients.trace import Row, Trace


class Recorder:
    """Record gradients, updates and activations, layer by layer, while a model trains in its own loop.

    ``recorder = gp.Recorder(model, optimizer, every=10)`` before the loop, ``recorder.trace`` after it. It rides on the
    optimizer's steps and on forward hooks of the modules without children. Gradients are those the optimizer finds:
    after clipping, under loss scaling still scaled unless they were unscaled before, and with a closure those of its
    first call. Only forward passes with gradients enabled count, and of several before one step the last; under
    ``torch.compile``, ``export``, ``jit`` and ``func`` the hooks stand aside, and activations are nan. A copy of the
    model records nothing, a copy of the recorder keeps its trace and records nothing more; nothing in the state of
    model or optimizer changes.

    Use it as a context manager, or call ``close``, to remove the hooks.

    Args:
        model: the model.
        optimizer: what trains it, or a wrapper around that. Parameters it is given later are recorded from then on.
        every: record every so many steps, from the first; on the others the hooks return at once.
        updates: whether to measure updates, which needs a copy of the parameters.

    Raises:
        TypeError: for arguments of another kind, and for parameters without values (DTensor, meta, lazy).
        ValueError: for an `every` below 1, and where the optimizer holds none of the model's parameters.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with gp.Recorder(model, optimizer) as recorder:
        ...     model(torch.tensor([[3.0, 4.0]])).sum().backward()
        ...     optimizer.step()
        >>> recorder.trace.gradients
        {'weight': [5.0]}

    Chapter 1 shows the traces.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, every: int = 1, updates: bool = True) -> None:
        self._model: nn.Module | None = checks.module(model)
        given = as_list(optimizer)
        checks.require(len(given) == 1, "a Recorder rides on one optimizer: make one for each of several")
        self._optimizer: Any = given[0]
        self._every = checks.whole("every", every, least=1)
        if not isinstance(updates, bool):
            raise TypeError(f"updates must be True or False, got {type(updates).__name__}")
        self._with_updates, self._step = updates, 0
        self._parameters: dict[str, nn.Parameter] = {}
        self._held: set[int] = set()
        self._watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._norms: dict[str, Scalar] = {}
        self._before: list[Tensor] = []
        self._sizes: list[Scalar] = []
        self._seen: dict[str, list[Scalar]] = {}
        self._rows: list[Row] = []
        self._trace = Trace()
        self._steps: Steps | None = None
        try:
            self._look_for_parameters()
            if not self._parameters:
                raise ValueError(
                    "the optimizer holds none of the model's parameters, so none of its steps can be recorded"
                )
            self._steps = Steps(given, begins=self._before_step, gradients=self._at_gradients, taken=self._after_step)
        except BaseException:
            self.close()
            raise

    def _look_for_parameters(self) -> None:
        """Find the model's parameters that the optimizer holds, and watch the modules; again where it holds others."""
        held = {id(parameter) for parameter in parameters_of(self._optimizer)}
        if held == self._held or self._model is None:
            return
        parameters = {name: p for name, p in self._model.named_parameters() if id(p) in held}
        checks.require_whole(parameters.values())
        for name, parameter in parameters.items():
            if parameter.is_meta or type(parameter) is not nn.Parameter:
                checks.require_writable(name, parameter)
        self._held, self._parameters = held, parameters
        for name, module in self._model.named_modules():
            if _is_leaf(name, module) and module not in self._watched:
                self._watched.add(module)
                _watch(module, self, name)

    @torch.no_grad()
    def _see(self, name: str, output: Any) -> None:
        if isinstance(output, tuple) and output:  # recurrent modules return their states too
            output = output[0]
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel() and _is_plain(output):
            self._seen[name] = _statistics(output.detach())

    def _wants(self) -> bool:
        """Whether the step that comes is recorded."""
        return self._step % self._every == 0

    def _before_step(self) -> None:
        if self._wants():
            self._norms = {}
            self._look_for_parameters()
            if self._with_updates:
                self._copy_parameters()

    @torch.no_grad()
    def _copy_parameters(self) -> None:
        """Copy them to where they were copied before: fresh memory for each step costs more than the copy."""
        parameters = [p.detach() for p in self._parameters.values()]
        if not all(map(_alike, self._before, parameters)) or len(self._before) != len(parameters):
            self._before = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(self._before, parameters)
        self._sizes = norms_of(self._before)

    def _at_gradients(self) -> None:
        if self._wants():
            grads = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
            self._norms = dict(zip(grads, norms_of(list(grads.values())), strict=True))

    @torch.no_grad()
    def _after_step(self) -> None:
        if self._wants():
            updates: dict[str, Scalar] = {}
            if self._with_updates:
                torch._foreach_sub_(self._before, [p.detach() for p in self._parameters.values()])
                ratios = map(_ratio, norms_of(self._before), self._sizes)
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
        rows, self._rows = self._rows, []
        scalars = [
            scalar
            for _, norms, updates, seen in rows
            for scalar in (*norms.values(), *updates.values(), *(s for statistics in seen.values() for s in statistics))
        ]
        self._trace._extend(rows, read(scalars))

    def close(self) -> None:
        """Stop recording: remove every hook. What was recorded stays."""
        if self._steps is not None:
            self._steps.remove()
        for module in list(self._watched):
            _unwatch(module, self)
        self._watched, self._before, self._steps = weakref.WeakSet(), [], None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[[Trace], Recorder], tuple[Trace]]:
        return _closed, (self.trace,)


def _closed(trace: Trace) -> Recorder:
    """A recorder that rides on nothing."""
    made = object.__new__(Recorder)
    made._trace, made._rows, made._watched = trace, [], weakref.WeakSet()
    made._model = made._optimizer = made._steps = None
    return made


# ------------------------------------------------------------------------------------------ the hooks of the modules


class _Watched:
    """Who watches a module, and the one hook by which they do."""

    def __init__(self, module: nn.Module) -> None:
        self.watchers: weakref.WeakKeyDictionary[Recorder, str] = weakref.WeakKeyDictionary()
        self.handle = module.register_forward_hook(gradprune_recorder)


_WATCHED: weakref.WeakKeyDictionary[nn.Module, _Watched] = weakref.WeakKeyDictionary()


def _watch(module: nn.Module, recorder: Recorder, name: str) -> None:
    watched = _WATCHED.get(module)
    if watched is None:
        watched = _WATCHED[module] = _Watched(module)
    watched.watchers[recorder] = name


def _unwatch(module: nn.Module, recorder: Recorder) -> None:
    watched = _WATCHED.get(module)
    if watched is not None:
        watched.watchers.pop(recorder, None)
        if not watched.watchers:
            watched.handle.remove()
            del _WATCHED[module]


def gradprune_recorder(module: nn.Module, args: Tuple[Tensor], output: Tensor) -> None:  # noqa: UP006
    """Show an output to the recorders that watch the module.

    A function by name, so that models are copied, pickled and scripted with it; a copy is watched by nobody. Scripted
    it does nothing, and its signature is that of the hook of a layer that takes and returns one tensor.
    """
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        _show(module, output)


def _show(module: nn.Module, output: Any) -> None:
    if torch.compiler.is_compiling() or torch._C._is_tracing() or not torch.is_grad_enabled():
        return
    watched = _WATCHED.get(module)
    for recorder, name in list(watched.watchers.items()) if watched is not None else ():
        if recorder._wants():
            recorder._see(name, output)


def _is_plain(output: Tensor) -> bool:
    """Whether it is a tensor of numbers, and not what a transformation puts in its place to see what is done to it."""
    return (
        type(output).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not output.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(output)
        and not torch._C._len_torch_dispatch_stack()
    )


def _is_leaf(name: str, module: nn.Module) -> bool:
    """Whether the module has no modules inside, but for those that make its weights of other weights."""
    return "parametrizations" not in name.split(".") and all(
        child == "parametrizations" for child, _ in module.named_children()
    )


def _statistics(output: Tensor) -> list[Scalar]:
    """Mean, standard deviation and share of zeros."""
    output = output.float() if output.dtype in HALF else output
    if output.device.type != "cpu":
        unread = output.mean()
        return [unread, _spread(output, unread), (output == 0).float().mean()]
    values = output.resolve_neg().numpy()
    zero = float(np.count_nonzero(values == 0)) / values.size  # by NumPy, which counts ten times as fast as torch
    mean = output.mean().item()
    mean_square = read(norms_of([output]))[0] ** 2 / values.size
    variance = mean_square - mean**2
    if variance > 0.1 * mean_square and 1e-24 < mean_square < math.inf:
        return [mean, math.sqrt(variance), zero]
    return [mean, _spread(output, mean), zero]


def _spread(values: Tensor, mean: Scalar) -> Scalar:
    """The standard deviation, with the mean taken off first: a difference of squares would cancel."""
    (norm,) = norms_of([values - mean])
    return norm / math.sqrt(values.numel())


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _ratio(change: Scalar, size: Scalar) -> Scalar:
    if isinstance(size, Tensor) or size:
        return change / size
    return math.inf if change else math.nan

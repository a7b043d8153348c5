"""Who steps, and what is a step?

A weight is moved by the step of an optimizer, which may be wrapped by others (accelerate, Lightning, SAM, Lookahead),
be one of several, take a closure, be stepped in two halves, or be skipped by a gradient scaler. What wants to act
around steps asks here: ``ridden`` finds the optimizers whose steps can be watched, ``hook`` watches the calls of one,
``Steps`` tells of each step once, however many optimizers a call passes through.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradprune.core.checks import is_distributed
from gradprune.core.ranks import ranks_of
from gradprune.core.sharded import local
from gradprune.core.uncompiled import uncompiled

Optimizers = Optimizer | Iterable[Optimizer]

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_load_state_dict_post_hooks",
    "_optimizer_state_dict_pre_hooks",
)


def as_list(optimizers: Optimizers) -> list[Any]:
    """Return the optimizers given, one or several, each once; raise TypeError for anything else.

    An optimizer is what has param_groups and a step; a wrapper of another class will do.
    """
    given = [optimizers] if _is_optimizer(optimizers) or not isinstance(optimizers, Iterable) else list(optimizers)
    found: list[Any] = []
    for optimizer in given:
        if not _is_optimizer(optimizer):
            raise TypeError(f"optimizer must be a torch optimizer or a list of them, got {_kind(optimizer)}")
        if all(optimizer is not other for other in found):
            found.append(optimizer)
    if not found:
        raise ValueError("the list of optimizers is empty")
    return found


def _is_optimizer(value: Any) -> bool:
    if isinstance(value, type | nn.Module | torch.optim.lr_scheduler.LRScheduler):
        return False
    return isinstance(value, Optimizer) or (callable(getattr(value, "step", None)) and bool(_inside(value)))


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}: make one"
    if isinstance(value, nn.Module):
        return f"a model, {type(value).__name__}"
    if isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        return f"a scheduler, {type(value).__name__}: pass its optimizer"
    return type(value).__name__


def _inside(wrapper: Any) -> list[Optimizer]:
    """The optimizers that an object keeps in its attributes, by themselves or in a list or dict."""
    found: list[Optimizer] = []
    for value in getattr(wrapper, "__dict__", {}).values():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        found += [v for v in values if isinstance(v, Optimizer) and v is not wrapper]
    return found


def parameters_of(optimizer: Any) -> list[Tensor]:
    """Return the parameters that the optimizer has now, or those of the optimizers that it wraps."""
    if hasattr(optimizer, "param_groups"):
        return [p for group in optimizer.param_groups for p in group["params"]]
    return [p for inner in _inside(optimizer) for p in parameters_of(inner)]


def ridden(optimizer: Any) -> list[Optimizer]:
    """Return the optimizers that take this one's steps and whose steps can be watched: itself, then what it wraps.

    Of a wrapper that does not call its own hooks only what it wraps is returned. Raises TypeError where there is none.
    """
    found = list(_ridden(optimizer, set()))
    if not found:
        raise TypeError(
            f"the steps of {type(optimizer).__name__} cannot be watched: it runs no step hooks (was "
            "torch.optim.Optimizer.__init__ not called?) and wraps no optimizer that does. Pass the torch optimizer "
            "inside it"
        )
    return found


def _ridden(optimizer: Any, seen: set[int]) -> Iterator[Optimizer]:
    seen.add(id(optimizer))
    if all(name in getattr(optimizer, "__dict__", {}) for name in _HOOKS) and getattr(
        type(optimizer).step, "hooked", False
    ):
        yield optimizer
    own = {id(p) for p in parameters_of(optimizer)}
    for inner in _inside(optimizer):
        if id(inner) not in seen and not own.isdisjoint(map(id, parameters_of(inner))):
            yield from _ridden(inner, seen)


def not_owned(parameters: Mapping[str, Tensor], optimizers: Iterable[Any]) -> list[str]:
    """Return the names of the parameters that none of the optimizers has."""
    owned = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
    return [name for name, parameter in parameters.items() if id(parameter) not in owned]


class Hooks:
    """Hooks that were added together; ``remove()`` takes them all off."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add(self, handle: RemovableHandle) -> RemovableHandle:
        """Keep a handle."""
        self._handles.append(handle)
        return handle

    def remove(self) -> None:
        """Take the hooks off; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __bool__(self) -> bool:
        return bool(self._handles)


def hook(
    optimizer: Optimizer,
    *,
    begins: Callable[[Optimizer], object] | None = None,
    gradients: Callable[[Optimizer], object],
    ends: Callable[[Optimizer, bool], object],
    first: bool = False,
) -> Hooks:
    """Watch the step of one optimizer.

    ``begins(optimizer)`` is called before each call of its step; ``gradients(optimizer)`` when the gradients are there:
    at once, or, where the step is given a closure, after each call of that; ``ends(optimizer, taken)`` after the step,
    where `taken` says whether it was one (``_was_taken``). With `first` the calls before the step come before those of
    hooks that were added earlier. Under torch.compile they are run as they are, not compiled.
    """
    pretended = False

    def before(
        optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        nonlocal pretended
        pretended = _is_pretence(optimizer)
        if begins is not None:
            begins(optimizer)
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": _followed(kwargs["closure"], gradients, optimizer)}
        if len(args) > 1 and callable(args[1]):  # args begins with the optimizer itself
            return (args[0], _followed(args[1], gradients, optimizer), *args[2:]), kwargs
        gradients(optimizer)
        return None

    def after(optimizer: Optimizer, *_: Any) -> None:
        ends(optimizer, not pretended and not _was_skipped(optimizer))

    hooks = Hooks()
    try:
        handle = hooks.add(optimizer.register_step_pre_hook(uncompiled(before)))
        if first:
            optimizer._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
        hooks.add(optimizer.register_step_post_hook(uncompiled(after)))
    except BaseException:
        hooks.remove()
        raise
    return hooks


def _followed(
    closure: Callable[[], Any], then: Callable[[Optimizer], object], optimizer: Optimizer
) -> Callable[[], Any]:
    def closure_and_then() -> Any:
        value = closure()
        then(optimizer)
        return value

    return closure_and_then


def _is_pretence(optimizer: Optimizer) -> bool:
    """Whether the step is none: torch.distributed.checkpoint takes one to make an optimizer's state.

    It is the first, at a rate of zero, with gradients that are all zero.
    """
    if optimizer.state or any(float(group.get("lr", 1.0)) != 0.0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    moving = any(bool(local(g).count_nonzero()) for g in gradients if g.layout == torch.strided)
    if any(map(is_distributed, gradients)):  # a block may be zero, or empty, on one rank alone
        moving = ranks_of(gradients).on_any([moving])[0]
    return bool(gradients) and not moving


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler told a fused optimizer, which does its own unscaling, to leave all as it was."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


class Steps:
    """Tells of each step of the given optimizers, once.

    ``begins()`` is called before a step, ``gradients()`` when its gradients are there, of several sets (closures, two
    halves in one call) the first, and ``taken()`` when it is over: when the outermost of the calls in progress has
    returned, and where an optimizer wraps others only if one of those has stepped. Of several optimizers the last one
    counts the steps.
    """

    def __init__(
        self,
        optimizers: Iterable[Any],
        *,
        begins: Callable[[], object] | None = None,
        gradients: Callable[[], object],
        taken: Callable[[], object],
    ) -> None:
        *_, counting = optimizers
        self._chain = [weakref.ref(optimizer) for optimizer in ridden(counting)]
        self._begins, self._gradients, self._taken = begins, gradients, taken
        self._open: list[Optimizer] = []  # the calls in progress, outermost first
        self._innermost_took = False
        self._seen_gradients = False
        self._hooks: list[Hooks] = []
        try:
            for reference in self._chain:
                optimizer = reference()
                assert optimizer is not None
                self._hooks.append(
                    hook(optimizer, begins=self._begin, gradients=self._look, ends=self._end, first=True)
                )
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Tell no more."""
        for hooks in self._hooks:
            hooks.remove()
        self._hooks = []

    def _begin(self, optimizer: Optimizer) -> None:
        if optimizer in self._open:  # an earlier call of it ended by an exception, of which nothing is told
            del self._open[self._open.index(optimizer) :]
        if self._outermost(optimizer):
            self._open.clear()
        if not self._open:
            self._innermost_took = self._seen_gradients = False
            if self._begins is not None:
                self._begins()
        self._open.append(optimizer)

    def _look(self, optimizer: Optimizer) -> None:
        if not self._seen_gradients:
            self._gradients()
        self._seen_gradients = True

    def _end(self, optimizer: Optimizer, taken: bool) -> None:
        if optimizer in self._open:
            del self._open[self._open.index(optimizer) :]
        wraps = self._chain[-1]() is not optimizer
        self._innermost_took = self._innermost_took if wraps else taken
        if not self._open and self._innermost_took:
            self._taken()

    def _outermost(self, optimizer: Optimizer) -> bool:
        return self._chain[0]() is optimizer

"""What holds pruned weights at zero while an optimizer steps (chapter 4)?"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradprune.core.masked import count_kept, zero_pruned_

# Their step moves an entry by its own weight, gradient and state alone, so what the gradient of a pruned entry does to
# its state does not reach the others.
_ENTRY_BY_ENTRY = {
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "ASGD")
}


class Hold:
    """What ``Masks.hold`` returns; ``remove()``, or the end of its ``with`` block, lets the weights move again."""

    def __init__(self, optimizer: Optimizer, masks: Mapping[nn.Parameter, Tensor]) -> None:
        self._held = {p: _Held(mask) for p, mask in masks.items()}
        self._optimizer = weakref.ref(optimizer)
        self._keeper = _KEEPERS.get(optimizer) or _Keeper()
        if masks:
            self._keeper.ride_on(optimizer)
        self._keeper.clear_state(optimizer)  # by the masks so far: what comes back must start afresh
        self._keeper.held.update(self._held)
        self._keeper.clear_state(optimizer)

    def remove(self) -> None:
        """Stop holding. The weights stay as they are until the next step moves them; calling it twice is fine."""
        optimizer = self._optimizer()
        if optimizer is not None and self._held:
            self._keeper.clear_state(optimizer)
        for parameter, held in self._held.items():
            if self._keeper.held.get(parameter) is held:  # else a later hold has taken it over
                del self._keeper.held[parameter]
        self._held = {}
        if not self._keeper.held:
            self._keeper.get_off()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Held:
    """One parameter's mask, which follows the parameter to its device."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.prunes = count_kept(mask) < mask.numel()

    def mask_on(self, device: torch.device) -> Tensor:
        if self.mask.device != device:
            self.mask = self.mask.to(device)
        return self.mask


class _Keeper:
    """What hangs on one optimizer and keeps weights at zero for all its holds: one mask a parameter.

    One pass over the weights is all that a step costs. Zeroing the gradients instead would leave the weights zero too,
    but not after a write from outside; and second moments that are exactly zero make Adam's step half as long again,
    as the square root of zero is a slow special case of the vector library on the CPU.
    """

    def __init__(self) -> None:
        self.held: dict[nn.Parameter, _Held] = {}
        self._hooks: list[RemovableHandle] = []

    def ride_on(self, optimizer: Optimizer) -> None:
        if self._hooks:  # a second hold must be possible inside a step's hooks, where none may be added
            return
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self.clear_state),
            optimizer.register_state_dict_pre_hook(self.clear_state),
        ]
        _KEEPERS[optimizer] = self

    def get_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((p, held.mask_on(p.device)) for p, held in self.held.items() if held.prunes)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if type(optimizer) in _ENTRY_BY_ENTRY:
            return None
        self._mask_gradients()
        # A closure computes the gradients anew inside the step. `args` begins with the optimizer itself.
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._masking(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._masking(kwargs["closure"])}
        return None

    def _masking(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_with_masked_gradients() -> Any:
            loss = closure()
            self._mask_gradients()
            return loss

        return closure_with_masked_gradients

    def _mask_gradients(self) -> None:
        gradients = ((parameter.grad, mask) for parameter, mask in self._pruned())
        zero_pruned_((grad, mask) for grad, mask in gradients if grad is not None and grad.layout == torch.strided)

    def _after_step(self, *_: Any) -> None:
        zero_pruned_(self._pruned())

    def clear_state(self, optimizer: Optimizer) -> None:
        """Forget what the optimizer remembers of pruned entries: momentum, second moments and the like."""
        masks = dict(self._pruned())
        joined = _lbfgs_parameters(optimizer)
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in joined]
        for parameter, state in cast(Mapping[nn.Parameter, dict[str, Any]], optimizer.state).items():
            for value in _tensors_in(state.values()):
                if parameter in masks and value.shape == parameter.shape:
                    zero_pruned_([(value, masks[parameter])])
                elif joined and value.numel() == sum(sizes):
                    parts = zip(torch.split(value, sizes), joined, strict=True)
                    zero_pruned_((part, _joined_mask(p, masks[p])) for part, p in parts if p in masks)


_KEEPERS: weakref.WeakKeyDictionary[Optimizer, _Keeper] = weakref.WeakKeyDictionary()


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from _tensors_in(value)


def _lbfgs_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """LBFGS keeps vectors over all parameters, joined in this order; the others keep no such thing."""
    return optimizer.param_groups[0]["params"] if isinstance(optimizer, torch.optim.LBFGS) else []


def _joined_mask(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """As LBFGS joins parameters: flat, real and imaginary parts in turn."""
    return mask.reshape(-1).repeat_interleave(2 if parameter.is_complex() else 1)

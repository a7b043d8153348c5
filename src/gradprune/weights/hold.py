"""What holds pruned weights at zero while optimizers step (chapter 4)?"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradprune.core.checks import warn
from gradprune.core.masked import count_alive, count_kept, zero_pruned_
from gradprune.core.steps import Hooks, Optimizers, as_list, hook, not_owned, parameters_of, ridden

# Their step moves an entry by its own weight, gradient and state alone, so what the gradient of a pruned entry does to
# its state does not reach the others.
_ENTRY_BY_ENTRY = {
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "ASGD")
}
# What optimizers that mix entries call the one part of their state that is a running sum of gradients or weights.
_ENTRY_BY_ENTRY_KEYS = {"momentum_buffer", "exp_avg", "z"}


class Hold:
    """What ``Masks.hold`` returns; ``remove()``, or the end of its ``with`` block, lets the weights move again."""

    def __init__(self, optimizers: Optimizers, masks: Mapping[nn.Parameter, Tensor]) -> None:
        given = as_list(optimizers)
        self._given = [weakref.ref(optimizer) for optimizer in given]
        self._held: dict[nn.Parameter, _Held] = {}
        self._keepers: list[_Keeper] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []
        members = [member for optimizer in given for member in ridden(optimizer)]  # each found before one is ridden
        try:
            for member in members:
                keeper = _KEEPERS.get(member) or _Keeper()
                if masks:
                    keeper.ride_on(member)
                self._keepers.append(keeper)
                self._optimizers.append(weakref.ref(member))
        except BaseException:
            for keeper in self._keepers:
                keeper.get_off_if_idle()
            raise
        self._replace(masks)

    def _replace(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Hold by these masks from now on; what the optimizers remember of entries that come or go is forgotten."""
        held = {parameter: _Held(mask) for parameter, mask in masks.items()}
        for keeper, optimizer in self._pairs():
            owned = set(map(id, parameters_of(optimizer)))
            keeper.clear_state(optimizer)  # by the masks so far: what comes back must start afresh
            keeper.held.update({p: h for p, h in held.items() if id(p) in owned})
            keeper.clear_state(optimizer)
        self._held = held

    def remove(self) -> None:
        """Stop holding. The weights stay as they are until the next step moves them; calling it twice is fine."""
        if not self._held:
            return
        for keeper, optimizer in self._pairs():
            keeper.clear_state(optimizer)
            for parameter, held in self._held.items():
                if keeper.held.get(parameter) is held:  # else a later hold has taken it over
                    del keeper.held[parameter]
            keeper.get_off_if_idle()
        self._held = {}

    def _pairs(self) -> Iterator[tuple[_Keeper, Optimizer]]:
        for keeper, reference in zip(self._keepers, self._optimizers, strict=True):
            optimizer = reference()
            if optimizer is not None:
                yield keeper, optimizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Hold:
        # With the copies of its optimizers, which have no hooks: a copy that holds.
        given = [copy.deepcopy(reference(), memo) for reference in self._given]
        masks = {copy.deepcopy(p, memo): held.mask.clone() for p, held in self._held.items()}
        return Hold([optimizer for optimizer in given if optimizer is not None], masks)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class _Held:
    """One parameter's mask, which follows the parameter to its device."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.kept = mask.view(torch.int8)  # the same memory: of a small layer a view takes as long as the work
        self.prunes = count_kept(mask) < mask.numel()

    def mask_on(self, device: torch.device) -> Tensor:
        if self.mask.device != device:
            self.mask = self.mask.to(device)
            self.kept = self.mask.view(torch.int8)
        return self.mask

    def kept_on(self, device: torch.device) -> Tensor:
        return self.kept if self.kept.device == device else self.mask_on(device).view(torch.int8)


class _Keeper:
    """What hangs on one optimizer and keeps weights at zero for all its holds: one mask a parameter.

    One pass over the weights is all that a step costs. Zeroing the gradients instead would leave the weights zero too,
    but not after a write from outside; and second moments that are exactly zero make Adam's step half as long again,
    as the square root of zero is a slow special case of the vector library on the CPU.
    """

    def __init__(self) -> None:
        self.held: dict[nn.Parameter, _Held] = {}
        self._hooks = Hooks()

    def ride_on(self, optimizer: Optimizer) -> None:
        if self._hooks:  # a second hold must be possible inside a step's hooks, where none may be added
            return
        self._hooks = hook(optimizer, gradients=self._mask_gradients, ends=self._zero)
        try:
            self._hooks.add(optimizer.register_load_state_dict_post_hook(self.clear_state))
            self._hooks.add(optimizer.register_state_dict_pre_hook(self.clear_state))
        except BaseException:
            self._hooks.remove()
            raise
        _KEEPERS[optimizer] = self

    def get_off_if_idle(self) -> None:
        if not self.held:
            self._hooks.remove()

    def _pruned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        return ((p, held.mask_on(p.device)) for p, held in self.held.items() if held.prunes)

    def _mask_gradients(self, optimizer: Optimizer) -> None:
        if type(optimizer) in _ENTRY_BY_ENTRY:
            return
        gradients = ((parameter.grad, mask) for parameter, mask in self._pruned())
        zero_pruned_((grad, mask) for grad, mask in gradients if grad is not None and grad.layout == torch.strided)

    def _zero(self, *_: Any) -> None:
        zero_pruned_((p, held.kept_on(p.device)) for p, held in self.held.items() if held.prunes)

    def clear_state(self, optimizer: Optimizer) -> None:
        """Forget what the optimizer remembers of pruned entries: momentum, second moments and the like."""
        masks = dict(self._pruned())
        if not masks:
            return
        joined = _lbfgs_parameters(optimizer)
        sizes = [p.numel() * (2 if p.is_complex() else 1) for p in joined]
        states = cast(Mapping[nn.Parameter, dict[str, Any]], optimizer.state)
        keys = _entry_by_entry(states, known=type(optimizer) in _ENTRY_BY_ENTRY)
        for parameter, state in states.items():
            for value in _tensors_in(state.values()):
                if joined and value.numel() == sum(sizes):
                    parts = zip(torch.split(value, sizes), joined, strict=True)
                    zero_pruned_((part, _joined_mask(p, masks[p])) for part, p in parts if p in masks)
            if parameter in masks:
                values = _tensors_in(value for key, value in state.items() if key in keys)
                zero_pruned_((v, masks[parameter]) for v in values if v.shape == parameter.shape)


_KEEPERS: weakref.WeakKeyDictionary[Optimizer, _Keeper] = weakref.WeakKeyDictionary()


def held_mask(parameter: nn.Parameter, *, whole: bool = False) -> Tensor | None:
    """Return the mask by which an optimizer holds the parameter; None where none does.

    Nor does one that prunes nothing, unless `whole`: of a parameter that is spread, it may prune on other ranks.
    """
    for keeper in list(_KEEPERS.values()):
        held = keeper.held.get(parameter)
        if held is not None and (held.prunes or whole):
            return held.mask_on(parameter.device)
    return None


def warn_of_revived(parameters: Mapping[str, nn.Parameter]) -> None:
    """Warn where held weights are other than zero: something else than the optimizers that hold them has written them.

    Called where the package looks at a model again, since only then it costs nothing beside what is done anyway.
    """
    for name, parameter in parameters.items():
        mask = held_mask(parameter)
        if mask is not None and count_alive([(parameter, mask)]):
            warn(
                f"weights of {name!r} that are held at zero are other than zero: something has written them outside a "
                "step of the optimizer that holds them (another optimizer, an average, a loaded checkpoint). "
                "masks.apply_(model) sets them to zero, masks.hold(optimizer) holds them in another optimizer"
            )
            return


def warn_of_unowned(parameters: Mapping[str, nn.Parameter], optimizers: list[Any]) -> None:
    """Warn of masked parameters that no optimizer given has, that are trained, and that nothing else holds."""
    unowned = not_owned(parameters, optimizers)
    loose = [name for name in unowned if parameters[name].requires_grad and held_mask(parameters[name]) is None]
    if loose:
        warn(
            f"the optimizer does not have {', '.join(map(repr, loose[:5]))}{' and others' if len(loose) > 5 else ''}: "
            "what is pruned there is not held. Give all optimizers of the model at once: masks.hold([first, second])"
        )


def _entry_by_entry(states: Mapping[nn.Parameter, dict[str, Any]], *, known: bool) -> set[str]:
    """The keys of an optimizer's state whose tensors hold one number for each of their parameter's entries.

    Known for torch's own optimizers. Of others those whose tensors have their parameter's shape wherever the key
    occurs, on at least one parameter that is no square matrix, since on those a matrix that mixes rows looks the same.
    Where the state also has tensors of other shapes, entries are mixed, and only running sums are taken for such.
    """
    keys = {key for state in states.values() for key in state}
    if known:
        return keys
    fitting: dict[str, bool] = {}
    evident, mixing = set(), False
    for parameter, state in states.items():
        square = parameter.dim() == 2 and parameter.shape[0] == parameter.shape[1]
        for key, value in state.items():
            for tensor in _tensors_in([value]):
                fits = tensor.shape == parameter.shape
                fitting[key] = fitting.get(key, True) and fits
                mixing |= not fits and tensor.numel() > 1
                if fits and not square:
                    evident.add(key)
    found = {key for key, fits in fitting.items() if fits}
    return found & _ENTRY_BY_ENTRY_KEYS if mixing else found & (evident | _ENTRY_BY_ENTRY_KEYS)


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


def _lbfgs_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """LBFGS keeps vectors over all parameters, joined in this order; the others keep no such thing."""
    return optimizer.param_groups[0]["params"] if isinstance(optimizer, torch.optim.LBFGS) else []


def _joined_mask(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """As LBFGS joins parameters: flat, real and imaginary parts in turn."""
    return mask.reshape(-1).repeat_interleave(2 if parameter.is_complex() else 1)

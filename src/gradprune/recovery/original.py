"""Has the caller's `evaluate` changed the network's weights, and how do they come back?"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.checks import require
from gradprune.core.unchanged import Keeper

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HOW = "evaluate a copy, made by copy.deepcopy(model), where evaluating changes it"


class Original:
    """A network as it was: its modules and parameters, and a copy of its weights.

    After each evaluation what torch knows is compared: which parameters there are, of which dtype, device and
    `requires_grad`, where in memory they lie, and how often they were written (``_version``); what was written or moved
    is then compared bit by bit, so that an `evaluate` that puts back itself passes. Writes to ``.data`` are not counted
    by torch: all bits are compared after the first evaluation and at the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self.keeper = Keeper(model)
        self._places = [(module, dict(module._parameters), dict(module._modules)) for module in self.keeper.modules]
        self._names = [name for name, _ in model.named_parameters()]
        self._own = [p.detach() for p in self.keeper.parameters]  # the same memory
        self._wants = [p.requires_grad for p in self.keeper.parameters]
        self._copies = [own.clone() for own in self._own]
        self._read_once = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Put all back at the end or at an exception; ValueError at the end where there was something to put back."""
        try:
            yield
        except BaseException:
            self._put_back()
            raise
        changed = self._put_back()
        require(not changed, f"evaluate changed the values of {_listed(changed)}, which are put back: {_HOW}")

    @contextmanager
    def watched(self, where: str, written: Iterable[nn.Parameter] = ()) -> Iterator[None]:
        """Raise ValueError where the network is not after the evaluation what it was before; all is put back then.

        The `written` parameters are those that differ from the original ones already.
        """
        now = {p: p.detach().clone() for p in written}
        expected = [now.get(p, copy) for p, copy in zip(self.keeper.parameters, self._copies, strict=True)]
        held = [p.detach() for p in self.keeper.parameters]
        before, places = self._marks(), self._there()
        try:
            yield
        except BaseException:
            self._put_back()
            raise
        said = "" if places == self._there() else "which parameters and modules it has"
        changed = []
        for at, (old, new) in enumerate(zip(before, self._marks(), strict=True)):
            parameter = self.keeper.parameters[at]
            if old[:4] != new[:4]:
                said = said or f"the dtype, shape, device or requires_grad of {self._names[at]!r}"
            elif (old != new or not self._read_once) and not _same(parameter.detach(), expected[at]):
                changed.append(self._names[at])
            elif old[4] != new[4]:  # the same values in other memory, as after a way to a GPU and back
                parameter.data = held[at]
        said = said or (f"the values of {_listed(changed)}" if changed else "")
        if said:
            self._put_back()
        self._read_once = True
        require(not said, f"evaluate changed {said} {where}; it is put back: {_HOW}")

    def _marks(self) -> list[tuple[Any, ...]]:
        """What torch knows of each parameter, at no cost."""
        return [
            (p.dtype, p.requires_grad, p.shape, p.device, _place(p), None if p.is_inference() else p._version)
            for p in self.keeper.parameters
        ]

    def _there(self) -> list[tuple[int, ...]]:
        """Which parameters and modules each module has."""
        return [(*map(id, m._parameters.values()), *map(id, m._modules.values())) for m, _, _ in self._places]

    def _put_back(self) -> list[str]:
        """Make everything what it was; return the names of the parameters of which values had to be written."""
        try:
            return self._written_back()
        except BaseException:  # a signal's, between two tensors
            self._written_back()
            raise

    def _written_back(self) -> list[str]:
        for module, parameters, modules in self._places:
            _refill(module._parameters, parameters)
            _refill(module._modules, modules)
        changed = []
        for at, parameter in enumerate(self.keeper.parameters):
            own, copy = self._own[at], self._copies[at]
            if parameter.dtype != own.dtype or _place(parameter) != _place(own) or parameter.shape != own.shape:
                parameter.data = own
            if parameter.requires_grad != self._wants[at]:
                parameter.requires_grad_(self._wants[at])
            if not _same(own, copy):
                changed.append(self._names[at])
                with torch.inference_mode(own.is_inference()), torch.no_grad():
                    own.copy_(copy)
        return changed


def _refill(place: dict[str, Any], was: dict[str, Any]) -> None:
    """Let a dict hold what it held, in that order."""
    if list(place) != list(was) or any(place[name] is not value for name, value in was.items()):
        place.clear()
        place.update(was)


def _plain(tensor: Tensor) -> bool:
    """Whether the entries lie in memory one by one, and not in a wrapper's own way."""
    kind = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return kind and tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized


def _place(tensor: Tensor) -> int:
    return tensor.data_ptr() if _plain(tensor) else 0


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same bits; True where they have none that can be read one by one."""
    if not (_plain(one) and _plain(other)):
        return True
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    bits = _BITS[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


def _listed(names: Collection[str]) -> str:
    first = ", ".join(map(repr, list(names)[:3]))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"

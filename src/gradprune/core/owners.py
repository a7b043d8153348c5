"""Whose weight is a tensor that an operator gets: a parameter, a part of one, or a copy of either?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from gradprune.core.sharded import local

aten = torch.ops.aten
_ENTRY_BY_ENTRY = {aten._to_copy, aten.clone, aten.copy, aten.copy_}
_SELECTED = {aten.index, aten.index_select}
_MOVED = _ENTRY_BY_ENTRY | _SELECTED | {
    aten.cat, aten.stack, aten.gather, aten.repeat, aten.flip, aten.roll,
    aten.t, aten.transpose,  # of a sparse tensor they are copies
}  # fmt: skip


class Place(NamedTuple):
    """Where a tensor's entries lie: in which memory of how many entries, and how they are strided over it."""

    memory: int
    entries: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Copy(NamedTuple):
    """Where the entries of a copy come from: from `source`, all of them in order, or those at `indices`."""

    source: Place
    result: Place
    indices: tuple[Tensor | None, ...] | None


class Owners(TorchDispatchMode):
    """Sees every operator while the model runs, and knows which module's weight each of its tensors is.

    Tensors are told apart by their memory, so that views are parts of what they view; copies and casts made while it
    is on are followed. A weight is a parameter of two dimensions or more. ``ran`` is called for every operator.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._running = model, [model]
        self._owners: dict[int, list[nn.Module]] = {}
        self._copies: dict[int, Copy] = {}
        self._alive: dict[int, StorageWeakRef] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.dim() >= 2 and (key := memory(p)) is not None:
                    self._owners.setdefault(key, []).append(module)
        self.parameters = frozenset(self._owners)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what runs inside, with the modules that run."""
        hooks: list[RemovableHandle] = []
        try:
            for module in self._model.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks; its weights are known by their memory all the same
                hooks.append(module.register_forward_pre_hook(self._begin))
                hooks.append(module.register_forward_hook(self._end, always_call=True))
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator and tell ``ran``; of one that is made of others, these."""
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        operator = getattr(func, "_overloadpacket", func)
        if operator in _MOVED:
            self._follow(operator, args, result)
        self.ran(operator, args, kwargs, result)
        return result

    def ran(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Called after each operator."""

    @property
    def running(self) -> nn.Module:
        """The innermost module that runs."""
        return self._running[-1]

    def owners(self, tensor: Tensor) -> list[nn.Module]:
        """The modules that have the tensor as a weight, or as a part or a copy of one; most have none."""
        key = memory(tensor)
        return [] if key is None else self._owners.get(key, [])

    def copied_from(self, place: Place) -> Copy | None:
        """Where the entries come from, if they are in a copy of a weight of which that is known entry by entry."""
        return self._copies.get(place.memory)

    def stand_in(self, whole: Tensor, modules: Iterable[nn.Module]) -> int:
        """Take a tensor for a parameter of modules, until ``no_more``; return the key of its memory."""
        key = memory(whole)
        assert key is not None
        self.no_more(key)
        self._owners[key] = list(modules)
        self.parameters |= {key}
        return key

    def no_more(self, key: int) -> None:
        """Forget a tensor that stood in for a parameter."""
        self.parameters -= {key}
        for known in (self._owners, self._alive, self._copies):
            known.pop(key, None)

    def weight_among(self, operands: Iterable[Any]) -> tuple[nn.Module, Tensor | None]:
        """The weight among an operator's operands, and its module: the one that runs where it has one itself."""
        elsewhere = None
        for tensor in operands:
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                owners = self.owners(tensor)
                if self.running in owners:
                    return self.running, tensor
                if owners and elsewhere is None:
                    elsewhere = owners[0], tensor
        return elsewhere or (self.running, None)

    def _follow(self, operator: Any, args: tuple[Any, ...], result: Any) -> None:
        sources = args[0] if isinstance(args[0], tuple | list) else [args[1 if operator is aten.copy_ else 0]]
        owners = [self.owners(t) if isinstance(t, Tensor) else [] for t in sources]
        key = memory(result) if isinstance(result, Tensor) and all(owners) else None
        if key is None or key in self.parameters or any(key == memory(source) for source in sources):
            return
        entries = _entries(local(result))
        storage = entries.untyped_storage()
        if entries.numel() * entries.element_size() != storage.nbytes():
            return  # written into a part of something else
        self._forget_what_is_gone()
        self._owners[key] = list(dict.fromkeys(module for found in owners for module in found))
        self._alive[key] = StorageWeakRef(storage)  # as long as it stands here, the key is not given away again
        self._copies.pop(key, None)
        indices: tuple[Tensor | None, ...] | None = None
        if operator is aten.index:
            indices = tuple(args[1])
        elif operator is aten.index_select:
            indices = (None,) * (args[1] % max(sources[0].dim(), 1)) + (args[2],)
        elif operator not in _ENTRY_BY_ENTRY or sources[0].shape != result.shape:
            return
        if sources[0].layout == result.layout == torch.strided:
            self._copies[key] = Copy(place(sources[0]), place(result), indices)

    def _forget_what_is_gone(self) -> None:
        if len(self._alive) >= 1024:
            for key in [key for key, storage in self._alive.items() if storage.expired()]:
                del self._alive[key], self._owners[key]
                self._copies.pop(key, None)

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _end(self, *_: Any) -> None:
        self._running.pop()


@cache
def _is_composite(func: Any) -> bool:
    """Whether an operator is made of others: it is seen itself only where its tensors take no part in autograd."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def memory(tensor: Tensor) -> int | None:
    """A key of the memory that the tensor's entries are in, those held here; None where it has none."""
    try:
        return int(_entries(local(tensor)).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _entries(tensor: Tensor) -> Tensor:
    """The tensor itself, or the values that a sparse one stores."""
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    compressed = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
    return tensor.values() if tensor.layout in compressed else tensor


def place(tensor: Tensor) -> Place:
    """Where the entries of a strided tensor lie; of a DTensor, those held here."""
    tensor = local(tensor)
    storage = tensor.untyped_storage()
    entries = storage.nbytes() // tensor.element_size()
    return Place(storage._cdata, entries, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

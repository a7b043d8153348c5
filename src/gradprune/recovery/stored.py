"""How does a model have its weights in files, and in memory those that are at work (chapter 5)?

Each parameter of a model on the meta device becomes a view of a file's bytes, mapped into the address space: what is
read of it is fetched, and forgotten again. Of a block that runs alone the parameters are copied into memory. A weight
that is pruned is written to another file, and is a view of that from then on.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.checkpoint import Checkpoint, File, Tensors, pieces
from gradprune.core.checks import require
from gradprune.core.header import DTYPES
from gradprune.core.layers import Weight
from gradprune.core.written import Resumed

AT_A_TIME = 2**24  # bytes that are copied or compared at once


class _View(NamedTuple):
    """Bytes of a mapped file, and the tensor that they are."""

    file: mmap.mmap
    tensor: Tensors

    def __call__(self) -> Tensor:
        entry, dtype = self.tensor.entry, DTYPES[self.tensor.entry.dtype]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(self.file, dtype=dtype, count=entry.numel, offset=self._start)
        return flat.view(entry.shape)

    def forget(self) -> None:
        """Let the memory go that was fetched; where the system knows no such request, it does so when it must."""
        if hasattr(mmap, "MADV_DONTNEED"):
            before = self._start % mmap.PAGESIZE
            self.file.madvise(mmap.MADV_DONTNEED, self._start - before, before + self.tensor.entry.nbytes)

    @property
    def _start(self) -> int:
        return self.tensor.part.header.start + self.tensor.entry.start


class Stored:
    """The parameters of a model on the meta device, in a checkpoint; ``Where`` of ``reconstruct`` says what is asked.

    TypeError where a parameter is not on the meta device, ValueError where the checkpoint is not the model's.
    """

    once = True

    def __init__(self, model: nn.Module, source: Checkpoint) -> None:
        self._source, self._names = source, _names(model, source)
        self._maps = {part.name: _mapped(part.path) for part in source.parts if isinstance(part, File)}
        self._views: dict[nn.Parameter, list[_View]] = {}  # one for each of its names in the checkpoint
        self._held: list[nn.Parameter] = []
        self._block: nn.Module | None = None
        self._done: list[str] = []
        self.open: list[str] = []

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Let a model have its values; at the end it is as it was."""
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        hooks, new = [], dict[int, Tensor]()
        try:
            for module in model.modules():
                held: dict[str, Any]
                for held in (module._parameters, module._buffers):
                    for attribute, tensor in held.items():
                        if tensor is not None and id(tensor) in self._names:
                            before.append((held, attribute, tensor))
                            if id(tensor) not in new:
                                new[id(tensor)] = self._given(tensor)
                for held, attribute, tensor in before:
                    held[attribute] = new[id(tensor)]
                if not isinstance(module, torch.jit.ScriptModule):
                    hooks.append(module.register_forward_hook(self._forget))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for held, attribute, tensor in before:
                held[attribute] = tensor

    @contextmanager
    def into(self, result: Resumed, weights: Mapping[str, Weight]) -> Iterator[None]:
        """Write to a checkpoint what is pruned, and at the end all else."""
        self._result, self._weights = result, weights
        self._done, self.open = result.done or ([], [])
        self._written = {part.name: _mapped(result.path(part.name)) for part in self._source.parts}
        yield
        pruned = {view.tensor.entry.name for name in self._done for view in self._views[weights[name].parameter]}
        for name, tensor in self._source.tensors.items():
            if name not in pruned:
                for start, raw in pieces(tensor, AT_A_TIME):
                    result.outputs[tensor.part.name].write(name, start, raw)
        for part in self._source.parts:
            part.check()

    @property
    def before(self) -> int:
        """How many weights were pruned before."""
        return len(self._done)

    def again(self, names: Sequence[str]) -> bool:
        """Whether weights were pruned before; then they are from now on as they were written."""
        known = set(names) <= set(self._done)
        if known:
            for name in names:
                self._moved(self._weights[name].parameter)
        return known

    def enter(self, block: nn.Module | None) -> None:
        """Copy the weights of a block into memory, and leave those of the one before to the files."""
        if block is self._block:
            return
        for p in self._held:
            p.data = self._views[p][0]()
        self._block, self._held = block, [] if block is None else list(block.parameters())
        for p in self._held:
            p.data = p.detach().clone()
            self._views[p][0].forget()

    def write(self, weight: Weight, values: Tensor, mask: Tensor) -> None:
        """Write values to the new file."""
        raw = values.contiguous().view(-1).view(torch.uint8).numpy()
        for view in self._views[weight.parameter]:
            self._result.outputs[view.tensor.part.name].write(view.tensor.entry.name, 0, raw)
        self._moved(weight.parameter)
        if weight.parameter in set(self._held):
            weight.parameter.data = values

    def finish(self, names: Sequence[str]) -> None:
        """Note that weights are written."""
        self._done += names
        _trim_heap()
        self._result.note((self._done, self.open))

    def undo(self) -> None:
        """What is written stays, for the next call."""

    def _given(self, tensor: Tensor) -> Tensor:
        found = [self._source.tensors[name] for name in self._names[id(tensor)]]
        views = [_View(self._maps[each.part.name], each) for each in found]
        if not isinstance(tensor, nn.Parameter):
            return views[0]().clone()
        parameter = nn.Parameter(views[0](), requires_grad=tensor.requires_grad)
        self._views[parameter] = views
        return parameter

    def _moved(self, parameter: nn.Parameter) -> None:
        """Let a parameter be the view of what was written of it."""
        views = self._views[parameter]
        self._views[parameter] = [view._replace(file=self._written[view.tensor.part.name]) for view in views]
        parameter.data = self._views[parameter][0]()

    def _forget(self, module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters():
            self._views[parameter][0].forget()


def made_without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the model that a function makes, its parameters on the meta device and its buffers with their values."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is, may be tied to another
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    try:
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
        return checks.module(make(), "what model() makes")
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _trim_heap() -> None:
    """Give back what is free in the heap: glibc's grows by what tensors of changing sizes leave between them."""
    with suppress(AttributeError, TypeError):  # other systems have no such call
        ctypes.CDLL(None).malloc_trim(0)


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch asks for memory that can be written


def _names(model: nn.Module, source: Checkpoint) -> dict[int, list[str]]:
    """The names that each tensor of a model has in a checkpoint, by its id; of a buffer that is not there, none."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    found: dict[int, list[str]] = {}
    kinds = [(model.named_parameters(), "parameter"), (model.named_buffers(), "buffer")]
    for name, tensor, kind in ((name, tensor, kind) for tensors, kind in kinds for name, tensor in tensors):
        if kind == "parameter" and not tensor.is_meta:
            raise TypeError(
                f"{name!r} has values, on {tensor.device}: give a function that makes the model, or prune it in memory "
                "by gp.reconstruct_"
            )
        known = [other for other in names.get(id(tensor), ()) if other in source.tensors]
        if not known and kind == "buffer" and not tensor.is_meta:
            continue
        if not known and id(tensor) not in names:
            raise ValueError(
                f"the {kind} {name!r} is not stored with the model, and has no values on the meta device: give a "
                "function that makes the model, in place of the model"
            )
        _require_same(name, tensor, [source.tensors[other] for other in known], source)
        found[id(tensor)] = known
    extra = sorted(source.tensors.keys() - {name for several in found.values() for name in several})
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        checks.warn(f"the checkpoint has {extra[0]!r}{more}, which the model has not: copied as it is")
    return found


def _require_same(name: str, tensor: Tensor, found: Sequence[Tensors], source: Checkpoint) -> None:
    """Raise ValueError unless a checkpoint has a tensor, in the model's shape, and once if under several names."""
    some = ", ".join(map(repr, list(source.tensors)[:3]))
    require(bool(found), f"the checkpoint has no {name!r}, and no parameter tied to it; it has {some}, ...")
    for part, entry in found:
        dtype = DTYPES.get(entry.dtype)
        alike = dtype is not None and dtype.is_floating_point == tensor.is_floating_point()
        require(
            alike and entry.shape == tuple(tensor.shape),
            f"{entry.name!r} is {entry.dtype} of shape {entry.shape} in {part.name!r}, and {tensor.dtype} of shape "
            f"{tuple(tensor.shape)} in the model",
        )
        one, other = pieces(found[0], AT_A_TIME), pieces(Tensors(part, entry), AT_A_TIME)
        require(
            found[0].entry is entry or all((a[1] == b[1]).all() for a, b in zip(one, other, strict=True)),
            f"{found[0].entry.name!r} and {entry.name!r} are one parameter of the model, and differ in the checkpoint",
        )

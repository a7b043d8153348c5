"""How is a model run whose parameters FSDP2 has cut up, on weights that its caller holds in blocks (chapter 9)?

FSDP2 differentiates a model once, and leaves in ``.grad`` what it has averaged. What asks for more, a gradient of a
gradient, or the square of each rank's own, runs the model here: parameters are put together from their blocks when the
module that was sharded is called, and forgotten when it returns. What autograd keeps of them for the way back it keeps
by name, and they are put together once more. So a rank has whole parameters of one sharded module at a time, and of
those that it is called from, as under FSDP2 itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradprune.core.checks import is_distributed
from gradprune.core.sharded import fsdp_modules, is_fsdp, like, local, ranges

Names = tuple[str, ...]
Entry = tuple[nn.Module, str, str]  # a module, its attribute, and the parameter's name in the model
Back = Callable[[Sequence["Cut"], Sequence[Any], Sequence[Tensor]], Sequence[Tensor | None]]


class Cut:
    """How one parameter is cut into blocks among ranks that have different data."""

    def __init__(self, name: str, parameter: Any) -> None:
        from torch.distributed.tensor import Replicate

        mesh, placements = parameter.device_mesh, parameter.placements
        dims = 2 if mesh.ndim > 1 and type(placements[0]) is Replicate else 1  # hybrid sharding has copies of shards
        if mesh.ndim > dims and mesh.mesh_dim_names is None:
            raise TypeError(f"the parameter {name!r} lies on a mesh whose dimensions have no names: name them")
        self.groups = [mesh.get_group(dim) for dim in range(dims)]
        self.ranks = math.prod(mesh.shape[:dims])
        self.at: tuple[int, ...] = tuple(mesh.get_coordinate()[:dims])  # of those with different data, which this is
        self.device = torch.device(mesh.device_type)
        self.shape: tuple[int, ...] = tuple(parameter.shape)
        self._beyond: Any = None
        if mesh.ndim > dims:  # what is put together is still a part: that of tensor parallelism
            beyond = mesh[mesh.mesh_dim_names[dims:]]
            found = ranges(self.shape, beyond.shape, placements[dims:], beyond.get_coordinate())
            assert found is not None
            self._beyond = parameter.detach(), beyond, placements[dims:]
            self.shape = tuple(size for _, size in found)
        self._axis: Any = getattr(placements[dims - 1], "dim", None)

    @classmethod
    def of_copies(cls, other: Cut, tensor: Tensor) -> Cut:
        """That of a tensor which all ranks with different data have whole."""
        found = cls.__new__(cls)
        found.groups, found.ranks, found.at, found.device = other.groups, other.ranks, other.at, other.device
        found.shape, found._beyond, found._axis = tuple(tensor.shape), None, None
        return found

    @property
    def is_part(self) -> bool:
        """Whether what is put together is a part, that of tensor parallelism."""
        return self._beyond is not None

    def together(self, block: Tensor) -> Tensor:
        """Put blocks together, in memory of its own."""
        if self._axis is None:
            return block.clone()
        piece, ranks = self._piece()
        rows = block.movedim(self._axis, 0)
        own = rows.new_zeros(piece, *rows.shape[1:])
        own[: len(rows)] = rows
        every = own.new_empty(ranks * piece, *rows.shape[1:])
        _gather(_real(every), _real(own), self.groups[-1])
        return every[: self.shape[self._axis]].movedim(0, self._axis).contiguous()

    def summed(self, whole: Tensor) -> Tensor:
        """Add up what all ranks have of the whole; return the own block."""
        whole = whole.contiguous().clone() if self._axis is None else whole
        over = self.groups
        if self._axis is not None:
            piece, ranks = self._piece()
            rows = whole.movedim(self._axis, 0)
            every = rows.new_zeros(ranks * piece, *rows.shape[1:])
            every[: len(rows)] = rows
            whole = every.new_empty(piece, *rows.shape[1:])
            _scatter(_real(whole), _real(every), self.groups[-1])
            whole = whole[: self._rows()].movedim(0, self._axis).contiguous()
            over = self.groups[:-1]
        for group in over:
            torch.distributed.all_reduce(_real(whole), group=group)
        return whole

    def own(self, whole: Tensor) -> Tensor:
        """Return the own block of a whole that all ranks have alike."""
        if self._axis is None:
            return whole
        start = min(self.shape[self._axis], self._piece()[0] * self.at[-1])
        return whole.narrow(self._axis, start, self._rows())

    def as_seen(self, whole: Tensor) -> Tensor:
        """Return what was put together as the model knows it, a DTensor where there is tensor parallelism."""
        if self._beyond is None:
            return whole
        parameter, mesh, placements = self._beyond
        return type(parameter).from_local(  # type: ignore[no-any-return]
            whole, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    def _piece(self) -> tuple[int, int]:
        """Rows of the first block, and the number of blocks."""
        ranks: int = self.groups[-1].size()
        return -(-self.shape[self._axis] // ranks), ranks

    def _rows(self) -> int:
        piece, size = self._piece()[0], int(self.shape[self._axis])
        return max(0, min(piece, size - piece * self.at[-1]))


class Together(torch.autograd.Function):
    """Whole tensors of blocks, in the dtypes that are asked for; a gradient goes back as `back` says."""

    @staticmethod
    def forward(ctx: Any, back: Back, cuts: Sequence[Cut], dtypes: Sequence[torch.dtype], *blocks: Tensor) -> Any:
        """Put together."""
        ctx.back, ctx.cuts, ctx.blocks = back, cuts, [(b.dtype, b.device) for b in blocks]
        return tuple(cut.together(b.to(cut.device, d)) for cut, d, b in zip(cuts, dtypes, blocks, strict=True))

    @staticmethod
    def backward(ctx: Any, *wholes: Tensor) -> Any:
        """Go back as was said."""
        return None, None, None, *ctx.back(ctx.cuts, ctx.blocks, wholes)


class Summed(torch.autograd.Function):
    """What all ranks have of whole tensors, added up, in blocks: the way back of ``Together``, as it is of this."""

    @staticmethod
    def forward(ctx: Any, cuts: Sequence[Cut], blocks: Sequence[Any], *wholes: Tensor) -> Any:
        """Add up."""
        ctx.cuts, ctx.dtypes = cuts, [whole.dtype for whole in wholes]
        ends = zip(cuts, blocks, wholes, strict=True)
        return tuple(cut.summed(w.to(dtype)).to(device) for cut, (dtype, device), w in ends)

    @staticmethod
    def backward(ctx: Any, *blocks: Tensor) -> Any:
        """Put together, since each rank's part of the sum has the gradient of the whole."""
        return None, None, *Together.apply(sums, ctx.cuts, ctx.dtypes, *blocks)


def sums(cuts: Sequence[Cut], blocks: Sequence[Any], wholes: Sequence[Tensor]) -> Sequence[Tensor]:
    """The way back where ranks have different data: their gradients are added up."""
    return Summed.apply(cuts, blocks, *wholes)  # type: ignore[no-any-return]


def shares(cuts: Sequence[Cut], blocks: Sequence[Any], wholes: Sequence[Tensor]) -> Sequence[Tensor]:
    """The way back where all ranks do the same: each takes its block."""
    ends = zip(cuts, blocks, wholes, strict=True)
    return [cut.own(whole).to(dtype=dtype, device=device) for cut, (dtype, device), whole in ends]


class Kept(NamedTuple):
    """What autograd keeps of a parameter that was put together: which, with which, and how it is seen."""

    names: Names
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    spread: Tensor | None  # what lies as it does, where it is a DTensor


class Blockwise:
    """Runs a model on blocks of weights in the place of its parameters. All ranks do the same."""

    def __init__(self, model: nn.Module, back: Back = sums, *, as_given: bool = False) -> None:
        self._model, self._back, self._as_given = model, back, as_given
        self._own = dict(model.named_parameters())
        self._names = {id(p): name for name, p in self._own.items()}
        self._below: dict[nn.Module, list[Entry]] = {}
        self._list(model, inside=False)
        cut = dict.fromkeys(name for entries in self._below.values() for _, _, name in entries)
        self.cuts = {name: Cut(name, self._own[name]) for name in cut}
        self.weights = {name: local(self._own[name]).detach() for name in cut}
        self._swapped: list[Entry] = []  # for as long as the model runs on other weights
        self.uses: dict[str, int] = {}
        self.open: dict[str, Tensor] = {}  # what is together now, as memory
        self._again: tuple[Names, dict[str, Tensor]] = ((), {})
        self._known: dict[int, tuple[StorageWeakRef, Names, str, torch.dtype]] = {}
        self._begun: list[list[Entry]] = []

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights, by name: blocks of what FSDP2 cut up, the tensors themselves of what it did not.

        What is not named takes part as it is; of what is cut, no gradient is asked for then.
        """
        self.weights |= weights
        self._swapped = [
            (module, attribute, self._names[id(p)])
            for module in self._model.modules()
            for attribute, p in module._parameters.items()
            if p is not None and self._names[id(p)] in weights and self._names[id(p)] not in self.cuts
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let what runs inside, and the gradients that are asked for inside, be those of blocks."""
        with ExitStack() as stack:
            stack.callback(self._restore)
            stack.enter_context(_without_fsdp(self._model))
            for module in self._model.modules():
                handle = module.register_forward_pre_hook(self._begin, prepend=True)
                stack.callback(handle.remove)
                handle = module.register_forward_hook(self._end, always_call=True)
                stack.callback(handle.remove)
            for module, attribute, name in self._swapped:
                module._parameters[attribute] = self.weights[name]  # type: ignore[assignment]
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        self.uses = {}
        return self._model(*args, **kwargs)

    def forget(self) -> None:
        """Give up what was put together for the way back."""
        self._again = (), {}

    def opened(self, names: Names) -> None:
        """Called when a module's parameters were put together, which are in `open`."""

    def closed(self, names: Names) -> None:
        """Called before they are forgotten."""

    def _list(self, module: nn.Module, *, inside: bool) -> list[Entry]:
        """The parameters that are put together when a module is called: its own and those below, up to the next cut."""
        if module in self._below:
            return self._below[module]
        inside = inside or is_fsdp(module)
        entries = [
            (module, attribute, self._names[id(p)])
            for attribute, p in module._parameters.items()
            if inside and p is not None and is_distributed(p)
        ]
        self._below[module] = entries
        for child in module.children():
            below = self._list(child, inside=inside)
            if not is_fsdp(child):
                entries += below
        return entries

    def _begin(self, module: nn.Module, _: Any) -> None:
        entries = [(m, at, name) for m, at, name in self._below[module] if m._parameters[at] is self._own[name]]
        self._begun.append(entries)
        names = tuple(dict.fromkeys(name for _, _, name in entries))
        if not names:
            return
        seen = self._put_together(names)
        for m, attribute, name in entries:
            m._parameters[attribute] = seen[name]  # type: ignore[assignment]
        self.opened(names)

    def _end(self, *_: Any) -> None:
        entries = self._begun.pop()
        names = tuple(dict.fromkeys(name for _, _, name in entries))
        if names:
            self.closed(names)
        for m, attribute, name in entries:
            m._parameters[attribute] = self._own[name]
        for name in names:
            self.open.pop(name, None)

    def _restore(self) -> None:
        for entries in (*self._below.values(), self._swapped):
            for module, attribute, name in entries:
                module._parameters[attribute] = self._own[name]
        self._begun, self.open, self._known = [], {}, {}
        self.forget()

    def _put_together(self, names: Names) -> dict[str, Tensor]:
        trained = [n for n in names if torch.is_grad_enabled() and self.weights[n].requires_grad]
        found = {}
        if trained:
            cuts, dtypes = [self.cuts[n] for n in trained], [self._dtype(n) for n in trained]
            wholes = Together.apply(self._back_of(trained), cuts, dtypes, *(self.weights[n] for n in trained))
            found = dict(zip(trained, wholes, strict=True))
        found |= self._plainly([n for n in names if n not in found])
        for name in trained:
            self.uses[name] = self.uses.get(name, 0) + 1
        self.open |= {name: found[name].detach() for name in names}
        self._know(names, found)
        return {name: self.cuts[name].as_seen(found[name]) for name in names}

    def _back_of(self, names: Sequence[str]) -> Back:
        return self._back

    def _plainly(self, names: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {n: self.cuts[n].together(self.weights[n].to(self.cuts[n].device, self._dtype(n))) for n in names}

    def _dtype(self, name: str) -> torch.dtype:
        return self.weights[name].dtype if self._as_given else self._own[name].dtype

    def _know(self, names: Names, wholes: Mapping[str, Tensor]) -> None:
        """Remember which memory is whose; a key is not given away again as long as its reference stands here."""
        self._known = {key: known for key, known in self._known.items() if not known[0].expired()}
        for name, whole in wholes.items():
            storage = whole.untyped_storage()
            self._known[storage._cdata] = StorageWeakRef(storage), names, name, whole.dtype

    def _pack(self, tensor: Tensor) -> Any:
        held = local(tensor)
        if held.layout != torch.strided or held.is_conj() or held.is_neg():
            return tensor
        known = self._known.get(held.untyped_storage()._cdata)
        if known is None or known[0].expired() or known[3] != held.dtype:
            return tensor
        spread = tensor.detach() if held is not tensor else None
        if spread is not None:
            spread = _empty_like(spread)
        return Kept(known[1], known[2], held.size(), held.stride(), int(held.storage_offset()), spread)

    def _unpack(self, kept: Any) -> Any:
        if not isinstance(kept, Kept):
            return kept
        with torch.no_grad():
            held = self._once_more(kept).as_strided(kept.size, kept.stride, kept.offset)
            return held if kept.spread is None else like(kept.spread, held)

    def _once_more(self, kept: Kept) -> Tensor:
        if kept.name in self.open:
            return self.open[kept.name]
        if self._again[0] != kept.names:
            self.forget()
            self._again = kept.names, self._plainly(kept.names)
            self._know(*self._again)
        return self._again[1][kept.name]


def _empty_like(spread: Any) -> Tensor:
    """A DTensor that lies as another does, and holds nothing."""
    nothing = spread.to_local().new_empty(()).expand(spread.to_local().shape)
    return like(spread, nothing)


def _gather(every: Tensor, own: Tensor, group: Any) -> None:
    """Put equal blocks together, by the name that this torch has for it."""
    call = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    call(every, own, group=group)


def _scatter(own: Tensor, every: Tensor, group: Any) -> None:
    """Add up equal blocks, each for one rank."""
    call = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor
    call(own, every, group=group)


def _real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs, which every backend adds up."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@contextmanager
def _without_fsdp(model: nn.Module) -> Iterator[None]:
    """Take FSDP2's own hooks off, which put parameters together too; the others keep their order."""
    before = []
    try:
        for module in fsdp_modules(model):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                before.append((hooks, list(hooks.items())))
                for key, hook in before[-1][1]:
                    if _is_fsdp_s(hook):
                        del hooks[key]
        yield
    finally:
        for hooks, items in before:
            hooks.clear()
            hooks.update(items)


def _is_fsdp_s(hook: Any) -> bool:
    where = getattr(hook, "__module__", None) or ""
    return where.startswith("torch.distributed") and ("fsdp" in where or "fully_shard" in where)

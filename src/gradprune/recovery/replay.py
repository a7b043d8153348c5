"""How is one layer's input seen after another's, without running the whole model for each (chapter 5)?

Mostly a model is a chain: the blocks of a ``ModuleList`` or ``Sequential``, of which each takes what the one before
returned, and beside that only what all are given. Of such a chain the blocks before the one that is looked at need not
run again: what it takes is kept for every batch. Where a model is none, every look runs it from its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.evaluate import call_on_batch
from gradprune.core.layers import Weight
from gradprune.recovery.inputs import Look, Passed, _Seen, version

Arguments = dict[int | str, Any]  # by position and by name


@dataclass
class _Call:
    """What one call of a block has in common with the first and the last one: all but that is let go."""

    module: nn.Module
    handed: list[int | str]  # which arguments are what the last call returned
    alike: bool  # whether it is given the same as the first but for these
    kinds: dict[int | str, tuple[torch.Size, torch.dtype]]  # of the tensors among its arguments
    several: bool  # whether it returns several things
    written: list[int | str]  # which arguments are not afterwards what they were


@dataclass
class Chain:
    """Blocks of which each takes what the one before returned."""

    blocks: list[nn.Module]
    slot: int | str  # which argument that is
    first: list[bool]  # whether it is the first of several things returned
    writes: list[bool]  # into what it is handed
    keeps_shape: bool  # of what is handed on
    inside: dict[str, int] = field(default_factory=dict)  # weight -> its block


class Passes:
    """Runs every batch through what is needed of the model, once the weights before have their final values.

    `entered` is told which block runs from then on, so that its weights can be there; None where the whole model does.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        chain: Chain | None,
        entered: Callable[[nn.Module | None], None] = lambda _: None,
    ) -> None:
        self._model, self._batches, self._chain, self._entered = model, batches, chain, entered
        self._at: int | None = None  # the block whose arguments are kept
        self._kept: list[Arguments] = []

    def run(self, seen: _Seen) -> None:
        """Let all batches pass by the weight that was advanced to."""
        with seen.watching():
            for number, each in enumerate(self._batches if self._at is None else self._kept):
                seen.begin()
                with suppress(Passed):
                    if self._at is None:
                        call_on_batch(self._model, each, number)
                    else:
                        self._run(self._at, each)

    def advance(self, name: str) -> None:
        """Keep what the block of this weight is given.

        Weights that autocast has cast are forgotten: they are from before the last one was changed.
        """
        torch.clear_autocast_cache()
        block = None if self._chain is None else self._chain.inside.get(name)
        if self._chain is None or block is None:
            self._kept, self._at = [], None
            self._entered(None)
            return
        if self._at is None or self._at > block:
            self._entered(None)
            first = self._chain.blocks[0]
            self._kept = [_given_to(first, self._model, batch, number) for number, batch in enumerate(self._batches)]
            self._at = 0
        while self._at < block:
            self._entered(self._chain.blocks[self._at])
            for arguments in self._kept:
                arguments[self._chain.slot] = self._run(self._at, arguments)
            self._at += 1
        self._entered(self._chain.blocks[block])
        torch.clear_autocast_cache()

    def _run(self, block: int, arguments: Arguments) -> Any:
        assert self._chain is not None
        given = dict(arguments)
        if self._chain.writes[block]:
            given[self._chain.slot] = given[self._chain.slot].clone()
        positional = [given.pop(i) for i in range(len(given)) if i in given]
        named = {str(name): value for name, value in given.items()}
        output = self._chain.blocks[block](*positional, **named)
        return output[0] if self._chain.first[block] else output


def _given_to(block: nn.Module, model: nn.Module, batch: Any, number: int) -> Arguments:
    """What a block is given when the model runs on a batch."""
    found: list[Arguments] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(dict(enumerate(args)) | kwargs)
        raise Passed

    handle = block.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with suppress(Passed):
            call_on_batch(model, batch, number)
    finally:
        handle.remove()
    return found[0]


# ------------------------------------------------------------------------------------------------------- what is there


def look(
    model: nn.Module, batches: Sequence[Any], layers: Mapping[str, Weight], *, once: bool = False
) -> tuple[list[list[str]], Chain | None]:
    """Return the weights in order of execution, those of common inputs together, and the chain that most are in.

    Products are looked at in the first batch, and in others while there are weights that none has reached; whether the
    model is a chain, in all: what its blocks are given beside may be the same for one batch and not for another. With
    `once`, blocks that keep the shape of what they are given run no more than that, and hand it on in other batches.
    """
    seen = Look(model, layers)
    chain: Chain | None = None
    for number, batch in enumerate(batches):
        calls: dict[nn.Module, list[_Call]] = {}
        watched = len(seen.order) < len(layers)
        if not watched and chain is None:
            break
        passing = once and not watched and chain is not None and chain.keeps_shape
        with seen.watching() if watched else nullcontext(), _recorded(model, calls):
            seen.begin()
            with _handed_on(chain) if passing and chain is not None else nullcontext():
                call_on_batch(model, batch, number)
        found = _longest(calls, layers)
        chain = found if number == 0 else _both(chain, found)
    missing = [name for name in layers if name not in seen.order]
    if missing:
        raise ValueError(
            f"the batches reach no product of {missing[0]!r} with anything"
            + (f", nor of {len(missing) - 1} other weights" if len(missing) > 1 else "")
            + ": exclude it, or give batches that do"
        )
    return seen.groups(), chain


def _both(one: Chain | None, other: Chain | None) -> Chain | None:
    """A chain that is the same for two batches."""
    if one is None or other is None or one.blocks != other.blocks:
        return None
    if (one.slot, one.first) != (other.slot, other.first):
        return None
    return replace(one, writes=[a or b for a, b in zip(one.writes, other.writes, strict=True)])


@contextmanager
def _handed_on(chain: Chain) -> Iterator[None]:
    """Let the blocks of a chain return what they are given, and the model end after the last."""

    def hand_on(several: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            x = (dict(enumerate(args)) | kwargs)[chain.slot]
            return (x,) if several else x

        return forward

    def stop(*_: Any) -> None:
        raise Passed

    before = [block.__dict__.get("forward") for block in chain.blocks]
    handle = chain.blocks[-1].register_forward_hook(stop)
    try:
        for block, several in zip(chain.blocks, chain.first, strict=True):
            block.__dict__["forward"] = hand_on(several)
        with suppress(Passed):
            yield
    finally:
        handle.remove()
        for block, forward in zip(chain.blocks, before, strict=True):
            block.__dict__["forward"] = forward
            if forward is None:
                del block.__dict__["forward"]


@contextmanager
def _recorded(model: nn.Module, calls: dict[nn.Module, list[_Call]]) -> Iterator[None]:
    """Note each call of the blocks of lists and sequences."""
    handles = []

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments: Arguments = dict(enumerate(args)) | kwargs
        running.append((arguments, {key: _mark(value) for key, value in arguments.items()}))

    def after(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        arguments, marks = running.pop()
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        written = [key for key, value in arguments.items() if _mark(value) != marks[key]]
        several = isinstance(output, tuple | list) and len(output) > 0
        passed = output[0] if several else output
        kinds = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        for container in containers[block]:
            first, before = ends.get(container, (arguments, None))
            handed = [key for key, tensor in tensors.items() if tensor is before]
            alike = _plain_and_same(_without(first, handed), _without(arguments, handed))
            calls.setdefault(container, []).append(_Call(block, handed, alike, kinds, several, written))
            ends[container] = first, passed
        for part in block.modules():
            ends.pop(part, None)  # a chain within a block ends with it

    containers: dict[nn.Module, list[nn.Module]] = {}
    running: list[tuple[Arguments, Arguments]] = []
    ends: dict[nn.Module, tuple[Arguments, Any]] = {}  # what the first was given and the last has returned
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for block in module:
                containers.setdefault(block, []).append(module)
    try:
        for block in containers:
            if not isinstance(block, torch.jit.ScriptModule):
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(block.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _longest(calls: Mapping[nn.Module, list[_Call]], layers: Mapping[str, Weight]) -> Chain | None:
    """The chain with the most weights, in two blocks or more."""
    best: Chain | None = None
    for done in calls.values():
        chain = _chained(done, layers)
        if chain is not None and (best is None or len(chain.inside) > len(best.inside)):
            best = chain
    return best


def _chained(done: list[_Call], layers: Mapping[str, Weight]) -> Chain | None:
    """The calls as a chain, if they are one."""
    blocks = [each.module for each in done]
    if len(blocks) < 2 or len(set(blocks)) < len(blocks):
        return None
    handed = done[1].handed
    if len(handed) != 1 or not all(each.handed == handed and each.alike for each in done[1:]):
        return None
    slot = handed[0]
    if slot not in done[0].kinds or any({*each.written} - {slot} for each in done):
        return None
    parts = [set(block.modules()) for block in blocks]
    inside = {name: i for name, weight in layers.items() for i, part in enumerate(parts) if weight.module in part}
    if len(set(inside.values())) < 2:
        return None
    keeps_shape = all(each.kinds.get(slot) == done[0].kinds.get(slot) for each in done)
    first = [each.several for each in done[:-1]]
    return Chain(blocks, slot, [*first, False], [slot in each.written for each in done], keeps_shape, inside)


def _without(arguments: Arguments, left_out: list[int | str]) -> Arguments:
    return {key: value for key, value in arguments.items() if key not in left_out}


def _mark(value: Any) -> Any:
    """What is another one once the value, or a tensor in it, was written to."""
    if isinstance(value, Tensor):
        return id(value), version(value)
    if isinstance(value, dict):
        return {key: _mark(part) for key, part in value.items()}
    return [*map(_mark, value)] if isinstance(value, tuple | list) else None


def _plain_and_same(one: Any, other: Any) -> bool:
    """Whether two arguments are one value, of a kind in which no call leaves anything behind, as in a cache."""
    if isinstance(one, Tensor):
        return one is other
    if isinstance(one, tuple | list):
        same = type(one) is type(other) and len(one) == len(other)
        return same and all(map(_plain_and_same, one, other))
    if isinstance(one, dict):
        same = type(one) is type(other) and one.keys() == other.keys()
        return same and all(_plain_and_same(one[key], other[key]) for key in one)
    plain = one is None or isinstance(one, bool | int | float | str | torch.dtype | torch.device)
    return plain and type(one) is type(other) and bool(one == other)

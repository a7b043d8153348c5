"""What does each weight multiply, as the rows of a matrix, and in which order do the layers come (chapter 5)?"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradprune.core.layers import Weight
from gradprune.core.owners import Place, memory, place
from gradprune.core.products import Products
from gradprune.recovery.solve import AT_A_TIME, Gram
from gradprune.weights.granularity import canonical


class Piece(NamedTuple):
    """Rows of a weight that multiply the same inputs: all, those of a group, of one matrix of a stack or of a part."""

    name: str
    first: int
    rows: int


class Passed(Exception):
    """A pass has come to a layer after those whose inputs are wanted."""


class NotShared(Exception):
    """Weights that had their inputs in common do not for these batches."""


def as_matrix(weight: Weight, tensor: Tensor) -> Tensor:
    """Return a tensor of the weight's shape as (rows, columns): every output unit a row, its inputs side by side.

    Of a convolution the columns go through the positions of the kernel, and through the inputs within each, so that n
    of m neighbours lie along the inputs.
    """
    seen = canonical(weight, tensor)
    depth = _depth(weight)
    seen = seen.movedim(depth + 1, -1)
    return seen.reshape(math.prod(seen.shape[: depth + 1]), math.prod(seen.shape[depth + 1 :]))


def write_matrix_(weight: Weight, target: Tensor, matrix: Tensor) -> None:
    """Write a matrix as ``as_matrix`` returns it into a tensor of the weight's shape."""
    seen = canonical(weight, target).movedim(_depth(weight) + 1, -1)
    seen.copy_(matrix.view(seen.shape))


def _depth(weight: Weight) -> int:
    assert weight.axes is not None
    return weight.axes.depth


class _Seen(Products):
    """Knows which rows of which of some weights a product is of, and what it multiplies."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Weight]) -> None:
        super().__init__(model)
        self._by_memory: dict[int | None, list[Weight]] = {}
        for weight in layers.values():
            self._by_memory.setdefault(memory(weight.parameter), []).append(weight)
        self._last: tuple[Any, ...] = ()

    def met(self, piece: Piece, again: bool, inputs: Iterable[Tensor]) -> None:
        """Called for each product; `again` where the inputs, (samples, columns) in parts, are those of the last one."""

    def multiplied(self, owner: nn.Module, x: Tensor, weight: Tensor) -> None:
        """Find the rows of a product of matrices, of each one in a stack."""
        found = self._weight(weight)
        if found is None:
            return
        target, at = found
        x = x if x.layout == torch.strided else x.to_dense()
        x, operand = (x, place(weight)) if weight.dim() == 2 else _folded(x, place(weight))
        if len(operand.size) == 2:
            self._tell(_piece(target, at, operand), x)
            return
        for i in range(operand.size[0]):
            offset = operand.offset + i * operand.stride[0]
            own = operand._replace(size=operand.size[1:], stride=operand.stride[1:], offset=offset)
            self._tell(_piece(target, at, own), x[i])

    def convolved(self, owner: nn.Module, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> None:
        """Unfold what a convolution multiplies, group by group."""
        found = self._weight(weight)
        if found is None:
            return
        target, at = found
        stride, padding, dilation, transposed, _, groups = options
        _require_known(target, not transposed and place(weight) == at)
        rows = weight.shape[0] // groups
        for group, channels in enumerate(x.chunk(groups, dim=1)):
            key = (_same(x), group, tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
            parts = _unfolded(channels, weight.shape[2:], stride, padding, dilation)
            self._meet(Piece(target.name, group * rows, rows), key, x, parts)

    def _weight(self, operand: Tensor) -> tuple[Weight, Place] | None:
        """Whose weight an operand is, and where the whole of it lies: where the parameter is, or a copy of it."""
        if operand.layout != torch.strided:
            return None
        at = place(operand)
        target = self._at(at)
        if target is not None:
            return target, place(target.parameter)
        copy = self.copied_from(at)
        while copy is not None:
            target = self._at(copy.source)
            if target is not None:
                whole = copy.indices is None and copy.source == place(target.parameter)
                _require_known(target, whole)
                return target, copy.result
            copy = self.copied_from(copy.source) if copy.indices is None else None
        return None

    def _at(self, operand: Place) -> Weight | None:
        """The weight in whose memory an operand starts; several may lie in one."""
        for weight in self._by_memory.get(operand.memory, ()):
            own = place(weight.parameter)
            reach = sum((size - 1) * stride for size, stride in zip(own.size, own.stride, strict=True))
            if own.offset <= operand.offset <= own.offset + reach:
                return weight
        return None

    def _tell(self, piece: Piece, x: Tensor) -> None:
        matrix = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        self._meet(piece, _same(x), x, (matrix,))

    def _meet(self, piece: Piece, key: tuple[Any, ...], x: Tensor, inputs: Iterable[Tensor]) -> None:
        again = self._last[:1] == (key,)
        self._last = key, x  # held, so that its memory is not given to another meanwhile
        self.met(piece, again, inputs)

    def begin(self) -> None:
        """Forget what a pass before this one has left behind."""
        self._running[:] = [self._model]
        self._last = ()


def _same(x: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that hold the same values in the same memory."""
    return (*place(x), x.dtype, version(x))


def version(x: Tensor) -> int | None:
    """What is another one once a tensor was written to; nothing writes to those of inference mode here."""
    return None if x.is_inference() else x._version


def _folded(x: Tensor, weight: Place) -> tuple[Tensor, Place]:
    """One matrix that is expanded over a batch, as itself."""
    while len(weight.size) > 2 and (weight.stride[0] == 0 or weight.size[0] == 1):
        weight = weight._replace(size=weight.size[1:], stride=weight.stride[1:])
        x = x.flatten(0, 1)
    return x, weight


def _piece(weight: Weight, whole: Place, operand: Place) -> Piece:
    """Which rows of a weight an operand (inputs, outputs) is; ValueError where it is something else."""
    shape = torch.empty_strided(whole.size, whole.stride, device="meta")
    seen = canonical(weight, shape)
    _require_known(weight, seen.dim() == _depth(weight) + 2)
    *outer, columns = zip(seen.shape, seen.stride(), strict=True)
    inputs, outputs = zip(operand.size, operand.stride, strict=True)
    rows = outer[-1]
    as_stored = inputs[0] == columns[0] and (inputs[1] == columns[1] or columns[0] == 1)
    _require_known(weight, as_stored and outputs[0] <= rows[0] and (outputs[1] == rows[1] or outputs[0] == 1))
    left, first = operand.offset - whole.offset, 0
    for size, stride in outer:
        at = min(left // stride, size - 1) if size > 1 else 0
        left -= at * stride
        first = first * size + at
    _require_known(weight, left == 0 and first % rows[0] + outputs[0] <= rows[0])
    return Piece(weight.name, first, outputs[0])


def _require_known(weight: Weight, known: bool) -> None:
    if not known:
        raise ValueError(
            f"how {weight.name!r} of a {type(weight.module).__name__} multiplies its inputs is not known: exclude it"
        )


def _unfolded(
    x: Tensor, kernel: torch.Size, stride: list[int], padding: list[int], dilation: list[int]
) -> Iterable[Tensor]:
    """The inputs of each position that a convolution answers, in parts: (samples, positions of the kernel x inputs)."""
    pads = [p for pad in reversed(padding) for p in (pad, pad)]
    each = max(1, x[:1].numel() * math.prod(kernel))
    for part in x.split(max(1, AT_A_TIME // each)):
        seen = nn.functional.pad(part, pads)
        for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
            seen = seen.unfold(dim, (size - 1) * apart + 1, step)[..., ::apart]
        spatial = len(kernel)
        order = [0, *range(2, 2 + spatial), *range(2 + spatial, 2 + 2 * spatial), 1]
        yield seen.permute(order).reshape(-1, math.prod(kernel) * x.shape[1])


# ----------------------------------------------------------------------------------------------------------- the order


class Look(_Seen):
    """Sees in which order the weights come, which have their inputs in common, and which cannot be taken in turn."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Weight]) -> None:
        super().__init__(model, layers)
        self._layers = layers
        self.order: list[str] = []
        self.shared: dict[str, str] = {}  # a weight -> the one before it with the same inputs
        self._met: list[str] = []

    def met(self, piece: Piece, again: bool, inputs: Iterable[Tensor]) -> None:
        """Note the order."""
        name = piece.name
        if name in self._met:
            between = self._met[self._met.index(name) :]
            other = next((n for n in between if self._layers[n].module is not self._layers[name].module), None)
            if other is not None:
                raise ValueError(
                    f"{name!r} is used again after {other!r}, so its inputs depend on what it is changed to: exclude it"
                )
        last = self._met[-1] if self._met else None
        if name not in self.order:
            self.order.insert(self.order.index(last) + 1 if last is not None else 0, name)
            if again and last is not None and last != name:
                self.shared[name] = last
        if last != name:
            self._met.append(name)

    def begin(self) -> None:
        """Start another batch."""
        super().begin()
        self._met = []

    def groups(self) -> list[list[str]]:
        """The weights in their order, those with common inputs together."""
        found: list[list[str]] = []
        for name in self.order:
            if found and self.shared.get(name) == found[-1][-1]:
                found[-1].append(name)
            else:
                found.append([name])
        return found


class Collected(_Seen):
    """Sums X'X of the weights of a group, one sum for those that have their inputs in common.

    A pass ends at a weight that comes later, in another module: those of one, as a stack of experts, take turns.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, Weight], group: Collection[str], later: set[str], *, share: bool
    ) -> None:
        super().__init__(model, layers)
        self.grams: dict[Piece, Gram] = {}
        self._group, self._layers, self._share = set(group), layers, share
        modules = {id(layers[name].module) for name in group}
        self._stop = {name for name in later if id(layers[name].module) not in modules}
        self._times: dict[Piece, int] = {}
        self._sharing: set[Piece] = set()
        self._last_gram: Gram | None = None

    def met(self, piece: Piece, again: bool, inputs: Iterable[Tensor]) -> None:
        """Add what is multiplied, once for all that multiply it."""
        if piece.name in self._stop:
            raise Passed
        if piece.name not in self._group:
            self._last_gram = None
            return
        known, last = self.grams.get(piece), self._last_gram
        self._times[piece] = self._times.get(piece, 0) + 1
        if self._share and again and last is not None and (known is None or piece in self._sharing):
            self._sharing.add(piece)
            self.grams[piece] = last
            if known is not None and known is not last:
                raise NotShared
            return
        if piece in self._sharing:
            raise NotShared
        if known is None:
            weight = self._layers[piece.name]
            known = self.grams[piece] = Gram(columns_of(weight), weight.parameter.device)
        for part in inputs:
            known.add(part)
        self._last_gram = known

    def begin(self) -> None:
        """Start another batch."""
        super().begin()
        self._last_gram = None

    def check_shared(self) -> None:
        """Raise NotShared where of two weights with one sum one was used more often."""
        times: dict[int, set[int]] = {}
        for piece, gram in self.grams.items():
            times.setdefault(id(gram), set()).add(self._times[piece])
        if any(len(different) > 1 for different in times.values()):
            raise NotShared


def columns_of(weight: Weight) -> int:
    """How many columns ``as_matrix`` has."""
    seen = canonical(weight, weight.parameter)
    return math.prod(seen.shape[_depth(weight) + 1 :])

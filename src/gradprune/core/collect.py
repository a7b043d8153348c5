"""Which tensors are ranked together, and can they be?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from gradprune.core.checks import require_readable
from gradprune.core.order import By, Order, compared_as

_REAL = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
}
_TAKEN = {  # torch.take knows no others; those, where strided, are copied whole: they are narrow
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
Tensors = Tensor | Iterable[Tensor] | Mapping[str, Tensor]


class Values(NamedTuple):
    """What is ranked: the tensors as they are given, and the order in which all their values stand."""

    names: list[str]
    tensors: list[Tensor]
    among: Sequence[Tensor] | None
    order: Order
    dtype: torch.dtype  # of the answer
    total: int

    @property
    def on_cpu(self) -> bool:
        """Whether no accelerator holds any of them."""
        return all(t.device.type == "cpu" for t in self.tensors)


class Kept(NamedTuple):
    """The masks of the largest, and for each how many entries stay, or fewer where counting would cost a wait."""

    masks: list[Tensor]
    at_least: list[int]


def collect(
    tensors: Tensors, by: By, among: Sequence[Tensor] | None = None, *, names: list[str] | None = None
) -> Values:
    """Return the tensors with their common order, checked; `names` is what errors call them."""
    if not isinstance(by, str) or by not in ("value", "magnitude"):
        raise ValueError(f'by must be "value" or "magnitude", got {by!r}')
    own_names, given = _named(tensors)
    names = own_names if names is None else names
    for name, tensor in zip(names, given, strict=True):
        _check_readable(name, tensor)
    given = [t.detach().resolve_neg() for t in given]
    given = [t if t.dtype in _TAKEN else t.contiguous() for t in given]
    dtype = _common_dtype(names, given, by)
    order = Order(compared_as(dtype), by)
    if by == "magnitude" and not order.is_float:
        raise ValueError(f'by="magnitude" ranks floating values, got {dtype}')
    if among is not None:
        if isinstance(among, Tensor | str) or not isinstance(among, Sequence):
            raise TypeError(f"`among` must be a list of bool tensors, got {type(among).__name__}")
        among = [a.detach() if isinstance(a, Tensor) else a for a in among]
        _check_among(names, given, among, order)
    return Values(names, given, among, order, dtype, sum(t.numel() for t in given))


def raise_nan(name: str) -> NoReturn:
    """Raise the error of a tensor that has no order."""
    raise ValueError(f"{name} contains NaN, which has no place in an order; find out where it comes from first")


def _named(tensors: Any) -> tuple[list[str], list[Tensor]]:
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    if isinstance(tensors, Mapping):
        return [repr(name) for name in tensors], list(tensors.values())
    if isinstance(tensors, str | np.ndarray) or not isinstance(tensors, Iterable):
        raise TypeError(
            f"tensors must be a tensor, an iterable of tensors or a mapping to tensors, got {type(tensors).__name__}"
        )
    given = list(tensors)
    return [f"tensor {i} of {len(given)} (counted from 0)" for i in range(len(given))], given


def _check_readable(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    require_readable(name.strip("'"), tensor, "input")
    if tensor.is_nested:
        raise TypeError(f"{name} is nested: give its parts, unbind()")
    if not (tensor.is_complex() or tensor.dtype in _REAL or str(tensor.dtype).startswith("torch.float8_")):
        raise TypeError(f"{name} is {tensor.dtype}, which holds no numbers that can be ranked")


def _common_dtype(names: list[str], tensors: list[Tensor], by: By) -> torch.dtype:
    for name, tensor in zip(names, tensors, strict=True):
        if (tensor.is_complex() and by == "value") or tensor.dtype == torch.uint64:
            raise ValueError(
                f"{name} is {tensor.dtype}; values must be real numbers, or integers of at most 63 bits"
                + ("; by='magnitude' ranks complex ones by their modulus" if tensor.is_complex() else "")
            )
    dtypes = {compared_as(t.dtype) if t.is_complex() else t.dtype for t in tensors}
    if len({d.is_floating_point for d in dtypes}) > 1:
        raise ValueError(f"values must be all floating or all integer, got {sorted(map(str, dtypes))}")
    if len(dtypes) <= 1:
        return dtypes.pop() if dtypes else torch.float32
    return reduce(torch.promote_types, [compared_as(d) for d in dtypes])


def _check_among(names: list[str], tensors: list[Tensor], among: Sequence[Tensor], order: Order) -> None:
    if not order.is_float:
        raise ValueError(f"`among` needs floating values, got {order.dtype}")
    if len(among) != len(tensors):
        raise ValueError(f"`among` must hold one bool tensor for each of {len(tensors)} tensors, got {len(among)}")
    for name, tensor, allowed in zip(names, tensors, among, strict=True):
        if not isinstance(allowed, Tensor):
            raise TypeError(f"`among` for {name} must be a bool tensor, got {type(allowed).__name__}")
        if allowed.dtype != torch.bool or allowed.shape != tensor.shape:
            raise ValueError(
                f"`among` for {name} must be bool of shape {tuple(tensor.shape)}, "
                f"got {allowed.dtype} of shape {tuple(allowed.shape)}"
            )

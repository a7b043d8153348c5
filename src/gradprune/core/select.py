"""Which k values are the largest, exactly, over many tensors taken as one (chapter 4)?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradprune.core import select_cpu, select_device
from gradprune.core.checks import whole
from gradprune.core.collect import Kept, Tensors, collect, raise_nan
from gradprune.core.masked import count_kept
from gradprune.core.order import By
from gradprune.core.uncompiled import uncompiled


@uncompiled
def kth_smallest(tensors: Tensors, k: int, *, by: By = "value") -> Tensor:
    """Return the k-th smallest value of all tensors taken as one, exactly.

    Nothing is joined or sorted as a whole.

    Args:
        tensors: a tensor, an iterable of tensors or a mapping from names to tensors; any shapes, any devices, real
            (with ``by="magnitude"`` also complex) numbers or integers of at most 63 bits.
        k: the rank, from 1 to the number of values.
        by: ``"value"``, or ``"magnitude"``: floating values without their sign, complex ones by their modulus.

    Returns:
        A 0-d tensor of the common dtype (of complex values, the modulus's), on the device of the first tensor.

    Raises:
        TypeError: where something is no tensor of numbers in memory, or `k` no number.
        ValueError: where `k` is out of range, a value is NaN (the tensor is named), or integers and floating values
            are mixed.

    Example:
        >>> kth_smallest([torch.tensor([3.0, -1.0]), torch.tensor([[2.0]])], 2)
        tensor(2.)

    Floyd and Rivest (1975), algorithm SELECT, for the bracket from a sample; chapter 4.
    """
    values = collect(tensors, by)
    k = _rank(k, 1, values.total)
    if values.on_cpu:
        key = select_cpu.locate(values, k).key
        found = values.order.values(torch.tensor(key, dtype=torch.int64, device="cpu"))
    else:
        found = select_device.kth_smallest(values, k)
    return found.to(device=values.tensors[0].device, dtype=values.dtype)


@uncompiled
def keep_largest(tensors: Tensors, k: int, *, by: By = "value", among: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return bool masks that are True for exactly the k largest of all values; of equal ones the later stays.

    "Later" runs through the tensors in the order given, and through each in its logical (row-major) order.

    Args:
        tensors: as for ``kth_smallest``.
        k: how many stay, from 0 to the number of values (with `among`, of those not barred).
        by: as for ``kth_smallest``.
        among: bool tensors of the same shapes; an entry that is False there is barred. Floating values only.

    Returns:
        One mask a tensor, of its shape and on its device.

    Raises:
        TypeError: where something is no tensor of numbers in memory, or `k` no number.
        ValueError: where `k` is out of range, `among` does not fit, a value is NaN (the tensor is named), or integers
            and floating values are mixed.

    Example:
        >>> keep_largest([torch.tensor([3.0, 1.0]), torch.tensor([1.0])], 2)
        [tensor([ True, False]), tensor([True])]

    Chapter 4.
    """
    return keep_and_count(tensors, k, by=by, among=among).masks


@uncompiled
def keep_and_count(tensors: Tensors, k: int, *, by: By = "value", among: Sequence[Tensor] | None = None) -> Kept:
    """Return the masks of ``keep_largest``, and for each how many entries stay at least, without a wait to count."""
    values = collect(tensors, by, among)
    limit = values.total
    if values.among is not None and values.on_cpu:  # else the device is waited for only once, with all it counts
        limit = sum(count_kept(allowed) for allowed in values.among)
    k = _rank(k, 0, limit)
    if values.total == 0:
        return Kept([torch.ones_like(t, dtype=torch.bool) for t in values.tensors], [0] * len(values.tensors))
    return select_cpu.keep(values, k) if values.on_cpu else select_device.keep(values, k)


@uncompiled
def keep_n_of_m(tensor: Tensor, n: int, m: int, *, dim: int = 1, by: By = "value", name: str = "tensor") -> Tensor:
    """Return a bool mask that is True for the n largest of every m consecutive values; of equal ones the later stays.

    Args:
        tensor: real numbers (with ``by="magnitude"`` also complex), at least one dimension.
        n: how many of each m stay, from 0 to m.
        m: the size of a group, at least 1, a divisor of the dimension.
        dim: the dimension along which groups run.
        by: as for ``kth_smallest``.
        name: what an error calls the tensor.

    Returns:
        A mask of the tensor's shape, on its device.

    Raises:
        TypeError: where `tensor` is no tensor of numbers in memory, or `n`, `m` or `dim` no number.
        ValueError: where a number is out of range, m does not divide the dimension, or a value is NaN.

    Example:
        >>> keep_n_of_m(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2, 4)
        tensor([[False,  True,  True, False]])

    Mishra et al. (2021), section 3, for 2 of 4; chapter 4.
    """
    n, m, dim = whole("n", n), whole("m", m), whole("dim", dim)
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n of m needs 0 <= n <= m and m >= 1, got {n}:{m}")
    collected = collect([tensor], by, names=[name])
    (values,), order = collected.tensors, collected.order
    if not -values.dim() <= dim < values.dim():
        raise ValueError(f"{name} has {values.dim()} dimensions, none of them is dim = {dim}")
    if values.shape[dim] % m:
        raise ValueError(f"{name}: dimension {dim} has {values.shape[dim]} entries, not a multiple of m = {m}")
    groups = values.movedim(dim, -1)
    mask = torch.empty(groups.shape, dtype=torch.bool, device=values.device)
    flat_groups, flat_mask = groups.reshape(-1, m), mask.view(-1, m)
    later = torch.ones(m, m, dtype=torch.bool, device=values.device).triu(1)
    rows = max(1, 2**21 // (m * m))
    for some, out in zip(torch.split(flat_groups, rows), torch.split(flat_mask, rows), strict=True):
        some = order.compared(some)
        if bool(some.isnan().any()):
            raise_nan(name)
        some = some.abs() if by == "magnitude" else some
        own, other = some.unsqueeze(2), some.unsqueeze(1)
        outranked_by = ((other > own) | ((other == own) & later)).sum(dim=2)
        torch.lt(outranked_by, n, out=out)
    return mask.movedim(-1, dim)


def _rank(k: Any, least: int, most: int) -> int:
    rank = whole("k", k)
    if not least <= rank <= most:
        given = str(rank) if abs(rank) < 10**20 else "one of more than 20 digits"
        raise ValueError(f"k must be between {least} and the number of values, which is {most}; got {given}")
    return rank

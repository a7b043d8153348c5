"""Do tensors share memory, so that writing an entry of one writes an entry of another?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def require_own_memory(chosen: Mapping[str, Tensor], every: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming both, where an entry of a chosen tensor is also one of another tensor, or its own twice.

    `every` are all the tensors of the model, the chosen ones among them. Views of one memory that share no entry, such
    as the parts of one flat vector, are fine.
    """
    by_memory: dict[Any, list[str]] = {}
    for name, tensor in every.items():
        if _has_memory(tensor):
            by_memory.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(name)
    for names in by_memory.values():
        if len(names) > 1:
            _require_disjoint({name: every[name] for name in names}, chosen)
    for name, tensor in chosen.items():
        if _has_memory(tensor) and _overlaps_itself(tensor):
            raise ValueError(f"entries of {name!r} share memory with each other: clone it first")


def _require_disjoint(tensors: Mapping[str, Tensor], chosen: Mapping[str, Tensor]) -> None:
    spans = {name: _span(tensor) for name, tensor in tensors.items()}
    open_spans: list[str] = []
    for name in sorted(spans, key=lambda name: spans[name][0]):
        open_spans = [other for other in open_spans if spans[other][1] > spans[name][0]]
        for other in open_spans:
            if (name in chosen or other in chosen) and _overlap(tensors[name], tensors[other]):
                first, second = (n for n in tensors if n in (name, other))
                raise ValueError(
                    f"{first!r} and {second!r} share memory without being one parameter, so a zero in one is a zero in "
                    "the other: give both modules the same nn.Parameter, or clone one of them"
                )
        open_spans.append(name)


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two views of one memory share a byte."""
    spans = _span(first), _span(second)
    start, stop = min(span[0] for span in spans), max(span[1] for span in spans)
    taken = torch.zeros(stop - start, dtype=torch.bool, device=first.device)
    _bytes(taken, start, first).fill_(True)
    return bool(_bytes(taken, start, second).any())


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False  # each axis steps over all that the narrower ones reach
    start, stop = _span(tensor)
    taken = torch.zeros(stop - start, dtype=torch.bool, device=tensor.device)
    _bytes(taken, start, tensor).fill_(True)
    return int(taken.sum()) < tensor.nbytes


def _bytes(taken: Tensor, start: int, tensor: Tensor) -> Tensor:
    """Those of the bytes from `start` on that a tensor's entries stand in."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    return taken.as_strided((*tensor.shape, size), (*strides, 1), _span(tensor)[0] - start)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The bytes of the storage from its first entry to its last."""
    size, start = tensor.element_size(), int(tensor.storage_offset())
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + reach + 1) * size if tensor.numel() else start * size


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta

"""How many floating-point operations does a forward pass take, by the layer whose weight is multiplied?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.evaluate import as_written, call_on, evaluated, plain_kernels
from gradprune.core.owners import Owners, memory

aten = torch.ops.aten

# By name, since torch has many fused forms of a product, and more with every version.
_PRODUCT = re.compile(
    "mm|matmul|linear|conv|attention|lstm|gru|rnn|cdist|fft|linalg|cholesky|inverse|solve|mv|dot|correlat|encoder_layer"
)
_NO_PRODUCT = re.compile(
    "gamma|upsample|cumm|comm|resolve|norm|cross|diagonal|vander|window|freq|shift|cache|check|dummy|flatten|pack_"
    "|reorder|slice|fused_lstm_cell|fused_gru_cell|convert|backward"
)

_GROUPED = {"aten._grouped_mm", "transformers.grouped_mm_fallback"}


@dataclass
class Flops:
    """Operations of one module: all, and those with weights that are not zero."""

    all: int = 0
    effective: float = 0.0


@dataclass(frozen=True)
class Count:
    """FLOPs by the module that has the weight, or else by the one that ran; and how often what was not counted ran.

    By weight, all operations with a parameter that is known to take part.
    """

    by_module: dict[nn.Module, Flops]
    uncounted: dict[str, int]
    by_weight: dict[nn.Parameter, int] = field(default_factory=dict)


def count_flops(model: nn.Module, example: Any) -> Count:
    """Count one forward pass by the formulas of torch's own counter, and by more for products that it has none for."""
    seen = _Products(model)
    with evaluated(model), as_written(), torch.no_grad(), plain_kernels(), seen.watching():
        call_on(model, example)
    return Count(seen.found, seen.uncounted, seen.by_weight)


class _Products(Owners):
    """Sees every product: whose weight takes part in it, and how many of that weight's entries are zero?"""

    def __init__(self, model: nn.Module) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__(model)
        self.found: dict[nn.Module, Flops] = {}
        self.uncounted: dict[str, int] = {}
        self.by_weight: dict[nn.Parameter, int] = {}
        self._parameter_at = {key: p for p in model.parameters() if p.dim() >= 2 and (key := memory(p)) is not None}
        self._formulas = {**_formulas(), **flop_registry}
        self._densities: dict[Any, float] = {}

    def ran(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        if operator in self._formulas:
            flops = self._formulas[operator](*args, **kwargs, out_val=result)
            flops *= 4 if isinstance(result, Tensor) and result.is_complex() else 1
            module, weight = self.weight_among((*args, *kwargs.values()))
            self._add(module, flops, flops * (1.0 if weight is None else self._density(weight)))
            self._add_to_weight(module, weight, flops)
        elif str(operator) in _GROUPED:
            self._groups(*args)
        elif self._multiplies(operator, args, kwargs):
            self.uncounted[str(operator)] = self.uncounted.get(str(operator), 0) + 1

    def _groups(self, a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any) -> None:
        """A product in groups: the rows of `a`, the columns of `b` or what they share, each up to its offset."""
        module, weight = self.weight_among((a, b))
        if offs is None:
            groups = [(x, y, x.shape[0]) for x, y in zip(a, b, strict=True)]
        else:
            ends = [0, *(int(end) for end in offs.tolist())]
            rows = [end - start for start, end in pairwise(ends)]
            if a.dim() == 2 and b.dim() == 2:
                groups = [(a[:, s:e], b[s:e], a.shape[0]) for s, e in pairwise(ends)]
            elif a.dim() == 2:
                groups = [(a[:n], b[i], n) for i, n in enumerate(rows)]
            else:
                groups = [(a[i], b[:, :n], a.shape[1]) for i, n in enumerate(rows)]
        total, effective = 0, 0.0
        for x, y, height in groups:
            flops = 2 * height * x.shape[1] * y.shape[-1]
            part = None if weight is None else (x if weight is a else y)
            total += flops
            effective += flops * (1.0 if part is None or not flops else self._density(part))
        self._add(module, total, effective)
        self._add_to_weight(module, weight, total)

    def _add(self, module: nn.Module, flops: int, effective: float) -> None:
        found = self.found.setdefault(module, Flops())
        found.all += flops
        found.effective += effective

    def _add_to_weight(self, module: nn.Module, weight: Tensor | None, flops: int) -> None:
        """Of a copy, such as a cast, it is known whose it is where its module has one weight."""
        if weight is None:
            return
        own = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
        parameter = self._parameter_at.get(memory(weight) or 0, own[0] if len(own) == 1 else None)
        if parameter is not None:
            self.by_weight[parameter] = self.by_weight.get(parameter, 0) + flops

    def _density(self, weight: Tensor) -> float:
        """The share of the entries that are not zero."""
        if weight.layout != torch.strided:
            return nonzeros(weight) / max(weight.numel(), 1)
        version = None if weight.is_inference() else weight._version
        key = (weight.untyped_storage()._cdata, version, weight.storage_offset(), weight.shape, weight.stride())
        if key not in self._densities:
            self._densities[key] = nonzeros(weight) / max(weight.numel(), 1)
        return self._densities[key]

    def _multiplies(self, operator: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether it is a product: by torch's name for it, and of foreign operators by what they get."""
        namespace, _, name = str(operator).rpartition(".")
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() >= 2]
        if namespace not in ("aten", "prim", "prims"):
            floating = [t for t in tensors if t.is_floating_point() or t.is_complex() or t.is_quantized]
            return len(floating) >= 2 or any(self.owners(t) for t in tensors)
        return bool(tensors and _PRODUCT.search(name) and not _NO_PRODUCT.search(name))


def nonzeros(tensor: Tensor) -> int:
    """How many entries are not zero, in whichever layout they are stored."""
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout != torch.strided:
        # Of a compressed layout crow_indices and the like only say where the values are.
        tensor = tensor.values()
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return int(torch.count_nonzero(tensor))


@cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """Products that torch's counter has no formula for, in its form: tensors and ``out_val``."""

    def matrices(a: Tensor, b: Tensor) -> int:
        return 2 * prod(a.shape) * b.shape[-1]

    def added(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
        return matrices(a, b)

    def vector(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
        return 2 * a.numel()

    def added_vector(_: Tensor, a: Tensor, b: Tensor, *__: Any, **___: Any) -> int:
        return 2 * a.numel()

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])

    def bilinear(x: Tensor, weight: Tensor, y: Tensor, *_: Any, **__: Any) -> int:
        # The weight by the first input, and that by the second.
        return 2 * x.shape[0] * (weight.numel() + weight.shape[-3] * weight.shape[-1])

    def product(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
        return matrices(a, b)

    known: dict[str, Callable[..., int]] = {
        "mv": vector,
        "dot": vector,
        "vdot": vector,
        "addmv": added_vector,
        "addmv_": added_vector,
        "addmm_": added,
        "addbmm": added,
        "addbmm_": added,
        "baddbmm_": added,
        "_addmm_activation": added,
        "_int_mm": product,
        "_trilinear": bilinear,
        "_scaled_dot_product_flash_attention_for_cpu": attention,
        "_scaled_dot_product_fused_attention_overrideable": attention,
    }
    return {getattr(aten, name): formula for name, formula in known.items() if hasattr(aten, name)}

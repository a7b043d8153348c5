"""What does a model cost: parameters, operations, bytes and time, dense and pruned (chapter 4)?"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core.checks import is_quantized, module, require_values
from gradprune.core.encoded import bitmask_bytes, readable
from gradprune.core.evaluate import call, evaluated
from gradprune.core.flops import Count, Flops, count_flops, nonzeros
from gradprune.core.tables import as_frame, html_table
from gradprune.deploy.quantize import parts
from gradprune.deploy.sparse import SparseLinear

INDEX_BYTES = 4  # of a column or row index in CSR
COMPRESSED_AT_A_TIME = 2**22  # bytes
NOTE = (
    "Zeros alone save no time and no memory: dense kernels store and multiply them like any other number. Effective "
    "FLOPs and encoded bytes are what kernels and formats that skip zeros could save."
)


class Row(NamedTuple):
    """One layer's cost, or the whole model's. FLOPs are those of one forward pass; None without an example.

    Args:
        name: The layer's name in the model.
        kind: The name of its class.
        parameters: Number of entries in all its tensors.
        nonzeros: Those that are not zero.
        flops: All operations.
        effective_flops: Those with weights that are not zero.
        bytes_dense: As stored dense.
        bytes_bitmask: One bit a weight, and the nonzeros.
        bytes_csr: In compressed sparse rows.
        bytes_compressed: After zlib.
    """

    name: str
    kind: str
    parameters: int
    nonzeros: int
    flops: int | None
    effective_flops: int | None
    bytes_dense: int
    bytes_bitmask: int
    bytes_csr: int
    bytes_compressed: int

    @property
    def sparsity(self) -> float:
        """The share of the parameters that are zero; 0.0 where there are none."""
        return 1 - self.nonzeros / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Report:
    """What ``report`` found; printed, a table in a terminal (with rich, a prettier one) and in a notebook.

    Args:
        rows: One a layer.
        total: Their sum.
        latency: Seconds of one forward pass, or None where it was not asked for.
        uncounted: The operators whose products the FLOPs lack, and how often each ran.
    """

    rows: tuple[Row, ...]
    total: Row
    latency: float | None = None
    uncounted: Mapping[str, int] = field(default_factory=dict, hash=False)

    def to_frame(self) -> Any:
        """Return the rows and the total as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = [{**row._asdict(), "sparsity": row.sparsity} for row in (*self.rows, self.total)]
        return as_frame(rows).set_index("name")

    def __str__(self) -> str:
        table = [list(_COLUMNS), *self._cells()]
        widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], *self._notes()])

    def _repr_html_(self) -> str:
        *body, total = self._cells()
        return html_table(_COLUMNS, body, total, self._notes())

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(show_footer=True)
        *body, total = self._cells()
        for i, (column, footer) in enumerate(zip(_COLUMNS, total, strict=True)):
            table.add_column(column, footer, justify="left" if i < 2 else "right")
        for cells in body:
            table.add_row(*cells)
        return Group(table, *self._notes())

    def _cells(self) -> list[list[str]]:
        return [
            [
                row.name,
                row.kind,
                f"{row.parameters:,}",
                f"{row.nonzeros:,}",
                f"{100 * row.sparsity:.1f} %",
                *("" if n is None else f"{n:,}" for n in (row.flops, row.effective_flops)),
                *(readable(n) for n in row[-4:]),
            ]
            for row in (*self.rows, self.total)
        ]

    def _notes(self) -> list[str]:
        timing = [] if self.latency is None else [f"One forward pass took {1e3 * self.latency:.3g} ms (median)."]
        if not self.uncounted:
            return [*timing, NOTE]
        names = ", ".join(f"{name} ({times}x)" for name, times in self.uncounted.items())
        return [*timing, f"FLOPs lack those of operators without a formula: {names}.", NOTE]


_COLUMNS = (
    "layer", "kind", "parameters", "nonzeros", "sparsity", "FLOPs", "effective",
    "dense", "bit mask", "CSR", "compressed",
)  # fmt: skip


def report(model: nn.Module, example: Any = None, *, latency: bool = False) -> Report:
    """Return what a model costs, layer by layer and in all: parameters, nonzeros, FLOPs, bytes, and time on request.

    A layer is a module with parameters of its own; a tied tensor counts where it comes first. A multiplication and an
    addition are 2 FLOPs (of complex numbers 8, or 6 in a convolution, which torch computes as three real ones). A
    product with a weight, with a part of one or with its copy or cast counts for the layer that has the weight, and
    effective FLOPs leave out the share of zeros in that part. All else is effective as it is: attention's own products,
    and those with a weight computed from parameters. The model runs in eval mode and is left as it was.

    Args:
        model: Any module. Weights may be stored sparse, also by ``compress``; they are reported as if stored dense. Of
            what ``quantize`` made, integers and scales are reported.
        example: The model's input, a tensor, or a tuple or dict of its arguments; without it FLOPs are None.
        latency: Whether to time the forward pass with ``torch.utils.benchmark``: seconds, the median.

    Returns:
        A ``Report``. Its bytes: dense, one number after the other; bit mask, one bit a weight and the nonzeros; CSR,
        the nonzeros with a 4-byte column each and a 4-byte offset a row; compressed, the dense bytes after zlib at
        level 1. Tensors of one dimension are encoded as they are. ``uncounted`` names the operators that multiply
        tensors in a way there is no formula for, with how often they ran: the FLOPs lack theirs.

    Raises:
        TypeError: The model is no module, or holds weights that cannot be read: lazy, on the meta device, DTensors,
            quantized and packed by torch.ao.
        ValueError: `latency` is asked for without an example, or the model raises on it.

    Example:
        >>> total = gp.report(nn.Linear(4, 3), torch.ones(2, 4)).total
        >>> total.parameters, total.flops, total.bytes_dense
        (15, 48, 60)

    Chapter 4.
    """
    module(model)
    if not isinstance(latency, bool):
        raise TypeError(f"latency must be True or False, got {type(latency).__name__}")
    if latency and example is None:
        raise ValueError("latency needs an example: the model's input, or a tuple or dict of its arguments")
    _require_values(model)
    count = Count({}, {}) if example is None else count_flops(model, example)
    flops = dict(count.by_module)
    counted: set[int] = set()
    rows = []
    for name, layer in model.named_modules():
        own = _own(layer)
        if own:
            new = [part for p in own.values() if id(p) not in counted for part in _stored(p)]
            counted |= {id(p) for p in own.values()}
            layer_flops = None if example is None else _skipping(flops.pop(layer, Flops()), own.get("weight"))
            kind = getattr(layer, "original_name", type(layer).__name__)  # what was scripted
            rows.append(_row(name or "(model)", kind, new, layer_flops))
    elsewhere = sum((f.all for f in flops.values()), 0)
    if elsewhere:  # in modules without parameters, and so without zeros
        rows.append(_row("(other)", "", [], Flops(elsewhere, elsewhere)))
    return Report(tuple(rows), _sum(rows), _latency(model, example) if latency else None, count.uncounted)


def _own(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's own tensors: its parameters, or what gp.compress stored in their place."""
    own: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    if isinstance(layer, SparseLinear):
        own |= {name: t for name in ("weight", "bias") if (t := getattr(layer, name)) is not None}
    return own


def _stored(parameter: Tensor) -> list[Tensor]:
    """What is kept of a parameter: itself, or the integers and scales of a quantized one."""
    return list(parts(parameter).values()) if is_quantized(parameter) else [parameter.detach()]


def _skipping(flops: Flops, weight: Tensor | None) -> Flops:
    """The operations that zeros leave, where the product was with numbers that stand for the weight."""
    if weight is None or not (is_quantized(weight) or weight.layout != torch.strided):
        return flops
    entries = _stored(weight)[0]
    return Flops(flops.all, flops.all * nonzeros(entries) / max(entries.numel(), 1))


def _require_values(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "_packed_params", None), torch.ScriptObject | nn.Module):
            raise TypeError(f"the module {name!r} is quantized, its weights are packed out of sight: report it before")
        for own, parameter in layer.named_parameters(recurse=False):
            if not is_quantized(parameter):
                require_values(f"{name}.{own}" if name else own, parameter)


def _row(name: str, kind: str, tensors: list[Tensor], flops: Flops | None) -> Row:
    counts = [nonzeros(t) for t in tensors]
    sizes = [t.numel() * t.element_size() for t in tensors]
    return Row(
        name,
        kind,
        parameters=sum(t.numel() for t in tensors),
        nonzeros=sum(counts),
        flops=None if flops is None else flops.all,
        effective_flops=None if flops is None else round(flops.effective),
        bytes_dense=sum(sizes),
        bytes_bitmask=sum(bitmask_bytes(t, n) for t, n in zip(tensors, counts, strict=True)),
        bytes_csr=sum(_csr_bytes(t, n) for t, n in zip(tensors, counts, strict=True)),
        bytes_compressed=sum(_compressed_bytes(t) for t in tensors),
    )


def _sum(rows: list[Row]) -> Row:
    def total(column: str) -> Any:
        numbers = [getattr(row, column) for row in rows]
        return None if None in numbers else sum(numbers)

    return Row("total", "", *(total(column) for column in Row._fields[2:]))


def _csr_bytes(tensor: Tensor, nonzeros: int) -> int:
    if tensor.dim() < 2:
        return tensor.numel() * tensor.element_size()
    return nonzeros * (tensor.element_size() + INDEX_BYTES) + (tensor.shape[0] + 1) * INDEX_BYTES


def _compressed_bytes(tensor: Tensor) -> int:
    """In pieces, each by itself, so that all cores take part: zlib lets go of the interpreter's lock."""
    dense = (tensor if tensor.layout == torch.strided else tensor.to_dense()).cpu().contiguous()
    raw = dense.resolve_conj().resolve_neg().view(-1).view(torch.uint8).numpy() if tensor.numel() else _NO_BYTES
    pieces = [raw[i : i + COMPRESSED_AT_A_TIME] for i in range(0, raw.size, COMPRESSED_AT_A_TIME)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return sum(pool.map(lambda piece: len(zlib.compress(piece, 1)), pieces))


_NO_BYTES = np.empty(0, np.uint8)


def _latency(model: nn.Module, example: Any) -> float:
    from torch.utils.benchmark import Timer

    with evaluated(model), torch.no_grad():
        timer = Timer(
            "call(model, example)",
            globals={"call": call, "model": model, "example": example},
            num_threads=torch.get_num_threads(),
        )
        return float(timer.blocked_autorange(min_run_time=0.2).median)

"""What a model costs: parameters, operations, bytes and time, dense and pruned (chapter 4)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

INDEX_BYTES = 4  # of a column or row index in CSR
COMPRESSED_AT_A_TIME = 2**22  # bytes
NOTE = (
    "Zeros alone save no time and no memory: dense kernels store and multiply them like any other number. Effective "
    "FLOPs and encoded bytes are what kernels and formats that skip zeros could save."
)


class Row(NamedTuple):
    """One layer's cost, or the whole model's. FLOPs are those of one forward pass; None without an example."""

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
    """What ``report`` found: ``rows``, one a layer, their ``total``, and ``latency`` in seconds if asked for.

    Printed, it is a table in a terminal (with rich, a prettier one) and in a notebook; ``to_frame`` makes it a
    pandas DataFrame.
    """

    rows: tuple[Row, ...]
    total: Row
    latency: float | None = None

    def to_frame(self) -> Any:
        """The rows and the total as a pandas DataFrame. Raises ImportError where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("a DataFrame needs pandas: pip install pandas") from error
        rows = [{**row._asdict(), "sparsity": row.sparsity} for row in (*self.rows, self.total)]
        return pandas.DataFrame(rows).set_index("name")

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
        import html  # slow to import, and only notebooks need it

        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        *body, total = self._cells()
        rows = "".join(row(cells, "td") for cells in body)
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return (
            f"<table><thead>{row(_COLUMNS, 'th')}</thead><tbody>{rows}</tbody>"
            f"<tfoot>{row(total, 'th')}</tfoot></table>{notes}"
        )

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
                *(_readable(n) for n in row[-4:]),
            ]
            for row in (*self.rows, self.total)
        ]

    def _notes(self) -> list[str]:
        timing = [] if self.latency is None else [f"One forward pass took {1e3 * self.latency:.3g} ms (median)."]
        return [*timing, NOTE]


_COLUMNS = (
    "layer", "kind", "parameters", "nonzeros", "sparsity", "FLOPs", "effective",
    "dense", "bit mask", "CSR", "compressed",
)  # fmt: skip


def report(model: nn.Module, example: Any = None, *, latency: bool = False) -> Report:
    """What `model` costs, layer by layer and in all: parameters, nonzeros, FLOPs, bytes, and time on request.

    A layer is a module with parameters of its own; a tied tensor counts where it comes first. `example` is the model's
    input, a tensor, or a tuple or dict of its arguments; with it, FLOPs of one forward pass are counted by torch's own
    counter (a multiplication and an addition are 2). Effective FLOPs leave out the share of zero weights. Bytes: dense
    as stored; bit mask, one bit a weight and the nonzeros; CSR, the nonzeros with a 4-byte column each and a 4-byte
    offset a row; compressed, the stored bytes after zlib at level 1. Tensors of one dimension are encoded as they are.
    `latency` times the forward pass with ``torch.utils.benchmark``, in seconds, the median.

    The model is run in eval mode without gradients, and left as it was. Raises ValueError where `latency` is asked for
    without an example. Chapter 4.
    """
    if latency and example is None:
        raise ValueError("latency needs an example: the model's input, or a tuple or dict of its arguments")
    flops, all_flops = ({}, 0) if example is None else _flops(model, example)
    counted: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            new = [p.detach() for p in own.values() if id(p) not in counted]
            counted |= {id(p) for p in own.values()}
            layer_flops = flops.get(name, 0) if example is not None else None
            rows.append(_row(name or "(model)", type(module).__name__, new, layer_flops, _density(own)))
    if example is not None:
        elsewhere = all_flops - sum(row.flops or 0 for row in rows)
        if elsewhere:
            rows.append(_row("(other)", "", [], elsewhere, 1.0))
    return Report(tuple(rows), _sum(rows), _latency(model, example) if latency else None)


def _row(name: str, kind: str, tensors: list[Tensor], flops: int | None, density: float) -> Row:
    nonzeros = [int(torch.count_nonzero(t)) for t in tensors]
    return Row(
        name,
        kind,
        parameters=sum(t.numel() for t in tensors),
        nonzeros=sum(nonzeros),
        flops=flops,
        effective_flops=None if flops is None else round(flops * density),
        bytes_dense=sum(t.nbytes for t in tensors),
        bytes_bitmask=sum(_bitmask_bytes(t, n) for t, n in zip(tensors, nonzeros, strict=True)),
        bytes_csr=sum(_csr_bytes(t, n) for t, n in zip(tensors, nonzeros, strict=True)),
        bytes_compressed=sum(_compressed_bytes(t) for t in tensors),
    )


def _sum(rows: list[Row]) -> Row:
    def total(column: str) -> Any:
        numbers = [getattr(row, column) for row in rows]
        return None if None in numbers else sum(numbers)

    return Row("total", "", *(total(column) for column in Row._fields[2:]))


def _density(own: Mapping[str, Tensor]) -> float:
    weights = [p.detach() for p in own.values() if p.dim() >= 2]
    total = sum(p.numel() for p in weights)
    return sum(int(torch.count_nonzero(p)) for p in weights) / total if total else 1.0


def _bitmask_bytes(tensor: Tensor, nonzeros: int) -> int:
    if tensor.dim() < 2:
        return tensor.nbytes
    return -(-tensor.numel() // 8) + nonzeros * tensor.element_size()


def _csr_bytes(tensor: Tensor, nonzeros: int) -> int:
    if tensor.dim() < 2:
        return tensor.nbytes
    return nonzeros * (tensor.element_size() + INDEX_BYTES) + (tensor.shape[0] + 1) * INDEX_BYTES


def _compressed_bytes(tensor: Tensor) -> int:
    """In pieces, each by itself, so that all cores take part: zlib lets go of the interpreter's lock."""
    raw = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    pieces = [raw[i : i + COMPRESSED_AT_A_TIME] for i in range(0, raw.size, COMPRESSED_AT_A_TIME)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return sum(pool.map(lambda piece: len(zlib.compress(piece, 1)), pieces))


def _flops(model: nn.Module, example: Any) -> tuple[dict[str, int], int]:
    """FLOPs by module name, each without its children's, and those of the whole pass."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with _evaluated(model), counter:
        _call(model, example)
    counts, root = counter.get_flop_counts(), type(model).__name__
    inclusive = {
        name: sum(counts.get(f"{root}.{name}" if name else root, {}).values()) for name, _ in model.named_modules()
    }
    own = dict(inclusive)
    for name, module in model.named_modules():
        for child, _ in module.named_children():
            own[name] -= inclusive.get(f"{name}.{child}" if name else child, 0)
    return own, counter.get_total_flops()


def _latency(model: nn.Module, example: Any) -> float:
    from torch.utils.benchmark import Timer

    with _evaluated(model):
        call = {"call": _call, "model": model, "example": example}
        timer = Timer("call(model, example)", globals=call, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=0.2).median)


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    devices = [p.device.index for p in model.parameters() if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=set(devices)), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _readable(size: int) -> str:
    """Bytes with a prefix of 1000: 999 B, 1.00 kB, 12.3 MB."""
    if size < 1000:
        return f"{size} B"
    power = min(int(math.log10(size)) // 3, 4)
    value = size / 1000**power
    return f"{value:.{2 - min(int(math.log10(value)), 2)}f} {' kMGT'[power]}B"

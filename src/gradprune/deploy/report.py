"""What a model costs: parameters, operations, bytes and time, dense and pruned (chapter 4)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
    counter (a multiplication and an addition are 2; of complex numbers they are 8, or 6 in a convolution, which torch
    computes as three real ones). A product with a weight, or with a part of one such as the keys' share of an attention
    layer's joint matrix, counts for the layer that has the weight, and effective FLOPs leave out the share of zeros in
    that part. All else, attention's own products among it, is effective as it is, and so is a product with a weight
    computed from parameters. Bytes: dense as stored; bit mask, one bit a weight and the nonzeros; CSR, the nonzeros
    with a 4-byte column each and a 4-byte offset a row; compressed, the stored bytes after zlib at level 1. Tensors of
    one dimension are encoded as they are.
    `latency` times the forward pass with ``torch.utils.benchmark``, in seconds, the median.

    The model is run in eval mode without gradients, and left as it was. Raises ValueError where `latency` is asked for
    without an example. Chapter 4.
    """
    if latency and example is None:
        raise ValueError("latency needs an example: the model's input, or a tuple or dict of its arguments")
    flops = {} if example is None else _flops(model, example)
    counted: set[int] = set()
    rows = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own:
            new = [p.detach() for p in own.values() if id(p) not in counted]
            counted |= {id(p) for p in own.values()}
            layer_flops = None if example is None else flops.pop(module, _Flops())
            rows.append(_row(name or "(model)", type(module).__name__, new, layer_flops))
    elsewhere = sum((f.all for f in flops.values()), 0)
    if elsewhere:  # in modules without parameters, and so without zeros
        rows.append(_row("(other)", "", [], _Flops(elsewhere, elsewhere)))
    return Report(tuple(rows), _sum(rows), _latency(model, example) if latency else None)


@dataclass
class _Flops:
    all: int = 0
    effective: float = 0.0


def _row(name: str, kind: str, tensors: list[Tensor], flops: _Flops | None) -> Row:
    nonzeros = [int(torch.count_nonzero(t)) for t in tensors]
    return Row(
        name,
        kind,
        parameters=sum(t.numel() for t in tensors),
        nonzeros=sum(nonzeros),
        flops=None if flops is None else flops.all,
        effective_flops=None if flops is None else round(flops.effective),
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


def _flops(model: nn.Module, example: Any) -> dict[nn.Module, _Flops]:
    """FLOPs by the module that has the weight, or else by the one that ran."""
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    count = _Count(model)
    formulas = {op: count.watching(formula) for op, formula in flop_registry.items()}
    with _evaluated(model), _plain_kernels(), count, FlopCounterMode(display=False, custom_mapping=formulas):
        _call(model, example)
    return count.found


class _Count:
    """Sees every product: whose weight takes part in it, and how many of that weight's entries are zero?"""

    def __init__(self, model: nn.Module) -> None:
        self.found: dict[nn.Module, _Flops] = {}
        self._model, self._running = model, [model]
        self._owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                if p.dim() >= 2:
                    self._owners.setdefault(p.untyped_storage().data_ptr(), []).append(module)
        self._densities: dict[Any, float] = {}

    def __enter__(self) -> _Count:
        self._hooks: list[RemovableHandle] = []
        for module in self._model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _end(self, *_: Any) -> None:
        self._running.pop()

    def watching(self, formula: Callable[..., int]) -> Callable[..., int]:
        """The formula of torch's counter, which also tells what it counted here."""

        def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            flops = formula(*args, out_val=out_val, **kwargs)
            flops *= 4 if isinstance(out_val, Tensor) and out_val.is_complex() else 1
            module, weight = self._weight_among(args)
            found = self.found.setdefault(module, _Flops())
            found.all += flops
            found.effective += flops * (1.0 if weight is None else self._density(weight))
            return flops

        counted._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
        return counted

    def _weight_among(self, args: Iterable[Any]) -> tuple[nn.Module, Tensor | None]:
        """The weight, or the part of one, and its module: the one that runs where it has one itself."""
        running, elsewhere = self._running[-1], None
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.dim() >= 2:
                owners = self._owners.get(tensor.untyped_storage().data_ptr(), [])
                if running in owners:
                    return running, tensor
                if owners and elsewhere is None:
                    elsewhere = owners[0], tensor
        return elsewhere or (running, None)

    def _density(self, weight: Tensor) -> float:
        key = (weight.data_ptr(), weight.shape, weight.stride())
        if key not in self._densities:
            self._densities[key] = int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
        return self._densities[key]


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Without the fused kernels of recurrent and attention layers, in which the counter sees no product."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _disabled(torch.backends.mkldnn), _disabled(torch.backends.cudnn), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _disabled(backend: Any) -> Iterator[None]:
    before, backend.enabled = backend.enabled, False
    try:
        yield
    finally:
        backend.enabled = before


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

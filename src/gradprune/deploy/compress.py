"""In which storage is each linear layer fastest, on this machine and at this batch size (chapter 8)?

Dense, by rows (CSR), by blocks where zeros come in blocks (BSR), and 2:4 where a GPU has it. The layers are timed on
the inputs that they get from the example, in turn, so that what else the machine does falls on all alike. Another
storage is taken only where its median round is faster, by a margin, than the fastest tenth of the dense ones. At the
end the same is asked of the whole network.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.checks import require, require_readable
from gradprune.core.evaluate import as_written, call, call_on, evaluated, tensors_in
from gradprune.core.layers import replace_, require_layers, uncompiled_network, weights_of
from gradprune.core.progress import bar
from gradprune.core.tables import Table
from gradprune.deploy.quantize import is_conv1d
from gradprune.deploy.sparse import SparseLinear, blocks_of, why_not_two_of_four
from gradprune.weights.mask import Masks

DENSE = "dense"
LEAST_ZEROS = 0.5  # with fewer no storage was ever seen faster
A_RUN = 1e-3  # seconds that are timed at once, at least
HOPELESS = 1.5  # times as slow in a first look: not timed again
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Timed(NamedTuple):
    """What was measured of one linear layer, or of the whole network; milliseconds are medians."""

    layer: str
    zeros: float  # share of the weights
    dense_ms: float | None = None
    csr_ms: float | None = None
    bsr_ms: float | None = None
    semi_ms: float | None = None
    stored: str = DENSE
    speedup: float = 1.0  # of what was taken, over dense: the median of the rounds
    reason: str = ""  # why nothing was measured


@dataclass(frozen=True)
class Compressed(Table):
    """What ``compress`` measured; printed, a table with a line for each linear layer, and the whole network last.

    Args:
        layers: One for each linear layer.
        whole: The whole network, dense and as it was put together.
        taken: Whether that was faster and is what was returned.
        difference: How far its outputs are from the dense network's, as a share of the largest.
        batch: Rows of the example.
        threads: That torch used.
    """

    layers: tuple[Timed, ...]
    whole: Timed
    taken: bool
    difference: float
    batch: int
    threads: int
    _named_by: ClassVar[str | None] = "layer"

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row for each layer, and one for the network."""
        return [each._asdict() for each in (*self.layers, self.whole)]

    def _notes(self) -> list[str]:
        many = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        if not self.taken:
            return [f"at a batch of {self.batch} on {many} nothing was faster than dense: all is as it was"]
        return [
            f"at a batch of {self.batch} on {many} the network is {self.whole.speedup:.2f} times as fast; its outputs "
            f"differ by at most {self.difference:.1g} of the largest"
        ]


def compress(
    model: nn.Module,
    example: Any,
    *,
    masks: Mapping[str, Tensor] | None = None,
    rounds: int = 15,
    margin: float = 0.1,
) -> nn.Module:
    """Return a copy whose linear layers are stored in what was measured fastest here: dense, CSR, BSR, or 2:4 on a GPU.

    Timed are ``nn.Linear`` and transformers' ``Conv1D`` with at least half of their weights zero. What holds is said of
    this machine, this number of threads and this batch size. Where the whole network is not faster, the copy is dense.
    What was measured is in the copy's attribute ``compressed``, a ``Compressed``.

    Args:
        model: The network; it is not changed.
        example: Its input, a tensor, or a tuple or dict of its arguments, of the size that is to come.
        masks: What is zero, as ``prune`` returns it; None where the weights are zero already.
        rounds: How often each way is timed, in turn.
        margin: By which share of the dense time another storage has to be faster; the whole network by half of it.

    Returns:
        The copy, in eval mode. Layers stored sparse have no gradients and refuse to be trained. Keep the network that
        was given in a file, and compress it where it is to run.

    Raises:
        TypeError: The model is no module, or one whose layers cannot be told; or a weight has no values.
        ValueError: A mask is not the model's; the model raises on the example, returns no tensor, or has no linear
            layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
        >>> masks = gp.prune(model, sparsity=0.95)
        >>> fast = gp.compress(model, torch.randn(1, 512))
        >>> print(fast.compressed)  # doctest: +SKIP
        layer     zeros  dense_ms    csr_ms  bsr_ms  semi_ms  stored  speedup  reason
        -----------------------------------------------------------------------------
        0.weight   0.95   0.03032  0.008137                   CSR       3.718
        ...

    Gale et al. (2020), for sparse kernels; chapter 8.
    """
    require_layers(checks.module(model))
    rounds = checks.whole("rounds", rounds, least=3)
    margin = checks.number("margin", margin, least=0.0, below=1.0)
    network = uncompiled_network(model)
    given = None if masks is None else Masks(masks)
    for name, weight in weights_of(network).items():
        require_readable(name, weight.parameter)
    dense = copy.deepcopy(network).eval()
    if given is not None:
        given.apply_(dense)
    layers = _linear_layers(dense)
    require(bool(layers), "the model has no linear layer (a convolution is made narrower by gp.shrink)")
    with evaluated(dense), as_written(), torch.no_grad():
        inputs, wanted = _inputs(dense, example, layers)
        require(bool(wanted), f"{type(model).__name__} returns no tensor for the example")
        return _Compressing(dense, example, rounds, margin).of(layers, inputs, wanted)


# --------------------------------------------------------------------------------------------------- what is measured


class _Compressing:
    """A dense copy, how it is timed, and what comes of that."""

    def __init__(self, dense: nn.Module, example: Any, rounds: int, margin: float) -> None:
        self.dense, self.example, self.rounds, self.margin = dense, example, rounds, margin

    def of(
        self, layers: Mapping[str, nn.Module], inputs: Mapping[nn.Module, list[Tensor]], wanted: list[Tensor]
    ) -> nn.Module:
        """The copy that is fastest."""
        found, chosen = [], {}
        with bar(len(layers), "compressing") as progress:
            for path, module in layers.items():
                timed, layer = self._layer(path, module, inputs.get(module, []))
                found.append(timed)
                if layer is not None:
                    chosen[path] = layer
                progress.update(1)
        whole, taken, difference = Timed("in all", _zeros(self.dense)), False, 0.0
        small = self._with(chosen)
        if chosen:
            why, difference = self._differs(small, wanted)
            if why:
                checks.warn(f"all stays dense: with layers that are stored sparse {why}")
            else:
                ways = {DENSE: lambda: call(self.dense, self.example), "mixed": lambda: call(small, self.example)}
                seconds, best = self._timed(ways, self.margin / 2)
                taken = bool(best)
                mixed = ", ".join(dict.fromkeys(each.stored for each in found))
                whole = whole._replace(dense_ms=_ms(seconds[DENSE]))
                if taken:
                    whole = whole._replace(stored=mixed, speedup=_speedup(seconds, "mixed"))
        result = small if taken else self.dense
        tensor = next(tensors_in(self.example), None)
        batch = tensor.shape[0] if tensor is not None and tensor.dim() else 1
        told = Compressed(tuple(found), whole, taken, difference, batch, torch.get_num_threads())
        result.__dict__["compressed"] = told
        return result

    def _with(self, chosen: Mapping[str, nn.Module]) -> nn.Module:
        """A copy with the chosen layers."""
        if "" in chosen:  # the model is one layer
            return chosen[""].eval()
        small = copy.deepcopy(self.dense) if chosen else self.dense
        for path, layer in chosen.items():
            replace_(small, small.get_submodule(path), layer)
        return small.eval()

    def _differs(self, small: nn.Module, wanted: list[Tensor]) -> tuple[str, float]:
        """What is wrong with its outputs, and how far they are apart."""
        try:
            found = list(tensors_in(call(small, self.example)))
        except Exception as error:  # a module that reads a layer's weight itself
            return f"the forward pass fails ({type(error).__name__}: {error!s:.200})", 0.0
        apart = _apart(found, wanted)
        allowed = max(map(_tolerance, {t.dtype for t in wanted}))
        return ("" if apart <= allowed else f"the outputs differ by {apart:.2g} of the largest"), apart

    def _layer(self, path: str, module: Any, inputs: list[Tensor]) -> tuple[Timed, nn.Module | None]:
        weight = module.weight.detach().t() if is_conv1d(module) else module.weight.detach()
        zeros = 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)
        timed = Timed(f"{path}.weight" if path else "weight", round(zeros, 6))
        if not inputs:
            return timed._replace(reason="does not run on the example"), None
        if zeros < LEAST_ZEROS:
            return timed._replace(reason="has too few zeros"), None
        ways = _storages(module, weight, inputs)
        if not ways:
            return timed._replace(reason=f"no other storage takes {weight.dtype}"), None
        ways = {DENSE: module, **ways}
        runs = {name: _runner(layer, inputs) for name, layer in ways.items()}
        device = weight.device
        look = in_turn(runs, 3, device)
        least = {name: min(seconds) for name, seconds in look.items()}
        runs = {name: run for name, run in runs.items() if name == DENSE or least[name] < HOPELESS * least[DENSE]}
        seconds, best = self._timed(runs, self.margin) if len(runs) > 1 else (look, "")
        seconds = {**look, **seconds}
        best_of = {kind: _least(seconds, kind) for kind in ("CSR", "BSR", "2:4")}
        timed = timed._replace(
            dense_ms=_ms(seconds[DENSE]), csr_ms=best_of["CSR"], bsr_ms=best_of["BSR"], semi_ms=best_of["2:4"]
        )
        if not best:
            return timed, None
        return timed._replace(stored=best.partition(",")[0], speedup=_speedup(seconds, best)), ways[best]

    def _faster(self, before: list[float], after: list[float], margin: float) -> bool:
        """Whether the median is less, by the margin, than a tenth of those before: noise alone never gets so far."""
        return bool(np.median(after) < (1 - margin) * np.quantile(before, 0.1))

    def _timed(self, runs: Mapping[str, Callable[[], Any]], margin: float) -> tuple[dict[str, list[float]], str]:
        """The seconds of each, and which other than dense is faster; asked twice where the first answer is unclear."""
        others = [name for name in runs if name != DENSE]
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(2):
            for name, each in in_turn(runs, self.rounds, self._device()).items():
                seconds[name] += each
            best = min(others, key=lambda name: _ms(seconds[name]))
            if self._faster(seconds[DENSE], seconds[best], margin):
                return seconds, best
            if _ms(seconds[best]) > (1 - margin) * _ms(seconds[DENSE]):
                break
        return seconds, ""

    def _device(self) -> torch.device:
        return next(self.dense.parameters()).device


def _storages(module: Any, weight: Tensor, inputs: list[Tensor]) -> dict[str, nn.Module]:
    """The layer in every other storage that gives the same outputs."""
    ways: dict[str, Callable[[], nn.Module]] = {
        f"{'CSR' if side == 1 else f'BSR {side} x {side}'}, {'columns' if columns else 'rows'}": partial(
            SparseLinear, weight, module.bias, block=side, columns=columns
        )
        for side in dict.fromkeys((1, blocks_of(weight)))
        for columns in (False, True)
    }
    if not why_not_two_of_four(weight):
        ways["2:4"] = partial(_two_of_four, weight, module.bias)
    found = {}
    for name, make in ways.items():
        try:
            layer = make().eval()
            same = all(_apart([layer(x)], [module(x)]) <= _tolerance(weight.dtype) for x in inputs)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):  # no kernel for this dtype or shape
            continue
        if same:
            found[name] = layer
    return found


def _two_of_four(weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    held = torch.sparse.to_sparse_semi_structured(weight.contiguous())
    layer._parameters["weight"] = nn.Parameter(held, requires_grad=False)
    layer._parameters["bias"] = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return layer


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of one run of each, measured in turn; several runs at once where one is short."""
    often = {}
    for name, run in ways.items():
        run()  # what is made on the first call
        often[name] = max(1, round(A_RUN / max(_seconds(run, 1, device), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            seconds[name].append(_seconds(run, often[name], device))
    return seconds


def _seconds(run: Callable[[], Any], often: int, device: torch.device) -> float:
    if device.type == "cuda":  # pragma: no mutate: needs CUDA
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(often):
        run()
    if device.type == "cuda":  # pragma: no mutate: needs CUDA
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / often


def _runner(layer: nn.Module, inputs: list[Tensor]) -> Callable[[], Any]:
    def run() -> None:
        for x in inputs:
            layer(x)

    return run


def _speedup(seconds: Mapping[str, list[float]], other: str) -> float:
    """Dense over another, the median of the rounds."""
    return statistics.median(a / max(b, 1e-12) for a, b in zip(seconds[DENSE], seconds[other], strict=True))


def _ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _least(seconds: Mapping[str, list[float]], kind: str) -> float | None:
    return min((_ms(each) for name, each in seconds.items() if name.startswith(kind)), default=None)


# ------------------------------------------------------------------------------------------------------------ the model


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that are a product with their own weight and nothing else."""
    found = {}
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        plain = plain and type(module).__name__ != "NonDynamicallyQuantizableLinear"
        own = isinstance(module._parameters.get("weight"), nn.Parameter)
        if (plain or is_conv1d(module)) and own and not module._forward_hooks and not module._forward_pre_hooks:
            found[path] = module
    return found


def _inputs(
    model: nn.Module, example: Any, layers: Mapping[str, nn.Module]
) -> tuple[dict[nn.Module, list[Tensor]], list[Tensor]]:
    """What each layer gets in a forward pass on the example, once for each time that it runs; and the outputs."""
    seen: dict[nn.Module, list[Tensor]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda module, args: seen.setdefault(module, []).append(args[0].detach().clone()))
        for m in layers.values()
    ]
    try:
        outputs = [t.detach().clone() for t in tensors_in(call_on(model, example))]
    finally:
        for hook in hooks:
            hook.remove()
    return seen, outputs


def _zeros(model: nn.Module) -> float:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    total = sum(p.numel() for p in matrices)
    return round(1 - sum(int(p.count_nonzero()) for p in matrices) / max(total, 1), 6)


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 2e-2)


def _apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, as a share of the largest magnitude of the output in which it is."""
    most = 0.0
    for a, b in zip(found, wanted, strict=True):
        if not b.is_floating_point() or not b.numel():
            continue
        finite = b.isfinite()
        largest = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
        apart = float((a[finite].double() - b[finite].double()).abs().max()) if bool(finite.any()) else 0.0
        most = max(most, apart / largest if largest else apart)
    return most

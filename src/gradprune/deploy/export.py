"""How does a network get into another runtime, and is it the same function there (chapter 8)?

By torch.export, into a file of ONNX or of ExecuTorch. What was written is run by that runtime at once, in ONNX on
inputs of another batch size too, and takes its name only where the outputs are those of the network.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradprune.core import checks, files
from gradprune.core.checks import is_quantized, require
from gradprune.core.encoded import readable
from gradprune.core.evaluate import as_written, evaluated
from gradprune.core.layers import require_layers, uncompiled_network
from gradprune.deploy.executorch_file import EXECUTORCH
from gradprune.deploy.function import Inputs, Outputs, check, unwrap_
from gradprune.deploy.onnx_file import ONNX
from gradprune.deploy.runtimes import Runtime, shortened
from gradprune.weights.mask import Masks

# How far outputs may be apart, as a share of the largest of an output: other kernels, other sums.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
RUNTIMES = {"onnx": ONNX, "executorch": EXECUTORCH}


class Exported(NamedTuple):
    """What ``export`` wrote; printed, a line.

    Args:
        path: The file.
        bytes: Of the file.
        difference: The largest difference to the network's outputs, as a share of the largest magnitude of an output.
        batch: "any", or the only size that the first dimension of the inputs may have.
        inputs: What the inputs are called in the file.
        outputs: What the outputs are called.
        runtime: What it is for, and was checked by.
    """

    path: Path
    bytes: int
    difference: float
    batch: int | str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    runtime: str = ONNX.name

    def __str__(self) -> str:
        batch = "batches of any size" if self.batch == "any" else f"a batch of {self.batch}"
        return (
            f"{str(self.path)!r}: {readable(self.bytes)}, for {batch}; by {self.runtime} the outputs differ by at most "
            f"{self.difference:.1g} of the largest"
        )


def export(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    runtime: Literal["onnx", "executorch"] = "onnx",
    masks: Mapping[str, Tensor] | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a network to a file for another runtime, checked by that runtime before the file gets its name.

    Of an ONNX file the first dimension of the inputs stays open where the network can be exported so; a warning says
    where it cannot. One of ExecuTorch is for the example's batch size. The outputs are the tensors that the network
    returns, in their order. Zeros are in the file as any other number. Weights of ``quantize(model, "int8")`` stay
    integers of eight bits there.

    Args:
        model: The network; it is not changed, and exported in eval mode.
        example: Its input on the CPU, a tensor, or a tuple or dict of its arguments.
        path: The file; where anything fails, what stood there still does.
        runtime: "onnx", or "executorch" for torch's runtime on telephones and boards, with XNNPACK's operators.
        masks: What is zero, as ``prune`` returns it; None where the weights are zero already.
        tolerance: How far outputs may be apart, as a share of the largest magnitude of each; 1e-4 in float32 unless
            given.

    Returns:
        An ``Exported``: the path, bytes, the largest difference found, and for which batch sizes it is.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed (``pip install 'gradprune[deploy]'``), or
            executorch (``pip install 'gradprune[executorch]'``).
        TypeError: The model is no module, or one whose layers cannot be told; the example holds no tensor.
        ValueError: It raises on the example, cannot be exported, or not be run by the runtime; the outputs differ by
            more than the tolerance; it has more than 2 GB, for ONNX; it is quantized by "int8_dynamic"; nothing can be
            written at `path`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        >>> masks = gp.prune(model, sparsity=0.5)
        >>> done = gp.export(model, torch.randn(8, 64), "model.onnx")
        >>> done.batch, done.difference < 1e-4
        ('any', True)

    Chapter 8.
    """
    require_layers(checks.module(model))
    place = files.place("path", path)
    limit = None if tolerance is None else checks.number("tolerance", tolerance, above=0.0)
    to = RUNTIMES[checks.choice("runtime", runtime, RUNTIMES)]
    to.require()
    network = uncompiled_network(model)
    given = None if masks is None else Masks(masks)
    inputs = Inputs(network, example)
    size = check(network, to.name)
    require(
        to.largest is None or size < to.largest,
        f"the network has {readable(size)}, and an ONNX file holds at most 2 GB: export it in parts, or shrink it",
    )
    if given is not None or any(is_quantized(p) for p in network.parameters()):
        network = copy.deepcopy(network)
        if given is not None:
            given.apply_(network)
        unwrap_(network)
    with evaluated(network), as_written(), torch.no_grad():
        return _written(Outputs(network, inputs), inputs, place, to, limit)


# --------------------------------------------------------------------------------------------------- what is written


def _written(network: Outputs, inputs: Inputs, place: Path, to: Runtime, limit: float | None) -> Exported:
    with files.replacing(place) as part:
        batch: int | str = "any" if to.opens and any(inputs.open) else inputs.batch
        why = ""
        if batch == "any":
            try:
                difference = _attempt(network, inputs, part, to, limit, [inputs.batch, inputs.batch + 1, 1])
            except ValueError as error:
                why, batch = str(error), inputs.batch
        if batch != "any":
            difference = _attempt(network, inputs, part, to, limit, [])
        found = Exported(place, part.stat().st_size, difference, batch, inputs.names, network.names, to.name)
    if why:
        checks.warn(f"the file is for batches of {inputs.batch} alone, since with an open batch size {why}")
    return found


def _attempt(
    network: Outputs, inputs: Inputs, part: Path, to: Runtime, limit: float | None, sizes: Sequence[int]
) -> float:
    """Write the file, with an open batch where sizes are to be tried, and return how far its outputs are apart."""
    tensors = inputs.of(max(inputs.batch, 2)) if sizes else inputs.tensors  # a size of 1 would be taken for a constant
    try:
        to.write(network, tensors, [each and bool(sizes) for each in inputs.open], inputs.names, part)
    except Exception as error:
        raise ValueError(f"the network cannot be exported: {shortened(error)}") from error
    return max(
        _apart(network, inputs.of(n) if n != inputs.batch else inputs.tensors, part, to, limit)
        for n in sizes or [inputs.batch]
    )


def _apart(network: Outputs, tensors: Sequence[Tensor], part: Path, to: Runtime, limit: float | None) -> float:
    """How far the file's outputs are from the network's, at most; ValueError where that is more than allowed."""
    wanted = [t.detach() for t in network(*tensors)]
    try:
        found = to.run(part, tensors)
    except Exception as error:
        raise ValueError(f"{to.name} cannot run what was exported: {shortened(error)}") from error
    return max(
        _difference(f"by {to.name} {name!r}", a, b, TOLERANCE.get(a.dtype, 1e-4) if limit is None else limit)
        for name, a, b in zip(network.names, wanted, found, strict=True)
    )


def _difference(what: str, wanted: Tensor, found: Tensor, limit: float) -> float:
    require(
        wanted.shape == found.shape,
        f"{what} has shape {tuple(found.shape)}, the network's {tuple(wanted.shape)}",
    )
    a, b = wanted.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities too
    if bool(same.all()):
        return 0.0
    apart = float((a - b)[~same].abs().nan_to_num(nan=torch.inf).max())
    largest = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
    share = apart / largest if largest else torch.inf
    require(
        share <= limit, f"{what} differs by {apart:.2g}, {share:.1g} of its largest magnitude; allowed is {limit:g}"
    )
    return share

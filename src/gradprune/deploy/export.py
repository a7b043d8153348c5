"""How does a network get into another runtime, and is it the same function there (chapter 8)?

By torch.export into ONNX. What was written is run by ONNX Runtime at once, on the example and on inputs of another
batch size, and takes its name only where the outputs are those of the network.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradprune.core import checks, files
from gradprune.core.checks import is_quantized, require, require_values
from gradprune.core.encoded import readable
from gradprune.core.evaluate import arguments, as_written, call_on, evaluated, tensors_in
from gradprune.core.layers import replace_, require_layers, uncompiled_network
from gradprune.core.quiet import quiet
from gradprune.deploy.quantize import parts, scheme_of
from gradprune.weights.mask import Masks

# How far outputs may be apart, as a share of the largest of an output: other kernels, other sums.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
LARGEST = 2**31 - 2**20  # bytes of an ONNX file, which is one message of protobuf


class Exported(NamedTuple):
    """What ``export`` wrote; printed, a line.

    Args:
        path: The file.
        bytes: Of the file.
        difference: The largest difference to the network's outputs, as a share of the largest magnitude of an output.
        batch: "any", or the only size that the first dimension of the inputs may have.
        inputs: What the inputs are called in the file.
        outputs: What the outputs are called.
    """

    path: Path
    bytes: int
    difference: float
    batch: int | str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        batch = "batches of any size" if self.batch == "any" else f"a batch of {self.batch}"
        return (
            f"{str(self.path)!r}: {readable(self.bytes)}, for {batch}; by ONNX Runtime the outputs differ by at most "
            f"{self.difference:.1g} of the largest"
        )


def export(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    masks: Mapping[str, Tensor] | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a network to an ONNX file, checked by ONNX Runtime before the file gets its name.

    The first dimension of the inputs stays open where the network can be exported so; a warning says where it cannot.
    The outputs are the tensors that the network returns, in their order. Zeros are in the file as any other number.
    Weights of ``quantize(model, "int8")`` stay integers of eight bits there.

    Args:
        model: The network; it is not changed, and exported in eval mode.
        example: Its input on the CPU, a tensor, or a tuple or dict of its arguments.
        path: The file; where anything fails, what stood there still does.
        masks: What is zero, as ``prune`` returns it; None where the weights are zero already.
        tolerance: How far outputs may be apart, as a share of the largest magnitude of each; 1e-4 in float32 unless
            given.

    Returns:
        An ``Exported``: the path, bytes, the largest difference found, and for which batch sizes it is.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed (``pip install 'gradprune[deploy]'``).
        TypeError: The model is no module, or one whose layers cannot be told; the example holds no tensor.
        ValueError: It raises on the example, cannot be exported, or not run by ONNX Runtime; the outputs differ by more
            than the tolerance; it has more than 2 GB; it is quantized by "int8_dynamic"; nothing can be written at
            `path`.

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
    _libraries()
    network = uncompiled_network(model)
    given = None if masks is None else Masks(masks)
    inputs = _Inputs(network, example)
    _check(network, inputs)
    if given is not None or any(is_quantized(p) for p in network.parameters()):
        network = copy.deepcopy(network)
        if given is not None:
            given.apply_(network)
        _unwrap_(network)
    with evaluated(network), as_written(), torch.no_grad():
        return _written(_Outputs(network, inputs), inputs, place, limit)


# ----------------------------------------------------------------------------------------------- what is asked for


class _Inputs:
    """The example, and the same with another number of rows."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.example = example
        args, kwargs = arguments(example)
        self.names = _names(model, args, kwargs)
        self.keys = tuple(kwargs)
        self.tensors = (*args, *kwargs.values())
        others = [n for n, value in zip(self.names, self.tensors, strict=True) if not isinstance(value, Tensor)]
        if not self.tensors or others:
            what = f"{others[0]!r} is none" if others else "there is none"
            raise TypeError(f"the example must hold tensors alone, as an ONNX file's inputs are; {what}")
        for name, tensor in zip(self.names, self.tensors, strict=True):
            require_values(name, tensor, "input")
            require(
                tensor.device.type == "cpu", f"the input {name!r} is on {tensor.device}: ONNX Runtime checks on the CPU"
            )
        sizes = [t.shape[0] for t in self.tensors if t.dim()]
        self.batch = sizes[0] if sizes else 0
        self.open = [bool(t.dim()) and self.batch > 0 and t.shape[0] == self.batch for t in self.tensors]

    def of(self, size: int) -> tuple[Tensor, ...]:
        """The example's rows again and again, so many of them."""
        rows = [i % self.batch for i in range(size)] if self.batch else []
        return tuple(t[rows] if is_open else t for t, is_open in zip(self.tensors, self.open, strict=True))


def _names(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """What the forward pass calls its arguments."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        names = [name for name, value in bound.items() if any(value is each for each in (*args, *kwargs.values()))]
    except (TypeError, ValueError):
        names = []
    if len(names) != len(args) + len(kwargs):
        names = [*(f"input_{i}" for i in range(len(args))), *kwargs]
    return tuple(names)


def _check(model: nn.Module, inputs: _Inputs) -> None:
    size = 0
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if is_quantized(tensor):
            require(
                scheme_of(tensor) == "int8",
                f"{name!r} is quantized by 'int8_dynamic', whose rounding of the inputs ONNX does not have: export "
                "gp.quantize(model, 'int8'), or gp.dequantize(model)",
            )
            size += sum(part.numel() * part.element_size() for part in parts(tensor).values())
            continue
        require_values(name, tensor)
        require(tensor.layout == torch.strided, f"{name!r} is sparse: export the network that gp.compress was given")
        require(tensor.device.type == "cpu", f"{name!r} is on {tensor.device}: export a copy on the CPU, model.cpu()")
        size += tensor.numel() * tensor.element_size()
    require(
        size < LARGEST,
        f"the network has {readable(size)}, and an ONNX file holds at most 2 GB: export it in parts, or shrink it",
    )


class _Integers(nn.Module):
    """A linear layer with weights of eight bits, in plain operators."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        held = parts(layer.weight)
        self.register_buffer("weight", held["int8"].contiguous())
        self.register_buffer("scale", held["scale"].to(layer.weight.dtype).flatten())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        product = nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale
        return product if self.bias is None else product + self.bias


def _unwrap_(model: nn.Module) -> None:
    """Put plain operators in the place of layers with torchao's tensors."""
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or not is_quantized(weight):
            continue
        require(bool(name), "the model is one quantized layer alone: put it into nn.Sequential")
        replace_(model, module, _Integers(module).train(module.training))


class _Outputs(nn.Module):
    """The network as a function from tensors to tensors."""

    def __init__(self, model: nn.Module, inputs: _Inputs) -> None:
        super().__init__()
        self.model, self.keys = model, inputs.keys
        self.names = _output_names(call_on(model, inputs.example))
        require(bool(self.names), f"{type(model).__name__} returns no tensor for the example")

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        first = len(tensors) - len(self.keys)
        found = self.model(*tensors[:first], **dict(zip(self.keys, tensors[first:], strict=True)))
        return tuple(tensors_in(found))


def _output_names(found: Any) -> tuple[str, ...]:
    number = len(list(tensors_in(found)))
    if isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values()):
        return tuple(str(key) for key in found)
    if isinstance(found, Mapping):  # of transformers; a cache in it is no tensor
        keys = [str(key) for key, value in found.items() if isinstance(value, Tensor)]
        if len(keys) == number:
            return tuple(keys)
    return ("output",) if number == 1 else tuple(f"output_{i}" for i in range(number))


# --------------------------------------------------------------------------------------------------- what is written


def _written(network: _Outputs, inputs: _Inputs, place: Path, limit: float | None) -> Exported:
    with files.replacing(place) as part:
        batch: int | str = "any" if any(inputs.open) else inputs.batch
        why = ""
        if batch == "any":
            try:
                difference = _attempt(network, inputs, part, limit, [inputs.batch, inputs.batch + 1, 1])
            except ValueError as error:
                why, batch = str(error), inputs.batch
        if batch != "any":
            difference = _attempt(network, inputs, part, limit, [])
        found = Exported(place, part.stat().st_size, difference, batch, inputs.names, network.names)
    if why:
        checks.warn(f"the file is for batches of {inputs.batch} alone, since with an open batch size {why}")
    return found


def _attempt(network: _Outputs, inputs: _Inputs, part: Path, limit: float | None, sizes: Sequence[int]) -> float:
    """Write the file, with an open batch where sizes are to be tried, and return how far its outputs are apart."""
    tensors = inputs.of(max(inputs.batch, 2)) if sizes else inputs.tensors  # a size of 1 would be taken for a constant
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if is_open else None for is_open in inputs.open)
    options: dict[str, Any] = {"dynamic_shapes": (shapes,)} if sizes else {}
    integers = any(
        isinstance(module, _Integers) for module in network.modules()
    )  # the optimizer makes small ones floats
    options |= {"optimize": not integers, "input_names": list(inputs.names), "output_names": list(network.names)}
    try:
        with quiet():
            program = torch.onnx.export(network, tensors, dynamo=True, verbose=False, **options)
            assert program is not None
            _without_traces_(program.model)
            program.save(part)
    except Exception as error:
        raise ValueError(f"the network cannot be exported: {_shortened(error)}") from error
    return max(
        _apart(network, inputs.of(n) if n != inputs.batch else inputs.tensors, part, limit)
        for n in sizes or [inputs.batch]
    )


def _without_traces_(model: Any) -> None:
    """Take out of the file where in the sources each operator comes from: paths, and more bytes than small weights."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.doc_string = None


def _apart(network: _Outputs, tensors: Sequence[Tensor], part: Path, limit: float | None) -> float:
    """How far the file's outputs are from the network's, at most; ValueError where that is more than allowed."""
    import onnxruntime

    wanted = [t.detach() for t in network(*tensors)]
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(part), settings, providers=["CPUExecutionProvider"])
        given = {each.name: t.numpy() for each, t in zip(session.get_inputs(), tensors, strict=True)}
        found = [torch.from_numpy(array) for array in session.run(None, given)]
    except Exception as error:
        raise ValueError(f"ONNX Runtime cannot run what was exported: {_shortened(error)}") from error
    return max(
        _difference(name, a, b, TOLERANCE.get(a.dtype, 1e-4) if limit is None else limit)
        for name, a, b in zip(network.names, wanted, found, strict=True)
    )


def _difference(name: str, wanted: Tensor, found: Tensor, limit: float) -> float:
    require(
        wanted.shape == found.shape,
        f"by ONNX Runtime {name!r} has shape {tuple(found.shape)}, the network's {tuple(wanted.shape)}",
    )
    a, b = wanted.double(), found.double()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities too
    if bool(same.all()):
        return 0.0
    apart = float((a - b)[~same].abs().nan_to_num(nan=torch.inf).max())
    largest = float(a[a.isfinite()].abs().max()) if bool(a.isfinite().any()) else 0.0
    share = apart / largest if largest else torch.inf
    require(
        share <= limit,
        f"by ONNX Runtime {name!r} differs by {apart:.2g}, {share:.1g} of its largest magnitude; allowed is {limit:g}",
    )
    return share


# ----------------------------------------------------------------------------------------------------- the libraries


def _libraries() -> None:
    try:
        with quiet():
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "gp.export needs onnx, onnxscript and onnxruntime: pip install 'gradprune[deploy]'"
        ) from error


def _shortened(error: BaseException) -> str:
    """The first lines of an error, without colours."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(causes[-1])).strip()
    first = " ".join(text.split())
    return f"{type(causes[-1]).__name__}: {first:.300}"

"""What of a network is exported: which inputs, outputs and weights has it as a function of tensors?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.checks import is_quantized, require, require_values
from gradprune.core.evaluate import arguments, call_on, tensors_in
from gradprune.core.layers import replace_
from gradprune.deploy.quantize import parts, scheme_of


class Inputs:
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
            raise TypeError(f"the example must hold tensors alone, as a file's inputs are; {what}")
        for name, tensor in zip(self.names, self.tensors, strict=True):
            require_values(name, tensor, "input")
            require(
                tensor.device.type == "cpu",
                f"the input {name!r} is on {tensor.device}: a file is checked on the CPU",
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


def check(model: nn.Module, runtime: str) -> int:
    """Check that all tensors of a network can be written, and return their bytes."""
    size = 0
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if is_quantized(tensor):
            require(
                scheme_of(tensor) == "int8",
                f"{name!r} is quantized by 'int8_dynamic', whose rounding of the inputs {runtime} does not have: "
                "export gp.quantize(model, 'int8'), or gp.dequantize(model)",
            )
            size += sum(part.numel() * part.element_size() for part in parts(tensor).values())
            continue
        require_values(name, tensor)
        require(tensor.layout == torch.strided, f"{name!r} is sparse: export the network that gp.compress was given")
        require(tensor.device.type == "cpu", f"{name!r} is on {tensor.device}: export a copy on the CPU, model.cpu()")
        size += tensor.numel() * tensor.element_size()
    return size


class Integers(nn.Module):
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
        """Return x (scale W)^T + b."""
        product = nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale
        return product if self.bias is None else product + self.bias


def unwrap_(model: nn.Module) -> None:
    """Put plain operators in the place of layers with torchao's tensors."""
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or not is_quantized(weight):
            continue
        require(bool(name), "the model is one quantized layer alone: put it into nn.Sequential")
        replace_(model, module, Integers(module).train(module.training))


class Outputs(nn.Module):
    """The network as a function from tensors to tensors."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.keys = model, inputs.keys
        self.names = _output_names(call_on(model, inputs.example))
        require(bool(self.names), f"{type(model).__name__} returns no tensor for the example")

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors in what the network returns."""
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

"""How are the weights of linear layers kept as integers of eight bits, and zeros as zeros (chapter 8)?

Each output unit has one scale, its largest magnitude over 127, and each weight is the nearest whole multiple of it. So
zero is zero, a weight and its negative become a number and its negative, and to quantize what was quantized changes no
integer. The products are torchao's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.checks import is_quantized, require, require_readable, require_values
from gradprune.core.encoded import readable
from gradprune.core.layers import Weight, replace_, require_layers, uncompiled_network, weights_of
from gradprune.core.quiet import quiet
from gradprune.core.tables import Table
from gradprune.weights.eligible import Patterns, as_patterns
from gradprune.weights.mask import Masks
from gradprune.weights.named import some

Scheme = Literal["int8", "int8_dynamic"]
SCHEMES = ("int8", "int8_dynamic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST, MOST_WITHOUT_VNNI = 127, 63  # there sums of two products of eight bits are kept in sixteen


class Layer(NamedTuple):
    """What became of one matrix."""

    name: str
    scheme: str  # empty where it was left
    weights: int
    zeros: int
    zeros_after: int
    bytes: int
    bytes_after: int
    reason: str = ""  # why it was left


@dataclass(frozen=True)
class Quantized(Table):
    """What ``quantize`` did, matrix by matrix; printed, a table.

    Args:
        layers: Of each matrix its name, the scheme, its weights, the zeros and bytes before and after, and the reason
            where it was left.
        scheme: What was asked for.
    """

    layers: tuple[Layer, ...]
    scheme: str
    _named_by: ClassVar[str | None] = "name"

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row for each matrix."""
        return [layer._asdict() for layer in self.layers]

    def _notes(self) -> list[str]:
        taken = [layer for layer in self.layers if layer.scheme]
        before, after = (sum(getattr(each, what) for each in self.layers) for what in ("bytes", "bytes_after"))
        return [
            f"{len(taken)} of {len(self.layers)} matrices are {self.scheme}: {readable(after)} instead of "
            f"{readable(before)}"
        ]


def quantize(
    model: nn.Module,
    scheme: Scheme = "int8",
    *,
    masks: Mapping[str, Tensor] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
) -> nn.Module:
    """Return a copy whose linear layers have weights of eight bits, one scale for each output unit; zeros stay zeros.

    Taken are ``nn.Linear`` and transformers' ``Conv1D``, which becomes the ``nn.Linear`` of the same function. All else
    is left: embeddings, convolutions, weights that several layers share, layers with a forward pass of their own.
    What became of each matrix, and why one was left, is in the copy's attribute ``quantized``, a ``Quantized``.

    Prune first, and quantize what is left; or the other way round: ``dequantize`` gives the rounded values, ``prune``
    takes them, and quantizing again changes no integer that stays, as long as each unit keeps its largest weight.

    Args:
        model: The network; it is not changed.
        scheme: "int8" keeps the weights as integers and multiplies in floating point: a quarter of the bytes, no time
            saved by itself. "int8_dynamic" rounds each row of the inputs too, as it comes, and multiplies integers.
        masks: What is zero, as ``prune`` returns it, set to zero before rounding; None where it is zero already.
        include: Glob patterns over parameter names, such as ``"*.mlp.*"``; only what one of them matches is taken.
        exclude: Glob patterns; what one of them matches is left.

    Returns:
        The copy, in eval mode; the integers have no gradients. ``save`` and ``load`` keep it in a file.

    Raises:
        ImportError: torchao is not installed (``pip install 'gradprune[deploy]'``).
        TypeError: The model is no module, or one whose layers cannot be told; or a weight has no values.
        ValueError: The scheme is unknown, a pattern matches nothing, no layer can be taken, or a weight is infinite
            or NaN.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> masks = gp.prune(model, sparsity=0.5)
        >>> small = gp.quantize(model)
        >>> [layer.scheme for layer in small.quantized.layers]
        ['int8', 'int8']
        >>> masks.holds(gp.dequantize(small))
        True

    Jacob et al. (2018), section 2; chapter 8.
    """
    require_layers(checks.module(model))
    checks.choice("scheme", scheme, SCHEMES)
    torchao()
    network = uncompiled_network(model)
    given = None if masks is None else Masks(masks)
    every = weights_of(network)
    for name, weight in every.items():
        if not is_quantized(weight.parameter):
            require_values(name, weight.parameter)
    reasons = _reasons(network, every, include, exclude)
    taken = [name for name, reason in reasons.items() if not reason]
    require(bool(taken), f"the model has nothing to quantize: {_told(reasons)}")
    for name in taken:
        require_readable(name, every[name].parameter)
        require(bool(every[name].parameter.isfinite().all()), f"{name!r} has weights that are infinite or NaN")
    small = copy.deepcopy(network).eval()
    if given is not None:
        given.apply_(small)
    own = weights_of(small)
    layers = [_quantized(small, own[name], scheme, reason) for name, reason in reasons.items()]
    small.__dict__["quantized"] = Quantized(tuple(layers), scheme)
    return small


def dequantize(model: nn.Module) -> nn.Module:
    """Return a copy of a quantized network with ordinary weights: the rounded values, which can be trained and pruned.

    Args:
        model: What ``quantize`` returned; it is not changed.

    Returns:
        The copy; what was transformers' ``Conv1D`` stays ``nn.Linear``.

    Raises:
        TypeError: The model is no module.
        ValueError: No weight of it is quantized by ``quantize``.

    Example:
        >>> model = nn.Linear(64, 64)
        >>> rounded = gp.dequantize(gp.quantize(model))
        >>> masks = gp.prune(rounded, sparsity=0.5)
        >>> small = gp.quantize(rounded)

    Chapter 8.
    """
    network = uncompiled_network(checks.module(model))
    held = {name: p for name, p in network.named_parameters() if is_quantized(p)}
    require(bool(held), "no weight of the model is quantized: gp.quantize does that")
    twin = copy.deepcopy(network)
    for name in held:
        module, attribute = _place(twin, name)
        setattr(module, attribute, nn.Parameter(values(module._parameters[attribute])))
    twin.__dict__.pop("quantized", None)
    return twin


# ------------------------------------------------------------------------------------------------------ what is taken


def _reasons(model: nn.Module, every: Mapping[str, Weight], include: Patterns, exclude: Patterns) -> dict[str, str]:
    """Each matrix, and why it is left; an empty reason for what is taken."""
    uses: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses.setdefault(id(parameter), set()).add(id(module))
    matrices = {n: w for n, w in every.items() if w.parameter.dim() >= 2 or is_quantized(w.parameter)}
    reasons = {name: _reason(w, len(uses.get(id(w.parameter), ())) > 1) for name, w in matrices.items()}
    free = [name for name, reason in reasons.items() if not reason]
    asked = None if include is None else _matching("include", include, free, reasons)
    left = set() if exclude is None else _matching("exclude", exclude, list(reasons), reasons)
    for name in free:
        if asked is not None and name not in asked:
            reasons[name] = "is not included"
        elif name in left:
            reasons[name] = "is excluded"
    return reasons


def _reason(weight: Weight, shared: bool) -> str:
    module, parameter = weight.module, weight.parameter
    kind = type(module)
    if is_quantized(parameter):
        return "is quantized already"
    if shared:
        return "is shared by several layers"
    if not (is_conv1d(module) or (isinstance(module, nn.Linear) and weight.attribute == "weight")):
        return weight.reason or f"belongs to a {kind.__name__}"
    if kind.__name__ == "NonDynamicallyQuantizableLinear":
        return "belongs to the output of an nn.MultiheadAttention, which reads it itself"
    if isinstance(module, nn.Linear) and kind.forward is not nn.Linear.forward:
        return f"belongs to a {kind.__name__}, which has a forward pass of its own"
    if module._parameters.get("weight") is not parameter:
        return "is computed by a parametrization"
    if parameter.dtype not in DTYPES:
        return f"is {parameter.dtype}"
    return ""


def _matching(argument: str, patterns: Any, names: list[str], every: Mapping[str, str]) -> set[str]:
    found = set()
    for pattern in as_patterns(argument, patterns):
        matched = {name for name in names if fnmatchcase(name, pattern)}
        beside = [f"{name!r} {reason}" for name, reason in every.items() if fnmatchcase(name, pattern)]
        instead = f"only what cannot be taken: {beside[0]}" if beside else f"none of {some(list(every))}"
        require(bool(matched), f"{argument} pattern {pattern!r} matches {instead}")
        found |= matched
    return found


def _told(reasons: Mapping[str, str]) -> str:
    told = [f"{name!r} {reason}" for name, reason in list(reasons.items())[:3]]
    return "; ".join(told) if told else "it has no matrices"


def is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, a linear layer whose weight is stored [in, out]."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


# ----------------------------------------------------------------------------------------------------- what is done


def _quantized(model: nn.Module, weight: Weight, scheme: str, reason: str) -> Layer:
    """Quantize one matrix of a copy, where there is no reason against it, and say what became of it."""
    parameter = weight.parameter
    if is_quantized(parameter):
        q = parts(parameter)["int8"]
        zeros, size = int((q == 0).sum()), _bytes(parameter)
        return Layer(weight.name, "", q.numel(), zeros, zeros, size, size, reason)
    size, zeros = parameter.numel() * parameter.element_size(), int((parameter == 0).sum())
    if reason:
        return Layer(weight.name, "", parameter.numel(), zeros, zeros, size, size, reason)
    module, attribute = _place(model, weight.name)
    if is_conv1d(module):
        module = as_linear_(model, weight.name.rpartition(".")[0])
    held = rounded(module._parameters[attribute], scheme)
    module._parameters[attribute] = nn.Parameter(held, requires_grad=False)
    left = int((parts(held)["int8"] == 0).sum())
    return Layer(weight.name, scheme, parameter.numel(), zeros, left, size, _bytes(held))


def as_linear_(model: nn.Module, name: str) -> nn.Linear:
    """Put an nn.Linear of the same function in the place of a transformers' Conv1D; return it."""
    old: Any = model.get_submodule(name)
    if not name:
        raise ValueError("the model is itself a Conv1D of transformers: put it into a module that holds it")
    weight, bias = old.weight, old.bias
    new = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None, device="meta")
    new._parameters["weight"] = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    new._parameters["bias"] = bias
    new.train(old.training)
    replace_(model, old, new)
    return new


def rounded(weight: Any, scheme: str) -> Tensor:
    """Return a weight as torchao's tensor of integers and scales, one for each row."""
    library = torchao()
    reduced = scheme == "int8_dynamic" and library.utils.should_reduce_range(weight.device)
    most = MOST_WITHOUT_VNNI if reduced else MOST
    exact = weight.detach().float()
    largest = exact.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / most, 1.0).clamp_min(torch.finfo(torch.float32).tiny)
    integers = (exact / scale).round_().clamp_(-most, most).to(torch.int8)
    return assembled(integers, scale, weight.dtype, scheme, reduced)


def assembled(integers: Tensor, scale: Tensor, dtype: torch.dtype, scheme: str, reduced: bool) -> Tensor:
    """Return torchao's tensor of integers and their scales."""
    of = torchao().quantization
    inputs = None
    if scheme == "int8_dynamic":
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

        inputs = QuantizeTensorToInt8Kwargs(of.PerRow(), reduce_range=reduced)
    block = [1, integers.shape[1]]
    made: Tensor = of.Int8Tensor(integers, scale, block, dtype, act_quant_kwargs=inputs, reduce_range=reduced)
    return made


def parts(tensor: Any) -> dict[str, Tensor]:
    """Return the integers and the scales of a quantized weight."""
    require(
        tuple(tensor.block_size) == (1, tensor.shape[1]) and tensor.qdata.dtype == torch.int8,
        "a weight is quantized by torchao in another way than gp.quantize does it",
    )
    zero = tensor.zero_point
    require(zero is None or not bool(zero.any()), "a weight is quantized by torchao with zeros that are not zero")
    return {"int8": tensor.qdata, "scale": tensor.scale}


def values(tensor: Any) -> Tensor:
    """Return the numbers that a quantized weight stands for."""
    held = parts(tensor)
    return (held["int8"].float() * held["scale"]).to(tensor.dtype)


def scheme_of(tensor: Any) -> str:
    """Return the scheme of a quantized weight."""
    return "int8" if tensor.act_quant_kwargs is None else "int8_dynamic"


def _bytes(tensor: Any) -> int:
    return sum(part.numel() * part.element_size() for part in parts(tensor).values())


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def torchao() -> ModuleType:
    """Return the library, or raise ImportError that says how to get it."""
    try:
        with quiet():
            import torchao
            import torchao.quantization
            import torchao.utils
    except ImportError as error:
        raise ImportError("gp.quantize needs torchao: pip install 'gradprune[deploy]'") from error
    return torchao  # type: ignore[no-any-return, unused-ignore]

"""What is a weight: which parameters are matrices that enter a product, and which of their axes is the output?

Modules store their weights in different orders: a linear layer [out, in], a transposed convolution [in, out / groups,
...], a stack of experts [experts, out, in] or [experts, in, out]. ``Axes`` says which, and shows any of them as
(stack..., output, input, rest...), as a view. ``weights_of`` says it of every parameter of a model, with all its names.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from gradprune.core.checks import is_quantized

QUANTIZED = "is quantized: gp.dequantize(model) gives its rounded values; prune those, and quantize them again"


class Axes(NamedTuple):
    """Where a weight keeps its outputs and inputs; `stack` are axes that number whole matrices."""

    output: int = 0
    input: int = 1
    stack: tuple[int, ...] = ()
    groups: int = 1  # packed in the input axis, as a transposed convolution does

    @property
    def depth(self) -> int:
        """How many axes come before the output in the canonical order."""
        return len(self.stack) + (self.groups > 1)

    def canonical(self, tensor: Tensor) -> Tensor:
        """Return a view of shape (stack..., output, input, rest...); a group's matrices count as stacked."""
        if self.groups == 1:
            order = [*self.stack, self.output, self.input]
        else:
            tensor = tensor.unflatten(self.input, (self.groups, tensor.shape[self.input] // self.groups))
            order = [axis + (axis > self.input) for axis in (*self.stack, self.input, self.output)]
            order[len(self.stack)] = self.input
            order.append(self.input + 1)
        return tensor.movedim(order, tuple(range(len(order))))


class Weight(NamedTuple):
    """A parameter of a model, and what is known of it."""

    name: str
    names: tuple[str, ...]  # all that the model's state dict has
    parameter: nn.Parameter
    module: nn.Module  # the layer; of a parametrized tensor the layer too
    attribute: str  # the layer's own name for it
    axes: Axes | None  # None where the order is not known
    packed: str = ""  # why a row is no unit
    reason: str = ""  # why it is no weight
    guessed: bool = False  # the reason is only its name or shape, in a module of a kind that is not known
    refused: str = ""  # why zeros here would not be the layer's
    direction: tuple[int, ...] | None = None  # of weight_norm: the axes over which its norm is taken


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Return every parameter of a model, weight or not, once, by its first name."""
    roles = _parametrized(model)
    found: dict[int, list[Weight]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}" if path else attribute
                role = roles.get((id(module), attribute)) or _hooked(module, attribute)
                found.setdefault(id(parameter), []).append(_weight(name, parameter, module, attribute, role))
    return {uses[0].name: _joined(uses) for uses in found.values()}


def last_of(model: nn.Module) -> Weight | None:
    """Return the matrix that comes last in the model, which mostly gives its outputs; None where there is none."""
    by_name = {name: weight for weight in weights_of(model).values() for name in weight.names}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return next((by_name[name] for name in reversed(names) if by_name[name].axes is not None), None)


def stated_axes(name: str, given: Any, dimensions: int) -> Axes:
    """Return the axes that a caller states as (output, input): those before both stack, the others belong to a unit."""
    pair = tuple(given) if isinstance(given, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in pair):
        raise ValueError(f"the axes of {name!r} must be a pair of ints, (output, input), got {given!r}")
    output, inputs = (axis + dimensions if axis < 0 else axis for axis in pair)
    if output == inputs or not all(0 <= axis < dimensions for axis in (output, inputs)):
        raise ValueError(f"the axes of {name!r} must be two different ones of its {dimensions}, got {given!r}")
    return Axes(output, inputs, tuple(range(min(output, inputs))))


# -------------------------------------------------------------------------------------------------- kinds of module

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_OUTPUT_FIRST = (nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)
_GATES = (
    "each unit of a recurrent layer is spread over the rows of all its gates in weight_ih and in weight_hh. "
    "Exclude both, or prune single weights"
)
# Layers of transformers that hold matrices in a stack and have no `is_transposed` that says in which order.
_STACKS = {
    "GraniteMoeParallelExperts": False,
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "MoshiFlexibleLinear": False,
}
_NORM = re.compile(r"Norm(\d?[dD]|Gated|alization)?$")
# What a parameter is called that is added, looked up or exponentiated, but no matrix of a product.
_NO_MATRIX = re.compile(
    r"(^|_)(embed(ding)?s?|tokens?|pos|positions?|positional|log|scales?|gamma|latents?|prompts?|codebook|table)(_|$)"
)


def _layer_axes(module: nn.Module, attribute: str, parameter: Tensor) -> tuple[Axes, str] | None:
    """The axes of a known layer's weight, and why its rows are no units; None for all else."""
    if isinstance(module, _OUTPUT_FIRST) and attribute == "weight":
        return Axes(), ""
    if isinstance(module, TRANSPOSED) and attribute == "weight":
        return Axes(1, 0, groups=module.groups), ""
    if isinstance(module, _RECURRENT) and attribute.startswith("weight_"):
        return Axes(), "" if attribute.startswith("weight_hr") else _GATES
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        joint = (
            "it packs the queries, keys and values of all heads. Exclude it, or take the granularity "
            f"({module.head_dim},), with which the queries, the keys or the values of one head go as a whole"
        )
        return Axes(), joint if attribute == "in_proj_weight" else ""
    kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.")]
    if "Conv1D" in kinds and attribute == "weight":
        return Axes(1, 0), ""
    if attribute == "weight" and any(kind.endswith("Router") for kind in kinds):  # to experts, by F.linear
        return Axes(), ""
    stacked = [_STACKS[kind] for kind in kinds if kind in _STACKS]
    if kinds and isinstance(getattr(module, "is_transposed", None), bool):
        stacked.append(bool(module.is_transposed))
    if stacked and "bias" not in attribute and parameter.dim() == 3:
        return (Axes(2, 1, (0,)) if stacked[0] else Axes(1, 2, (0,))), ""
    return None


def _unlike(module: nn.Module, attribute: str, shape: torch.Size) -> str:
    """Why a parameter of a module whose kind is not known is taken for no weight."""
    kind, name = type(module).__name__, attribute.lower()
    if "bias" in name:
        return "is a bias"
    if _NORM.search(kind) or ("Embed" in kind and attribute == "weight"):
        return f"belongs to a {kind}"
    if "proj" not in name and "weight" not in name and (_NO_MATRIX.search(name) or "Embed" in kind):
        return f"is no matrix of a product, by the name {attribute!r} in a {kind}"
    if attribute != "weight" and sum(size > 1 for size in shape) <= 1:
        return f"is a vector in the shape {tuple(shape)}"
    if attribute != "weight" and len(shape) > 2 and shape[0] == 1:
        return f"is broadcast over its first axis, in the shape {tuple(shape)}"
    return ""


def _weight(name: str, parameter: nn.Parameter, module: nn.Module, attribute: str, role: _Role | None) -> Weight:
    """What one use of a parameter makes of it."""
    direction, refused = None, ""
    if role is not None:
        module, attribute, refused = role.layer, role.tensor, role.refused
        if role.normed:
            direction = tuple(axis for axis in range(parameter.dim()) if axis != role.dim)
    use = Weight(name, (name,), parameter, module, attribute, None, refused=refused, direction=direction)
    if role is not None and role.reason:
        return use._replace(reason=role.reason)
    if is_quantized(parameter):
        return use._replace(reason=QUANTIZED)
    lazy = isinstance(parameter, nn.UninitializedParameter)
    if not lazy and not (parameter.is_floating_point() or parameter.is_complex()):
        return use._replace(reason=f"is {parameter.dtype}")
    if not lazy and parameter.dim() < 2:
        return use._replace(reason=f"has {parameter.dim()} dimension{'' if parameter.dim() else 's'}, fewer than two")
    if isinstance(module, _EMBEDDINGS):
        return use._replace(reason="is an embedding's")
    if isinstance(module, _NORMS):
        return use._replace(reason="is a normalisation's")
    known = _layer_axes(module, attribute, parameter)
    if known is not None:
        return use._replace(axes=known[0], packed=known[1])
    if lazy:
        return use._replace(reason="has no shape yet")
    reason = _unlike(module, attribute, parameter.shape)
    return use._replace(reason=reason, guessed=bool(reason))


def _joined(uses: list[Weight]) -> Weight:
    """One parameter from all its uses: what one of them rules out is ruled out for all."""
    first, names = uses[0], tuple(use.name for use in uses)
    never = next((use for use in uses if use.reason and not use.guessed), None)
    if never is not None:
        tied = f"is tied to {never.name!r}, which {never.reason}" if never is not first else never.reason
        axes = next((use.axes for use in uses if use.axes is not None), None)
        return first._replace(names=names, reason=tied, guessed=False, axes=axes)
    known = [use for use in uses if use.axes is not None] or [use for use in uses if not use.reason] or [first]
    best = known[0]
    packed = next((use.packed for use in known if use.packed), "")
    if any(use.axes != best.axes for use in known):
        packed = "layers that store it in different orders share it"
    refused = next((use.refused for use in uses if use.refused), "")
    direction = next((use.direction for use in uses if use.direction is not None), None)
    return best._replace(name=first.name, names=names, packed=packed, refused=refused, direction=direction)


# -------------------------------------------------------------------------------------------------- parametrizations


class _Role(NamedTuple):
    """What a parameter is for, that its module or its name do not say."""

    layer: nn.Module
    tensor: str  # the layer's own name
    reason: str = ""  # why it is no weight
    refused: str = ""  # why zeros here would not be the layer's
    normed: bool = False  # by weight_norm, over all axes but `dim` (-1 or None: over all)
    dim: int | None = None


def _parametrized(model: nn.Module) -> dict[tuple[int, str], _Role]:
    """The roles of what torch.nn.utils.parametrize moved, by the module that has it now and its name there."""
    found: dict[tuple[int, str], _Role] = {}
    for layer in model.modules():
        if not parametrize.is_parametrized(layer):
            continue
        for tensor, steps in layer.parametrizations.items():  # type: ignore[operator, union-attr]
            kinds = [type(step) for step in steps]
            for module in steps.modules():
                for attribute in module._parameters:
                    found[id(module), attribute] = _Role(layer, tensor, f"shapes the {tensor} of its layer")
            for attribute in steps._parameters:
                if kinds == [parametrizations._WeightNorm]:
                    gain = "is the gain of a weight_norm" if attribute == "original0" else ""
                    role = _Role(layer, tensor, gain, normed=True, dim=steps[0].dim)
                elif all(kind is parametrizations._SpectralNorm for kind in kinds):
                    role = _Role(layer, tensor)  # a multiple of the original has its zeros
                else:
                    names = ", ".join(kind.__name__.lstrip("_") for kind in kinds)
                    refused = (
                        f"the layer computes its {tensor} from it by the parametrization {names}, so zeros here are no "
                        "zeros there; call torch.nn.utils.parametrize.remove_parametrizations(layer, "
                        f'"{tensor}") first, or exclude it'
                    )
                    role = _Role(layer, tensor, refused=refused)
                found[id(steps), attribute] = role
    return found


def _hooked(module: nn.Module, attribute: str) -> _Role | None:
    """The role of what an older function of torch.nn.utils renamed, and computes the layer's tensor from by a hook."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and attribute in (f"{hook.name}_g", f"{hook.name}_v"):
            gain = "is the gain of a weight_norm" if attribute.endswith("_g") else ""
            return _Role(module, hook.name, gain, normed=True, dim=hook.dim)
        if isinstance(hook, SpectralNorm) and attribute == f"{hook.name}_orig":
            return _Role(module, hook.name)
        if isinstance(hook, BasePruningMethod) and attribute == f"{hook._tensor_name}_orig":
            return _Role(module, hook._tensor_name)
    return None


# ---------------------------------------------------------------------------------------------- kinds that are lost


def uncompiled_network(model: nn.Module) -> nn.Module:
    """Return the network itself, which torch.compile may have wrapped."""
    network: nn.Module = getattr(model, "_orig_mod", model)
    return network


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever in the model that stands; the model itself it cannot be."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            above, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(above), attribute, new)


def require_layers(model: nn.Module) -> None:
    """Raise TypeError for a model whose modules no longer say what its parameters are."""
    inside_graph: set[int] = set()
    for path, module in model.named_modules():
        called = f"{path!r} of the model" if path else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{called} is a script module (torch.jit), which no longer says what its layers are: prune the model "
                "before you script or trace it"
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"{called} is wrapped by FullyShardedDataParallel (FSDP1), which joins its parameters into flat "
                "ones: prune before you wrap it"
            )
        if isinstance(module, torch.fx.GraphModule):
            inside_graph |= {id(part) for part in module.modules() if type(part) is nn.Module} | {id(module)}
        if type(module).__name__ in ("InterpreterModule", "InterpreterModuleDispatcher"):  # of torch.export.unflatten
            inside_graph.add(id(module))
        if id(module) in inside_graph and any(p.dim() > 1 for p in module.parameters(recurse=False)):
            raise TypeError(
                f"{called} comes from torch.export or torch.fx and no longer says what its layers are: prune the model "
                "before you export or trace it"
            )

"""What is a weight: which parameters are matrices that enter a product, and which of their axes is the output?

Modules store their weights in different orders: a linear layer [out, in], a transposed convolution [in, out / groups,
...], a stack of experts [experts, out, in] or [experts, in, out]. ``Axes`` says which, and shows any of them as
(stack..., output, input, rest...), as a view. ``weights_of`` says it of every parameter of a model, with all its names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


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
    layer_of = _parametrized(model)
    found: dict[int, list[Weight]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}" if path else attribute
                layer = layer_of.get(id(module), (module, "", ""))
                found.setdefault(id(parameter), []).append(_weight(name, parameter, module, attribute, *layer))
    return {uses[0].name: _joined(uses) for uses in found.values()}


def last_of(weights: Mapping[str, Weight]) -> Weight | None:
    """Return the matrix that comes last in the model, which mostly gives its outputs; None where there is none."""
    order = {name: at for at, name in enumerate(name for weight in weights.values() for name in weight.names)}
    matrices = [weight for weight in weights.values() if weight.axes is not None]
    return max(matrices, key=lambda weight: max(order[name] for name in weight.names), default=None)


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

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
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
# What a parameter is called that is added, looked up or exponentiated, but no matrix of a product.
_NO_MATRIX = re.compile(
    r"(^|_)(embed(ding)?s?|tokens?|pos|positions?|positional|log|scales?|gamma|latents?|prompts?|codebook|table)(_|$)"
)


def _layer_axes(module: nn.Module, attribute: str) -> tuple[Axes, str] | None:
    """The axes of a known layer's weight, and why its rows are no units; None for all else."""
    if isinstance(module, _OUTPUT_FIRST) and attribute == "weight":
        return Axes(), ""
    if isinstance(module, _TRANSPOSED) and attribute == "weight":
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
    parameter = module._parameters.get(attribute)
    if stacked and "bias" not in attribute and parameter is not None and parameter.dim() == 3:
        return (Axes(2, 1, (0,)) if stacked[0] else Axes(1, 2, (0,))), ""
    return None


def _unlike(module: nn.Module, attribute: str, shape: torch.Size) -> str:
    """Why a parameter of a module whose kind is not known is taken for no weight."""
    kind, name = type(module).__name__, attribute.lower()
    if "bias" in name:
        return "is a bias"
    if "Norm" in kind and not any(module.children()):
        return f"belongs to a {kind}"
    if "proj" not in name and "weight" not in name and (_NO_MATRIX.search(name) or "Embed" in kind):
        return f"is no matrix of a product, by the name {attribute!r} in a {kind}"
    if "Embed" in kind and attribute == "weight":
        return f"belongs to a {kind}"
    if attribute != "weight" and sum(size > 1 for size in shape) <= 1:
        return f"is a vector in the shape {tuple(shape)}"
    if attribute != "weight" and len(shape) > 2 and shape[0] == 1:
        return f"is broadcast over its first axis, in the shape {tuple(shape)}"
    return ""


def _weight(
    name: str,
    parameter: nn.Parameter,
    owner: nn.Module,
    attribute: str,
    layer: nn.Module,
    tensor: str,
    parametrization: str,
) -> Weight:
    """What one use of a parameter makes of it; `tensor` and `parametrization` are empty where it is a plain one."""
    direction = None
    refused = ""
    if tensor:  # in a list of parametrizations, or in one of them
        at, attribute = attribute, tensor
        if parametrization == "part":
            return Weight(name, (name,), parameter, layer, tensor, None, reason=f"shapes {tensor!r} of its layer")
        if parametrization == "weight_norm":
            if at == "original0":
                return Weight(name, (name,), parameter, layer, tensor, None, reason="is the gain of a weight_norm")
            dim = owner[0].dim  # type: ignore[index]
            direction = _other_axes(parameter, dim)
        elif parametrization:
            refused = parametrization
    else:
        attribute, direction, gain = _hooked(owner, attribute, parameter)
        if gain:
            return Weight(name, (name,), parameter, layer, attribute, None, reason="is the gain of a weight_norm")
    use = Weight(name, (name,), parameter, layer, attribute, None, refused=refused, direction=direction)
    if not isinstance(parameter, nn.UninitializedParameter):
        if not (parameter.is_floating_point() or parameter.is_complex()):
            return use._replace(reason=f"is {parameter.dtype}")
        if parameter.dim() < 2:
            return use._replace(reason=f"has {parameter.dim()} dimension{'' if parameter.dim() else 's'}")
    if isinstance(layer, _EMBEDDINGS):
        return use._replace(reason="is an embedding's")
    if isinstance(layer, _NORMS):
        return use._replace(reason="is a normalisation's")
    known = _layer_axes(layer, attribute)
    if known is not None:
        return use._replace(axes=known[0], packed=known[1])
    if isinstance(parameter, nn.UninitializedParameter):
        return use._replace(reason="has no shape yet")
    reason = _unlike(layer, attribute, parameter.shape)
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


def _parametrized(model: nn.Module) -> dict[int, tuple[nn.Module, str, str]]:
    """Of each list of parametrizations, and of what is in it: the layer, the tensor's name, and what it does to it."""
    found: dict[int, tuple[nn.Module, str, str]] = {}
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor, steps in module.parametrizations.items():  # type: ignore[operator, union-attr]
            found |= {id(part): (module, tensor, "part") for part in steps.modules() if part is not steps}
            kinds = [type(step) for step in steps]
            if kinds == [parametrizations._WeightNorm]:
                effect = "weight_norm"
            elif all(kind is parametrizations._SpectralNorm for kind in kinds):
                effect = ""  # a multiple of the original: its zeros are the layer's
            else:
                effect = (
                    f"the layer computes its {tensor} from it by the parametrization "
                    f"{', '.join(kind.__name__.lstrip('_') for kind in kinds)}, so zeros here are no zeros there; call "
                    f'torch.nn.utils.parametrize.remove_parametrizations(layer, "{tensor}") first, or exclude it'
                )
            found[id(steps)] = (module, tensor, effect)
    return found


def _hooked(module: nn.Module, attribute: str, parameter: nn.Parameter) -> tuple[str, tuple[int, ...] | None, bool]:
    """The layer's name of a tensor that a hook of torch.nn.utils renamed, its norm's axes, whether it is a gain."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and attribute in (f"{hook.name}_g", f"{hook.name}_v"):
            return hook.name, _other_axes(parameter, hook.dim), attribute.endswith("_g")
        if isinstance(hook, SpectralNorm) and attribute == f"{hook.name}_orig":
            return hook.name, None, False
        if isinstance(hook, BasePruningMethod) and attribute == f"{hook._tensor_name}_orig":
            return hook._tensor_name, None, False
    return attribute, None, False


def _other_axes(parameter: Tensor, dim: int | None) -> tuple[int, ...]:
    """The axes over which weight_norm takes its norm, given the one that numbers the norms (-1: one norm of all)."""
    return tuple(axis for axis in range(parameter.dim()) if axis != dim)


# ---------------------------------------------------------------------------------------------- kinds that are lost


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

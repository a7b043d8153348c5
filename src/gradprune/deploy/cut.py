"""How does a layer lose channels, and its attributes stay true (chapter 8)?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from gradprune.core.units import Part, is_transposed_linear, width

# Whole numbers (or tuples of them) by which a layer says how wide it is.
WIDTHS = frozenset({
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels",
    "num_parameters", "embedding_dim", "normalized_shape", "nf", "nx", "num_heads", "num_attention_heads", "n_head",
    "n_heads", "num_key_value_heads", "num_kv_heads", "n_kv_heads", "embed_dim", "all_head_size", "split_size",
    "inner_dim",
})  # fmt: skip


class Undo:
    """What modules were before they were cut; the tensors of before are kept, not copied, as a cut makes new ones."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in modules]

    def __call__(self) -> None:
        """Put everything back."""
        for module, attributes, parameters, buffers in self._before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


def cut_(part: Part, gone: Iterable[int]) -> None:
    """Take channels out of one side of a layer, with everything that belongs to them."""
    module: Any = part.module
    size, without = width(part), set(gone)
    keep = torch.tensor([c for c in range(size) if c not in without])
    if part.side == "parameter":
        _select_(module, part.attribute, part.dim, keep)
    elif isinstance(module, _ConvNd):
        _cut_convolution_(module, part.side, keep)
    elif isinstance(module, nn.Linear):
        _select_(module, "weight", 0 if part.side == "out" else 1, keep)
        if part.side == "out":
            _select_(module, "bias", 0, keep)
        setattr(module, "out_features" if part.side == "out" else "in_features", len(keep))
    elif is_transposed_linear(module):
        _select_(module, "weight", 1 if part.side == "out" else 0, keep)
        if part.side == "out":
            _select_(module, "bias", 0, keep)
        setattr(module, "nf" if part.side == "out" else "nx", len(keep))
    elif isinstance(module, nn.Embedding):
        _select_(module, "weight", 1, keep)
        module.embedding_dim = len(keep)
    elif isinstance(module, nn.PReLU):
        _select_(module, "weight", 0, keep)
        module.num_parameters = len(keep)
    else:  # a batch or instance norm
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            _select_(module, attribute, 0, keep)
        module.num_features = len(keep)


def rows(part: Part, channels: Iterable[int]) -> Tensor:
    """The weights that write these channels of a layer, one row a channel."""
    module: Any = part.module
    weight: Tensor = module.weight.detach()
    if isinstance(module, _ConvTransposeNd):  # [in, out / groups, ...]
        each = module.out_channels // module.groups
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
        assert len(weight) == each * module.groups
    elif is_transposed_linear(module):
        weight = weight.T
    return weight[list(channels)].flatten(1)


def columns(part: Part, channels: Iterable[int]) -> Tensor:
    """The weights that read these channels of a layer: (channels, outputs, positions of the kernel)."""
    module: Any = part.module
    weight: Tensor = module.weight.detach()
    wanted = list(channels)
    if isinstance(module, nn.Linear):
        return weight[:, wanted].T.unsqueeze(2)
    if is_transposed_linear(module):
        return weight[wanted].unsqueeze(2)
    weight = weight.flatten(2)
    groups, outputs, each = module.groups, module.out_channels, module.in_channels // module.groups
    found = weight.new_zeros(len(wanted), outputs, weight.shape[2])
    for i, c in enumerate(wanted):
        group, inside = divmod(c, each)
        of_group = slice(group * outputs // groups, (group + 1) * outputs // groups)
        found[i, of_group] = weight[c] if isinstance(module, _ConvTransposeNd) else weight[of_group, inside]
    return found


def replace_(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Put another tensor in the place of a parameter or buffer, which keeps what it was otherwise."""
    if attribute in module._buffers:
        module._buffers[attribute] = tensor
        return
    old = module._parameters[attribute]
    assert old is not None
    module._parameters[attribute] = nn.Parameter(tensor, requires_grad=old.requires_grad)


def _select_(module: nn.Module, attribute: str, dim: int, keep: Tensor) -> None:
    held = getattr(module, attribute, None)
    if held is not None:
        replace_(module, attribute, held.detach().index_select(dim, keep.to(held.device)).contiguous())


def _cut_convolution_(module: Any, side: str, keep: Tensor) -> None:
    groups, transposed = module.groups, isinstance(module, _ConvTransposeNd)
    if side == "both":  # one filter a channel, in a weight of [channels, 1, ...] either way
        _select_(module, "weight", 0, keep)
        _select_(module, "bias", 0, keep)
        module.in_channels = module.out_channels = module.groups = len(keep)
        return
    size = module.out_channels if side == "out" else module.in_channels
    stored = (side == "out") != transposed  # whether these channels are the weight's first axis, over all groups
    if groups == 1 or stored:
        _select_(module, "weight", 0 if stored else 1, keep)
    else:
        weight, each = module.weight.detach(), size // groups
        inside = keep.view(groups, -1) - each * torch.arange(groups).unsqueeze(1)
        parts = [
            part.index_select(1, of_group.to(weight.device))
            for part, of_group in zip(weight.chunk(groups), inside, strict=True)
        ]
        replace_(module, "weight", torch.cat(parts))
    if side == "out":
        _select_(module, "bias", 0, keep)
    setattr(module, "out_channels" if side == "out" else "in_channels", len(keep))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises each channel by statistics over a batch."""
    return isinstance(module, _BatchNorm)

"""How do masks come from ``torch.nn.utils.prune``, and how do they go there?

Torch keeps ``weight_orig`` (a parameter) and ``weight_mask`` (a buffer) in a module, and computes ``weight`` before
each forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from gradprune.core.checks import module, require_writable


class Pruned(NamedTuple):
    """A parameter that torch prunes: the module that owns it, its name there, and its mask."""

    owner: nn.Module
    attribute: str
    mask: Tensor


def pruned_by_torch(model: nn.Module) -> dict[str, Pruned]:
    """Return what torch prunes, by the names from before it did; a module that is used twice counts once.

    Raises ValueError where there is none, and where tied parameters have masks that differ.
    """
    found: dict[str, Pruned] = {}
    names: dict[nn.Parameter, str] = {}
    for path, owner in module(model).named_modules():
        for buffer, mask in owner.named_buffers(recurse=False):
            attribute = buffer.removesuffix("_mask")
            original = owner._parameters.get(f"{attribute}_orig")
            if attribute == buffer or original is None:
                continue
            name = f"{path}.{attribute}" if path else attribute
            other = names.setdefault(original, name)
            if other != name and not torch.equal(found[other].mask, mask.bool()):
                raise ValueError(f"{other!r} and {name!r} are one parameter, and torch prunes it by masks that differ")
            found[name] = Pruned(owner, attribute, mask.bool())
    if not found:
        raise ValueError("no parameter of this model is pruned by torch.nn.utils.prune")
    return found


def once(found: Mapping[str, Pruned]) -> dict[str, Tensor]:
    """The masks, a tied parameter's under its first name."""
    masks: dict[nn.Parameter, tuple[str, Tensor]] = {}
    for name, (owner, attribute, mask) in found.items():
        masks.setdefault(owner._parameters[f"{attribute}_orig"], (name, mask))  # type: ignore[arg-type]
    return dict(masks.values())


def make_plain_(found: Mapping[str, Pruned]) -> None:
    """Undo torch's reparametrization: the parameters get their names back, with zeros in them."""
    for name, (owner, attribute, mask) in found.items():
        original = owner.get_parameter(f"{attribute}_orig")
        require_writable(name, original)
        if mask.shape != original.shape:
            raise ValueError(f"torch's mask of {name!r} has shape {tuple(mask.shape)}, not {tuple(original.shape)}")
        hooks = owner._forward_pre_hooks.values()
        if not any(isinstance(h, prune.BasePruningMethod) and h._tensor_name == attribute for h in hooks):
            raise ValueError(f"{name!r} has a mask of torch.nn.utils.prune, but not the hook that applies it")
    for owner, attribute, _ in found.values():
        prune.remove(owner, attribute)


def prune_by_torch_(model: nn.Module, masks: Mapping[nn.Parameter, Tensor]) -> None:
    """Hand the masks to torch, for each place of a parameter in the model: a tied one has several."""
    places = [
        (owner, attribute, masks[parameter])
        for owner in model.modules()
        for attribute, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in masks
    ]
    for owner, attribute, mask in places:
        prune.custom_from_mask(owner, attribute, mask)

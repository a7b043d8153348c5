"""Which parameter of a model does a mask's name mean?

The one of that name; else the one whose name is the same but for what a wrapper adds: DistributedDataParallel,
DataParallel and AveragedModel put ``module.`` before the names, torch.compile ``_orig_mod.``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import dropwhile

import torch
from torch import Tensor, nn

from gradprune.core.checks import module, require_readable


def parameters_of(
    model: nn.Module, masks: Mapping[str, Tensor], held: Callable[[Tensor], Tensor] = lambda parameter: parameter
) -> dict[str, nn.Parameter]:
    """Return the model's parameters by the masks' names, readable and of the masks' shapes.

    `held` returns what this process has of a tensor. Raises ValueError where a name means none or several, a shape
    differs, or one parameter has two masks.
    """
    every = dict(module(model).named_parameters(remove_duplicate=False))
    found: dict[str, nn.Parameter] = {}
    first_name: dict[nn.Parameter, str] = {}
    bare: dict[tuple[str, ...], list[str]] = {}
    if any(name not in every for name in masks):
        for name in every:
            bare.setdefault(_bare(name), []).append(name)
    for name, mask in masks.items():
        parameter = every[_own_name(name, every, bare)]
        require_readable(name, held(parameter))
        if parameter.shape != mask.shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter has shape {tuple(parameter.shape)}"
            )
        other = first_name.setdefault(parameter, name)
        if other != name and not torch.equal(held(mask), held(masks[other]).to(mask.device)):
            raise ValueError(f"{other!r} and {name!r} are one parameter of this model, and their masks differ")
        found[name] = parameter
    return found


def some(names: Collection[str], most: int = 5) -> str:
    """The first names, as an error shows them."""
    shown = ", ".join(map(repr, list(names)[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"


def _own_name(name: str, every: Mapping[str, nn.Parameter], bare: Mapping[tuple[str, ...], list[str]]) -> str:
    if name in every:
        return name
    meant = bare.get(_bare(name), [])
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(f"the model has no parameter {name!r}; it may be any of {', '.join(map(repr, meant))}")
    hint = ""
    if f"{name}_orig" in every:
        hint = ", and this one is pruned by torch.nn.utils.prune: take its masks over by Masks.from_torch_(model)"
    elif name.removesuffix("_orig") in every:
        hint = (
            f"; {name.removesuffix('_orig')!r} is what torch.nn.utils.prune calls so while it prunes: rename the mask"
        )
    raise ValueError(f"the model has no parameter {name!r}; it has {some(every)}{hint}")


def _bare(name: str) -> tuple[str, ...]:
    parts = [part for part in name.split(".") if part != "_orig_mod"]  # a part of a model may be compiled too
    return tuple(dropwhile(lambda part: part == "module", parts))

"""By which words does a file know a call again: the model's weights, a score, a setting?"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradprune.core.checks import require

_SAMPLED = 2**14  # entries of a weight that tell it from another's
_LONGEST = 60  # characters of an argument; of a longer one its digest is told
_ADDRESS = " at 0x"  # in how Python writes what has no name


def digest(model: nn.Module) -> int:
    """Return a number that tells these weights from those of another training, by a sample of each."""
    found = 0
    for name, tensor in model.state_dict().items():
        if is_lazy(tensor):  # what is to prune it says so
            continue
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta:
            flat = tensor.detach().flatten() if not tensor.is_contiguous() else tensor.detach().view(-1)
            some = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
            found = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), zlib.crc32(name.encode(), found))
    return found


def name_of(value: Any) -> str:
    """What a setting or a choice is called: itself, its name, a partial's with its arguments, or as it is written."""
    if isinstance(value, functools.partial):
        return told(value)
    return value if isinstance(value, str) else getattr(value, "__name__", None) or repr(value)


def score_of(score: Callable[..., Any]) -> str:
    """What a file calls a score; ValueError where that would be said of others too.

    A function goes by its name and the numbers and words that it encloses; a partial by its function and arguments, of
    which what is no number, word, tensor, array, function or collection of these goes by its type alone.
    """
    name = name_of(score)
    require(
        "<lambda>" not in name and _ADDRESS not in name,
        f"a file knows its score by the name, and {name} tells too little: give a function that is defined by def, or "
        "a functools.partial of one",
    )
    enclosed = {n: cell for n, cell in _enclosed(score).items() if isinstance(cell, int | float | str)}
    return name + (f" with {enclosed}" if enclosed else "")


def told(value: Any) -> str:
    """Return words that are the same for the same value in every process: plain values whole, tensors by a digest."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        array = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}#{zlib.crc32(array.tobytes()):08x}"
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype}{value.shape}#{zlib.crc32(value.tobytes()):08x}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}#{digest(value):08x}"
    if isinstance(value, functools.partial):
        arguments = [*map(_short, value.args), *(f"{name}={_short(given)}" for name, given in value.keywords.items())]
        return f"{told(value.func)}({', '.join(arguments)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{told(key)}: {told(of)}" for key, of in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(told, value))})"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}({', '.join(sorted(map(told, value)))})"
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    written = repr(value)
    return type(value).__name__ if _ADDRESS in written else written


def _short(value: Any) -> str:
    words = told(value)
    return words if len(words) <= _LONGEST else f"{type(value).__name__}#{zlib.crc32(words.encode()):08x}"


def _enclosed(function: Any) -> dict[str, Any]:
    """What a function has taken along from where it was defined."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not set yet
            continue
    return found

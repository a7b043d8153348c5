"""How are masks kept at one bit a weight, in a state and in a file?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradprune.core import files
from gradprune.core.checks import state, whole

_PICKLED = "; a saved state_dict() of masks is read by Masks.from_state_dict(torch.load(path, weights_only=True))"
_FILE = files.Kind("gradprune.masks", "file of masks", "masks saved by Masks.save", _PICKLED)


def packed(masks: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Return name -> {"bits": uint8 tensor on the CPU, "shape": tuple of int}."""
    return {name: {"bits": _pack(mask), "shape": tuple(mask.shape)} for name, mask in masks.items()}


def unpacked(entries: Any) -> dict[str, Tensor]:
    """Return the masks that ``packed`` made its entries of, or raise TypeError or ValueError."""
    return {name: _unpack(name, entry) for name, entry in state(entries, {}, "Masks").items()}


def write(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write the masks to a file, whole or not at all."""
    entries = packed(masks)
    shapes = {name: entry["shape"] for name, entry in entries.items()}
    files.write(path, _FILE, shapes, {name: entry["bits"] for name, entry in entries.items()})


def read(path: Path) -> dict[str, Tensor]:
    """Return the masks of a file, or raise ValueError where it holds none."""
    shapes, bits = files.read(path, _FILE)
    if not isinstance(shapes, dict) or not shapes.keys() <= bits.keys():
        raise ValueError(f"{path.name!r} is no {_FILE.name}: it lacks tensors that it names")
    return unpacked({name: {"bits": bits[name], "shape": shape} for name, shape in shapes.items()})


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def _unpack(name: str, entry: Any) -> Tensor:
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"the state of the mask of {name!r} must be a dict of bits and shape, got {type(entry).__name__}"
        )
    entry = state(entry, {"bits": Tensor, "shape": (tuple, list)}, "Masks")
    shape = tuple(whole(f"the shape of the mask of {name!r}", size, least=0) for size in entry["shape"])
    bits, count = entry["bits"], math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != -(-count // 8):
        raise ValueError(f"the mask of {name!r} needs {-(-count // 8)} bytes for shape {shape}, got {bits.numel()}")
    flat = np.unpackbits(bits.detach().cpu().numpy().reshape(-1), count=count).view(np.bool_)
    return torch.from_numpy(flat).view(shape)

"""How is a checkpoint with zeros stored without them, and read again bit for bit (chapter 8)?

A packed file is a safetensors file too. A tensor ``w`` in it that was worth it is two: ``w:bits``, one bit an entry
(the first entry is the highest bit of the first byte, as ``numpy.packbits`` has it), and ``w:values``, the entries
whose bit is 1, in their own dtype and order. A bit is 0 where all bits of the entry are: so -0.0 and NaN are values,
and nothing is lost. Tensors that would not become smaller stand as they are. The metadata is kept, and under
``gradprune.pack`` stands in JSON the version of this format and the header of the file from before, from which that is
made again, byte for byte.

With a code (`coded`), version 2, the tensor ``w`` is ``w:coded``; what is told of it stands in the metadata too, where
the header from before is deflated. Such a tensor is coded and decoded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from gradprune.core.checks import require, require_values

Array = np.ndarray[Any, np.dtype[Any]]
Seen = Callable[[int], None]

KEY, VERSIONS = "gradprune.pack", (1, 2)
BITS, VALUES, CODED = ":bits", ":values", ":coded"
STEP = 2**18  # entries at a time, a multiple of eight


def units(raw: Array, size: int) -> Array:
    """Return the entries' bits, as integers of `size` bytes."""
    return raw.view(f"u{size}")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict.

    Raises ValueError where something in it is no tensor, TypeError where a tensor has no values.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        require(isinstance(tensor, Tensor), f"{name!r} in the model's state is no tensor: its module has extra state")
        require_values(name, tensor)
    return state

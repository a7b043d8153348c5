"""How many bytes does a tensor with zeros take, where its zeros are not stored?"""

from __future__ import annotations

from torch import Tensor


def bitmask_bytes(tensor: Tensor, nonzeros: int) -> int:
    """Return the bytes of one bit an entry and the nonzeros; of one dimension, the dense bytes."""
    if tensor.dim() < 2:
        return tensor.numel() * tensor.element_size()
    return -(-tensor.numel() // 8) + nonzeros * tensor.element_size()

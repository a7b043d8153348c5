"""How does a linear layer multiply by a weight whose zeros are not stored (chapter 8)?

Rows or blocks of rows with the places of what is in them (CSR, BSR), multiplied by torch's own kernels in one of two
ways: ``x @ W.T`` as it stands, or ``(W @ x.T).T``; which is faster depends on the batch. Where places fit in 32 bits
they are kept so, which halves their bytes and spares the kernels a conversion.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

BLOCKS = (32, 16, 8, 4)
SCATTERED = 1.5  # times the values of CSR: with more, zeros do not come in blocks


class SparseLinear(nn.Module):
    """A linear layer that stores its weight by rows or blocks; it cannot be trained.

    Args:
        weight: the weight, dense, [out, in].
        bias: its bias, or None.
        block: the side of a block; 1 stores single weights (CSR).
        columns: whether to multiply from the left, ``(W @ x.T).T``.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, block: int = 1, columns: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.block, self.columns = block, columns
        with torch.no_grad(), _without_beta_warning():
            dense = weight.detach()
            held = dense.to_sparse_csr() if block == 1 else dense.to_sparse_bsr((block, block))
        small = max(held.values().numel(), *weight.shape) < 2**31
        index = torch.int32 if small and weight.device.type == "cpu" else torch.int64
        self.register_buffer("crow", held.crow_indices().to(index))
        self.register_buffer("col", held.col_indices().to(index))
        self.register_buffer("values", held.values())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._made: tuple[Any, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """Return the weight as torch's sparse tensor, on the same memory."""
        key = tuple((t.data_ptr(), t.dtype, t.device) for t in (self.crow, self.col, self.values))
        if self._made is None or self._made[0] != key:
            make = torch.sparse_csr_tensor if self.block == 1 else torch.sparse_bsr_tensor
            size = (self.out_features, self.in_features)
            with _without_beta_warning():
                self._made = key, make(self.crow, self.col, self.values, size, check_invariants=False)
        return self._made[1]

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        if self.training:
            raise RuntimeError(
                "a layer that gp.compress stored sparse cannot be trained: call eval(), or train the network that "
                "gp.compress was given and compress it again"
            )
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)  # type: ignore[no-any-return]
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Multiply, without a gradient."""
        weight, bias = self.weight, self.bias
        if not self.columns:
            return nn.functional.linear(x, weight, bias).contiguous()
        flat = x.reshape(-1, self.in_features).t()
        found = weight @ flat if bias is None else torch.addmm(bias.unsqueeze(1), weight, flat)
        return found.t().contiguous().view(*x.shape[:-1], self.out_features)

    @property
    def nbytes(self) -> int:
        """How many bytes the weight takes."""
        return sum(t.numel() * t.element_size() for t in (self.crow, self.col, self.values))

    def extra_repr(self) -> str:
        """What stands between the parentheses when it is printed."""
        store = "CSR" if self.block == 1 else f"BSR {self.block} x {self.block}"
        share = self.values.numel() / max(self.out_features * self.in_features, 1)
        stored = f"{store}, {share:.1%} of the weights stored"
        return f"in_features={self.in_features}, out_features={self.out_features}, {stored}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # torch cannot copy it


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor, layer: SparseLinear) -> Tensor:
        return layer.product(x)

    @staticmethod
    def backward(_: Any, *__: Tensor) -> Any:
        raise RuntimeError(
            "no gradient passes through a layer that gp.compress stored sparse: use the network that it was given"
        )


def blocks_of(weight: Tensor) -> int:
    """Return the side of the largest square blocks in which the zeros of a weight come; 1 where they come singly."""
    alive = weight != 0
    single = int(alive.sum())
    for side in BLOCKS:
        rows, columns = weight.shape
        if rows % side or columns % side:
            continue
        tiles = alive.view(rows // side, side, columns // side, side).any(3).any(1)
        if int(tiles.sum()) * side * side <= SCATTERED * single:
            return side
    return 1


def two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four consecutive weights of a row are not zero."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).view(weight.shape[0], -1, 4).sum(2) <= 2).all())


def why_not_two_of_four(weight: Tensor) -> str:
    """Return why a weight cannot be stored 2:4 for the sparse tensor cores; nothing where it can."""
    rows, columns = weight.shape
    if weight.device.type != "cuda":
        return "2:4 needs a CUDA device"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 needs float16 or bfloat16, not {weight.dtype}"
    if rows % 32 or columns % 64:
        return f"2:4 needs multiples of 32 x 64, not {rows} x {columns}"
    if not two_of_four(weight):
        return "more than two of four weights are not zero"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "2:4 needs compute capability 8.0"
    return ""


class _without_beta_warning(warnings.catch_warnings):
    """torch says once that sparse CSR is in beta; what is used of it here is tested."""

    def __enter__(self) -> Any:
        found = super().__enter__()
        warnings.filterwarnings("ignore", message="Sparse (CSR|BSR) tensor support is in beta")
        return found

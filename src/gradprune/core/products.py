"""What does each weight multiply, whatever kind of layer holds it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gradprune.core.owners import Owners, aten

# Where the two operands of a product stand among the operator's arguments.
_PRODUCTS = {
    aten.mm: 0, aten.bmm: 0, aten.mv: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1, aten.baddbmm_: 1,
    aten.addmv: 1, aten._addmm_activation: 1,
}  # fmt: skip


class Products(Owners):
    """Sees every product of a weight while the model runs: its matrix products and its convolutions."""

    def multiplied(self, owner: nn.Module, x: Tensor, weight: Tensor) -> None:
        """Called where x (..., samples, inputs) multiplies a weight (..., inputs, outputs), or a part or copy of it."""

    def convolved(self, owner: nn.Module, x: Tensor, weight: Tensor, options: tuple[Any, ...]) -> None:
        """Called where x is convolved with a weight; `options` are the further arguments of aten.convolution."""

    def ran(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Tell the operators apart."""
        if operator in _PRODUCTS:
            start = _PRODUCTS[operator]
            left, right = args[start : start + 2]
            right = right.unsqueeze(-1) if right.dim() == 1 else right
            self._product(left, right)
        elif operator is aten.convolution:
            owner, weight = self.weight_among((args[1],))
            if weight is not None:
                self.convolved(owner, args[0], weight, args[3:])
        elif str(operator).endswith("grouped_mm") and len(args) >= 2:
            offs = args[2] if len(args) > 2 else kwargs.get("offs")
            self._groups(args[0], args[1], offs)

    def _product(self, left: Tensor, right: Tensor) -> None:
        owner, weight = self.weight_among((left, right))
        if weight is right:
            self.multiplied(owner, left, right)
        elif weight is left:
            self.multiplied(owner, right.transpose(-1, -2), left.transpose(-1, -2))

    def _groups(self, left: Tensor, right: Tensor, offs: Tensor | None) -> None:
        if offs is None:
            self._product(left, right)
            return
        cuts = offs.cpu().long()
        if right.dim() == 3:
            for rows, matrix in zip(left.tensor_split(cuts), right, strict=False):
                self._product(rows, matrix)
        elif left.dim() == 3:
            for matrix, columns in zip(left, right.tensor_split(cuts, dim=1), strict=False):
                self._product(matrix, columns)

"""What does a plan say: which sparsity for which layer, at which cost (chapter 6)?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from gradprune.core.tables import Table
from gradprune.recovery.prices import Cost
from gradprune.weights.granularity import Granularity
from gradprune.weights.mask import Masks
from gradprune.weights.prune import prune
from gradprune.weights.request import Score
from gradprune.weights.score import magnitude

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIT = {"parameters": "parameters", "flops": "FLOPs", "bytes": "bytes", "latency": "seconds"}


@dataclass(frozen=True, eq=False)
class Plan(Table, Mapping[str, float]):
    """A sparsity for each layer, as ``prune(model, scope=plan)`` takes it, and what it is predicted to cost.

    Printed, it is a table.

    Args:
        sparsities: layer -> sparsity; the plan is a mapping of these.
        cost: which cost is bounded: ``"parameters"``, ``"flops"``, ``"bytes"`` or ``"latency"``.
        limit: what the whole network may cost.
        predicted: what it will cost, at most `limit`.
        dense: what it costs with all of these weights.
        loss: the predicted loss in what was evaluated, the sum over the layers; a sum is a guess, so evaluate what
            comes out.
        multiplier: the loss per cost saved of the last step: what a little more of the cost is worth.
        layers: one row a layer.
        granularity: what goes together; to be given to ``prune`` too where it is not ``"weight"``.
        score: what ranks the weights.
        eligible: which layers took part, as arguments of ``prune``.

    Chapter 6.
    """

    _named_by: ClassVar[str | None] = "layer"

    sparsities: dict[str, float]
    cost: Cost
    limit: float
    predicted: float
    dense: float
    loss: float
    multiplier: float
    layers: tuple[dict[str, Any], ...]
    granularity: Granularity = "weight"
    score: Score = magnitude
    eligible: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.sparsities[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sparsities)

    def __len__(self) -> int:
        return len(self.sparsities)

    def apply_(self, model: nn.Module, example: Any = None) -> Masks:
        """Prune a model by this plan: ``prune`` with its sparsities, score and granularity.

        Args:
            model: the network that was planned for; its weights are changed in place.
            example: its input, as for ``prune``, where the granularity is ``"group"``.

        Returns:
            The masks.

        Raises:
            TypeError: as ``prune``.
            ValueError: as ``prune``, before anything is changed.
        """
        as_planned = {"scope": self, "granularity": self.granularity, "example": example} | dict(self.eligible)
        return prune(model, self.score, **as_planned)

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a layer: its weights, how many stay, its cost before and after, its predicted loss."""
        return [dict(row) for row in self.layers]

    def __repr__(self) -> str:
        return (
            f"Plan({UNIT[self.cost]} {self.predicted:,.6g} of {self.dense:,.6g}, at most {self.limit:,.6g}; predicted "
            f"loss {self.loss:.4g}; {len(self)} layers)"
        )

    def plot(self) -> Figure:
        """Draw the sparsity of each layer. Needs matplotlib.

        Returns:
            The figure, which no window shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from gradprune.gradients.plotting import new_figure

        figure = new_figure(1.0 + 0.22 * max(len(self), 4))
        axes = figure.subplots()
        names = list(self)[::-1]
        axes.barh(names, [self[name] for name in names])
        axes.set(xlim=(0, 1), xlabel=f"sparsity, for at most {self.limit:,.4g} {UNIT[self.cost]}")
        axes.tick_params(axis="y", labelsize="small")
        return figure

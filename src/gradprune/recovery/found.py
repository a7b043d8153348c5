"""What has a search for the largest sparsity found (chapter 6)?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradprune.core.tables import Table
from gradprune.weights.mask import Masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Look:
    """One sparsity that was looked at.

    Args:
        sparsity: of the masks.
        value: what `evaluate` gave, in the mean.
        bound: the lower bound that had to reach the wanted value: of the value, or with `margin` of the value less the
            dense one; None without a confidence.
        passed: whether it did, or without a confidence the value.
        probe: whether it was looked at only to see whether the curve falls: it does not change the answer.

    Chapter 6.
    """

    sparsity: float
    value: float
    bound: float | None
    passed: bool
    probe: bool = False


@dataclass(frozen=True)
class Found(Table):
    """What ``largest_sparsity`` found.

    Args:
        sparsity: the largest that passed, that of `masks`.
        masks: those of ``prune`` at that sparsity; ``found.masks.apply_(model)`` prunes.
        curve: every look, by sparsity.
        evaluations: how often `evaluate` was called.
        dense: what it gave for the network as it was.
        wanted: what had to be reached: the value, or with `margin` how little may be lost, as a negative number.
        confidence: of the whole statement, or None.
        falls: whether no look passed above one that failed.
        state: with `train`, the state dict of the corrected network at that sparsity, else None.

    Chapter 6.
    """

    sparsity: float
    masks: Masks = field(hash=False)
    curve: tuple[Look, ...]
    evaluations: int
    dense: float
    wanted: float
    confidence: float | None
    falls: bool
    state: dict[str, Any] | None = field(default=None, hash=False, repr=False)

    def __repr__(self) -> str:
        sure = "" if self.confidence is None else f", with {100 * self.confidence:g} % confidence"
        rises = "" if self.falls else "; the curve rises again, see .curve"
        return f"Found(sparsity {self.sparsity:.4f}{sure}, {self.evaluations} evaluations{rises})"

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a look, by sparsity."""
        bounded = self.confidence is not None
        return [
            {"sparsity": look.sparsity, "value": look.value}
            | ({"lower bound": look.bound} if bounded else {})
            | {"passed": look.passed, "probe": look.probe}
            for look in self.curve
        ]

    def plot(self) -> Figure:
        """Draw what `evaluate` gave over sparsity: what passed, what did not, and the answer. Needs matplotlib.

        Returns:
            The figure, which no window shows.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from gradprune.gradients.plotting import new_figure

        figure = new_figure(3.2)
        axes = figure.subplots()
        axes.axhline(self.dense, linestyle=":", color="gray", label="dense")
        axes.plot([look.sparsity for look in self.curve], [look.value for look in self.curve], color="gray", lw=0.8)
        for passed, marker, label in ((True, "o", "passed"), (False, "x", "did not pass")):
            looks = [look for look in self.curve if look.passed == passed]
            axes.plot([k.sparsity for k in looks], [k.value for k in looks], marker, label=label)
        axes.axvline(self.sparsity, linestyle="--", color="black", lw=0.8, label=f"found: {self.sparsity:.4g}")
        axes.set(xlabel="sparsity", ylabel="what evaluate gave")
        axes.legend()
        return figure

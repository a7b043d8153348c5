"""What is one round of training and pruning about, and what came out of each (chapter 5)?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from gradprune.core.checks import require
from gradprune.core.steps import Optimizers
from gradprune.weights.hold import Hold
from gradprune.weights.mask import Masks

if TYPE_CHECKING:
    import matplotlib.figure


@dataclass(frozen=True)
class Round:
    """What one call of `train` is about.

    Args:
        number: 0 for the dense network, then 1, 2, ...
        steps: the steps of your training schedule to take; the learning rate and the batches may depend on them.
        masks: what is pruned.
        teacher: the dense network, or whatever was given as `teacher`; None without one, and in round 0.

    Chapter 5.
    """

    number: int
    steps: range
    masks: Masks = field(hash=False)
    teacher: nn.Module | None

    def hold(self, optimizer: Optimizers) -> Hold:
        """Keep what is pruned at zero while `optimizer` trains: ``masks.hold(optimizer)``.

        Args:
            optimizer: what trains the model, or a list of all that do.

        Returns:
            A handle with ``remove()``; `train` need not call it.
        """
        return self.masks.hold(optimizer)


@dataclass(frozen=True)
class Entry:
    """What came out of one round.

    Args:
        round: its number; 0 is the dense network.
        steps: the first step taken, and the one after the last.
        sparsity: the share of the masked weights that are pruned.
        pruned: what `evaluate` gave after pruning, by name; empty for round 0.
        corrected: what it gave after the training that followed.
        failed: whether `stop` ended the loop here: the network that came back is that of the round before.

    Chapter 5.
    """

    round: int
    steps: tuple[int, int]
    sparsity: float
    pruned: dict[str, float] = field(hash=False)
    corrected: dict[str, float] = field(hash=False)
    failed: bool = False


@dataclass
class History:
    """The rounds of one ``iterate``, and the masks of the network that came back.

    Args:
        entries: one a round, the dense one first; ``history[i]`` is one of them.
        masks: those of the last round that did not fail.

    Chapter 5.
    """

    entries: list[Entry]
    masks: Masks

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Entry:
        return self.entries[index]

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row a round, for a table or a DataFrame."""
        any_failed = any(e.failed for e in self.entries)
        return [
            {"round": e.round, "steps": e.steps[1] - e.steps[0], "sparsity": e.sparsity}
            | {f"{name} after pruning": value for name, value in e.pruned.items()}
            | {f"{name} after correction": value for name, value in e.corrected.items()}
            | ({"failed": e.failed} if any_failed else {})
            for e in self.entries
        ]

    def plot(self, metric: str | None = None) -> matplotlib.figure.Figure:
        """Draw a metric over sparsity: dense, after pruning, after correction. Needs matplotlib.

        Args:
            metric: a name that `evaluate` gave; the only one need not be named.

        Returns:
            The figure.

        Raises:
            ValueError: where nothing was evaluated, or the name is not among what was.
        """
        names = list(self.entries[0].corrected) if self.entries else []
        require(bool(names), "there is nothing to plot: give `evaluate` to iterate")
        metric = names[0] if metric is None and len(names) == 1 else metric
        require(metric in names, f"metric must be one of {names}, got {metric!r}")
        assert metric is not None
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        dense, later = self.entries[0], self.entries[1:]
        kept = [1 - e.sparsity for e in later]
        axes.axhline(dense.corrected[metric], linestyle=":", color="gray", label="dense")
        axes.plot(kept, [e.pruned[metric] for e in later], "v--", label="after pruning")
        axes.plot(kept, [e.corrected[metric] for e in later], "o-", label="after correction")
        failed = [e for e in later if e.failed]
        if failed:
            axes.plot([1 - e.sparsity for e in failed], [e.corrected[metric] for e in failed], "kx", label="failed")
        axes.set(xscale="log", xlabel="share of weights that stay", ylabel=metric)
        axes.invert_xaxis()
        axes.legend()
        return figure

"""Chapter 8's live figure: take weights or units away, and measure in the browser what that saves."""

from __future__ import annotations

import copy
from typing import Any

import traitlets
from torch import nn

import gradprune as gp
from gradprune.lab import figures, train
from gradprune.lab.live import perceptron
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Live, Still, pack_network, pack_split, unpack_network_


class Speed(Live):
    """A perceptron that reads digits, run in the browser with its zeros, without them, or without its idle units.

    `sparsity` (0 to 0.99) and `grain` ("weights" or "units", hidden ones) are what the reader sets, or a program; the
    times are measured where the page is read, when the reader asks for it, and nowhere else. `accuracy` is what the
    page read; `masks` are those of gradprune at that setting, which are the page's.

    Example: ``figure = lab.live.Speed()``, then in a later cell ``figure.masks``.
    """

    _esm = joined("speed.js")
    sparsity = traitlets.Float(0.9, min=0.0, max=0.99, help="the share that is gone").tag(sync=True)
    grain = traitlets.Enum(("weights", "units"), "weights", help="what goes").tag(sync=True)
    _network = traitlets.Dict().tag(sync=True)
    _test = traitlets.Dict().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        self._model = perceptron.trained()
        super().__init__(
            _network=pack_network(self._model, "relu"), _test=pack_split(perceptron.digits().test), **settings
        )

    @property
    def network(self) -> nn.Module:
        """The network that the page shows, before its weights are taken away: a copy."""
        return unpack_network_(copy.deepcopy(self._model), self._network["numbers"])

    @property
    def masks(self) -> gp.Masks:
        """The masks that the page shows, for `network` or any network of its form."""
        return _prune_(self.network, self.sparsity, self.grain)

    def still(self) -> Still:
        """Return what is counted at some sparsities: FLOPs and bytes by rows and with idle units removed."""
        levels = [0.0, 0.5, 0.8, 0.9, 0.95]
        rows: list[list[str]] = []
        curves: dict[str, list[float]] = {"by rows": [], "shrunk": []}
        for level in levels:
            model = self.network
            _prune_(model, level, self.grain)
            count = _counted(model)
            for name, values in curves.items():
                values.append(count[f"FLOPs, {name}"])
            accuracy = train.accuracy(model, perceptron.digits().test)
            rows.append([f"{level:.0%}", f"{accuracy:.3f}", *(f"{share:.2f}" for share in count.values())])
        drawing, axes = figures.new()
        at = [100 * level for level in levels]
        axes.plot(at, [1.0] * len(at), "o-", color=figures.COLOURS["pruned"], label="masked")
        axes.plot(at, curves["by rows"], "o-", color=figures.COLOURS["corrected"], label="by rows, without zeros")
        axes.plot(at, curves["shrunk"], "o-", color=figures.COLOURS["dense"], label="idle units removed")
        axes.set(xlabel="weights removed, %", ylabel="share of the dense FLOPs", ylim=(0, 1.1))
        axes.set_title("What counting promises")
        axes.legend()
        words = (
            f"A perceptron of {sum(w.numel() for w in self.network.parameters() if w.dim() > 1):,} weights. Where nine "
            f"tenths of them are zero, a masked network takes all FLOPs, one by rows {rows[3][2]} of them, and one "
            f"whose idle units are removed {rows[3][4]}. What that is worth in time is measured in the browser."
        )
        return Still(drawing, words, ["removed", "digits read", *_counted(self.network)], rows)


def _prune_(model: nn.Module, sparsity: float, grain: str) -> gp.Masks:
    if grain == "weights":
        return gp.prune(model, sparsity=sparsity, min_keep=1)
    most = 1 - 1 / perceptron.WIDTHS[1]  # one unit stays
    return gp.prune(model, sparsity=min(sparsity, most), granularity="channel", include="0.*", min_keep=1)


def _counted(model: nn.Module) -> dict[str, float]:
    """FLOPs and bytes as shares of the dense network's: by rows, and without the units that are idle."""
    first, last = (weight.detach() for weight in model.parameters() if weight.dim() > 1)
    busy = max(1, int(((first != 0).any(1) & (last != 0).any(0)).sum()))
    weights, biases = first.numel() + last.numel(), len(first) + len(last)
    left = int((first != 0).sum() + (last != 0).sum())
    small = busy * (first.shape[1] + len(last))
    numbers = weights + biases
    return {
        "FLOPs, by rows": left / weights,
        "bytes, by rows": (2 * left + biases + len(first) + len(last) + 2) / numbers,
        "FLOPs, shrunk": small / weights,
        "bytes, shrunk": (small + busy + len(last)) / numbers,
    }

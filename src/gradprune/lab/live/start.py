"""The start page's live figure: show a digit to a network, take its weights away, train what is left."""

from __future__ import annotations

from typing import Any

import torch
import traitlets

import gradprune as gp
from gradprune.lab import figures, train
from gradprune.lab.live import perceptron
from gradprune.lab.live.digits import Retrained
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Still

EPOCHS, BATCH = 5, 64  # of training again, and its optimizer: as start.js has them
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


class Start(Retrained):
    """A perceptron that reads the digit that the reader picks or draws, loses its smallest weights, and trains again.

    `sparsity` (0 to 0.99) is what the reader sets, or a program; `accuracy` is what the page read; `network` and
    `masks` are those of the page, or where no page is open the network before its weights are taken away, and
    gradprune's masks.

    Example: ``lab.live.Start(sparsity=0.9)``
    """

    _esm = joined("start.js")
    sparsity = traitlets.Float(0.0, min=0.0, max=0.99, help="the share of the weights that is gone").tag(sync=True)

    def still(self) -> Still:
        """Return the accuracy before and after training again."""
        data, levels = perceptron.digits(), [0.0, 0.5, 0.8, 0.9, 0.95]
        pairs = [_pruned_and_trained(level) for level in levels]
        drawing, axes = figures.new()
        percents = [100 * level for level in levels]
        for name, values in zip(("pruned", "corrected"), zip(*pairs, strict=True), strict=True):
            label = {"pruned": "weights removed", "corrected": "and trained again"}[name]
            axes.plot(percents, values, "o-", label=label, color=figures.COLOURS[name])
        axes.set(xlabel="weights removed, %", ylabel="test digits read correctly", title="A network that reads digits")
        axes.legend()
        (dense, _), (gone, back) = pairs[0], pairs[levels.index(0.9)]
        words = (
            f"A network of 3,552 weights reads {dense:.1%} of {len(data.test)} digits that it has not seen before. "
            f"Without nine tenths of its weights, the smallest, it reads {gone:.1%}; trained again it reads {back:.1%}."
        )
        rows = [[f"{level:.0%}", f"{a:.2f}", f"{b:.2f}"] for level, (a, b) in zip(levels, pairs, strict=True)]
        return Still(drawing, words, ["removed", "reads", "trained again"], rows)


def _pruned_and_trained(sparsity: float) -> tuple[float, float]:
    """Return the test accuracy of the network pruned, and pruned and trained again with its masks held."""
    model, data = perceptron.trained(), perceptron.digits()
    masks = gp.prune(model, sparsity=sparsity, min_keep=1)
    before = train.accuracy(model, data.test)
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    masks.hold(optimizer)
    steps = EPOCHS * -(-len(data.train) // BATCH)
    train.fit(model, data, steps=steps, optimizer=optimizer, batch_size=BATCH, watch=False)
    return before, train.accuracy(model, data.test)

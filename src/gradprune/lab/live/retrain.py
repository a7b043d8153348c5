"""Chapter 5's live figure: take weights away at once or in rounds, train what is left, and see which reads better."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import traitlets

import gradprune as gp
from gradprune.lab import figures, train
from gradprune.lab.live import perceptron
from gradprune.lab.live.digits import Retrained
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Still, pack_network

STEPS, BATCH, EARLY = 180, 64, 60  # of training again, about; and how early the weights are that it rewinds to
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9}


class Retrain(Retrained):
    """Two copies of a trained perceptron, one pruned at once, one in rounds, trained for as many steps in the page.

    `sparsity` (0.5 to 0.99), `rounds` (2 to 10) and `after` ("going on" or "rewinding") are what the reader sets, or a
    program; `accuracy` is what the page's second network last read; `network` and `masks` are that one's, or where no
    page is open the network that both start from, and the masks of one shot.

    Example: ``lab.live.Retrain(sparsity=0.98, rounds=10)``
    """

    _esm = joined("retrain.js")
    sparsity = traitlets.Float(0.95, min=0.5, max=0.99, help="the share of the weights gone in the end").tag(sync=True)
    rounds = traitlets.Int(5, min=2, max=10, help="how many the second network takes").tag(sync=True)
    after = traitlets.Enum(("going on", "rewinding"), "going on", help="what follows each pruning").tag(sync=True)
    _early = traitlets.Dict().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        super().__init__(_early=pack_network(perceptron.trained(steps=EARLY), "relu"), **settings)

    def still(self) -> Still:
        """Return the accuracies of one shot and of five rounds, at three sparsities, over ten orders of batches."""
        levels = (0.9, 0.95, 0.98)
        rows, means = [], {}
        for level in levels:
            once, many = comparison(level, 5, "going on")
            means[level] = float(np.mean(once)), float(np.mean(many))
            mean, low, high = train.interval([b - a for a, b in zip(once, many, strict=True)])
            rows.append([f"{level:.0%}", *(f"{value:.2f}" for value in means[level]), f"{mean:+.2f}"])
            rows[-1].append(f"{low:+.2f} to {high:+.2f}")
        drawing, axes = figures.new()
        for at, name, colour in ((0, "at once", "pruned"), (1, "in five rounds", "corrected")):
            values = [means[level][at] for level in levels]
            axes.plot([100 * level for level in levels], values, "o-", label=name, color=figures.COLOURS[colour])
        axes.set(xlabel="weights removed, %", ylabel="test digits read correctly", title="Pruned, then trained again")
        axes.legend()
        at_once, in_rounds = means[0.98]
        words = (
            f"Two copies of a network of 3,552 weights lose 98 % of them and train for about {STEPS} steps: pruned at "
            f"once it reads {at_once:.2f} of the test digits, in five rounds {in_rounds:.2f}, on average over ten "
            "orders of the batches."
        )
        return Still(drawing, words, ["removed", "at once", "in rounds", "difference", "95 % interval"], rows)


@lru_cache(maxsize=32)
def comparison(sparsity: float, rounds: int, after: str, orders: int = 10) -> tuple[list[float], list[float]]:
    """Return the test accuracies of one shot and of rounds, paired, one an order of the batches."""
    each = round(STEPS / rounds)
    once = [_run(sparsity, 1, rounds * each, after, order) for order in range(orders)]
    return once, [_run(sparsity, rounds, each, after, order) for order in range(orders)]


def _run(sparsity: float, rounds: int, each: int, after: str, order: int) -> float:
    """Return the test accuracy of a network pruned in rounds, each followed by `each` steps."""
    model, data = perceptron.trained(), perceptron.digits()
    for number in range(1, rounds + 1):
        masks = gp.prune(model, sparsity=1 - (1 - sparsity) ** (number / rounds), min_keep=1)  # equation 5.5
        if after == "rewinding":
            model.load_state_dict(perceptron.trained(steps=EARLY).state_dict())
            masks.apply_(model)
        optimizer = torch.optim.SGD(model.parameters(), **SGD)
        masks.hold(optimizer, model)
        seed = 100 * order + number
        train.fit(model, data, steps=each, optimizer=optimizer, batch_size=BATCH, seed=seed, watch=False)
    return train.accuracy(model, data.test)

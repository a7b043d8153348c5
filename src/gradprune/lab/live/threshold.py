"""Chapter 3's live figure: train with only the largest entries of each gradient; what becomes of the rest?"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import traitlets
from torch import nn

import gradprune as gp
from gradprune.lab import figures, train
from gradprune.lab.live import perceptron
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Live, Still, pack_network, pack_split

STEPS, BATCH, RATE = 270, 64, 0.3  # as threshold.js has them


class Threshold(Live):
    """One perceptron trained three times: by whole gradients, and by their largest entries, the rest lost or waiting.

    `density` (0.001 to 1), the share of the entries that is sent, is what the reader sets, or a program; `accuracy` is
    what the page's network with error feedback last read.

    Example: ``lab.live.Threshold(density=0.001)``
    """

    _esm = joined("threshold.js")
    density = traitlets.Float(0.01, min=0.001, max=1.0, help="the share of the entries that is sent").tag(sync=True)
    _network = traitlets.Dict().tag(sync=True)
    _train = traitlets.Dict().tag(sync=True)
    _test = traitlets.Dict().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        data = perceptron.digits()
        super().__init__(
            _network=pack_network(perceptron.untrained(), "relu"),
            _train=pack_split(data.train),
            _test=pack_split(data.test),
            **settings,
        )

    @property
    def network(self) -> nn.Module:
        """The network that all three start from: a copy."""
        return perceptron.untrained()

    def feedback(self, params: Any) -> gp.ErrorFeedback:
        """Return the error feedback of the setting, for a training of one's own."""
        return gp.ErrorFeedback(params, density=float(self.density))

    def still(self) -> Still:
        """Return the accuracies for three shares, with the rest lost and waiting, over five orders of batches."""
        levels = (0.001, 0.01, 0.1)
        rows, curves = [], {"lost": [], "waits": []}  # type: ignore[var-annotated]
        for level in levels:
            lost, waits = (comparison(level, kind) for kind in ("lost", "waits"))
            mean, low, high = train.interval([b - a for a, b in zip(lost, waits, strict=True)])
            curves["lost"].append(float(np.mean(lost)))
            curves["waits"].append(float(np.mean(waits)))
            rows.append([f"{level:.1%}", f"{np.mean(lost):.2f}", f"{np.mean(waits):.2f}", f"{mean:+.2f}"])
            rows[-1].append(f"{low:+.2f} to {high:+.2f}")
        drawing, axes = figures.new()
        for name, colour in (("lost", "pruned"), ("waits", "corrected")):
            axes.plot(levels, curves[name], "o-", label=f"the rest {name}".replace("lost", "is lost"))
            axes.lines[-1].set_color(figures.COLOURS[colour])
        axes.set(xscale="log", xlabel="share of the entries sent", ylabel="test digits read correctly", ylim=(0, 1))
        axes.set_title("The largest entries of each gradient, 270 steps")
        axes.legend()
        words = (
            f"A perceptron trained for {STEPS} steps by one in a hundred entries of each gradient reads "
            f"{curves['lost'][1]:.2f} of the test digits if the other entries are lost, {curves['waits'][1]:.2f} if "
            "they wait until their sum is large, on average over five orders of the batches."
        )
        return Still(drawing, words, ["sent", "rest lost", "rest waits", "difference", "95 % interval"], rows)


@lru_cache(maxsize=32)
def comparison(density: float, kind: str, orders: int = 5) -> list[float]:
    """Return the test accuracies with the rest "lost" or "waits", one an order of the batches."""
    return [_run(density, kind, order) for order in range(orders)]


def _run(density: float, kind: str, order: int) -> float:
    model, data = perceptron.untrained(), perceptron.digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    feedback = gp.ErrorFeedback(model, density=density) if kind == "waits" else None

    def send(step: int) -> None:
        if feedback is None:
            gp.keep_top_gradients_(model, density)
        else:
            feedback.step()

    train.fit(
        model, data, steps=STEPS, optimizer=optimizer, batch_size=BATCH, seed=order, watch=False, after_backward=send
    )
    return train.accuracy(model, data.test)

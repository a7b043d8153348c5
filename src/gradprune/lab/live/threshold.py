"""Chapter 3's live figure: train with only the largest entries of each gradient; what becomes of the rest?"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import traitlets
from torch import nn

import gradprune as gp
from gradprune.gradients.params import Params
from gradprune.lab import figures, train
from gradprune.lab.live import perceptron
from gradprune.lab.live.digits import Digits
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Still

STEPS, BATCH, RATE = 270, 64, 0.3  # as threshold.js has them


class Threshold(Digits):
    """One perceptron trained three times: by whole gradients, and by their largest entries, the rest lost or waiting.

    `density` (0.001 to 1), the share of the entries that is sent, is what the reader sets, or a program; `accuracy` is
    what the page's network with error feedback last read.

    Example: ``lab.live.Threshold(density=0.001)``
    """

    _esm = joined("threshold.js")
    density = traitlets.Float(0.01, min=0.001, max=1.0, help="the share of the entries that is sent").tag(sync=True)

    @property
    def network(self) -> nn.Sequential:
        """The network that all three start from: a copy."""
        return perceptron.untrained()

    def feedback(self, params: Params) -> gp.ErrorFeedback:
        """Return the error feedback of the setting, for a training of one's own."""
        return gp.ErrorFeedback(params, density=float(self.density))

    def still(self) -> Still:
        """Return the accuracies by share, with the rest lost and waiting, over five orders of the batches."""
        density = float(self.density)
        levels = sorted({0.001, 0.01, 0.1, 1.0, density})
        runs = {level: (comparison(level, "lost"), comparison(level, "waits")) for level in levels}
        means = {level: [float(np.mean(found)) for found in pair] for level, pair in runs.items()}
        rows = []
        for level, (lost, waits) in runs.items():
            mean, low, high = train.interval([b - a for a, b in zip(lost, waits, strict=True)])
            accuracies = [f"{accuracy:.3f}" for accuracy in means[level]]
            rows.append([f"{level:.1%}", *accuracies, f"{mean:+.2f}", f"{low:+.2f} to {high:+.2f}"])
        drawing, axes = figures.new()
        lines = zip(("the rest is lost", "the rest waits"), ("pruned", "corrected"), strict=True)
        for at, (name, colour) in enumerate(lines):
            axes.plot(levels, [means[level][at] for level in levels], "o-", label=name, color=figures.COLOURS[colour])
        axes.set(xscale="log", xlabel="share of the entries sent", ylabel="test digits read correctly", ylim=(0, 1))
        axes.set_title(f"The largest entries of each gradient, {STEPS} steps")
        axes.legend()
        lost_mean, waits_mean = means[density]
        words = (
            f"A perceptron trained for {STEPS} steps by the largest {density:.1%} of each gradient's entries reads "
            f"{lost_mean:.2f} of the test digits if the other entries are lost, {waits_mean:.2f} if they wait until "
            f"their sum is large, and {means[1.0][0]:.2f} if all are sent, on average over five orders of the batches."
        )
        return Still(drawing, words, ["sent", "rest lost", "rest waits", "difference", "95 % interval"], rows)


@lru_cache(maxsize=32)
def comparison(density: float, kind: str, orders: int = 5) -> list[float]:
    """Return the test accuracies with the rest "lost" or "waits", one an order of the batches.

    In double precision: in single, two processors' roundings choose other entries, which moves an accuracy by 0.02.
    """
    return [_run(density, kind, order) for order in range(orders)]


def _run(density: float, kind: str, order: int) -> float:
    model, digits = perceptron.untrained().double(), perceptron.digits()
    data = replace(digits, train=digits.train.double(), test=digits.test.double())
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

"""Chapter 9's live figure: four workers train one network; when may they choose masks?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import numpy as np
import traitlets
from torch import Tensor, nn

import gradprune as gp
from gradprune.lab import figures
from gradprune.lab.live import perceptron
from gradprune.lab.live.crew import AVERAGED, GROUPS, WORKERS, Crew, orders
from gradprune.lab.live.digits import Digits
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Still, unpack_masks

STEPS, LARGEST = 160, 0.01  # of training, about; and the share that is sent, where not all is


class Workers(Digits):
    """Four workers that train one perceptron in the page, each on a quarter of every batch, prune it and train on.

    `way` ("synchronous", "local", "pairs" or "asynchronous"), `period` (2 to 16 steps between averages), `age` (0 to 8
    steps, the staleness of an asynchronous gradient), `sent` ("all" or "largest"), `late` (the steps after an average
    at which they prune) and `decides` ("each" or "one") are what the reader sets, or a program, which may set
    `sparsity` too; `accuracy` is what the page's workers last read on average; `masks` are theirs, one a worker.

    Example: ``lab.live.Workers(late=7)``
    """

    _esm = joined("workers.js")
    way = traitlets.Enum(tuple(GROUPS), "local", help="what keeps the four together").tag(sync=True)
    period = traitlets.Int(8, min=2, max=16, help="steps between two averages").tag(sync=True)
    age = traitlets.Int(2, min=0, max=8, help="how many steps old an asynchronous gradient is").tag(sync=True)
    sent = traitlets.Enum(("all", "largest"), "all", help="which numbers they send").tag(sync=True)
    late = traitlets.Int(0, min=0, max=15, help="how many steps after an average they prune").tag(sync=True)
    decides = traitlets.Enum(("each", "one"), "each", help="who chooses the masks").tag(sync=True)
    sparsity = traitlets.Float(0.8, min=0.0, max=0.99, help="the share of the weights that goes").tag(sync=True)

    @property
    def network(self) -> nn.Sequential:
        """The network that all four start from: a copy."""
        return perceptron.untrained()

    @property
    def masks(self) -> list[gp.Masks]:
        """The masks of the page's workers, or where none are pruned those that gradprune's would have there."""
        shown = self._of_the_page("kept")
        if not shown:
            return self.pruned().masks
        like = gp.prune(self.network, sparsity=0.0)
        every = np.frombuffer(shown, dtype=np.uint8).reshape(WORKERS, -1)
        return [unpack_masks(like, kept.tobytes()) for kept in every]

    def pruned(self, order: int = 0) -> Crew:
        """Return gradprune's workers at these settings, just pruned; `order` is that of the batches."""
        density = 1.0 if self.sent == "all" else LARGEST
        late = self.late if self.way in AVERAGED else 0
        crew, _ = branched(self.way, period=self.period, age=self.age, density=density, late=late, order=order)
        crew.prune(self.sparsity, cast(Any, self.decides))
        return crew

    def still(self) -> Still:
        """Return what pruning late costs, each worker choosing for itself, over five orders of the batches."""
        rows = [[late, *map(float, np.mean(found, axis=0))] for late, found in enumerate(lateness())]
        total = sum(mask.numel() for mask in gp.prune(self.network, sparsity=0.0).values())
        drawing, axes = figures.new()
        axes.plot([row[0] for row in rows], [row[2] / total for row in rows], "o-", color=figures.COLOURS["pruned"])
        axes.axhline(0.8, color="0.5", linestyle=":", linewidth=1)
        axes.set(xlabel="steps from the last average to pruning", ylabel="zeros after the next average")
        axes.set_title("Four workers, each with masks of its own")
        words = (
            f"Four workers, averaged after every 8 steps, each remove the 80 % of {total:,} weights that are smallest. "
            f"Pruned right after an average, all choose the same masks; 7 steps later their masks differ in "
            f"{rows[7][1]:.0f} weights, and {rows[7][2] / total:.1%} are zero after the next average, on average over "
            "five orders of the batches."
        )
        table = [[f"{late}", f"{differ:.0f}", f"{zero / total:.1%}"] for late, differ, zero in rows]
        return Still(drawing, words, ["steps late", "entries that differ", "zeros after the next average"], table)


def branched(
    way: str = "local", *, period: int = 8, age: int = 0, density: float = 1.0, late: int = 0, order: int = 0
) -> tuple[Crew, Iterator[Tensor]]:
    """Return workers `late` steps after the end of their training, nothing pruned yet, and the batches to come."""
    data = perceptron.digits().train.double()
    crew = copy.deepcopy(_trained(way, period, age, density, order))
    further = orders(len(data), 2 * order + 1)
    for _ in range(late):
        crew.step(data, next(further))
        crew.average_when_due()
    return crew, further


@lru_cache(maxsize=16)
def _trained(way: str, period: int, age: int, density: float, order: int) -> Crew:
    """In double precision, so that two processors choose the same masks."""
    data = perceptron.digits().train.double()
    crew = Crew(perceptron.untrained().double(), way, period=period, age=age, density=density)
    batches = orders(len(data), 2 * order)
    for _ in range(period * round(STEPS / period) if way in AVERAGED else STEPS):
        crew.step(data, next(batches))
        crew.average_when_due()
    return crew


@lru_cache(maxsize=4)
def lateness(decides: str = "each", seeds: int = 5) -> list[list[tuple[int, int]]]:
    """Return for 0 to 7 steps after an average, by order: in how many weights masks differ, how many are zero after it.

    The workers are averaged after every 8 steps, and prune to 80 %; it is the next average that is meant.
    """
    return [[_late(late, decides, order) for order in range(seeds)] for late in range(8)]


def _late(late: int, decides: str, order: int) -> tuple[int, int]:
    data = perceptron.digits().train.double()
    crew, further = branched(late=late, order=order)
    crew.prune(0.8, cast(Any, decides))
    met = False
    while not met:
        crew.step(data, next(further))
        met = crew.average_when_due()
    return crew.differing(), crew.zeros()

"""Chapter 8: does the number of parameters or the number of FLOPs say how long a training step takes?

`python chapters/experiments/step_time.py` writes chapters/results/step_time.json; a run that was stopped goes on where
it was.

Twenty-one networks, of dense layers, of convolutions and recurrent ones, on BATCH random examples of classification.
Parameters, FLOPs of one forward pass for one example, and the processor time of a step (forward, backward, SGD with
momentum) on one thread, the networks of a kind in turn, in an order drawn anew each round, ROUNDS rounds; medians and
quartiles.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab

BATCH, ROUNDS, CLASSES = 64, 15, 10


class Recurrent(nn.Module):
    """A recurrent network that reads one value a step, or several; the last state is classified."""

    def __init__(self, kind: str, width: int, inputs: int = 1) -> None:
        super().__init__()
        self.inputs = inputs
        self.cells = getattr(nn, kind)(inputs, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, length) to scores."""
        states, _ = self.cells(x.unflatten(1, (-1, self.inputs)))
        scores: Tensor = self.head(states[:, -1])
        return scores


def convolutions(channels: list[int], length: int, stride: int) -> nn.Module:
    """Return a convolutional network on one-dimensional signals."""
    return lab.models.conv((length,), channels=channels, kernels=5, stride=stride, padding=2)


# Kind -> name -> the network and the length of its input.
NETWORKS: dict[str, dict[str, tuple[Callable[[], nn.Module], int]]] = {
    "dense layers": {
        "64-64-10": (lambda: lab.models.mlp([64, 64, CLASSES]), 64),
        "64-256-256-10": (lambda: lab.models.mlp([64, 256, 256, CLASSES]), 64),
        "64-1024-10": (lambda: lab.models.mlp([64, 1024, CLASSES]), 64),
        "64, 12 times 64, 10": (lambda: lab.models.mlp([64, *[64] * 12, CLASSES]), 64),
        "784-512-512-10": (lambda: lab.models.mlp([784, 512, 512, CLASSES]), 784),
        "784-1024-1024-10": (lambda: lab.models.mlp([784, 1024, 1024, CLASSES]), 784),
        "2048-1024-1024-1024-10": (lambda: lab.models.mlp([2048, 1024, 1024, 1024, CLASSES]), 2048),
    },
    "convolutions": {
        "3 of 16, 40 values": (lambda: convolutions([16, 16, 16], 40, 2), 40),
        "3 of 32, 40 values": (lambda: convolutions([32, 32, 32], 40, 1), 40),
        "3 of 16, 400 values": (lambda: convolutions([16, 16, 16], 400, 2), 400),
        "3 of 32, 400 values": (lambda: convolutions([32, 32, 32], 400, 2), 400),
        "3 of 64, 400 values": (lambda: convolutions([64, 64, 64], 400, 2), 400),
        "residual, 32 wide": (lambda: lab.models.residual(), 40),
        "residual, 128 wide": (lambda: lab.models.residual(128), 40),
    },
    "recurrent": {
        "RNN of 32, 40 steps": (lambda: Recurrent("RNN", 32), 40),
        "RNN of 128, 40 steps": (lambda: Recurrent("RNN", 128), 40),
        "RNN of 64, 200 steps": (lambda: Recurrent("RNN", 64), 200),
        "GRU of 64, 40 steps": (lambda: Recurrent("GRU", 64), 40),
        "GRU of 64, 10 steps of 4": (lambda: Recurrent("GRU", 64, 4), 40),
        "LSTM of 64, 40 steps": (lambda: Recurrent("LSTM", 64), 40),
        "LSTM of 128, 10 steps of 4": (lambda: Recurrent("LSTM", 128, 4), 40),
    },
}


def stepper(name: str, kind: str) -> Callable[[], None]:
    """Return a function that takes one training step of a network."""
    torch.manual_seed(0)
    build, length = NETWORKS[kind][name]
    model = build().train()
    x, y = torch.randn(BATCH, length), torch.randint(CLASSES, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@cache
def seconds(kind: str) -> dict[str, list[float]]:
    """Return the processor time of a step of each network of a kind, round by round."""
    steps = {name: stepper(name, kind) for name in NETWORKS[kind]}
    for step in steps.values():
        for _ in range(3):
            step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    shuffled = random.Random(0)
    for _ in range(ROUNDS):
        for name in shuffled.sample(list(steps), len(steps)):
            steps[name]()  # its memory is warm
            start = time.process_time()
            for _ in range(3):
                steps[name]()
            found[name].append((time.process_time() - start) / 3)
    return found


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    kind, name = cell["kind"], cell["network"]
    build, length = NETWORKS[kind][name]
    total = gp.report(build(), torch.zeros(1, length)).total
    low, middle, high = np.quantile(seconds(kind)[name], [0.25, 0.5, 0.75])
    return {
        "parameters": total.parameters,
        "FLOPs": total.flops,
        "ms": round(1000 * middle, 4),
        "low": round(1000 * low, 4),
        "high": round(1000 * high, 4),
    }


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "step_time.json"
    cells = [{"kind": kind, "network": name} for kind, networks in NETWORKS.items() for name in networks]
    lab.experiment.run(path, cells, measure, seeds=[0], about="one training step of 21 networks, one thread")

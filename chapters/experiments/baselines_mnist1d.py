"""Chapter 5: do the dense baselines of MNIST-1D come out as published?

`python chapters/experiments/baselines_mnist1d.py` writes chapters/results/baselines_mnist1d.json; a run that was
stopped goes on where it was.

The four models of Greydanus and Kobak (2024): a linear classifier, a perceptron with a residual layer of 256 units,
three convolutions of 25 channels, and a bidirectional GRU of 6 units whose outputs at all steps are read. As theirs,
each is trained by Adam at a rate of 0.01 for 8,000 steps on batches of 100 in order, on all 4,000 training examples;
nothing is tuned. Published accuracies on the test part: 32, 68, 94 and 91 %.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune import lab

STEPS, BATCH, RATE = 8_000, 100, 0.01
SEEDS = list(range(5))
PUBLISHED = {"logistic": 0.32, "MLP": 0.68, "CNN": 0.94, "GRU": 0.91}


class Gru(nn.Module):
    """A bidirectional GRU over the 40 values; a linear layer reads its outputs at all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(1, 6, batch_first=True, bidirectional=True)
        self.head = nn.Linear(40 * 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 40) to class scores."""
        scores: Tensor = self.head(self.cell(x.unsqueeze(-1))[0].flatten(1))
        return scores


def network(method: str, seed: int) -> nn.Module:
    """Return one of the four before the first step."""
    torch.manual_seed(seed)
    if method == "logistic":
        return nn.Linear(40, 10)
    if method == "MLP":
        return lab.models.mlp([40, 256, 256, 10], "relu", skip=True)
    if method == "GRU":
        return Gru()
    return lab.models.conv((40,), channels=(25, 25, 25), kernels=(5, 3, 3))


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Train one model with each seed; return the accuracies on the test part after the last step."""
    data = lab.data.load("mnist1d")
    x = torch.cat([data.train.x, data.validation.x])
    y = torch.cat([data.train.y, data.validation.y])
    scores = []
    for seed in SEEDS:
        model = network(cell["method"], seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        for step in range(STEPS):
            rows = slice(step * BATCH % len(y), step * BATCH % len(y) + BATCH)
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        scores.append(round(lab.train.accuracy(model, data.test), 4))
    return {
        "sparsity": 0.0,
        "accuracy": scores,
        "published": PUBLISHED[cell["method"]],
        "parameters": sum(p.numel() for p in network(cell["method"], 0).parameters()),
    }


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/baselines_mnist1d.json"),
        [{"method": method} for method in PUBLISHED],
        measure,
        seeds=SEEDS,
        about=f"MNIST-1D, {STEPS} steps of Adam at {RATE}; accuracy on test data",
    )

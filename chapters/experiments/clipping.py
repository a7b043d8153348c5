"""Chapter 2: clipping with five optimizers where gradients explode, and a sweep of the threshold.

`python chapters/experiments/clipping.py` writes chapters/results/clipping.json; a run that was stopped goes on where it
was.

"optimizers": a tanh network of 32 units whose matrix from state to state is orthogonal times 1.2 reads 30 values and
tells the sign of the first; 300 steps, batches of 64. Each optimizer is run at five or six rates, unclipped, clipped to
a norm of 1 and clipped to the 10th percentile of its own norms. The rate to report is the one that is best on
validation data with two seeds that are not used again.

"bounds": the same network under plain SGD at one rate, over bounds from far too small to none.

"generalisation": a perceptron 40-100-10 on MNIST-1D, 1,000 steps of plain SGD, batches of 128, over the same kind of
bounds; at the rate that is best without clipping, and at a rate tuned for each bound.

Rates are chosen of one grid, in units of the bound where that is below 1.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gradprune as gp
from gradprune import lab

SEEDS = list(range(5))
TUNING_SEEDS = [100, 101]
LENGTH, WIDTH, GAIN = 30, 32, 1.2
RATES = {
    "SGD": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
    "momentum": [0.003, 0.01, 0.03, 0.1, 0.3],
    "AdaGrad": [0.01, 0.03, 0.1, 0.3, 1.0],
    "Adam": [0.001, 0.003, 0.01, 0.03, 0.1],
    "AdamW": [0.001, 0.003, 0.01, 0.03, 0.1],
}
OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "AdaGrad": torch.optim.Adagrad,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}
METHODS = ["none", "norm 1", "percentile 10"]
BOUND_RATE = 0.3
BOUNDS = [0.001, 0.01, 0.1, 1.0, 10.0, 100.0, math.inf]
SIZES = [0.001, 0.01, 0.1, 0.3, 1.0, 3.0, math.inf]
PERCENTILES = [10.0, 50.0]
WIDE_RATES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]


class Recall(nn.Module):
    """A tanh network read over a sequence, and a linear layer on its last state."""

    def __init__(self, gain: float = GAIN, width: int = WIDTH) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, width, batch_first=True)
        nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)
        self.head = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the class scores of (examples, steps, 1)."""
        scores: torch.Tensor = self.head(self.rnn(x)[1][0])
        return scores


def clipper(method: str, log: gp.ClipLog) -> Any:
    """Return what is called with a model between backward and the step; unclipped, it only looks."""
    if method.startswith("percentile"):
        return gp.AutoClip(float(method.split()[1]), log=log)
    bound = math.inf if method == "none" else float(method.split()[1])
    return lambda model: gp.clip_by_norm_(model, bound, log=log)


def train(
    model: nn.Module, data: lab.data.Dataset, optimizer: torch.optim.Optimizer, method: str, steps: int, seed: int
) -> tuple[gp.ClipLog, bool]:
    """Train; return the log of clipping, and whether all gradients were finite: the first that is not ends the run."""
    log = gp.ClipLog()
    clip_ = clipper(method, log)
    batch_size = 64 if isinstance(model, Recall) else 128
    try:
        lab.train.fit(
            model,
            data,
            steps=steps,
            optimizer=optimizer,
            batch_size=batch_size,
            seed=seed,
            watch=False,
            after_backward=lambda _: clip_(model),
        )
    except ValueError:
        return log, False
    return log, True


def recall(optimizer: str, method: str, rate: float, seed: int) -> tuple[nn.Module, lab.data.Dataset, gp.ClipLog, bool]:
    """Train the recurrent network once."""
    data = lab.data.recall(LENGTH, seed=seed)
    torch.manual_seed(seed)
    model = Recall()
    log, finite = train(model, data, OPTIMIZERS[optimizer](model.parameters(), lr=rate), method, 300, seed)
    return model, data, log, finite


def perceptron(method: str, rate: float, seed: int) -> tuple[nn.Module, lab.data.Dataset, gp.ClipLog, bool]:
    """Train the perceptron once."""
    data = lab.data.load("mnist1d", seed=seed)
    torch.manual_seed(seed)
    model = lab.models.mlp([40, 100, 10], "relu")
    log, finite = train(model, data, torch.optim.SGD(model.parameters(), lr=rate), method, 1000, seed)
    return model, data, log, finite


def reported(runs: list[Any]) -> dict[str, Any]:
    """What is kept of runs with the seeds to report on."""
    return {
        "test": [round(lab.train.accuracy(model, data.test), 4) for model, data, _, _ in runs],
        "train": [round(lab.train.accuracy(model, data.train), 4) for model, data, _, _ in runs],
        "engaged": [round(log.rate, 4) for _, _, log, _ in runs],
        "largest": [float(f"{max(log.sizes):.3g}") for _, _, log, _ in runs],
        "finite": sum(finite for *_, finite in runs),
    }


def validated(runs: list[Any]) -> float:
    """The mean accuracy on validation data."""
    return round(float(np.mean([lab.train.accuracy(model, data.validation) for model, data, _, _ in runs])), 4)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one cell of any of the three parts."""
    method, rate = cell["method"], cell.get("rate")
    if cell["part"] == "optimizers":
        tuning = validated([recall(cell["optimizer"], method, rate, seed) for seed in TUNING_SEEDS])
        return {"validation": tuning} | reported([recall(cell["optimizer"], method, rate, seed) for seed in SEEDS])
    if cell["part"] == "bounds":
        return reported([recall("SGD", method, BOUND_RATE, seed) for seed in SEEDS])
    if rate == "tuned":
        scores = {r: validated([perceptron(method, r, seed) for seed in TUNING_SEEDS]) for r in rates(method)}
        rate = max(scores, key=lambda r: scores[r])
        return {"learning_rate": rate, "tuning": [[r, score] for r, score in scores.items()]} | perceptrons(
            method, rate
        )
    return {"learning_rate": rate} | perceptrons(method, rate)


def rates(method: str) -> list[float]:
    """The rates to choose from; over the bound where that is below 1, so that small bounds are not short of a rate."""
    bound = float(method.split()[1]) if method.startswith("norm") else 1.0
    return [float(f"{rate / min(bound, 1.0):.6g}") for rate in WIDE_RATES]


def perceptrons(method: str, rate: float) -> dict[str, Any]:
    """Report the perceptron at one bound and rate."""
    return reported([perceptron(method, rate, seed) for seed in SEEDS])


def name(bound: float) -> str:
    """How a bound on the norm is written as a method."""
    return "none" if bound == math.inf else f"norm {bound:g}"


UNCLIPPED_RATE = 3.0  # the best of WIDE_RATES without clipping, as its own "tuned" row finds

CELLS: list[dict[str, Any]] = [
    {"part": "optimizers", "optimizer": optimizer, "method": method, "rate": rate}
    for optimizer, rates in RATES.items()
    for method in METHODS
    for rate in rates
]
CELLS += [{"part": "bounds", "method": name(bound)} for bound in BOUNDS]
CELLS += [
    {"part": "generalisation", "method": name(size), "rate": rate}
    for rate in ("tuned", UNCLIPPED_RATE)
    for size in SIZES
]
CELLS += [{"part": "generalisation", "method": f"percentile {p:g}", "rate": "tuned"} for p in PERCENTILES]

if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/clipping.json"),
        CELLS,
        measure,
        seeds=SEEDS,
        about="accuracy on test and training data; engaged: share of the steps clipped; largest: norm before clipping",
    )

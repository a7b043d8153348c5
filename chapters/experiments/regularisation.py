"""Chapter 4: does a penalty during training, or a threshold that is learned, prepare a network for pruning?

`python chapters/experiments/regularisation.py` writes chapters/results/regularisation.json; a run that was stopped goes
on where it was.

A perceptron on the digits and on MNIST-1D, the same data, batches and number of steps for every method; the learning
rate is the one chosen for the plain network (experiment `magnitude`). After training, each network is brought to the
wanted sparsity by removing the smallest of the weights that the forward pass uses; nothing is trained afterwards. The
strength of a method is chosen for each sparsity on validation data with two seeds that are not used again; then five
fresh seeds, whose test part is read once a row.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import magnitude as plain
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gradprune as gp
from gradprune import lab

DATA = ["digits", "mnist1d"]
SPARSITIES = [0.8, 0.9, 0.95, 0.98]
SEEDS, TUNING_SEEDS = list(range(5)), [100, 101]
STRENGTHS = {
    "none": [0.0],
    "random": [0.0],
    "L2": [0.0003, 0.001, 0.003, 0.01, 0.03],
    "L1": [0.0001, 0.0003, 0.001, 0.003, 0.01],
    "proximal": [0.0001, 0.0003, 0.001, 0.003, 0.01],
    "learned threshold": [0.002, 0.004, 0.008, 0.016, 0.032],
}


class SoftThreshold(nn.Module):
    """sign(w) max(|w| - sigmoid(s), 0) with a learned number s for the layer; Kusupati et al. (2020), equation 3."""

    def __init__(self, start: float = -5.0) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(start))

    def forward(self, w: Tensor) -> Tensor:
        """Return the weights that the layer uses."""
        return w.sign() * (w.abs() - self.s.sigmoid()).clamp(min=0)


def train(
    data: str, method: str, strength: float, seed: int, rate: float | None = None
) -> tuple[nn.Sequential, lab.data.Dataset]:
    """Train a perceptron under one penalty; return it, with the weights that the forward pass uses, and its data.

    `rate` spares the search for the plain network's best rate where that is known.
    """
    examples = lab.data.load(data, seed=seed)
    model = plain.build(data, "perceptron", seed)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if method == "learned threshold":
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", SoftThreshold())
    decayed = [p for name, p in model.named_parameters() if not name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if name.endswith("bias")]
    decay = strength if method in ("L2", "learned threshold") else 0.0
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others}]
    rate = plain.best_rate(data, "perceptron") if rate is None else rate
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=plain.MOMENTUM)

    def add_subgradient(_: int) -> None:
        for w in decayed:
            w.grad += strength * w.detach().sign()

    def shrink(*_: Any) -> None:
        # What momentum makes of a constant force: rate * strength / (1 - momentum) a step.
        with torch.no_grad():
            for w in decayed:
                w.copy_(nn.functional.softshrink(w, rate * strength / (1 - plain.MOMENTUM)))

    if method == "proximal":
        optimizer.register_step_post_hook(shrink)
    lab.train.fit(
        model,
        examples,
        steps=plain.STEPS[data],
        optimizer=optimizer,
        seed=seed,
        watch=False,
        after_backward=add_subgradient if method == "L1" else None,
    )
    if method == "learned threshold":
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight")
    return model, examples


@cache
def trained(data: str, method: str, strength: float, seed: int) -> tuple[dict[str, Tensor], lab.data.Dataset, float]:
    """Return a trained network's state, its data, and the share of its weights that are exactly zero."""
    model, examples = train(data, "none" if method == "random" else method, strength, seed)
    zeros = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1]) == 0
    return {name: t.detach().clone() for name, t in model.state_dict().items()}, examples, float(zeros.float().mean())


def accuracies(data: str, method: str, strength: float, sparsity: float, seed: int) -> tuple[float, float, float]:
    """Return the accuracy on validation and on test data after pruning, and the share of zeros before it."""
    state, examples, zeros = trained(data, method, strength, seed)
    model = plain.build(data, "perceptron", seed)
    model.load_state_dict(state)
    gp.prune(model, plain.score_of("random" if method == "random" else "magnitude", examples, seed), sparsity=sparsity)
    return lab.train.accuracy(model, examples.validation), lab.train.accuracy(model, examples.test), zeros


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Choose the strength on validation data, then report on test data with other seeds."""
    data, method, sparsity = cell["data"], cell["method"], cell["sparsity"]
    tuning = []
    for strength in STRENGTHS[method]:
        runs = [accuracies(data, method, strength, sparsity, seed) for seed in TUNING_SEEDS]
        tuning.append(
            [
                strength,
                round(float(np.mean([v for v, _, _ in runs])), 4),
                round(float(np.mean([z for *_, z in runs])), 4),
            ]
        )
    best = max(tuning, key=lambda row: row[1])[0]
    runs = [accuracies(data, method, best, sparsity, seed) for seed in SEEDS]
    return {
        "strength": best,
        "tuning": tuning,
        "accuracy": [round(test, 4) for _, test, _ in runs],
        "zeros before": [round(zeros, 4) for *_, zeros in runs],
    }


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/regularisation.json"),
        [{"data": d, "method": m, "sparsity": s} for d in DATA for m in STRENGTHS for s in SPARSITIES],
        measure,
        seeds=SEEDS,
        about="perceptron, pruned once after training by the size of the weights; accuracy on test data",
    )

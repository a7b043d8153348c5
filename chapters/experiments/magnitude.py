"""Chapter 4: what is left of the accuracy when weights are removed once, by one score or another, and not corrected?

`python chapters/experiments/magnitude.py` writes chapters/results/magnitude.json; a run that was stopped goes on where
it was.

Four networks: a perceptron and a convolutional network on the digits and on MNIST-1D. Each is trained by SGD with
momentum at a learning rate chosen on validation data with two seeds that are not used again; then ten fresh seeds. No
part of the pruning is tuned. Scores that look at data look at the same 512 training examples. The test part is read
once a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab

NETWORKS = [
    ("digits", "perceptron"),
    ("digits", "convolutional"),
    ("mnist1d", "perceptron"),
    ("mnist1d", "convolutional"),
]
SHAPES = {"digits": (8, 8), "mnist1d": (40,)}
STEPS = {"digits": 600, "mnist1d": 2000}
RATES, MOMENTUM = [0.03, 0.1], 0.9
SPARSITIES = [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98]
SEEDS, TUNING_SEEDS = list(range(10)), [100, 101]
LOOKED_AT = 512  # training examples that a score sees

Score = Callable[[nn.Module], dict[str, Tensor]]


def build(data: str, network: str, seed: int) -> nn.Sequential:
    """Return a network before its first step."""
    torch.manual_seed(seed)
    if network == "perceptron":
        return lab.models.mlp([int(np.prod(SHAPES[data])), 128, 64, 10])
    return lab.models.conv(SHAPES[data])


def train(data: str, network: str, rate: float, seed: int) -> tuple[nn.Sequential, lab.data.Dataset]:
    """Train one dense network; return it and its data."""
    examples = lab.data.load(data, seed=seed)
    model = build(data, network, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
    lab.train.fit(model, examples, steps=STEPS[data], optimizer=optimizer, seed=seed, watch=False)
    return model, examples


@cache
def best_rate(data: str, network: str) -> float:
    """Return the rate with the best mean validation accuracy over the tuning seeds."""

    def validated(rate: float) -> float:
        runs = [train(data, network, rate, seed) for seed in TUNING_SEEDS]
        return float(np.mean([lab.train.accuracy(model, examples.validation) for model, examples in runs]))

    return max(RATES, key=validated)


@cache
def trained(data: str, network: str, seed: int) -> tuple[nn.Sequential, lab.data.Dataset]:
    """Return the dense network of a seed, trained at the chosen rate; not to be changed."""
    return train(data, network, best_rate(data, network), seed)


def entropy(model: nn.Module, batches: list[tuple[Tensor, Tensor]], bins: int = 8) -> dict[str, Tensor]:
    """Score |w| times the entropy, in bits, of the input that the weight multiplies; `bins` of equal width."""
    bits: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)  # a row for each feature or channel
        low, high = values.min(1, keepdim=True).values, values.max(1, keepdim=True).values
        at = ((values - low) / (high - low).clamp(min=1e-12) * bins).long().clamp(max=bins - 1)
        share = functional.one_hot(at, bins).float().mean(1)
        bits[layer] = -torch.xlogy(share, share).sum(1) / np.log(2)

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    hooks = [layer.register_forward_pre_hook(watch) for layer in layers.values()]
    with torch.no_grad():
        model(torch.cat([x for x, _ in batches]))
    for hook in hooks:
        hook.remove()
    return {
        f"{name}.weight": layer.weight.detach().abs() * bits[layer].view(1, -1, *[1] * (layer.weight.dim() - 2))
        for name, layer in layers.items()
    }


def largest(model: nn.Module) -> dict[str, Tensor]:
    """Score the other way round: the largest weights go."""
    return {name: -score for name, score in gp.magnitude(model).items()}


def score_of(method: str, examples: lab.data.Dataset, seed: int) -> Score:
    """Return the score that goes by the name of `method`, with its data bound."""
    x, y = examples.train.x[:LOOKED_AT], examples.train.y[:LOOKED_AT]
    batches = list(zip(x.split(128), y.split(128), strict=True))
    data = {"batches": batches, "loss": functional.cross_entropy}
    return {
        "magnitude": gp.magnitude,
        "largest": largest,
        "random": partial(gp.random, generator=lab.train.lots(seed)),
        "gradient": partial(gp.gradient, **data),
        "taylor": partial(gp.taylor, **data),
        "fisher": partial(gp.fisher, **data),
        "grasp": partial(gp.grasp, **data),
        "movement": partial(gp.movement, **data),
        "synflow": partial(gp.synflow, inputs=x[:1]),
        "activation": partial(gp.activation, batches=batches),
        "entropy": partial(entropy, batches=batches),
    }[method]


SCORES = [
    "magnitude", "random", "largest", "gradient", "taylor", "fisher", "grasp", "movement", "synflow", "activation",
    "entropy",
]  # fmt: skip


@cache
def scored(data: str, network: str, method: str, seed: int) -> dict[str, Tensor]:
    """Return the scores of one trained network, computed once for all sparsities."""
    model, examples = trained(data, network, seed)
    return score_of(method, examples, seed)(model)


def pruned(cell: dict[str, Any], seed: int) -> tuple[nn.Sequential, lab.data.Dataset]:
    """Return the network of one seed, pruned as `cell` says, and its data."""
    data, network, sparsity = cell["data"], cell["network"], cell["sparsity"]
    model = build(data, network, seed)
    dense, examples = trained(data, network, seed)
    model.load_state_dict(dense.state_dict())
    if sparsity == 0:
        return model, examples
    how: dict[str, Any] = {"scope": cell["scope"]}
    if cell["granularity"] != "weight":
        how = {"granularity": cell["granularity"]}
    if cell["table"] == "granularity":
        how["exclude"] = "2.weight"  # its channels are the classes
    if ":" not in cell["granularity"]:
        how["sparsity"] = sparsity
    scores = scored(data, network, cell["method"], seed)
    gp.prune(model, lambda _: scores, **how)
    return model, examples


def cells() -> list[dict[str, Any]]:
    """Return what is measured: scores, scopes and granularities."""
    every = []
    for data, network in NETWORKS:
        where = {"data": data, "network": network}
        plain = {"scope": "global", "granularity": "weight"}
        every.append(where | {"table": "score", "method": "dense", **plain, "sparsity": 0.0})
        for method in SCORES:
            every += [where | {"table": "score", "method": method, **plain, "sparsity": s} for s in SPARSITIES]
        for scope in ("layer", "erk", "lamp"):
            every += [
                where | {"table": "scope", "method": "magnitude", **plain, "scope": scope, "sparsity": s}
                for s in SPARSITIES
            ]
        if network == "perceptron":
            for sparsity, n_of_m in ((0.5, "2:4"), (0.75, "1:4")):
                for method in ("magnitude", "random"):
                    every += [
                        where
                        | {"table": "granularity", "method": method, **plain, "granularity": g, "sparsity": sparsity}
                        for g in ("weight", n_of_m, "2x4", "channel")
                    ]
    return every


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Prune the network of each seed; return accuracies on the test part, and the sparsities that came out."""
    runs = [pruned(cell, seed) for seed in SEEDS]
    reached = [
        float((torch.cat([p.flatten() for p in m.parameters() if p.dim() > 1]) == 0).float().mean()) for m, _ in runs
    ]
    return {
        "learning_rate": best_rate(cell["data"], cell["network"]),
        "accuracy": [round(lab.train.accuracy(model, examples.test), 4) for model, examples in runs],
        "zeros": round(float(np.mean(reached)), 4),
    }


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/magnitude.json"),
        cells(),
        measure,
        seeds=SEEDS,
        about="one shot, no correction; accuracy on test data",
    )

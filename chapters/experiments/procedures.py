"""Chapter 10: what is left of a network after each document's program, formula and procedure?

`python chapters/experiments/procedures.py` writes chapters/results/procedures.json and, once, the network of the
chapter's slider; a run that was stopped goes on where it was.

Two networks, ten seeds each, of the split, the first weights and the order of the batches: document 1's perceptron
(64, 32 and 10 units) on the digits, and the three convolutions of Greydanus and Kobak (2024) on MNIST-1D. Documents 0
and 3 train one layer, in NumPy, on the same data. Each run is compared with the same network left alone, trained on
for as long where the run trains on. A threshold, a rate or the end of a loop that the document leaves open is chosen
on validation data. The pages read the table through `row`, `chosen`, `most_accepted` and `overview`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab
from gradprune.lab import documents

SEEDS = list(range(10))
NETWORKS = {"digits": "document 1's perceptron", "mnist1d": "three convolutions"}
DENSE_STEPS = {"digits": 300, "mnist1d": 2000}
RATE = 0.003
ROUNDS, STEPS_A_ROUND, GROWING = 10, 30, 5  # of document 0's correction; for how many rounds its threshold grows
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
SPARSITIES = (0.1, 0.3, 0.5, 0.7, 0.9)
CUTS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of document 0
FACTORS = (0.25, 0.5, 1.0, 2.0)  # document 1's pruning_rate
ALLOWED = 0.01  # accuracy that a validation step lets go
MOST_ROUNDS, LOOP_STEPS, LOOP_SHARE = 25, 60, 0.2  # document 4's loop: a fifth of what is left goes in a round
EPOCHS, RATES, BOUNDS, CURVATURES = 300, (0.001, 0.01, 0.1), (0.001, 0.01), (0.5, 0.9, 1.5)  # documents 0 and 3

Found = dict[str, Any]
RULES: dict[str, documents.Rule] = {
    "hard": documents.keep_large,
    "soft": functional.softshrink,
    "document 2, without w": lambda w, t: (w - t).clamp(min=0.0),
} | documents.RULES


def cells() -> list[Found]:
    """Return what is measured."""
    runs: list[Found] = [{"what": what} for what in ("left alone", "trained on")]
    runs += [{"what": "rule", "rule": rule, "threshold": t} for rule in (*RULES, "random") for t in THRESHOLDS]
    runs += [{"what": "ranked", "by": by, "sparsity": s} for by in ("signed", "size", "random") for s in SPARSITIES]
    runs += [{"what": "document 1, program", "does": does} for does in ("assigned", "a step")]
    ons = ("gradients", "sizes", "random")
    runs += [{"what": "document 1, its rule", "on": on} for on in ons]
    runs += [{"what": "document 1, its rule", "on": on, "trained": "at a constant rate"} for on in ons]
    runs += [{"what": "document 1, steps", "factor": factor} for factor in FACTORS]
    runs += [{"what": "document 2, program"}]
    runs += [{"what": "document 0, steps", "threshold": how, "sparsity": s} for how in ("grows", "fixed") for s in CUTS]
    runs += [{"what": "document 4, program"}]
    runs += [{"what": "document 4, loop", "by": by} for by in ("size", "random", "nothing")]
    kinds = ("printed", "true", "true, clipped", "true, cut")
    runs += [{"what": "document 0, layer", "gradient": kind, "rate": rate} for kind in kinds for rate in RATES]
    descents = [("one step", None), ("printed", None), ("no absolute value", BOUNDS), ("by value", BOUNDS)]
    runs += [
        {"what": "document 3, layer", "step": step, "bound": bound, "curvatures": c}
        for step, bounds in descents
        for bound in bounds or (None,)
        for c in CURVATURES
    ]
    return [{"data": name} | run for name in NETWORKS for run in runs]


@cache
def data(name: str, seed: int) -> lab.data.Dataset:
    """Return a data set, split by the seed."""
    return lab.data.load(name, seed=seed)


def untrained(name: str) -> nn.Sequential:
    """Return a network before its first step."""
    if name == "digits":
        return lab.models.mlp([64, 64, 32, 10])
    return lab.models.conv((40,), channels=(25, 25, 25), kernels=(5, 3, 3))


@cache
def _dense(name: str, seed: int, falling: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    model = untrained(name)
    adam = torch.optim.Adam(model.parameters(), lr=RATE)
    steps = DENSE_STEPS[name]
    rate = lab.train.cosine(steps) if falling else None
    lab.train.fit(model, data(name, seed), steps=steps, optimizer=adam, seed=seed, watch=False, rate=rate)
    return model


def dense(name: str, seed: int, *, falling: bool = True) -> nn.Module:
    """Return a copy of the trained network of a seed; the rate of its training falls, or stays as document 1's does."""
    return copy.deepcopy(_dense(name, seed, falling))


def matrices(model: nn.Module) -> list[Tensor]:
    """Return the weights that rules are applied to: all but biases."""
    return [parameter for parameter in model.parameters() if parameter.ndim > 1]


def zeros(model: nn.Module) -> float:
    """Return the share of the weights that are zero."""
    weights = matrices(model)
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


@torch.no_grad()
def apply_(model: nn.Module, rule: documents.Rule, threshold: float) -> None:
    """Send the weights through a rule."""
    for weight in matrices(model):
        weight.copy_(rule(weight, threshold))


def train_on(
    model: nn.Module,
    name: str,
    seed: int,
    masks: Callable[[int], gp.Masks | None],
    rounds: int,
    steps: int,
    *,
    order: int = 0,
) -> None:
    """Train on by Adam, its rate falling to 0 on a line over all rounds; each round holds its masks."""
    for number in range(rounds):
        held = masks(number)
        adam = torch.optim.Adam(model.parameters(), lr=RATE)
        if held is not None:
            held.hold(adam)
        lab.train.fit(
            model,
            data(name, seed),
            steps=steps,
            optimizer=adam,
            seed=1000 * (order + number + 1) + seed,
            watch=False,
            rate=lambda step, before=number * steps: 1 - (before + step) / (rounds * steps),  # type: ignore[misc]
        )


def ruled(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Apply a rule at a threshold; "random" takes as many as the hard threshold."""
    if cell["rule"] == "random":
        share = torch.cat([w.detach().flatten() for w in matrices(model)]).abs() < cell["threshold"]
        gp.prune(model, gp.random, sparsity=share.double().mean().item(), min_keep=0)
    else:
        apply_(model, RULES[cell["rule"]], cell["threshold"])


def signed(model: nn.Module) -> dict[str, Tensor]:
    """Return document 4's importance, as a score."""
    return {n: documents.importance(p.detach()) for n, p in model.named_parameters() if p.ndim > 1}


def ranked(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Prune once, by the signed importance, by size or by chance."""
    score = {"signed": signed, "size": gp.magnitude, "random": gp.random}[cell["by"]]
    gp.prune(model, score, sparsity=cell["sparsity"], min_keep=0)


def assigned(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Document 1's function: the gradient of a loss with two softmaxes; its large entries become the weights."""
    part = data(name, seed).train
    functional.cross_entropy(model(part.x).softmax(1), part.y).backward()
    if cell["does"] == "assigned":
        documents.assign_gradients_(model.parameters(), 0.5)
    else:
        gp.threshold_gradients_(model, ratio=0.5)
        torch.optim.SGD(model.parameters(), lr=0.1).step()


def by_its_rule(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Zero the weights where document 1 zeroes a gradient; or as many of each tensor, by size or by chance."""
    part = data(name, seed).train
    functional.cross_entropy(model(part.x), part.y).backward()
    with torch.no_grad():
        for weight in matrices(model):
            assert weight.grad is not None
            small = weight.grad.abs() < 0.5 * weight.grad.abs().mean()
            if cell["on"] != "gradients":
                score = weight.abs() if cell["on"] == "sizes" else torch.rand_like(weight)
                small = ~gp.keep_largest([score], score.numel() - int(small.sum()))[0]
            weight.mul_(~small)


def adaptive(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Document 1's steps: sizes, a threshold, zero what is below, update; the threshold is its program's, of sizes."""
    masks = gp.Masks(
        {
            n: p.detach().abs() >= cell["factor"] * p.detach().abs().mean()
            for n, p in model.named_parameters()
            if p.ndim > 1
        }
    )
    masks.apply_(model)
    train_on(model, name, seed, lambda number: masks, ROUNDS, STEPS_A_ROUND)


def clamped(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Document 2's program, without the file: every parameter, biases too, into [0, 0.1]."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(documents.clamp(parameter, 0.1))


def pruned_and_corrected(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Document 0's stages: cut small weights, then correct; the threshold grows from round to round, or does not."""
    masks: gp.Masks | None = None

    def next_masks(number: int) -> gp.Masks | None:
        nonlocal masks
        if number == 0 or (cell["threshold"] == "grows" and number < GROWING):
            share = (number + 1) / GROWING if cell["threshold"] == "grows" else 1.0
            masks = gp.prune(model, sparsity=share * cell["sparsity"], within=masks)
        return masks

    train_on(model, name, seed, next_masks, ROUNDS, STEPS_A_ROUND)


def small_tensors(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Document 4's program on a network that has learned something."""
    documents.drop_small_tensors_(model.parameters(), 0.01)


def further(model: nn.Module, name: str, seed: int, cell: Found) -> None:
    """Train on with nothing removed."""
    train_on(model, name, seed, lambda number: None, ROUNDS, STEPS_A_ROUND)


def loop(name: str, seed: int, cell: Found) -> tuple[nn.Module, Found]:
    """Document 4's steps 2 to 6: score, threshold, delete, update, and again until validation accuracy is lost."""
    part = data(name, seed)
    model = dense(name, seed)
    if cell["by"] == "nothing":  # trained on for as long as the loop by size
        rounds = loop(name, seed, {"by": "size"})[1]["rounds"]
        for number in range(1, rounds + 1):
            train_on(model, name, seed, lambda _: None, 1, LOOP_STEPS, order=number)
        return model, {"rounds": rounds}
    floor = lab.train.accuracy(model, part.validation) - ALLOWED
    score = gp.magnitude if cell["by"] == "size" else gp.random
    good, masks, rounds = copy.deepcopy(model), None, 0
    torch.manual_seed(seed)
    for number in range(1, MOST_ROUNDS + 1):
        masks = gp.prune(model, score, sparsity=1 - (1 - LOOP_SHARE) ** number, within=masks, min_keep=0)
        held = masks
        train_on(model, name, seed, lambda _, held=held: held, 1, LOOP_STEPS, order=number)  # type: ignore[misc]
        if lab.train.accuracy(model, part.validation) < floor:
            break
        good, rounds = copy.deepcopy(model), number
    return good, {"rounds": rounds}


def one_layer(name: str, seed: int, cell: Found) -> tuple[Tensor, Tensor]:
    """Document 0's program: a tanh layer for each class, with its "gradient" or that of its loss."""
    part = data(name, seed).train
    x = part.x.double().numpy()
    random = np.random.default_rng(seed)
    columns = []
    for digit in range(10):
        y = (part.y == digit).double().numpy()[:, None]
        start = random.normal(size=(x.shape[1], 1)) / np.sqrt(x.shape[1])

        def true(y: documents.Array, h: documents.Array) -> tuple[documents.Array, documents.Array]:
            pulled = 2 * (h - y) * (1 - h**2) / h.size
            by_weights = x.T @ pulled
            if cell["gradient"] == "true, cut":  # document 0's formula, at its program's threshold
                return by_weights * (np.abs(by_weights) >= 0.1), pulled.sum(axis=0) * (np.abs(pulled.sum()) >= 0.1)
            return by_weights, pulled.sum(axis=0)

        weights, biases, _ = documents.train_tanh_layer(
            x,
            y,
            start,
            np.zeros(1),
            rate=cell["rate"],
            threshold=0.1 if cell["gradient"] in ("printed", "true, clipped") else np.inf,
            epochs=EPOCHS,
            gradient=documents.target_times_output if cell["gradient"] == "printed" else true,
        )
        columns.append((weights[:, 0], biases[0]))
    w = torch.from_numpy(np.stack([weights for weights, _ in columns], axis=1))
    b = torch.tensor([bias for _, bias in columns], dtype=torch.float64)
    return w, b


def linear(name: str, seed: int, cell: Found) -> tuple[Tensor, Tensor]:
    """Document 3's program: a linear model and squared loss, from zero; its step twice, or one bounded step."""
    part = data(name, seed).train
    x, y = part.x.double().numpy(), np.eye(10)[part.y.numpy()]
    ones = np.c_[x, np.ones(len(x))]
    rate = cell["curvatures"] / (2 / y.size * np.linalg.norm(ones, 2) ** 2)
    both = np.zeros((ones.shape[1], 10))
    bound = np.inf if cell["bound"] is None else cell["bound"]
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(EPOCHS):
            gradient = ones.T @ (2 * (ones @ both - y) / y.size)
            if cell["step"] == "printed":
                both = both - rate * gradient - rate * gradient
            else:
                low = -np.inf if cell["step"] == "no absolute value" else -bound
                both = both - rate * np.clip(gradient, low, bound)
    weights = torch.from_numpy(both)
    return weights[:-1], weights[-1]


CHANGES: dict[str, Callable[[nn.Module, str, int, Found], None]] = {
    "left alone": lambda model, name, seed, cell: None,
    "trained on": further,
    "rule": ruled,
    "ranked": ranked,
    "document 1, program": assigned,
    "document 1, its rule": by_its_rule,
    "document 1, steps": adaptive,
    "document 2, program": clamped,
    "document 0, steps": pruned_and_corrected,
    "document 4, program": small_tensors,
}
LAYERS = {"document 0, layer": one_layer, "document 3, layer": linear}


def one(cell: Found, seed: int) -> Found:
    """Return what one seed's network reads after one run, and how many of its weights are zero."""
    name, what = cell["data"], cell["what"]
    part, more = data(name, seed), {}
    torch.manual_seed(seed)
    if what in LAYERS:
        w, b = LAYERS[what](name, seed, cell)
        found = {}
        for split in ("validation", "test"):
            x, y = getattr(part, split).x.double(), getattr(part, split).y
            found[split] = ((x @ w + b).argmax(1) == y).double().mean().item()  # a tanh keeps the order
        seen = part.train.x.std(0) > 0  # the weights of a pixel that never changes stay where they were
        return found | {"zeros": (w[seen] == 0).double().mean().item()}
    if what == "document 4, loop":
        model, more = loop(name, seed, cell)
    else:
        model = dense(name, seed, falling="trained" not in cell)
        CHANGES[what](model, name, seed, cell)
    found = {split: lab.train.accuracy(model, getattr(part, split)) for split in ("validation", "test")}
    return found | {"zeros": zeros(model)} | more


def measure(cell: Found, seeds: Sequence[int] = SEEDS) -> Found:
    """Return accuracies and shares of zeros, a list over seeds each."""
    runs = [one(cell, seed) for seed in seeds]
    return {name: [round(run[name], 4) for run in runs] for name in runs[0]}


@cache
def measured() -> list[Found]:
    """Return all rows of the stored result."""
    found: list[Found] = lab.experiment.load("procedures")["rows"]
    return found


def rows(name: str, what: str, **cell: Any) -> list[Found]:
    """Return the measured rows of a data set and a run, of one seed a place in each list."""
    return [
        row
        for row in measured()
        if (row["data"], row["what"]) == (name, what) and all(row.get(key) == value for key, value in cell.items())
    ]


def row(name: str, what: str, **cell: Any) -> Found:
    """Return the one measured row of a cell."""
    (found,) = rows(name, what, **cell)
    return found


def chosen(name: str, what: str, **cell: Any) -> Found:
    """Return the row that is best on validation data, where a run has several."""
    return max(rows(name, what, **cell), key=lambda row: float(np.mean(row["validation"])))


def most_accepted(alone: Found, tried: list[Found]) -> Found:
    """For each seed the run with the most zeros of those that validation accepts beside `alone`, if any."""
    found: Found = {"test": [], "zeros": [], "accepted": 0}
    for at in range(len(SEEDS)):
        floor = alone["validation"][at] - ALLOWED
        accepted = [run for run in tried if run["validation"][at] >= floor]
        best = max(accepted, key=lambda run: run["zeros"][at], default=alone)
        found["accepted"] += len(accepted)
        for key in ("test", "zeros"):
            found[key].append(best[key][at])
    return found


def validated(name: str, rule: str) -> Found:
    """Document 2's steps, with one of the rules."""
    return most_accepted(row(name, "left alone"), rows(name, "rule", rule=rule))


def overview(name: str) -> dict[tuple[int, str], tuple[Found, Found]]:
    """Return, for each document's program, formula and steps, the run and the same network left alone."""
    alone, on = row(name, "left alone"), row(name, "trained on")
    tanh = chosen(name, "document 0, layer", gradient="true")
    line = chosen(name, "document 3, layer", step="one step")

    def at(rule: str, threshold: float) -> Found:
        return row(name, "rule", rule=rule, threshold=threshold)

    return {
        (0, "program"): (chosen(name, "document 0, layer", gradient="printed"), tanh),
        (0, "formula"): (chosen(name, "document 0, layer", gradient="true, cut"), tanh),
        (0, "steps"): (most_accepted(on, rows(name, "document 0, steps", threshold="grows")), on),
        (1, "program"): (row(name, "document 1, program", does="assigned"), alone),
        (1, "formula"): (at("document 1, formula", 0.1), alone),
        (1, "steps"): (most_accepted(on, rows(name, "document 1, steps")), on),
        (2, "program"): (row(name, "document 2, program"), alone),
        (2, "formula"): (at("document 2, formula", 0.1), alone),
        (2, "steps"): (validated(name, "hard"), alone),
        (3, "program"): (chosen(name, "document 3, layer", step="printed"), line),
        (3, "formula"): (chosen(name, "document 3, layer", step="no absolute value"), line),
        (3, "steps"): (chosen(name, "document 3, layer", step="by value"), line),
        (4, "program"): (row(name, "document 4, program"), alone),
        (4, "formula"): (at("document 4, formula", 0.01), alone),
        (4, "steps"): (row(name, "document 4, loop", by="size"), row(name, "document 4, loop", by="nothing")),
    }


if __name__ == "__main__":
    lab.start(0)
    results = Path("chapters/results")
    lab.experiment.run(
        results / "procedures.json",
        cells(),
        measure,
        seeds=SEEDS,
        about="accuracy on validation and test data, and the share of the weights that are zero",
    )
    if not (results / "documents_network.safetensors").exists():
        lab.experiment.store_network(results / "documents_network.safetensors", dense("digits", 0))

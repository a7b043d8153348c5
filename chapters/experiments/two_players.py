"""Chapter 7, the GAN: what happens to the drawn points while a pruned player is corrected, and does order matter?

`python chapters/experiments/two_players.py` writes chapters/results/two_players.json; a run that was stopped goes on
where it was; about ten minutes on one core.

The network, data, training, pruning (layer by layer, by magnitude) and the length of a correction are those of the rows
"GAN, ... pruned" (`architectures_again`), at the rates in RATE. A correction lets both players train on ("both
train"), or for the first half of its steps only the pruned one ("it trains first"). A row has, seed by seed, the
distance of the drawn points from the real ones at each of AT, on test data; the share of heaps hit at the end; the
share of fresh points, real and drawn, that the discriminator tells right, at the start and at the end; and of seed 0
some drawn points, at both.

Added when the first rows had been seen: a whole pair of which one player waits for the first half ("discriminator
first", "generator first"); and what a pruned discriminator passes on before any step ("no step"): the mean length of
the negative of what (7.11) has at a drawn point, without J, as a share of the whole discriminator's; the mean cosine of
the two; and the share of the points at which the pruned one passes on nothing. They were measured on another processor,
where the dense networks of a seed come out a little different: their seeds are not paired with those of the other rows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.zoo import base, generative

SEEDS = tuple(range(10))
SPARSITIES = (0.5, 0.8, 0.95)
ROW = zoo.by_name("GAN, both pruned")
RATE = ROW.rate  # of the dense training and of every correction: nothing is tuned here
STEPS = ROW.steps // 2
AT = (0, 5, 10, 20, 40, 80, 125, 160, 200, STEPS)
SHOWN = 250  # points of seed 0
PLAYERS = ("discriminator", "generator")
POINTS = 1_000  # drawn for "no step"


def corrected(model: nn.Module, pruned: str, sparsity: float, order: str, seed: int) -> dict[str, Any]:
    """Prune one player, or "both" or "nothing", correct it, and return what is measured on the way."""
    task = ROW.task(seed)
    masks = None
    if pruned != "nothing":
        row = zoo.by_name(f"GAN, {pruned} pruned")
        masks = base.prune(row, model, "magnitude", "layer", sparsity, seed)
    from_the_start = {"both train": PLAYERS, "it trains first": (pruned,)}
    from_the_start |= {f"{player} first": (player,) for player in PLAYERS}
    moves = []
    for player, (parameters, loss) in zip(PLAYERS, task.players(model), strict=True):
        optimizer = base.OPTIMIZERS[ROW.optimizer](list(parameters), lr=RATE)
        if masks is not None and pruned in (player, "both"):
            masks.hold(optimizer, model)
        waits = 0 if player in from_the_start[order] else STEPS // 2
        moves.append((optimizer, loss, waits))
    generator = torch.Generator().manual_seed(1_000 + seed)
    distances, told, points = [], [], []
    for step in range(STEPS + 1):
        if step in AT:
            distances.append(round(base.score(task, model, "test"), 4))
        if step in (0, STEPS):
            told.append(tells(model, seed))
            points.append(drawn(model))
        if step == STEPS:
            break
        for optimizer, loss, waits in moves:
            if step < waits:
                continue
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            loss(generator).backward()
            optimizer.step()
    heaps = base.details(task, model, "test")["heaps hit"]
    return {"distance": distances, "heaps": heaps, "told": told, "points": points}


def passed_on(sparsity: float, seed: int) -> dict[str, float]:
    """Return how what a pruned discriminator passes on compares with what the whole one does, before any step."""
    whole = base.dense(ROW, seed)
    less = copy.deepcopy(whole)
    base.prune(zoo.by_name("GAN, discriminator pruned"), less, "magnitude", "layer", sparsity, seed)
    noise = torch.randn(POINTS, generative.NOISE, generator=torch.Generator().manual_seed(6_000 + seed))
    was, left = (pull(model, whole(noise)) for model in (whole, less))
    return {
        "length": round(float(left.norm(dim=1).mean() / was.norm(dim=1).mean()), 4),
        "cosine": round(float(functional.cosine_similarity(was, left).mean()), 4),
        "silent": round(float((left == 0).all(1).double().mean()), 4),
    }


def pull(model: generative.Adversaries, points: Tensor) -> Tensor:
    """Return the negative gradient of the generator's loss by each of the points."""
    points = points.detach().requires_grad_()
    loss = functional.softplus(-model.discriminator(points)).sum()
    return -torch.autograd.grad(loss, points)[0]


@torch.no_grad()
def tells(model: generative.Adversaries, seed: int) -> float:
    """Return the share of fresh points, half real and half drawn, that the discriminator tells right."""
    generator = torch.Generator().manual_seed(5_000 + seed)
    real = generative.real_points(2_000, generator)
    made = model(torch.randn(2_000, generative.NOISE, generator=generator))
    right = [(model.discriminator(real) > 0).double().mean(), (model.discriminator(made) < 0).double().mean()]
    return round(float(torch.stack(right).mean()), 3)


@torch.no_grad()
def drawn(model: nn.Module) -> list[list[float]]:
    """Return some points of the generator, rounded for a picture."""
    noise = torch.randn(SHOWN, generative.NOISE, generator=torch.Generator().manual_seed(0))
    return [[round(value, 2) for value in point] for point in model(noise).tolist()]


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row with all seeds."""
    if cell["order"] == "no step":
        compared = [passed_on(cell["sparsity"], seed) for seed in SEEDS]
        return {name: [each[name] for each in compared] for name in compared[0]}
    how = cell["pruned"], cell["sparsity"], cell["order"]
    found = [corrected(copy.deepcopy(base.dense(ROW, seed)), *how, seed) for seed in SEEDS]
    return {
        "at": list(AT),
        "distance": [each["distance"] for each in found],
        "heaps": [each["heaps"] for each in found],
        "told": [each["told"] for each in found],
        "points": found[0]["points"],
    }


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "two_players.json"
    ways = [("generator", "both train"), ("discriminator", "both train"), ("both", "both train")]
    ways += [("generator", "it trains first"), ("discriminator", "it trains first")]
    ways += [("discriminator", "no step")]
    orders = ("both train", *(f"{player} first" for player in PLAYERS))
    cells = [{"pruned": "nothing", "sparsity": 0.0, "order": order} for order in orders]
    cells += [{"pruned": p, "sparsity": s, "order": order} for p, order in ways for s in SPARSITIES]
    lab.experiment.run(path, cells, measure, seeds=SEEDS, about="a GAN's pruned players while they are corrected")

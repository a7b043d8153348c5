"""Chapter 7: what does a search find, of the network and of its pruning?

`python chapters/experiments/pruning_search.py` writes chapters/results/pruning_search.json; a run that was stopped goes
on where it was. Needs Optuna.

Table "network": Optuna's tree-structured Parzen estimator chooses depth, width, kernel, activation and rate of a
convolutional network on MNIST-1D by the mean validation accuracy over the two tuning seeds, in TRIALS_OF_NETWORKS
trials. Its best is the row "found by a search" of the chapter's table.

Table "pruning": that network is to lose 80 or 95 % of its weights, whatever the way. Four rules say how its layers
share the loss (the same share, ERK, all ranked together, LAMP), by magnitude. Two searches choose the score, and a rule
or each layer's own share, by the validation accuracy after the correction: Optuna's estimator, whose first STARTS
trials are random, and as many random trials from the same space. Correction as in the chapter's protocol. The test
part is read once for each seed and method, of the network with the best validation accuracy.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab
from gradprune.lab.zoo import base, searched
from gradprune.weights.allocate import share_out

SPARSITIES = [0.8, 0.95]
RULES = ["layer", "erk", "global", "lamp"]
SEARCHES = ["random trials", "tpe"]
TRIALS, TRIALS_OF_NETWORKS = 20, 24
STARTS = {"pruning": 5, "network": 10}  # random trials before the estimator has something to go by
LOOKED_AT = 512  # training examples that a score sees

Choice = dict[str, Any]


def study(method: str, seed: int, starts: int) -> Any:
    """Return an empty search that maximises: "tpe", whose first `starts` trials are random, or "random trials"."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the search is Optuna's: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=starts),
        "random trials": lambda: optuna.samplers.RandomSampler(seed=1_000 + seed),  # else they begin alike
    }[method]()
    return optuna.create_study(direction="maximize", sampler=sampler)


def search_network(trials: int = TRIALS_OF_NETWORKS) -> dict[str, Any]:
    """Return each trial's design with its mean validation accuracy over the tuning seeds, and the best."""
    tried: list[dict[str, Any]] = []

    def validated(trial: Any) -> float:
        design = searched.Design.suggested(trial)
        architecture = design.architecture("tried")
        scores = []
        for seed in base.TUNING_SEEDS:
            task, model = architecture.task(seed), base.network(architecture, seed)
            base.train(architecture, model, task, architecture.steps, rate=architecture.rate, seed=seed)
            scores.append(base.score(task, model, "validation"))
        tried.append(vars(design) | {"validation": round(float(np.mean(scores)), 4)})
        return float(np.mean(scores))

    study("tpe", 0, STARTS["network"]).optimize(validated, n_trials=trials)
    return {"trials": tried, "best": max(tried, key=lambda row: row["validation"])}


def choice_of(trial: Any, names: list[str]) -> Choice:
    """Return what a trial suggests: a score, and a rule or each layer's share against the others'."""
    choice: Choice = {
        "score": trial.suggest_categorical("score", ["magnitude", "taylor", "activation"]),
        "scope": trial.suggest_categorical("scope", [*RULES, "own"]),
    }
    if choice["scope"] == "own":
        choice["densities"] = {name: round(trial.suggest_float(name, 0.05, 1.0, log=True), 4) for name in names}
    return choice


def shares(model: nn.Module, densities: dict[str, float], sparsity: float) -> dict[str, float]:
    """Return sparsities by name, their densities in these proportions, that make the wanted one over all."""
    sizes = {name: model.get_parameter(name).numel() for name in densities}
    keep = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    wanted = [densities[name] * sizes[name] for name in sizes]
    counts = share_out(wanted, keep, low=[1] * len(sizes), high=list(sizes.values()))
    return {name: 1 - count / size for (name, size), count in zip(sizes.items(), counts, strict=True)}


def pruned(choice: Choice, sparsity: float, seed: int) -> tuple[nn.Module, float]:
    """Return the dense network of a seed, pruned as chosen and corrected, and its validation accuracy."""
    (architecture,) = searched.ROWS
    task, model = architecture.task(seed), copy.deepcopy(base.dense(architecture, seed))
    x, y = task.train.x[:LOOKED_AT], task.train.y[:LOOKED_AT]
    batches = list(zip(x.split(128), y.split(128), strict=True))
    score = {
        "magnitude": gp.magnitude,
        "taylor": partial(gp.taylor, batches=batches, loss=functional.cross_entropy),
        "activation": partial(gp.activation, batches=batches),
    }[choice["score"]]
    if choice["scope"] == "own":
        masks = gp.prune(model, score, scope=shares(model, choice["densities"], sparsity))
    else:
        masks = gp.prune(model, score, sparsity=sparsity, scope=choice["scope"])
    base.correct(architecture, model, task, seed, masks)
    return model, base.score(task, model, "validation")


def searched_pruning(
    method: str, sparsity: float, seed: int, trials: int = TRIALS
) -> tuple[Choice, nn.Module, list[float]]:
    """Return the best choice of one search, its network, and the validation accuracy of each trial."""
    (architecture,) = searched.ROWS
    names = [n for n, p in base.dense(architecture, seed).named_parameters() if p.dim() > 1]
    best: list[Any] = []
    seen: list[float] = []

    def validated(trial: Any) -> float:
        choice = choice_of(trial, names)
        model, accuracy = pruned(choice, sparsity, seed)
        if not seen or accuracy > max(seen):
            best[:] = [choice, model]
        seen.append(round(accuracy, 4))
        return accuracy

    study(method, seed, STARTS["pruning"]).optimize(validated, n_trials=trials)
    return best[0], best[1], seen


def measure(cell: dict[str, Any], seeds: tuple[int, ...] = base.SEEDS) -> dict[str, Any]:
    """Measure one cell: the search of the network, or one method of pruning it over all seeds."""
    if cell["table"] == "network":
        return search_network()
    (architecture,) = searched.ROWS
    row: dict[str, Any] = {"chosen": [], "tried": [], "validation": [], "test": []}
    for seed in seeds:
        if cell["method"] in SEARCHES:
            choice, model, tried = searched_pruning(cell["method"], cell["sparsity"], seed)
        else:
            choice = {"score": "magnitude", "scope": cell["method"]}
            model, accuracy = pruned(choice, cell["sparsity"], seed)
            tried = [round(accuracy, 4)]
        row["chosen"].append(choice)
        row["tried"].append(tried)
        row["validation"].append(max(tried))
        row["test"].append(round(base.score(architecture.task(seed), model, "test"), 4))
    return row


def cells() -> list[dict[str, Any]]:
    """Return what is measured: the search of the network, the rules and the searches of its pruning."""
    ways = [(sparsity, method) for sparsity in SPARSITIES for method in (*RULES, *SEARCHES)]
    every = [{"table": "pruning", "method": method, "sparsity": sparsity} for sparsity, method in ways]
    return [{"table": "network", "method": "tpe"}, *every]


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/pruning_search.json"),
        cells(),
        measure,
        seeds=base.SEEDS,
        about="MNIST-1D; pruned in one shot, then corrected; accuracy on test data",
    )

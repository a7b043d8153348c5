"""Chapter 7: which network does a search find, that is then pruned as the row "found by a search"?

`python chapters/experiments/network_search.py` writes chapters/results/network_search.json. Needs Optuna.

Optuna's tree-structured Parzen estimator chooses depth, width, kernel, activation and rate of a convolutional network
on MNIST-1D by the mean validation accuracy over the two tuning seeds, in TRIALS trials, of which the first RANDOM are
random. Test data are not read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gradprune import lab
from gradprune.lab.zoo import base, searched

TRIALS, RANDOM = 24, 10


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return each trial's design with its mean validation accuracy over the tuning seeds, and the best."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError("the search is Optuna's: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
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

    sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=RANDOM)
    optuna.create_study(direction="maximize", sampler=sampler).optimize(validated, n_trials=cell["trials"])
    return {"tried": tried, "best": max(tried, key=lambda row: row["validation"])}


if __name__ == "__main__":
    lab.start(0)
    path = Path(__file__).resolve().parents[1] / "results" / "network_search.json"
    about = "a convolutional network on MNIST-1D, chosen by validation accuracy"
    lab.experiment.run(path, [{"trials": TRIALS}], measure, seeds=base.TUNING_SEEDS, about=about)

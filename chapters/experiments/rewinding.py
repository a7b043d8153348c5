"""Chapter 5: fine-tuning, learning-rate rewinding or weight rewinding?

`python chapters/experiments/rewinding.py` writes chapters/results/rewinding.json; a run that was stopped goes on where
it was.

The comparison of Renda et al. (2020), small: a network is trained, then pruned by magnitude in five rounds, and after
each round corrected in one of four ways, each with as many steps as the training had. Fine-tuning goes on at the
training's last, low rate; learning-rate rewinding repeats the training's schedule of rates; weight rewinding also puts
the weights back to an early step (or to the first), and then trains on from there. Rates are those of the dense
training, tuned for it on validation data (`protocol.py`), so nothing is tuned for a method.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import protocol
from protocol import STEPS
from torch import nn

import gradprune as gp
from gradprune import lab

SEEDS = list(range(5))
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
EARLY = STEPS // 10
METHODS: dict[str, dict[str, Any]] = {
    "fine-tuning": {},
    "learning-rate rewinding": {"rewind": "learning rate"},
    f"weight rewinding to step {EARLY}": {"rewind": "weights", "rewind_to": EARLY},
    "weight rewinding to step 0": {"rewind": "weights"},
    "random masks, learning-rate rewinding": {"rewind": "learning rate", "score": gp.random},
}
NETWORKS = [("digits", "perceptron"), ("mnist1d", "perceptron"), ("mnist1d", "convolutional")]


def run(name: str, kind: str, method: str, seed: int) -> tuple[nn.Module, gp.History]:
    """Train, prune and correct one network; return it and the accuracies of its rounds on test data."""
    part = protocol.data(name, seed)
    model = protocol.network(name, kind, seed)

    def train(model: nn.Module, work: gp.Round) -> None:
        first = work.steps.start
        protocol.fit(
            model,
            part,
            len(work.steps),
            protocol.best_rate(name, kind),
            lambda step: protocol.decay(first + step),
            1000 * work.number + seed,
            prepare=work.hold,
        )

    history = gp.iterate(
        model,
        train,
        lambda number: SPARSITIES[number - 1],
        rounds=len(SPARSITIES),
        steps=STEPS,
        evaluate=partial(lab.train.accuracy, split=part.test),
        **METHODS[method],
    )
    return model, history


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracies of one method over the rounds, a list over seeds for each sparsity."""
    histories = [run(cell["data"], cell["network"], cell["method"], seed)[1] for seed in SEEDS]
    rounds = range(1, len(SPARSITIES) + 1)
    return {
        "dense": [round(h[0].corrected["score"], 4) for h in histories],
        "pruned": {str(SPARSITIES[r - 1]): [round(h[r].pruned["score"], 4) for h in histories] for r in rounds},
        "corrected": {str(SPARSITIES[r - 1]): [round(h[r].corrected["score"], 4) for h in histories] for r in rounds},
    }


def main() -> None:
    """Measure what is not measured yet, then write one row for each method and sparsity."""
    lab.start(0)
    cells = [{"data": name, "network": kind, "method": method} for name, kind in NETWORKS for method in METHODS]
    part = lab.data.cache_folder() / "rewinding-runs.json"
    runs = lab.experiment.run(part, cells, measure, seeds=SEEDS)
    rows: list[dict[str, Any]] = []
    for found in runs:
        head = {key: found[key] for key in ("data", "network", "method")}
        rows.append(head | {"sparsity": 0.0, "accuracy": found["dense"]})
        for sparsity in SPARSITIES:
            accuracy, pruned = (found[key][str(sparsity)] for key in ("corrected", "pruned"))
            rows.append(head | {"sparsity": sparsity, "accuracy": accuracy, "before correction": pruned})
    about = f"five rounds of magnitude pruning, each corrected for {STEPS} steps; accuracy on test data"
    result = lab.experiment.provenance(SEEDS) | {"about": about, "rows": rows}
    lab.experiment.save(Path("chapters/results/rewinding.json"), result)


if __name__ == "__main__":
    main()

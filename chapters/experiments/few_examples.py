"""Chapter 6: a sparsity chosen with few examples, by one split, by cross-validation, and on the test part itself.

`python chapters/experiments/few_examples.py` writes chapters/results/few_examples.json; a run that was stopped goes on
where it was. Needs scikit-learn, whose wine (178 examples) and breast cancer (569) are the data.

Of each data set TEST of the examples are kept for the end, drawn anew by each seed. A perceptron with HIDDEN units is
trained for STEPS steps, pruned with all layers ranked together, and trained on for FURTHER steps with the masks held.
The sparsity is chosen on the other examples: by one split (a fifth of them validates), by five-fold cross-validation
(the highest mean, the sparsest among equals), by cross-validation and the rule of one standard error, or, which one
must not do, by the test part. "Claimed" is the accuracy by which it was chosen; "test" that of the network that is then
trained on all the other examples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab

DATA = {"wine": load_wine, "breast cancer": load_breast_cancer}
SEEDS = list(range(10))
SPARSITIES = [0.98, 0.95, 0.9, 0.8, 0.5, 0.0]
HIDDEN, STEPS, FURTHER, RATE, DECAY = 16, 150, 50, 0.01, 0.01
TEST, VALIDATION = 0.3, 0.2

Part = tuple[Tensor, Tensor]


def parts(name: str, seed: int) -> tuple[Part, Part]:
    """Return the examples to choose with, and the test part."""
    x, y = (torch.tensor(part) for part in DATA[name](return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    kept, test = order[round(TEST * len(x)) :], order[: round(TEST * len(x))]
    return (x[kept].float(), y[kept]), (x[test].float(), y[test])


class Standardised(nn.Module):
    """A perceptron whose inputs have mean 0 and variance 1 on what it is trained on."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.layers = lab.models.mlp((inputs, HIDDEN, classes), activation="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        scores: Tensor = self.layers((x - self.mean) / self.deviation)
        return scores


def train(model: Standardised, data: Part, sparsity: float) -> None:
    """Train, prune and train on, all examples at each step."""
    x, y = data
    model.mean.copy_(x.mean(0))
    model.deviation.copy_(x.std(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(STEPS + FURTHER):
        if step == STEPS and sparsity > 0:
            gp.prune(model, sparsity=sparsity, min_keep=1).hold(optimizer, model)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def evaluate(model: nn.Module, data: Part) -> Tensor:
    """Return which examples are read correctly."""
    with torch.no_grad():
        return (model(data[0]).argmax(1) == data[1]).float()


def fitted(fit: Part, judge: Part, sparsity: float, seed: int) -> float:
    """Return the accuracy on one part of a network that was trained on another."""
    torch.manual_seed(seed)
    model = Standardised(fit[0].shape[1], int(fit[1].max()) + 1)
    train(model, fit, sparsity)
    return float(evaluate(model, judge).mean())


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row: the choices of one seed on one data set."""
    seed = cell["seed"]
    rest, test = parts(cell["data"], seed)
    x, y = rest
    held = round(VALIDATION * len(x))
    split = [fitted((x[held:], y[held:]), (x[:held], y[:held]), s, seed) for s in SPARSITIES]
    table = gp.cross_validate(
        lambda: Standardised(x.shape[1], int(y.max()) + 1),
        train,
        evaluate,
        rest,
        settings={str(s): s for s in SPARSITIES},
        seed=seed,
    )
    on_test = [fitted(rest, test, s, seed) for s in SPARSITIES]
    chosen = {
        "one split": (SPARSITIES[split.index(max(split))], max(split)),
        "cross-validation": (float(table.best), table.mean(table.best)),
        "one standard error": (float(table.one_standard_error), table.mean(table.one_standard_error)),
        "the test part": (SPARSITIES[on_test.index(max(on_test))], max(on_test)),
    }
    return {
        "curve": [round(value, 4) for value in on_test],
        "chosen": {way: s for way, (s, _) in chosen.items()},
        "claimed": {way: round(value, 4) for way, (_, value) in chosen.items()},
        "test": {way: round(on_test[SPARSITIES.index(s)], 4) for way, (s, _) in chosen.items()},
    }


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "few_examples.json"
    cells = [{"data": name, "seed": seed} for name in DATA for seed in SEEDS]
    about = (
        "scikit-learn's wine and breast cancer: a sparsity chosen by one split, by cross-validation, by the test part"
    )
    lab.experiment.run(path, cells, measure, seeds=SEEDS, about=about)

"""Chapter 1: over how many steps can a recurrent network remember its first input?

`python chapters/experiments/recall.py` writes chapters/results/recall.json; a run that was stopped goes on where it
was.

Every cell has 32 units and gets the same sequences, batches and 400 steps of Adam, and its own learning rate, chosen of
one grid on validation data with a seed that is not used again. Guessing has an accuracy of one half.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradprune import lab

WIDTH, STEPS = 32, 400
SEEDS = list(range(5))
TUNING_SEED = 100
RATES = [0.001, 0.003, 0.01, 0.03]
LENGTHS = [5, 10, 20, 40, 80]
CELLS = ["rnn", "rnn, orthogonal", "gru", "lstm", "lstm, forget", "lstm, chrono"]


def build(method: str, seed: int, length: int) -> lab.models.Recurrent:
    """Return the network of `method` before training.

    "orthogonal" is the matrix from state to state; "chrono" draws each forget gate's bias so that the cell forgets over
    1 to `length` steps, and the input gate's as its opposite (Tallec and Ollivier 2018). "forget" draws the former and
    leaves the other gates as they are.
    """
    torch.manual_seed(seed)
    model = lab.models.Recurrent(method.split(",")[0], 1, WIDTH, 2)
    if "orthogonal" in method:
        torch.nn.init.orthogonal_(model.cell.weight_hh)
    if "chrono" in method or "forget" in method:
        with torch.no_grad():
            forget = torch.empty(WIDTH).uniform_(1, max(length - 1, 2)).log()
            model.cell.bias_hh[WIDTH : 2 * WIDTH] = 0
            model.cell.bias_ih[WIDTH : 2 * WIDTH] = forget
    if "chrono" in method:
        with torch.no_grad():
            model.cell.bias_hh.zero_()
            model.cell.bias_ih[:WIDTH] = -forget
    return model


def train(method: str, length: int, rate: float, seed: int) -> tuple[lab.models.Recurrent, lab.data.Dataset]:
    """Train one network; return it and its data."""
    data = lab.data.recall(length, seed=seed)
    model = build(method, seed, length)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    lab.train.fit(
        model,
        data,
        steps=STEPS,
        optimizer=optimizer,
        batch_size=64,
        seed=seed,
        watch=False,
    )
    return model, data


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Tune one cell at one length on validation data, then report it on test data."""
    run = partial(train, cell["method"], cell["length"])
    return lab.train.tune_and_report(run, RATES, tuning_seeds=[TUNING_SEED], seeds=SEEDS)


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/recall.json"),
        [
            {"method": method, "length": length}
            for length in LENGTHS
            for method in CELLS
            if (method, length) != ("lstm, forget", 80)  # it no longer learns at 40 in every seed
        ],
        measure,
        seeds=SEEDS,
        about=f"label is the sign of the first input; {WIDTH} units, {STEPS} steps of Adam; accuracy on test data",
    )

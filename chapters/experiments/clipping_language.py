"""Chapter 2: a recurrent language model whose gradients explode at a high rate, with a bound and without.

`python chapters/experiments/clipping_language.py` writes chapters/results/clipping_language.json; a run that was
stopped goes on where it was.

The text is Python's own reference, which ships with it, in small letters and spaces. A tanh network of 48 units whose
matrix from state to state starts as an orthogonal one times 1.2 guesses the next letter; 300 steps of plain SGD,
batches of 16 pieces of 60 letters. Losses are cross-entropies in nats a letter, on text that no step has seen.

"baseline": what letter frequencies and pairs of letters reach on the test text.

"log": the norms of one run without a bound at a rate at which all train, with a seed that is not reported on.

"rates": each rate without a bound and with a bound of 1, one loss a seed; "validation" is the mean over two other
seeds.

"start": the same with PyTorch's own first weights, which are smaller.

"bounds": bounds at quantiles of the log, at two rates.

"trace": of each run without a bound that ever does worse than guessing, the step of the largest norm before that; the
same run again with that one step alone clipped to 1, and again with the step before it shortened by the same factor.

"recall": the sign of the first of 30 values (see clipping.py), plain SGD at a rate of 0.3, over bounds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import clipping
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab

SEEDS = list(range(12))
TUNING_SEEDS = [100, 101]
LETTERS, WIDTH, GAIN = 27, 48, 1.2
BATCH, LENGTH, STEPS = 16, 60, 300
RATES = [0.35, 0.5, 0.7, 1.0, 1.4, 2.0]
LOG_RATE = 0.5
QUANTILES = [0.1, 0.5, 0.9, 0.99, 1.0]
BOUND_RATES = [0.7, 1.0]
TRACE_RATES = [1.0, 1.4]
GUESSING = math.log(LETTERS)
RECALL_SEEDS = list(range(16))
RECALL_BOUNDS = [0.001, 0.01, 0.1, 1.0, 10.0, 100.0, math.inf]


class Model(nn.Module):
    """Reads letters one by one and scores the next one after each."""

    def __init__(self, gain: float | None = GAIN) -> None:
        super().__init__()
        self.rnn = nn.RNN(LETTERS, WIDTH, batch_first=True)
        if gain is not None:
            nn.init.orthogonal_(self.rnn.weight_hh_l0, gain)
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, letters: Tensor) -> Tensor:
        """Map numbers of letters (pieces, steps) to scores (pieces, steps, letters)."""
        scores: Tensor = self.head(self.rnn(functional.one_hot(letters, LETTERS).float())[0])
        return scores


@cache
def text() -> dict[str, Tensor]:
    """The text as numbers, space 0 and a to z 1 to 26: nine tenths to train on, the rest to choose and to report on."""
    words = " ".join(topics.topics[name] for name in sorted(topics.topics)).lower()
    letters = torch.tensor([0 if c == " " else ord(c) - 96 for c in re.sub("[^a-z]+", " ", words)])
    ends = [int(share * len(letters)) for share in (0.9, 0.95)]
    return {"train": letters[: ends[0]], "validation": letters[ends[0] : ends[1]], "test": letters[ends[1] :]}


def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
    """The cross-entropy of each next letter, on average."""
    return functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, part: str) -> float:
    """The loss on all whole pieces of a part of the text."""
    letters = text()[part]
    count = (len(letters) - 1) // LENGTH
    pieces = torch.stack([letters[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])
    return round(loss_of(model, pieces).item(), 4)


def train(
    rate: float, seed: int, clip_: Callable[[nn.Module, int], float], gain: float | None = GAIN, steps: int = STEPS
) -> tuple[nn.Module, list[float], list[float]]:
    """Train; return the model, the norms that `clip_(model, step)` found, and the losses."""
    torch.manual_seed(seed)
    model = Model(gain)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    letters = text()["train"]
    norms, losses = [], []
    for step in range(steps):
        begins = torch.randint(len(letters) - LENGTH, (BATCH, 1), generator=generator)
        loss = loss_of(model, letters[begins + torch.arange(LENGTH + 1)])
        optimizer.zero_grad()
        loss.backward()
        norms.append(clip_(model, step))
        losses.append(loss.item())
        optimizer.step()
    return model, norms, losses


def bounded(bound: float) -> Callable[[nn.Module, int], float]:
    """Clip to this norm at every step."""
    return lambda model, _: float(gp.clip_by_norm_(model, bound))


def shortened(at: int, factor: float) -> Callable[[nn.Module, int], float]:
    """Multiply the gradient of one step by a factor; leave all others."""

    def clip_(model: nn.Module, step: int) -> float:
        norm = float(gp.clip_by_norm_(model, math.inf))
        if step == at:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= factor
        return norm

    return clip_


@cache
def logged() -> list[float]:
    """The norms of a run without a bound."""
    return [float(f"{norm:.4g}") for norm in train(LOG_RATE, TUNING_SEEDS[0], bounded(math.inf))[1]]


def reported(rate: float, bound: float, gain: float | None = GAIN, *, tune: bool = True) -> dict[str, Any]:
    """What is kept of one setting over the seeds."""
    tuning = [evaluate(train(rate, seed, bounded(bound), gain)[0], "validation") for seed in TUNING_SEEDS if tune]
    runs = [train(rate, seed, bounded(bound), gain) for seed in SEEDS]
    return ({"validation": round(float(np.mean(tuning)), 4)} if tune else {}) | {
        "test": [evaluate(model, "test") for model, _, _ in runs],
        "engaged": [round(float(np.mean(np.array(norms) > bound)), 4) for _, norms, _ in runs],
        "largest": [float(f"{max(norms):.3g}") for _, norms, _ in runs],
    }


def traced(rate: float, seed: int) -> dict[str, Any]:
    """Find the step of the largest norm before a run breaks, and see what becomes of the run without it."""
    _, norms, losses = train(rate, seed, bounded(math.inf))
    worse = [step for step in range(5, STEPS) if losses[step] > GUESSING]
    if not worse:
        return {"breaks": None}
    breaks = worse[0]
    at = int(np.argmax(norms[:breaks]))
    until = min(STEPS, breaks + 20)
    found: dict[str, Any] = {"breaks": breaks, "jump": at, "norm": norms[at], "before": float(np.median(norms[:at]))}
    found["as it was"] = float(np.mean(losses[at + 1 : until]))
    factor = min(1.0, 1 / norms[at])
    for name, step in (("jump clipped", at), ("step before shortened", at - 1)):
        found[name] = float(np.mean(train(rate, seed, shortened(step, factor), steps=until)[2][at + 1 :]))
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}


def baseline() -> dict[str, Any]:
    """The test loss of letter frequencies, and of the frequencies of pairs, one added to each count."""
    seen, test = text()["train"], text()["test"]
    single = torch.bincount(seen, minlength=LETTERS).double() + 1
    pairs = torch.bincount(seen[:-1] * LETTERS + seen[1:], minlength=LETTERS**2).double().view(LETTERS, LETTERS) + 1
    single, pairs = single / single.sum(), pairs / pairs.sum(1, keepdim=True)
    return {
        "letters": round(-single.log()[test].mean().item(), 4),
        "pairs": round(-pairs.log()[test[:-1], test[1:]].mean().item(), 4),
        "train": len(seen),
        "test": len(test),
    }


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one cell of any part."""
    part, rate = cell["part"], cell.get("rate", math.nan)
    if part == "baseline":
        return baseline()
    if part == "log":
        return {"norms": logged()}
    if part == "trace":
        return traced(rate, cell["seed"])
    if part == "recall":
        runs = [clipping.recall("SGD", clipping.name(cell["bound"]), 0.3, seed) for seed in RECALL_SEEDS]
        return clipping.reported(runs)
    if part == "bounds":
        bound = float(np.quantile(logged(), cell["quantile"]))
        return {"bound": float(f"{bound:.3g}")} | reported(rate, bound, tune=False)
    return reported(rate, cell["bound"], None if part == "start" else GAIN)


CELLS: list[dict[str, Any]] = [{"part": "baseline"}, {"part": "log", "rate": LOG_RATE}]
CELLS += [{"part": "rates", "rate": rate, "bound": bound} for rate in RATES for bound in (math.inf, 1.0)]
CELLS += [{"part": "trace", "rate": rate, "seed": seed} for rate in TRACE_RATES for seed in SEEDS]
CELLS += [{"part": "bounds", "rate": rate, "quantile": quantile} for rate in BOUND_RATES for quantile in QUANTILES]
CELLS += [{"part": "recall", "bound": bound} for bound in RECALL_BOUNDS]
CELLS += [{"part": "start", "rate": rate, "bound": bound} for rate in (1.0, 1.4, 2.0, 2.8) for bound in (math.inf, 1.0)]

if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/clipping_language.json"),
        CELLS,
        measure,
        seeds=SEEDS,
        about="test: loss in nats a letter, one a seed (recall: accuracy); engaged: share of the steps clipped; "
        "largest: norm before clipping",
    )

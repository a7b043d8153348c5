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

"bounds": bounds at quantiles of the log, at three rates.

"dealt": a control for the bound of 1. As many steps are shortened, by the same factors, but chance chooses which of
those up to the last that the bound shortened. "last" is that step, "same" how many of the steps that chance chose the
bound shortened too.

"paths": loss and norm at each step of one network (the first seed), without a bound and with a bound of 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune import lab

SEEDS = list(range(24))
TUNING_SEEDS = [100, 101]
LETTERS, WIDTH, GAIN = 27, 48, 1.2
BATCH, LENGTH, STEPS = 16, 60, 300
RATES = [0.5, 0.7, 1.0, 1.4, 2.0]
START_RATES = [1.4, 2.0]
LOG_RATE = 0.5
QUANTILES = [0.1, 0.5, 0.9, 0.99]
BOUND_RATES = [0.7, 1.0, 1.4]
DEALT_RATES = [1.0, 1.4]
PATHS_RATE = 1.4


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


class Networks:
    """Several networks of one shape, trained side by side: each parameter is a stack of theirs.

    It computes what :class:`Model` does, for all at once, since one step of one small network is mostly overhead.
    """

    def __init__(self, seeds: Sequence[int], gain: float | None = GAIN) -> None:
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(Model(gain).state_dict())
        self.parameters = {name: torch.stack([model[name] for model in models]).requires_grad_() for name in models[0]}

    def losses(self, pieces: Tensor) -> Tensor:
        """The cross-entropy of each next letter, one mean a network: (networks, pieces, letters) to (networks)."""
        p = self.parameters
        many, count, length = pieces.shape
        letters = functional.one_hot(pieces[:, :, :-1].transpose(1, 2), LETTERS).float()
        bias = (p["rnn.bias_ih_l0"] + p["rnn.bias_hh_l0"])[:, None]
        read = torch.baddbmm(bias, letters.reshape(many, -1, LETTERS), p["rnn.weight_ih_l0"].transpose(1, 2))
        back = p["rnn.weight_hh_l0"].transpose(1, 2)
        state = read.new_zeros(many, count, WIDTH)
        states = []
        for given in read.view(many, length - 1, count, WIDTH).unbind(1):
            state = torch.baddbmm(given, state, back).tanh()
            states.append(state)
        every = torch.stack(states, 2).view(many, -1, WIDTH)
        scores = torch.baddbmm(p["head.bias"][:, None], every, p["head.weight"].transpose(1, 2))
        wanted = pieces[:, :, 1:].reshape(many, -1)
        return functional.cross_entropy(scores.transpose(1, 2), wanted, reduction="none").mean(1)

    def step(self, rate: float, factors: Callable[[Tensor], Tensor]) -> Tensor:
        """A step of descent with each network's gradient times its own factor, of its norm; return the norms."""
        grads = {name: parameter.grad for name, parameter in self.parameters.items()}
        norms = sum(grad.flatten(1).square().sum(1) for grad in grads.values()).sqrt()
        scale = -rate * factors(norms)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter += scale.view(-1, *[1] * (parameter.dim() - 1)) * grads[name]
                parameter.grad = None
        return norms


@torch.no_grad()
def evaluate(networks: Networks, part: str) -> list[float]:
    """The loss on all whole pieces of a part of the text, one a network."""
    letters = text()[part]
    count = (len(letters) - 1) // LENGTH
    pieces = torch.stack([letters[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])
    many = len(networks.parameters["head.bias"])
    return [round(loss, 4) for loss in networks.losses(pieces.expand(many, -1, -1)).tolist()]


Factors = Callable[[Tensor, int], Tensor]


def train(
    rate: float, seeds: Sequence[int], factors: Factors, gain: float | None = GAIN, steps: int = STEPS
) -> tuple[Networks, np.ndarray, np.ndarray]:
    """Train a network for each seed; `factors(norms, step)` scale the gradients. Return them, norms and losses."""
    networks = Networks(seeds, gain)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    letters = text()["train"]
    norms, losses = [], []
    for step in range(steps):
        begins = [torch.randint(len(letters) - LENGTH, (BATCH, 1), generator=g) for g in generators]
        found = networks.losses(letters[torch.stack(begins) + torch.arange(LENGTH + 1)])
        found.sum().backward()
        norms.append(networks.step(rate, lambda norms, step=step: factors(norms, step)).tolist())
        losses.append(found.tolist())
    return networks, np.array(norms).T, np.array(losses).T


def bounded(bound: float) -> Factors:
    """Clip to this norm at every step, as :func:`gradprune.clip_by_norm_` does."""
    return lambda norms, _: torch.where(norms > bound, bound / (norms + 1e-6), 1.0)


@cache
def logged() -> list[float]:
    """The norms of a run without a bound."""
    return [float(f"{norm:.4g}") for norm in train(LOG_RATE, TUNING_SEEDS[:1], bounded(math.inf))[1][0]]


def reported(rate: float, bound: float, gain: float | None = GAIN) -> dict[str, Any]:
    """What is kept of one setting."""
    networks, norms, _ = train(rate, [*SEEDS, *TUNING_SEEDS], bounded(bound), gain)
    many = len(SEEDS)
    return {
        "validation": round(float(np.mean(evaluate(networks, "validation")[many:])), 4),
        "test": evaluate(networks, "test")[:many],
        "engaged": [round(float(share), 4) for share in (norms[:many] > bound).mean(1)],
        "largest": [float(f"{norm:.3g}") for norm in norms[:many].max(1)],
    }


def dealt(rate: float, bound: float) -> dict[str, Any]:
    """Shorten as many steps by the same factors as the bound does, but steps that chance chooses.

    Of each network: up to the last step that the bound shortened, in an order of its own.
    """
    _, norms, _ = train(rate, SEEDS, bounded(bound))
    factors = np.where(norms > bound, bound / (norms + 1e-6), 1.0)
    lasts = [int(np.nonzero(row < 1)[0].max(initial=-1)) + 1 for row in factors]
    for seed, row, last in zip(SEEDS, factors, lasts, strict=True):
        row[:last] = np.random.default_rng(seed).permutation(row[:last])
    table = torch.from_numpy(factors.T.copy()).float()
    networks, _, _ = train(rate, SEEDS, lambda norms, step: table[step])
    return {
        "test": evaluate(networks, "test"),
        "shortened": (factors < 1).sum(1).tolist(),
        "last": lasts,
        "same": ((factors < 1) & (norms > bound)).sum(1).tolist(),
    }


def path(rate: float, bound: float) -> dict[str, Any]:
    """Loss and norm before each step of the first network."""
    _, norms, losses = train(rate, SEEDS[:1], bounded(bound))
    return {name: [float(f"{v:.4g}") for v in row[0]] for name, row in (("norms", norms), ("losses", losses))}


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
    if part == "paths":
        return path(rate, cell["bound"])
    if part == "dealt":
        return dealt(rate, cell["bound"])
    if part == "bounds":
        bound = float(np.quantile(logged(), cell["quantile"]))
        return {"limit": float(f"{bound:.3g}")} | reported(rate, bound)
    return reported(rate, cell["bound"], None if part == "start" else GAIN)


CELLS: list[dict[str, Any]] = [{"part": "baseline"}, {"part": "log", "rate": LOG_RATE}]
CELLS += [{"part": "rates", "rate": rate, "bound": bound} for rate in RATES for bound in (math.inf, 1.0)]
CELLS += [{"part": "dealt", "rate": rate, "bound": 1.0} for rate in DEALT_RATES]
CELLS += [{"part": "bounds", "rate": rate, "quantile": quantile} for rate in BOUND_RATES for quantile in QUANTILES]
CELLS += [{"part": "start", "rate": rate, "bound": bound} for rate in START_RATES for bound in (math.inf, 1.0)]
CELLS += [{"part": "paths", "rate": PATHS_RATE, "bound": bound} for bound in (math.inf, 1.0)]

if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/clipping_language.json"),
        CELLS,
        measure,
        seeds=SEEDS,
        about="test: loss in nats a letter, one a seed; engaged: share of the steps clipped; "
        "largest: norm before clipping",
    )

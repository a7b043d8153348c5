"""How is a network trained here, so that two of them can be compared?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from gradprune.core.paired import interval as interval
from gradprune.lab.data import Dataset, Split
from gradprune.lab.models import mlp
from gradprune.lab.setup import progress_wanted

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class History:
    """What one run saw: the training loss at every step, the validation accuracy after every epoch."""

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


def fit(
    model: nn.Module,
    data: Dataset,
    *,
    steps: int,
    optimizer: torch.optim.Optimizer,
    batch_size: int = 128,
    seed: int = 0,
    watch: bool = True,
    after_backward: Callable[[int], object] | None = None,
    rate: Callable[[int], float] | None = None,
    loss: Loss | None = None,
) -> History:
    """Train `model` on the training part of `data` for `steps` steps of cross-entropy and return what was seen.

    Batches are drawn without replacement, shuffled each epoch by a generator of their own seeded with `seed`, so that
    two models with one seed see the same batches whatever else draws random numbers. `after_backward(step)` is called
    between `backward` and the step. `rate(step)` multiplies the optimizer's learning rate, for that step alone.
    `loss(scores, y, x)` is minimised instead of the cross-entropy, where it is given. `watch` computes the validation
    accuracy after every epoch. The test part is never read.

    Raises ValueError for a number of steps or a batch size below 1.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, not {steps} and {batch_size}")
    history = History()
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    x, y = data.train.x.to(device), data.train.y.to(device)
    order: list[Tensor] = []
    full = [group["lr"] for group in optimizer.param_groups]
    for step in tqdm(range(steps), desc="training", leave=False, disable=not progress_wanted()):
        if not order:
            order = list(torch.randperm(len(y), generator=generator).split(batch_size))
        batch = order.pop(0)
        model.train()
        optimizer.zero_grad()
        scores = model(x[batch])
        value = functional.cross_entropy(scores, y[batch]) if loss is None else loss(scores, y[batch], x[batch])
        value.backward()
        if after_backward is not None:
            after_backward(step)
        if rate is not None:
            for group, lr in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = lr * rate(step)
        optimizer.step()
        history.losses.append(value.item())
        if watch and not order:
            history.validation.append(accuracy(model, data.validation))
    for group, lr in zip(optimizer.param_groups, full, strict=True):
        group["lr"] = lr
    return history


def cosine(steps: int, warmup: int = 50) -> Callable[[int], float]:
    """Return a `rate` for :func:`fit`: up to 1 on a line in `warmup` steps, down to 0 on half a cosine at `steps`.

    Example: ``lab.train.fit(model, data, steps=800, optimizer=adamw, rate=lab.train.cosine(800))``

    Source: Loshchilov and Hutter (2017), equation 5, without restarts.
    """
    return lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def lots(seed: int) -> torch.Generator:
    """Return a generator for random pruning, apart from the first weights of a network of the same seed.

    ``torch.manual_seed(seed)`` and ``Generator().manual_seed(seed)`` draw the same numbers: with one seed for both, the
    random masks of a first layer keep what was largest before training.
    """
    return torch.Generator().manual_seed(10_000 + seed)


def perceptron(
    data: Dataset,
    widths: Sequence[int] = (64, 128, 64, 10),
    *,
    seed: int = 0,
    order: int | None = None,
    steps: int = 400,
) -> nn.Sequential:
    """Return a perceptron trained on `data` by SGD at a rate of 0.1 with momentum 0.9.

    `seed` decides the first weights, `order` (left out, `seed` too) the order of the batches.
    """
    torch.manual_seed(seed)
    model = mlp(list(widths))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(model, data, steps=steps, optimizer=optimizer, seed=seed if order is None else order, watch=False)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of `split` that `model` classifies correctly, 0 to 1; every module keeps its mode."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters(), split.x).device
    model.eval()
    try:
        right: Tensor = (model(split.x.to(device)).argmax(1) == split.y.to(device)).float().mean()
    finally:
        for module, training in modes.items():
            module.training = training
    return float(right)


Train = Callable[[float, int], tuple[nn.Module, Dataset]]


def tune_and_report(
    train: Train, rates: Sequence[float], *, tuning_seeds: Sequence[int], seeds: Sequence[int]
) -> dict[str, Any]:
    """Choose a learning rate on validation data, then report it on test data with other seeds, once.

    `train(rate, seed)` returns a trained model and its data. Returns "learning_rate" (of `rates`, the first of those
    with the best mean validation accuracy over `tuning_seeds`), "tuning" (each rate with that mean) and "accuracy" (on
    the test part, one a seed of `seeds`), rounded to four digits.

    Raises ValueError where there is no rate or no seed, and where a seed is both tuned and reported on.
    """
    if not rates or not tuning_seeds or not seeds:
        raise ValueError("tuning needs at least one rate, one tuning seed and one seed to report on")
    both = set(tuning_seeds) & set(seeds)
    if both:
        raise ValueError(f"seeds {sorted(both)} are to be tuned and reported on; what was chosen on is no test")

    def validated(rate: float) -> float:
        runs = [train(rate, seed) for seed in tuning_seeds]
        return float(np.mean([accuracy(model, data.validation) for model, data in runs]))

    tuning = {rate: validated(rate) for rate in rates}
    best = max(tuning, key=lambda rate: tuning[rate])
    trained = [train(best, seed) for seed in seeds]
    return {
        "learning_rate": best,
        "tuning": [[rate, round(score, 4)] for rate, score in tuning.items()],
        "accuracy": [round(accuracy(model, data.test), 4) for model, data in trained],
    }

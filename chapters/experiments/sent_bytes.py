"""Chapter 3: how many bytes must workers send each other to train a network together, by which rule?

`python chapters/experiments/sent_bytes.py` writes chapters/results/sent_bytes.json; a run that was stopped goes on
where it was. With the word "longer" behind it, it measures three times as many steps with fewer seeds, and writes
chapters/results/sent_longer.json.

Four workers with a quarter of each batch, simulated in one process: each computes its gradient and thins it by a fixed
threshold, by a ratio to its tensors' means, or to its largest entries; what is left out is lost, or waits. All take the
same step with the mean of what was sent. MNIST-1D, layers of 128, 128 and 10 units. Every method gets the same steps
and batches, and its own learning rate, chosen of one grid on validation data, which falls to 0 on a straight line.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune import lab

WORKERS, BATCH, STEPS, LONGER = 4, 128, 300, 900
MOMENTUM = 0.9
SEEDS = list(range(8))
TUNING_SEEDS = [100, 101]
RATES = {0.0: [1.0, 2.0, 4.0], MOMENTUM: [0.1, 0.2, 0.4]}
WAITS = {"density": [0.01, 0.001], "threshold": [0.03, 0.1, 0.3], "ratio": [2.0, 4.0, 6.0]}
LOST = {"density": [0.01, 0.001], "threshold": [0.03], "ratio": [4.0]}
WARM_UP = [0.25, 0.0625, 0.015625, 0.004]  # densities of Deep Gradient Compression's first epochs
WARM_STEPS = 32  # that these four take together, a tenth of the short training


def cell(
    rule: str, amount: float = 0.0, rest: str = "lost", momentum: float = 0.0, *, warm_up: bool = False
) -> dict[str, Any]:
    """Return what identifies a row."""
    return {"rule": rule, "amount": amount, "rest": rest, "momentum": momentum, "warm_up": warm_up}


CELLS = [cell("dense"), cell("dense", momentum=MOMENTUM)]
CELLS += [cell(rule, a, "waits") for rule, several in WAITS.items() for a in several]
CELLS += [cell(rule, a) for rule, several in LOST.items() for a in several]
CELLS += [cell("density", a, "waits", MOMENTUM) for a in (0.01, 0.001)]
CELLS += [cell("density", 0.001, "waits", m, warm_up=True) for m in RATES]
LONGER_CELLS = [cell("dense"), *(cell("density", 0.001, "waits", momentum) for momentum in RATES)]


def message_bytes(entries: int, sent: int) -> int:
    """Return the length of the shortest message: every value, or positions and values, or a bitmap and values."""
    return min(4 * entries, 8 * sent, 4 * sent + -(-entries // 8))


def chosen(total: Tensor, sizes: list[int], rule: str, amount: float) -> Tensor:
    """Return which entries are sent: True in a row for each worker."""
    size = total.abs()
    if rule == "threshold":
        return size >= amount
    if rule == "ratio":
        return torch.cat([part >= amount * part.mean(1, keepdim=True) for part in size.split(sizes, 1)], 1)
    places = size.topk(max(1, round(amount * size.shape[1])), 1, sorted=False).indices
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, places, True)


def density_at(step: int, final: float, warm_up: bool) -> float:
    """Return the share of the entries that a step sends."""
    return WARM_UP[step * len(WARM_UP) // WARM_STEPS] if warm_up and step < WARM_STEPS else final


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of each worker as one row; `x` and `y` have a worker in front.

    Every worker gets a view of the perceptron's weights of its own, so that one backward pass serves all of them.
    """
    views = [p.detach().expand(WORKERS, *p.shape).requires_grad_() for p in model.parameters()]
    a = x
    for weight, bias in zip(views[::2], views[1::2], strict=True):
        a = torch.baddbmm(bias.unsqueeze(1), functional.relu(a) if a is not x else x, weight.transpose(1, 2))
    loss = functional.cross_entropy(a.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
    return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, views)], 1)


def train(
    given: dict[str, Any], steps: int, rate: float, seed: int, *, seen: dict[int, Any]
) -> tuple[nn.Module, lab.data.Dataset]:
    """Train one network by four workers; return it and its data, and leave in `seen` what one worker sent."""
    data = lab.data.load("mnist1d", seed=seed)
    torch.manual_seed(seed)
    model = lab.models.mlp([data.features, 128, 128, 10], "relu")
    dense = given["rule"] == "dense"
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=given["momentum"] if dense else 0.0)
    sizes = [p.numel() for p in model.parameters()]
    entries = sum(sizes)
    waits, velocity = torch.zeros(WORKERS, entries), torch.zeros(WORKERS, entries)
    generator = torch.Generator().manual_seed(seed)
    sent, united = 0, 0.0
    order: list[Tensor] = []
    for step in range(steps):
        if not order:
            order = list(torch.randperm(len(data.train), generator=generator).split(BATCH))
        batch = order.pop(0)
        x, y = (part[batch].unflatten(0, (WORKERS, -1)) for part in (data.train.x, data.train.y))
        total = gradients(model, x, y)
        if not torch.isfinite(total).all():
            return model, data  # it diverged; what is left has the accuracy of guessing
        if not dense:
            amount = density_at(step, given["amount"], given["warm_up"])
            if given["momentum"]:
                velocity = total = given["momentum"] * velocity + total
            if given["rest"] == "waits":
                total = waits + total
            mask = chosen(total, sizes, given["rule"], amount)
            waits, velocity, total = total * ~mask, velocity * ~mask, total * mask
            sent += sum(message_bytes(entries, int(count)) for count in mask.sum(1))
            united += float(mask.any(0).float().mean())
        else:
            sent += WORKERS * message_bytes(entries, entries)
            united += 1.0
        parts = total.mean(0).split(sizes)
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    seen[seed] = {"bytes": sent // WORKERS, "united": round(united / steps, 5)}
    return model, data


def measure(given: dict[str, Any], steps: int) -> dict[str, Any]:
    """Tune one method on validation data, then report it on test data."""
    seen: dict[int, Any] = {}
    run = partial(train, given, steps, seen=seen)
    longer = steps == LONGER  # without the highest rate, at which whole gradients break down
    rates = RATES[given["momentum"]][: 2 if longer else None]
    seeds, tuning = (SEEDS[:5], TUNING_SEEDS[:1]) if longer else (SEEDS, TUNING_SEEDS)
    reported = lab.train.tune_and_report(run, rates, tuning_seeds=tuning, seeds=seeds)
    return reported | {key: [seen[s][key] if s in seen else None for s in seeds] for key in ("bytes", "united")}


if __name__ == "__main__":
    lab.start(0)
    longer = "longer" in sys.argv
    steps = LONGER if longer else STEPS
    lab.experiment.run(
        Path(f"chapters/results/sent_{'longer' if longer else 'bytes'}.json"),
        LONGER_CELLS if longer else CELLS,
        partial(measure, steps=steps),
        seeds=SEEDS[:5] if longer else SEEDS,
        about=f"MNIST-1D, layers of 128, 128, 10 units, {WORKERS} workers, {steps} steps; accuracy on test data, bytes "
        "sent by one worker in all steps, the share of entries that at least one worker sent",
    )

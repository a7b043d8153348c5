"""Chapter 8: pruning, rounding and distilling a perceptron together, in both orders: bytes and accuracy.

`python chapters/experiments/combined.py` writes chapters/results/combined.json; a run that was stopped goes on where it
was.

A perceptron of WIDTHS on the digits, ten seeds, trained DENSE steps by SGD. Then each way has STEPS steps from the
whole rate. What is pruned loses SPARSITY of the weights, all layers ranked together; what is rounded has weights of
`bits` bits, one scale for each output unit, as `gp.quantize` has them with eight, zeros as zeros; the scale is the one
of sixty that leaves the least sum of squares. "nothing": trained on alone. "rounded after": the training does not know
of the rounding, which comes last. "rounded before": rounded, then pruned by the rounded weights, and trained with each
step's weights rounded before they are used (straight-through gradients). "rounded within": pruned first, trained so.
With a teacher, the loss is SOFT of the distance to the dense network's classes at TEMPERATURE. Bytes are counted: one
bit a weight where pruned, the bits of each weight that stays, and four bytes a scale and a bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab

SEEDS = list(range(10))
WIDTHS, SPARSITY = [64, 48, 10], 0.9
DENSE, STEPS, RATE = 300, 300, 0.1
TEMPERATURE, SOFT = 3.0, 0.9  # of chapter 5, not tuned
BITS = [8, 4, 3, 2]
ORDERS = ["rounded after", "rounded within", "rounded before"]


@cache
def data(seed: int) -> lab.data.Dataset:
    """Return the digits, split by the seed."""
    return lab.data.load("digits", seed=seed)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of every training here."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)


@cache
def _dense(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = lab.models.mlp(WIDTHS)
    rate = lab.train.cosine(DENSE)
    lab.train.fit(
        model, data(seed), steps=DENSE, optimizer=optimizer_of(model), batch_size=64, seed=seed, watch=False, rate=rate
    )
    return model


def dense(seed: int) -> nn.Module:
    """Return a copy of the trained network."""
    return copy.deepcopy(_dense(seed))


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return what is pruned and rounded."""
    return [p for p in model.parameters() if p.dim() > 1]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return the nearest multiples of a scale for each row, 2^(bits - 1) - 1 on each side of zero."""
    most = 2 ** (bits - 1) - 1
    largest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best, least = weight, torch.full_like(largest, torch.inf)
    for share in torch.linspace(1, 0.2, 60):
        scale = share * largest / most
        found = (weight / scale).round().clamp(-most, most) * scale
        error = (found - weight).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best


def round_(model: nn.Module, bits: int) -> nn.Module:
    """Round every matrix of a network, in place."""
    with torch.no_grad():
        for weight in matrices(model):
            weight.copy_(rounded(weight, bits))
    return model


def train(model: nn.Module, seed: int, masks: gp.Masks | None, bits: int | None, teacher: bool) -> None:
    """Train on; with `bits` each pass sees rounded weights, and the step goes to those that are not."""
    optimizer = optimizer_of(model)
    if masks is not None:
        masks.hold(optimizer, model)
    kept: list[Tensor] = []
    wise = dense(seed).eval()

    def loss(scores: Tensor, labels: Tensor, x: Tensor) -> Tensor:
        hard = functional.cross_entropy(scores, labels)
        if not teacher:
            return hard
        with torch.no_grad():
            wanted = wise(x)
        return SOFT * gp.distill_loss(scores, wanted, TEMPERATURE) + (1 - SOFT) * hard

    def before(module: nn.Module, args: Any) -> None:
        kept[:] = [weight.data for weight in matrices(model)]
        for weight, value in zip(matrices(model), kept, strict=True):
            weight.data = rounded(value, bits or 32)

    def after(step: int) -> None:
        for weight, value in zip(matrices(model), kept, strict=True):
            weight.data = value

    handle = None if bits is None else model.register_forward_pre_hook(before)
    lab.train.fit(
        model,
        data(seed),
        steps=STEPS,
        optimizer=optimizer,
        batch_size=64,
        seed=seed + 1000,
        watch=False,
        rate=lab.train.cosine(STEPS),
        loss=loss,
        after_backward=None if bits is None else after,
    )
    if handle is not None:
        handle.remove()


def combined(seed: int, pruned: bool, bits: int | None, order: str, teacher: bool) -> nn.Module:
    """Return the network after one way."""
    model = dense(seed)
    if order == "rounded before" and bits is not None:
        round_(model, bits)
    masks = gp.prune(model, sparsity=SPARSITY) if pruned else None
    train(model, seed, masks, None if order == "rounded after" else bits, teacher)
    return model if bits is None else round_(model, bits)


def size(model: nn.Module, pruned: bool, bits: int | None) -> int:
    """Return the bytes that the network needs."""
    each, total = bits or 32, 0
    for weight in matrices(model):
        stay = round(weight.numel() * (1 - SPARSITY)) if pruned else weight.numel()
        total += (weight.numel() if pruned else 0) + each * stay
        total += 32 * len(weight) * (2 if bits else 1)  # the biases, and the scales
    return -(-total // 8)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    seed, bits, pruned = cell["seed"], cell["bits"], cell["pruned"]
    if cell["way"] == "at once":
        model = dense(seed)
        first, last = (lambda: gp.prune(model, sparsity=SPARSITY)), (lambda: round_(model, bits))
        turns: list[Callable[[], object]] = [first, last] if cell["order"] == "pruned first" else [last, first]
        for turn in turns:
            turn()
    else:
        model = combined(seed, pruned, bits, cell["order"], cell["teacher"])
    parts = ("validation", "test")
    found = {part: round(lab.train.accuracy(model, getattr(data(seed), part)), 4) for part in parts}
    return found | {"bytes": size(model, pruned, bits)}


def cells(seed: int) -> list[dict[str, Any]]:
    """Return what is measured with one seed."""
    rows = []
    for teacher in (False, True):
        for pruned in (False, True):
            rows.append({"way": "trained", "pruned": pruned, "bits": None, "order": "nothing", "teacher": teacher})
            orders = ORDERS if pruned else ORDERS[:2]
            rows += [
                {"way": "trained", "pruned": pruned, "bits": bits, "order": order, "teacher": teacher}
                for bits in BITS
                for order in orders
            ]
    rows += [
        {"way": "at once", "pruned": True, "bits": bits, "order": order, "teacher": False}
        for bits in BITS
        for order in ("pruned first", "rounded first")
    ]
    return [{"seed": seed} | row for row in rows]


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "combined.json"
    about = (
        "a perceptron of 64, 48 and 10 units on the digits: pruned, rounded and distilled, together and in both orders"
    )
    lab.experiment.run(path, [cell for seed in SEEDS for cell in cells(seed)], measure, seeds=SEEDS, about=about)

"""Chapter 3: how many bytes must workers send each other to train a network together?

`python chapters/experiments/sent_bytes.py` writes chapters/results/sent_bytes.json; a run that was stopped goes on
where it was.

Four workers with a quarter of each batch, simulated in one process: each computes its gradient on a network of its own,
thins it, and sends it; all take the same step with the mean of what was sent. MNIST-1D, layers of 128, 128 and 10
units. Each method gets the same steps and batches, and its own learning rate, chosen of one grid on validation data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune import lab

WORKERS, BATCH, STEPS = 4, 128, 300
MOMENTUM = 0.9
SEEDS = list(range(5))
TUNING_SEEDS = [100]
RATES = [0.03, 0.1, 0.3, 1.0]
DENSITIES = [0.1, 0.01, 0.001]
METHODS = ["top entries", "error feedback", "momentum correction"]
CELLS: list[dict[str, Any]] = [{"method": "dense", "density": 1.0}, {"method": "dense, momentum", "density": 1.0}]
CELLS += [{"method": method, "density": density} for method in METHODS for density in DENSITIES]


def message(gradients: list[Tensor]) -> bytes:
    """Return what a worker sends, in the shortest of three ways; one byte in front says which.

    Every value; or those that are not zero behind their positions, four bytes each; or behind a bitmap, one bit for
    each entry.
    """
    values = torch.cat([g.reshape(-1) for g in gradients]).numpy()
    where = np.flatnonzero(values)
    positions, bitmap = where.astype(np.uint32).tobytes(), np.packbits(values != 0).tobytes()
    body = values[where].tobytes()
    return min(b"d" + values.tobytes(), b"p" + positions + body, b"b" + bitmap + body, key=len)


def read(received: bytes, entries: int) -> Tensor:
    """Return the gradient that a message holds, as one vector."""
    kind, body = received[:1], received[1:]
    found = np.zeros(entries, np.float32)
    if kind == b"d":
        found[:] = np.frombuffer(body, np.float32)
    elif kind == b"p":
        count = len(body) // 8
        found[np.frombuffer(body[: 4 * count], np.uint32)] = np.frombuffer(body[4 * count :], np.float32)
    else:
        bits = -(-entries // 8)
        where = np.unpackbits(np.frombuffer(body[:bits], np.uint8), count=entries).astype(bool)
        found[where] = np.frombuffer(body[bits:], np.float32)
    return torch.from_numpy(found)


def thinner(method: str, model: nn.Module, density: float) -> Callable[[], object]:
    """Return what a worker does to its gradient before it sends it."""
    if method == "top entries":
        return lambda: gp.keep_top_gradients_(model, density)
    if method == "error feedback":
        return gp.ErrorFeedback(model, density).step
    if method == "momentum correction":
        return gp.ErrorFeedback(model, density, momentum=MOMENTUM).step
    return lambda: None


def train(
    method: str, density: float, rate: float, seed: int, *, seen: dict[int, int]
) -> tuple[nn.Module, lab.data.Dataset]:
    """Train one network by four workers; return it and its data, and leave the bytes sent by one worker in `seen`."""
    data = lab.data.load("mnist1d", seed=seed)
    torch.manual_seed(seed)
    model = lab.models.mlp([data.features, 128, 128, 10], "relu")
    workers = [copy.deepcopy(model) for _ in range(WORKERS)]
    thin = [thinner(method, worker, density) for worker in workers]
    momentum = MOMENTUM if method == "dense, momentum" else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    entries = sum(p.numel() for p in model.parameters())
    sent, order = 0, []
    for _ in range(STEPS):
        if len(order) == 0:
            order = list(torch.randperm(len(data.train), generator=generator).split(BATCH))
        shares = order.pop(0).chunk(WORKERS)
        total = torch.zeros(entries)
        for worker, thinned, share in zip(workers, thin, shares, strict=True):
            worker.load_state_dict(model.state_dict())
            worker.zero_grad()
            functional.cross_entropy(worker(data.train.x[share]), data.train.y[share]).backward()
            if not all(torch.isfinite(p.grad).all() for p in worker.parameters()):
                return model, data  # it diverged; what is left has the accuracy of guessing
            thinned()
            packet = message([p.grad for p in worker.parameters() if p.grad is not None])
            sent += len(packet)
            total += read(packet, entries)
        parts = (total / WORKERS).split([p.numel() for p in model.parameters()])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    seen[seed] = sent // WORKERS
    return model, data


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Tune one method on validation data, then report it on test data."""
    seen: dict[int, int] = {}
    run = partial(train, cell["method"], cell["density"], seen=seen)
    reported = lab.train.tune_and_report(run, RATES, tuning_seeds=TUNING_SEEDS, seeds=SEEDS)
    return reported | {"bytes": [seen.get(seed) for seed in SEEDS]}


if __name__ == "__main__":
    lab.start(0)
    lab.experiment.run(
        Path("chapters/results/sent_bytes.json"),
        CELLS,
        measure,
        seeds=SEEDS,
        about=f"MNIST-1D, layers of 128, 128, 10 units, {WORKERS} workers, {STEPS} steps; accuracy on test data, "
        "bytes sent by one worker in all steps",
    )

"""Chapter 3: how well are networks trained by two processes that send less than their gradients?

`python chapters/experiments/compression.py` writes chapters/results/compression.json; a run that was stopped goes on
where it was.

Two processes on one machine talk over loopback, by DistributedDataParallel: whole gradients, gp.TopK, and torch's
PowerSGD of rank 1, each with half of every batch. PowerSGD sends whole gradients for its first steps, two at least;
TopK's density is the one at which a rank sends as many bytes in all. Three networks: a perceptron and a recurrent one,
which reads a digit row by row, on the digits, and the residual one on MNIST-1D. Plain SGD; every method has the same
steps and batches and its own learning rate, chosen of one grid a network on validation data. Bytes are what one rank
gives to the collectives; for two ranks as many reach it, for more a rank receives more by TopK's all-gather. About
half an hour on two cores.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power
from torch.nn.parallel import DistributedDataParallel

import gradprune as gp
from gradprune import lab
from gradprune.lab.zoo.sequences import Recurrent

RANKS, BATCH, STEPS = 2, 128, 210
SEEDS = list(range(5, 10))
TUNING_SEEDS = [100, 101, 102, 103, 104]  # with two, a rate was chosen at which most runs break
RESULT = Path(__file__).resolve().parents[1] / "results" / "compression.json"


class Trained(NamedTuple):
    """A network, its data, and the learning rates among which each method chooses."""

    build: Callable[[], nn.Module]
    data: str
    rates: list[float]


NETWORKS = {
    "perceptron": Trained(lambda: lab.models.mlp([64, 256, 128, 10], "relu"), "digits", [0.3, 1.0, 2.0]),
    "residual": Trained(lab.models.residual, "mnist1d", [0.1, 0.3, 1.0, 2.0]),
    "GRU": Trained(lambda: Recurrent(nn.GRU, 48), "digits", [1.0, 2.0, 4.0, 8.0]),
}
CELLS: list[dict[str, Any]] = []
for network in NETWORKS:
    CELLS += [{"network": network, "method": "dense", "whole": STEPS}]
    for start in (2, 10):  # steps of whole gradients
        CELLS += [{"network": network, "method": method, "whole": start} for method in ("PowerSGD", "TopK")]


def sent_by_power(model: nn.Module) -> int:
    """Return how many numbers a rank sends by PowerSGD of rank 1 in a step, from the shapes alone."""
    sent = 0
    for p in model.parameters():
        rows, columns = len(p), math.prod(p.shape[1:])
        worth = p.dim() > 1 and 2 * (rows + columns) < p.numel()  # torch's rule: else it is sent as it is
        sent += rows + columns if worth else p.numel()
    return sent


def power_bytes(model: nn.Module, whole: int) -> int:
    """Return what a rank sends by PowerSGD in all steps."""
    dense = sum(p.numel() for p in model.parameters())
    return 4 * (whole * dense + (STEPS - whole) * sent_by_power(model))


def attach(ddp: DistributedDataParallel, cell: dict[str, Any]) -> gp.TopK | power.PowerSGDState | None:
    """Give DDP the hook of a method; return its state."""
    entries = sum(p.numel() for p in ddp.parameters())
    if cell["method"] == "dense":
        return None
    if cell["method"] == "PowerSGD":
        state = power.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=cell["whole"])
        ddp.register_comm_hook(state, power.powerSGD_hook)
        return state
    an_entry = 8  # a place and a value
    topk = gp.TopK(ddp, power_bytes(ddp, cell["whole"]) / STEPS / an_entry / entries)
    ddp.register_comm_hook(topk, gp.TopK.hook)
    return topk


def train(cell: dict[str, Any], rate: float, seed: int, *, seen: dict[int, int]) -> tuple[nn.Module, lab.data.Dataset]:
    """Train one network together with the other rank; return it and its data, and leave in `seen` the bytes a step."""
    network = NETWORKS[cell["network"]]
    data = lab.data.load(network.data, seed=seed)
    torch.manual_seed(seed)
    model = network.build()
    ddp = DistributedDataParallel(model)
    state = attach(ddp, cell)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator, order = torch.Generator().manual_seed(seed), list[Tensor]()
    for step in range(STEPS):
        if not order:
            order = list(torch.randperm(len(data.train), generator=generator).split(BATCH))
        own = order.pop(0)[dist.get_rank() :: RANKS]
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(data.train.x[own]), data.train.y[own]).backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / STEPS)
        optimizer.step()
    whole = 4 * sum(p.numel() for p in model.parameters()) * STEPS
    if isinstance(state, gp.TopK):
        sent = state.bytes_sent
    else:
        sent = whole if state is None else power_bytes(model, cell["whole"])
        counted = None if state is None else state.total_numel_after_compression
        assert counted in (None, (STEPS - cell["whole"]) * sent_by_power(model)), "torch sends something else"
    seen[seed] = round(sent / STEPS)
    return model, data


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Tune one method on validation data, then report it on test data."""
    seen: dict[int, int] = {}
    rates = NETWORKS[cell["network"]].rates
    reported = lab.train.tune_and_report(partial(train, cell, seen=seen), rates, tuning_seeds=TUNING_SEEDS, seeds=SEEDS)
    return reported | {"bytes a step": [seen[seed] for seed in SEEDS]}


def work(rank: int, folder: str) -> None:
    """Measure all cells in step with the other rank; the first one writes the result."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    lab.start(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    path = RESULT if rank == 0 else Path(folder) / RESULT.name  # both know alike which cells are left
    lab.experiment.run(
        path,
        CELLS,
        measure,
        seeds=SEEDS,
        about=f"digits, layers of 256, 128, 10 units, or a GRU of 48; MNIST-1D, the residual network; {RANKS} "
        f"processes, {STEPS} steps; accuracy on test data, bytes that a rank gives to the collectives in a step, on "
        "average; whole: steps in which PowerSGD sends whole gradients, and of TopK those whose PowerSGD sends as many "
        "bytes",
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        if RESULT.exists():
            shutil.copy(RESULT, name)
        torch.multiprocessing.spawn(work, (name,), nprocs=RANKS)

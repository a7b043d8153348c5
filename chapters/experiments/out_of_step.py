"""Chapter 9: one network trained, pruned and corrected by several processes, in step and out of step.

`python chapters/experiments/out_of_step.py` writes chapters/results/out_of_step.json; a run that was stopped goes on
where it was.

Every way takes STEPS steps of training and, after pruning to SPARSITY by one ranking, as many again with the masks
held. A step takes BATCH examples, the same in every way: of four processes each takes a quarter. Where gradients or
weights are averaged the rate is that of one process; where each adds its own step to shared weights (asynchronous) it
is divided by their number, which makes the sum of the steps the same. Nothing is tuned.

"synchronous" is DistributedDataParallel; "sharded" FSDP2, "split" tensor parallel, which leave a process a part of the
weights; "averaged" a step of one's own and an average of the weights after every PERIOD; "pairs averaged" two pairs of
processes, synchronous within, averaged over all; "asynchronous" four processes that write the same memory as they come
(Hogwild). "two branches" is another network, side by side, in one process. Rows that are not pruned take as many steps.
Three ways do one thing wrong: prune PERIOD / 4 steps after an average, each by its own weights; prune in four
asynchronous processes, each when it gets there; hold in one of the four alone.

Rows have, by seed: "test", the accuracy; "asked", the share of weights to be removed; "zeros", the share that is zero
at the end; "differ", in how many entries any process's mask is another than that which one process chooses on the same
weights, put together (where each chooses: another than the first one's).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import gradprune as gp
from gradprune import lab

RESULTS = Path(__file__).resolve().parents[1] / "results"
SEEDS = list(range(10))
STEPS, BATCH, RATE, MOMENTUM, SPARSITY, PERIOD = 600, 64, 0.05, 0.9, 0.8, 8
RANKS = {
    "one process": 1,
    "two branches": 1,
    "synchronous": 4,
    "sharded": 3,
    "split": 2,
    "averaged": 4,
    "pairs averaged": 4,
    "averaged, pruned in between": 4,
}
SHARED = ["asynchronous", "asynchronous, each chooses", "asynchronous, one holds"]
CELLS = [
    *({"way": way, "pruned": True} for way in (*RANKS, *SHARED)),
    *({"way": way, "pruned": False} for way in ("one process", "two branches")),
]


class Branches(nn.Module):
    """Two hidden layers side by side, of the same inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 24), nn.Linear(64, 24)
        self.out = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the ten classes."""
        return self.out(torch.cat([self.left(x), self.right(x)], 1).relu())  # type: ignore[no-any-return]


def network(seed: int, way: str = "") -> nn.Module:
    """Return the network of a seed before its first step, the same in every process."""
    torch.manual_seed(seed)
    if way == "two branches":
        return Branches()
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def batches(seed: int, phase: int, part: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a process's part of each step's examples."""
    data = lab.data.load("digits", seed=seed).train
    generator = torch.Generator().manual_seed(2 * seed + phase)
    for _ in range(STEPS):
        chosen = torch.randint(len(data.y), (BATCH,), generator=generator).tensor_split(parts)[part]
        yield data.x[chosen], data.y[chosen]


def train(model: nn.Module, optimizer: Any, examples: Iterator[tuple[Tensor, Tensor]], steps: int = STEPS) -> None:
    """Take so many steps."""
    for _ in range(steps):
        x, y = next(examples)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def sgd(model: nn.Module, share: float = 1.0) -> torch.optim.SGD:
    """Return what steps, at a share of the rate."""
    return torch.optim.SGD(model.parameters(), lr=share * RATE, momentum=MOMENTUM)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together from what the processes hold of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights, whole, by the names that they have in one process."""
    return {name.removeprefix("module."): whole(p).clone() for name, p in model.named_parameters()}


def chosen_alone(way: str, weights: dict[str, Tensor]) -> gp.Masks:
    """Return what one process chooses on the same weights."""
    alone = network(0, way)
    alone.load_state_dict(weights)
    return gp.prune(alone, sparsity=SPARSITY)


def row(way: str, seed: int, weights: dict[str, Tensor], differ: int, pruned: bool) -> dict[str, float]:
    """Return what is said of a seed's final weights. The test part is read here, once."""
    model = network(seed, way)
    model.load_state_dict(weights)
    linear = [weight for weight in weights.values() if weight.dim() == 2]
    zeros, count = (sum(int(f(weight)) for weight in linear) for f in (lambda w: (w == 0).sum(), Tensor.numel))
    return {
        "test": round(lab.train.accuracy(model, lab.data.load("digits", seed=seed).test), 5),
        "asked": round(SPARSITY * count) / count if pruned else 0.0,
        "zeros": zeros / count,
        "differ": differ,
    }


# In step, or averaged: processes that send each other something.


def spread(way: str, model: nn.Module) -> tuple[nn.Module, Any]:
    """Return the model as a way holds it, and what trains it."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import PostLocalSGDOptimizer
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if way == "sharded":
        for layer in (model[0], model[2]):  # type: ignore[index]
            fully_shard(layer)
        model = fully_shard(model)
    elif way == "split":
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif way == "synchronous":
        model = DistributedDataParallel(model)
    elif way == "pairs averaged":
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        model = DistributedDataParallel(model, process_group=pairs[dist.get_rank() // 2])
    if "averaged" in way:
        return model, PostLocalSGDOptimizer(sgd(model), PeriodicModelAverager(PERIOD, warmup_steps=PERIOD - 1))
    return model, sgd(model)


def talk(way: str, pruned: bool, seed: int, rank: int, ranks: int) -> dict[str, float]:
    """Train, prune and correct in one of several processes, and return what the row says, the same on all."""
    parts = (0, 1) if way == "split" else (rank, ranks)  # a split layer sees every example
    model, optimizer = spread(way, network(seed, way))
    train(model, optimizer, batches(seed, 0, *parts))
    further, differ = batches(seed, 1, *parts), 0
    if pruned:
        if "in between" in way:
            train(model, optimizer, further, PERIOD // 4)
        weights = values(model)
        mean = {name: _mean(value) if "averaged" in way else value for name, value in weights.items()}
        wanted = chosen_alone(way, mean)
        masks = gp.prune(model, sparsity=SPARSITY)
        found = [whole(mask) for mask in masks.values()]
        differ = sum(int((mask != other).sum()) for mask, other in zip(found, wanted.values(), strict=True))
        differ = int(_mean(torch.tensor(float(differ)), dist.ReduceOp.MAX))
        masks.hold(optimizer.optim if "averaged" in way else optimizer, model)
    train(model, optimizer, further, STEPS - ("in between" in way and pruned) * PERIOD // 4)
    return row(way, seed, values(model), differ, pruned)


def _mean(value: Tensor, how: Any = None) -> Tensor:
    out = value.clone()
    dist.all_reduce(out, how or dist.ReduceOp.SUM)
    return out if how else out / dist.get_world_size()


def _in_a_group(rank: int, way: str, pruned: bool, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = [talk(way, pruned, seed, rank, ranks) for seed in SEEDS]
    if rank == 0:
        torch.save(rows, f"{folder}/rows")
    dist.barrier()
    dist.destroy_process_group()


# Out of step: processes that write the same memory.


def _on_shared_memory(rank: int, way: str, models: list[nn.Module], barrier: Any, folder: str) -> None:
    torch.set_num_threads(1)
    rows, ranks = [], barrier.parties
    for seed, model in zip(SEEDS, models, strict=True):
        optimizer = sgd(model, 1 / ranks)
        train(model, optimizer, batches(seed, 0, rank, ranks))
        kept = Path(folder, f"{seed}.{rank if 'each' in way else 0}.safetensors")
        if "each" in way:  # when it gets there: the others are still writing
            gp.prune(model, sparsity=SPARSITY).save(kept)
        else:
            barrier.wait()
            if rank == 0:
                before = values(model)
                gp.prune(model, sparsity=SPARSITY).save(kept)
                torch.save(before, f"{folder}/before")
            barrier.wait()
        masks = gp.Masks.load(kept)
        if rank == 0 or "one holds" not in way:
            masks.hold(optimizer, model)
        train(model, optimizer, batches(seed, 1, rank, ranks))
        barrier.wait()
        if rank == 0:
            rows.append(row(way, seed, values(model), _differ(way, seed, ranks, folder), True))
        barrier.wait()
    if rank == 0:
        torch.save(rows, f"{folder}/rows")


def _differ(way: str, seed: int, ranks: int, folder: str) -> int:
    """In how many entries a process's mask differs: from the first one's where each chooses, else from one alone."""
    if "each" in way:
        first, *others = (gp.Masks.load(Path(folder, f"{seed}.{r}.safetensors")) for r in range(ranks))
    else:
        first = chosen_alone(way, torch.load(f"{folder}/before", weights_only=True))
        others = [gp.Masks.load(Path(folder, f"{seed}.0.safetensors"))]
    return max(sum(int((mask != other[name]).sum()) for name, mask in first.items()) for other in others)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one way with all seeds, in processes of its own."""
    way, pruned = cell["way"], cell["pruned"]
    with tempfile.TemporaryDirectory() as folder:
        if way in SHARED:
            models = [network(seed).share_memory() for seed in SEEDS]
            barrier = mp.get_context("spawn").Barrier(4, timeout=300)
            mp.spawn(_on_shared_memory, (way, models, barrier, folder), nprocs=4)
        else:
            mp.spawn(_in_a_group, (way, pruned, RANKS[way], folder), nprocs=RANKS[way])
        rows = torch.load(f"{folder}/rows", weights_only=True)
    return {"processes": 4 if way in SHARED else RANKS[way]} | {key: [r[key] for r in rows] for key in rows[0]}


if __name__ == "__main__":
    lab.start(0)
    about = f"digits, 64-48-10, {STEPS} + {STEPS} steps of {BATCH}, rate {RATE}, momentum {MOMENTUM}, {SPARSITY:.0%}"
    lab.experiment.run(RESULTS / "out_of_step.json", CELLS, measure, seeds=SEEDS, about=about)

"""Masks over shards: time and bytes sent a rank, beside one process on the whole and beside the slowest shard alone.

Each number of ranks starts so many processes, of one thread each. In turn, the first prunes the whole model while the
others wait, all prune it under FSDP2, and each prunes its own blocks without a word to the others. From what was
measured a model on paper says what more ranks would take.
"""

import json
import math
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from record import parser, ratios, settle, summary, write
from torch import nn

import gradprune as gp

SPARSITY = 0.9
PAPER = {"weights": 405e9, "tensors": 1137, "ranks": 1024}  # 126 layers of 9 tensors, and 3


def model_of(weights, tensors):
    torch.manual_seed(0)
    side = math.isqrt(weights // tensors)
    return nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(tensors)))


class Sent:
    """Counts what is handed to collectives: their number, and the bytes of a rank's own part."""

    def __enter__(self):
        self.calls, self.bytes, self._originals = 0, 0, {}
        sizes = {
            "all_reduce": lambda tensor, *_: tensor.nbytes,
            "broadcast": lambda tensor, *_: tensor.nbytes,
            "all_gather_object": lambda _, value, *__: len(pickle.dumps(value)),
        }
        for name, size in sizes.items():
            self._originals[name] = getattr(dist, name)
            setattr(dist, name, self._counting(self._originals[name], size))
        return self

    def _counting(self, function, size):
        def call(*args, **named):
            self.calls, self.bytes = self.calls + 1, self.bytes + size(*args)
            return function(*args, **named)

        return call

    def __exit__(self, *_):
        for name, function in self._originals.items():
            setattr(dist, name, function)


def blocks_of(model):
    """A model of this rank's blocks alone."""
    alone = nn.Module()
    for i, p in enumerate(model.parameters()):
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(p.detach().to_local().clone())
        alone.add_module(str(i), layer)
    return alone


def seconds(call, model, start):
    """Of one call, from weights that were not pruned before."""
    with torch.no_grad():
        for p, old in zip(model.parameters(), start, strict=True):
            (p.detach().to_local() if hasattr(p, "to_local") else p).copy_(old)
    dist.barrier()
    begun = time.perf_counter()
    call(model)
    return time.perf_counter() - begun


def run(rank, ranks, weights, tensors, rounds, folder, port):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    from torch.distributed.fsdp import fully_shard

    model = model_of(weights, tensors)
    if ranks > 1:
        for layer in model:
            fully_shard(layer)
    prune = lambda model: gp.prune(model, sparsity=SPARSITY)  # noqa: E731
    whole = model_of(weights, tensors) if rank == 0 else nn.Module()  # the others wait
    sides = {"whole": whole} | ({"ranks": model, "blocks alone": blocks_of(model)} if ranks > 1 else {})
    start = {name: [p.detach().clone() for p in side.parameters()] for name, side in sides.items()}
    if ranks > 1:
        start["ranks"] = [p.to_local() for p in start["ranks"]]
    taken = {name: [] for name in sides}
    for at in range(rounds + 1):
        for name, side in sides.items():
            once = seconds(prune if rank == 0 or name != "whole" else id, side, start[name])
            slowest = torch.tensor([once], dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if at:  # the first warms up
                taken[name].append(float(slowest))
    name = "ranks" if ranks > 1 else "whole"
    with Sent() as sent:
        seconds(prune, sides[name], start[name])
    waits = []
    for _ in range(50):
        small = torch.zeros(2048)
        begun = time.perf_counter()
        dist.all_reduce(small)
        waits.append(time.perf_counter() - begun)
    if rank == 0:
        found = {"seconds": taken, "calls": sent.calls, "bytes": sent.bytes, "reduction_s": sorted(waits)[25]}
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(ranks, *settings):
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        processes = [spawning.Process(target=run, args=(r, ranks, *settings, Path(name), port)) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        return json.loads((Path(name) / "found.json").read_text())


def on_paper(whole, weights):
    """What more ranks would take: each looks at its own weights, and all talk as often and as much as two do here.

    What is sent depends on the number of tensors, not on their size: it is counted with as many small ones. A sum over
    P ranks by a ring sends twice (P - 1) / P of its bytes, in 2 log2(P) steps by a tree. The time of a step is that of
    one on loopback between two, and says nothing of a real network.
    """
    found = measured(2, 1024 * PAPER["tensors"], PAPER["tensors"], 1)
    share = PAPER["weights"] / PAPER["ranks"]
    steps = 2 * math.log2(PAPER["ranks"])
    local = sorted(whole)[len(whole) // 2] / weights * share
    talk = found["calls"] * steps * found["reduction_s"] / 2
    return PAPER | {
        "own bytes": found["bytes"],
        "bytes sent by a ring": 2 * found["bytes"] * (PAPER["ranks"] - 1) / PAPER["ranks"],
        "seconds at its weights": local,
        "seconds of talk": talk,
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--millions", type=float, default=40, help="weights")
    options.add_argument("--tensors", type=int, default=10)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    options.add_argument("--rounds", type=int, default=9)
    arguments = options.parse_args()
    settle(arguments)
    weights = round(arguments.millions * 1e6)
    every = {n: measured(n, weights, arguments.tensors, arguments.rounds) for n in sorted({1, *arguments.ranks})}
    rows = []
    for ranks, found in every.items():
        whole, side = found["seconds"]["whole"], found["seconds"]["whole" if ranks == 1 else "ranks"]
        alone = found["seconds"].get("blocks alone", side)
        rows.append(
            {"ranks": ranks, "weights": weights, **summary(side), "own bytes": found["bytes"], "calls": found["calls"],
             "over the whole by one": ratios(side, whole), "over the slowest block alone": ratios(side, alone)}
        )  # fmt: skip
    paper = on_paper(every[1]["seconds"]["whole"], weights)
    print(paper)
    write("bench_sharded", rows, seeds=[0], paper=paper)

"""Chapter 8: from which sparsity on is a sparse product faster than a dense one, by size and batch?

`python chapters/experiments/sparse_kernels.py` writes chapters/results/sparse_kernels.json; a run that was stopped goes
on where it was.

One square layer of `size` by `size` single-precision weights, zeros at random, and `batch` inputs: the dense product
and the one of torch's CSR matrix as `gp.compress` has it, with 32-bit indices, from the right or from the left.
Processor time of one thread, in turn, the order drawn anew in each of ROUNDS rounds. Of "CSR" and "removed" the dense
time over theirs, round by round; "CSR" is the way that is faster in the median. "removed" is the dense layer of the
same number of weights: as many rows and columns as that leaves.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gradprune import lab
from gradprune.deploy.sparse import SparseLinear

SIZES, BATCHES = [64, 256, 1024, 2048], [1, 8, 64, 256]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
ROUNDS, LEAST = 15, 0.002
WAYS = ["from the right", "from the left"]


def in_turn(sides: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
    """Return seconds of processor time a call."""
    often = {}
    for name, run in sides.items():
        run()
        start = time.process_time()
        run()
        run()
        often[name] = max(1, int(2 * LEAST / max(time.process_time() - start, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    shuffled = random.Random(0)
    for _ in range(ROUNDS):
        for name in shuffled.sample(list(sides), len(sides)):
            start = time.process_time()
            for _ in range(often[name]):
                sides[name]()
            found[name].append((time.process_time() - start) / often[name])
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, middle, high = (round(float(q), 4) for q in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"median": middle, "low": low, "high": high}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    torch.manual_seed(0)
    size, batch, sparsity = cell["size"], cell["batch"], cell["sparsity"]
    weight = torch.randn(size, size) * (torch.rand(size, size) >= sparsity)
    x = torch.randn(batch, size)
    right, left = (SparseLinear(weight, None, columns=columns).eval() for columns in (False, True))
    narrow = max(1, round(size * (1 - sparsity) ** 0.5))
    small, few = weight[:narrow, :narrow].contiguous(), x[:, :narrow].contiguous()
    sides: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: functional.linear(x, weight),
        "from the right": lambda: right.product(x),
        "from the left": lambda: left.product(x),
        "removed": lambda: functional.linear(few, small),
    }
    for way in WAYS:
        torch.testing.assert_close(sides[way](), sides["dense"](), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        seconds = in_turn(sides)
    dense = seconds["dense"]
    faster = min(WAYS, key=lambda way: float(np.median(seconds[way])))
    chosen = {"CSR": seconds[faster], "removed": seconds["removed"]}
    return {
        "dense ms": round(1000 * float(np.median(dense)), 5),
        "way": faster,
        **{side: spread([d / t for d, t in zip(dense, times, strict=True)]) for side, times in chosen.items()},
    }


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "sparse_kernels.json"
    cells = [{"size": n, "batch": b, "sparsity": s} for n in SIZES for b in BATCHES for s in SPARSITIES]
    lab.experiment.run(path, cells, measure, seeds=[0], about="a square layer, dense against CSR, one thread")

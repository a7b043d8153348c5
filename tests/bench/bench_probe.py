"""What does watching cost? A training step with a Recorder beside the plain one, and k singular values beside all.

    python tests/bench/bench_probe.py

Both sides run in turn, in one process and on one thread; a row is the median of the ratios of neighbours, with their
quartiles. The time is the processor's for this process, so that other programs on the machine weigh less. Writes
`chapters/results/probe_cost.json`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune.lab import experiment, figures

SEED = 0
PAIRS = 10
STEPS = 20  # of one side before the other has its turn; a multiple of the largest `every`
RESULT = Path(__file__).resolve().parents[2] / "chapters" / "results" / "probe_cost.json"


def perceptron() -> tuple[nn.Module, Tensor]:
    """A perceptron 64-512-512-10, and a batch of 128."""
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, torch.randn(128, 64)


def convolutional() -> tuple[nn.Module, Tensor]:
    """Three 3 by 3 convolutions of 16, 32 and 32 channels on images of 28 by 28, and a batch of 64."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 10)), torch.randn(64, 1, 28, 28)


def trainer(make: Callable[[], tuple[nn.Module, Tensor]], **recording: Any) -> Callable[[], None]:
    """Return a function that trains for STEPS steps; with a Recorder if it is given options for one."""
    torch.manual_seed(SEED)
    model, x = make()
    labels = torch.randint(10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if recording:
        gp.Recorder(model, optimizer, **recording)

    def train() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            functional.cross_entropy(model(x), labels).backward()
            optimizer.step()

    return train


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def paired(this: Callable[[], object], that: Callable[[], object], pairs: int) -> dict[str, float]:
    """Time the two in turn, the first of each pair alternating; return their median ratio and its quartiles."""
    this(), that()
    times = []
    for turn in range(pairs):
        if turn % 2:
            first, second = seconds(this), seconds(that)
        else:
            second, first = seconds(that), seconds(this)
        times.append((first, second))
    low, middle, high = statistics.quantiles([a / b for a, b in times], n=4)
    return {
        "ratio": round(middle, 4),
        "ratio_q1": round(low, 4),
        "ratio_q3": round(high, 4),
        "milliseconds": round(1e3 * statistics.median(a for a, _ in times), 3),
        "milliseconds_plain": round(1e3 * statistics.median(b for _, b in times), 3),
        "pairs": pairs,
    }


def recorder_rows() -> list[dict[str, Any]]:
    """Return the cost of recording: a step with a Recorder over the same step without."""
    rows = []
    for name, make in (("mlp 64-512-512-10, batch 128", perceptron), ("convolutional 28x28, batch 64", convolutional)):
        for every in (1, 10):
            for updates in (True, False):
                timed = paired(trainer(make, every=every, updates=updates), trainer(make), PAIRS)
                timed |= {key: round(timed[key] / STEPS, 4) for key in ("milliseconds", "milliseconds_plain")}
                rows.append({"what": "recorder", "model": name, "every": every, "updates": updates} | timed)
                print(rows[-1], flush=True)
    return rows


def jacobian_rows() -> list[dict[str, Any]]:
    """Return the time of the k largest singular values over that of all of them, and the largest error."""
    rows = []
    for width, k in ((256, 4), (1024, 4), (1024, 16)):
        torch.manual_seed(SEED)
        layers = [layer for _ in range(10) for layer in (nn.Linear(width, width), nn.Tanh())]
        model, x = nn.Sequential(*layers), torch.randn(width)
        every = gp.jacobian_singular_values(model, x)
        error = float((gp.jacobian_singular_values(model, x, k=k) - every[:k]).abs().max() / every[0])
        largest = lambda: gp.jacobian_singular_values(model, x, k=k)  # noqa: B023, E731 - used before the next turn
        timed = paired(largest, lambda: gp.jacobian_singular_values(model, x), 5)  # noqa: B023
        rows.append({"what": "jacobian", "model": f"10 tanh layers of {width}", "k": k, "error": error} | timed)
    return rows


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    recorder, jacobian = recorder_rows(), jacobian_rows()
    head = ["model", "every", "updates", "ratio", "ratio_q1", "ratio_q3", "milliseconds", "milliseconds_plain"]
    figures.table(head, [[row[name] for name in head] for row in recorder], digits=4)
    head = ["model", "k", "ratio", "ratio_q1", "ratio_q3", "milliseconds", "milliseconds_plain", "error"]
    figures.table(head, [[row[name] for name in head] for row in jacobian], digits=3)
    about = (
        "Ratio of the processor time with to the time without, both in turn on one thread: median and quartiles over "
        "the pairs. "
        "Recorder: a training step with SGD and momentum. Jacobian: the k largest singular values over all of them; "
        "error is the largest difference over the largest singular value."
    )
    experiment.save(RESULT, experiment.provenance([SEED]) | {"about": about, "threads": 1, "rows": recorder + jacobian})


if __name__ == "__main__":
    main()

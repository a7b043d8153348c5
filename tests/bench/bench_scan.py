"""How much of a scan of layers is spent in the caller's `evaluate`? Each scan is the first call of a fresh process.

The network is transformers' ResNet-50, 25 million weights, with random weights; `evaluate` runs a few small images
through it, far fewer than a validation set has, so that the share that is the scan's own is rather overstated.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from record import _SETTINGS, CLOCKS, parser, settle, write

import gradprune as gp

os.environ["HF_HUB_OFFLINE"] = "1"  # the model is made from a configuration; nothing is downloaded
SPARSITIES = [0.5, 0.8, 0.95]


def network():
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(num_labels=1000)).eval()


def scan(images, size, granularity, clock):
    """Seconds in all and within `evaluate`, and how many evaluations there were."""
    model, x = network(), torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = model(x).logits.argmax(1)
    inside = []

    def evaluate(model):
        start = clock()
        with torch.inference_mode():
            correct = model(x).logits.argmax(1) == truth
        inside.append(clock() - start)
        return correct

    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        found = gp.sensitivity(model, evaluate, SPARSITIES, granularity=granularity, file=Path(folder) / "scan.json")
        whole = clock() - start
    layers = len(found.values)
    assert len(inside) == 1 + layers * len(SPARSITIES)
    return {"layers": layers, "weights": sum(found.weights.values()), "evaluations": len(inside), "seconds": whole,
            "in evaluate": sum(inside)}  # fmt: skip


def in_a_fresh_process(arguments, granularity):
    command = [sys.executable, __file__, "--one", granularity, "--images", str(arguments.images)]
    command += ["--size", str(arguments.size), "--threads", str(arguments.threads), "--clock", arguments.clock]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(runs, granularity, arguments):
    shares = [run["in evaluate"] / run["seconds"] for run in runs]
    own = [1e3 * (run["seconds"] - run["in evaluate"]) / run["evaluations"] for run in runs]
    first = runs[0]
    return {
        "granularity": granularity,
        "layers": first["layers"],
        "weights": first["weights"],
        "sparsities": len(SPARSITIES),
        "evaluations": first["evaluations"],
        "images": f"{arguments.images} of {arguments.size} x {arguments.size}",
        "seconds an evaluation": float(np.median([run["in evaluate"] / run["evaluations"] for run in runs])),
        "share in evaluate": float(np.median(shares)),
        "least share": min(shares),
        "own milliseconds an evaluation": float(np.median(own)),
        "runs": len(runs),
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=64)
    options.add_argument("--size", type=int, default=64, help="pixels a side")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--one", choices=["weight", "channel"], help="for the processes that this one starts")
    arguments = options.parse_args()
    settle(arguments)
    if arguments.one:
        print(json.dumps(scan(arguments.images, arguments.size, arguments.one, CLOCKS[_SETTINGS["clock"]])))
    else:
        rows = [
            row([in_a_fresh_process(arguments, kind) for _ in range(arguments.rounds)], kind, arguments)
            for kind in ("weight", "channel")
        ]
        write("bench_scan", rows, seeds=[0])

"""How long does a checkpoint file take to be pruned, packed and unpacked, against reading and writing it once?

Each run is a fresh process, and its peak of memory that of the whole process, libraries included. "plain" copies the
file in pieces of 1 MiB and syncs it, as the others do; rounds are in turn, each begun by another side, and a ratio is
within a round. The file is in the system's cache when a round begins, for all alike, so that on a disk what is timed is
mostly the writing; the same in memory (/dev/shm) shows what computing costs where a disk is fast.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from record import _SETTINGS, CLOCKS, parser, ratios, settle, write

from gradprune.core import header

WAYS = {
    "prune, global": {"sparsity": 0.5},
    "prune, layer": {"sparsity": 0.5, "scope": "layer"},
    "prune, 2:4": {"granularity": "2:4"},
    "prune, channel": {"sparsity": 0.5, "granularity": "channel"},
}
SIDES = ["plain", *WAYS, "pack", "unpack"]
MEMORY = "/dev/shm"
DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}


def make(path, dtype, gigabytes, width=2048):
    """A file as of a language model: matrices of normal numbers, layer by layer, and an embedding."""
    kinds = {"q": (width, width), "o": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    size = DTYPES[dtype].itemsize
    layers = round(gigabytes * 1e9 / (10 * width * width * size))
    shapes = {f"layers.{i}.{kind}_proj.weight": shape for i in range(layers) for kind, shape in kinds.items()}
    shapes["embed_tokens.weight"] = (8000, width)
    laid = header.laid_out([(n, dtype, s, s[0] * s[1] * size) for n, s in shapes.items()], {"format": "pt"})
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(laid.opening)
        for entry in sorted(laid.entries.values(), key=lambda entry: entry.start):
            values = 0.02 * torch.randn(entry.shape, generator=generator)
            file.write(values.to(DTYPES[dtype]).view(torch.uint8).numpy().data)


def plain(source, target):
    with open(source, "rb", buffering=0) as file, open(target, "wb", buffering=0) as out:
        while piece := file.read(2**20):
            out.write(piece)
        os.fsync(out.fileno())


def one(side, source, target, clock):
    """Seconds of one run, and the most memory that the process ever had, in MB."""
    if side == "plain":
        start = clock()
        plain(source, target)
    elif side in WAYS:
        from gradprune.deploy.pruned import prune_file

        start = clock()
        prune_file(source, target, **WAYS[side])
    else:
        import gradprune as gp

        start = clock()
        (gp.pack if side == "pack" else gp.unpack)(source, target)
    return {"seconds": clock() - start, "peak MB": peak() / 1e6}


def peak():
    """The most memory that this process has had, in bytes: not what its parent had before it became this one."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def in_a_fresh_process(arguments, side, folder):
    """What is packed is the pruned file, what is unpacked the packed one."""
    source = {"pack": "pruned", "unpack": "packed"}.get(side, "in")
    target = {"prune, global": "pruned", "pack": "packed"}.get(side, "out")
    command = [sys.executable, __file__, "--one", side, "--source", str(folder / source)]
    command += ["--target", str(folder / target), "--threads", str(arguments.threads), "--clock", arguments.clock]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"TQDM_DISABLE": "1"})
    (folder / "out").unlink(missing_ok=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows(arguments, dtype, place):
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        make(folder / "in", dtype, arguments.gigabytes)
        sides = SIDES if place == MEMORY else ["plain", "prune, global", "pack", "unpack"]
        runs = {side: [] for side in sides}
        for side in ("prune, global", "pack"):  # what the others read, and not counted
            in_a_fresh_process(arguments, side, folder)
        for turn in range(arguments.rounds):
            at = turn % len(sides)
            for side in sides[at:] + sides[:at]:  # who comes first is another each time: it finds the disk at rest
                runs[side].append(in_a_fresh_process(arguments, side, folder))
        sizes = {
            side: (folder / {"pack": "pruned", "unpack": "packed"}.get(side, "in")).stat().st_size for side in sides
        }
        for side in sides:
            seconds = [run["seconds"] for run in runs[side]]
            yield {
                "dtype": dtype,
                "stored": "in memory" if place == MEMORY else "on the disk",
                "side": side,
                "GB read from": sizes[side] / 1e9,
                "median_s": float(np.median(seconds)),
                "of plain": ratios(seconds, [run["seconds"] for run in runs["plain"]]),
                "peak MB": max(run["peak MB"] for run in runs[side]),
                "runs": len(seconds),
            }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--places", nargs="+", default=[MEMORY, tempfile.gettempdir()])
    options.add_argument("--one", choices=SIDES, help="for the processes that this one starts")
    options.add_argument("--source")
    options.add_argument("--target")
    arguments = options.parse_args()
    settle(arguments)
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.source, arguments.target, CLOCKS[_SETTINGS["clock"]])))
    else:
        found = [row for place in arguments.places for dtype in DTYPES for row in rows(arguments, dtype, place)]
        write("bench_files", found, seeds=[0])

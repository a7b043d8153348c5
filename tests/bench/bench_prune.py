"""Global magnitude pruning, each call the first of a fresh process: beside torch.nn.utils.prune and beside the floor.

The other ways are measured by the same code: a process of its own imports, makes the model, and prunes it once. Time is
that of the call; memory the most that was resident during it beyond what was just before.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from record import CLOCKS, parser, ratios, settle, summary, write
from torch import nn
from torch.nn.utils import prune as torch_prune

import gradprune as gp

OURS, THEIRS, FLOOR = (
    "gradprune.prune",
    "torch.nn.utils.prune.global_unstructured",
    "floor: two reads, one byte a weight",
)


def model_of(weights, dtype=torch.float32, layers=8):
    """Square-ish layers without biases, `weights` in all."""
    width = max(1, round((weights / layers) ** 0.5))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, device="meta", dtype=dtype) for _ in range(layers)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=width**-0.5)
    return model


def ours(model):
    return list(gp.prune(model, sparsity=0.9).values())


def theirs(model):
    layers = [(module, "weight") for module in model]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.9)
    return [module.weight_mask for module in model]


def floor(model):
    """Two reads of every weight and one byte a weight written, and nothing else."""
    marks = [torch.from_numpy(np.empty(p.numel(), np.int8)) for p in model.parameters()]
    for _ in range(2):
        for p in model.parameters():
            p.detach().sum()
    for m in marks:
        m.fill_(1)
    return marks


SIDES = {OURS: ours, THEIRS: theirs, FLOOR: floor}


def one_call(side, weights, dtype, masks_to, clock):
    """What one call takes, in this process; the masks' bits go to a file."""
    model = model_of(weights, getattr(torch, dtype))
    size = sum(p.nbytes for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark is now what is resident
    before = memory("VmRSS")
    start = clock()
    masks = SIDES[side](model)
    seconds = clock() - start
    extra = memory("VmHWM") - before
    if masks_to:
        np.save(masks_to, np.concatenate([np.packbits(m.bool().numpy().reshape(-1)) for m in masks]))
    print(json.dumps({"seconds": seconds, "extra": extra / size}))


def memory(field):
    """Bytes, from what the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_fresh_processes(sides, weights, rounds, options, dtype="float32", folder=None):
    """Seconds and extra memory of each side, `rounds` times in turn, each time in a process of its own."""
    taken = {side: {"seconds": [], "extra": []} for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, __file__, "--side", side, "--weights", str(weights), "--dtype", dtype]
            command += ["--threads", str(options.threads), "--clock", options.clock]
            command += ["--masks-to", f"{folder}/{sides.index(side)}.npy"] if folder else []
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for name, values in taken[side].items():
                values.append(result[name])
    return taken


def same_masks(folder, weights):
    """Whether both sides kept equally many, and where they differ it is between weights of one magnitude."""
    ours, theirs = (np.load(f"{folder}/{i}.npy") for i in range(2))
    if np.array_equal(ours, theirs):
        return True
    model = model_of(weights)
    if np.unpackbits(ours).sum() != np.unpackbits(theirs).sum():
        return False
    magnitudes, start = [], 0
    for p in model.parameters():
        bits = slice(start, start := start + -(-p.numel() // 8))
        differ = np.unpackbits(ours[bits] ^ theirs[bits], count=p.numel()).astype(bool)
        magnitudes.append(p.detach().abs().view(-1)[torch.from_numpy(differ)])
    return torch.cat(magnitudes).unique().numel() <= 1


def compare(weights, rounds, options):
    with tempfile.TemporaryDirectory() as folder:
        sides = [OURS, THEIRS, FLOOR]
        taken = in_fresh_processes(sides, weights, rounds, options, folder=folder)
        same = same_masks(folder, weights)
    seconds = {side: taken[side]["seconds"] for side in sides}
    rows = {side: {"weights": weights, "side": side, **summary(seconds[side]), **extra(taken[side])} for side in sides}
    rows[OURS] |= {
        "times faster": ratios(seconds[THEIRS], seconds[OURS]),
        "same masks but for ties at the threshold": same,
    }
    rows[FLOOR] |= {"ours / floor": ratios(seconds[OURS], seconds[FLOOR])}
    return [rows[side] for side in (THEIRS, OURS, FLOOR)]


def extra(taken):
    return {"extra memory / model": float(np.median(taken["extra"])), "most extra memory / model": max(taken["extra"])}


def half_precision(weights, rounds, options):
    rows = []
    for dtype in ("bfloat16", "float16"):
        taken = in_fresh_processes([OURS], weights, rounds, options, dtype)[OURS]
        rows.append({"weights": weights, "side": f"{OURS}, {dtype}", **summary(taken["seconds"]), **extra(taken)})
    return rows


def growth(sizes, rounds, options):
    rows = []
    for weights in sizes:
        taken = in_fresh_processes([OURS, FLOOR], weights, rounds, options)
        mine = summary(taken[OURS]["seconds"])
        rows.append(
            {"weights": weights, "side": OURS, **mine, "ns a weight": 1e9 * mine["median_s"] / weights,
             "extra memory / model": float(np.median(taken[OURS]["extra"])),
             "ours / floor": ratios(taken[OURS]["seconds"], taken[FLOOR]["seconds"])}
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--millions", type=int, default=100, help="weights of the comparison")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--sizes", type=int, nargs="*", default=[1, 3, 10, 30, 100, 400], help="millions, of the growth"
    )
    options.add_argument("--side", choices=SIDES, help="make one call in this process, and print what it took")
    options.add_argument("--weights", type=int)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--masks-to")
    arguments = options.parse_args()
    settle(arguments)
    if arguments.side:
        one_call(arguments.side, arguments.weights, arguments.dtype, arguments.masks_to, CLOCKS[arguments.clock])
        sys.exit()
    weights = arguments.millions * 10**6
    rows = compare(weights, arguments.rounds, arguments)
    rows += half_precision(weights, 5, arguments)
    rows += growth([n * 10**6 for n in arguments.sizes], 5, arguments)
    write("bench_prune", rows, seeds=[0], sparsity=0.9, dtype="float32", calls="the first of a fresh process each")

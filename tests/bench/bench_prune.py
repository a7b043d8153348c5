"""Global magnitude pruning: time and memory beside torch.nn.utils.prune, growth with size, distance to the floor."""

import numpy as np
import torch
from record import PeakMemory, in_turn, parser, ratios, settle, summary, write
from torch import nn
from torch.nn.utils import prune as torch_prune

import gradprune as gp


def model_of(weights, layers=8):
    """Square-ish layers without biases, `weights` in all."""
    width = max(1, round((weights / layers) ** 0.5))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False, device="meta") for _ in range(layers)))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=width**-0.5)
    return model


def floor(model):
    """Two reads of every weight and one byte a weight written, and nothing else."""
    marks = [np.empty(p.numel(), np.int8) for p in model.parameters()]
    for _ in range(2):
        for p in model.parameters():
            p.detach().sum()
    for m in marks:
        torch.from_numpy(m).fill_(1)
    return marks


def theirs(model):
    layers = [(module, "weight") for module in model]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.9)


def undo_theirs(model):
    for module in model:
        torch_prune.remove(module, "weight")


def restore(model, dense):
    with torch.no_grad():
        for p, d in zip(model.parameters(), dense, strict=True):
            p.copy_(d)


def compare(weights, rounds):
    model = model_of(weights)
    dense = [p.detach().clone() for p in model.parameters()]
    size = sum(p.nbytes for p in dense)
    gp.prune(model, sparsity=0.9)  # first use of memory and threads
    restore(model, dense)
    with PeakMemory() as ours_memory:
        masks = gp.prune(model, sparsity=0.9)
    kept = [m.clone() for m in masks.values()]
    del masks
    restore(model, dense)
    with PeakMemory() as their_memory:
        theirs(model)
    theirs_kept = [module.weight_mask.bool() for module in model]
    differ = torch.cat([d[a != b].abs() for d, a, b in zip(dense, kept, theirs_kept, strict=True)])
    counts = [sum(int(m.sum()) for m in masks) for masks in (kept, theirs_kept)]
    same = counts[0] == counts[1] and differ.unique().numel() <= 1
    del theirs_kept
    undo_theirs(model)
    del kept

    ours_seconds, their_seconds, floors = [], [], []
    for _ in range(rounds):
        restore(model, dense)
        their_seconds += in_turn({"theirs": lambda: theirs(model)}, 1)["theirs"]
        undo_theirs(model)
        several = in_turn(
            {"ours": lambda: gp.prune(model, sparsity=0.9), "floor": lambda: floor(model)},
            5,
            before=lambda: restore(model, dense),
        )
        ours_seconds.append(float(np.median(several["ours"])))
        floors.append(float(np.median(several["floor"])))
    return [
        {"weights": weights, "side": "torch.nn.utils.prune.global_unstructured", **summary(their_seconds),
         "extra memory / model": their_memory.extra / size},
        {"weights": weights, "side": "gradprune.prune", **summary(ours_seconds),
         "extra memory / model": ours_memory.extra / size, "times faster": ratios(their_seconds, ours_seconds),
         "same masks but for ties at the threshold": same},
        {"weights": weights, "side": "floor: two reads, one byte a weight", **summary(floors),
         "ours / floor": ratios(ours_seconds, floors)},
    ]  # fmt: skip


def growth(sizes, runs):
    rows = []
    for weights in sizes:
        model = model_of(weights)
        dense = [p.detach().clone() for p in model.parameters()]
        sides = {"ours": lambda m=model: gp.prune(m, sparsity=0.9), "floor": lambda m=model: floor(m)}
        in_turn(sides, 1)
        seconds = in_turn(sides, runs, before=lambda m=model, d=dense: restore(m, d))
        ours = summary(seconds["ours"])
        rows.append(
            {"weights": weights, "side": "gradprune.prune", **ours, "ns a weight": 1e9 * ours["median_s"] / weights,
             "ours / floor": ratios(seconds["ours"], seconds["floor"])}
        )  # fmt: skip
        del model, dense, sides
    return rows


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--millions", type=int, default=100, help="weights of the comparison")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--sizes", type=int, nargs="*", default=[1, 3, 10, 30, 100, 400], help="millions, of the growth"
    )
    arguments = options.parse_args()
    settle(arguments)
    compared = compare(arguments.millions * 10**6, arguments.rounds)
    grown = growth([n * 10**6 for n in arguments.sizes], 5)
    write("bench_prune", compared + grown, seeds=[0], sparsity=0.9, dtype="float32")

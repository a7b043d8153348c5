"""The k-th of many values beside a plain sort, topk, kthvalue and NumPy's partition; channels beside Torch-Pruning."""

import importlib.metadata
import itertools

import numpy as np
import torch
from record import PeakMemory, in_turn, parser, ratios, settle, summary, write
from torch import nn

import gradprune as gp


def threshold_sides(tensors, k):
    """Each finds the k-th smallest magnitude over all tensors, from the tensors as they are."""
    total = sum(t.numel() for t in tensors)
    joined = lambda: torch.cat([t.abs().view(-1) for t in tensors])  # noqa: E731
    return {
        "gradprune.kth_smallest": lambda: gp.kth_smallest(tensors, k, by="magnitude"),
        "numpy.partition": lambda: torch.tensor(np.partition(joined().numpy(), k - 1)[k - 1]),
        "torch.kthvalue": lambda: joined().kthvalue(k).values,
        "torch.topk": lambda: joined().topk(total - k + 1).values[-1],
        "torch.sort": lambda: joined().sort().values[k - 1],
    }


def thresholds(weights, rounds, dtype):
    torch.manual_seed(0)
    tensors = list(torch.randn(weights).to(dtype).split(weights // 8))
    k = round(0.9 * weights)
    sides = threshold_sides(tensors, k)
    if dtype != torch.float32:
        del sides["numpy.partition"]  # no bfloat16
    size = sum(t.nbytes for t in tensors)
    memory, answers = {}, {}
    for name, run in sides.items():
        with PeakMemory() as peak:
            answers[name] = run().item()
        memory[name] = peak.extra / size
    seconds = in_turn(sides, rounds)
    ours = seconds["gradprune.kth_smallest"]
    return [
        {"task": f"threshold of {weights:,} {dtype}", "side": name, **summary(seconds[name]),
         "times as long as ours": ratios(seconds[name], ours), "extra memory / values": memory[name],
         "same answer": answers[name] == answers["gradprune.kth_smallest"]}
        for name in sides
    ]  # fmt: skip


def network():
    torch.manual_seed(0)
    widths = [3, 64, 128, 256, 256, 512, 512]
    convolutions = [
        layer
        for a, b in itertools.pairwise(widths)
        for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
    ]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def channels(rounds):
    """Which half of the channels goes, over all layers: the choice alone, nothing is removed."""
    try:
        import torch_pruning as tp
    except ImportError:
        print("Torch-Pruning is not installed: its row is left out")
        return []
    model, example = network(), torch.randn(1, 3, 16, 16)

    def theirs():
        pruner = tp.pruner.BasePruner(
            model, example, importance=tp.importance.GroupMagnitudeImportance(p=1), global_pruning=True,
            pruning_ratio=0.5, ignored_layers=[model[-1]],
        )  # fmt: skip
        return list(pruner.step(interactive=True))

    def ours():
        return gp.prune(model, sparsity=0.5, granularity="channel", exclude=["20.*"])

    sides = {"gradprune.prune, channels": ours, "Torch-Pruning, groups with their dependency graph": theirs}
    in_turn(sides, 1)
    seconds = in_turn(sides, rounds)
    first = seconds["gradprune.prune, channels"]
    return [
        {"task": "half of the channels of 6 layers", "side": name, **summary(seconds[name]),
         "times as long as ours": ratios(seconds[name], first)}
        for name in sides
    ]  # fmt: skip


def installed_version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--millions", type=int, default=20)
    options.add_argument("--rounds", type=int, default=3)
    arguments = options.parse_args()
    settle(arguments)
    rows = thresholds(arguments.millions * 10**6, arguments.rounds, torch.float32)
    rows += thresholds(arguments.millions * 10**6, arguments.rounds, torch.bfloat16)
    rows += channels(arguments.rounds)
    write("bench_select", rows, seeds=[0], rank=0.9, torch_pruning=installed_version("torch-pruning"))

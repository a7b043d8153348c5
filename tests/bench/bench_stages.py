"""Where does the usual way to prune by magnitude spend its time? Seconds by kind of operation, by torch's profiler."""

from collections import Counter

import torch
from bench_prune import THEIRS, model_of, theirs
from record import parser, ratios, settle, summary, write
from torch.profiler import ProfilerActivity, profile

BY_HAND = "concatenate, argsort, mask"
KINDS = {
    "put in order": ("topk", "sort", "argsort"),
    "read and write by index": ("index", "index_put_", "_index_put_impl_", "nonzero"),
    "copy and convert": ("copy_", "cat", "clone", "_to_copy"),
}
OTHERS = "arithmetic and the rest"


@torch.no_grad()
def by_hand(model):
    """Global magnitude pruning as the chapter writes it out."""
    matrices = list(model.parameters())
    sizes = torch.cat([matrix.abs().flatten() for matrix in matrices])
    order = sizes.argsort(stable=True)
    stays = torch.ones_like(sizes, dtype=torch.bool)
    stays[order[: round(0.9 * len(sizes))]] = False
    for matrix, part in zip(matrices, stays.split([matrix.numel() for matrix in matrices]), strict=True):
        matrix.mul_(part.view_as(matrix))


def seconds_by_kind(prune, weights):
    """One call's seconds within torch's operators, by kind."""
    model = model_of(weights)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        prune(model)
    taken = Counter(dict.fromkeys((*KINDS, OTHERS), 0.0))
    for event in watched.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names), OTHERS)
        taken[kind] += event.self_cpu_time_total * 1e-6
    return taken


def measure(side, prune, weights, rounds):
    runs = [seconds_by_kind(prune, weights) for _ in range(rounds)]
    whole = [sum(run.values()) for run in runs]
    return [
        {"side": side, "weights": weights, "kind": kind, **summary([run[kind] for run in runs]),
         "share of the call": ratios([run[kind] for run in runs], whole)}
        for kind in runs[0]
    ]  # fmt: skip


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--millions", type=int, default=20, help="weights")
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    settle(arguments)
    rows = []
    for side, prune in ((THEIRS, theirs), (BY_HAND, by_hand)):
        rows += measure(side, prune, arguments.millions * 10**6, arguments.rounds)
    write("bench_stages", rows, seeds=[0], sparsity=0.9, dtype="float32")

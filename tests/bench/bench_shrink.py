"""Does a shrunk network save the time that its FLOPs say, on one thread?

The chapters' residual network, at several widths, loses half the channels of each coupled group, those of the least
magnitude as Torch-Pruning's own pruner would choose; dense, masked and shrunk run in turn. The masked network is as
slow as the dense one. Small layers are bound by what each call costs, wide ones by their products.
"""

import copy
import statistics

import torch
from record import in_turn, parser, ratios, settle, summary, write

import gradprune as gp
from gradprune.core.coupled import coupled, reads
from gradprune.deploy.cut import rows
from gradprune.lab import models


def halved(model, x):
    """A copy with half of each group's channels at zero, and which entries that are, as masks."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for group in coupled(model, x, "the benchmark"):
        if group.stays or not any(map(reads, group.parts)):
            continue
        size = {id(u): sum(float(rows(p, cs).norm()) for p, cs in u.items() if p.side != "in"
                           and p.module.weight.dim() > 1) for u in group.units}  # fmt: skip
        for unit in sorted(group.units, key=lambda u: size[id(u)])[: len(group.units) // 2]:
            for part, cs in unit.items():
                for attribute in ("weight", "bias") if part.side != "in" else ():
                    if f"{part.name}.{attribute}" in masks:
                        masks[f"{part.name}.{attribute}"][list(cs)] = False
    masked = copy.deepcopy(model)
    return masked, gp.Masks(masks).apply_(masked)


@torch.inference_mode()
def run(model, x, times):
    for _ in range(times):
        model(x)


def row(width, batch, arguments):
    torch.manual_seed(0)
    model, x = models.residual(width).eval(), torch.randn(batch, 40)
    masked, _ = halved(model, x)
    small = gp.shrink(masked, x).eval()
    flops = [gp.report(network, x).total.flops for network in (model, small)]
    with torch.no_grad():
        apart = float((masked(x) - small(x)).abs().max())
    sides = {"dense": model, "masked": masked, "shrunk": small}
    run(model, x, 3)
    took = in_turn({name: lambda n=n: run(n, x, arguments.times) for name, n in sides.items()}, arguments.rounds)
    time = ratios(took["dense"], took["shrunk"])
    saved = flops[0] / flops[1]
    return {
        "width": width,
        "batch": batch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters left": sum(p.numel() for p in small.parameters()),
        "FLOPs ratio": saved,
        "time ratio": time,
        "FLOPs over time": saved / statistics.median(time.values()),
        "masked over dense": ratios(took["masked"], took["dense"]),
        "largest difference": apart,
        **{f"{name} ms": 1e3 * summary(seconds)["median_s"] / arguments.times for name, seconds in took.items()},
        "runs": arguments.rounds,
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.set_defaults(threads=1)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--times", type=int, default=10, help="forward passes a run")
    arguments = options.parse_args()
    settle(arguments)
    rows_of = [row(width, batch, arguments) for width, batch in ((32, 1), (32, 64), (128, 64), (256, 64))]
    write("bench_shrink", rows_of, seeds=[0])

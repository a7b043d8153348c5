"""Does a shrunk network save the time that its FLOPs say, on one thread?

The chapters' residual network, at several widths, loses half the channels of each coupled group, those of the least
magnitude; dense, masked and shrunk run in turn. The masked network is as slow as the dense one. Narrow layers are bound
by what each call costs, wide ones by their products.
"""

import copy
import statistics

import torch
from record import in_turn, parser, ratios, settle, summary, write

import gradprune as gp
from gradprune.lab import models


@torch.inference_mode()
def run(model, x, times):
    for _ in range(times):
        model(x)


def row(width, batch, arguments):
    torch.manual_seed(0)
    model, x = models.residual(width).eval(), torch.randn(batch, 40)
    masked = copy.deepcopy(model)
    gp.prune(masked, sparsity=0.5, scope="layer", granularity="group", example=x)
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
    found = [row(width, batch, arguments) for width, batch in ((32, 1), (32, 64), (128, 64), (256, 64), (512, 64))]
    write("bench_shrink", found, seeds=[0])

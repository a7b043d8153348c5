"""Clipping beside torch's own, and adaptive clipping beside a loop over the tensors and timm's.

    python tests/bench/bench_clip.py

timm need not be importable whole: of an installed copy, wherever it is on the path, only the file of the function is
loaded, which needs nothing but torch.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from record import in_turn, parser, ratios, settle, summary, write
from torch import nn

import gradprune as gp

FAR, NEAR = 1e-3, 1e9  # times the bound at which clipping has much to do and nothing at all


def perceptron():
    return [(64, 64), (64,), (10, 64), (10,)]


def transformer():
    layer = nn.TransformerEncoderLayer(256, 4, 1024)
    return [tuple(p.shape) for p in layer.parameters()] * 12


def convolutions():
    widths = [64, 128, 256, 512]
    shapes = [[(w, w, 3, 3), (w,), (w,), (4 * w, w, 1, 1), (4 * w,), (4 * w,)] * 3 for w in widths]
    return [shape for stage in shapes for shape in stage]


CASES = {  # shapes, and how many rounds to time
    "4 small": (perceptron(), 400),
    "200 small": ([(32, 32), (32,)] * 100, 100),
    "200 small, all shapes": ([(32 + i, 32) for i in range(100)] + [(32 + i,) for i in range(100)], 100),
    "transformer, 144 tensors, 9.5 M": (transformer(), 20),
    "conv net, 72 tensors, 14 M": (convolutions(), 20),
    "2 large, 34 M": ([(4096, 4096)] * 2, 10),
}


@torch.no_grad()
def loop_over_tensors(parameters, factor=0.01, eps=1e-3):
    """Brock et al., equation 3, one tensor after the other."""
    for parameter in parameters:
        dims = tuple(range(1, parameter.ndim)) or None
        weight = torch.linalg.vector_norm(parameter, dim=dims, keepdim=True).clamp_(min=eps)
        norm = torch.linalg.vector_norm(parameter.grad, dim=dims, keepdim=True)
        bounded = parameter.grad * (factor * weight / norm.clamp(min=1e-6))
        parameter.grad.copy_(torch.where(norm > factor * weight, bounded, parameter.grad))


def timms():
    """timm's adaptive_clip_grad and its version, or nothing where timm is not installed."""
    try:
        found = importlib.metadata.distribution("timm")
    except importlib.metadata.PackageNotFoundError:
        return None, None
    path = Path(str(found.locate_file("timm/utils/agc.py")))
    spec = importlib.util.spec_from_file_location("agc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad, found.version


def made(shapes, dtype):
    """Parameters with gradients a hundred times their size, and what sets these back to what they were."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(0.1 * torch.randn(shape, dtype=torch.float32).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = 10 * torch.randn_like(parameter)
    grads = [parameter.grad for parameter in parameters]
    originals = [grad.clone() for grad in grads]
    return parameters, lambda: torch._foreach_copy_(grads, originals)


def compared(kind, task, case, shapes, rounds, sides, dtype=torch.float32):
    """Rows of one task: the first of the sides is ours, and the others are the measure."""
    parameters, restore = made(shapes, dtype)
    calls = {name: lambda side=side: side(parameters) for name, side in sides.items()}
    in_turn(calls, 2, before=restore)
    seconds = in_turn(calls, rounds, before=restore)
    ours = next(iter(seconds))
    return [
        {"kind": kind, "task": task, "gradients": case, "side": name, **summary(taken),
         f"{kind} ratio": ratios(seconds[ours], taken) if name != ours else None}
        for name, taken in seconds.items()
    ]  # fmt: skip


def rows(scale):
    theirs, version = timms()
    timm = {f"timm {version}": theirs} if theirs else {}
    found = []
    for case, (shapes, most) in CASES.items():
        rounds = max(3, round(most * scale))
        for what, bound in (("engaged", FAR), ("idle", NEAR)):
            found += compared("norm", what, case, shapes, rounds, {
                "gradprune": lambda p, bound=bound: gp.clip_by_norm_(p, bound),
                "torch": lambda p, bound=bound: nn.utils.clip_grad_norm_(p, bound),
            })  # fmt: skip
            found += compared("value", what, case, shapes, rounds, {
                "gradprune": lambda p, bound=bound: gp.clip_by_value_(p, bound),
                "torch": lambda p, bound=bound: nn.utils.clip_grad_value_(p, bound),
            })  # fmt: skip
        for what, factor in (("engaged", 0.01), ("idle", 1e6)):
            found += compared("adaptive", what, case, shapes, max(3, rounds // 2), {
                "gradprune": lambda p, factor=factor: gp.clip_adaptive_(p, factor),
                "loop over the tensors": lambda p, factor=factor: loop_over_tensors(p, factor),
                **{name: lambda p, factor=factor, side=side: side(p, factor) for name, side in timm.items()},
            })  # fmt: skip
    case = "2 large, 34 M"
    for dtype in (torch.float16, torch.bfloat16):
        found += compared("norm", str(dtype).removeprefix("torch."), case, CASES[case][0], max(3, round(10 * scale)), {
            "gradprune": lambda p: gp.clip_by_norm_(p, FAR),
            "torch": lambda p: nn.utils.clip_grad_norm_(p, FAR),
        }, dtype)  # fmt: skip
    return found


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--scale", type=float, default=1.0, help="of the number of rounds; 0.1 for a first look")
    arguments = options.parse_args()
    settle(arguments)
    write(
        "bench_clip",
        [{key: value for key, value in row.items() if value is not None} for row in rows(arguments.scale)],
        seeds=[0],
        about="engaged: every gradient, entry or unit far over its bound; idle: none. Gradients are restored before "
        "each call, outside the time. The ratio is our time over this side's, turn by turn.",
    )

"""A training step with held masks beside the dense step and the usual ways to hold masks; memory over rounds."""

import ctypes
import gc
import sys

import torch
from record import _resident, parser, ratios, settle, summary, timed, write
from torch import nn
from torch.nn.utils import prune as torch_prune

import gradprune as gp


def mlp(width, depth):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


def convnet(width):
    return nn.Sequential(
        *(layer for i in range(4) for layer in (nn.Conv2d(3 if i == 0 else width, width, 3, padding=1), nn.ReLU()))
    )


class Block(nn.Module):
    """One transformer layer, so that matrices meet many tokens."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x)


CASES = {
    "MLP 4 x 1024, batch 128": (lambda: mlp(1024, 4), (128, 1024)),
    "MLP 4 x 1024, batch 512": (lambda: mlp(1024, 4), (512, 1024)),
    "MLP 4 x 1024, batch 32": (lambda: mlp(1024, 4), (32, 1024)),
    "convolutions 4 x 64, batch 16 of 24 x 24": (lambda: convnet(64), (16, 3, 24, 24)),
    "transformer layer of 512, 16 x 32 tokens": (lambda: Block(512), (16, 32, 512)),
    "MLP 100 x 64, batch 64": (lambda: mlp(64, 100), (64, 64)),
}
OPTIMIZERS = {
    "SGD with momentum": lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-5),
}


def training_step(model, optimizer, x, after=lambda: None):
    """Fit fixed random targets, so that the gradients are neither zero nor vanishing, as Adam's speed depends on it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        y = torch.randn(model(x).shape, generator=generator)

    def step():
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        after()

    return step


def mask_weights_and_state(model, optimizer, masks):
    """The straightforward way: after each step, multiply the weights and the optimizer's state by float masks."""
    multipliers = {model.get_parameter(n): m.float() for n, m in masks.items()}

    @torch.no_grad()
    def after():
        for p, m in multipliers.items():
            p.mul_(m)
            for value in optimizer.state[p].values():
                if isinstance(value, torch.Tensor) and value.shape == m.shape:
                    value.mul_(m)

    return after


def sides(make_model, make_optimizer, x):
    def fresh():
        torch.manual_seed(0)
        model = make_model()
        return model, make_optimizer(model.parameters())

    dense, dense_optimizer = fresh()
    held, held_optimizer = fresh()
    gp.prune(held, sparsity=0.9).hold(held_optimizer)
    after, after_optimizer = fresh()
    masks = gp.prune(after, sparsity=0.9)
    theirs, their_optimizer = fresh()
    if not any(isinstance(m, nn.MultiheadAttention) for m in theirs.modules()):  # its fast path reads the weights
        layers = [(m, "weight") for m in theirs.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.9)
    else:
        theirs = None
    steps = {
        "dense": training_step(dense, dense_optimizer, x),
        "gradprune hold": training_step(held, held_optimizer, x),
        "weights and state masked after the step": training_step(
            after, after_optimizer, x, mask_weights_and_state(after, after_optimizer, masks)
        ),
    }
    if theirs is not None:
        steps["torch.nn.utils.prune"] = training_step(theirs, their_optimizer, x)
    return steps


def step_times(rounds):
    rows = []
    for case, (make_model, shape) in CASES.items():
        for optimizer, make_optimizer in OPTIMIZERS.items():
            torch.manual_seed(1)
            steps = sides(make_model, make_optimizer, torch.randn(shape))
            seconds = {name: [] for name in steps}
            for _ in range(rounds + 1):
                for name, step in steps.items():
                    step()  # brings this side's model into the caches
                    seconds[name].append(timed(step))
            seconds = {name: measured[1:] for name, measured in seconds.items()}
            for name, measured in seconds.items():
                rows.append({"case": case, "optimizer": optimizer, "side": name, **summary(measured),
                             "of the dense step": ratios(measured, seconds["dense"])})  # fmt: skip
            del steps
            gc.collect()
    return rows


def _give_back():
    """What nobody holds goes back to the system, so that resident memory is memory held."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def memory_over_rounds():
    """Resident bytes after each of six pruning rounds with the same model and optimizer, a step after each."""
    torch.manual_seed(0)
    model = mlp(2048, 4)
    size = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    x = torch.randn(32, 2048)
    step = training_step(model, optimizer, x)
    step()
    _give_back()
    before, rows = _resident(), []
    for pruning_round in range(1, 7):
        gp.prune(model, sparsity=1 - 0.7**pruning_round).hold(optimizer)
        step()
        _give_back()
        rows.append({"case": f"after pruning round {pruning_round}", "resident beyond the dense model / model":
                     (_resident() - before) / size})  # fmt: skip
    return rows


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=15)
    arguments = options.parse_args()
    settle(arguments)
    memory = memory_over_rounds()
    write(
        "bench_hold",
        step_times(arguments.rounds) + memory,
        seeds=[0, 1],
        sparsity=0.9,
        dtype="float32",
    )

"""Chapter 5: the pruned residual network trained on in four ways, its mask asked what it knows, and smaller networks.

`python chapters/experiments/residual_correction.py` writes chapters/results/residual_correction.json; a run that was
stopped goes on where it was.

Every training takes STEPS steps, those of the dense network of `residual_pruning`, at its rate; nothing is tuned.
"Corrected": pruned at once and trained on from a tenth of the rate (fine-tuned) or from the whole of it (learning rate
rewound), pruned in ROUNDS rounds that share the steps, or given back the weights of step EARLY (weights rewound); the
optimizer starts anew, and so does the schedule. The dense network is trained on as long at both rates. "Mask": the mask
of the trained network on its own initial weights, or one thing of the two changed; "shares made equal" draws at random
a mask that leaves the same share of every layer. "Shared by": weights rewound, but the layers share the loss by another
rule than one ranking of all weights. "Smaller": a dense network of the width whose parameters, or FLOPs, are nearest to
those that the pruned network has left. "Costs": what each pruned network takes, and the bytes of its file as torch
writes it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import residual_pruning as base
import torch
from residual_pruning import STEPS
from torch import Tensor, nn

import gradprune as gp
from gradprune import lab

SEEDS = list(range(5))
SPARSITIES = [0.8, 0.9, 0.95, 0.98]
ASKED = [0.9, 0.95]
RULES, RULED = ["lamp"], [0.9, 0.95, 0.98]
EQUAL = "shares made equal"
EARLY, ROUNDS = STEPS // 10, 4
METHODS = ["fine-tuned", "rounds", "weights rewound", "learning rate rewound"]
FURTHER_BATCHES = 1000  # added to the seed: what is trained on sees the batches in another order


def initial(seed: int, draw: int = 0) -> nn.Module:
    """Return the network of a seed before its first step; another `draw` gives other weights."""
    torch.manual_seed(seed + 10_000 * draw)
    return lab.models.residual()


@cache
def _early(seed: int) -> dict[str, Tensor]:
    model = initial(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=base.RATE, weight_decay=base.DECAY)
    shape = lab.train.cosine(STEPS)
    lab.train.fit(model, base.data(seed), steps=EARLY, optimizer=optimizer, seed=seed, watch=False, rate=shape)
    return model.state_dict()


def corrected(seed: int, method: str, sparsity: float, rule: str = "global") -> nn.Module:
    """Return the trained network, pruned to `sparsity` (0: not at all) and corrected in STEPS steps."""
    model, batches = base.dense(seed), seed + FURTHER_BATCHES
    share = 0.1 if method == "fine-tuned" else 1.0
    if method == "rounds":
        for number in range(1, ROUNDS + 1):
            masks = gp.prune(model, sparsity=1 - (1 - sparsity) ** (number / ROUNDS))
            base.train(model, seed, STEPS // ROUNDS, share, masks, order=batches + number)
        return model
    masks = gp.prune(model, sparsity=sparsity, scope=rule) if sparsity else None
    if method == "weights rewound":
        model.load_state_dict(_early(seed))
        if masks is not None:
            masks.apply_(model)
    base.train(model, seed, STEPS, share, masks, order=batches)
    return model


def _shuffled(x: Tensor) -> Tensor:
    return x.flatten()[torch.randperm(x.numel())].view_as(x)


Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# Each is given a layer's mask, its initial weights and other weights drawn alike; it returns a mask and weights.
CHANGES: dict[str, Change] = {
    "nothing": lambda mask, weight, other: (mask, weight),
    "mask shuffled in each layer": lambda mask, weight, other: (_shuffled(mask), weight),
    "mask's rows permuted": lambda mask, weight, other: (mask[torch.randperm(len(mask))], weight),
    "weights drawn anew": lambda mask, weight, other: (mask, other),
    "signs kept, magnitudes drawn anew": lambda mask, weight, other: (mask, weight.sign() * other.abs()),
    "signs kept, magnitudes permuted among those left": lambda mask, weight, other: (mask, _permuted(mask, weight)),
    "signs flipped": lambda mask, weight, other: (mask, -weight),
    "signs drawn anew": lambda mask, weight, other: (mask, weight.abs() * other.sign()),
}


def _permuted(mask: Tensor, weight: Tensor) -> Tensor:
    left = weight[mask]
    out = weight.clone()
    out[mask] = left.sign() * _shuffled(left.abs())
    return out


def changed(seed: int, change: str, sparsity: float) -> tuple[nn.Module, gp.Masks]:
    """Return the initial network under the mask that magnitude finds after training, one thing changed."""
    found = gp.prune(base.dense(seed), sparsity=sparsity)
    model, others = initial(seed), dict(initial(seed, draw=1).named_parameters())
    torch.manual_seed(seed + 20_000)
    if change == EQUAL:
        return model, gp.prune(model, gp.random, sparsity=sparsity, scope="layer")
    masks = {}
    with torch.no_grad():
        for name, mask in found.items():
            weight = model.get_parameter(name)
            masks[name], new = CHANGES[change](mask, weight.clone(), others[name])
            weight.copy_(new)
    return model, gp.Masks(masks).apply_(model)


@cache
def size(width: int) -> tuple[int, int]:
    """Return the parameters and the FLOPs of a dense network."""
    total = gp.report(lab.models.residual(width), torch.zeros(1, 40)).total
    return total.parameters, total.flops


def left(seed: int, sparsity: float) -> tuple[int, int]:
    """Return the parameters and the FLOPs that the pruned network has left."""
    model = base.dense(seed)
    masks = gp.prune(model, sparsity=sparsity)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    total = gp.report(model, torch.zeros(1, 40)).total
    return total.parameters - removed, total.effective_flops


def costs(seed: int, sparsity: float) -> dict[str, Any]:
    """Return what the pruned network takes."""
    model = base.dense(seed)
    if sparsity:
        gp.prune(model, sparsity=sparsity)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return gp.report(model, torch.zeros(1, 40)).total._asdict() | {"bytes of the file": file.tell()}


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    seed, what, sparsity = cell["seed"], cell["what"], cell.get("sparsity", 0.0)
    if what == "costs":
        return {key: value for key, value in costs(seed, sparsity).items() if key not in ("name", "kind")}
    found: dict[str, Any] = {}
    if what == "corrected":
        model = corrected(seed, cell["method"], sparsity)
    elif what == "mask":
        model, masks = changed(seed, cell["change"], sparsity)
        base.train(model, seed, STEPS, masks=masks)
    elif what == "shared by":
        model = corrected(seed, "weights rewound", sparsity, cell["rule"])
    else:
        of, wanted = (0, 1)[cell["equal"] == "FLOPs"], left(seed, sparsity)
        width = min(range(1, 33), key=lambda width: abs(size(width)[of] - wanted[of]))
        found = {"width": width, "wanted": wanted[of], "taken": size(width)[of]}
        torch.manual_seed(seed)
        model = lab.models.residual(width)
        base.train(model, seed, STEPS)
    parts = ("validation", "test")
    return found | {part: round(lab.train.accuracy(model, getattr(base.data(seed), part)), 4) for part in parts}


def cells(seed: int) -> list[dict[str, Any]]:
    """Return what is measured with one seed."""
    dense = [{"what": "corrected", "method": method, "sparsity": 0.0} for method in (METHODS[0], METHODS[-1])]
    rows = [
        *({"what": "costs", "sparsity": s} for s in (0.0, *SPARSITIES)),
        *dense,
        *({"what": "corrected", "method": method, "sparsity": s} for s in SPARSITIES for method in METHODS),
        *({"what": "mask", "change": change, "sparsity": s} for s in ASKED for change in (*CHANGES, EQUAL)),
        *({"what": "smaller", "equal": of, "sparsity": s} for s in SPARSITIES for of in ("parameters", "FLOPs")),
        *({"what": "shared by", "rule": rule, "sparsity": s} for s in RULED for rule in RULES),
    ]
    return [{"seed": seed} | row for row in rows]


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "residual_correction.json"
    about = "lab.models.residual on MNIST-1D: pruned and trained on, masks on initial weights, smaller dense networks"
    lab.experiment.run(path, [cell for seed in SEEDS for cell in cells(seed)], measure, seeds=SEEDS, about=about)

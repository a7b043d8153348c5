"""Chapter 4: of what global ranking is ahead of equal shares, what do the stem, the shares and the order by size bring?

`python chapters/experiments/residual_shares.py` writes chapters/results/residual_shares.json; a run that was stopped
goes on where it was.

The trained networks of `residual_pruning`, eight seeds, trained again here, so that all rows of a seed are of one
network. Who goes first inside a layer is one choice, "size" or "chance"; how many each layer keeps is another: "equal"
shares; equal "but the stem", which stays whole while the others lose as many more; the shares of "global" ranking by
size; "lamp" (with size only). "Pruned" networks are read as they are and recalibrated; "trained on" is
`residual_pruning.FURTHER` steps with masks held. Nothing is tuned.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import residual_pruning as base
import torch
from torch import nn

import gradprune as gp
from gradprune import lab

SPARSITIES = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9]
TRAINED = [0.8, 0.9]
STEM = "stem.weight"
RULES = [("size", "equal"), ("size", "but the stem"), ("size", "global"), ("size", "lamp")]
RULES += [("chance", "equal"), ("chance", "global")]


def shares(seed: int, kept: str, sparsity: float) -> dict[str, float]:
    """Return each layer's sparsity; all together lose `sparsity` of the weights."""
    model = base.dense(seed)
    sizes = {name: model.get_parameter(name).numel() for name in base.layers()}
    if kept == "equal":
        return dict.fromkeys(sizes, sparsity)
    if kept == "but the stem":
        total = sum(sizes.values())
        return dict.fromkeys(sizes, sparsity * total / (total - sizes[STEM])) | {STEM: 0.0}
    masks = gp.prune(model, sparsity=sparsity, scope=kept)
    return {name: 1 - mask.float().mean().item() for name, mask in masks.items()}


def pruned(seed: int, order: str, kept: str, sparsity: float) -> tuple[nn.Module, gp.Masks]:
    """Return a pruned copy of the trained network, and its masks."""
    model = base.dense(seed)
    torch.manual_seed(seed)
    score = gp.random if order == "chance" else gp.magnitude
    return model, gp.prune(model, score, scope=shares(seed, kept, sparsity))


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    seed = cell["seed"]
    if cell["what"] == "dense":
        return base.read(base.dense(seed), seed)
    model, masks = pruned(seed, cell["order"], cell["shares"], cell["sparsity"])
    found = {"sparsity reached": round(masks.sparsity, 5), "stem keeps": round(masks[STEM].float().mean().item(), 4)}
    if cell["what"] == "trained on":
        base.train(model, seed, base.FURTHER, masks=masks)
    return found | base.read(model, seed)


def cells(seed: int) -> list[dict[str, Any]]:
    """Return what is measured with one seed."""
    rules = [{"order": order, "shares": kept} for order, kept in RULES]
    rows = [
        {"what": "dense"},
        *({"what": "pruned"} | rule | {"sparsity": s} for rule in rules for s in SPARSITIES),
        *({"what": "trained on"} | rule | {"sparsity": s} for rule in rules for s in TRAINED),
    ]
    return [{"seed": seed} | row for row in rows]


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "residual_shares.json"
    about = "lab.models.residual on MNIST-1D, pruned once: which go first in a layer, and what share each layer keeps"
    listed = [cell for seed in base.SEEDS for cell in cells(seed)]
    lab.experiment.run(path, listed, measure, seeds=base.SEEDS, about=about)

"""Chapter 7: which part of a packed weight keeps how much, where all weights are ranked together at 90 %?

`python chapters/experiments/kept_shares.py` writes chapters/results/kept_shares.json; a run that was stopped goes on
where it was. A row is one block of rows of one tensor (a gate of an LSTM, the queries of an attention layer) in the
network of one seed: how many weights it has, the mean size of those and the share that stays.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import gradprune as gp
from gradprune import lab
from gradprune.lab import zoo

SPARSITY = 0.9
GATES = ["input gate", "forget gate", "cell", "output gate"]
BLOCKS: dict[str, dict[str, list[str]]] = {
    "LSTM": {
        "recurrent.weight_ih_l0": [f"{gate}, from x" for gate in GATES],
        "recurrent.weight_hh_l0": [f"{gate}, from h" for gate in GATES],
        "head.weight": ["LSTM's head"],
    },
    "self-attention": {
        "attention.0.in_proj_weight": ["query 1", "key 1", "value 1"],
        "attention.0.out_proj.weight": ["output 1"],
        "attention.1.in_proj_weight": ["query 2", "key 2", "value 2"],
        "attention.1.out_proj.weight": ["output 2"],
        "head.weight": ["attention's head"],
    },
    "Transformer, text": {
        "encoder.layers.0.self_attn.in_proj_weight": ["self_attn.in_proj_weight"],
        "encoder.layers.0.self_attn.out_proj.weight": ["self_attn.out_proj.weight"],
        "encoder.layers.0.linear1.weight": ["linear1.weight"],
        "encoder.layers.0.linear2.weight": ["linear2.weight"],
        "head.weight": ["head.weight"],
    },
}
SEEDS = {"LSTM": 5, "self-attention": 3, "Transformer, text": 1}


@cache
def dense_and_masks(network: str, seed: int) -> tuple[dict[str, Tensor], gp.Masks]:
    """Return the weights of the trained network and the masks of its pruning."""
    model: nn.Module = zoo.base.dense(zoo.by_name(network), seed)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return weights, gp.prune(model, sparsity=SPARSITY)


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one row."""
    weights, masks = dense_and_masks(cell["network"], cell["seed"])
    for tensor, names in BLOCKS[cell["network"]].items():
        if cell["block"] in names:
            at, of = names.index(cell["block"]), len(names)
            mask, weight = masks[tensor].chunk(of)[at], weights[tensor].chunk(of)[at]
    return {
        "weights": mask.numel(),
        "mean size": round(weight.abs().mean().item(), 4),
        "stays": round(mask.double().mean().item(), 4),
    }


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "kept_shares.json"
    rows = [
        {"network": network, "seed": seed, "block": block}
        for network, tensors in BLOCKS.items()
        for seed in range(SEEDS[network])
        for blocks in tensors.values()
        for block in blocks
    ]
    about = "what each part of a packed weight keeps, trained networks pruned to 90 % over all weights"
    lab.experiment.run(path, rows, measure, seeds=range(5), about=about)

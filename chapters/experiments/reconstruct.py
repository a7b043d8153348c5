"""Chapter 7: the language model pruned without being trained again, in several ways, with several draws of examples.

`python chapters/experiments/reconstruct.py` writes chapters/results/reconstruct.json; a run that was stopped goes on
where it was. The model is the stored one (`language_model`); the head, tied to the embedding, is not pruned. Bits per
byte on the first TEST tokens of the test text.

- "magnitude": gp.prune, by scope "global", "layer" and "row"; it takes no examples;
- "wanda": gp.prune by gp.activation, scope "row";
- "sparsegpt": gp.reconstruct_ with solve="one pass", the masks and the weights of the paper;
- "reconstruct": gp.reconstruct_, the same choice of masks, then the exact least squares for them;
- "magnitude, reconstruct": the masks of "magnitude" (scope "row"), then the exact least squares.

"tokens" is how many tokens of training text are looked at, in windows of 128 drawn by "seed"; every other seed is
another draw, of the one model. "seconds" is processor time, "layers" how many matrices are pruned.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

import gradprune as gp
from gradprune import lab
from gradprune.lab import language

SEEDS = list(range(4))
CURVE_SEEDS = SEEDS[:3]
TOKENS, CURVE = 32_768, [8_192, 131_072]
TEST = 32_769
LEVELS: list[Any] = [0.5, 0.7, "2:4"]
METHODS = ["reconstruct", "wanda", "magnitude, reconstruct", "sparsegpt"]


@cache
def model() -> nn.Module:
    """Return the stored model; not to be changed."""
    return language.model()


def prune(pruned: nn.Module, method: str, level: Any, batches: list[dict[str, Any]], scope: str = "row") -> gp.Masks:
    """Prune a model in place by a method, to a sparsity or to "2:4"."""
    how: dict[str, Any] = {"granularity": (2, 4)} if level == "2:4" else {"sparsity": level, "scope": scope}
    by_inputs = partial(gp.activation, batches=batches)
    if method == "magnitude":
        return gp.prune(pruned, **how)
    if method == "wanda":
        return gp.prune(pruned, by_inputs, **how)
    if method == "magnitude, reconstruct":
        return gp.reconstruct_(pruned, batches, score=gp.magnitude, **how)
    if level != "2:4":
        how["scope"] = "layer"
    return gp.reconstruct_(pruned, batches, solve="one pass" if method == "sparsegpt" else "exact", **how)


def measure(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bits per byte of one cell, and what it took."""
    pruned = copy.deepcopy(model())
    if cell["method"] == "dense":
        return {"bits": _bits(pruned)}
    batches = language.calibration(cell["tokens"], seed=cell["seed"], batch=32) if cell["tokens"] else []
    began = time.process_time()
    masks = prune(pruned, cell["method"], cell["level"], batches, cell["scope"])
    seconds = round(time.process_time() - began, 2)
    return {"bits": _bits(pruned), "sparsity": round(masks.sparsity, 4), "seconds": seconds, "layers": len(masks)}


def cells() -> list[dict[str, Any]]:
    """Return every cell: dense, by magnitude, each method with each draw, and the curve over tokens."""
    found = [_cell("dense", None)]
    found += [_cell("magnitude", level, scope=s) for level in LEVELS[:2] for s in ("global", "layer", "row")]
    found += [_cell("magnitude", "2:4")]
    found += [_cell(m, level, TOKENS, seed) for seed in SEEDS for level in LEVELS for m in METHODS[:3]]
    found += [_cell(m, 0.7, tokens, seed) for tokens in CURVE for seed in CURVE_SEEDS for m in METHODS[:2]]
    return found + [_cell(m, level, TOKENS, seed) for seed in CURVE_SEEDS for level in LEVELS for m in METHODS[3:]]


def _cell(method: str, level: Any, tokens: int = 0, seed: int = 0, scope: str = "row") -> dict[str, Any]:
    return {"method": method, "level": level, "scope": scope, "tokens": tokens, "seed": seed}


def _bits(pruned: nn.Module) -> float:
    return round(language.bits_per_byte(pruned, language.text("test")[:TEST]), 4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parents[1] / "results" / "reconstruct.json")
    lab.start(seed=0)
    about = "bits per byte of one language model, pruned and not trained again"
    lab.experiment.run(parser.parse_args().to, cells(), measure, seeds=SEEDS, about=about)

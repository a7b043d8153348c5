"""Chapter 4: the residual network of seed 0, trained as in `residual_pruning`, stored for the page.

`python chapters/experiments/residual_network.py` writes chapters/results/residual_network.safetensors. Two processors
that train it end with weights that differ a little, and at 60 % pruned that is up to a tenth of accuracy.
"""

from __future__ import annotations

from pathlib import Path

import residual_pruning as base

from gradprune import lab

if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "residual_network.safetensors"
    lab.experiment.store_network(path, base.dense(0))

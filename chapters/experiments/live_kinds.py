"""Chapter 7: the four networks of the live figure, trained by the chapter's protocol with seed 0, stored for the page.

`python chapters/experiments/live_kinds.py` writes chapters/results/live_kinds.safetensors, in half precision. Two
processors that train them end with weights that differ: Adam divides gradients that are nearly zero by their own size,
and with them the last bits.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from gradprune import lab
from gradprune.lab.live import kinds
from gradprune.lab.zoo import base


def trained(kind: str) -> nn.Module:
    """Return a network after the training of its row."""
    row = kinds.KINDS[kind].row
    return base.train(row, kinds.untrained(kind), kinds.digits(), row.steps, rate=row.rate, seed=0)


if __name__ == "__main__":
    lab.start(seed=0)
    path = Path(__file__).resolve().parents[1] / "results" / "live_kinds.safetensors"
    networks = nn.ModuleDict({kind: trained(kind) for kind in kinds.KINDS})
    lab.experiment.store_network(path, networks.half())

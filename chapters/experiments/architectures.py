"""Chapter 7: how much can be pruned from each architecture, by magnitude and at random, once it has been corrected?

`python chapters/experiments/architectures.py` writes chapters/results/architectures.json; a run that was stopped goes
on where it was. `--only NAME ...` measures some rows alone, with `--to PATH` elsewhere; `--tune NAME ...` prints the
validation metric at each rate an architecture had to choose from, with the two tuning seeds, and measures nothing.

The protocol is that of gradprune.lab.zoo.base; the rows are gradprune.lab.zoo.ARCHITECTURES. Every network goes through
the same public functions, and nothing is tuned for a score, a scope or a sparsity.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.zoo import base


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure one cell with all seeds."""
    return base.measure(zoo.by_name(cell["architecture"]), cell)


def tune(names: Sequence[str]) -> None:
    """Print what each rate gives on validation data, and the rate that the row uses."""
    for name in names:
        architecture = zoo.by_name(name)
        found = base.tune(architecture)
        sign = 1 if architecture.higher else -1
        best = max(found, key=lambda rate: sign * found[rate])
        values = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in found.items())
        print(f"{name}: {values}; best {best:g}, the row has {architecture.rate:g}", flush=True)


if __name__ == "__main__":
    known = [architecture.name for architecture in zoo.ARCHITECTURES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=known, metavar="NAME")
    parser.add_argument("--tune", nargs="+", metavar="NAME")
    parser.add_argument("--to", type=Path, default=Path("chapters/results/architectures.json"), metavar="PATH")
    chosen = parser.parse_args()
    lab.start(0)
    if chosen.tune:
        tune(known if chosen.tune == ["all"] else chosen.tune)
    else:
        lab.experiment.run(
            chosen.to,
            base.cells([zoo.by_name(name) for name in chosen.only]),
            measure,
            seeds=base.SEEDS,
            about="one shot, then corrected for half of the training steps; the row's metric on test data",
        )

"""Chapter 7, the second measurement: what is run, and what counts as what, fixed and committed before the first run.

The question of each row: can the network be pruned by magnitude to 50 and to 80 % of its weights, and is it the choice
by size that does it?

What is compared
    The *error* of a network on test data: of an accuracy, one minus it; of bits per character, the perplexity 2^bits;
    every other metric is an error as it is. The reference is the dense network of the same seed, trained on for as
    many steps as a correction takes, since the pruned one is too.
What is tuned, on validation data alone, with TUNING_SEEDS, which are not reported on
    The dense rate, of the three a row names; then, for the pruned network by magnitude, for the one at random and for
    the dense one that is trained on, each by itself, the correction's rate as a share of the dense one, of SHARES,
    at 80 %. Every row has this same budget, and nothing else of a row is tuned. A correction takes half of the
    training steps, the rate falling on a straight line to 0, the masks held.
How is pruned
    In one shot, each layer by itself (PRIMARY), since one ranking over all layers may empty a layer (`inversion`); one
    ranking over all is measured too, and reported beside, but decides nothing.
What is said
    "Can be pruned", at each of JUDGED: by `lab.compare.noninferior` with the one TOLERANCE for all rows. It holds where
    the 95 % interval of the error's growth is within the tolerance, fails where it is beyond, and is not shown where it
    reaches over.
    "Size chooses well", at each of JUDGED: only where "can be pruned" holds there; it holds where the error is below
    that of random pruning at the same sparsity, by the paired 95 % interval; fails where it is above; else not shown.
    A row whose dense networks miss its level on validation data is no evidence, whatever it shows.
    Of each of the two, all rows at both sparsities are one family for Holm's procedure. Rows that share a network (a
    GAN's two players, a circuit by two scores) or differ in the optimizer alone are counted once in a sentence that
    counts kinds of networks: ALIKE. What is said of 50 % is not said of 80 %, and what holds with the tolerance alone
    is said with what SENSITIVITY makes of it.
Kind and task
    CONTROLS are the same task with another kind of network, and the same kind with another task, so that what a row
    shows can be told from what its data show.

Test parts are read once for each number reported. Rows below come from `gradprune.lab.zoo`. "diffusion model" and "LoRA
adapters" were named here as rows to come, and were written when others had been measured; their level, steps and rates
were chosen with TUNING_SEEDS, and committed before any run of them with SEEDS. "LoRA adapters, base pruned", which was
not named at first, is the other reading of the same network. A row that then missed its level with SEEDS says in the
zoo what was changed, by validation data of other seeds alone, and was measured again as a whole; its test values had
been seen by then. Random pruning first drew its lots with the network's own seed, from which torch had drawn the first
weights, so that its choice was not chance in a first layer; every random cell was measured again with lots of their own
(`lab.train.lots`), its share of the rate tuned again, nothing else changed. What a statement of the documents is judged
by (`lab.zoo.table`, chapter 7) was written when a third of the rows had been measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradprune import lab
from gradprune.lab.compare import Difference, Noninferiority
from gradprune.lab.zoo.base import Architecture

SPARSITIES = (0.3, 0.5, 0.8, 0.9, 0.95)
JUDGED = (0.5, 0.8)
PRIMARY, SCOPES = "layer", ("layer", "global")
SEEDS, TUNING_SEEDS = tuple(range(10)), (100, 101)
SHARES = (0.1, 0.3, 1.0)
TOLERANCE, SENSITIVITY = 0.2, (0.1, 0.5)

CONTROLS = ("convolutional, MNIST-1D", "RNN, spectra")
TODAY = (
    "residual and depthwise",
    "vision Transformer",
    "mixture of experts",
    "graph network",
    "state-space model",
    "diffusion model",
    "LoRA adapters",
    "LoRA adapters, base pruned",
)
ALIKE = (
    ("perceptron, SGD", "perceptron, momentum", "perceptron, Adam", "perceptron, AdamW"),
    ("GAN, generator pruned", "GAN, discriminator pruned", "GAN, both pruned"),
    ("quantum circuit, by rotation", "quantum circuit, by |angle|"),
    ("RNN on a phase", "RNN on a raw phase"),
    ("LoRA adapters", "LoRA adapters, base pruned"),
)


def error(architecture: Architecture, value: float) -> float:
    """Return what is lost, smaller is better, in a unit of which shares have a meaning."""
    if architecture.metric == "bits per character":
        return float(2**value)
    return 1 - value if architecture.higher else value


def prunable(architecture: Architecture, corrected: Sequence[float], continued: Sequence[float]) -> Noninferiority:
    """Judge a row's test metrics after correction against those of the dense networks trained on as long."""
    these, those = ([error(architecture, value) for value in values] for values in (corrected, continued))
    return lab.compare.noninferior(these, those, tolerance=TOLERANCE)


def lead(architecture: Architecture, magnitude: Sequence[float], chance: Sequence[float]) -> Difference:
    """Return by how much random pruning errs more, seed by seed."""
    these, those = ([error(architecture, value) for value in values] for values in (chance, magnitude))
    return lab.compare.paired(these, those)


def outcomes(rows: Mapping[str, tuple[Noninferiority, Difference]]) -> dict[str, tuple[str, str]]:
    """Return of each name (a row at a sparsity) what is said of "can be pruned" and of "size chooses well"."""
    first = dict(zip(rows, lab.compare.noninferior_together([judged for judged, _ in rows.values()]), strict=True))
    asked = [name for name, said in first.items() if said == "holds"]
    words = {"better": "holds", "worse": "fails"}
    found = lab.compare.holm([rows[name][1] for name in asked])
    second = {name: words.get(said, said) for name, said in zip(asked, found, strict=True)}
    return {name: (said, second.get(name, "not asked")) for name, said in first.items()}


def settings() -> dict[str, Any]:
    """Return what was fixed, for the head of a result."""
    names = ("SPARSITIES", "JUDGED", "PRIMARY", "SCOPES", "SEEDS", "TUNING_SEEDS", "SHARES", "TOLERANCE", "SENSITIVITY")
    return {name.lower(): globals()[name] for name in names}

"""Chapter 7's live figure: choose a kind of network, take weights away, train what is left, and see what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal, cast

import torch
import traitlets
from torch import Tensor, nn
from torch.nn import functional

import gradprune as gp
from gradprune.lab import experiment, figures, zoo
from gradprune.lab.live import chance, perceptron
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Live, Still, halves, pack_split
from gradprune.lab.zoo import base, tasks
from gradprune.lab.zoo.base import Architecture

BATCH = 32
_WINDOW = {"kernel": 3, "stride": 2, "padding": 1}


@dataclass(frozen=True)
class Kind:
    """A network that the page can build: its row of chapter 7, the page's layers, and what each matrix holds.

    `parts` has one entry for each prunable matrix, in order: the names of the equal parts that are stacked in it.
    """

    row: Architecture
    layers: Sequence[Sequence[Any]]
    parts: Sequence[Sequence[str]]


KINDS = {
    "perceptron": Kind(
        zoo.by_name("perceptron, Adam"),
        [
            ["dense", 64, 128],
            ["activation", 128, "relu"],
            ["dense", 128, 64],
            ["activation", 64, "relu"],
            ["dense", 64, 10],
        ],
        [["layer 1"], ["layer 2"], ["head"]],
    ),
    "convolutional": Kind(
        zoo.by_name("convolutional"),
        [
            ["convolution", 1, 16, 8, _WINDOW],
            ["activation", 16 * 4 * 4, "relu"],
            ["convolution", 16, 32, 4, _WINDOW],
            ["activation", 32 * 2 * 2, "relu"],
            ["convolution", 32, 32, 2, _WINDOW],
            ["activation", 32, "relu"],
            ["dense", 32, 10],
        ],
        [["conv 1"], ["conv 2"], ["conv 3"], ["head"]],
    ),
    "recurrent": Kind(
        zoo.by_name("RNN"), [["recurrent", 8, 48, 8], ["dense", 48, 10]], [["input"], ["state"], ["head"]]
    ),
    "self-attention": Kind(
        # One block of the row's two, so that a frame of the page is in time.
        replace(zoo.by_name("self-attention"), build=lambda seed: zoo.sequences.Attention(layers=1)),
        [["dense", 8, 32, 8], ["place", 8 * 32], ["attention", 32, 4, 8], ["mean", 32, 8], ["dense", 32, 10]],
        [["pixels"], ["query", "key", "value"], ["output"], ["head"]],
    ),
}


class Kinds(Live):
    """One of four kinds of network, pruned by the reader and trained again in the page.

    `kind` ("perceptron", "convolutional", "recurrent" or "self-attention"), `sparsity` (0 to 0.99), `ranking`
    ("smallest" or "random" go) and `scope` ("global" or "layer") are what the reader sets, or a program; `accuracy` is
    what the page last read; `masks` are those of gradprune at that setting, which are the page's.

    Example: ``figure = lab.live.Kinds(kind="self-attention")``, then in a later cell ``figure.masks``.
    """

    _esm = joined("kinds.js")
    kind = traitlets.Enum(tuple(KINDS), "perceptron", help="which network").tag(sync=True)
    sparsity = traitlets.Float(0.9, min=0.0, max=0.99, help="the share of the weights that is gone").tag(sync=True)
    ranking = traitlets.Enum(("smallest", "random"), "smallest", help="which go").tag(sync=True)
    scope = traitlets.Enum(("global", "layer"), "global", help="what is ranked together").tag(sync=True)
    _networks = traitlets.Dict().tag(sync=True)
    _train = traitlets.Dict().tag(sync=True)
    _test = traitlets.Dict().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        data = perceptron.digits()
        super().__init__(
            _networks={name: _packed(name) for name in KINDS},
            _train=pack_split(data.train),
            _test=pack_split(data.test),
            **settings,
        )

    @property
    def network(self) -> nn.Module:
        """The network that the page shows, before its weights are taken away: a copy."""
        return trained(self.kind).float()

    @property
    def masks(self) -> gp.Masks:
        """The masks that the page shows, for `network` or any network of its form."""
        return pruned(self.kind, self.sparsity, self.ranking, self.scope)[1]

    def still(self) -> Still:
        """Return what each kind reads before and after the first setting, and after training again."""
        rows, bars = [], []
        for name in KINDS:
            model, masks = pruned(name, self.sparsity, self.ranking, self.scope)
            bars.append([_read(trained(name)), _read(model), _read(corrected(name, *self._setting()))])
            shares = kept_shares(name, masks)
            least = min(shares, key=lambda part: shares[part])
            total = sum(mask.numel() for mask in masks.values())
            rows.append([name, f"{total:,}", *(f"{share:.2f}" for share in bars[-1]), f"{least} {shares[least]:.0%}"])
        drawing, axes = figures.new()
        for at, state in enumerate(("dense", "pruned", "corrected")):
            heights = [bar[at] for bar in bars]
            axes.bar(
                [i + 0.27 * (at - 1) for i in range(len(bars))],
                heights,
                0.25,
                label=state,
                color=figures.COLOURS[state],
            )
        axes.set_xticks(range(len(KINDS)), list(KINDS))
        axes.set(ylabel="test digits read correctly", title="Pruned, and trained again", ylim=(0, 1.25))
        axes.legend(ncols=3, loc="upper center")
        words = (
            f"Four kinds of network that read digits lose {self.sparsity:.0%} of their weights, the smallest of all "
            f"layers together, and read {_words([bar[1] for bar in bars])} of the test digits; after training again "
            f"for half as long as they were trained they read {_words([bar[2] for bar in bars])}."
        )
        return Still(drawing, words, ["network", "weights", "dense", "pruned", "corrected", "keeps least"], rows)

    def _setting(self) -> tuple[float, str, str]:
        return self.sparsity, self.ranking, self.scope


def _words(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.2f}" for share in shares)


# ------------------------------------------------------------------------------------------------------ the networks


@cache
def digits() -> tasks.Classify:
    """The digits in double precision, in which the page computes."""
    data = perceptron.digits()
    train, validation, test = (
        tasks.Split(part.x.double(), part.y) for part in (data.train, data.validation, data.test)
    )
    return tasks.Classify(train, validation, test, batch=BATCH)


@cache
def _stored() -> nn.ModuleDict:
    networks = nn.ModuleDict({name: untrained(name) for name in KINDS}).half()
    experiment.network("live_kinds", networks)  # fills them
    return networks.double().train()


def untrained(kind: str) -> nn.Module:
    """Return a network as it is initialised, seed 0, in double precision."""
    with torch.random.fork_rng(devices=[]):
        return base.network(KINDS[kind].row, 0).double()


def trained(kind: str) -> nn.Module:
    """Return a network trained by chapter 7's protocol, seed 0, as it is stored, in double precision: a copy.

    It was rounded to half precision, which is how the page gets it.
    """
    return copy.deepcopy(_stored()[kind])


def _packed(kind: str) -> dict[str, Any]:
    """What the page needs of a network, and how it is trained again: half of the row's steps, as in its correction."""
    row = KINDS[kind].row
    how = {"steps": row.steps // 2, "rate": row.rate, "batch": BATCH}
    spec = {"layers": KINDS[kind].layers, "parts": KINDS[kind].parts}
    return spec | how | {"numbers": halves(*trained(kind).parameters())}


def _by_chance(model: nn.Module) -> dict[str, Tensor]:
    eligible = gp.prune(model, sparsity=0.0)
    sizes = [mask.numel() for mask in eligible.values()]
    parts = torch.from_numpy(chance.uniform(0, sum(sizes))).split(sizes)
    return {name: part.view_as(mask) for (name, mask), part in zip(eligible.items(), parts, strict=True)}


def pruned(kind: str, sparsity: float, ranking: str, scope: str) -> tuple[nn.Module, gp.Masks]:
    """Return a pruned copy of a trained network, in double precision, and its masks."""
    model = trained(kind)
    how = cast('Literal["global", "layer"]', scope)
    score = {"smallest": gp.magnitude, "random": _by_chance}[ranking]
    return model, gp.prune(model, score, sparsity=sparsity, scope=how, min_keep=1)


@lru_cache(maxsize=32)
def corrected(kind: str, sparsity: float, ranking: str, scope: str) -> nn.Module:
    """Return the network after the page's whole training again, on the page's batches; not to be changed."""
    model, masks = pruned(kind, sparsity, ranking, scope)
    row, data = KINDS[kind].row, digits().train
    steps = row.steps // 2
    adam = torch.optim.Adam(model.parameters(), lr=row.rate)
    masks.hold(adam, model)
    for step, rows in enumerate(chance.batches(0, len(data.x), BATCH, steps)):
        adam.param_groups[0]["lr"] = row.rate * (1 - step / steps)
        adam.zero_grad()
        functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
        adam.step()
    return model


def kept_shares(kind: str, masks: gp.Masks) -> dict[str, float]:
    """Return which share of its weights each part keeps."""
    pairs = zip(KINDS[kind].parts, masks.values(), strict=True)
    return {
        name: float(block.double().mean())
        for names, mask in pairs
        for name, block in zip(names, mask.chunk(len(names)), strict=True)
    }


def _read(model: nn.Module) -> float:
    return base.score(digits(), model, "test")

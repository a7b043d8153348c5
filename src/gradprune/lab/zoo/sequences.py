"""Which networks that read sequences are pruned: recurrent, attention alone, Transformers on images and on text?

torch's own modules on purpose: their packed weights (`weight_ih_l0` holds all gates of an LSTM, `in_proj_weight` the
query, key and value projections of attention) are what a user has.
"""

from __future__ import annotations

import importlib.resources
import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.lab.zoo import tasks
from gradprune.lab.zoo.base import Architecture, Part
from gradprune.lab.zoo.dense import ACCURACY

Layer = type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]


class Recurrent(nn.Module):
    """One of torch's recurrent layers over the eight rows of a digit, and a linear layer on its last output."""

    def __init__(self, layer: Layer, width: int) -> None:
        super().__init__()
        self.recurrent = layer(8, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 64) to class scores."""
        outputs, _ = self.recurrent(x.view(-1, 8, 8))
        scores: Tensor = self.head(outputs[:, -1])
        return scores


class Rows(nn.Module):
    """The eight rows of a digit as eight tokens, each with its place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pixels = nn.Linear(8, width)
        self.place = nn.Embedding(8, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 64) to (examples, 8, width)."""
        tokens: Tensor = self.pixels(x.view(-1, 8, 8)) + self.place.weight
        return tokens


class Attention(nn.Module):
    """Self-attention and nothing else: no layer between but normalisation, so all mixing is attention's."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.rows = Rows(width)
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, heads, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 64) to class scores, read off the mean token."""
        tokens = self.rows(x)
        for attention, norm in zip(self.attention, self.norms, strict=True):
            normed = norm(tokens)
            tokens = tokens + attention(normed, normed, normed, need_weights=False)[0]
        scores: Tensor = self.head(tokens.mean(1))
        return scores


def encoder(width: int, heads: int, inner: int, layers: int) -> nn.TransformerEncoder:
    """Return torch's Transformer encoder, normalising first, without dropout."""
    layer = nn.TransformerEncoderLayer(width, heads, inner, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Transformer(nn.Module):
    """A Transformer over the rows of a digit."""

    def __init__(self, width: int = 32, heads: int = 4, inner: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.rows = Rows(width)
        self.encoder = encoder(width, heads, inner, layers)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 64) to class scores, read off the mean token."""
        scores: Tensor = self.head(self.encoder(self.rows(x)).mean(1))
        return scores


# ----------------------------------------------------------------------------------------------------- language model

CONTEXT = 32
ALPHABET = " abcdefghijklmnopqrstuvwxyz.,'-"


class LanguageModel(nn.Module):
    """A Transformer that sees only what came before, and scores the next character at each place."""

    future: Tensor

    def __init__(self, width: int = 48, heads: int = 2, inner: int = 96, layers: int = 1) -> None:
        super().__init__()
        self.character = nn.Embedding(len(ALPHABET), width)
        self.place = nn.Embedding(CONTEXT, width)
        self.encoder = encoder(width, heads, inner, layers)
        self.head = nn.Linear(width, len(ALPHABET))
        self.register_buffer("future", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map indices of shape (examples, places) to scores of shape (examples, places, characters)."""
        places = x.shape[1]
        tokens = self.character(x) + self.place.weight[:places]
        scores: Tensor = self.head(self.encoder(tokens, self.future[:places, :places], is_causal=True))
        return scores


@cache
def text() -> Tensor:
    """Return the English descriptions of its data sets that scikit-learn ships, as indices into `ALPHABET`.

    Small letters and a little punctuation stay; each run of anything else becomes one space.
    """
    folder = importlib.resources.files("sklearn.datasets.descr")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".rst")), key=lambda file: file.name)
    joined = " ".join(file.read_text(encoding="utf-8").lower() for file in files)
    plain = re.sub(r"[^a-z.,'-]+", " ", re.sub(r"[-.]{2,}", " ", joined))
    return torch.tensor([ALPHABET.index(character) for character in plain])


@dataclass(frozen=True)
class NextCharacter:
    """Tell the next character: cross-entropy in training, bits per character on a part."""

    train: Tensor
    validation: Tensor
    test: Tensor
    batch: int = 16

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Return the cross-entropy of stretches drawn anywhere in the training part."""
        starts = torch.randint(len(self.train) - CONTEXT, (self.batch, 1), generator=generator)
        return self._entropy(model, self.train[starts + torch.arange(CONTEXT + 1)])

    def score(self, model: nn.Module, part: Part) -> float:
        """Return the bits per character over the part, read in stretches one after the other."""
        characters: Tensor = getattr(self, part)
        return float(self._entropy(model, characters.unfold(0, CONTEXT + 1, CONTEXT))) / math.log(2)

    def _entropy(self, model: nn.Module, stretches: Tensor) -> Tensor:
        scores = model(stretches[:, :-1])
        return functional.cross_entropy(scores.flatten(0, 1), stretches[:, 1:].flatten())


@cache
def descriptions(seed: int) -> NextCharacter:
    """Return the text in blocks of 1,000 characters: by the seed, a tenth to choose on and a tenth to report on."""
    blocks = text().split(1_000)
    order = np.random.default_rng(seed).permutation(len(blocks))
    held = len(blocks) // 10
    cuts = np.split(order, [held, 2 * held])
    validation, test, train = (torch.cat([blocks[at] for at in sorted(chosen)]) for chosen in cuts)
    return NextCharacter(train, validation, test)


# ---------------------------------------------------------------------------------------------------------------- rows


def _recurrent(name: str, layer: Layer, rate: float, rates: tuple[float, ...]) -> Architecture:
    return Architecture(
        name,
        claims=("D0-15", "D1-14", "D2-11", "D2-14"),
        data="digits, row by row",
        **ACCURACY,
        level=0.92,
        steps=600,
        rate=rate,
        rates=rates,
        build=lambda seed: Recurrent(layer, 48),
        task=tasks.digits,
    )


_ON_ROWS: dict[str, Any] = {
    "data": "digits, row by row",
    **ACCURACY,
    "level": 0.9,
    "steps": 500,
    "rate": 0.01,
    "rates": (0.003, 0.01, 0.03),
    "task": tasks.digits,
}

ROWS = (
    _recurrent("RNN", nn.RNN, 0.01, (0.003, 0.01, 0.03)),
    _recurrent("GRU", nn.GRU, 0.01, (0.003, 0.01, 0.03)),
    _recurrent("LSTM", nn.LSTM, 0.03, (0.01, 0.03, 0.1)),
    Architecture("self-attention", claims=("D1-14", "D2-11", "D2-15"), build=lambda seed: Attention(), **_ON_ROWS),
    Architecture("Transformer", claims=("D1-14", "D2-11", "D2-16"), build=lambda seed: Transformer(), **_ON_ROWS),
    Architecture(
        "Transformer, text",
        claims=("D1-14", "D1-15", "D2-11", "D2-16"),
        data="English text, the next character",
        metric="bits per character",
        higher=False,
        level=3.2,  # a table of letter pairs has 3.6
        steps=1_000,
        rate=0.01,
        rates=(0.003, 0.01, 0.03),
        build=lambda seed: LanguageModel(),
        task=descriptions,
    ),
)

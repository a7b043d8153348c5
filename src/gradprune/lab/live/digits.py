"""What do the figures that train a network on the digits carry with them, and what comes back from the page?"""

from __future__ import annotations

from typing import Any, ClassVar

import traitlets
from torch import nn

import gradprune as gp
from gradprune.lab.live import perceptron
from gradprune.lab.live.figure import Live, pack_network, pack_split, unpack_masks, unpack_network_


class Digits(Live):
    """A figure that trains a perceptron: its network, and what the page trains and tests it on.

    A subclass says in `network` what it starts from. A page whose network goes on in Python sends it, with its settings
    (twin: `goingOn` in reading.js).
    """

    _network = traitlets.Dict().tag(sync=True)
    _train = traitlets.Dict().tag(sync=True)
    _test = traitlets.Dict().tag(sync=True)
    _shown = traitlets.Dict(help="what the page shows: `kept`, a byte a weight, and `numbers`, at a `setting`").tag(
        sync=True
    )

    def __init__(self, **settings: Any) -> None:
        data = perceptron.digits()
        packed = {"_network": pack_network(self.network, "relu")}
        packed |= {"_train": pack_split(data.train), "_test": pack_split(data.test)}
        super().__init__(**packed, **settings)

    @property
    def network(self) -> nn.Sequential:
        """The network that the page starts from: a copy."""
        raise NotImplementedError

    def _of_the_page(self, part: str) -> bytes:
        """A part of what the page shows; nothing where it is not there, or of settings that no longer hold."""
        setting = self._shown.get("setting")
        holds = setting is not None and all(getattr(self, name) == value for name, value in setting.items())
        return bytes(self._shown.get(part, b"")) if holds else b""


class Retrained(Digits):
    """A figure whose page prunes a trained perceptron and trains it on; a subclass has a trait `sparsity`."""

    sparsity: ClassVar[Any]

    @property
    def network(self) -> nn.Sequential:
        """The network that `masks` are for, a copy: with them applied it is the one that the page shows."""
        numbers = self._of_the_page("numbers")
        model = perceptron.trained()
        if numbers:
            unpack_network_(model, numbers)
        return model

    @property
    def masks(self) -> gp.Masks:
        """The masks that the page shows, or where no page is open gradprune's at this sparsity."""
        masks = gp.prune(perceptron.trained(), sparsity=self.sparsity, min_keep=1)
        kept = self._of_the_page("kept")
        return unpack_masks(masks, kept) if kept else masks

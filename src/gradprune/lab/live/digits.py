"""What do the figures that train a network on the digits carry with them?"""

from __future__ import annotations

from typing import Any

import traitlets
from torch import nn

from gradprune.lab.live import perceptron
from gradprune.lab.live.figure import Live, pack_network, pack_split


class Digits(Live):
    """A figure that trains a perceptron: its network, and what the page trains and tests it on.

    A subclass says in `network` what it starts from.
    """

    _network = traitlets.Dict().tag(sync=True)
    _train = traitlets.Dict().tag(sync=True)
    _test = traitlets.Dict().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        data = perceptron.digits()
        packed = {"_network": pack_network(self.network, "relu")}
        packed |= {"_train": pack_split(data.train), "_test": pack_split(data.test)}
        super().__init__(**packed, **settings)

    @property
    def network(self) -> nn.Sequential:
        """The network that the page starts from: a copy."""
        raise NotImplementedError

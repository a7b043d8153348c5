"""Chapter 4's live figure: take weights away from a network that reads digits, and see what it forgets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import traitlets
from torch import Tensor, nn

import gradprune as gp
from gradprune.lab import figures, train
from gradprune.lab.live import perceptron
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Live, Still, floats, pack_network, pack_split, unpack_network_

Scores = Callable[[nn.Module], dict[str, Tensor]]


class Prune(Live):
    """A perceptron that reads digits, pruned at any sparsity by the reader.

    `sparsity` (0 to 0.995), `ranking` ("smallest", "random" or "largest" goes first) and `scope` ("global" or "layer")
    are what the reader sets, or a program; `accuracy` is what the page read; `masks` are those of gradprune at that
    setting, which are the page's.

    Example: ``figure = lab.live.Prune()``, then in a later cell ``figure.masks``.
    """

    _esm = joined("prune.js")
    sparsity = traitlets.Float(0.0, min=0.0, max=0.995, help="the share of the weights that is gone").tag(sync=True)
    ranking = traitlets.Enum(("smallest", "random", "largest"), "smallest", help="which go first").tag(sync=True)
    scope = traitlets.Enum(("global", "layer"), "global", help="what is ranked together").tag(sync=True)
    _network = traitlets.Dict().tag(sync=True)
    _test = traitlets.Dict().tag(sync=True)
    _random = traitlets.Bytes().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        self._model = perceptron.trained()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._drawn = gp.random(self._model)
        super().__init__(
            _network=pack_network(self._model, "relu"),
            _test=pack_split(perceptron.digits().test),
            _random=floats(*(score for score in self._drawn.values() if score.dim() > 1)),  # biases stay
            **settings,
        )

    @property
    def network(self) -> nn.Module:
        """The network that the page shows, before its weights are taken away: a copy."""
        return unpack_network_(copy.deepcopy(self._model), self._network["numbers"])

    @property
    def masks(self) -> gp.Masks:
        """The masks that the page shows, for `network` or any network of its form."""
        return self._pruned(self.sparsity, self.ranking)[1]

    def _pruned(self, sparsity: float, ranking: str) -> tuple[nn.Module, gp.Masks]:
        network = self.network
        scope = cast('Literal["global", "layer"]', self.scope)
        return network, gp.prune(network, self._score(ranking), sparsity=sparsity, scope=scope, min_keep=1)

    def _score(self, ranking: str) -> Scores:
        def largest_first(model: nn.Module) -> dict[str, Tensor]:
            return {name: -score for name, score in gp.magnitude(model).items()}

        return {"smallest": gp.magnitude, "random": lambda model: self._drawn, "largest": largest_first}[ranking]

    def still(self) -> Still:
        """Return the accuracy over the sparsity for each ranking."""
        test = perceptron.digits().test
        levels = [0.0, 0.5, 0.8, 0.9, 0.95, 0.99]
        curves = {
            ranking: [train.accuracy(self._pruned(level, ranking)[0], test) for level in levels]
            for ranking in ("smallest", "random", "largest")
        }
        drawing, axes = figures.new()
        for (ranking, accuracies), colour in zip(curves.items(), ("pruned", "random", "largest"), strict=True):
            axes.plot([100 * level for level in levels], accuracies, "o-", label=ranking, color=figures.COLOURS[colour])
        axes.set(xlabel="weights removed, %", ylabel="test digits read correctly", title="Which weights go?")
        axes.legend()
        at = levels.index(0.9)
        words = (
            f"A perceptron of {sum(mask.numel() for mask in self.masks.values()):,} weights reads "
            f"{curves['smallest'][0]:.1%} of the test digits. Without nine tenths of its weights it reads "
            f"{curves['smallest'][at]:.1%} if the smallest went, {curves['random'][at]:.1%} if chance chose, "
            f"{curves['largest'][at]:.1%} if the largest went."
        )
        rows = [[f"{level:.0%}", *(f"{curve[i]:.3f}" for curve in curves.values())] for i, level in enumerate(levels)]
        return Still(drawing, words, ["removed", *curves], rows)

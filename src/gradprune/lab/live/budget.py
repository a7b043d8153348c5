"""Chapter 6's live figure: say what a network may cost, and see bisection find how many of its weights can go."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import torch
import traitlets
from torch import Tensor, nn

import gradprune as gp
from gradprune.lab import figures, train
from gradprune.lab.live import perceptron
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Live, Still, pack_network, pack_split, unpack_network_


class Budget(Live):
    """A perceptron that reads digits, pruned as far as the reader lets it cost.

    `bounded` ("accuracy", "flops" or "bytes"), `limit` (the share of the validation digits that may be lost, or the
    share of the dense network's cost that it may take), `looks` (how often the interval is halved, 0 to 10) and `scope`
    ("global" or "layer") are what the reader sets, or a program; `accuracy` is what the page read on test digits;
    `masks` are those of gradprune at that setting, which are the page's.

    Example: ``figure = lab.live.Budget()``, then in a later cell ``figure.masks``.
    """

    _esm = joined("budget.js")
    bounded = traitlets.Enum(("accuracy", "flops", "bytes"), "accuracy", help="what is bounded").tag(sync=True)
    limit = traitlets.Float(0.05, min=0.0, max=1.0, help="what may be lost, or taken").tag(sync=True)
    looks = traitlets.Int(8, min=0, max=10, help="how often the interval is halved").tag(sync=True)
    scope = traitlets.Enum(("global", "layer"), "global", help="how the layers share").tag(sync=True)
    _network = traitlets.Dict().tag(sync=True)
    _validation = traitlets.Dict().tag(sync=True)
    _test = traitlets.Dict().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        self._model = perceptron.trained()
        digits = perceptron.digits()
        super().__init__(
            _network=pack_network(self._model, "relu"),
            _validation=pack_split(digits.validation),
            _test=pack_split(digits.test),
            **settings,
        )

    @property
    def network(self) -> nn.Module:
        """The network that the page shows, before its weights are taken away: a copy."""
        return unpack_network_(copy.deepcopy(self._model), self._network["numbers"])

    @property
    def sparsity(self) -> float:
        """The sparsity that so many looks find."""
        if self.looks == 0:
            return 0.0 if self.bounded == "accuracy" else 1.0
        network, scope = self.network, self._scope()
        tolerance = 0.5**self.looks
        if self.bounded == "accuracy":
            return gp.largest_sparsity(
                network, _reads, margin=self.limit, tolerance=tolerance, scope=scope, min_keep=1
            ).sparsity
        low, high = 0.0, 1.0
        for _ in range(self.looks):
            middle = (low + high) / 2
            low, high = (low, middle) if self._cost(middle) <= self.limit else (middle, high)
        return high

    @property
    def masks(self) -> gp.Masks:
        """The masks that the page shows, for `network` or any network of its form."""
        return gp.prune(self.network, sparsity=self.sparsity, scope=self._scope(), min_keep=1)

    def _scope(self) -> Literal["global", "layer"]:
        return cast('Literal["global", "layer"]', self.scope)

    def _cost(self, sparsity: float) -> float:
        """The share of the dense network's cost, as a report counts it."""
        network = self.network
        example = perceptron.digits().validation.x[:1]
        gp.prune(network, sparsity=sparsity, scope=self._scope(), min_keep=1)
        total = gp.report(network, example).total
        if self.bounded == "flops":
            assert total.effective_flops is not None
            assert total.flops is not None
            return total.effective_flops / total.flops
        return total.bytes_bitmask / total.bytes_dense

    def still(self) -> Still:
        """Return the looks of a bisection for the first setting, as many as by default where it makes none."""
        model, tolerance = self.network, 0.5 ** (self.looks or self.trait_defaults("looks"))
        found = gp.largest_sparsity(model, _reads, margin=self.limit, tolerance=tolerance, min_keep=1)
        path = sorted((look for look in found.curve if not look.probe), key=lambda look: look.sparsity)
        drawing, axes = figures.new()
        for passed, colour, label in ((True, "dense", "passes"), (False, "pruned", "does not")):
            some = [look for look in path if look.passed == passed]
            axes.plot(
                [100 * look.sparsity for look in some],
                [look.value for look in some],
                "o",
                color=figures.COLOURS[colour],
                label=label,
            )
        axes.axhline(found.dense - self.limit, linestyle="--", color=figures.COLOURS["random"], label="wanted")
        axes.set(xlabel="weights removed, %", ylabel="validation digits read", title="What bisection looks at")
        axes.legend()
        found.masks.apply_(model)
        words = (
            f"A perceptron of {sum(mask.numel() for mask in found.masks.values()):,} weights may lose {self.limit:.0%} "
            f"of the validation digits. Bisection finds that {found.sparsity:.1%} of the weights can go; it then reads "
            f"{train.accuracy(model, perceptron.digits().test):.1%} of the test digits."
        )
        rows = [[f"{look.sparsity:.1%}", f"{look.value:.3f}", "yes" if look.passed else "no"] for look in path]
        return Still(drawing, words, ["removed", "validation digits read", "passes"], rows)


def _reads(model: nn.Module) -> Tensor:
    """Which validation digits a network reads, one by one."""
    split = perceptron.digits().validation
    with torch.no_grad():
        right: Tensor = model(split.x).argmax(1) == split.y
    return right.double()

"""Chapter 1's live figure: how much of the gradient arrives at the first layer, and does that layer learn?"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import traitlets
from torch import Tensor, nn
from torch.nn import functional

from gradprune.lab import figures
from gradprune.lab.live import perceptron
from gradprune.lab.live.esm import joined
from gradprune.lab.live.figure import Live, Still, floats, pack_split

WIDTH, DEEPEST, ROWS = 32, 60, 64
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "linear": nn.Identity}


class Depth(Live):
    """A perceptron of up to 60 hidden layers: its gradient layer by layer beside the predicted slope, and its training.

    `depth` (1 to 60 hidden layers), `activation` ("sigmoid", "tanh", "relu", "linear") and `scale` (0.2 to 3; weights
    have the standard deviation scale / sqrt(n)) are what the reader sets, or a program; `accuracy` is what the page
    last read after training; `network` is the page's, as it is initialised.

    Example: ``lab.live.Depth(activation="tanh").gradient_norms[0]``
    """

    _esm = joined("depth.js")
    depth = traitlets.Int(20, min=1, max=DEEPEST, help="the number of hidden layers").tag(sync=True)
    activation = traitlets.Enum(tuple(ACTIVATIONS), "sigmoid", help="of the hidden layers").tag(sync=True)
    scale = traitlets.Float(1.0, min=0.2, max=3.0, help="weights are scale / sqrt(n) wide").tag(sync=True)
    _draws = traitlets.Bytes().tag(sync=True)
    _width = traitlets.Int(WIDTH).tag(sync=True)
    _classes = traitlets.Int(10).tag(sync=True)
    _train = traitlets.Dict().tag(sync=True)
    _test = traitlets.Dict().tag(sync=True)

    def __init__(self, **settings: Any) -> None:
        data = perceptron.digits()
        count = data.features * WIDTH + (DEEPEST - 1) * WIDTH**2 + WIDTH * data.classes
        self._normal = torch.randn(count, generator=torch.Generator().manual_seed(0))
        packed = {"_train": pack_split(data.train), "_test": pack_split(data.test)}
        super().__init__(_draws=floats(self._normal), **packed, **settings)

    @property
    def network(self) -> nn.Sequential:
        """The network of the setting, as it is initialised in the page too."""
        data, at = perceptron.digits(), 0
        layers: list[nn.Module] = []
        sizes = [data.features, *[WIDTH] * self.depth, data.classes]
        for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            last = number == self.depth
            draws = self._normal[-inputs * outputs :] if last else self._normal[at : at + inputs * outputs]
            at += inputs * outputs
            linear = nn.Linear(inputs, outputs)
            with torch.no_grad():
                linear.weight.copy_((draws.double() * (self.scale / math.sqrt(inputs))).view(outputs, inputs))
                linear.bias.zero_()
            layers += [linear] if last else [linear, ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers)

    @property
    def gradient_norms(self) -> list[float]:
        """The norm of the loss gradient at the input of each activation and at the output, for 64 examples."""
        split, values, a = perceptron.digits().train, [], perceptron.digits().train.x[:ROWS]
        for layer in self.network:
            a = layer(a)
            if isinstance(layer, nn.Linear):
                values.append(a)
        gradients = torch.autograd.grad(functional.cross_entropy(a, split.y[:ROWS]), values)
        return [float(gradient.double().norm()) for gradient in gradients]

    @property
    def factors(self) -> list[float]:
        """By what each layer multiplies the expected squared gradient: equations 1.5 and 1.6, layer by layer."""
        square = float(perceptron.digits().train.x[:ROWS].square().mean())
        z = torch.linspace(-9, 9, 4000, dtype=torch.float64)  # an even count: no node at 0, the corner of relu
        weights = torch.softmax(-(z**2) / 2, 0)
        q, factors = self.scale**2 * square, []
        for _ in range(self.depth):
            x = (math.sqrt(q) * z).requires_grad_()
            y: Tensor = ACTIVATIONS[self.activation]()(x)
            (slope,) = torch.autograd.grad(y.sum(), x)
            factors.append(self.scale**2 * float((weights * slope**2).sum()))
            q = self.scale**2 * float((weights * y.detach() ** 2).sum())
        return factors

    def still(self) -> Still:
        """Return the gradient's norms by layer for each activation at 20 layers."""
        drawing, axes = figures.new()
        rows = []
        for name in ("sigmoid", "tanh", "relu"):
            figure = Depth(activation=name, depth=20)
            norms = figure.gradient_norms
            predicted = math.sqrt(math.prod(figure.factors[:-1])) * norms[-2] / norms[-1]
            axes.semilogy(range(1, 22), norms, "o-", color=figures.COLOURS[name], label=name)
            rows.append([name, figures.power_of_ten(norms[0] / norms[-1]), figures.power_of_ten(predicted)])
        axes.set(xlabel="layer, first to last", ylabel="gradient norm", title="20 layers, weights of scale 1")
        axes.legend()
        words = (
            f"In a perceptron of 20 hidden sigmoid layers the gradient at the first layer is {rows[0][1]} of the one "
            f"at the output; the formula says {rows[0][2]}."
        )
        return Still(drawing, words, ["activation", "first over last", "by formula"], rows)

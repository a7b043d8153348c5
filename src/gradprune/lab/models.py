"""Which networks do the chapters train?"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gradprune.lab.residual import residual as residual

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "linear": nn.Identity,
}
NORMALISATIONS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
}


class Layer(nn.Module):
    """Linear, normalisation, activation; with `skip`, added to its own input where the widths allow it."""

    def __init__(self, inputs: int, outputs: int, activation: str, normalise: str, skip: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.normalise = NORMALISATIONS[normalise](outputs)
        self.activation = ACTIVATIONS[activation]()
        self.skip = skip and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, inputs) to (examples, outputs)."""
        out: Tensor = self.activation(self.normalise(self.linear(x)))
        return x + out if self.skip else out


def mlp(
    widths: Sequence[int],
    activation: str = "relu",
    *,
    init: str = "torch",
    gain: float | None = None,
    bias_std: float = 0.0,
    normalise: str = "none",
    skip: bool = False,
) -> nn.Sequential:
    """Return a perceptron of the given `widths`, input first, class scores last; the last layer is linear.

    `activation`: "sigmoid", "tanh", "relu", "gelu" or "linear". `normalise`: "none", "batch" or "layer".
    `init`, the distribution of a weight with `fan_in` inputs and `fan_out` outputs:
    "torch" (uniform, variance 1 / (3 fan_in), what `nn.Linear` does), "lecun" (normal, variance 1 / fan_in),
    "xavier" (2 / (fan_in + fan_out), Glorot and Bengio 2010), "he" (2 / fan_in, He et al. 2015), "orthogonal".
    `gain` multiplies the standard deviation; given a gain, "lecun" is the mean-field setting with sigma_w = gain, and
    `bias_std` is its sigma_b. All but "torch" start with zero biases unless `bias_std` is given.

    Raises ValueError for an unknown activation, normalisation or init, and for fewer than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"a perceptron needs at least an input and an output width, not {list(widths)}")
    _known("activation", activation, ACTIVATIONS)
    _known("normalise", normalise, NORMALISATIONS)
    hidden = [Layer(a, b, activation, normalise, skip) for a, b in itertools.pairwise(widths[:-1])]
    model = nn.Sequential(*hidden, nn.Linear(widths[-2], widths[-1]))
    initialise_(model, init, gain=gain, bias_std=bias_std)
    return model


def conv(
    shape: Sequence[int],
    classes: int = 10,
    *,
    channels: Sequence[int] = (16, 32, 32),
    kernels: int | Sequence[int] = 3,
    stride: int = 2,
    padding: int = 1,
    activation: str = "relu",
    normalise: str = "none",
) -> nn.Sequential:
    """Return a convolutional network for inputs of `shape`: (40,) for MNIST-1D, (8, 8) for the digits.

    It takes what `lab.data.load` gives, one flat row an example, and views it as one channel of `shape`. Each entry of
    `channels` is a convolution with as many filters, its normalisation ("none" or "batch") and activation; what they
    leave is read by one linear layer. The modules are named: input, conv1, activation1, conv2 and so on, flatten, head.
    ``conv((40,), channels=(25, 25, 25), kernels=(5, 3, 3))`` is the network of Greydanus and Kobak (2024).

    Raises ValueError for a shape of other than one or two dimensions, for no channels or not one kernel for each, where
    a layer leaves nothing of its input, and for an unknown activation or normalisation.
    """
    if len(shape) not in (1, 2):
        raise ValueError(f"shape has one or two dimensions, such as (40,) or (8, 8), not {tuple(shape)}")
    sizes = [kernels] * len(channels) if isinstance(kernels, int) else list(kernels)
    if not channels or len(sizes) != len(channels):
        raise ValueError(f"one kernel for each of the channels {list(channels)}, at least one; not {sizes}")
    _known("activation", activation, ACTIVATIONS)
    convolution = (nn.Conv1d, nn.Conv2d)[len(shape) - 1]
    normalisations = {"none": None, "batch": (nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) - 1]}
    if normalise not in normalisations:
        raise ValueError(f"unknown normalisation {normalise!r} of a convolution; known are 'none', 'batch'")
    batch_norm = normalisations[normalise]
    layers: dict[str, nn.Module] = {"input": nn.Unflatten(1, (1, *shape))}
    extent = list(shape)
    for i, (inputs, outputs, kernel) in enumerate(zip((1, *channels), channels, sizes, strict=False), start=1):
        extent = [(n + 2 * padding - kernel) // stride + 1 for n in extent]
        if min(extent) < 1:
            raise ValueError(f"layer {i} leaves nothing of an input of shape {tuple(shape)}; fewer layers, or padding")
        layers[f"conv{i}"] = convolution(inputs, outputs, kernel, stride, padding)
        if batch_norm is not None:
            layers[f"norm{i}"] = batch_norm(outputs)
        layers[f"activation{i}"] = ACTIVATIONS[activation]()
    layers["flatten"] = nn.Flatten()
    layers["head"] = nn.Linear(channels[-1] * math.prod(extent), classes)
    return nn.Sequential(OrderedDict(layers))


def initialise_(model: nn.Module, init: str, *, gain: float | None = None, bias_std: float = 0.0) -> None:
    """Draw the weights of every linear layer of `model` anew; see :func:`mlp` for `init`, `gain` and `bias_std`.

    A layer without a bias stays without one.
    """
    _known("init", init, _STD)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _initialise_linear_(module, init, 1.0 if gain is None else gain, bias_std)


def _initialise_linear_(layer: nn.Linear, init: str, gain: float, bias_std: float) -> None:
    fan_out, fan_in = layer.weight.shape
    with torch.no_grad():
        if init == "torch":
            layer.reset_parameters()
            layer.weight.mul_(gain)
        elif init == "orthogonal":
            nn.init.orthogonal_(layer.weight, gain)
        else:
            layer.weight.normal_(0.0, gain * _STD[init](fan_in, fan_out))
        if layer.bias is not None and (bias_std or init != "torch"):
            layer.bias.normal_(0.0, bias_std) if bias_std else layer.bias.zero_()


_STD: dict[str, Callable[[int, int], float]] = {
    "torch": lambda fan_in, fan_out: math.sqrt(1 / (3 * fan_in)),
    "lecun": lambda fan_in, fan_out: math.sqrt(1 / fan_in),
    "xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
    "he": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
    "orthogonal": lambda fan_in, fan_out: math.sqrt(1 / fan_in),
}


class Recurrent(nn.Module):
    """A recurrent cell read over a sequence, and a linear layer on its last state.

    `cell`: "rnn" (tanh), "gru" or "lstm". Maps (examples, steps, inputs) to (examples, classes).
    """

    def __init__(self, cell: str, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        _known("cell", cell, _CELLS)
        self.cell = _CELLS[cell](inputs, width)
        self.width = width
        self.head = nn.Linear(width, classes)

    def states(self, x: Tensor) -> list[Tensor]:
        """Return the state after each step, each of shape (examples, width), every one a node of the graph.

        Of an "lstm" it is the cell state, which carries the gradient through time, not its output. `last` is the output
        after the last step, which the head reads.

        Raises ValueError for a sequence without steps.
        """
        if not x.shape[1]:
            raise ValueError(f"a sequence needs at least one step; the input is of shape {tuple(x.shape)}")
        steps = self._steps(x)
        self.last = steps[-1][1]
        return [state for state, _ in steps]

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores after the last step."""
        self.states(x)
        scores: Tensor = self.head(self.last)
        return scores

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "last"}  # a copy has none of its graph

    def _steps(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The state and the output after each step; one and the same but for an LSTM."""
        output = state = x.new_zeros(len(x), self.width)
        steps = []
        for step in x.unbind(1):
            if isinstance(self.cell, nn.LSTMCell):
                output, state = self.cell(step, (output, state))
            else:
                output = state = self.cell(step, state)
            steps.append((state, output))
        return steps


_CELLS: dict[str, Callable[[int, int], nn.Module]] = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


def _known(what: str, name: str, table: Mapping[str, Callable[..., object]]) -> None:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(map(repr, table))}")

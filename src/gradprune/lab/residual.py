"""What does a present-day network consist of, small enough to be trained while the reader waits?"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

KERNEL = 5


class Basic(nn.Module):
    """Two convolutions, each with batch norm; the input is added to what they give (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, KERNEL, stride, KERNEL // 2, bias=False)
        self.norm1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, KERNEL, padding=KERNEL // 2, bias=False)
        self.norm2 = nn.BatchNorm1d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, inputs, length) to (examples, outputs, length / stride)."""
        hidden = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class Depthwise(nn.Module):
    """One by one to `outputs` channels, each channel convolved by itself, one by one again (Howard et al. 2017)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = nn.Conv1d(inputs, outputs, 1, bias=False)
        self.norm1 = nn.BatchNorm1d(outputs)
        self.depthwise = nn.Conv1d(outputs, outputs, KERNEL, stride, KERNEL // 2, groups=outputs, bias=False)
        self.norm2 = nn.BatchNorm1d(outputs)
        self.project = nn.Conv1d(outputs, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm1d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, inputs, length) to (examples, outputs, length / stride)."""
        hidden = functional.relu(self.norm1(self.expand(x)))
        hidden = functional.relu(self.norm2(self.depthwise(hidden)))
        return functional.relu(self.norm3(self.project(hidden)) + self.shortcut(x))


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Return what a block adds: its input, or where the shapes differ a 1 by 1 convolution of it."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs))


def residual(width: int = 32, classes: int = 10, *, length: int = 40) -> nn.Sequential:
    """Return a residual network for signals such as those of MNIST-1D: 30,250 parameters at width 32.

    A convolution of `width` channels; a block of two convolutions, stride 2; a depthwise block of twice the channels,
    stride 2; one more with an identity as its shortcut; the mean over the positions; a linear layer. Every convolution
    is followed by batch norm. It takes (examples, length) and returns (examples, classes) scores.

    Raises ValueError for a width, number of classes or length below 1.
    """
    if min(width, classes, length) < 1:
        raise ValueError(f"width, classes and length are at least 1, not {width}, {classes} and {length}")
    layers: dict[str, nn.Module] = {
        "input": nn.Unflatten(1, (1, length)),
        "stem": nn.Conv1d(1, width, KERNEL, padding=KERNEL // 2, bias=False),
        "norm": nn.BatchNorm1d(width),
        "activation": nn.ReLU(),
        "block1": Basic(width, width, 2),
        "block2": Depthwise(width, 2 * width, 2),
        "block3": Depthwise(2 * width, 2 * width, 1),
        "pool": nn.AdaptiveAvgPool1d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(2 * width, classes),
    }
    return nn.Sequential(OrderedDict(layers))

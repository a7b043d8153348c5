"""What do people train today, and which task does a kind of network share with another (chapter 7, second protocol)?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradprune.lab import models
from gradprune.lab.residual import residual
from gradprune.lab.zoo import phase, tasks
from gradprune.lab.zoo.base import Architecture
from gradprune.lab.zoo.dense import ACCURACY
from gradprune.lab.zoo.sequences import encoder


class SpectrumRecurrent(nn.Module):
    """A recurrent layer over the 21 Fourier coefficients of a signal, each as two numbers, the highest frequency first.

    The lowest say most, and a recurrent layer keeps best what it has read last.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.recurrent = nn.RNN(2, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 21) complex numbers to class scores."""
        outputs, _ = self.recurrent(torch.view_as_real(x.flip(1)))
        scores: Tensor = self.head(outputs[:, -1])
        return scores


class VisionTransformer(nn.Module):
    """A digit as 16 patches of 2 by 2 pixels, with their places, before a Transformer (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.place = nn.Embedding(16, width)
        self.encoder = encoder(width, 4, 64, 2)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 64) to class scores, read off the mean token."""
        tokens = self.patches(x.view(-1, 1, 8, 8)).flatten(2).transpose(1, 2) + self.place.weight
        scores: Tensor = self.head(self.norm(self.encoder(tokens).mean(1)))
        return scores


class Mixture(nn.Module):
    """Four experts, of which a gate chooses two for each example and weighs them (Shazeer et al. 2017)."""

    def __init__(self, experts: int = 4, width: int = 32) -> None:
        super().__init__()
        self.gate = nn.Linear(64, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 64) to class scores."""
        best, at = self.gate(x).topk(2)
        weights = torch.zeros(len(x), len(self.experts)).scatter(1, at, best.softmax(1))
        return torch.stack([weights[:, [i]] * expert(x) for i, expert in enumerate(self.experts)]).sum(0)


class Graph(nn.Module):
    """Pixels as nodes, neighbours joined: each takes its own state and its neighbours' mean (Hamilton et al. 2017)."""

    neighbours: Tensor

    def __init__(self, width: int = 32, layers: int = 3) -> None:
        super().__init__()
        self.value, self.place = nn.Linear(1, width), nn.Embedding(64, width)
        self.own = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.others = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, 10)
        at = torch.arange(64)
        apart = (at[:, None] // 8 - at // 8).abs() + (at[:, None] % 8 - at % 8).abs()
        joined = (apart == 1).float()
        self.register_buffer("neighbours", joined / joined.sum(1, keepdim=True), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 64) to class scores, read off the mean node."""
        nodes = self.value(x[..., None]) + self.place.weight
        for own, others, norm in zip(self.own, self.others, self.norms, strict=True):
            normed = norm(nodes)
            nodes = nodes + functional.relu(own(normed) + others(self.neighbours @ normed))
        scores: Tensor = self.head(nodes.mean(1))
        return scores


class StateSpace(nn.Module):
    """Layers whose states decay and turn, each at its own rate, and take in what comes: linear in time.

    The kernels are those of diagonal state spaces with evenly spaced frequencies (Gu et al. 2022, "S4D-Lin").
    """

    def __init__(self, width: int = 32, states: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.value = nn.Linear(1, width)
        self.decay = nn.ParameterList(nn.Parameter(torch.linspace(-1.0, 4.0, states)) for _ in range(layers))
        turns = torch.pi * torch.arange(states) / states
        self.turn = nn.ParameterList(nn.Parameter(turns.clone()) for _ in range(layers))
        self.into = nn.ModuleList(nn.Linear(width, states, bias=False) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(states, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 40) to class scores, read off the mean over time."""
        hidden = self.value(x[..., None])
        ago = torch.arange(x.shape[1])
        apart = ago[:, None] - ago
        for decay, turn, into, out, norm in zip(self.decay, self.turn, self.into, self.out, self.norms, strict=True):
            of_a_state = torch.sigmoid(decay) ** ago[:, None] * torch.cos(turn * ago[:, None])
            kernel = of_a_state[apart.clamp(min=0)] * (apart >= 0)[..., None]
            states = torch.einsum("tsn,bsn->btn", kernel, into(norm(hidden)))
            hidden = hidden + functional.gelu(out(states))
        scores: Tensor = self.head(hidden.mean(1))
        return scores


def _row(
    name: str, build: Any, task: Any, data: str, *claims: str, level: float, rate: float = 0.01, steps: int = 600
) -> Architecture:
    return Architecture(
        name,
        claims=("D1-14", "D2-11", *claims),
        data=data,
        **ACCURACY,
        level=level,
        steps=steps,
        rate=rate,
        rates=(0.003, 0.01, 0.03),
        build=lambda seed: build(),
        task=task,
    )


# With 600 steps the two controls missed their levels on the validation data of the tuning seeds, the RNN with more too
# while it read the lowest frequency first: their steps, and that order, were changed by validation data alone. So did
# the state-space model while its states decayed without turning (0.52): the turning was chosen in the same way.
ROWS = (
    _row(
        "convolutional, MNIST-1D",
        lambda: models.conv((40,)),
        tasks.mnist1d,
        "MNIST-1D",
        "D0-15",
        "D2-13",
        level=0.85,
        steps=1_500,
    ),
    _row(
        "RNN, spectra",
        SpectrumRecurrent,
        phase.spectra,
        "MNIST-1D, Fourier coefficients",
        "D0-15",
        "D2-14",
        level=0.4,
        steps=1_000,
    ),
    _row("residual and depthwise", residual, tasks.mnist1d, "MNIST-1D", "D2-13", level=0.9),
    _row("vision Transformer", VisionTransformer, tasks.digits, "digits", "D2-16", level=0.92),
    _row("mixture of experts", Mixture, tasks.digits, "digits", level=0.92),
    _row("graph network", Graph, tasks.digits, "digits, pixels as nodes", level=0.9),
    _row("state-space model", StateSpace, tasks.mnist1d, "MNIST-1D", level=0.75),
)

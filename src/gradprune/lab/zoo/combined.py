"""How is a recurrent network joined with a complex-valued one: side by side, as experts under a gate, or one inside?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradprune.lab.zoo.base import Architecture
from gradprune.lab.zoo.phase import CIRCULAR, SHOWN, PhaseComplex, PhaseRecurrent, on_circle, squash, turning


class Combined(nn.Module):
    """Both read the phases, and their answers are added."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.complex = PhaseRecurrent(32), PhaseComplex(24)

    def forward(self, phases: Tensor) -> Tensor:
        """Map (examples, steps) to points in the plane."""
        both: Tensor = self.recurrent(phases) + self.complex(phases)
        return both


class Mixed(nn.Module):
    """Both are experts, and a gate that reads the phases weighs their answers: Jacobs et al. (1991)."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.complex = PhaseRecurrent(32), PhaseComplex(24)
        self.gate = nn.Linear(2 * SHOWN, 2)

    def forward(self, phases: Tensor) -> Tensor:
        """Map (examples, steps) to points in the plane."""
        share = self.gate(on_circle(phases).flatten(1)).softmax(1)
        mixed: Tensor = share[:, :1] * self.recurrent(phases) + share[:, 1:] * self.complex(phases)
        return mixed


class Nested(nn.Module):
    """A recurrent network whose step is a complex-valued one: state and weights are complex."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inputs = nn.Linear(1, width, dtype=torch.complex64)
        self.states = nn.Linear(width, width, bias=False, dtype=torch.complex64)
        self.head = nn.Linear(width, 1, dtype=torch.complex64)

    def forward(self, phases: Tensor) -> Tensor:
        """Map (examples, steps) to points in the plane."""
        seen = self.inputs(turning(phases).unsqueeze(-1))
        state = squash(seen[:, 0])
        for step in seen[:, 1:].unbind(1):
            state = squash(step + self.states(state))
        return torch.view_as_real(self.head(state).squeeze(-1))


ROWS = (
    Architecture(
        "RNN and complex-valued, combined",
        claims=("D1-14", "D2-11", "D2-23"),
        **CIRCULAR,
        rate=0.03,
        rates=(0.01, 0.03, 0.1),
        build=lambda seed: Combined(),
    ),
    Architecture(
        "RNN and complex-valued, mixed",
        claims=("D1-14", "D2-11", "D2-24"),
        **CIRCULAR,
        rate=0.1,
        rates=(0.01, 0.03, 0.1),
        build=lambda seed: Mixed(),
    ),
    Architecture(
        "RNN and complex-valued, nested",
        claims=("D1-14", "D2-11", "D2-25"),
        **CIRCULAR,
        rate=0.03,
        rates=(0.01, 0.03, 0.1),
        build=lambda seed: Nested(),
    ),
)

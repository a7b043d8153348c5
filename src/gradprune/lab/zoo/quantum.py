"""Can a quantum circuit be pruned, whose weights are angles? (Simulated exactly; PennyLane.)"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import gradprune as gp
from gradprune.lab import data
from gradprune.lab.zoo.base import Architecture, Part
from gradprune.lab.zoo.tasks import Classify, Split
from gradprune.weights.request import Score

QUBITS, LAYERS = 4, 4
CLASSES = 4
SHARPNESS = 4.0  # a mean of Z lies between -1 and 1: too little for a softmax to be sure


class Circuit(nn.Module):
    """Rotations about y and z on each qubit, then a ring of controlled NOTs, layer upon layer; no other weight.

    The inputs are rotated in first, two on each qubit. The score of class q is the mean of Z on qubit q, sharpened. The
    angles, of shape (2 layers, qubits), start uniform in [0, 2 pi).
    """

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.Parameter(2 * math.pi * torch.rand(2 * LAYERS, QUBITS))

    def forward(self, x: Tensor) -> Tensor:
        """Map (examples, 2 * qubits) to (examples, classes)."""
        return self.run(x)

    def run(self, x: Tensor, *, drop: bool = False) -> Tensor:
        """Return the class scores; with `drop`, of the circuit from which the rotations by 0 are left out."""
        means = _simulator()(x, self.angles, drop)
        return SHARPNESS * torch.stack(list(means), dim=1).to(x.dtype)


@cache
def _simulator() -> Any:
    try:
        import pennylane as qml
    except ImportError as error:
        raise ImportError("the quantum circuit is simulated by PennyLane: pip install pennylane") from error

    def circuit(x: Tensor, angles: Tensor, drop: bool) -> Any:
        for qubit in range(QUBITS):
            qml.RY(x[:, qubit], wires=qubit)
            qml.RZ(x[:, QUBITS + qubit], wires=qubit)
        for layer in range(LAYERS):
            for gate, row in ((qml.RY, angles[2 * layer]), (qml.RZ, angles[2 * layer + 1])):
                for qubit in range(QUBITS):
                    if not (drop and float(row[qubit]) == 0):
                        gate(row[qubit], wires=qubit)
            for qubit in range(QUBITS):
                qml.CNOT(wires=[qubit, (qubit + 1) % QUBITS])
        return [qml.expval(qml.PauliZ(qubit)) for qubit in range(CLASSES)]

    device = qml.device("default.qubit", wires=QUBITS)
    return qml.QNode(circuit, device, interface="torch", diff_method="backprop")


@dataclass(frozen=True)
class CountGates(Classify):
    """Name the class; and say how many trained rotations the circuit still has."""

    def details(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Return the number of rotations by another angle than 0."""
        return {"rotations": float(torch.count_nonzero(model.get_parameter("angles")))}


@cache
def few_digits(seed: int) -> CountGates:
    """Return the digits 0 to 3, each its 8 principal components, scaled to a standard deviation of 1/2 on average."""
    loaded = data.load("digits", seed=seed)
    parts = [loaded.train, loaded.validation, loaded.test]
    chosen = [Split(part.x[part.y < CLASSES], part.y[part.y < CLASSES]) for part in parts]
    middle = chosen[0].x.mean(0)
    _, _, directions = torch.linalg.svd(chosen[0].x - middle, full_matrices=False)
    basis = directions[: 2 * QUBITS].T
    scale = 2 * ((chosen[0].x - middle) @ basis).std()
    train, validation, test = (Split((part.x - middle) @ basis / scale, part.y) for part in chosen)
    return CountGates(train, validation, test)


def _circuit(name: str, score: Score) -> Architecture:
    return Architecture(
        name,
        claims=("D1-14", "D2-11", "D2-19"),
        data="digits 0 to 3, eight principal components",
        metric="accuracy",
        higher=True,
        level=0.85,
        steps=100,
        rate=0.3,
        rates=(0.03, 0.1, 0.3),
        build=lambda seed: Circuit(),
        task=few_digits,
        score=score,
    )


ROWS = (_circuit("quantum circuit, by rotation", gp.rotation), _circuit("quantum circuit, by |angle|", gp.magnitude))

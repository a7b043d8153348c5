"""What is a unit of channels that can go only together, and what of a layer belongs to it (chapter 8)?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

Side = Literal["out", "in", "both", "parameter"]


class Part(NamedTuple):
    """One side of a layer; `both` where the channels that come in are those that go out, as of a norm."""

    name: str
    module: nn.Module
    side: Side
    attribute: str = ""  # of a parameter that belongs to no layer of a known kind
    dim: int = 0


Unit = dict[Part, tuple[int, ...]]


@dataclass
class Coupled:
    """Channels that share layers: units, each of which can go alone unless grouped convolutions want equal numbers."""

    units: list[Unit]
    stays: str = ""  # why none can go
    sizes: Mapping[str, int] = field(default_factory=dict)  # attributes of an attention: what one unit takes of each
    owner: nn.Module | None = None  # the attention

    @property
    def parts(self) -> list[Part]:
        """All sides of layers that any unit touches."""
        return list(dict.fromkeys(part for unit in self.units for part in unit))


def width(part: Part) -> int:
    """How many channels a side has."""
    module: Any = part.module
    if part.side == "parameter":
        return int(getattr(module, part.attribute).shape[part.dim])
    if isinstance(module, _ConvNd):
        return int(module.in_channels if part.side == "in" else module.out_channels)
    if isinstance(module, nn.Linear):
        return int(module.in_features if part.side == "in" else module.out_features)
    if is_transposed_linear(module):
        return int(module.nx if part.side == "in" else module.nf)
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    if isinstance(module, nn.PReLU):
        return module.num_parameters
    return int(module.num_features)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution has one filter a channel."""
    return isinstance(module, _ConvNd) and 1 < module.groups == module.out_channels == module.in_channels


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, which stores [in, out]."""
    return any(kind.__name__ == "Conv1D" and hasattr(module, "nf") for kind in type(module).__mro__)


def groups_of(part: Part) -> int:
    """Of how many groups a side is, each of which has to be as wide as the others; 1 where there are none."""
    module: Any = part.module
    return int(module.groups) if isinstance(module, _ConvNd) and not is_depthwise(module) else 1


def place(group: Coupled, unit: Unit) -> tuple[int, ...]:
    """In which groups of the grouped convolutions among the group's layers a unit is."""
    fixed = [part for part in group.parts if groups_of(part) > 1]
    return tuple(c // (width(part) // groups_of(part)) for part in fixed for c in unit.get(part, ()))


def reads(part: Part) -> bool:
    """Whether the part is the input side of a layer that sums over channels."""
    return part.side == "in"


def writes(part: Part) -> bool:
    """Whether the part is a filter, whose weights say whether its channel is alive."""
    return part.side == "out" or (part.side == "both" and isinstance(part.module, _ConvNd))


def is_layer(module: Any) -> bool:
    """Whether it is a layer that sums over channels: linear or a convolution."""
    return isinstance(module, _ConvNd | nn.Linear) or (isinstance(module, nn.Module) and is_transposed_linear(module))

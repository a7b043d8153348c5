"""What does a loop of rounds keep of a network, in memory and in a file that it goes on from (chapter 5)?"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core import files
from gradprune.core.checks import number, require, require_readable, state, whole
from gradprune.recovery.history import Entry
from gradprune.weights import bits
from gradprune.weights.mask import Masks
from gradprune.weights.named import parameters_of

State = dict[str, Any]

_FILE = files.Kind("gradprune.iterate", "checkpoint of iterate", "a round saved by iterate")
_NOT_AS_WRITTEN = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError)


@dataclass
class Standing:
    """Where a loop stands after a training.

    The network as it is, what rewinding goes back to (None before that is known), what teaches (None without a
    teacher), and the last round that `stop` passed (None before one, or without `stop`).
    """

    model: State
    rewound: State | None = None
    dense: State | None = None
    good: State | None = None
    masks: Masks = field(default_factory=lambda: Masks({}))
    good_masks: Masks = field(default_factory=lambda: Masks({}))
    entries: list[Entry] = field(default_factory=list)


def copy_of(model: nn.Module) -> State:
    """A copy of the model's state, what is no tensor in it (extra state) among it."""
    return {n: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for n, v in model.state_dict().items()}


def put_back(model: nn.Module, kept: State) -> None:
    """Load what ``copy_of`` returned; it can be loaded again."""
    plain = OrderedDict((n, v if isinstance(v, Tensor) else copy.deepcopy(v)) for n, v in kept.items())
    plain._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]  # versions of modules
    model.load_state_dict(plain)


def random_state() -> list[Tensor]:
    """The state of torch's generators: the CPU's, then each CUDA device's."""
    of_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []  # pragma: no mutate: needs CUDA
    return [torch.get_rng_state(), *of_devices]


def set_random_state(states: list[Tensor]) -> None:
    """Set torch's generators; those of devices that are not here are passed over."""
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        for at, device_state in enumerate(states[1 : 1 + torch.cuda.device_count()]):  # pragma: no mutate: needs CUDA
            torch.cuda.set_rng_state(device_state, at)  # pragma: no mutate: needs CUDA


class Checkpoint:
    """The file of one call of ``iterate``; raises, before anything is trained, where it cannot be written."""

    def __init__(self, path: Any, model: nn.Module, call: Mapping[str, Any]) -> None:
        files.safetensors()
        self.path = files.place("checkpoint", path)
        self._state = tensors = tensors_of(model)
        files.require_storable(tensors)
        call = dict(call) | {"tensors": {name: list(value.shape) for name, value in tensors.items()}}
        self._call = json.loads(json.dumps(call, default=_plain))  # as it will come back

    def save(self, standing: Standing) -> None:
        """Write where the loop stands, and torch's random state, whole or not at all."""
        parts = {
            "model": standing.model,
            "rewound": standing.rewound or {},
            "dense": standing.dense or {},
            "good": standing.good or {},
        }
        tensors = {f"{part}/{name}": tensor for part, values in parts.items() for name, tensor in values.items()}
        as_pairs = as_pairs_(tensors)
        told: dict[str, Any] = {"call": self._call, "complex": as_pairs}
        for key, part, masks in (("shapes", "mask", standing.masks), ("good shapes", "good mask", standing.good_masks)):
            packed = bits.packed(masks)
            tensors |= {f"{part}/{name}": entry["bits"] for name, entry in packed.items()}
            told[key] = {name: entry["shape"] for name, entry in packed.items()}
        cpu, *cuda = random_state()
        tensors |= {"random/cpu": cpu} | {f"random/cuda{at}": each for at, each in enumerate(cuda)}
        told["entries"] = [{k: v for k, v in vars(entry).items() if k != "failed"} for entry in standing.entries]
        files.write(self.path, _FILE, told, tensors)

    def read(self, model: nn.Module) -> tuple[Standing, list[Tensor]] | None:
        """Where the file stands and its random state, all of it checked; None where there is no file yet."""
        if not self.path.exists():
            return None
        told, tensors = files.read(self.path, _FILE)
        try:
            state(told, {"call": dict, "shapes": dict, "entries": list, "complex": list}, "iterate")
            tensors |= {name: torch.view_as_complex(tensors[name]) for name in told["complex"]}
            parts: dict[str, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                parts.setdefault(part, {})[name] = tensor
            entries = [_entry(at, entry) for at, entry in enumerate(told["entries"])]
            random = _random(parts.get("random", {}))
        except _NOT_AS_WRITTEN as error:
            raise ValueError(f"the checkpoint {self.path.name!r} is damaged: {error}") from error
        self._require_same(told["call"])
        found = Standing(
            self._checked(parts.get("model", {})),
            self._checked(parts["rewound"]) if "rewound" in parts else {},
            self._checked(parts["dense"]) if "dense" in parts else None,
            self._checked(parts["good"]) if "good" in parts else None,
            entries=entries,
        )
        try:
            found.masks = _masks(parts.get("mask", {}), told["shapes"], model)
            found.good_masks = _masks(parts.get("good mask", {}), told.get("good shapes", {}), model)
        except _NOT_AS_WRITTEN as error:
            raise ValueError(f"the checkpoint {self.path.name!r} has damaged masks: {error}") from error
        return found, random

    def _require_same(self, theirs: Mapping[str, Any]) -> None:
        for what, ours in self._call.items():
            require(
                theirs.get(what) == ours,
                f"the checkpoint {self.path.name!r} is of another call: its {what} are {theirs.get(what)}, this call's "
                f"{ours}; move it away, or repeat the call it is from",
            )

    def _checked(self, tensors: dict[str, Tensor]) -> State:
        """The state of a model of these tensors, else ValueError."""
        ours = {name: (tuple(t.shape), t.dtype) for name, t in self._state.items()}
        theirs = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        for name in ours | theirs:
            require(
                ours.get(name) == theirs.get(name),
                f"the checkpoint {self.path.name!r} is of another model: its {name!r} is {theirs.get(name)}, the "
                f"model's {ours.get(name)}",
            )
        return dict(tensors)


def as_pairs_(tensors: dict[str, Tensor]) -> list[str]:
    """Put pairs (real, imaginary) in the place of complex tensors, which the format has not; return their names."""
    names = [name for name, tensor in tensors.items() if tensor.is_complex()]
    tensors |= {name: torch.view_as_real(tensors[name].resolve_conj()) for name in names}
    return names


def tensors_of(model: nn.Module, asked: str = "checkpoint") -> dict[str, Tensor]:
    """Return the model's state, as a file can hold it; ValueError that names the argument if there is extra state."""
    found = model.state_dict()
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name!r} of the model's state is no tensor, but {type(value).__name__}: a checkpoint holds tensors "
                f"alone; leave `{asked}` out"
            )
        require_readable(name, value, "tensor")
    return dict(found)


def _masks(found: Mapping[str, Tensor], shapes: Mapping[str, Any], model: nn.Module) -> Masks:
    masks = bits.unpacked({name: {"bits": found[name], "shape": shape} for name, shape in shapes.items()})
    parameters = parameters_of(model, masks)
    return Masks({name: mask.to(parameters[name].device) for name, mask in masks.items()})


def _entry(at: int, found: Any) -> Entry:
    entry = state(found, {"round": int, "steps": list, "sparsity": float, "pruned": dict, "corrected": dict}, "iterate")
    first, stop = (whole("a step", step, least=0) for step in entry["steps"])
    require(entry["round"] == at, f"entry {at} of the checkpoint is of round {entry['round']}")
    sparsity = number("the sparsity of an entry", entry["sparsity"], least=0, most=1)
    measured = [entry["pruned"], entry["corrected"]]
    require(
        all(isinstance(v, float) for m in measured for v in m.values()), f"entry {at} has values that are no numbers"
    )
    return Entry(at, (first, stop), sparsity, *measured)


def _random(found: dict[str, Tensor]) -> list[Tensor]:
    states = [found["cpu"], *(found[f"cuda{at}"] for at in range(len(found) - 1))]
    torch.Generator("cpu").set_state(states[0])  # a RuntimeError where it is none
    return states


def _plain(value: Any) -> Any:
    """What JSON does not know, of the arguments of prune."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)

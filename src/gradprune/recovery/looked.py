"""What has a search for the largest sparsity looked at, in a file that it goes on from (chapter 6)?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from gradprune.core import files
from gradprune.core.checks import number, require, state, whole
from gradprune.recovery.checkpoint import as_pairs_, tensors_of
from gradprune.recovery.found import Look
from gradprune.recovery.outcome import Outcome

_FILE = files.Kind("gradprune.largest_sparsity", "file of gp.largest_sparsity", "the looks of a search")
_EACH, _STATE = "dense", "state/"
_NOT_AS_WRITTEN = (TypeError, ValueError, KeyError, IndexError, AttributeError)


class Looked:
    """The looks so far, by the sparsity that was asked for; without a file in memory only."""

    def __init__(self, path: Any, model: nn.Module, call: Mapping[str, Any], *, trains: bool) -> None:
        self.dense: Outcome | None = None
        self.looks: dict[float, Look] = {}
        self.evaluations = 0
        self.size: int | None = None  # how many results `evaluate` returns
        self.state: dict[str, Any] | None = None
        self._path = None
        if path is None:
            return
        files.safetensors()
        self._path = files.place("file", path)
        if trains:
            files.require_storable(tensors_of(model, "file"))
        self._call = json.loads(json.dumps(call))  # as it will come back
        if self._path.exists():
            self._read(model)

    def write(self) -> None:
        """Write all down, whole or not at all."""
        if self._path is None or self.dense is None:
            return
        kept = {} if self.state is None else {_STATE + name: value for name, value in self.state.items()}
        as_pairs = as_pairs_(kept)
        told = {
            "call": self._call,
            "complex": as_pairs,
            "evaluations": self.evaluations,
            "size": self.size,
            "state": self.state is not None,
            "looks": [{"asked": asked} | vars(look) for asked, look in self.looks.items()],
        }
        each = torch.from_numpy(np.ascontiguousarray(self.dense.each))
        files.write(self._path, _FILE, told, {_EACH: each} | kept)

    def _read(self, model: nn.Module) -> None:
        assert self._path is not None
        told, tensors = files.read(self._path, _FILE)
        try:
            state(told, {"call": dict, "complex": list, "looks": list, "state": bool}, "largest_sparsity")
            call, each = dict(told["call"]), tensors.pop(_EACH).numpy()
            require(each.dtype == np.float64 and each.ndim == 1 and bool(np.isfinite(each).all()), "its results")
            looks = {number("asked", look["asked"]): _look(look) for look in told["looks"]}
            tensors |= {name: torch.view_as_complex(tensors[name]) for name in told["complex"]}
            evaluations = whole("evaluations", told["evaluations"], least=1)
            size = whole("size", told["size"], least=1, most=each.size)
        except _NOT_AS_WRITTEN as error:
            raise ValueError(f"{str(self._path)!r} is damaged: {error}; give another file, or remove it") from None
        for key, wanted in self._call.items():
            require(
                call.get(key) == wanted,
                f"{str(self._path)!r} is of another search, with other {key}: give another file, or remove it",
            )
        self.dense, self.looks = Outcome(float(each.mean()), each), looks
        self.evaluations, self.size = evaluations, size
        if told["state"]:
            kept = {name.removeprefix(_STATE): value for name, value in tensors.items()}
            own = tensors_of(model, "file")
            require(
                {name: (v.shape, v.dtype) for name, v in kept.items()}
                == {name: (v.shape, v.dtype) for name, v in own.items()},
                f"{str(self._path)!r} holds the state of another model: give another file, or remove it",
            )
            self.state = {name: kept[name].to(value.device) for name, value in own.items()}


def _look(told: Mapping[str, Any]) -> Look:
    """A look as it was written."""
    bound = None if told["bound"] is None else number("bound", told["bound"])
    passed, probe = told["passed"], told["probe"]
    require(isinstance(passed, bool) and isinstance(probe, bool), "passed and probe are true or false")
    found = Look(number("sparsity", told["sparsity"]), number("value", told["value"]), bound, passed, probe)
    require(0 <= found.sparsity <= 1 and math.isfinite(found.value), "a look is out of range")
    return found

"""How is a shrunk network kept in a file and read again, without pickle (chapter 8)?

Its class, built anew, is as wide as before. So the file holds, beside the tensors, what each layer says of itself: its
class, its widths, its other settings; and how wide the network was before it was shrunk. A quantized weight ``w`` is
two tensors there, ``w:int8`` and ``w:scale``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core import checks, files
from gradprune.core.checks import is_quantized, require
from gradprune.core.layers import require_layers, uncompiled_network
from gradprune.deploy.cut import WIDTHS
from gradprune.deploy.quantize import DTYPES, SCHEMES, as_linear_, assembled, is_conv1d, parts, scheme_of
from gradprune.deploy.sparse import SparseLinear

_FILE = files.Kind(
    "gradprune.network",
    "file of a network",
    "a network saved by gp.save",
    "; a state_dict() that torch.save wrote is read by torch.load(path, weights_only=True)",
)
_DENSE = "_gradprune_dense"  # where a shrunk network keeps the shapes of before
_OF_TRAINING = {"training", "p", "momentum", "inplace", "dropout", "requires_grad"}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network to a safetensors file with the widths of its layers, whole or not at all; no pickle.

    Args:
        model: What ``shrink`` or ``quantize`` returned, trained on or not; any other network too.
        path: The file; a failed or interrupted call leaves what stood there.

    Raises:
        ImportError: safetensors is not installed.
        TypeError: The model is no module, or a parameter has no values (lazy, meta, DTensor); or `path` is
            no path.
        ValueError: A tensor is of a kind that the file cannot hold (sparse), a layer is one of ``compress``, or nothing
            can be written at `path`.
        OSError: The file could not be written to its end.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> masks = gp.prune(model, sparsity=0.5, granularity="channel", include="0.*")
        >>> gp.save(gp.shrink(model, torch.ones(1, 4), masks), "small.safetensors")

    Chapter 8.
    """
    files.safetensors()
    network = _plain(model)
    place = files.place("path", path)
    for name, module in network.named_modules():
        require(
            not isinstance(module, SparseLinear),
            f"{name!r} is stored as it was fastest here, by gp.compress: save the network that that was given, and "
            "compress it where it is to run",
        )
    state = {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    quantized = {name: tensor for name, tensor in state.items() if is_quantized(tensor)}
    plain = {name: tensor for name, tensor in state.items() if name not in quantized}
    for name, tensor in quantized.items():
        plain |= {f"{name}:{part}": held for part, held in parts(tensor).items()}
    require(len(plain) == len(state) + len(quantized), "names of the model end in ':int8' or ':scale'")
    for name, tensor in plain.items():
        checks.require_readable(name, tensor)
    files.require_storable(plain)
    first, tied = _ties(plain)
    told = {
        "version": 2 if quantized else 1,
        "modules": {name: _described(module) for name, module in network.named_modules()},
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        "dense": network.__dict__.get(_DENSE),
        "tied": tied,
    }
    if quantized:
        told["quantized"] = {name: _told_of(tensor) for name, tensor in quantized.items()}
    files.write(place, _FILE, told, first)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Return a network of the model's classes with the widths and weights of a file that ``save`` wrote.

    The model is built as the network was before it was shrunk: ``gp.load(Model(), path)``. Parameters and buffers get
    the file's dtypes and stay on the model's devices; modes and ``requires_grad`` are the model's. Buffers that a state
    dict leaves out are the model's.

    Args:
        model: The network as its class makes it, dense; it is not changed.
        path: The file.

    Returns:
        A copy of the model, cut and filled.

    Raises:
        ImportError: safetensors is not installed, or torchao where weights are quantized.
        FileNotFoundError: There is no such file.
        TypeError: The model is no module, or `path` is no path.
        ValueError: The file is none of ``save``'s, or damaged; or the model is of another class, has other layers,
            settings or widths than the network had: the message says which layer.

    Example:
        >>> def build():
        ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = build()
        >>> masks = gp.prune(model, sparsity=0.5, granularity="channel", include="0.*")
        >>> gp.save(gp.shrink(model, torch.ones(1, 4), masks), "small.safetensors")
        >>> gp.load(build(), "small.safetensors")[0]
        Linear(in_features=4, out_features=4, bias=True)

    Chapter 8.
    """
    network = _plain(model)
    place = files.checked_path("path", path)
    told, tensors = files.read(place, _FILE)
    saved = _Saved(place.name, told, tensors)
    if not saved.quantized:
        saved.check(network)
    twin = copy.deepcopy(network)
    if saved.quantized:  # where a Conv1D may have become a Linear
        saved.as_linear_(twin)
        saved.check(twin)
    for name, module in twin.named_modules():
        for attribute, value in saved.widths(name).items():
            setattr(module, attribute, value)
    saved.fill_(twin)
    return twin


def remember_dense_(model: nn.Module) -> None:
    """Let a network that is to be cut remember how wide it was."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    model.__dict__.setdefault(_DENSE, shapes)


def _plain(model: nn.Module) -> nn.Module:
    require_layers(checks.module(model))
    return uncompiled_network(model)


class _Saved:
    """What a file says, and whether a model fits it."""

    def __init__(self, name: str, told: Any, tensors: dict[str, Tensor]) -> None:
        self.name, self.tensors = name, tensors
        damaged = f"{name!r} is no {_FILE.name}: what it tells of itself is damaged"
        require(isinstance(told, dict), damaged)
        require(told.get("version") in (1, 2), f"{name!r} was written by a newer version of gradprune")
        for key in ("modules", "shapes", "tied"):
            require(isinstance(told.get(key), dict), damaged)
        self.modules: dict[str, Any] = told["modules"]
        self.shapes = {key: tuple(shape) for key, shape in told["shapes"].items()}
        dense = told.get("dense")
        self.dense = None if dense is None else {key: tuple(shape) for key, shape in dense.items()}
        self.tied: dict[str, str] = told["tied"]
        self.quantized: dict[str, Any] = told.get("quantized", {})
        require(isinstance(self.quantized, dict) and all(map(_is_known, self.quantized.values())), damaged)
        for key, shape in self.shapes.items():
            own = f"{key}:int8" if key in self.quantized else key
            held = tensors.get(self.tied.get(own, own))
            require(held is not None and tuple(held.shape) == shape, f"{damaged}: {key!r} is missing or misshapen")
        for key in self.quantized:
            scale, rows = self.tensor(f"{key}:scale"), self.shapes.get(key, (0,))[0]
            require(scale is not None and tuple(scale.shape) == (rows, 1), f"{damaged}: the scales of {key!r}")

    def tensor(self, name: str) -> Tensor | None:
        """A tensor of the file, by any of its names."""
        return self.tensors.get(self.tied.get(name, name))

    def as_linear_(self, model: nn.Module) -> None:
        """Make the model's layers of transformers' Conv1D linear ones where those of the file are."""
        for name in self.quantized:
            path = name.rpartition(".")[0]
            module = dict(model.named_modules()).get(path)
            if module is not None and is_conv1d(module) and path:
                as_linear_(model, path)

    def widths(self, name: str) -> dict[str, Any]:
        return {a: _hashable(v) for a, v in self.modules[name]["settings"].items() if a in WIDTHS}

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, naming the layer, where the model is none that the network can have been."""
        own = dict(model.named_modules())
        for name, told in self.modules.items():
            called = f"layer {name!r}" if name else "the network"
            require(name in own, f"the model has no layer {name!r}, a {told['class']} in {self.name!r}")
            kind = type(own[name]).__qualname__
            require(kind == told["class"], f"{called} is a {told['class']} in {self.name!r}, in the model a {kind}")
        if extra := [name for name in own if name not in self.modules]:
            raise ValueError(
                f"the model has a layer {extra[0]!r} ({type(own[extra[0]]).__qualname__}), {self.name!r} none"
            )
        state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
        for name, shape in self.shapes.items():
            if name not in state:
                if self.dense is not None and name not in self.dense:  # a bias, made where a constant was folded
                    continue
                raise ValueError(f"the model has no {name!r}, which {self.name!r} has")
            self._check_width(name, tuple(state[name].shape), shape)
        if missing := [name for name in state if name not in self.shapes]:
            raise ValueError(f"{self.name!r} has no {missing[0]!r}, which the model has")
        for name, told in self.modules.items():
            self._check_settings(name, own[name], told["settings"])

    def _check_width(self, name: str, has: tuple[int, ...], shape: tuple[int, ...]) -> None:
        wanted = self.dense.get(name, has) if self.dense is not None else has
        fits = len(has) == len(shape) and all(h >= s for h, s in zip(has, shape, strict=True))
        before = f", and had {wanted} before it was shrunk" if wanted not in (has, shape) else ""
        require(
            fits and has == wanted,
            f"{name!r} has shape {shape} in {self.name!r}{before}; in the model it has {has}: build the model as wide "
            "as the network was before it was shrunk",
        )

    def _check_settings(self, name: str, module: nn.Module, told: Mapping[str, Any]) -> None:
        own = _described(module)["settings"]
        for attribute, value in told.items():
            value, has = _hashable(value), _hashable(own.get(attribute))
            if attribute not in WIDTHS and attribute in own and has != value:
                raise ValueError(f"layer {name!r} has {attribute} {value} in {self.name!r}, in the model {has}")

    def fill_(self, model: nn.Module) -> None:
        """Put the file's tensors in the place of the model's."""
        made: dict[str, Any] = {}
        modules = dict(model.named_modules(remove_duplicate=False))
        for name in self.shapes:
            path, _, attribute = name.rpartition(".")
            module, key = modules[path], self.tied.get(name, name)
            held = module._buffers.get(attribute) if attribute in module._buffers else module._parameters.get(attribute)
            device = _materialized(held.device if held is not None else next(module.parameters()).device)
            if name in self.quantized:
                module._parameters[attribute] = nn.Parameter(self._quantized(name, device), requires_grad=False)
                continue
            tensor = self.tensors[key].to(device)
            if attribute in module._buffers:
                module._buffers[attribute] = tensor
                continue
            if key not in made:
                grad = held.requires_grad if held is not None else module._parameters["weight"].requires_grad
                made[key] = nn.Parameter(tensor, requires_grad=grad)
            module._parameters[attribute] = made[key]

    def _quantized(self, name: str, device: torch.device) -> Tensor:
        told = self.quantized[name]
        integers, scale = (self.tensors[self.tied.get(key, key)] for key in (f"{name}:int8", f"{name}:scale"))
        dtype = getattr(torch, told["dtype"])
        return assembled(integers.to(device), scale.to(device), dtype, told["scheme"], bool(told["reduced"]))


def _told_of(tensor: Any) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"scheme": scheme_of(tensor), "dtype": dtype, "reduced": bool(tensor.reduce_range)}


def _is_known(told: Any) -> bool:
    """Whether what a file tells of a quantized weight can be."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    return (
        isinstance(told, dict) and told.get("scheme") in SCHEMES and told.get("dtype") in dtypes and "reduced" in told
    )


def _materialized(device: torch.device) -> torch.device:
    """Where the file's tensors go: a model made on the meta device gets its memory from them."""
    return torch.device("cpu") if device.type == "meta" else device


def _described(module: nn.Module) -> dict[str, Any]:
    """A layer's class, its widths, and, of torch's own layers, its other settings."""
    of_torch = type(module).__module__.startswith("torch.nn.")
    settings = {
        name: value
        for name, value in vars(module).items()
        if name in WIDTHS or (of_torch and not name.startswith("_") and name not in _OF_TRAINING)
    }
    return {"class": type(module).__qualname__, "settings": {n: v for n, v in settings.items() if _is_plain(v)}}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (int, float, str, bool)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name; the other names, and which it is."""
    first: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else name
        other = first.setdefault(key, name)
        if other != name:
            tied[name] = other
    return {name: tensor.detach().clone() for name, tensor in state.items() if name not in tied}, tied

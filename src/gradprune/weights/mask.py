"""Which weights stay, and which are zero (chapter 4)?"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core.masked import count_kept, zero_pruned_
from gradprune.core.steps import Optimizers, as_list, not_owned, ridden
from gradprune.weights.hold import Hold, warn_of_unowned


class Masks(Mapping[str, Tensor]):
    """Which weights stay: a mapping from parameter names to bool tensors of the parameters' shapes (True stays).

    `masks` may be any such mapping; the tensors are kept, not copied. Raises ValueError where one is not bool.
    Chapter 4.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"the mask of {name!r} must be a bool tensor, got {kind}")
        self._masks = dict(masks)
        self._parameters: dict[str, weakref.ref[nn.Parameter]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        total = sum(m.numel() for m in self.values())
        return f"Masks({len(self)} tensors, {total:,} weights, sparsity {self.sparsity:.4f})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Masks:
        # A copied model has parameters of its own: the copy belongs to none until it is applied to one.
        return Masks(copy.deepcopy(self._masks, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return Masks, (self._masks,)

    @property
    def sparsity(self) -> float:
        """The share of the masked parameters' entries that are pruned; 0.0 where there are none."""
        total = sum(m.numel() for m in self.values())
        kept = sum(count_kept(m) for m in self.values())
        return 1 - kept / total if total else 0.0

    def apply_(self, model: nn.Module) -> Masks:
        """Set the pruned weights of `model` to zero, and remember its parameters for ``hold``.

        Whatever stood there, infinities and NaN among it, becomes +0.0. Returns these masks, for chaining.
        Raises ValueError, before any weight is changed, where a name is not a parameter of the model or a shape
        differs. Chapter 4.
        """
        parameters = self._find(model)
        zero_pruned_((parameter, self[name].to(parameter.device)) for name, parameter in parameters.items())
        return self.belonging_to(parameters)

    def mask_gradients_(self, model: nn.Module) -> Masks:
        """Set the gradients of the pruned weights of `model` to zero; what has no gradient is passed over.

        Holding does not need it: pruned weights stay zero whatever their gradients are. But a norm does, taken to clip
        by it or to look at it: without this it counts gradients that move nothing. Returns these masks, for chaining.
        Raises ValueError, before any gradient is changed, where a name or a shape is not the model's, and for a sparse
        gradient. Chapter 4.
        """
        gradients = {name: p.grad for name, p in self._find(model).items() if p.grad is not None}
        for name, gradient in gradients.items():
            if gradient.layout != torch.strided:
                raise ValueError(f"the gradient of {name!r} is sparse ({gradient.layout}); make it dense first")
        zero_pruned_((gradient, self[name].to(gradient.device)) for name, gradient in gradients.items())
        return self

    def hold(self, optimizer: Optimizers, model: nn.Module | None = None) -> Hold:
        """Keep the pruned weights exactly zero after every step of `optimizer`, until the handle is removed.

        They are set to zero now and after each step, whatever momentum, weight decay or a loaded state says; what the
        optimizer remembers of them is forgotten. No parameter name, forward pass or module is touched. A parameter has
        one mask in an optimizer: a later call replaces an earlier one. Give all optimizers that move masked weights.
        Wrapped ones (accelerate, Lightning, SAM, Lookahead) are looked into. Weights that are written otherwise than by
        a step (an average, a loaded checkpoint) come back until the next step: ask ``masks.holds(model)``, mend by
        ``masks.apply_(model)``. Of an optimizer that first climbs (SAM), mask the gradients before the climb, by
        ``masks.mask_gradients_(model)``, or its second forward pass is that of a network with pruned weights alive.

        Args:
            optimizer: what moves the weights, or a list of all that do.
            model: the model whose parameters are held; by default the one the masks were made from or applied to.

        Returns:
            A handle with ``remove()``, which is also a context manager.

        Raises:
            TypeError: `optimizer` is no optimizer, or one whose steps cannot be watched.
            ValueError: the masks belong to no model, a name or shape is not the model's, or the optimizers have none of
                the parameters. Nothing has been changed then.

        Warns where the optimizers lack some of the masked parameters.

        Example:
            >>> model = torch.nn.Linear(8, 8)
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> hold = gp.prune(model, sparsity=0.5).hold(optimizer)

        Chapter 4.
        """
        optimizers = as_list(optimizer)
        for given in optimizers:
            ridden(given)
        parameters = self._live_parameters() if model is None else self._find(model)
        missing = set(not_owned(parameters, optimizers))
        held = {p: self[name].to(p.device) for name, p in parameters.items() if name not in missing}
        if parameters and not held:
            raise ValueError(
                f"the optimizer owns none of the {len(parameters)} masked parameters ({_some(parameters)}); "
                "was it made from another model, or from a copy?"
            )
        warn_of_unowned(parameters, optimizers, stacklevel=2)
        zero_pruned_(held.items())
        return Hold(optimizers, held)

    def belonging_to(self, parameters: Mapping[str, nn.Parameter]) -> Masks:
        """Remember these parameters, by the masks' names, as the ones to ``hold``; return these masks."""
        self._parameters = {name: weakref.ref(parameter) for name, parameter in parameters.items()}
        return self

    def _find(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters by the masks' names, checked."""
        every = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in self.items():
            if name not in every:
                raise ValueError(f"the model has no parameter {name!r}; it has {_some(every)}")
            if every[name].shape != mask.shape:
                raise ValueError(
                    f"the mask of {name!r} has shape {tuple(mask.shape)}, "
                    f"the parameter has shape {tuple(every[name].shape)}"
                )
        return {name: every[name] for name in self}

    def _live_parameters(self) -> dict[str, nn.Parameter]:
        live = {name: ref() for name, ref in self._parameters.items()}
        found = {name: p for name, p in live.items() if p is not None}
        if len(found) == len(self):
            return found
        raise ValueError(
            "these masks belong to no model yet: call masks.apply_(model) first, or masks.hold(optimizer, model)"
        )

    # ------------------------------------------------------------------------------------------- state and files

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Everything, at one bit a weight: name -> {"bits": uint8 tensor on the CPU, "shape": tuple of int}."""
        return {name: {"bits": _pack(mask), "shape": tuple(mask.shape)} for name, mask in self.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Any]]) -> Masks:
        """The masks that ``state_dict`` described, on the CPU. Raises ValueError where bits and shape disagree."""
        return cls({name: _unpack(name, entry["bits"], tuple(entry["shape"])) for name, entry in state.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, one bit a weight.

        The file appears whole or not at all: a failed or interrupted call leaves what stood at `path`.
        """
        state = self.state_dict()
        shapes = {name: entry["shape"] for name, entry in state.items()}
        bits = {name: entry["bits"] for name, entry in state.items()}
        part = f"{os.fspath(path)}.part"
        try:
            _safetensors().torch.save_file(bits, part, metadata={"gradprune.masks": json.dumps(shapes)})
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read the masks that ``save`` wrote. Raises ValueError where the file holds none."""
        with _safetensors().safe_open(path, framework="pt") as file:
            shapes = (file.metadata() or {}).get("gradprune.masks")
            if shapes is None:
                raise ValueError(f"{os.fspath(path)!r} is a safetensors file without masks saved by Masks.save")
            state = {name: {"bits": file.get_tensor(name), "shape": s} for name, s in json.loads(shapes).items()}
        return cls.from_state_dict(state)

    @classmethod
    def from_torch(cls, model: nn.Module) -> Masks:
        """The masks of a model pruned by ``torch.nn.utils.prune``, under the names from before it was.

        The model stays as it is; ``from_torch_`` also undoes torch's reparametrization.
        Raises ValueError where the model holds no such mask.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = {
            name.removesuffix("_mask"): buffer.bool()
            for name, buffer in model.named_buffers(remove_duplicate=False)
            if name.endswith("_mask") and name.removesuffix("_mask") + "_orig" in parameters
        }
        if not found:
            raise ValueError("no parameter of this model is pruned by torch.nn.utils.prune")
        return cls(found)

    @classmethod
    def from_torch_(cls, model: nn.Module) -> Masks:
        """Take over from ``torch.nn.utils.prune``: its masks, with the model's parameters made plain again.

        The parameters stay the same objects under their own names, so an optimizer goes on with them; hold them with
        ``hold``. Raises ValueError where the model holds no such mask.
        """
        from torch.nn.utils import prune as torch_prune

        masks = cls.from_torch(model)
        for name in masks:
            path, _, attribute = name.rpartition(".")
            torch_prune.remove(model.get_submodule(path), attribute)
        return masks.apply_(model)

    def to_torch_(self, model: nn.Module) -> None:
        """Prune `model` by ``torch.nn.utils.prune.custom_from_mask`` with these masks.

        From then on torch's own reparametrization holds: each parameter is renamed to ``..._orig``.
        Raises ValueError, before anything is changed, where a name or a shape is not the model's.
        """
        from torch.nn.utils import prune as torch_prune

        for name, parameter in self._find(model).items():
            path, _, attribute = name.rpartition(".")
            mask = self[name].to(parameter.device)
            torch_prune.custom_from_mask(model.get_submodule(path), attribute, mask)


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def _unpack(name: str, bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != -(-count // 8):
        raise ValueError(f"the mask of {name!r} needs {-(-count // 8)} bytes for shape {shape}, got {bits.numel()}")
    flat = np.unpackbits(bits.cpu().numpy(), count=count).view(np.bool_)
    return torch.from_numpy(flat).view(shape)


def _some(names: Mapping[str, Any], most: int = 5) -> str:
    shown = ", ".join(map(repr, list(names)[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("masks are saved as safetensors files: pip install safetensors") from error
    return safetensors

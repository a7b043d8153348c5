"""Which weights stay, and which are zero (chapter 4)?"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core import files
from gradprune.core.checks import is_distributed, require, require_readable, require_writable
from gradprune.core.masked import count_alive, count_kept, zero_pruned_
from gradprune.core.ranks import Ranks
from gradprune.core.replicas import alike, by_hash, replicas_of
from gradprune.core.steps import Optimizers, as_list, not_owned, ridden
from gradprune.weights import bits
from gradprune.weights.hold import Hold, warn_of_unowned
from gradprune.weights.named import parameters_of, some
from gradprune.weights.shown import by_layer, in_all, weights_among


class Masks(Mapping[str, Tensor]):
    """Which weights stay: a mapping from parameter names to bool tensors of the parameters' shapes (True stays).

    A name is that of ``model.named_parameters()``. Where a model has none of that name, the one is meant that differs
    only by what DistributedDataParallel, DataParallel, AveragedModel or torch.compile put before it.

    Where DistributedDataParallel wraps the model, ``apply_`` and ``hold`` are called by all ranks together, which
    raise where their masks differ.

    Args:
        masks: any such mapping; the tensors are kept, not copied.

    Raises:
        TypeError: where `masks` is no mapping from names to tensors, or a tensor has no values (meta, sparse).
        ValueError: where a tensor is not bool.

    Example:
        >>> masks = gp.Masks({"weight": torch.tensor([[True, False]])})
        >>> masks.apply_(nn.Linear(2, 1)).sparsity
        0.5

    Chapter 4.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        if not isinstance(masks, Mapping):
            hint = "; gp.prune(model, ...) makes the masks of a model" if isinstance(masks, nn.Module) else ""
            kind = type(masks).__name__
            raise TypeError(f"masks must be a mapping from parameter names to bool tensors, got {kind}{hint}")
        for name, mask in masks.items():
            _check_mask(name, mask)
        self._masks = dict(masks)
        self._parameters: dict[str, weakref.ref[nn.Parameter]] = {}
        self._ranks: Ranks | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self.keys() == other.keys() and all(_same(mask, other[name]) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]  # as for any mapping: it is equal to others by what it holds

    def __repr__(self) -> str:
        kept = self._counts()
        return f"Masks({in_all(self, kept)}){by_layer(self, kept)}"

    def __copy__(self) -> Masks:
        twin = Masks(self._masks)
        twin._parameters, twin._ranks = dict(self._parameters), self._ranks
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Masks:
        # A copied model has parameters of its own: the copy belongs to none until it is applied to one.
        return Masks({name: mask.clone() for name, mask in self.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return Masks, (self._masks,)

    @property
    def sparsity(self) -> float:
        """The share of the masks' entries that are pruned; 0.0 where there are none.

        Entries of one dimension, the biases and norms that go with a channel, count only where there are no others.

        The masks' own, as is what they show when printed: whether the weights of a model are zero there is what
        ``masks.holds(model)`` says.
        """
        counted, kept = weights_among(self), self._counts()
        total = sum(m.numel() for m in counted.values())
        return 1 - sum(kept[name] for name in counted) / total if total else 0.0

    def apply_(self, model: nn.Module) -> Masks:
        """Set the pruned weights of `model` to zero, and remember its parameters for ``hold``.

        Args:
            model: the network; what stood there, infinities and NaN among it, becomes +0.0.

        Returns:
            These masks, for chaining.

        Raises:
            TypeError: where `model` is no module, or a parameter is of a kind that cannot be pruned.
            ValueError: where a name or a shape is not the model's, or a parameter cannot be written. Nothing is
                changed then.

        Chapter 4.
        """
        ranks = replicas_of(model)
        parameters = alike("Masks.apply_", ranks, self._told, lambda: self._writable(model))
        zero_pruned_([(parameter, self._beside(parameter, name)) for name, parameter in parameters.items()])
        return self._belonging_to(parameters, ranks)

    def holds(self, model: nn.Module) -> bool:
        """Whether every pruned weight of `model` is zero now.

        Ask after weights were written outside an optimizer's step: an average of weights (AveragedModel, a trainer's
        averaging callback), the sync of a Lookahead, the best checkpoint loaded at the end. ``apply_`` mends it.

        Args:
            model: the network; it is only read.

        Returns:
            True where all are zero; a NaN is not, -0.0 is.

        Raises:
            TypeError: where `model` is no module, or a parameter has no values to read.
            ValueError: where a name or a shape is not the model's.

        Example:
            >>> model = nn.Linear(8, 8)
            >>> masks = gp.prune(model, sparsity=0.5)
            >>> with torch.no_grad():
            ...     _ = model.weight.add_(1.0)
            >>> masks.holds(model), masks.apply_(model).holds(model)
            (False, True)

        Chapter 4.
        """
        return not self._alive(model)

    def mask_gradients_(self, model: nn.Module) -> Masks:
        """Set the gradients of the pruned weights of `model` to zero, so that a norm counts only what can move.

        Holding does not need it: pruned weights stay zero whatever their gradients are.

        Args:
            model: the network, after its backward pass; what has no gradient is passed over.

        Returns:
            These masks, for chaining.

        Raises:
            TypeError: where `model` is no module, or a gradient is of a kind that cannot be written.
            ValueError: where a name or a shape is not the model's, or a gradient is sparse or cannot be written.
                Nothing is changed then.

        Chapter 4.
        """
        gradients = {name: p.grad for name, p in self._of(model).items() if p.grad is not None}
        for name, gradient in gradients.items():
            if gradient.layout != torch.strided:
                raise ValueError(f"the gradient of {name!r} is sparse ({gradient.layout}); make it dense first")
            require_writable(name, self._held(gradient), "gradient of")
        zero_pruned_([(gradient, self._beside(gradient, name)) for name, gradient in gradients.items()])
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
            >>> model = nn.Linear(8, 8)
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> hold = gp.prune(model, sparsity=0.5).hold(optimizer)

        Chapter 4.
        """

        def checked() -> tuple[list[Any], dict[str, nn.Parameter], dict[nn.Parameter, Tensor]]:
            optimizers = as_list(optimizer)
            for given in optimizers:
                ridden(given)
            parameters = self._live_parameters() if model is None else self._writable(model)
            missing = set(not_owned(parameters, optimizers))
            held = {p: self._beside(p, name) for name, p in parameters.items() if name not in missing}
            if parameters and not held:
                raise ValueError(
                    f"the optimizer owns none of the {len(parameters)} masked parameters ({some(parameters)}); "
                    "was it made from another model, or from a copy?"
                )
            return optimizers, parameters, held

        ranks = self._ranks if model is None else replicas_of(model)
        optimizers, parameters, held = alike("Masks.hold", ranks, self._told, checked)
        warn_of_unowned(parameters, optimizers)
        zero_pruned_(held.items())
        return Hold(optimizers, held)

    def _belonging_to(self, parameters: Mapping[str, nn.Parameter], ranks: Ranks | None = None) -> Masks:
        """Remember these parameters, by the masks' names, as the ones to ``hold``; return these masks."""
        self._ranks = ranks
        self._parameters = {name: weakref.ref(parameter) for name, parameter in parameters.items()}
        return self

    # What masks of parameters that are spread over several processes do otherwise.

    def _counts(self) -> dict[str, int]:
        """How many entries of each mask are True."""
        return {name: count_kept(mask) for name, mask in self.items()}

    def _told(self) -> dict[str, object]:
        """The masks as what all ranks must have alike."""
        return by_hash(self)

    def _held(self, tensor: Tensor) -> Tensor:
        """What this process has of a tensor."""
        return tensor

    def _beside(self, tensor: Tensor, name: str) -> Tensor:
        """The mask of what is held here of a tensor, on its device."""
        return self[name].to(tensor.device)

    def _of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters by the masks' names."""
        return parameters_of(model, self)

    def _alive(self, model: nn.Module) -> int:
        """How many of the pruned weights are other than zero."""
        return count_alive((p, self._beside(p, name)) for name, p in self._of(model).items())

    def _writable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters by the masks' names, checked."""
        parameters = self._of(model)
        for name, parameter in parameters.items():
            require_writable(name, self._held(parameter))
        return parameters

    def _live_parameters(self) -> dict[str, nn.Parameter]:
        live = {name: ref() for name, ref in self._parameters.items()}
        found = {name: p for name, p in live.items() if p is not None}
        require(
            len(found) == len(self),
            "these masks belong to no model yet: call masks.apply_(model) first, or masks.hold(optimizer, model)",
        )
        for name, parameter in found.items():
            require_writable(name, self._held(parameter))
            require(parameter.shape == self[name].shape, f"the mask of {name!r} no longer has the parameter's shape")
        return found

    # ------------------------------------------------------------------------------------------- state and files

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Everything, at one bit a weight: name -> {"bits": uint8 tensor on the CPU, "shape": tuple of int}."""
        return bits.packed(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Mapping[str, Any]]) -> Masks:
        """Return the masks that ``state_dict`` described, on the CPU; bool tensors by name are masks already.

        Raises:
            TypeError: where `state` or an entry of it is no dict.
            ValueError: where an entry lacks bits or shape, or they disagree.
        """
        if isinstance(state, Mapping) and any(isinstance(v, Tensor) and is_distributed(v) for v in state.values()):
            from gradprune.weights.mask_sharded import ShardedMasks

            return ShardedMasks.from_state_dict(state)
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return cls(state)  # type: ignore[arg-type]  # as those of DTensors are saved, and loaded in one process
        return cls(bits.unpacked(state))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, one bit a weight, whole or not at all.

        Needs safetensors (``pip install safetensors``); ``torch.save(masks.state_dict(), path)`` does not.

        Args:
            path: the file; a failed or interrupted call leaves what stood there.

        Raises:
            ImportError: where safetensors is not installed.
            TypeError: where `path` is no path.
            ValueError: where it is a folder, or in one that does not exist or cannot be written to.
            OSError: where the file could not be written to its end.
        """
        files.safetensors()
        bits.write(files.place("path", path), self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Return the masks that ``save`` wrote, on the CPU.

        What ``torch.save(masks.state_dict(), path)`` wrote is read by
        ``Masks.from_state_dict(torch.load(path, weights_only=True))``.

        Raises:
            ImportError: where safetensors is not installed.
            FileNotFoundError: where there is no such file.
            TypeError: where `path` is no path.
            ValueError: where the file is empty, cut off, damaged, of another kind, or a folder.
        """
        return cls(bits.read(files.checked_path("path", path)))

    # ------------------------------------------------------------------------------------- torch.nn.utils.prune

    @classmethod
    def from_torch(cls, model: nn.Module) -> Masks:
        """Return the masks of a model pruned by ``torch.nn.utils.prune``, under the names from before it was.

        The model stays as it is; ``from_torch_`` also undoes torch's reparametrization.

        Raises:
            TypeError: where `model` is no module.
            ValueError: where it holds no such mask, or masks that differ for one parameter.
        """
        from gradprune.weights.torch_prune import once, pruned_by_torch

        return cls(once(pruned_by_torch(model)))

    @classmethod
    def from_torch_(cls, model: nn.Module) -> Masks:
        """Take over from ``torch.nn.utils.prune``: its masks, with the model's parameters made plain again.

        The parameters stay the same objects under their own names, so an optimizer goes on with them; hold them with
        ``hold``.

        Args:
            model: the network; it is changed in place.

        Returns:
            The masks, by the parameters' own names.

        Raises:
            TypeError: where `model` is no module, or a parameter is of a kind that cannot be pruned.
            ValueError: as ``from_torch``, and where a mask has no hook of torch's. Nothing is changed then.
        """
        from gradprune.weights.torch_prune import make_plain_, once, pruned_by_torch

        found = pruned_by_torch(model)
        masks = cls(once(found))
        make_plain_(found)
        return masks.apply_(model)

    def to_torch_(self, model: nn.Module) -> None:
        """Prune `model` by ``torch.nn.utils.prune.custom_from_mask`` with these masks.

        From then on torch's own reparametrization holds: each parameter is renamed to ``..._orig``, a tied one wherever
        it stands.

        Raises:
            TypeError: where `model` is no module, or a parameter is of a kind that cannot be pruned.
            ValueError: where a name or a shape is not the model's. Nothing is changed then.
        """
        from gradprune.weights.torch_prune import prune_by_torch_

        prune_by_torch_(model, {p: self[name].to(p.device) for name, p in self._writable(model).items()})


def _check_mask(name: Any, mask: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"the names of masks must be text, got {name!r}")
    if not isinstance(mask, Tensor):
        hint = "; read a state_dict() of masks by Masks.from_state_dict" if isinstance(mask, Mapping) else ""
        raise TypeError(f"the mask of {name!r} must be a bool tensor, got {type(mask).__name__}{hint}")
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask of {name!r} must be a bool tensor, got {mask.dtype}")
    require_readable(name, mask, "mask of")


def _same(mask: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and other.dtype == torch.bool and torch.equal(mask, other.to(mask.device))

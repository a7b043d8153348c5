"""How much flows through each weight when all are positive (chapter 4)?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradprune.core.checks import module, require
from gradprune.core.evaluate import arguments, tensors_in
from gradprune.weights.differentiate import gradients_of, map_tensors, require_other_weights, trainable
from gradprune.weights.precision import product


def synflow(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Return how much flow passes through the weight when all are positive: ``|w dR/dw|``, R the sum of outputs.

    R is computed with the absolute values of all parameters and buffers on an input of ones, in float64, as it grows
    with the product of the layers' sizes. Meant to be applied again at each of many small pruning steps
    (``gradprune.Geometric``).

    Args:
        model: As for ``gradient``. R is the sum of its output, of the first floating tensor in it that is no scalar.
        inputs: A tensor, or a tuple or dict of the model's arguments; only shapes matter, so the score needs no data.

    Returns:
        The scores, in float64.

    Raises:
        TypeError: The model is no module, is scripted, or returns no floating tensor.
        ValueError: R depends on no weight or float64 cannot hold it.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> scores = gp.synflow(net, torch.empty(1, 3))
        >>> bool(torch.isclose(scores["0.weight"].sum(), scores["2.weight"].sum() - scores["0.bias"].sum()))
        True

    Tanaka et al. (2020), equation 2 and algorithm 1; chapter 4.
    """

    def ones(value: Tensor) -> Tensor:
        return torch.ones_like(value, dtype=_double(value)) if _is_floating(value) else value

    def absolute(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return {name: t.detach().abs().to(_double(t)) if _is_floating(t) else t for name, t in tensors}

    require_other_weights(module(model), "synflow")
    with trainable(model) as parameters, _GroupsInFloat64():
        state = absolute(model.named_parameters()) | absolute(model.named_buffers())
        weights = [state[name].requires_grad_() for name in parameters]
        args, kwargs = arguments(map_tensors(ones, inputs))
        total = _output(torch.func.functional_call(model, state, args, kwargs)).sum()
        if not total.requires_grad:
            raise ValueError("the model's output does not depend on the trainable parameters")
        flow = gradients_of(total.real if total.is_complex() else total, weights)
    scores = {name: product(name, w.detach(), g).abs() for name, w, g in zip(parameters, weights, flow, strict=True)}
    require(any(bool(s.any()) for s in scores.values()), "no flow reaches the output: every score would be 0")
    return scores


def _is_floating(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _double(value: Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64


def _output(output: Any) -> Tensor:
    """The first floating tensor that is no scalar; a scalar, as a loss, where there is no other."""
    found = [t for t in tensors_in(output) if _is_floating(t)]
    if not found:
        raise TypeError(f"the model must return a floating tensor, or a tuple or dict with one, got {type(output)}")
    return next((t for t in found if t.dim()), found[0])


class _GroupsInFloat64(TorchFunctionMode):
    """Products in groups (of experts), whose kernel knows float32 at most and no bias, as one after the other."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is getattr(torch, "_grouped_mm", None) and args[0].element_size() > 4 and args[0].dim() == 2:
            return _one_after_the_other(args[0], args[1], kwargs.get("offs"))
        return func(*args, **kwargs)


def _one_after_the_other(rows: Tensor, matrices: Tensor, offs: Tensor | None) -> Tensor:
    assert offs is not None
    parts = rows.tensor_split(offs.cpu().long())  # what follows the last offset belongs to no group
    products = [part @ matrix for part, matrix in zip(parts, matrices, strict=False)]
    products += [part.new_zeros(len(part), matrices.shape[-1]) for part in parts[len(products) :]]
    return torch.cat(products)

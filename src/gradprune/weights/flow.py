"""How much flows through each weight when all are positive (chapter 4)?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradprune.core.agree import agree
from gradprune.core.blockwise import Blockwise, shares
from gradprune.core.checks import module, require
from gradprune.core.evaluate import arguments, tensors_in
from gradprune.core.ranks import ranks_of
from gradprune.core.sharded import is_sharded, local, reshard_
from gradprune.weights.differentiate import gradients_of, map_tensors, require_other_weights, run_with, trainable
from gradprune.weights.passes import as_it_lies
from gradprune.weights.precision import product
from gradprune.weights.score_sharded import CALLED, settled

_NO_FLOW = "no flow reaches the output: every score would be 0"


def synflow(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Return how much flow passes through the weight when all are positive: ``|w dR/dw|``, R the sum of outputs.

    R is computed with the absolute values of all parameters and buffers on an input of ones, in float64, as it grows
    with the product of the layers' sizes. Meant to be applied again at each of many small pruning steps
    (``gradprune.Geometric``).

    Args:
        model: As for ``gradient``. R is the sum of its output, of the first floating tensor in it that is no scalar.
            Where parameters are DTensors, all ranks call this together, with inputs of the same shapes, and the scores
            of what FSDP2 alone has cut up are those of one process, bit for bit.
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

    require_other_weights(module(model), "synflow")
    if is_sharded(model):
        return _over_ranks(model, inputs)
    with trainable(model) as parameters, _GroupsInFloat64():
        state = _absolute(model.named_parameters()) | _absolute(model.named_buffers())
        weights = [state[name].requires_grad_() for name in parameters]
        args, kwargs = arguments(map_tensors(_ones, inputs))
        flow = gradients_of(_total(run_with(model, state, *args, **kwargs)), weights)
    scores = {name: product(name, w.detach(), g).abs() for name, w, g in zip(parameters, weights, flow, strict=True)}
    require(any(bool(s.any()) for s in scores.values()), _NO_FLOW)
    return scores


def _over_ranks(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """The scores of a model of which each rank has blocks, and all pass the same ones."""
    reshard_(model)
    with trainable(model, sharded=True) as parameters, _GroupsInFloat64():
        blockwise = Blockwise(model, shares, as_given=True)
        state = _absolute((n, local(p) if n in blockwise.cuts else p) for n, p in model.named_parameters())
        weights = {name: state[name].requires_grad_() for name in parameters}
        buffers = _absolute(model.named_buffers())
        blockwise.take(state)

        def total() -> tuple[Tensor, dict[str, object], None]:
            args, kwargs = arguments(map_tensors(_ones, inputs))
            return _total(run_with(model, buffers, *args, **kwargs)), {}, None

        def shapes() -> tuple[None, dict[str, object], None]:
            return None, {"inputs, by their shapes,": [tuple(t.shape) for t in tensors_in(inputs)]}, None

        agree(CALLED, shapes)
        with blockwise.running():
            found = gradients_of(agree(CALLED, total)[0], list(weights.values()))
        flow = {name: as_it_lies(g, w) for (name, w), g in zip(weights.items(), found, strict=True)}
    held = {name: local(w).detach() for name, w in weights.items()}
    scores = settled(lambda _: {name: product(name, w, flow[name]).abs() for name, w in held.items()}, parameters)
    some = ranks_of(model.parameters()).on_any([any(bool(local(s).any()) for s in scores.values())])
    require(some[0], _NO_FLOW)
    return scores


def _ones(value: Tensor) -> Tensor:
    return torch.ones_like(value, dtype=_double(value)) if _is_floating(value) else value


def _absolute(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: t.detach().abs().to(_double(t)) if _is_floating(t) else t for name, t in tensors}


def _total(output: Any) -> Tensor:
    """The sum of an output, by which the weights can be differentiated."""
    total = _output(output).sum()
    if not total.requires_grad:
        raise ValueError("the model's output does not depend on the trainable parameters")
    return total.real if total.is_complex() else total


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

"""How large is the gradient of each parameter (chapter 1)?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.replicas import replicas_of
from gradprune.core.sharded import is_sharded
from gradprune.gradients.averaged import mean_over_replicas
from gradprune.gradients.norms import norms_of, read
from gradprune.gradients.spread import norms_over_ranks

_NONE = "no parameter of the model has a gradient; call loss.backward() first, or pass the loss"


def gradient_norms(model: nn.Module, loss: Tensor | None = None) -> dict[str, float]:
    """Return the Euclidean norm of each parameter's gradient, by parameter name.

    A norm that is not finite is returned as it is: seeing it is what a probe is for.

    Args:
        model: the model. Parameters without a gradient are left out. Where parameters are DTensors (FSDP2,
            hybrid sharding, tensor parallel), all ranks call this together, after ``loss.backward()``, and get the
            norms of the whole gradients.
        loss: None, after ``loss.backward()``, to read ``.grad``; or a scalar to differentiate here, which changes no
            ``.grad`` and keeps the graph, so that ``backward`` can still follow. Where DistributedDataParallel wraps
            the model, all ranks call this together with a loss each, and get the norms of the mean gradients, as
            ``backward`` would leave them.

    Returns:
        The norms as floats, in the order of the model's parameters.

    Raises:
        TypeError: where `model` is no module or `loss` no tensor, for a gradient without values (meta), and
            for DTensors that lie otherwise.
        ValueError: where no parameter has a gradient, where `loss` is not a real scalar that depends on the model, and
            where part of it passes through a reentrant checkpoint, whose gradients only ``backward`` gives.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> gp.gradient_norms(model)
        {'weight': 5.0, 'bias': 1.0}

    Chapter 1.
    """
    checks.module(model)
    checks.require_whole(model.parameters())
    if is_sharded(model):
        return norms_over_ranks(model, partial(_require_gradients, loss))
    if loss is None:
        named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        checks.require(bool(named), _NONE)
    else:
        ranks = replicas_of(model)
        named = (
            _gradients_of(loss, model)
            if ranks is None
            else mean_over_replicas(
                "gp.gradient_norms", ranks, dict(model.named_parameters()), partial(_gradients_of, loss, model)
            )
        )
    for name, gradient in named.items():
        if gradient.is_meta or type(gradient) is not Tensor:
            checks.require_writable(name, gradient, "gradient of")
    return dict(zip(named, read(norms_of(list(named.values()))), strict=True))


def _require_gradients(loss: Tensor | None, blocks: Mapping[str, Tensor]) -> None:
    checks.require(
        loss is None,
        "a loss is not supported where parameters are DTensors (FSDP2, tensor parallel): call loss.backward(), then "
        "gradient_norms(model)",
    )
    checks.require(bool(blocks), _NONE)
    for name, block in blocks.items():
        checks.require_writable(name, block, "gradient of")


def _gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss must be a scalar, not of shape {tuple(loss.shape)}; take its mean or its sum first")
    if loss.is_complex():
        raise ValueError("loss must be real, not complex; take its absolute value or its real part first")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient")
    if not loss.requires_grad:
        raise ValueError("loss does not depend on the model: it was computed without gradients, or detached")
    if _passes_through_reentrant_checkpoint(loss):
        raise ValueError(
            "loss passes through a reentrant checkpoint, which hides the parameters inside it from all but backward(): "
            "call loss.backward() and gradient_norms(model), or checkpoint with use_reentrant=False"
        )
    with torch.inference_mode(False), torch.enable_grad():
        scalar = loss.reshape(())
        try:
            grads = torch.autograd.grad(scalar, list(trainable.values()), retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "a second time" not in str(error):
                raise
            raise ValueError(
                "the graph of loss is gone, as backward() was called on it: read gradient_norms(model) after that, or "
                "pass the loss before"
            ) from None
    found = {name: grad for name, grad in zip(trainable, grads, strict=True) if grad is not None}
    if not found:
        raise ValueError("loss depends on no parameter of the model")
    return found


def _passes_through_reentrant_checkpoint(loss: Tensor) -> bool:
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False

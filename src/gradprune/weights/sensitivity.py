"""How much does the loss depend on each weight (chapters 4 and 5)?

These scores look at data: ``batches``, an iterable of pairs (inputs, targets), and ``loss``, a function
``(outputs, targets) -> scalar``. Inputs are a tensor, or a tuple or dict of the model's arguments. The model is
evaluated in eval mode (no dropout, stored batch statistics), so that a score does not depend on chance or on how
the samples are batched. Its mode, buffers, gradients and torch's random generators are put back as they were, also when
an exception ends the call.

A complex number a + bi is one weight. g is then the gradient as torch gives it, dL/da + i dL/db, and w g stands for
a dL/da + b dL/db, the real part of conj(w) g: what both parts contribute together.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.checks import module, number, require
from gradprune.core.evaluate import plain_attention
from gradprune.core.sharded import is_sharded, local, reshard_
from gradprune.weights.differentiate import (
    Batches,
    Loss,
    entries,
    floating,
    gradients_of,
    loss_of,
    pairs,
    require_other_weights,
    single_samples,
    trainable,
)
from gradprune.weights.precision import add_products_, narrowed, product, require_finite, wide
from gradprune.weights.score_sharded import mean_gradients, settled, stored_gradients, sum_over_ranks


def gradient(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> dict[str, Tensor]:
    """Return the size of the loss's gradient: ``|g|``.

    Args:
        model: Any module with trainable parameters, which are scored.
        batches: Pairs (inputs, targets), over which g is the mean; without them g is what the last backward pass left
            in ``.grad``. Where parameters are DTensors (FSDP2), all ranks call this together, each with as many batches
            of its own, and the scores are DTensors.
        loss: A function (outputs, targets) to a real scalar; goes with `batches`.

    Returns:
        The scores; 0 where the loss does not depend on a weight.

    Raises:
        TypeError: The model is no module, a batch no pair, the loss no function or its value no tensor.
        ValueError: There are neither batches nor gradients; batches are empty, or come without a loss; the loss is no
            finite real scalar that depends on the model; a gradient is not finite.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, -1.0]])
        >>> gp.gradient(layer, [(x, None)], lambda outputs, _: outputs.sum())
        {'weight': tensor([[3., 1.]])}

    As growth score: Evci et al. (2020), section 3(4). Chapter 4.
    """
    if is_sharded(model):
        found = _sharded_gradients(model, batches, loss)
        return settled(lambda _: {name: _finite(name, g).abs() for name, g in found.items()}, _spread(model))
    return {name: g.abs() for name, g in _gradients(model, batches, loss).items()}


def taylor(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> dict[str, Tensor]:
    """Return how much the loss changes, to first order, when the weight is set to zero: ``|w g|``.

    Args:
        model: As for ``gradient``.
        batches: As for ``gradient``.
        loss: As for ``gradient``.

    Returns:
        The scores, in the unit of the loss.

    Raises:
        TypeError: As ``gradient``.
        ValueError: As ``gradient``; every product is too small for float64.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 0.0]])
        >>> scores = gp.taylor(layer, [(x, None)], lambda outputs, _: outputs.sum())
        >>> (scores["weight"] > 0).tolist()
        [[True, False]]

    Molchanov et al. (2017), equation 7, for single weights; chapter 4.
    """
    return _weight_times_gradient(model, batches, loss)


def snip(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> dict[str, Tensor]:
    """Return how much the loss depends on the weight's presence, as a share of the whole: ``|w g| / sum |w g|``.

    The derivative of the loss with respect to a switch on each weight is w g. Meant for a network before training, on
    one batch.

    Args:
        model: As for ``gradient``.
        batches: As for ``gradient``.
        loss: As for ``gradient``.

    Returns:
        The scores, which add up to 1 over the model; all 0 where no switch matters at all.

    Raises:
        TypeError: As ``gradient``.
        ValueError: As ``taylor``.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
        >>> float(gp.snip(layer, [(x, None)], lambda outputs, _: outputs.sum())["weight"].sum())
        1.0

    Lee et al. (2019), equations 5 and 6; chapter 4.
    """
    sensitivity = _weight_times_gradient(model, batches, loss)
    if is_sharded(model):
        return _shares_over_ranks(model, {name: local(score) for name, score in sensitivity.items()})
    whole = sum(s.double().sum().item() for s in sensitivity.values())
    if not whole > 0:
        return sensitivity
    return {name: narrowed(name, s.double() / whole, s.dtype) for name, s in sensitivity.items()}


def grasp(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return how much the weight contributes to the gradient's own norm: w (H g), signed, the largest kept.

    H is the Hessian of the mean loss, g its gradient. Removing the weight changes the squared norm of the gradient by
    -2 w (H g) to first order, so a low score is a weight that hinders learning. For a network before training.

    Args:
        model: As for ``gradient``.
        batches: Pairs (inputs, targets), passed twice.
        loss: As for ``gradient``.

    Returns:
        The scores, of either sign.

    Raises:
        TypeError: As ``gradient``.
        ValueError: As ``taylor``.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0]])
        >>> scores = gp.grasp(layer, [(x, None)], lambda outputs, _: outputs.square().sum())
        >>> (scores["weight"] > 0).tolist()
        [[True, False]]

    Wang et al. (2020), equation 8, with the sign turned round so that higher is kept; chapter 4.
    """
    with trainable(model) as parameters, plain_attention():
        weights, kept = list(parameters.values()), pairs(batches)
        mean = _mean_gradient(model, kept, loss, weights)
        # H g is linear in g. A power of two changes no digit, and keeps its products with g in range.
        scale = _power_of_two_above(mean)
        hessian_times_mean = [torch.zeros_like(g) for g in mean]
        for batch in kept:
            gradients = gradients_of(loss_of(model, batch, loss), weights, create_graph=True)
            along = sum(_inner(g.to(v.dtype), v / scale) for g, v in zip(gradients, mean, strict=True))
            if isinstance(along, Tensor) and along.requires_grad:  # else the loss is linear in every weight: H is zero
                _add(hessian_times_mean, gradients_of(along, weights), 1 / len(kept))
    return {
        name: product(name, p.detach(), h, scale)
        for (name, p), h in zip(parameters.items(), hessian_times_mean, strict=True)
    }


def fisher(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return Optimal Brain Damage with the empirical Fisher information for the Hessian: w² F / 2, F the mean of g².

    g is the gradient of one sample's loss, so every sample is passed by itself: as many backward passes as samples.

    Args:
        model: As for ``gradient``.
        batches: Pairs (inputs, targets), whose tensors have one row a sample.
        loss: As for ``gradient``, of one sample.

    Returns:
        The scores, in the unit of the loss.

    Raises:
        TypeError: As ``gradient``; a batch holds no tensor.
        ValueError: As ``taylor``; there are no samples, or a batch's tensors differ in their number.

    Example:
        >>> layer, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [3.0]])
        >>> scores = gp.fisher(layer, [(x, None)], lambda outputs, _: outputs.sum())
        >>> bool(torch.isclose(scores["weight"], layer.weight.square() * 5 / 2))
        True

    LeCun, Denker and Solla (1990), equation 5; Theis et al. (2018), equation 9; chapter 4.
    """
    with trainable(model) as parameters:
        weights = list(parameters.values())
        squares = _zeros(weights)
        samples = 0
        for batch in pairs(batches):
            for sample in single_samples(batch):
                gradients = gradients_of(loss_of(model, sample, loss), weights)
                for total, w, g in zip(squares, weights, gradients, strict=True):
                    change = _change(w.detach(), g)
                    add_products_(total, change, change)
                samples += 1
        if samples == 0:
            raise ValueError("batches held no sample; an iterator that was used up before cannot be used again")
    scores = {}
    for (name, p), total in zip(parameters.items(), squares, strict=True):
        exact = total / (2 * samples) if p.is_complex() else total * p.detach().double().square() / (2 * samples)
        scores[name] = narrowed(name, exact, p.dtype)
    return scores


def movement(model: nn.Module, batches: Batches, loss: Loss, lr: float = 0.0) -> dict[str, Tensor]:
    """Return whether training moves the weight away from zero: -sum w g over the steps of a training run.

    One step of gradient descent for each batch, on a copy of the weights: the model itself is not trained.

    Args:
        model: As for ``gradient``.
        batches: Pairs (inputs, targets), one a step.
        loss: As for ``gradient``.
        lr: The step size, 0 or more; 0 adds up over `batches` at the weights as they are.

    Returns:
        The scores, positive where the steps enlarge the weight.

    Raises:
        TypeError: As ``gradient``; `lr` is no number; the model is scripted.
        ValueError: As ``taylor``; `lr` is negative or not finite.

    Example:
        >>> layer, x = nn.Linear(1, 1, bias=False), torch.ones(1, 1)
        >>> scores = gp.movement(layer, [(x, None)], lambda outputs, _: -outputs.square().sum())
        >>> bool(scores["weight"] > 0)
        True

    Sanh et al. (2020), equation 3; chapter 5.
    """
    lr = number("lr", lr, least=0.0)
    require_other_weights(module(model), "movement")
    with trainable(model) as parameters:
        weights = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        total = _zeros(list(weights.values()))

        def run(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, weights, args, kwargs)

        for batch in pairs(batches):
            gradients = gradients_of(loss_of(run, batch, loss), list(weights.values()))
            with torch.no_grad():
                for score, w, g in zip(total, weights.values(), gradients, strict=True):
                    add_products_(score, w, g, -1.0)
                    w.sub_(g, alpha=lr)
    return {name: narrowed(name, s, p.dtype) for (name, p), s in zip(parameters.items(), total, strict=True)}


# ------------------------------------------------------------------------------------------------- what they share


def _change(w: Tensor, g: Tensor) -> Tensor:
    """What of w g changes from sample to sample: a real weight is a factor of the whole sum."""
    return (w.to(torch.complex128).conj() * g).real if w.is_complex() else g


def _zeros(weights: list[Any]) -> list[Tensor]:
    """One real total for each weight, in float64."""
    return [torch.zeros(w.shape, dtype=torch.float64, device=w.device) for w in weights]


def _gradients(model: nn.Module, batches: Batches | None, loss: Loss | None) -> dict[str, Tensor]:
    if batches is None:
        require(loss is None, "a loss needs batches as well; without both, the gradients in .grad are taken")
        found = _stored_gradients(model)
    else:
        loss = _needed(loss)
        with trainable(model) as parameters:
            mean = _mean_gradient(model, pairs(batches), loss, list(parameters.values()))
        found = dict(zip(parameters, mean, strict=True))
    for name, g in found.items():
        require_finite(name, g)
    return found


def _sharded_gradients(model: nn.Module, batches: Batches | None, loss: Loss | None) -> dict[str, Tensor]:
    """What is held here of the gradients."""
    reshard_(model)
    if batches is None:
        require(loss is None, "a loss needs batches as well; without both, the gradients in .grad are taken")
        return stored_gradients({name: p for name, p in _spread(model).items() if p.requires_grad})
    return mean_gradients(model, batches, _needed(loss))


def _needed(loss: Loss | None) -> Loss:
    if loss is None:
        raise ValueError("batches need a loss(outputs, targets) as well")
    return loss


def _shares_over_ranks(model: nn.Module, held: dict[str, Tensor]) -> dict[str, Tensor]:
    spread = _spread(model)
    whole = sum_over_ranks(held, {name: spread[name] for name in held})

    def work(exact: frozenset[str]) -> dict[str, Tensor]:
        if not whole > 0:
            return held
        shares = {name: s.double() / whole for name, s in held.items()}
        return {n: s if n in exact else narrowed(n, s, held[n].dtype) for n, s in shares.items()}

    return settled(work, spread)


def _spread(model: nn.Module) -> dict[str, nn.Parameter]:
    return floating(model, sharded=True)


def _finite(name: str, gradient: Tensor) -> Tensor:
    require_finite(name, gradient)
    return gradient


def _stored_gradients(model: nn.Module) -> dict[str, Tensor]:
    parameters = {name: p for name, p in floating(model).items() if p.requires_grad}
    found = {name: entries(p.grad) for name, p in parameters.items() if p.grad is not None}
    if not found:
        raise ValueError("no parameter holds a gradient: call backward() first, or pass batches and loss")
    # A parameter that the loss does not reach has none.
    return {name: found[name] if name in found else torch.zeros_like(p) for name, p in parameters.items()}


def _mean_gradient(model: nn.Module, kept: list[Any], loss: Loss, weights: list[Any]) -> list[Tensor]:
    mean = [torch.zeros_like(w, dtype=wide(w.dtype), requires_grad=False) for w in weights]
    for batch in kept:
        _add(mean, gradients_of(loss_of(model, batch, loss), weights), 1 / len(kept))
    return mean


def _weight_times_gradient(model: nn.Module, batches: Batches | None, loss: Loss | None) -> dict[str, Tensor]:
    if is_sharded(model):
        held, spread = _sharded_gradients(model, batches, loss), _spread(model)

        def work(exact: frozenset[str]) -> dict[str, Tensor]:
            of = {name: (local(spread[name]).detach(), _finite(name, g), name in exact) for name, g in held.items()}
            return {name: product(name, w, g, exact_at_once=wider).abs_() for name, (w, g, wider) in of.items()}

        return settled(work, spread)
    parameters = floating(model)
    found = _gradients(model, batches, loss)
    return {name: product(name, parameters[name].detach(), g).abs_() for name, g in found.items()}


def _add(totals: list[Tensor], terms: list[Tensor], share: float) -> None:
    for total, term in zip(totals, terms, strict=True):
        total.add_(term.detach(), alpha=share)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return ((b.conj() * a).real if a.is_complex() else b * a).sum()


def _power_of_two_above(tensors: list[Tensor]) -> float:
    """A power of two of the size of the largest entry, within what float32 can divide by."""
    largest = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
    return 2.0 ** max(-120, min(120, math.frexp(largest)[1])) if math.isfinite(largest) else 1.0

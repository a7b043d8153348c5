"""How much does the loss depend on each weight (chapters 4 and 5)?

These scores look at data: ``batches``, an iterable of pairs (inputs, targets), and ``loss``, a function
``(outputs, targets) -> scalar``. Inputs are a tensor, or a tuple or dict of the model's arguments. The model is
evaluated in eval mode (no dropout, stored batch statistics), so that a score does not depend on chance or on how
the samples are batched. Its mode, buffers, gradients and torch's random generators are put back as they were, also when
an exception ends the call.

Where parameters are DTensors, all ranks call a score together, each with as many batches. Under FSDP2 each has its own,
and the score is of the batches of all ranks, as one process that has them all would compute it, up to the order in
which floats are added up; the scores are DTensors, reduced over the ranks, so that all choose by the same. Ranks that
share layers by tensor parallelism are given the same batches. ``gradient``, ``taylor`` and ``snip`` take the gradients
as FSDP2 leaves them; the others run the model themselves, in the dtype of its parameters, and put these together a
sharded module at a time.

A complex number a + bi is one weight. g is then the gradient as torch gives it, dL/da + i dL/db, and w g stands for
a dL/da + b dL/db, the real part of conj(w) g: what both parts contribute together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    require_other_weights,
    single_samples,
)
from gradprune.weights.passes import Passes, passes
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
        model: As for ``gradient``; of layers that tensor parallelism splits, torch cannot differentiate a gradient.
        batches: Pairs (inputs, targets), passed twice; over several ranks as for ``gradient``.
        loss: As for ``gradient``.

    Returns:
        The scores, of either sign.

    Raises:
        TypeError: As ``gradient``; tensor parallelism splits a layer.
        ValueError: As ``taylor``.

    Example:
        >>> layer, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0]])
        >>> scores = gp.grasp(layer, [(x, None)], lambda outputs, _: outputs.square().sum())
        >>> (scores["weight"] > 0).tolist()
        [[True, False]]

    Wang et al. (2020), equation 8, with the sign turned round so that higher is kept; chapter 4.
    """
    with passes(model) as run, plain_attention():
        run.require_twice("grasp")
        kept = run.batches(batches)
        mean = _mean_gradient(run, kept, loss)
        # H g is linear in g. A power of two changes no digit, and keeps its products with g in range.
        scale = _power_of_two_above(run.largest(_size(mean)))
        hessian_times_mean = [torch.zeros_like(g) for g in mean]
        for batch in kept:
            gradients = run.gradients(run.loss(batch, loss), create_graph=True)
            along = sum(_inner(g.to(v.dtype), v / scale) for g, v in zip(gradients, mean, strict=True))
            if isinstance(along, Tensor) and along.requires_grad:  # else the loss is linear in every weight: H is zero
                _add(hessian_times_mean, run.gradients_of_sum(along), 1 / len(kept))
        weights = run.weights

        def score(name: str, h: Tensor, exact: bool) -> Tensor:
            return product(name, weights[name].detach(), h, scale, exact_at_once=exact)

        return run.scores(score, hessian_times_mean)


def fisher(model: nn.Module, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return Optimal Brain Damage with the empirical Fisher information for the Hessian: w² F / 2, F the mean of g².

    g is the gradient of one sample's loss, so every sample is passed by itself: as many backward passes as samples.

    Args:
        model: As for ``gradient``.
        batches: Pairs (inputs, targets), whose tensors have one row a sample; over several ranks as for ``gradient``,
            and with as many samples.
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
    with passes(model) as run:
        weights, squares = run.weights, _zeros(run.weights.values())
        kept = [list(single_samples(batch)) for batch in run.batches(batches)]
        samples = sum(run.same("batches, by their samples,", lambda: [len(batch) for batch in kept])) * run.ranks
        for batch in kept:
            for sample in batch:
                run.add_squares_(run.loss(sample, loss), squares)
        if samples == 0:
            raise ValueError("batches held no sample; an iterator that was used up before cannot be used again")

        def score(name: str, total: Tensor, exact: bool) -> Tensor:
            w = weights[name].detach()
            value = total / (2 * samples) if w.is_complex() else total * w.double().square() / (2 * samples)
            return value if exact else narrowed(name, value, w.dtype)

        return run.scores(score, squares)


def movement(model: nn.Module, batches: Batches, loss: Loss, lr: float = 0.0) -> dict[str, Tensor]:
    """Return whether training moves the weight away from zero: -sum w g over the steps of a training run.

    One step of gradient descent for each batch, on a copy of the weights: the model itself is not trained.

    Args:
        model: As for ``gradient``.
        batches: Pairs (inputs, targets), one a step; over several ranks as for ``gradient``, and a step is by the mean
            of their gradients.
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
    with passes(model, copies=True) as run:
        total = _zeros(run.weights.values())
        for batch in run.batches(batches):
            gradients = run.gradients(run.loss(batch, loss))
            with torch.no_grad():
                for score, w, g in zip(total, run.weights.values(), gradients, strict=True):
                    add_products_(score, w, g, -1.0)
                run.step_(gradients, lr)
        dtypes = {name: p.dtype for name, p in run.parameters.items()}
        return run.scores(lambda name, s, exact: s if exact else narrowed(name, s, dtypes[name]), total)


# ------------------------------------------------------------------------------------------------- what they share


def _zeros(weights: Iterable[Tensor]) -> list[Tensor]:
    """One real total for each weight, in float64."""
    return [torch.zeros(w.shape, dtype=torch.float64, device=w.device) for w in weights]


def _gradients(model: nn.Module, batches: Batches | None, loss: Loss | None) -> dict[str, Tensor]:
    if batches is None:
        require(loss is None, "a loss needs batches as well; without both, the gradients in .grad are taken")
        found = _stored_gradients(model)
    else:
        loss = _needed(loss)
        with passes(model) as run:
            mean = _mean_gradient(run, run.batches(batches), loss)
        found = dict(zip(run.parameters, mean, strict=True))
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


def _mean_gradient(run: Passes, kept: list[Any], loss: Loss) -> list[Tensor]:
    mean = [torch.zeros_like(w, dtype=wide(w.dtype), requires_grad=False) for w in run.weights.values()]
    for batch in kept:
        _add(mean, run.gradients(run.loss(batch, loss)), 1 / len(kept))
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


def _size(tensors: list[Tensor]) -> float:
    """The magnitude of the largest entry; infinite where one is not finite."""
    largest = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
    return largest if math.isfinite(largest) else math.inf


def _power_of_two_above(size: float) -> float:
    """A power of two of a size, within what float32 can divide by."""
    return 2.0 ** max(-120, min(120, math.frexp(size)[1])) if math.isfinite(size) else 1.0

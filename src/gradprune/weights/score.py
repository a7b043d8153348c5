"""How much does each weight matter (chapters 4 and 5)?

A score is a function ``(model, ...) -> dict[str, Tensor]``: one tensor for each parameter, of its shape; what scores
higher is kept. Any function of that form can be given to ``gradprune.prune``; arguments beyond the model are bound
with ``functools.partial``.

Scores that look at data take ``batches``, an iterable of pairs (inputs, targets), and ``loss``, a function
``(outputs, targets) -> scalar``. Inputs are a tensor, or a tuple or dict of the model's arguments. The model is
evaluated in eval mode (no dropout, stored batch statistics), so that a score does not depend on chance or on how
the samples are batched. Its mode, buffers, gradients and torch's random generators are put back as they were, also when
an exception ends the call.

A complex number a + bi is one weight. g is then the gradient as torch gives it, dL/da + i dL/db, and w g stands for
a dL/da + b dL/db, the real part of conj(w) g: what both parts contribute together. Scores are real. They are float32 or
wider: float64 where float32 has not the range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradprune.core.checks import module, number, require
from gradprune.core.evaluate import arguments, plain_attention, tensors_in
from gradprune.weights.differentiate import (
    Batches,
    Loss,
    floating,
    gradients_of,
    loss_of,
    map_tensors,
    pairs,
    require_other_weights,
    single_samples,
    trainable,
)
from gradprune.weights.precision import add_products_, narrowed, product, require_finite, wide

Scores = dict[str, Tensor]


def magnitude(model: nn.Module) -> Scores:
    """Return the weight's size: ``|w|``, of a complex weight the modulus.

    Args:
        model: Any module.

    Returns:
        The scores, in the weight's own unit and dtype.

    Raises:
        TypeError: The model is no module, or a trainable parameter cannot be read (lazy, meta, DTensor, quantized).

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[-2.0, 1.0]]))
        >>> gp.magnitude(layer)
        {'weight': tensor([[2., 1.]])}

    Han et al. (2015), section 3; chapter 4.
    """
    return {name: _entries(p).abs() for name, p in floating(model).items()}


def rotation(model: nn.Module, period: float = 2 * math.pi) -> Scores:
    """Return how far an angle is from one that turns nothing: its distance from the nearest multiple of `period`.

    For the angles of a parametrised quantum circuit, where a gate with the angle 0 can be dropped. A rotation by a
    multiple of 2 pi is the identity too, up to a sign of the whole state, which nothing measures; a controlled one only
    by multiples of 4 pi. Which parameters are angles, the `include` of ``prune`` says.

    Args:
        model: Any module; its real parameters are scored.
        period: Radians; positive and finite.

    Returns:
        The scores, between 0 and half a period, in radians.

    Raises:
        TypeError: As ``magnitude``; the period is no number.
        ValueError: The period is not positive and finite.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 6.0]]))
        >>> gp.rotation(layer, period=4.0)["weight"]
        tensor([[1., 2.]])

    Wang et al. (2022) for dropping gates of small angles, Hu et al. (2022) for other angles that save one; chapter 7.
    """
    if period == period:  # NaN is refused below, in the same words
        period = number("period", period, finite=False)
    require(0 < period < math.inf, f"period must be positive and finite, got {period}")
    angles = {name: _entries(p) for name, p in floating(model).items() if not p.is_complex()}
    return {name: (w - period * (w / period).round()).abs() for name, w in angles.items()}


def random(model: nn.Module, generator: torch.Generator | None = None) -> Scores:
    """Return chance, uniform in [0, 1): the baseline that every other score has to beat.

    Args:
        model: Any module.
        generator: Where to draw from; by default torch's own generator of the parameter's device.

    Returns:
        The scores, in float32.

    Raises:
        TypeError: As ``magnitude``; `generator` is no ``torch.Generator``.

    Example:
        >>> scores = gp.random(nn.Linear(3, 2), torch.Generator().manual_seed(0))
        >>> scores["weight"].shape
        torch.Size([2, 3])

    Chapter 4.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")

    def draw(p: Tensor) -> Tensor:
        device = p.device if generator is None else generator.device
        return torch.rand(p.shape, generator=generator, device=device, dtype=torch.float32).to(p.device)

    return {name: draw(p) for name, p in floating(model).items()}


def gradient(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> Scores:
    """Return the size of the loss's gradient: ``|g|``.

    Args:
        model: Any module with trainable parameters, which are scored.
        batches: Pairs (inputs, targets), over which g is the mean; without them g is what the last backward pass left
            in ``.grad``.
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
    return {name: g.abs() for name, g in _gradients(model, batches, loss).items()}


def taylor(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> Scores:
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


def snip(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> Scores:
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
    whole = sum(s.double().sum().item() for s in sensitivity.values())
    if not whole > 0:
        return sensitivity
    return {name: narrowed(name, s.double() / whole, s.dtype) for name, s in sensitivity.items()}


def grasp(model: nn.Module, batches: Batches, loss: Loss) -> Scores:
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


def synflow(model: nn.Module, inputs: Any) -> Scores:
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


def fisher(model: nn.Module, batches: Batches, loss: Loss) -> Scores:
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


def movement(model: nn.Module, batches: Batches, loss: Loss, lr: float = 0.0) -> Scores:
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


def _entries(p: Tensor) -> Tensor:
    """The parameter's entries as a dense tensor of a dtype that torch calculates with."""
    dense = p.detach() if p.layout == torch.strided else p.detach().to_dense()
    return dense.float() if dense.element_size() == 1 else dense


def _is_floating(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _double(value: Tensor) -> torch.dtype:
    return torch.complex128 if value.is_complex() else torch.float64


def _change(w: Tensor, g: Tensor) -> Tensor:
    """What of w g changes from sample to sample: a real weight is a factor of the whole sum."""
    return (w.to(torch.complex128).conj() * g).real if w.is_complex() else g


def _zeros(weights: list[Any]) -> list[Tensor]:
    """One real total for each weight, in float64."""
    return [torch.zeros(w.shape, dtype=torch.float64, device=w.device) for w in weights]


def _gradients(model: nn.Module, batches: Batches | None, loss: Loss | None) -> Scores:
    if batches is None:
        require(loss is None, "a loss needs batches as well; without both, the gradients in .grad are taken")
        found = _stored_gradients(model)
    else:
        if loss is None:
            raise ValueError("batches need a loss(outputs, targets) as well")
        with trainable(model) as parameters:
            mean = _mean_gradient(model, pairs(batches), loss, list(parameters.values()))
        found = dict(zip(parameters, mean, strict=True))
    for name, g in found.items():
        require_finite(name, g)
    return found


def _stored_gradients(model: nn.Module) -> Scores:
    parameters = {name: p for name, p in floating(model).items() if p.requires_grad}
    found = {name: _entries(p.grad) for name, p in parameters.items() if p.grad is not None}
    if not found:
        raise ValueError("no parameter holds a gradient: call backward() first, or pass batches and loss")
    # A parameter that the loss does not reach has none.
    return {name: found[name] if name in found else torch.zeros_like(p) for name, p in parameters.items()}


def _mean_gradient(model: nn.Module, kept: list[Any], loss: Loss, weights: list[Any]) -> list[Tensor]:
    mean = [torch.zeros_like(w, dtype=wide(w.dtype), requires_grad=False) for w in weights]
    for batch in kept:
        _add(mean, gradients_of(loss_of(model, batch, loss), weights), 1 / len(kept))
    return mean


def _weight_times_gradient(model: nn.Module, batches: Batches | None, loss: Loss | None) -> Scores:
    parameters = floating(model)
    found = _gradients(model, batches, loss)
    return {name: product(name, parameters[name].detach(), g).abs_() for name, g in found.items()}


def _add(totals: list[Tensor], terms: list[Tensor], share: float) -> None:
    for total, term in zip(totals, terms, strict=True):
        total.add_(term.detach(), alpha=share)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return ((b.conj() * a).real if a.is_complex() else b * a).sum()


def _power_of_two_above(tensors: list[Tensor]) -> float:
    """A power of two of the size of the largest entry; 1 where all are zero."""
    largest = max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)
    if not math.isfinite(largest):
        return 1.0  # the score will be refused as not finite
    return 2.0 ** math.frexp(largest)[1] if largest else 1.0


def _output(output: Any) -> Tensor:
    """The first floating tensor that is no scalar; a scalar, as a loss, where there is no other."""
    found = [t for t in tensors_in(output) if _is_floating(t)]
    if not found:
        raise TypeError(f"the model must return a floating tensor, or a tuple or dict with one, got {type(output)}")
    return next((t for t in found if t.dim()), found[0])


class _GroupsInFloat64(TorchFunctionMode):
    """Products in groups (of experts), whose kernel knows float32 at most, as one product after the other."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is getattr(torch, "_grouped_mm", None) and args[0].element_size() > 4 and args[0].dim() == 2:
            return _one_after_the_other(args[0], args[1], kwargs.get("offs"), kwargs.get("bias"))
        return func(*args, **kwargs)


def _one_after_the_other(rows: Tensor, matrices: Tensor, offs: Tensor | None, bias: Tensor | None) -> Tensor:
    assert offs is not None
    parts = rows.tensor_split(offs.cpu().long())  # what follows the last offset belongs to no group
    products = [part @ matrix for part, matrix in zip(parts, matrices, strict=False)]
    products += [part.new_zeros(len(part), matrices.shape[-1]) for part in parts[len(products) :]]
    joined = torch.cat(products)
    return joined if bias is None else joined + bias

"""How much each weight matters (chapters 4 and 5).

A score is a function ``(model, ...) -> dict[str, Tensor]``: one tensor for each parameter, of its shape; what scores
higher is kept. Any function of that form can be given to ``gradprune.prune``; arguments beyond the model are bound
with ``functools.partial``.

Scores that look at data take ``batches``, an iterable of pairs (inputs, targets), and ``loss``, a function
``(outputs, targets) -> scalar``. Inputs are a tensor, or a tuple or dict of the model's arguments. The model is
evaluated in eval mode (no dropout, stored batch statistics), so that a score does not depend on chance or on how
the samples are batched. Its mode, buffers, gradients and the random generators are put back as they were, also when an
exception ends the call.

A complex number a + bi is one weight. g is then the gradient as torch gives it, dL/da + i dL/db, and w g stands for
a dL/da + b dL/db, the real part of conj(w) g: what both parts contribute together. Scores are real.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.checks import require

Batches = Iterable[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
Scores = dict[str, Tensor]


def magnitude(model: nn.Module) -> Scores:
    """The weight's size: ``|w|``, of a complex weight the modulus.

    Needs no data. Shapes as the parameters'; the unit is the weight's own.
    Han et al. (2015), section 3; chapter 4.
    """
    return {name: p.detach().abs() for name, p in _floating(model).items()}


def rotation(model: nn.Module, period: float = 2 * math.pi) -> Scores:
    """How far an angle is from one that turns nothing: its distance from the nearest multiple of `period`.

    For the angles of a parametrised quantum circuit. Setting one to zero drops its gate: a rotation by 0 is the
    identity. A rotation by a multiple of 2 pi is it too, up to a sign of the whole state, which nothing measures; a
    controlled one only by multiples of 4 pi, so give that. Between 0 and half a period, in radians. Scores real
    parameters only; which of them are angles, the `include` of ``prune`` says.
    Raises ValueError where the period is not positive and finite.
    Wang et al. (2022) for dropping gates of small angles, Hu et al. (2022) for other angles that save one; chapter 7.
    """
    require(0 < period < math.inf, f"period must be positive and finite, got {period}")
    angles = {name: p.detach() for name, p in _floating(model).items() if not p.is_complex()}
    return {name: (w - period * (w / period).round()).abs() for name, w in angles.items()}


def random(model: nn.Module, generator: torch.Generator | None = None) -> Scores:
    """Chance, uniform in [0, 1): the baseline that every other score has to beat.

    Draws from `generator`, or from torch's own generator of the parameter's device. Values are float32.
    Chapter 4.
    """

    def draw(p: Tensor) -> Tensor:
        if generator is None:
            return torch.rand(p.shape, device=p.device)
        return torch.rand(p.shape, generator=generator, device=generator.device).to(p.device)

    return {name: draw(p) for name, p in _floating(model).items()}


def gradient(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> Scores:
    """The size of the loss's gradient: ``|g|``.

    g is the mean over `batches`; without them it is what the last backward pass left in ``.grad``.
    Raises ValueError where there are neither batches nor gradients. As growth score: Evci et al. (2020), section 3(4).
    Chapter 4.
    """
    return {name: g.abs() for name, g in _gradients(model, batches, loss).items()}


def taylor(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> Scores:
    """How much the loss changes, to first order, when the weight is set to zero: ``|w g|``.

    `batches`, `loss` and errors as for ``gradient``; the unit is that of the loss.
    Molchanov et al. (2017), equation 7, for single weights; chapter 4.
    """
    return _weight_times_gradient(model, batches, loss)


def snip(model: nn.Module, batches: Batches | None = None, loss: Loss | None = None) -> Scores:
    """How much the loss depends on the weight's presence, as a share of the whole: ``|w g| / sum |w g|``.

    The derivative of the loss with respect to a switch c = 1 on each weight is w g. Meant for a network before
    training, on one batch; adds up to 1 over the model. Where no switch matters at all, every score is 0.
    `batches`, `loss` and errors as for ``gradient``.
    Lee et al. (2019), equations 5 and 6; chapter 4.
    """
    sensitivity = _weight_times_gradient(model, batches, loss)
    whole = sum(s.double().sum().item() for s in sensitivity.values())
    return {name: s / whole if whole > 0 else s for name, s in sensitivity.items()}


def grasp(model: nn.Module, batches: Batches, loss: Loss) -> Scores:
    """How much the weight contributes to the gradient's own norm: w (H g), signed, the largest kept.

    H is the Hessian of the mean loss, g its gradient. Removing the weight changes the squared norm of the gradient by
    -2 w (H g) to first order, so a low score is a weight that hinders learning. For a network before training.
    Raises ValueError where there are no batches.
    Wang et al. (2020), equation 8, with the sign turned round so that higher is kept; chapter 4.
    """
    with _evaluated(model) as parameters:
        weights = list(parameters.values())
        kept = _as_list(batches)
        mean_gradient = [torch.zeros_like(w) for w in weights]
        for batch in kept:
            _add(mean_gradient, _grad(_loss(model, batch, loss), weights), 1 / len(kept))
        product = [torch.zeros_like(w) for w in weights]
        for batch in kept:
            gradients = _grad(_loss(model, batch, loss), weights, create_graph=True)
            along = sum((_product(v, g).sum() for g, v in zip(gradients, mean_gradient, strict=True)), torch.zeros(()))
            if along.requires_grad:  # else the loss is linear in every weight, and H is zero
                _add(product, _grad(along, weights), 1 / len(kept))
    return {name: _product(p.detach(), h) for (name, p), h in zip(parameters.items(), product, strict=True)}


def synflow(model: nn.Module, inputs: Any) -> Scores:
    """How much flow passes through the weight when all are positive: ``|w dR/dw|``, R the sum of outputs.

    R is computed with the absolute values of all parameters and buffers on an input of ones; only the shapes of
    `inputs` matter, so the score needs no data. In float64, as R grows with the product of the layers' sizes.
    Meant to be applied again at each of many small pruning steps (``gradprune.Geometric``).
    Tanaka et al. (2020), equation 2 and algorithm 1; chapter 4.
    """

    def wide(value: Tensor) -> torch.dtype:
        return torch.complex128 if value.is_complex() else torch.float64

    def ones(value: Any) -> Any:
        return torch.ones_like(value, dtype=wide(value)) if _is_floating(value) else value

    def absolute(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return {name: t.detach().abs().to(wide(t)) if _is_floating(t) else t for name, t in tensors}

    with _evaluated(model) as parameters:
        state = absolute(model.named_parameters()) | absolute(model.named_buffers())
        weights = [state[name].requires_grad_() for name in parameters]
        args, kwargs = _arguments(_map_tensors(ones, inputs))
        output = torch.func.functional_call(model, state, args, kwargs)
        total = _first_tensor(output).sum()
        flow = _grad(total.real if total.is_complex() else total, weights)
    return {name: _product(w, g).detach().abs() for name, w, g in zip(parameters, weights, flow, strict=True)}


def fisher(model: nn.Module, batches: Batches, loss: Loss) -> Scores:
    """Optimal Brain Damage with the empirical Fisher information for the Hessian: w² F / 2, F the mean of g².

    g is the gradient of one sample's loss, so every sample is passed by itself: as many backward passes as samples.
    The unit is that of the loss. Raises ValueError where there are no samples.
    LeCun, Denker and Solla (1990), equation 5; Theis et al. (2018), equation 9; chapter 4.
    """
    with _evaluated(model) as parameters:
        weights = list(parameters.values())
        squares = _zeros(weights)
        samples = 0
        for batch in batches:
            for sample in _single_samples(batch):
                gradients = _grad(_loss(model, sample, loss), weights)
                _add(squares, [_product(w, g).square() for w, g in zip(weights, gradients, strict=True)], 1.0)
                samples += 1
        if samples == 0:
            raise ValueError("batches held no sample; an iterator that was used up before cannot be used again")
    return {name: s / (2 * samples) for name, s in zip(parameters, squares, strict=True)}


def activation(model: nn.Module, batches: Batches) -> Scores:
    """The weight's size times the size of what it multiplies: ``|w|`` times the norm of its input.

    The norm is Euclidean, over all samples and positions of `batches` (targets are not used). For a convolution the
    feature is the input channel, the same for every position of the kernel. Scores the weights of linear and
    convolution layers that the batches reach, and no other parameter.
    Sun et al. (2024), equation 1; chapter 4.
    """
    squares: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        features = _features(module, args[0].detach())
        total = (features.abs() if features.is_complex() else features).float().square().sum(dim=1)
        squares[module] = squares[module] + total if module in squares else total

    layers = [m for m in model.modules() if isinstance(m, _INPUT_LAYERS)]
    with _evaluated(model):
        hooks = [m.register_forward_pre_hook(watch) for m in layers]
        try:
            with torch.no_grad():
                for batch in _as_list(batches):
                    args, kwargs = _arguments(batch[0])
                    model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    scores: Scores = {}
    names = {id(p): name for name, p in _floating(model).items()}
    for module, total in squares.items():
        weight = module.weight
        if isinstance(weight, Tensor) and id(weight) in names:
            # A tied weight multiplies the inputs of all its layers.
            scores[names[id(weight)]] = _times_input_norm(module, weight, total).add_(
                scores.get(names[id(weight)], torch.zeros(()))
            )
    return scores


def movement(model: nn.Module, batches: Batches, loss: Loss, lr: float = 0.0) -> Scores:
    """Whether training moves the weight away from zero: -sum w g over the steps of a training run.

    One step of gradient descent with step size `lr` for each batch, on a copy of the weights: the model itself is not
    trained. ``lr=0`` adds up over `batches` at the weights as they are. Positive where the steps enlarge the weight.
    Raises ValueError where there are no batches.
    Sanh et al. (2020), equation 3; chapter 5.
    """
    with _evaluated(model) as parameters:
        weights = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
        total = _zeros(list(weights.values()))
        for inputs, targets in _as_list(batches):
            args, kwargs = _arguments(inputs)
            value = _scalar(loss(torch.func.functional_call(model, weights, args, kwargs), targets))
            gradients = _grad(value, list(weights.values()))
            with torch.no_grad():
                for score, w, g in zip(total, weights.values(), gradients, strict=True):
                    score.sub_(_product(w, g))
                    w.sub_(g, alpha=lr)
    return dict(zip(parameters, total, strict=True))


# ------------------------------------------------------------------------------------------------- what they share


def _floating(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if _is_floating(p)}


def _is_floating(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _product(w: Tensor, g: Tensor) -> Tensor:
    """w g, entry by entry; of complex numbers what their parts' products add up to."""
    return (w.conj() * g).real if w.is_complex() else w * g


def _zeros(weights: list[Any]) -> list[Tensor]:
    """One real total for each weight."""
    return [torch.zeros_like(w.real if w.is_complex() else w) for w in weights]


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The trainable parameters, while the model is in eval mode; everything else is as before at the end."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices]), torch.enable_grad():
        try:
            model.eval()
            yield {name: p for name, p in _floating(model).items() if p.requires_grad}
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _gradients(model: nn.Module, batches: Batches | None, loss: Loss | None) -> Scores:
    if batches is None:
        return _stored_gradients(model)
    if loss is None:
        raise ValueError("batches need a loss(outputs, targets) as well")
    with _evaluated(model) as parameters:
        weights = list(parameters.values())
        mean = [torch.zeros_like(w) for w in weights]
        kept = _as_list(batches)
        for batch in kept:
            _add(mean, _grad(_loss(model, batch, loss), weights), 1 / len(kept))
    return dict(zip(parameters, mean, strict=True))


def _stored_gradients(model: nn.Module) -> Scores:
    trainable = {name: p for name, p in _floating(model).items() if p.requires_grad}
    found = {name: p.grad.detach() for name, p in trainable.items() if p.grad is not None}
    if not found:
        raise ValueError("no parameter holds a gradient: call backward() first, or pass batches and loss")
    # A parameter that the loss does not reach has none.
    return {name: found.get(name, torch.zeros_like(p)) for name, p in trainable.items()}


def _weight_times_gradient(model: nn.Module, batches: Batches | None, loss: Loss | None) -> Scores:
    parameters = dict(model.named_parameters())
    return {name: _product(parameters[name].detach(), g).abs() for name, g in _gradients(model, batches, loss).items()}


def _loss(model: nn.Module, batch: tuple[Any, Any], loss: Loss) -> Tensor:
    inputs, targets = batch
    args, kwargs = _arguments(inputs)
    return _scalar(loss(model(*args, **kwargs), targets))


def _scalar(value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
    if value.is_complex():
        raise ValueError("loss must be real, not complex; take its absolute value or its real part")
    return value


def _grad(value: Tensor, weights: list[Any], *, create_graph: bool = False) -> list[Tensor]:
    """Gradients without touching ``.grad``; zero where the value does not depend on a weight."""
    found = torch.autograd.grad(value, weights, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


def _add(totals: list[Tensor], terms: Iterable[Tensor], share: float) -> None:
    for total, term in zip(totals, terms, strict=True):
        total.add_(term.detach(), alpha=share)


def _as_list(batches: Batches) -> list[tuple[Any, Any]]:
    kept = list(batches)
    if not kept:
        raise ValueError("batches is empty; an iterator that was used up before cannot be used again")
    return kept


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _map_tensors(change, v) for name, v in value.items()}
    return tuple(_map_tensors(change, v) for v in value) if isinstance(value, (tuple, list)) else value


def _first_tensor(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output


def _single_samples(batch: tuple[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for i in range(len(_first_tensor(batch))):
        inputs, targets = _map_tensors(itemgetter(slice(i, i + 1)), tuple(batch))
        yield inputs, targets


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_INPUT_LAYERS = (nn.Linear, *_CONVOLUTIONS)


def _features(module: nn.Module, inputs: Tensor) -> Tensor:
    """The layer's input as (features, everything else)."""
    if isinstance(module, _CONVOLUTIONS):
        batched = inputs if inputs.dim() == module.weight.dim() else inputs.unsqueeze(0)
        return batched.transpose(0, 1).flatten(1)
    return inputs.reshape(-1, inputs.shape[-1]).T


def _times_input_norm(module: nn.Module, weight: Tensor, squares: Tensor) -> Tensor:
    norm = squares.sqrt()
    if isinstance(module, nn.Linear):
        return weight.detach().abs() * norm
    # Group g of the filters sees channels g * weight.shape[1] and the following.
    per_group = norm.view(-1, weight.shape[1]).repeat_interleave(
        weight.shape[0] // (norm.numel() // weight.shape[1]), dim=0
    )
    return weight.detach().abs() * per_group.view(*per_group.shape, *[1] * (weight.dim() - 2))

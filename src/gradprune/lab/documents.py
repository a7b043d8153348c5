"""What do the documents' formulas and programs do, to the letter? In our words; chapter 10 runs them.

Nothing here is meant to be used: each function does what a line of a document says, faults included, so that a page can
show what follows. Rules on weights and gradients are functions of a tensor and a threshold that return a new tensor; a
trailing underscore means that the argument is changed. `RULES` has the five rules that no other name is in use for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Rule = Callable[[Tensor, float], Tensor]


def keep_large(values: Tensor, threshold: float) -> Tensor:
    """Document 0, formula (D0-4): ``v`` where ``|v| >= threshold``, else 0. The field's hard threshold."""
    return torch.where(values.abs() >= threshold, values, 0.0)


def bound(values: Tensor, threshold: float) -> Tensor:
    """Document 0, program (D0-7): bound each entry to [-threshold, threshold]. The field's clipping by value."""
    return values.clamp(-threshold, threshold)


def drop_large(weights: Tensor, threshold: float) -> Tensor:
    """Document 1, formula (D1-5): 0 where ``|w| > threshold``, else ``w``."""
    return torch.where(weights.abs() > threshold, 0.0, weights)


def keep_above(weights: Tensor, threshold: float) -> Tensor:
    """Document 2, text: 0 where ``w < threshold``, else ``w``. No absolute value is mentioned, so none is taken."""
    return torch.where(weights < threshold, 0.0, weights)


def cap(weights: Tensor, threshold: float) -> Tensor:
    """Document 2, formula (D2-2): ``w - max(0, w - threshold)``."""
    return weights - (weights - threshold).clamp(min=0.0)


def clamp(weights: Tensor, threshold: float) -> Tensor:
    """Document 2, program (D2-3): bound each entry to [0, threshold]."""
    return weights.clamp(0.0, threshold)


def importance(weights: Tensor) -> Tensor:
    """Document 4, formula (D4-6): ``w |w|``, the weight times its own size, with the sign of the weight."""
    return weights * weights.abs()


def drop_unimportant(weights: Tensor, threshold: float) -> Tensor:
    """Document 4, formula (D4-6): 0 where ``w |w| < threshold``, else ``w``."""
    return torch.where(importance(weights) < threshold, 0.0, weights)


RULES: dict[str, Rule] = {
    "document 1, formula": drop_large,
    "document 2, text": keep_above,
    "document 2, formula": cap,
    "document 2, program": clamp,
    "document 4, formula": drop_unimportant,
}


def target_times_output(y: Array, output: Array) -> tuple[Array, Array]:
    """Document 0, program (D0-7): what it calls the gradients of weights and biases: ``y' h`` and the mean of ``h``.

    `y` is of shape (examples, targets), `output` of (examples, outputs); returned are (targets, outputs) and
    (outputs,).
    """
    return y.T @ output, output.mean(axis=0)


def train_tanh_layer(
    x: Array,
    y: Array,
    weights: Array,
    biases: Array,
    *,
    rate: float = 0.01,
    threshold: float = 0.1,
    epochs: int = 100,
    gradient: Callable[[Array, Array], tuple[Array, Array]] = target_times_output,
) -> tuple[Array, Array, list[float]]:
    """Document 0, program (D0-7): train ``h = tanh(x W + b)`` by steps along `gradient`, bounded by value.

    The numbers are the document's. Returns weights, biases and the mean of ``(y - h)^2`` before each step, where NumPy
    stretches a target of one column over all outputs. The arguments stay as they were.

    Raises NumPy's ValueError where the shape of the "gradient" does not stretch to that of the weights.
    """
    weights, biases, losses = weights.copy(), biases.copy(), []
    for _ in range(epochs):
        output = np.tanh(x @ weights + biases)
        losses.append(float(np.mean((y - output) ** 2)))
        by_weights, by_biases = gradient(y, output)
        weights -= rate * np.clip(by_weights, -threshold, threshold)
        biases -= rate * np.clip(by_biases, -threshold, threshold)
    return weights, biases, losses


def assign_gradients_(params: Iterable[Tensor], rate: float = 0.5) -> None:
    """Document 1, program (D1-8): overwrite each parameter by its own gradient, of which small entries become 0.

    Small is below `rate` times the mean ``|g|`` of the tensor. Raises ValueError, before anything is changed, where a
    parameter has no gradient.
    """
    params = list(params)
    grads = [param.grad for param in params]
    with torch.no_grad():
        found = [grad for grad in grads if grad is not None]
        if len(found) < len(params):
            raise ValueError(f"{len(params) - len(found)} of {len(params)} parameters have no gradient")
        for param, grad in zip(params, found, strict=True):
            param.copy_(torch.where(grad.abs() < rate * grad.abs().mean(), 0.0, grad))


def clamp_and_pickle_(model: nn.Module, path: str | os.PathLike[str], threshold: float = 0.1) -> None:
    """Document 2, program (D2-3): bound every parameter, biases too, to [0, threshold]; pickle the whole model."""
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(clamp(param, threshold))
    torch.save(model, path)


def difference_along(loss: float | Array, weights: float | Array) -> Array | tuple[Array, ...]:
    """Document 3, program (D3-4): ``np.gradient(loss, weights)``, differences between neighbours in an array.

    Of a loss, which is one number, NumPy returns an empty tuple where `weights` is a number, and raises TypeError
    where it is an array. It is a derivative only where `loss` holds a function's values along the grid `weights`.
    """
    differences: Array | tuple[Array, ...] = np.gradient(loss, weights)
    return differences


def step_in_both_branches(
    w: Array, b: Array, by_w: Array, by_b: Array, *, rate: float, threshold: float
) -> tuple[Array, Array]:
    """Document 3, program (D3-4): one step if the largest ``|gradient|`` is over `threshold`, the same one if not."""
    over = w - rate * by_w, b - rate * by_b
    under = w - rate * by_w, b - rate * by_b
    return over if np.max(np.abs(by_w)) > threshold else under


def train_linear(
    gradient: Callable[[Array, Array], tuple[Array, Array]],
    w: Array,
    b: Array,
    *,
    rate: float,
    threshold: float,
    epochs: int,
) -> tuple[Array, Array]:
    """Document 3, program (D3-4): in each epoch one step inside the "clipping", and then the same step again.

    `gradient(w, b)` stands in for the document's, which cannot be computed (:func:`difference_along`).
    """
    for _ in range(epochs):
        by_w, by_b = gradient(w, b)
        w, b = step_in_both_branches(w, b, by_w, by_b, rate=rate, threshold=threshold)
        w, b = w - rate * by_w, b - rate * by_b
    return w, b


def train_on_noise(
    model: nn.Module, *, inputs: int = 10, outputs: int = 10, steps: int = 1000, rate: float = 0.01
) -> list[float]:
    """Document 4, program (D4-7): SGD on one random input and one random target a step; return the losses.

    Input and target are drawn anew each time and independently, so that there is nothing to learn but the mean.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(torch.randn(1, inputs)) - torch.randn(outputs)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def summed_importance(params: Iterable[Tensor]) -> object:
    """Document 4, program (D4-7): NumPy's absolute value of a list of tensors, summed along the first axis.

    Raises torch's RuntimeError where a tensor needs a gradient, NumPy's ValueError where the shapes differ.
    """
    return np.abs(list(params)).sum(axis=0)


def drop_small_tensors_(params: Iterable[Tensor], threshold: float = 0.01) -> int:
    """Document 4, program (D4-7): set a whole tensor to 0 where the sum of its ``|w|`` is below `threshold`.

    The document takes NumPy's absolute value of a tensor that needs a gradient, which raises; here torch takes it.
    Returns how many tensors were set to 0.
    """
    dropped = 0
    with torch.no_grad():
        for param in params:
            if param.abs().sum() < threshold:
                param.zero_()
                dropped += 1
    return dropped

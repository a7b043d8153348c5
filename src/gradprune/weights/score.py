"""How much does each weight matter by itself (chapter 4)?

A score is a function ``(model, ...) -> dict[str, Tensor]``: one tensor for each parameter, of its shape; what scores
higher is kept. Any function of that form can be given to ``gradprune.prune``; arguments beyond the model are bound
with ``functools.partial``. Scores are real; one of a complex weight is of both its parts together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gradprune.core.checks import number
from gradprune.core.sharded import is_sharded, like, local
from gradprune.weights.differentiate import entries, floating
from gradprune.weights.score_sharded import random_over_ranks


def magnitude(model: nn.Module) -> dict[str, Tensor]:
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
    return {name: like(p, entries(local(p)).abs()) for name, p in floating(model, sharded=True).items()}


def rotation(model: nn.Module, period: float = 2 * math.pi) -> dict[str, Tensor]:
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
    period = number("period", period, above=0.0)
    angles = {name: p for name, p in floating(model, sharded=True).items() if not p.is_complex()}
    return {name: like(p, _from_multiple(entries(local(p)), period)) for name, p in angles.items()}


def _from_multiple(w: Tensor, period: float) -> Tensor:
    return (w - period * (w / period).round()).abs()


def random(model: nn.Module, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Return chance, uniform in [0, 1): the baseline that every other score has to beat.

    Args:
        model: Any module.
        generator: Where to draw from; by default torch's own generator of the parameter's device. Where parameters are
            DTensors, all ranks call this together, and the lots are those of rank 0's generator in one process; not on
            the CPU, each rank draws those of one whole parameter at a time, four bytes an entry.

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

    if is_sharded(model):
        return random_over_ranks(model, generator)

    def draw(p: Tensor) -> Tensor:
        device = p.device if generator is None else generator.device
        return torch.rand(p.shape, generator=generator, device=device, dtype=torch.float32).to(p.device)

    return {name: draw(p) for name, p in floating(model).items()}

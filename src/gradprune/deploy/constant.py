"""Which channels are the same number whatever comes in (chapter 8)?

That a channel does not move on some examples is no proof: a ReLU may be off on all of them. So the network is also run
with other weights in its place, drawn at random but zero wherever its own are zero, each draw together with its
negative, on random inputs: what stays constant under every draw is constant by where the zeros are. Its value is then
read from the network itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from gradprune.core.evaluate import as_written, call, evaluated
from gradprune.core.unchanged import unchanged
from gradprune.core.units import Part
from gradprune.deploy.cut import is_batch_norm

DRAWS, INPUTS = 2, 4  # of weights, each with its negative; of inputs to each
NOISE = (0.1, 1.0)  # times the inputs' own standard deviation
ROUNDING = 100  # units in the last place that a constant may vary by, as vector instructions may round otherwise


class Seen:
    """The least and the largest value of each channel that enters a layer, over everything it was run on."""

    def __init__(self) -> None:
        self.least: Tensor | None = None
        self.most: Tensor | None = None

    def add(self, part: Part, entering: Tensor) -> None:
        """Look at what enters the layer in one call."""
        channels = _channels_first(part.module, entering.detach())
        least, most = channels.amin(1), channels.amax(1)
        self.least = least if self.least is None else torch.minimum(self.least, least)
        self.most = most if self.most is None else torch.maximum(self.most, most)

    def constant(self) -> Tensor:
        """Which channels did not move, but for rounding; none where nothing was seen, and no NaN is constant."""
        if self.least is None or self.most is None:
            return torch.zeros(0, dtype=torch.bool)
        size = torch.maximum(self.least.abs(), self.most.abs())
        return self.most - self.least <= ROUNDING * torch.finfo(size.dtype).eps * size


def constants(model: nn.Module, example: Any, parts: Iterable[Part]) -> dict[Part, tuple[Tensor, Tensor]]:
    """Return, of what enters each part, which channels are constant, and the values. The model comes back as it was."""
    readers = list(parts)
    own = _run(model, readers, inputs_like(example))
    constant = {part: seen.constant() for part, seen in own.items()}
    for draw in range(DRAWS):
        for sign in (1, -1):
            with unchanged(model, model.parameters()):
                _draw_(model, draw, sign)
                generic = [_random_like(example, seed) for seed in range(INPUTS)]
                for part, seen in _run(model, readers, generic).items():
                    now = seen.constant()
                    constant[part] &= now if len(now) else torch.zeros_like(constant[part])
    return {part: (constant[part], seen.least) for part, seen in own.items() if seen.least is not None}


def inputs_like(example: Any) -> Iterator[Any]:
    """The example, and others near it: noise on floats, other orders of whole numbers."""
    yield example
    for seed, noise in enumerate(NOISE):
        yield _changed(example, _noisy(noise, seed))


def _run(model: nn.Module, parts: list[Part], inputs: Iterable[Any]) -> dict[Part, Seen]:
    found = {part: Seen() for part in parts}
    with evaluated(model), as_written(), torch.no_grad(), _watched(found):
        for one in inputs:
            with suppress(Exception):  # noise may be what the model does not take; the example has been run before
                call(model, one)
    return found


@contextmanager
def _watched(found: Mapping[Part, Seen]) -> Iterator[None]:
    handles = []
    try:
        for part, seen in found.items():

            def look(_: nn.Module, entering: tuple[Any, ...], part: Part = part, seen: Seen = seen) -> None:
                seen.add(part, entering[0])

            handles.append(part.module.register_forward_pre_hook(look))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels_first(module: Any, entering: Tensor) -> Tensor:
    """As a matrix with one row a channel."""
    dim = entering.dim() - 1 - len(getattr(module, "kernel_size", ()))
    return entering.movedim(dim, 0).reshape(entering.shape[dim], -1)


# ------------------------------------------------------------------------------------------------------ other weights


def _draw_(model: nn.Module, seed: int, sign: int) -> None:
    """Put random numbers where the parameters are not zero, and make batch norms pass on what comes in."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        module: Any
        for module in model.modules():
            if is_batch_norm(module) and isinstance(module.running_mean, Tensor):
                module.running_mean.zero_()
                module.running_var.fill_(1.0)
            for name, p in module._parameters.items():
                if p is None or p.numel() < 2 or not p.is_floating_point():
                    continue
                if p.dim() > 1:
                    drawn = sign * torch.randn(p.shape, generator=random) / max(1, p[0].numel()) ** 0.5
                elif name == "weight":  # a norm's scale
                    drawn = 0.5 + torch.rand(p.shape, generator=random)
                else:
                    drawn = sign * 0.1 * torch.randn(p.shape, generator=random)
                p.copy_(torch.where(p == 0, torch.zeros_like(p), drawn.to(p)))


# ------------------------------------------------------------------------------------------------------- other inputs


def _random_like(example: Any, seed: int) -> Any:
    random = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=random).to(tensor)
            return drawn if bool(tensor.isfinite().all()) else tensor
        return _reordered(tensor, random)

    return _changed(example, change)


def _noisy(noise: float, seed: int) -> Any:
    random = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            spread = tensor.float().std() if tensor.numel() > 1 else tensor.abs().float().max()
            spread = torch.where(spread.isfinite() & (spread > 0), spread, 1.0)
            return tensor + (noise * spread * torch.randn(tensor.shape, generator=random).to(tensor)).to(tensor.dtype)
        return _reordered(tensor, random)

    return change


def _reordered(tensor: Tensor, random: torch.Generator) -> Tensor:
    """Whole numbers are indices or tokens, of which only those in the example are known to be valid."""
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=random).to(tensor.device)].view(tensor.shape)


def _changed(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _changed(part, change) for name, part in value.items()}
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(_changed(part, change) for part in value)
    return value

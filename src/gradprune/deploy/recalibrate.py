"""What are the statistics of a batch norm once the weights before it have changed (chapter 4)?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gradprune.core.batches import inputs_of
from gradprune.core.checks import module, require, require_writable
from gradprune.core.evaluate import as_written, call_on_batch, evaluated


def recalibrate_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Take the running statistics of every batch norm anew, from data; no weight changes.

    A pruned layer's outputs have another mean and variance than those that the next batch norm remembers. Each batch
    is run with the norms normalising by its own statistics and everything else in eval mode; what is stored is the mean
    and the unbiased variance over all samples and positions of all batches.

    Args:
        model: Any module. Norms that keep no running statistics, and those that no batch reaches, stay as they are.
        batches: Pairs (inputs, targets), whose targets are not used, or inputs alone: tensors or dicts; read once, one
            at a time. Of the training data, as large as those of the training.

    Returns:
        How many norms were set.

    Raises:
        TypeError: The model is no module, or batches are no iterable of batches.
        ValueError: The batches reach no batch norm with running statistics, one gives a norm a single value a channel,
            or a statistic is not finite. The model is then as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> gp.recalibrate_(model, [torch.randn(64, 2)])
        1

    Wu and Johnson (2021), section 3, with the variance between the batches; chapter 4.
    """
    norms = {name: part for name, part in module(model).named_modules() if _keeps_statistics(part)}
    for name, norm in norms.items():
        for buffer in (norm.running_mean, norm.running_var):
            require_writable(name, buffer, "batch norm")
    inputs = inputs_of(batches)
    require(bool(norms), "the model has no batch norm that keeps running statistics")
    seen = {name: _Moments() for name in norms}
    with evaluated(model), as_written(), torch.no_grad(), _watched(norms, seen):
        for number, batch in enumerate(inputs):
            call_on_batch(model, batch, number)
    found = {name: moments for name, moments in seen.items() if moments.calls}
    require(
        bool(found),
        "the batches reach no batch norm, or there are none: an iterator that was used up before cannot be used again",
    )
    for name, moments in found.items():
        require(moments.finite(), f"the batches give batch norm {name!r} a statistic that is not finite")
    with torch.no_grad():
        for name, moments in found.items():
            moments.store_(norms[name])
    return len(found)


@dataclass
class _Moments:
    """Values a channel, their mean, and the sum of their squares about it, over all calls."""

    calls: int = 0
    values: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, values: int, mean: Tensor, variance: Tensor) -> None:
        """Join what one call saw (Chan et al. 1979)."""
        together = self.values + values
        apart = mean - self.mean
        self.squares = self.squares + variance * (values - 1) + apart**2 * (self.values * values / together)
        self.mean = self.mean + apart * (values / together)
        self.values, self.calls = together, self.calls + 1

    def finite(self) -> bool:
        return bool(torch.isfinite(torch.as_tensor(self.mean) + torch.as_tensor(self.squares)).all())

    def store_(self, norm: Any) -> None:
        norm.running_mean.copy_(self.mean)
        norm.running_var.copy_(self.squares / (self.values - 1))
        norm.num_batches_tracked.fill_(self.calls)


def _keeps_statistics(part: nn.Module) -> bool:
    return isinstance(part, _BatchNorm) and isinstance(part.running_mean, Tensor)


@contextmanager
def _watched(norms: Mapping[str, Any], seen: Mapping[str, _Moments]) -> Iterator[None]:
    """Let the norms normalise by each batch, and add up what they store of it."""
    momenta = {name: norm.momentum for name, norm in norms.items()}
    handles = []
    try:
        for name, norm in norms.items():
            norm.momentum = 1.0  # what is stored is then the last call's
            norm.train()
            handles += [norm.register_forward_pre_hook(_requires_two(name))]
            handles += [norm.register_forward_hook(_adds(seen[name]))]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.momentum = momenta[name]


def _requires_two(name: str) -> Any:
    def check(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        require(
            inputs[0].numel() > norm.num_features,
            f"a batch gives batch norm {name!r} {inputs[0].numel() // norm.num_features} values a channel; "
            "a variance needs two: give larger batches",
        )

    return check


def _adds(moments: _Moments) -> Any:
    def add(norm: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        values = inputs[0].numel() // norm.num_features
        moments.add(values, norm.running_mean.double(), norm.running_var.double())

    return add

"""What does one rank send of a bucket of gradients, and what waits then?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradprune.core.masked import zero_pruned_
from gradprune.gradients.sparsify import extreme, largest, not_finite
from gradprune.scale.message import FINITE, NOT_FINITE, ZERO, Message, averaged, places_of
from gradprune.weights.hold import held_mask

if TYPE_CHECKING:
    from torch.distributed import GradBucket  # type: ignore[attr-defined]


class Outgoing:
    """What one rank sends of a bucket, and what waits here once all have received it.

    Args:
        buffer: the gradients of the bucket, flat, on this rank; the average is written there.
        spans: where each parameter lies in it, by name.
        waiting: what waits by kind ("residuals" and, with momentum, "velocities") and name.
        density: the share of each parameter's entries to send.
        momentum: of what waits.
        dtype: of the values sent, where it is shorter than the gradients'.
    """

    def __init__(
        self,
        buffer: Tensor,
        spans: Mapping[str, Span],
        waiting: Mapping[str, Mapping[str, Tensor]],
        density: float,
        momentum: float,
        dtype: torch.dtype | None,
    ) -> None:
        self._buffer, self._spans, self._waiting = buffer, spans, waiting
        last = buffer.to(torch.promote_types(buffer.dtype, torch.float32), copy=True)
        gradients = self._views(last)
        _mask_(gradients, self._spans)
        words = _words(gradients)
        for name, word in zip(gradients, words, strict=True):
            if word == NOT_FINITE:
                gradients[name].zero_()
        self._later = {"residuals": last}
        if momentum:
            for name, gradient in gradients.items():
                gradient.add_(waiting["velocities"][name], alpha=momentum)
            self._later["velocities"] = last.clone()
        for name, gradient in gradients.items():
            gradient.add_(waiting["residuals"][name])
        for name in not_finite(gradients):  # the sum leaves the range of its dtype
            gradients[name].zero_()
            words[list(gradients).index(name)] = NOT_FINITE
        for flat in self._later.values():
            _mask_(self._views(flat), self._spans)
        chosen = torch.zeros_like(last, dtype=torch.bool)
        places = self._views(chosen)
        for name, mask in largest(gradients, density, "layer").items():
            places[name].copy_(mask)
        self.message = Message(
            torch.tensor(words, dtype=torch.uint8, device=last.device), *self._taken(last, chosen, dtype)
        )
        if momentum:  # momentum of what is sent now would push it once more (Lin et al., momentum factor masking)
            self._later["velocities"].masked_fill_(chosen, 0)

    def _taken(self, last: Tensor, chosen: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Take the chosen entries from what waits: their places and values."""
        places = places_of(chosen)
        found = last[places]
        if dtype is None or self._buffer.element_size() <= dtype.itemsize:
            dtype = self._buffer.dtype
        most = torch.finfo(dtype).max
        values = found.clamp(-most, most).to(dtype)
        last[places] = found - values.to(found.dtype)
        return places, values

    def receive(self, received: Message) -> Tensor:
        """Write the average into the bucket, and let wait what was not sent; return the bucket."""
        with torch.no_grad():  # in a thread of the process group
            self._buffer.copy_(averaged(received, self._buffer.numel(), self._later["residuals"].dtype))
            results = self._views(self._buffer)
            later = {kind: self._views(flat) for kind, flat in self._later.items()}
            for name, word in zip(results, received.words.amax(0).tolist(), strict=True):
                if word == FINITE:
                    for kind, views in later.items():
                        self._waiting[kind][name].copy_(views[name])
                else:
                    results[name].fill_(torch.nan if word == NOT_FINITE else 0.0)
        return self._buffer

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: span.of(flat) for name, span in self._spans.items()}


class Span(NamedTuple):
    """Where a parameter's entries lie in a bucket: in its own strides where it fills its memory, as DDP has them.

    ``bucket.gradients()`` lays all out by rows, so that the entries of a channels-last weight are at wrong places.
    """

    parameter: Tensor
    start: int

    def of(self, flat: Tensor) -> Tensor:
        """The parameter's part of something as long as the bucket."""
        size, strides = self.parameter.shape, self.parameter.stride()
        part = flat.narrow(0, self.start, self.parameter.numel())
        return part.as_strided(size, strides) if _fills_memory(self.parameter) else part.view(size)


def spans(bucket: GradBucket, names: Mapping[Tensor, str]) -> dict[str, Span]:
    """Where each parameter lies in a bucket, by name."""
    found, start = dict[str, Span](), 0
    for parameter in bucket.parameters():
        if parameter not in names:
            raise ValueError(
                f"TopK was not given the parameter of shape {tuple(parameter.shape)} that DistributedDataParallel "
                "trains: make it from the model that DDP was given"
            )
        found[names[parameter]] = Span(parameter, start)
        start += parameter.numel()
    return found


def _fills_memory(tensor: Tensor) -> bool:
    """Whether the entries lie side by side, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _mask_(tensors: Mapping[str, Tensor], spans: Mapping[str, Span]) -> None:
    """Zero what belongs to pruned weights that an optimizer holds."""
    masks = {name: held_mask(span.parameter) for name, span in spans.items()}  # type: ignore[arg-type]
    zero_pruned_((tensors[name], mask) for name, mask in masks.items() if mask is not None)


def _words(gradients: Mapping[str, Tensor]) -> list[int]:
    """What is said of each gradient, after one wait for an accelerator."""
    most = [extreme(g) if g.numel() else g.new_zeros(()) for g in gradients.values()]
    return [ZERO if m == 0 else FINITE if m < float("inf") else NOT_FINITE for m in torch.stack(most).tolist()]

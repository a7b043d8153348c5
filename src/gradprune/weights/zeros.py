"""Are weights that are to stay zero already, as an earlier pruning leaves them (chapter 4)?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.masked import pieces

ZEROS_NOTICED = 1e-3  # the share of the weights that may be zero and stay without a word
ZEROS_SAMPLED = 2**16  # entries, over all tensors, that are looked at first
RUN = 16  # of them lie side by side, since memory is read by lines of that length


def look_for_zeros(parameters: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor]) -> None:
    """Warn where weights that are to stay are zero already, as an earlier pruning leaves them."""
    weights = sum(p.numel() for p in parameters.values())
    if zeros_by_a_sample(parameters, weights) > ZEROS_NOTICED / 2 * weights:
        warn_of_zeros(zeros_that_stay(parameters, keep), weights)


def zeros_by_a_sample(parameters: Mapping[str, Tensor], weights: int) -> int:
    """Return about how many entries are zero, of so many weights in all."""
    step = max(1, weights // ZEROS_SAMPLED)
    return _total([_zeros_by_a_sample(p.detach(), step) for p in parameters.values()])


def zeros_that_stay(parameters: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> int:
    """Return how many entries are zero where their mask is True."""
    return _total([_zeros(p.detach(), keep[name]) for name, p in parameters.items()])


def warn_of_zeros(zeros: int, weights: int) -> None:
    """Warn where more of the weights than a few are zero already and yet stay."""
    if zeros > ZEROS_NOTICED * weights:
        checks.warn(
            f"{zeros:,} of the {weights:,} weights are zero already and yet stay, by these masks: if an earlier "
            "pruning made them zero, give its masks as within=, or they come back"
        )


def _zeros_by_a_sample(tensor: Tensor, step: int) -> Tensor:
    """About how many entries are zero, by one run in `step` runs."""
    some, whole = tensor, tensor.numel() // (RUN * step) * RUN * step
    if step > 1 and whole and tensor.is_contiguous():
        some = tensor.view(-1)[:whole].view(-1, RUN * step)[:, :RUN]
    return (some.numel() - torch.count_nonzero(some)) * (tensor.numel() // max(1, some.numel()))


def _zeros(tensor: Tensor, mask: Tensor) -> Tensor:
    """How many entries are zero where a mask is True, without a temporary of the tensor's size."""
    counts = [torch.count_nonzero((some == 0).logical_and_(kept)) for some, kept in pieces(tensor, mask)]
    return torch.stack(counts).sum()


def _total(counts: list[Tensor]) -> int:
    """The sum, with one wait for the device where all are on one."""
    devices = {count.device for count in counts}
    return sum(int(torch.stack([c for c in counts if c.device == device]).sum()) for device in devices)

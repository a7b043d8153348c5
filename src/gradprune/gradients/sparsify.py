"""Which entries of a gradient take part in the step (chapter 3)?

Thresholding sets the small entries of a gradient to zero before the step. It makes the update sparse, not the model:
no parameter changes its value because its gradient was set to zero. What is left out is lost, unless ``ErrorFeedback``
keeps it for later. Every function reads all gradients first and changes them only when nothing is wrong with any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gradprune.core import checks
from gradprune.core.masked import count_kept, zero_pruned_
from gradprune.core.select import keep_largest
from gradprune.core.words import in_our_words
from gradprune.gradients.gathered import require_own_memory
from gradprune.gradients.nonfinite import NonFinite, known, warn_of_zeroed
from gradprune.gradients.params import Params, read_once, with_gradient
from gradprune.gradients.representable import BITS_OF_SIZE, at_least, neighbour
from gradprune.gradients.spread import over_ranks

Scope = Literal["global", "layer"]
Gradients = dict[str, Tensor]

PIECE = 2**18  # values that are summed at a time: their magnitudes stay in cache
KEEPS = "keeps everything"  # what a density of 1 does
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@in_our_words
@torch.no_grad()
def threshold_gradients_(
    params: Params, threshold: float | None = None, *, ratio: float | None = None, nonfinite: NonFinite = "raise"
) -> float:
    """Set every gradient entry with ``|g| < threshold`` to zero, in place; return the fraction kept.

    Kept entries keep every bit. For a threshold that changes, pass ``schedule(step)``.

    Args:
        params: a tensor, an iterable of tensors or of (name, tensor) pairs, or a model; what has no gradient is left
            alone.
            Where parameters are DTensors (FSDP2, hybrid sharding, tensor parallel), all ranks call this together
            and ask the same, and each does to its blocks what one process would do.
        threshold: at least 0, in the unit of the gradient. Exactly one of this and `ratio` is given.
        ratio: at least 0; the threshold of each tensor is this times the mean of its ``|g|``.
        nonfinite: what becomes of a gradient with an entry that is NaN or infinite. "raise" changes nothing and raises;
            "zero" sets that whole gradient to zero and "skip" all of them, with a warning; "leave" changes nothing, for
            a gradient scaler that skips the step itself.

    Returns:
        The fraction kept, between 0 and 1, counted over all entries: 1.0 where there is none, under "leave", and where
        the threshold is 0, as nothing lies below it; 0.0 under "skip".

    Raises:
        TypeError: for arguments of another kind.
        ValueError: before any gradient is changed, where neither or both are given, for a number that is negative or
            not finite, an iterator that was used up, and a gradient that is sparse, complex, cannot be written, or is
            not finite under "raise" (the parameter is named).

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> weight.grad = torch.tensor([0.1, -2.0, 0.3, 1.0])
        >>> gp.threshold_gradients_(weight, 0.5), weight.grad
        (0.5, tensor([ 0., -2.,  0.,  1.]))

    Chapter 3, equations 3.1 and 3.9.
    """

    def asked() -> tuple[str, float]:
        name, amount = one_of(threshold=threshold, ratio=ratio)
        return name, checks.number(name, amount, least=0.0)

    params = read_once(params)
    if over_ranks(params):
        from gradprune.gradients.sparsify_sharded import threshold_over_ranks_

        return threshold_over_ranks_(params, nonfinite, asked)
    name, amount = asked()
    gradients, done = settled(checked(with_gradient(params)), known(nonfinite))
    if done is not None:
        return done
    cuts = [amount if name == "threshold" else amount * mean_magnitude(g) for g in gradients.values()]
    kept = sum(zero_below_(g, cut) for g, cut in zip(gradients.values(), cuts, strict=True))
    return share_of(kept, gradients)


@in_our_words
@torch.no_grad()
def keep_top_gradients_(
    params: Params, density: float, *, scope: Scope = "global", nonfinite: NonFinite = "raise"
) -> float:
    """Keep the `density` largest of all gradient entries by magnitude, exactly, set the others to zero, in place.

    Of N entries ``round(density * N)`` stay, and at least one where `density` is not 0; among equals the later
    position stays.

    Args:
        params: as for :func:`threshold_gradients_`.
        density: the fraction to keep, between 0 and 1; 0.01 is one per cent.
        scope: "global" ranks the entries of all tensors together, "layer" keeps the same fraction of each.
        nonfinite: as for :func:`threshold_gradients_`.

    Returns:
        The fraction kept; 1.0 where there is no gradient and under "leave", 0.0 under "skip".

    Raises:
        TypeError, ValueError: before any gradient is changed, as for :func:`threshold_gradients_`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> weight.grad = torch.tensor([0.1, -2.0, 0.3, 1.0])
        >>> gp.keep_top_gradients_(weight, 0.25), weight.grad
        (0.25, tensor([ 0., -2.,  0.,  0.]))

    Aji and Heafield (2017), for all tensors as one; chapter 3.
    """

    def asked() -> tuple[float, Scope]:
        return checks.fraction("density", density, one=KEEPS), checked_scope(scope)

    params = read_once(params)
    if over_ranks(params):
        from gradprune.gradients.sparsify_sharded import keep_top_over_ranks_

        return keep_top_over_ranks_(params, nonfinite, asked)
    density, scope = asked()
    gradients, done = settled(checked(with_gradient(params)), known(nonfinite))
    if done is not None:
        return done
    masks = largest(gradients, density, scope)
    zero_pruned_((g, masks[name]) for name, g in gradients.items())
    return share_of(sum(map(count_kept, masks.values())), gradients)


# ---------------------------------------------------------------------------------------------- shared with feedback


def checked(parameters: Mapping[str, Tensor]) -> Gradients:
    """Return the gradients by name, detached, where each is a dense real one that can be written; else raise."""
    gradients = {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
    require_numbers(gradients)
    return gradients


def require_numbers(gradients: Mapping[str, Tensor]) -> None:
    """Raise, naming it, where a gradient is no dense one of real numbers that can be written."""
    for name, gradient in gradients.items():
        if type(gradient) is Tensor and gradient.layout != torch.strided:
            raise ValueError(
                f"the gradient of {name!r} is sparse ({gradient.layout}) already; leave that parameter out, "
                "or make its gradient dense first"
            )
        checks.require_writable(name, gradient, "gradient of")
        if gradient.dtype not in _NUMBERS:
            raise ValueError(f"the gradient of {name!r} is {gradient.dtype}; thresholds are for real floating numbers")
    require_own_memory((n, g) for n, g in gradients.items() if type(g) is Tensor)


def settled(gradients: Gradients, nonfinite: NonFinite) -> tuple[Gradients, float | None]:
    """Deal with what is not finite; return the gradients, and the share kept where nothing is left to do."""
    wrong = not_finite(gradients)
    if not wrong:
        return gradients, None
    require_finite(wrong, nonfinite)
    if nonfinite == "leave":
        return gradients, 1.0
    warn_of_zeroed(wrong[0], nonfinite, "Find out where it comes from")
    for name in wrong if nonfinite == "zero" else gradients:
        gradients[name].zero_()
    return gradients, None if nonfinite == "zero" else 0.0


def require_finite(wrong: list[str], nonfinite: NonFinite) -> None:
    """Raise ValueError under "raise", naming the first gradient that is not finite."""
    if nonfinite == "raise" and wrong:
        raise ValueError(
            f"the gradient of {wrong[0]!r} is not finite (NaN or infinity): find out where it comes from, "
            "or bound it before it is thresholded. nonfinite='leave' leaves it to a gradient scaler that skips the step"
        )


def not_finite(values: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose tensor has a NaN or an infinity: one pass each, no copy, one wait for an accelerator."""
    flags = {name: extreme(v).isfinite() for name, v in values.items() if v.numel()}
    if not flags:
        return []
    home = next(iter(flags.values())).device
    finite = torch.stack([flag.to(home, non_blocking=True) for flag in flags.values()]).tolist()
    return [name for name, fine in zip(flags, finite, strict=True) if not fine]


def extreme(values: Tensor) -> Tensor:
    """Return the largest magnitude, without a copy; NaN where there is one."""
    return torch.stack(torch.aminmax(values)).abs().amax()


def largest(values: Gradients, density: float, scope: Scope) -> dict[str, Tensor]:
    """Return masks that are True for the largest magnitudes, of all or of each tensor."""
    groups = [values] if scope == "global" else [{name: v} for name, v in values.items()]
    masks: dict[str, Tensor] = {}
    for group in groups:
        total = sum(v.numel() for v in group.values())
        masks |= zip(group, keep_largest(group, number_kept(density, total), by="magnitude"), strict=True)
    return masks


def number_kept(density: float, total: int) -> int:
    """Return how many of so many entries stay: at least one where the density is not 0."""
    return max(round(density * total), min(1, total)) if density else 0


def mean_magnitude(values: Tensor) -> float:
    """Return the mean of |values|, summed in float64, never above the largest of them, as rounding might have it."""
    return min(magnitudes(values) / values.numel(), float(extreme(values))) if values.numel() else 0.0


def magnitudes(values: Tensor) -> float:
    """Return the sum of |values|, in float64."""
    if values.device.type == "cpu":
        pieces = values.reshape(-1).split(PIECE)
        as_numpy = (p.numpy() if p.dtype != torch.bfloat16 else p.float().numpy() for p in pieces)
        return sum(float(np.abs(piece).sum(dtype=np.float64)) for piece in as_numpy)
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(values, 1, dtype=wide))


def zero_below_(values: Tensor, cut: float) -> int:
    """Set to zero what is below `cut` in magnitude, in one pass; return how many entries stay."""
    if cut == 0:
        return values.numel()
    least = torch.tensor(at_least(cut, values.dtype), dtype=values.dtype, device="cpu")
    torch.hardshrink(values, float(neighbour(least, -1)), out=values)  # zeroes what is at most that
    if values.device.type == "cpu":  # what stays is not zero; NumPy counts much faster than torch
        return int(np.count_nonzero(values.view(BITS_OF_SIZE[values.element_size()]).numpy()))
    return int(torch.count_nonzero(values))


def share_of(kept: int, gradients: Gradients) -> float:
    """Return the share of the entries that are kept, 1.0 where there are none."""
    total = sum(g.numel() for g in gradients.values())
    return kept / total if total else 1.0


def one_of(**given: Any) -> tuple[str, Any]:
    """Return the name and value of the one argument that is not None."""
    found = [(name, value) for name, value in given.items() if value is not None]
    if len(found) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}; got {', '.join(n for n, _ in found) or 'none'}")
    return found[0]


def checked_scope(scope: Scope) -> Scope:
    """Return a scope, or raise ValueError."""
    return checks.choice("scope", scope, ("global", "layer"))

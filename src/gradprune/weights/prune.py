"""Choose the weights that matter least and set them to zero (chapter 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypedDict

from torch import Tensor, nn

from gradprune.weights.eligible import Patterns
from gradprune.weights.granularity import Granularity, Ranked
from gradprune.weights.mask import Masks
from gradprune.weights.plan import Scope, prepare
from gradprune.weights.score import magnitude

Score = Callable[[nn.Module], Mapping[str, Tensor]]


class AsPrune(TypedDict, total=False):
    """Those arguments of ``prune`` that whatever calls it repeatedly hands on."""

    scope: Scope
    granularity: Granularity
    include: Patterns
    exclude: Patterns
    min_keep: int | None


def prune(
    model: nn.Module,
    score: Score = magnitude,
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    scope: Scope = "global",
    granularity: Granularity = "weight",
    include: Patterns = None,
    exclude: Patterns = None,
    min_keep: int | None = None,
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Set the lowest-scoring weights of `model` to zero and return the masks that say which.

    Exactly one of `sparsity`, the fraction of the eligible weights that goes, and `threshold` (what scores less goes)
    is given. Of N eligible weights exactly ``round(sparsity * N)`` become zero; among equal scores the later position
    stays.

    `score` is a function from the model to one tensor a parameter (``gradprune.score``).

    `scope` says how the layers share: ``"global"`` ranks all weights together, ``"layer"`` takes the same fraction of
    each, ``"erk"`` and ``"lamp"`` are those of ``gradprune.allocate``, and a dict gives sparsities by parameter
    name, in which case `sparsity` is for the layers it does not name (without it they stay dense).

    `granularity` says what goes together: single weights; ``"channel"``, all weights of an output unit or filter;
    ``(n, m)`` with n < m or ``"n:m"``, n of every m consecutive weights along the input dimension stay, and neither
    sparsity nor threshold is given; any other tuple, or a string such as ``"4x4"``, is the shape of a block over the
    first dimensions, with the further ones whole. A channel or block is ranked by the mean of its scores (for
    magnitudes its L1 norm over its size), and as many go as come nearest to the wanted number of weights. A dimension
    that the block, or m, does not divide is an error, and so is ``"channel"`` for a matrix that packs the gates of a
    recurrent layer or the queries, keys and values of an attention layer: its rows are no units.

    Eligible are floating or complex, trainable parameters of two dimensions or more, neither an embedding's nor a
    normalisation's; a tied tensor counts once. `include` and `exclude`, glob patterns over parameter names, narrow
    that down. A complex number is one weight, its magnitude the modulus.

    A sparsity empties no layer: each keeps at least `min_keep` weights, 1 unless given; 0 lets layers be emptied, as
    do a threshold, a sparsity by name, and a sparsity that leaves fewer weights than there are layers (with a
    warning). `within`, earlier masks, says which weights may stay at all.

    Raises ValueError, before anything is changed, where an argument is out of range, a pattern matches nothing,
    nothing is eligible, or a score is missing, of another shape, complex, or NaN. Chapter 4.
    """
    layers, choose = prepare(
        model, sparsity, threshold, scope, granularity, include, exclude, min_keep=min_keep, within=within
    )
    keep = choose(ranked_by(score, model, layers))
    if within is not None:
        keep = {name: mask & within[name].to(mask.device) for name, mask in keep.items()}
    return Masks({name: mask.to(layers[name].device) for name, mask in keep.items()}).apply_(model)


def ranked_by(score: Score, model: nn.Module, layers: Mapping[str, nn.Parameter]) -> Ranked:
    """Return the scores of the layers, checked; raise ValueError where one is missing, misshapen or complex."""
    if score is magnitude:
        return Ranked({name: p.detach() for name, p in layers.items()}, "magnitude")
    scores = score(model)
    for name, p in layers.items():
        if name not in scores:
            raise ValueError(f"the score has no value for {name!r}; give it one, or exclude the parameter")
        if scores[name].shape != p.shape:
            raise ValueError(f"the score of {name!r} has shape {tuple(scores[name].shape)}, wanted {tuple(p.shape)}")
        if scores[name].is_complex():
            raise ValueError(
                f"the score of {name!r} is complex, which has no order: take its modulus, or its real part"
            )
    return Ranked({name: scores[name].detach() for name in layers})

"""Choose the weights that matter least and set them to zero (chapter 4)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypedDict

from torch import Tensor, nn

from gradprune.core.checks import require
from gradprune.core.replicas import replicas_of
from gradprune.core.sharded import digest, is_sharded
from gradprune.core.words import in_our_words, instead
from gradprune.weights.eligible import Patterns, StatedAxes
from gradprune.weights.granularity import Granularity
from gradprune.weights.hold import warn_of_revived
from gradprune.weights.mask import Masks
from gradprune.weights.plan import Scope
from gradprune.weights.replicated import decided
from gradprune.weights.request import Score
from gradprune.weights.request_groups import requested
from gradprune.weights.score import magnitude
from gradprune.weights.sharded import prune_sharded, require_no_example


class AsPrune(TypedDict, total=False):
    """Those arguments of ``prune`` that whatever calls it repeatedly hands on."""

    scope: Scope
    granularity: Granularity
    include: Patterns
    exclude: Patterns
    min_keep: int | None
    axes: StatedAxes


def check_for_schedule(caller: str, as_prune: AsPrune, *, own: Collection[str]) -> None:
    """Raise where arguments of ``prune`` do not go with a schedule: TypeError for what is none, ValueError for others.

    `own` are further arguments of the caller, which may be meant.
    """
    for name in as_prune:
        if name not in AsPrune.__annotations__:
            how_much = name in ("sparsity", "threshold") or instead(name, ["sparsity"]).startswith("sparsity=")
            meant = instead(name, [*AsPrune.__annotations__, *own])
            raise TypeError(
                f"{caller} has no argument {name!r}: {'the schedule says how much is pruned' if how_much else meant}"
            )
    by_name = isinstance(as_prune.get("scope"), Mapping)
    require(not by_name, "a schedule and a scope with sparsities by name exclude each other")


@in_our_words
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
    axes: StatedAxes = None,
    example: Any = None,
) -> Masks:
    """Set the lowest-scoring weights of `model` to zero and return the masks that say which.

    They stay zero until something writes them: before training on, call ``masks.hold(optimizer)``, or the next step
    revives them. To prune step by step while training, use ``Pruner``; once more, pass the masks on as `within`.

    Eligible are floating or complex, trainable parameters of two dimensions or more that are the matrices of a
    product: no embedding's, no normalisation's, no biases, tokens or positions. A tied tensor counts once, under its
    first name; patterns and names may be any that the state dict has. A complex number is one weight. Where
    ``torch.nn.utils.prune`` prunes a model already, take its masks over first, by ``Masks.from_torch_(model)``: until
    then its parameters are called ``..._orig``, and masks made here are of those names. Where weight_norm divides by
    the norm of a row, single weights are pruned so that each row keeps one, or the network would be NaN. Where
    parameters are DTensors (FSDP2, hybrid sharding, tensor parallel), all ranks call this together and choose as one
    process would, by any score (that of data on the batches of all ranks, ``grasp`` not where layers are split);
    scores, earlier masks and the masks are DTensors that lie as the parameters do. Rows, n:m, channels and blocks need
    shards that cut none of them. Where DistributedDataParallel wraps the model (give the wrapped one), all ranks call
    this together and get the same masks, also by data or chance: scores that differ between ranks are averaged over
    them, those of ``gp.random`` are rank 0's. A rank that does not call it is named on all others after the process
    group's timeout.

    Args:
        model: the network; its weights are changed in place.
        score: a function from the model to one tensor a parameter, of its shape; higher is kept. Among equal scores the
            later position stays.
        sparsity: the fraction of the N eligible weights that goes, in [0, 1]: exactly ``round(sparsity * N)`` weights.
            Give either this or `threshold`.
        threshold: what scores less than this goes.
        scope: how the layers share. ``"global"`` ranks all weights together; ``"layer"`` takes the same fraction of
            each layer, ``"row"`` the same number of each output unit's weights, ``round(sparsity * K)`` of K (of a
            filter all its weights), and goes with single weights only; ``"erk"`` and ``"lamp"`` are those of
            ``gradprune.weights.allocate``; a dict gives sparsities by name or glob pattern, and `sparsity` is then for
            the other layers (0 unless given).
        granularity: what goes together. ``"weight"``, single weights; ``"channel"``, all weights of an output unit or
            filter (its bias stays, and still comes out); ``(n, m)`` with n < m, or ``"n:m"``: n of every m consecutive
            weights along the input stay, which is a sparsity of 1 - n/m by itself: none needs to be given, and no other
            may; any other tuple, or a string such as ``"4x4"``: a block over outputs, inputs and so on. Channels and
            blocks are ranked by the mean of their scores, and as many go as come nearest to the wanted number of
            weights. ``"group"``: channels that the network couples (residual sums, depthwise and grouped convolutions,
            concatenations, heads of attention, gated layers) go together, with their biases and norms' scales and
            shifts, so that they are exactly zero and ``shrink`` takes them out; only the filters' weights are ranked
            and counted, at least one channel of each group stays, and so do outputs and channels under a norm over
            channels. A dict as `scope` names any weight of a group.
        include: glob patterns over names; only these are pruned. One that matches no eligible parameter may take
            frozen ones, or, of a kind of layer that is not known, those that are ruled out only by a name or shape as
            of a token or position. Biases and vectors (``"*.bias"``) are never pruned.
        exclude: glob patterns over names; these are not pruned.
        min_keep: the least number of weights of a layer that a sparsity leaves, 1 unless given: then a layer that comes
            down to it is warned of. 0 lets layers become empty, as do a threshold and a sparsity by name, and, with a
            warning, one that leaves too few.
        within: earlier masks; only what is True there may stay.
        axes: name or glob pattern -> (output, input), the axes of weights in a kind of layer that is not known. Where
            axes matter, matrices of such layers are else taken as [out, in], with a warning, and others refused.
        example: the network's input, a tensor, or a tuple or dict of its arguments, by which granularity ``"group"``
            sees what is coupled; it needs Torch-Pruning (``pip install 'gradprune[deploy]'``).

    Returns:
        The masks, by parameter name, applied to `model` (True stays).

    Raises:
        ValueError: before anything is changed, where an argument is out of range, a pattern matches nothing, nothing is
            eligible, a dimension does not divide, parameters share memory, zeros would not be the layer's (a
            parametrization), or a score is missing, of another shape, complex, or NaN.
        TypeError: before anything is changed, where an argument is of another kind, or a parameter cannot be written.

    Example:
        >>> model = nn.Linear(4, 5)
        >>> masks = gp.prune(model, sparsity=0.5)
        >>> int((model.weight == 0).sum())
        10

    Han et al. (2015), section 3; chapter 4.
    """
    if is_sharded(model):
        require_no_example(example)
        return prune_sharded(
            model,
            score,
            sparsity=sparsity,
            threshold=threshold,
            scope=scope,
            granularity=granularity,
            include=include,
            exclude=exclude,
            min_keep=min_keep,
            within=within,
            axes=axes,
        )

    def chosen(score: Score) -> Masks:
        request = requested(
            model,
            example,
            scope=scope,
            granularity=granularity,
            include=include,
            exclude=exclude,
            min_keep=min_keep,
            axes=axes,
        )
        warn_of_revived(request.parameters)
        return request.masks(model, score, sparsity=sparsity, threshold=threshold, within=within)

    def asked() -> dict[str, object]:
        within_it = None if within is None else digest(within)
        patterns = {"include": include, "exclude": exclude, "axes": axes}
        amounts = {"sparsity": sparsity, "threshold": threshold, "min_keep": min_keep}
        return amounts | patterns | {"scope": scope, "granularity": granularity, "within (by its hash)": within_it}

    ranks = replicas_of(model)
    if ranks is None:
        return chosen(score).apply_(model)
    return decided("gp.prune", ranks, score, chosen, asked).apply_(model)

"""Can the weights that stay make good what pruning takes, without training (chapter 5)?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.batches import inputs_of, items
from gradprune.core.checks import require, require_writable
from gradprune.core.evaluate import as_written, evaluated, plain_layers
from gradprune.core.layers import TRANSPOSED, Weight, require_layers, weights_of
from gradprune.core.progress import bar
from gradprune.core.select import keep_largest
from gradprune.core.words import in_our_words
from gradprune.recovery.inputs import Collected, NotShared, Piece, as_matrix, columns_of, write_matrix_
from gradprune.recovery.replay import Passes, look
from gradprune.recovery.solve import Choose, Gram, System, dtype_on, eliminate, least_squares
from gradprune.weights.eligible import Patterns, StatedAxes, stated
from gradprune.weights.granularity import Granularity, Units, with_axes
from gradprune.weights.mask import Masks
from gradprune.weights.named import parameters_of
from gradprune.weights.plan import Scope, keep_in_rows, kept_of, kept_of_layers
from gradprune.weights.request import Request, Score

_WIDTH = 128  # columns that are chosen at once, as in the paper


@in_our_words
def reconstruct_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    sparsity: float | None = None,
    masks: Mapping[str, Tensor] | None = None,
    score: Score | None = None,
    scope: Scope = "layer",
    granularity: Granularity = "weight",
    include: Patterns = None,
    exclude: Patterns = None,
    axes: StatedAxes = None,
    solve: Literal["exact", "one pass"] = "exact",
    damp: float = 0.01,
) -> Masks:
    """Prune layer by layer, and let the weights that stay make good what the others gave; nothing is trained.

    The layers come in the order in which they run. What each multiplies is recorded as the layers before it, pruned
    already, give it; of these inputs X and its weights W, those V are taken that change its answers least, as the
    smallest ``|X (V - W)'|^2 + damping |V - W|^2``. Biases stay as they are. The model runs in eval mode; modes,
    buffers and gradients stay, and whatever is raised meanwhile, so do all weights.

    In memory are, beside the model, a copy of the weights that are changed, one layer's X'X in float64 with its
    factors, and for each batch what one block of the model is given.

    Args:
        model: the network; its weights are changed in place.
        batches: some hundred examples of the training data: pairs (inputs, targets), whose targets are not used, or
            inputs alone, tensors or dicts.
        sparsity: the fraction of the weights that goes. Which go is chosen as SparseGPT does, by what each costs once
            the others have answered for those to its left, in blocks of 128 columns, unless `score` says it.
        masks: name -> bool tensor, what stays (True), for a model that is not pruned yet. Give either this or
            `sparsity`.
        score: as for ``prune``, of the model as it was: what goes is as there.
        scope: how the layers share. ``"layer"``, the same fraction of each layer, and of each block of its columns;
            ``"row"``, also the same number of each output unit's weights; ``"erk"`` or a dict, as for ``prune``; others
            with a `score` only.
        granularity: ``"weight"`` or n of m, ``(n, m)``; others with a `score` only.
        include: as for ``prune``.
        exclude: as for ``prune``; a model's last layer, which gives its answers, is mostly left out.
        axes: as for ``prune``.
        solve: ``"exact"``, the least squares for the masks, each row by itself, which never answers worse than the
            masked weights; ``"one pass"``, SparseGPT's weights: of each column's loss only those to its right hear,
            which costs less by a factor that grows with the square of the columns, and gives back less.
        damp: what is added to the diagonal of X'X, as a fraction of its mean. Of what the batches leave open, it keeps
            weights where they were.

    Returns:
        The masks, by parameter name, applied to `model` (True stays): exactly as many as ``prune`` counts.

    Raises:
        ValueError: where an argument is out of range or does not go with another, nothing is eligible, an input or a
            weight is not finite, or a layer is of a kind that cannot be reconstructed: recurrent, transposed, with a
            parametrization, used again after others, or reached by no batch. The model is then as it was.
        TypeError: where an argument is of another kind, or a parameter cannot be written.

    Warns where a layer has fewer inputs to learn from than columns: what they leave open the damping decides.

    Example:
        >>> model, x = nn.Linear(8, 4), torch.randn(64, 8)
        >>> masks = gp.reconstruct_(model, [x], sparsity=0.5)
        >>> masks.sparsity, int((model.weight == 0).sum())
        (0.5, 16)

    Frantar and Alistarh (2023), algorithm 1, for masks that are chosen and for one pass; Hassibi and Stork (1993),
    section 3, of all pruned weights of a row at once, for exact weights; chapter 5.
    """
    damp = checks.number("damp", damp, least=0.0)
    checks.choice("solve", solve, ("exact", "one pass"))
    choices: dict[str, Share] = {}
    wanted: Mapping[str, Tensor] = {}
    if masks is not None:
        others: dict[str, Any] = {"sparsity": sparsity, "score": score, "include": include, "exclude": exclude}
        others |= {"scope": None if scope == "layer" else scope}
        others |= {"granularity": None if granularity == "weight" else granularity}
        given = [f"{name}=" for name, value in others.items() if value is not None]
        require(not given, f"masks say what is pruned; they do not go with {', '.join(given)}")
        layers, wanted = _masked(model, masks, axes)
    else:
        request = Request.of(model, scope=scope, granularity=granularity, include=include, exclude=exclude, axes=axes)
        layers = with_axes(request.layers)
        if score is None:
            choices = shares(request, layers, sparsity)
    for weight in layers.values():
        require_kind(weight)
    inputs = items(inputs_of(batches), "an iterable of batches")
    if masks is None and score is not None:
        wanted = request.masks(model, score, sparsity=sparsity)
    _check_weights(layers, wanted)
    where = _InMemory()
    Work(model, layers, wanted, choices, where, exact=solve == "exact", damp=damp).do(inputs)
    whole = {name: torch.ones_like(w.parameter, dtype=torch.bool) for name, w in layers.items()}
    return Masks(whole | where.masks).apply_(model)


# ------------------------------------------------------------------------------------------------------ what is wanted


def _masked(
    model: nn.Module, masks: Mapping[str, Tensor], axes: StatedAxes
) -> tuple[dict[str, Weight], dict[str, Tensor]]:
    """The weights that masks are of, by the masks' names, and the masks where the weights are."""
    require_layers(checks.module(model))
    masks = Masks(masks)
    require(bool(masks), "masks are empty: there is nothing to reconstruct")
    parameters = parameters_of(model, masks)
    every = {id(weight.parameter): weight for weight in stated(weights_of(model), axes).values()}
    layers = {}
    for name, parameter in parameters.items():
        weight = every[id(parameter)]
        require_writable(name, parameter)
        require(not weight.reason or weight.guessed, f"{name!r} cannot be reconstructed: it {weight.reason}")
        layers[name] = weight._replace(name=name)
    return with_axes(layers), {name: masks[name].to(p.device) for name, p in parameters.items()}


class Share(NamedTuple):
    """How many weights of a layer stay: so many in all, in each row, or n of each m."""

    kept: int
    of: Literal["all", "row"] | tuple[int, int] = "all"

    def count(self, weight: Weight) -> int:
        """How many of its weights stay."""
        return self.kept * (weight.parameter.numel() // max(columns_of(weight), 1) if self.of == "row" else 1)


def shares(request: Request, layers: Mapping[str, Weight], sparsity: float | None) -> dict[str, Share]:
    """How many weights of each layer stay, where which is not known before."""
    if request.block is not None or request.scope in ("global", "lamp"):
        what = "channels and blocks" if request.block is not None else f"scope={request.scope!r}"
        raise ValueError(
            f"{what} cannot be chosen layer by layer: say by which score they are, as score=gp.magnitude does"
        )
    by_name = isinstance(request.scope, Mapping)
    if sparsity is None and request.n_of_m is None and not by_name:
        raise ValueError("give one of sparsity and masks; got neither")
    request.plan(sparsity=sparsity)
    if request.n_of_m is not None:
        n, m = request.n_of_m
        return {name: Share(w.parameter.numel() // m * n, (n, m)) for name, w in layers.items()}
    if request.scope == "row":
        return {name: Share(kept_of(columns_of(w), float(sparsity or 0)), "row") for name, w in layers.items()}
    counts, warning = kept_of_layers(Units(layers, None, None), sparsity, request.scope)
    if warning:
        checks.warn(warning)
    return {name: Share(count) for name, count in counts.items()}


def _choose(share: Share, name: str, part: tuple[int, int, int], columns: int) -> tuple[Choose, int]:
    """What stays of each block of columns of the rows (first, rows, of all), and how wide a block is."""
    first, rows, every = part

    def in_all(costs: Tensor, start: int) -> Tensor:
        own = _between(share.kept, first, first + rows, every)
        return keep_largest({name: costs}, _between(own, start, start + costs.shape[1], columns))[0]

    def in_each_row(costs: Tensor, start: int) -> Tensor:
        return keep_in_rows(name, costs, _between(share.kept, start, start + costs.shape[1], columns), "value", None)

    if share.of == "all":
        return in_all, _WIDTH
    if share.of == "row":
        return in_each_row, _WIDTH
    n, m = share.of
    return (lambda costs, _: keep_in_rows(name, costs, n, "value", None)), m


def _between(count: int, start: int, stop: int, every: int) -> int:
    """What falls to the places from start to stop where a count is spread evenly over all; they add up to it."""
    return count * stop // every - count * start // every


def require_kind(weight: Weight) -> None:
    """Raise ValueError for what has no inputs of its own that could be recorded."""
    why = ""
    if isinstance(weight.module, nn.RNNBase | nn.RNNCellBase):
        why = "a recurrent layer's inputs are its own outputs"
    elif isinstance(weight.module, TRANSPOSED):
        why = "of a transposed convolution each input comes into several outputs of one position"
    elif weight.parameter.is_complex():
        why = "it is complex"
    elif weight.direction is not None or getattr(weight.module, weight.attribute, None) is not weight.parameter:
        why = (
            "the layer computes its weight from it; torch.nn.utils.parametrize.remove_parametrizations, or what "
            "removes the hook of torch.nn.utils, comes first"
        )
    elif weight.packed.startswith("layers that store"):
        why = weight.packed
    require(not why, f"{weight.name!r} cannot be reconstructed: {why}. Else exclude it")


def _check_weights(layers: Mapping[str, Weight], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError for weights that are not finite, and for masks of what is zero already."""
    pruned = anything = False
    for name, weight in layers.items():
        p = weight.parameter.detach()
        _require_finite(name, p)
        if name in wanted:
            pruned = pruned or not bool(wanted[name].all())
            anything = anything or bool(p.masked_fill(wanted[name], 0.0).any())
    require(
        anything or not pruned,
        "what the masks prune is zero already, so nothing is left to make good: give the model as it was before, or "
        "sparsity= and score= in place of masks that prune() has applied",
    )


def _require_finite(name: str, tensor: Tensor) -> None:
    require(bool(tensor.isfinite().all()), f"{name!r} contains NaN or infinities")


# ------------------------------------------------------------------------------------------------------------ the work


class Where(Protocol):
    """Where the weights are that are pruned one after another."""

    once: bool  # whether reading them costs, so that no batch but the first runs all of the model
    open: list[str]  # what is to be said of weights whose batches left something open

    @property
    def before(self) -> int:
        """How many weights were pruned by a call before."""

    def again(self, names: Sequence[str]) -> bool:
        """Whether weights were pruned by a call before; then they are as it left them from now on."""

    def enter(self, block: nn.Module | None) -> None:
        """Called before a block runs alone, or for None all of the model."""

    def write(self, weight: Weight, values: Tensor, mask: Tensor) -> None:
        """Put values in the place of a weight's."""

    def finish(self, names: Sequence[str]) -> None:
        """Called when weights that share their inputs are all written."""

    def undo(self) -> None:
        """Called where something is raised."""


class _InMemory:
    """Weights that are changed where they are; what stood there is kept until all are done."""

    once, before = False, 0

    def __init__(self) -> None:
        self.masks: dict[str, Tensor] = {}
        self.open: list[str] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def again(self, names: Sequence[str]) -> bool:
        """There was no call before."""
        return False

    def enter(self, block: nn.Module | None) -> None:
        """All are at hand."""

    def write(self, weight: Weight, values: Tensor, mask: Tensor) -> None:
        """Keep the values of before and the mask."""
        parameter = weight.parameter.detach()
        self._before.append((parameter, parameter.clone()))
        parameter.copy_(values)
        self.masks[weight.name] = mask

    def finish(self, names: Sequence[str]) -> None:
        """Nothing is noted."""

    def undo(self) -> None:
        """Put every value back."""
        for parameter, values in self._before:
            parameter.copy_(values)


class Work:
    """Layers that are pruned one after another."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Weight],
        wanted: Mapping[str, Tensor],
        choices: Mapping[str, Share],
        where: Where,
        *,
        exact: bool,
        damp: float,
    ) -> None:
        self._model, self._layers, self._wanted, self._choices = model, layers, wanted, choices
        self._where, self._exact, self._damp = where, exact, damp

    def do(self, batches: Sequence[Any]) -> None:
        """Prune every layer; where something is raised, that is undone."""
        model, where = self._model, self._where
        left = {name: weight for name, weight in self._layers.items() if self._prunes(name)}
        with evaluated(model), as_written(), torch.no_grad(), plain_layers(), _without_cache(model):
            groups, chain = look(model, batches, left, once=where.once) if left else ([], None)
            passes = Passes(model, batches, chain, where.enter)
            later = set(left)
            try:
                with bar(len(left), "reconstruct", where.before) as progress:
                    for group in groups:
                        later -= set(group)
                        if not where.again(group):
                            self._prune(group, self._grams(passes, group, left, later), progress.update)
                            where.finish(group)
                self._say_what_is_open()
            except BaseException:
                where.undo()
                raise

    def _prunes(self, name: str) -> bool:
        if name in self._wanted:
            return not bool(self._wanted[name].all())
        weight = self._layers[name]
        return self._choices[name].count(weight) < weight.parameter.numel()

    def _grams(
        self, passes: Passes, group: list[str], layers: Mapping[str, Weight], later: set[str]
    ) -> dict[Piece, Gram]:
        """X'X of all that a group multiplies."""
        passes.advance(group[0])
        for share in (True, False):
            seen = Collected(self._model, layers, group, later, share=share)
            with suppress(NotShared):
                passes.run(seen)
                seen.check_shared()
                break
        for piece, gram in seen.grams.items():
            require(gram.finite(), f"what {piece.name!r} multiplies contains NaN or infinities")
        return seen.grams

    def _prune(self, group: list[str], grams: dict[Piece, Gram], update: Callable[[], Any]) -> None:
        systems: dict[int, System] = {}
        for name in group:
            weight = self._layers[name]
            dense = as_matrix(weight, weight.parameter)
            _require_finite(name, dense)
            pieces = {piece: gram for piece, gram in grams.items() if piece.name == name}
            new = torch.empty(dense.shape, dtype=dtype_on(dense.device), device=dense.device)
            keep = torch.empty(dense.shape, dtype=torch.bool, device=dense.device)
            for piece, gram in _complete(weight, pieces, len(dense)):
                if id(gram) not in systems:
                    systems[id(gram)] = System(gram.full(), self._damp)
                system = systems[id(gram)]
                if gram.samples < max(system.inputs, 1) or system.raised:
                    self._where.open.append(f"{name!r} ({gram.samples:,} for {dense.shape[1]:,} columns)")
                at = slice(piece.first, piece.first + piece.rows)
                new[at], keep[at] = self._solve(piece, dense[at].to(system.h.dtype), system, len(dense))
            self._write(weight, new, keep)
            update()

    def _solve(self, piece: Piece, dense: Tensor, system: System, rows: int) -> tuple[Tensor, Tensor]:
        name = piece.name
        if name in self._wanted:
            keep = as_matrix(self._layers[name], self._wanted[name])[piece.first : piece.first + piece.rows]
            if not self._exact:
                return eliminate(dense, system, lambda costs, at: keep[:, at : at + costs.shape[1]], _WIDTH)
            return least_squares(dense, system, keep), keep
        choose, width = _choose(self._choices[name], name, (piece.first, piece.rows, rows), dense.shape[1])
        new, keep = eliminate(dense, system, choose, width)
        return least_squares(dense, system, keep) if self._exact else new, keep

    def _write(self, weight: Weight, new: Tensor, keep: Tensor) -> None:
        new = new.to(weight.parameter.dtype)
        finite = bool(new.isfinite().all())
        require(finite, f"the weights of {weight.name!r} leave the range of {weight.parameter.dtype}")
        mask = torch.empty_like(weight.parameter, dtype=torch.bool)
        values = torch.empty_like(weight.parameter)
        write_matrix_(weight, mask, keep)
        write_matrix_(weight, values, new.masked_fill_(~keep, 0.0))
        self._where.write(weight, values, mask)

    def _say_what_is_open(self) -> None:
        if found := self._where.open:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            checks.warn(
                f"fewer inputs than columns, or inputs that follow from each other: {', '.join(found[:3])}{more}; "
                "what the batches leave open, the damping decides. Give more batches"
            )


def _complete(weight: Weight, pieces: Mapping[Piece, Gram], rows: int) -> Iterator[tuple[Piece, Gram]]:
    """The pieces in order of their rows, with what no input has reached."""
    at = 0
    for piece, gram in sorted(pieces.items(), key=lambda pair: pair[0].first):
        if piece.first > at:
            yield Piece(weight.name, at, piece.first - at), Gram(columns_of(weight), weight.parameter.device)
        require(piece.first >= at, f"parts of {weight.name!r} overlap, each with inputs of its own: exclude it")
        yield piece, gram
        at = piece.first + piece.rows
    if at < rows:
        yield Piece(weight.name, at, rows - at), Gram(columns_of(weight), weight.parameter.device)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Let language models of transformers keep no keys and values for a next token that does not come."""
    every = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in every if getattr(config, "use_cache", None) is True}
    try:
        for config in configs.values():
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        for config in configs.values():
            config.use_cache = True  # type: ignore[union-attr]

"""What is to be pruned, and how: the arguments of ``prune``, checked once and asked as often as amounts come."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.checks import require
from gradprune.core.layers import Weight, last_of
from gradprune.core.masked import count_kept
from gradprune.core.sharded import layout, local
from gradprune.weights.directions import with_no_row_empty
from gradprune.weights.eligible import Patterns, StatedAxes, as_patterns, eligible, matches
from gradprune.weights.granularity import (
    ONE_PROCESS,
    Granularity,
    Pick,
    Ranked,
    Units,
    check_channels,
    check_fits,
    parse_granularity,
    with_axes,
)
from gradprune.weights.mask import Masks
from gradprune.weights.named import some
from gradprune.weights.plan import Choose, Scope, plan
from gradprune.weights.score import magnitude
from gradprune.weights.zeros import look_for_zeros

Score = Callable[[nn.Module], Mapping[str, Tensor]]

_SCOPES = ("global", "layer", "erk", "lamp")
_SCORES = "magnitude, random, gradient, taylor, snip, grasp, synflow, fisher, activation, movement, rotation"


@dataclass(frozen=True)
class Request:
    """A checked way to prune a model, for whatever amounts; its parameters are those from when it was made."""

    layers: Mapping[str, Weight]
    scope: Scope
    n_of_m: tuple[int, int] | None
    block: tuple[int, ...] | None
    min_keep: int | None
    outputs: str = ""  # the last layer, where its outputs may go without having been named
    pick: Pick = ONE_PROCESS

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        scope: Scope = "global",
        granularity: Granularity = "weight",
        include: Patterns = None,
        exclude: Patterns = None,
        min_keep: int | None = None,
        axes: StatedAxes = None,
        held: Callable[[Tensor], Tensor] = lambda parameter: parameter,
    ) -> Request:
        """Check the arguments, which are those of ``prune``, against the model; errors as there.

        `held` is as of ``eligible``.
        """
        include = None if include is None else as_patterns("include", include)
        exclude = None if exclude is None else as_patterns("exclude", exclude)
        if not isinstance(scope, str | Mapping):
            raise TypeError(_wanted_scope(scope))
        n_of_m, block = parse_granularity(granularity)
        check_made_for(scope, granularity)
        layers = eligible(model, include, exclude, axes, held=held)
        _look_for_torchs_masks(layers)
        if n_of_m is not None or block is not None or scope == "row":
            layers = with_axes(layers)
            check_fits(layers, n_of_m, block)
        if isinstance(granularity, str) and granularity == "channel":
            check_channels(layers)
        if min_keep is not None:
            given = checks.whole("min_keep", min_keep)
            require(given >= 0, f"min_keep must be a whole number from 0, got {min_keep!r}")
            min_keep = given
        scope = checked_scope(scope, layers)
        if n_of_m is not None:
            n, m = n_of_m
            require(
                scope in ("global", "layer"), f"granularity {n}:{m} leaves nothing to allocate; got scope={scope!r}"
            )
        require(scope != "row" or block is None, f"scope='row' prunes single weights; got granularity={granularity!r}")
        outputs = _unnamed_outputs(model, layers, include) if block is not None and len(block) == 1 else ""
        return cls(layers, scope, n_of_m, block, min_keep, outputs)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name."""
        return {name: weight.parameter for name, weight in self.layers.items()}

    @property
    def moved(self) -> dict[str, nn.Parameter]:
        """Those of them that an optimizer must have."""
        return self.parameters

    def masks(
        self,
        model: nn.Module,
        score: Score,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        within: Mapping[str, Tensor] | None = None,
    ) -> Masks:
        """Return the masks for an amount; nothing is written. Errors as of ``prune``."""
        score = checked_score(score)
        choose = self.plan(sparsity=sparsity, threshold=threshold, within=within)
        ranked = ranked_by(score, model, self.parameters)
        keep = self._kept(choose, ranked, within, in_place_of_others=threshold is None)
        if self.outputs:
            warn_of_unnamed_outputs(self.outputs, count_kept(keep[self.outputs]), keep[self.outputs].numel())
        if within is None:
            look_for_zeros(self.parameters, keep)
        return Masks(keep)

    def keep(self, ranked: Ranked, sparsity: float | None) -> dict[str, Tensor]:
        """Return the masks for a sparsity by scores that are there already; nothing is looked for in the weights."""
        return self._kept(self.plan(sparsity=sparsity), ranked, None, in_place_of_others=True)

    def alone(self, name: str, sparsity: float) -> Request:
        """Return the same request about one layer by itself, at a sparsity of its own."""
        scope: Scope = "global" if self.n_of_m is not None else {name: sparsity}
        return replace(self, layers={name: self.layers[name]}, scope=scope, outputs="")

    def _kept(
        self, choose: Choose, ranked: Ranked, within: Mapping[str, Tensor] | None, *, in_place_of_others: bool
    ) -> dict[str, Tensor]:
        keep = {name: mask.to(self.layers[name].parameter.device) for name, mask in choose(ranked).items()}
        keep = self.with_directions(keep, ranked, within, in_place_of_others=in_place_of_others)
        self._check_directions(keep)
        return keep

    def plan(
        self,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        within: Mapping[str, Tensor] | None = None,
    ) -> Choose:
        """Return the way from scores to masks for an amount; whatever needs no score to be refused is refused here."""
        sparsity, threshold = checked_amount(sparsity, threshold)
        if self.n_of_m is not None:
            n, m = self.n_of_m
            other = threshold is not None or (sparsity is not None and not math.isclose(sparsity, 1 - n / m))
            require(
                not other, f"granularity {n}:{m} is itself a sparsity of {1 - n / m:g}: give no other, nor a threshold"
            )
        elif isinstance(self.scope, Mapping):
            require(threshold is None, "a scope that gives sparsities by name does not go with a threshold")
            require(bool(self.scope) or sparsity is not None, "scope is an empty dict, and no sparsity is given")
        else:
            require_one_amount(sparsity, threshold)
        if threshold is not None:
            shared = self.scope in ("global", "layer")
            require(shared, f"scope={self.scope!r} shares out a sparsity; it does not go with a threshold")
        units = Units(self.layers, self.block, checked_within(within, self.parameters), self.pick)
        return plan(units, sparsity, threshold, self.scope, self.n_of_m, self.min_keep)

    def amount(self, value: float, kind: Literal["sparsity", "threshold"] = "sparsity") -> dict[str, float]:
        """Return a schedule's value as an argument of ``masks``; n:m is a sparsity by itself, and 0 is none yet."""
        return {} if self.n_of_m is not None and value == 0 else {kind: value}

    def sparsity(self, masks: Masks) -> float:
        """Return the share of the counted weights that masks prune."""
        return masks.sparsity

    def with_beside(self, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return masks of all parameters from those of the weights."""
        return masks

    def copied(self, memo: dict[int, Any]) -> Request:
        """Return the same request about the copy of the model that `memo`, of ``copy.deepcopy``, knows."""
        copies = {n: copy.deepcopy((w.parameter, w.module), memo) for n, w in self.layers.items()}
        layers = {n: w._replace(parameter=copies[n][0], module=copies[n][1]) for n, w in self.layers.items()}
        return replace(self, layers=layers)

    def check_amounts(self, values: Iterable[float], kind: Literal["sparsity", "threshold"] = "sparsity") -> None:
        """Raise ValueError where one of the values that a schedule takes does not fit."""
        for value in values:
            try:
                self.plan(**self.amount(value, kind))  # type: ignore[arg-type]
            except ValueError as error:
                given = f"a {kind} of {value!s:.20}"
                raise ValueError(f"the schedule comes to {given}, which does not fit: {error}") from None

    def with_directions(
        self,
        keep: Mapping[str, Tensor],
        ranked: Ranked,
        within: Mapping[str, Tensor] | None,
        *,
        in_place_of_others: bool,
    ) -> dict[str, Tensor]:
        """Return masks that empty no row of a weight_norm's direction, where that can be said weight by weight."""
        found = dict(keep)
        if self.n_of_m is not None or self.block is not None or self.scope == "row":
            return found
        for name, weight in self.layers.items():
            if weight.direction is not None:
                device = found[name].device
                scores = Ranked({name: ranked.values[name].to(device)}, ranked.by).scores()[name]
                allowed = None if within is None else within[name].to(device)
                found[name] = with_no_row_empty(
                    weight, found[name], scores, allowed, in_place_of_others=in_place_of_others
                )
        return found

    def _check_directions(self, keep: Mapping[str, Tensor]) -> None:
        """Raise ValueError where weight_norm would divide by the norm of an emptied row."""
        for name, weight in self.layers.items():
            if weight.direction is None:
                continue
            alive = (keep[name] & (weight.parameter.detach() != 0)).sum(weight.direction) > 0
            require(
                bool(alive.all()),
                f"{name!r} is the direction of a weight_norm, and {int((~alive).sum())} of its {alive.numel()} rows "
                "would be empty, which makes the network NaN: remove the parametrization first (torch.nn.utils."
                "parametrize.remove_parametrizations, or remove_weight_norm), prune less, or exclude it",
            )


def _unnamed_outputs(model: nn.Module, layers: Mapping[str, Weight], include: list[str] | None) -> str:
    """The last layer, where it is among others that are pruned without having been named."""
    last = last_of(model)
    if last is None or last.name not in layers or len(layers) == 1:
        return ""
    return "" if any(matches(pattern, last) for pattern in include or []) else last.name


def warn_of_unnamed_outputs(name: str, kept: int, weights: int) -> None:
    """Warn where not all weights of the last layer stay."""
    if kept < weights:
        checks.warn(
            f"outputs of {name!r}, the model's last layer, are pruned: if they are its classes, exclude={name!r} keeps "
            "them"
        )


def checked_amount(sparsity: float | None, threshold: float | None) -> tuple[float | None, float | None]:
    """Return a sparsity and a threshold as numbers, where they are given; errors as of ``prune``."""
    if sparsity is not None:
        sparsity = checks.fraction("sparsity", sparsity, one="prunes every weight")
    if threshold is not None:
        threshold = checks.number("threshold", threshold, finite=False)
    return sparsity, threshold


def require_one_amount(sparsity: float | None, threshold: float | None) -> None:
    """Raise ValueError unless just one of the two is given."""
    both = "neither" if sparsity is None else "both"
    require((sparsity is None) != (threshold is None), f"give exactly one of sparsity and threshold; got {both}")


def checked_score(score: Any) -> Score:
    """Return a score, or raise TypeError that says what was probably meant."""
    hint = ""
    if isinstance(score, str):
        hint = f"give the function itself, gp.magnitude; there are {_SCORES}"
    elif isinstance(score, Mapping):
        hint = f"give the function, not the scores it returned: gp.magnitude, or another of {_SCORES}"
    elif isinstance(score, int | float):
        hint = f"the number was taken as the score: sparsity={score!r} or threshold={score!r} is given by name"
    elif isinstance(score, nn.Module):
        raise TypeError(
            f"score must be a function of the model, got a model, {type(score).__name__}; there are {_SCORES}"
        )
    elif isinstance(score, torch.optim.Optimizer):
        hint = "prune takes no optimizer: hold the masks with masks.hold(optimizer)"
    return checks.function("score", score, hint=hint)


def ranked_by(score: Score, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Ranked:
    """Return the scores of the parameters, checked; raise where one is missing, misshapen or complex.

    Of scores that are spread over several processes, as their parameters are, what is held here.
    """
    if score is magnitude:
        return Ranked({name: local(p).detach() for name, p in parameters.items()}, "magnitude")
    scores = score(model)
    called = getattr(score, "__name__", type(score).__name__)
    if not isinstance(scores, Mapping):
        raise TypeError(
            f"the score must return a dict with a tensor of each parameter's shape; {called} returned "
            f"{'None' if scores is None else type(scores).__name__}"
        )
    found = {}
    for name, p in parameters.items():
        if name not in scores:
            raise ValueError(f"the score has no value for {name!r}; give it one, or exclude the parameter")
        value = scores[name]
        if not isinstance(value, Tensor):
            raise TypeError(f"the score of {name!r} must be a tensor of shape {tuple(p.shape)}, got {value!r:.60}")
        if value.shape != p.shape:
            raise ValueError(f"the score of {name!r} has shape {tuple(value.shape)}, wanted {tuple(p.shape)}")
        if value.is_complex():
            raise ValueError(
                f"the score of {name!r} is complex, which has no order: take its modulus, or its real part"
            )
        if value.is_meta or value.layout != torch.strided or value.is_quantized:
            raise TypeError(
                f"the score of {name!r} must be a dense tensor with values, got {value.layout} on {value.device}"
            )
        _check_lies_as("the score of", name, value, p)
        found[name] = local(value).detach()
    return Ranked(found)


def _wanted_scope(scope: Any) -> str:
    return f"scope must be one of {_SCOPES}, 'row', or a dict of sparsities by name, got {scope!r}"


def checked_scope(scope: Any, layers: Mapping[str, Weight]) -> Scope:
    """Return a scope, sparsities by the names that their patterns mean; errors as of ``prune``."""
    if not isinstance(scope, Mapping):
        require(scope in (*_SCOPES, "row"), _wanted_scope(scope))
        return scope  # type: ignore[no-any-return]
    found: dict[str, float] = {}
    for pattern in sorted(scope, key=lambda key: any(key in weight.names for weight in layers.values())):
        matched = [n for n, w in layers.items() if isinstance(pattern, str) and matches(pattern, w)]
        require(bool(matched), f"scope names {pattern!r}, which is not eligible; eligible are {list(layers)}")
        value = checks.fraction(f"the sparsity of {pattern!r}", scope[pattern])
        for name in matched:  # names come last, and overrule patterns
            exact = pattern in layers[name].names
            if not exact and found.get(name, value) != value:
                raise ValueError(f"two patterns of scope give {name!r} different sparsities, {found[name]} and {value}")
            found[name] = value
    return found


def check_made_for(scope: Any, granularity: Granularity) -> None:
    """Raise ValueError where sparsities were planned for weights that go together otherwise."""
    made_for = getattr(scope, "granularity", granularity)
    coupled = "group" in (str(made_for), str(granularity))
    require(
        made_for == granularity or (not coupled and parse_granularity(made_for) == parse_granularity(granularity)),
        f"scope is a plan for granularity={made_for!r}, and granularity={granularity!r} is given",
    )


def checked_within(
    within: Mapping[str, Tensor] | None, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor] | None:
    """Return what this process has of the masks that say what may stay; raise where they do not fit."""
    if within is None:
        return None
    if not isinstance(within, Mapping):
        raise TypeError(f"`within` must be masks, as prune returns them, got {type(within).__name__}")
    for name, p in parameters.items():
        require(name in within, f"`within` has no mask for {name!r}; exclude the parameter, or give a mask of all True")
        mask = within[name]
        if not isinstance(mask, Tensor):
            raise TypeError(f"`within` must hold bool tensors; that of {name!r} is {type(mask).__name__}")
        require(
            mask.shape == p.shape,
            f"`within` has shape {tuple(mask.shape)} for {name!r}, the parameter {tuple(p.shape)}",
        )
        if mask.dtype != torch.bool:
            raise TypeError(f"`within` must hold bool tensors; that of {name!r} is {mask.dtype}")
        _check_lies_as("`within` of", name, mask, p)
    return {name: local(within[name]).to(p.device) for name, p in parameters.items()}


def _check_lies_as(what: str, name: str, value: Tensor, parameter: Tensor) -> None:
    """Raise ValueError where a tensor is not spread over processes as its parameter is."""
    own, wanted = layout(value), layout(parameter)
    require(own == wanted, f"{what} {name!r} lies as {own}, the parameter as {wanted}: it must lie as that does")


def _look_for_torchs_masks(layers: Mapping[str, Weight]) -> None:
    """Warn where torch.nn.utils.prune has masks of its own on what is pruned."""
    if masked := [name for name, w in layers.items() if f"{w.attribute}_mask" in w.module._buffers and "_orig" in name]:
        checks.warn(
            f"torch.nn.utils.prune prunes {some(masked)} too, and its masks stay in force, uncounted: "
            "Masks.from_torch_(model) takes them over and gives the parameters their own names back"
        )

"""Which parameters of a model may be pruned (chapter 4)?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from gradprune.core import checks
from gradprune.core.layers import QUANTIZED, Weight, require_layers, stated_axes, weights_of
from gradprune.core.memory import require_own_memory

Patterns = str | Iterable[str] | None
StatedAxes = Mapping[str, tuple[int, int]] | None


def eligible(
    model: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    axes: StatedAxes = None,
    *,
    held: Callable[[Tensor], Tensor] = lambda parameter: parameter,
) -> dict[str, Weight]:
    """Return the weights that may be pruned, by name, a tied one once.

    They are floating or complex, trainable, of two dimensions or more, and neither an embedding's nor a
    normalisation's. Of a parameter that is not the `weight` of a layer, the name and shape decide: no weight is what
    is called a bias, embedding, token, position, scale or logarithm, and what is a vector or has a first axis of 1.

    Args:
        model: what is to be pruned.
        include: glob patterns; only parameters of which one matches a name. One that matches no eligible parameter may
            take those that are frozen, or, in a module of a kind that is not known, that only their name or shape rules
            out.
        exclude: glob patterns; no parameters of which one matches a name.
        axes: glob pattern -> (output, input), the axes of weights whose layer is not known; such a parameter is
            eligible whatever its name and shape.
        held: parameter -> what is written of it in this process.

    Raises:
        ValueError: where nothing is left, a pattern matches nothing, parameters share memory without being tied, or
            zeros in a parameter would not be the layer's.
        TypeError: where the model does not say what its layers are, or a parameter is quantized or cannot be written.
    """
    require_layers(checks.module(model))
    every = stated(weights_of(model), axes)
    pool = {name: w for name, w in every.items() if not w.reason and w.parameter.requires_grad}
    beside = {name: w for name, w in every.items() if name not in pool and (not w.reason or w.guessed)}
    if include is None:
        _require_none_quantized(every, exclude)
    if not pool and include is None:
        pool = _without_matrices(every)
    chosen = pool if include is None else _matching("include", include, pool, beside, every)
    excluded = {} if exclude is None else _matching("exclude", exclude, every, {}, every)
    layers = {name: w for name, w in every.items() if name in chosen and name not in excluded}
    checks.require(bool(layers), f"include={include!r} and exclude={exclude!r} leave nothing of {list(pool or beside)}")
    for name, weight in layers.items():
        checks.require(not weight.refused, f"{name!r} cannot be pruned: {weight.refused}")
        checks.require_writable(name, held(weight.parameter))
    require_own_memory(
        {name: w.parameter for name, w in layers.items()}, {name: w.parameter for name, w in every.items()}
    )
    return layers


def matches(pattern: str, weight: Weight) -> bool:
    """Whether a glob pattern matches one of the names of a parameter."""
    return any(fnmatchcase(name, pattern) for name in weight.names)


def as_patterns(argument: str, patterns: Any) -> list[str]:
    """Return one or several glob patterns as a list, or raise TypeError; `argument` is what it is called."""
    given = [patterns] if isinstance(patterns, str) else patterns
    if isinstance(given, Iterable) and not isinstance(given, bytes):
        given = list(given)
        if all(isinstance(pattern, str) for pattern in given):
            return given
    raise TypeError(f"{argument} must be a glob pattern or a list of them, such as '0.*', got {patterns!r}")


def stated(every: dict[str, Weight], axes: StatedAxes) -> dict[str, Weight]:
    """The weights with the axes that the caller states."""
    if axes is None:
        return every
    if not isinstance(axes, Mapping):
        raise TypeError(f"axes must be a dict from names to (output, input), got {axes!r}")
    candidates = {name: w for name, w in every.items() if not w.reason or w.guessed}
    for pattern, pair in axes.items():
        for name, weight in _matching("axes", pattern, candidates, {}, every).items():
            stated = stated_axes(name, pair, weight.parameter.dim())
            every[name] = weight._replace(axes=stated, packed="", reason="", guessed=False)
    return every


def _require_none_quantized(every: Mapping[str, Weight], exclude: Patterns) -> None:
    """Raise TypeError where a quantized weight would be left out although nobody said so."""
    left = [] if exclude is None else as_patterns("exclude", exclude)
    for name, weight in every.items():
        if weight.reason == QUANTIZED and not any(matches(pattern, weight) for pattern in left):
            raise TypeError(f"{name!r} {QUANTIZED}")


def _without_matrices(every: Mapping[str, Weight]) -> dict[str, Weight]:
    """What to take where no parameter is a weight beyond doubt; an error where something else is meant."""
    frozen = [name for name, w in every.items() if not w.reason]
    guessed = {name: w for name, w in every.items() if w.guessed and w.parameter.requires_grad}
    if frozen or not guessed:
        hint = f"; {_some(frozen)} are frozen: name them by include=, or requires_grad_(True)" if frozen else ""
        raise ValueError(
            f"the model has nothing to prune: none of its {len(every)} parameters is floating or complex, trainable, "
            f"of two dimensions or more, and neither an embedding's nor a normalisation's{hint}"
        )
    reasons = "; ".join(f"{name!r} {w.reason}" for name, w in list(guessed.items())[:3])
    checks.warn(
        f"the model has no matrix of a layer, so what looks like none is pruned ({reasons}); name it by include= to "
        "say that it is meant"
    )
    return guessed


def _matching(
    argument: str, patterns: Any, names: Mapping[str, Weight], beside: Mapping[str, Weight], every: Mapping[str, Weight]
) -> dict[str, Weight]:
    """The weights that a pattern matches, among `beside` where it matches none of `names`."""
    found: dict[str, Weight] = {}
    for pattern in as_patterns(argument, patterns):
        for among in (names, beside):
            matched = {name: w for name, w in among.items() if matches(pattern, w)}
            if matched:
                break
        else:
            raise ValueError(f"{argument} pattern {pattern!r} matches {_instead(pattern, every)}")
        found |= matched
    return found


def _instead(pattern: str, every: Mapping[str, Weight]) -> str:
    """What a pattern matches that is not eligible, or which pattern was meant."""
    matched = [w for w in every.values() if matches(pattern, w)]
    if matched:
        first, names = matched[0], [n for w in matched for n in w.names if fnmatchcase(n, pattern)]
        tied = "" if names[0] == first.name else f"is tied to {first.name!r}, which "
        return f"only {_some(names)}, not eligible: {names[0]!r} {tied}{first.reason}"
    for meant in (f"{pattern}.*", f"*{pattern}*"):
        if pattern and any(matches(meant, w) for w in every.values()):
            return f"none of {_some(list(every))}; did you mean {meant!r}?"
    return f"none of {_some(list(every))}"


def _some(names: list[str], most: int = 20) -> str:
    return repr(names) if len(names) <= most else f"{repr(names[:most])[:-1]}, ... {len(names) - most} more]"

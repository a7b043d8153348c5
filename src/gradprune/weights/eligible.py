"""Which parameters of a model may be pruned (chapter 4)?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from gradprune.core.checks import require

Patterns = str | Sequence[str] | None

_NEVER = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
    *([nn.RMSNorm] if hasattr(nn, "RMSNorm") else []),
)


def eligible(model: nn.Module, include: Patterns, exclude: Patterns) -> dict[str, nn.Parameter]:
    """Return the parameters that may be pruned, by name, a tied one once.

    They are floating or complex, trainable, of two dimensions or more, and neither an embedding's nor a
    normalisation's; glob patterns over the names narrow that down. Raises ValueError where nothing is left, or a
    pattern matches nothing.
    """
    never = {id(p) for m in model.modules() if isinstance(m, _NEVER) for p in m.parameters(recurse=False)}
    every = dict(model.named_parameters())
    layers = {
        name: p
        for name, p in every.items()
        if (p.is_floating_point() or p.is_complex()) and p.requires_grad and p.dim() >= 2 and id(p) not in never
    }
    if not layers:
        raise ValueError(
            f"the model has nothing to prune: none of its {len(every)} parameters is floating or complex, trainable, "
            "of two dimensions or more, and neither an embedding's nor a normalisation's"
        )
    included = _matching("include", include, layers, every) if include is not None else set(layers)
    excluded = _matching("exclude", exclude, every, every) if exclude is not None else set()
    chosen = {name: p for name, p in layers.items() if name in included and name not in excluded}
    require(bool(chosen), f"include={include!r} and exclude={exclude!r} leave nothing of {list(layers)}")
    return chosen


def _matching(argument: str, patterns: Patterns, names: Iterable[str], every: Iterable[str]) -> set[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or [])
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            ineligible = [name for name in every if fnmatchcase(name, pattern)]
            reason = f"only {ineligible}, not eligible" if ineligible else f"none of {list(every)}"
            raise ValueError(f"{argument} pattern {pattern!r} matches {reason}")
        found |= matched
    return found

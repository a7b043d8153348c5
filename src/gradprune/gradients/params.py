"""Which gradients does a call mean? Those of a tensor, of several, with or without names, or of a model (chapter 2)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

Params = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | nn.Module


def with_gradient(params: Params) -> dict[str, Tensor]:
    """Return the parameters that have a gradient, by name, each once and in their order.

    `params` is a tensor, an iterable of tensors or of (name, tensor) pairs, as `named_parameters()` gives them, or a
    model; it is read once, so a generator will do. A parameter without a name is called "parameter 0" and so on by its
    position. A tensor given twice counts once. Empty where nothing has a gradient.

    Raises TypeError where something else than a tensor is among them, ValueError where a name stands for two tensors.
    """
    return _each_once((name, parameter) for name, parameter in _named(params) if parameter.grad is not None)


def by_name(params: Params) -> dict[str, Tensor]:
    """Return all the parameters, with a gradient or without, by name; as ``with_gradient`` in all else."""
    return _each_once(_named(params))


def _each_once(pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in pairs:
        if id(parameter) in seen:
            continue
        if name in found:
            raise ValueError(f"two different parameters are called {name!r}")
        seen.add(id(parameter))
        found[name] = parameter
    return found


def _named(params: Params) -> Iterable[tuple[str, Tensor]]:
    if isinstance(params, Tensor):
        params = [params]
    elif isinstance(params, nn.Module):
        params = params.named_parameters()
    for position, entry in enumerate(params):
        name, parameter = entry if isinstance(entry, tuple) and len(entry) == 2 else (f"parameter {position}", entry)
        if not isinstance(parameter, Tensor) or not isinstance(name, str):
            raise TypeError(
                f"params must hold tensors, or (name, tensor) pairs as named_parameters() gives them; "
                f"entry {position} is {type(entry).__name__}"
            )
        yield name, parameter

"""Which gradients does a call mean? Those of a tensor, of several, with or without names, or of a model (chapter 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradprune.core.checks import require_whole

Params = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | nn.Module

_WANTED = "params must be a model, a tensor, or an iterable of tensors or of (name, tensor) pairs"


def with_gradient(params: Params) -> dict[str, Tensor]:
    """Return the parameters that have a gradient, by name, each once and in their order.

    A parameter without a name is called "parameter 0" and so on by its position. A tensor given twice counts once.

    Args:
        params: a tensor, an iterable of tensors or of (name, tensor) pairs, as `named_parameters()` gives them, or a
            model. It is read once, so a generator will do.

    Returns:
        The parameters by name; empty where nothing has a gradient.

    Raises:
        TypeError: for another kind of object, and where something else than a tensor is among them.
        ValueError: for an iterator that yields nothing, a name that stands for two tensors, and where no tensor could
            ever have a gradient.
    """
    named = by_name(params)
    found = {name: parameter for name, parameter in named.items() if parameter.grad is not None}
    if not found:
        require_trainable(named.values())
    return found


def by_name(params: Params) -> dict[str, Tensor]:
    """Return all the parameters, with a gradient or without, by name; as ``with_gradient`` in all else."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in _named(read_once(params)):
        if id(parameter) in seen:
            continue
        if name in found:
            raise ValueError(f"two different parameters are called {name!r}")
        seen.add(id(parameter))
        found[name] = parameter
    return found


def read_once(params: Params) -> Tensor | nn.Module | list[Any]:
    """Return a tensor or a model as it is and what an iterable holds as a list; refuse what can be none of them."""
    if isinstance(params, Tensor | nn.Module):
        require_whole([params] if isinstance(params, Tensor) else params.parameters())
        return params
    if isinstance(params, Optimizer | Mapping | str | bytes | type) or not isinstance(params, Iterable):
        raise TypeError(f"{_WANTED}, got {_kind(params)}")
    entries = list(params)
    if not entries and isinstance(params, Iterator):
        raise ValueError(
            "params is an iterator that yields nothing: it was used up before, or its model has no parameters; "
            "give the model itself, or a list"
        )
    require_whole(tensors_in(entries))
    return entries


def tensors_in(entries: Iterable[Any]) -> Iterator[Any]:
    """Yield the tensors of a list of tensors or of (name, tensor) pairs."""
    return (entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry for entry in entries)


def require_trainable(tensors: Iterable[Tensor]) -> None:
    """Raise ValueError where there are tensors and none of them can ever have a gradient: others were meant."""
    tensors = list(tensors)
    if tensors and all(not tensor.is_leaf and not tensor.retains_grad for tensor in tensors):
        raise ValueError(
            "the tensors in params were computed from others, so that no gradient is kept of them: give the parameters "
            "they come from, or call retain_grad() on them before backward()"
        )
    if tensors and not any(isinstance(t, nn.Parameter) or t.requires_grad or t.grad is not None for t in tensors):
        raise ValueError(
            "no tensor in params has a gradient or could have one: give the parameters themselves, "
            "not their gradients, their data or a state dict's values"
        )


def _named(params: Tensor | nn.Module | list[Any]) -> Iterable[tuple[str, Tensor]]:
    if isinstance(params, Tensor):
        params = [params]
    elif isinstance(params, nn.Module):
        params = list(params.named_parameters())
    for position, entry in enumerate(params):
        name, parameter = entry if isinstance(entry, tuple) and len(entry) == 2 else (f"parameter {position}", entry)
        if not isinstance(parameter, Tensor) or not isinstance(name, str):
            raise TypeError(
                "params must hold tensors, or (name, tensor) pairs as named_parameters() gives them; "
                f"entry {position} is {type(entry).__name__}{_hint(entry)}"
            )
        yield name, parameter


def _hint(entry: Any) -> str:
    if isinstance(entry, Mapping) and "params" in entry:
        return ": of an optimizer's groups, give [p for group in optimizer.param_groups for p in group['params']]"
    if isinstance(entry, nn.Module):
        return ": of several models, give itertools.chain of their named_parameters()"
    return ": where a parameter has no gradient, give the parameter, not its grad" if entry is None else ""


def _kind(params: Any) -> str:
    """What was given instead, and what was probably meant."""
    if isinstance(params, Optimizer):
        return (
            f"the optimizer {type(params).__name__}: give the model, or "
            "[p for group in optimizer.param_groups for p in group['params']]"
        )
    if isinstance(params, Mapping):
        gradients = any(isinstance(value, nn.Parameter) for value in params.values())
        return "a mapping: give its items()" if gradients else "a mapping, as a state dict is: give the model"
    if isinstance(params, type):
        return f"the class {params.__name__}: make one, {params.__name__}(...)"
    if callable(params):
        return f"a function, {getattr(params, '__name__', type(params).__name__)}: call it"
    return repr(params) if params is None else f"{type(params).__name__}"

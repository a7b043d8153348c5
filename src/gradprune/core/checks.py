"""How is an argument checked, once, before anything is changed?

Each function returns the checked value in the type that the package works with, or raises: TypeError for an object of
the wrong kind, ValueError for a value out of range. A message says what was given and what is wanted.
"""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")

_PACKAGE = __name__.partition(".")[0]


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless the condition holds."""
    if not holds:
        raise ValueError(message)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, at the line outside this package that called into it."""
    frame, level = sys._getframe(), 1
    inside = (f"{_PACKAGE}.", "torch.")  # a hook of an optimizer is called by torch
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def number(
    name: str,
    value: Any,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    finite: bool = True,
) -> float:
    """Return a real number as a plain float: a Python, NumPy or 0-d tensor number in the range.

    Refused are bool, text, complex numbers, None (TypeError); NaN, what is out of range and, unless `finite` is false,
    infinities (ValueError).
    """
    plain = _plain(name, value, "a number")
    try:
        converted = float(plain)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float, got {_shown(value)}") from None
    in_range = least <= converted <= most and (above < converted or above == -math.inf)
    in_range = in_range and (converted < below or below == math.inf) and not (finite and math.isinf(converted))
    if math.isnan(converted) or not in_range:
        raise ValueError(f"{name} must be {_range(least, most, above, below, finite)}, got {_shown(value)}")
    return converted


def whole(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """Return a whole number as a plain int, from a Python, NumPy or 0-d tensor number that is one (2 or 2.0).

    Refused are bool, text, complex numbers, None (TypeError); 2.5, NaN, infinities, what is out of range (ValueError).
    """
    plain = _plain(name, value, "a whole number")
    ratio = isinstance(value, numbers.Rational) and value.denominator != 1  # its float may be whole by rounding
    if ratio or (isinstance(plain, float) and not (math.isfinite(plain) and plain == int(plain))):
        raise ValueError(f"{name} must be a whole number, got {_shown(value)}")
    converted = int(plain)
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    if not low <= converted <= high:
        wanted = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} must be {wanted}, got {_shown(value)}")
    return converted


def fraction(name: str, value: Any, *, one: str = "") -> float:
    """Return a number between 0 and 1 as a plain float; errors as for ``number``.

    With `one`, which says what 1 does, the int 1 warns: as a percentage is written. 1.0 does not.
    """
    found = number(name, value, least=0.0, most=1.0)
    if one and type(value) is int and value == 1:
        warn(f"{name}=1 {one}: it is a fraction, and 0.01 is one per cent. 1.0 says that all is meant")
    return found


def choice(name: str, value: T, known: Collection[T]) -> T:
    """Return the value if it is one of the known ones, else raise ValueError."""
    try:
        found = value in known
    except (TypeError, ValueError, RuntimeError):  # not hashable, or an array or tensor, whose comparison is one too
        found = False
    if not found or isinstance(value, Tensor):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {_shown(value)}")
    return value


def module(value: Any, name: str = "model") -> nn.Module:
    """Return a module, or raise TypeError that says what was given instead."""
    if isinstance(value, nn.Module):
        return value
    hint = ""
    if isinstance(value, type) and issubclass(value, nn.Module):
        hint = f"; {value.__name__} is the class: make one, {value.__name__}(...)"
    elif isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values()):
        hint = "; this looks like a state dict: load it into a model first, model.load_state_dict(...)"
    elif isinstance(value, torch.optim.Optimizer):
        hint = "; the optimizer is another argument"
    raise TypeError(f"{name} must be a torch.nn.Module, got {_shown(value)}{hint}")


def function(name: str, value: Any, *, hint: str = "") -> Callable[..., Any]:
    """Return something that can be called, or raise TypeError; `hint` says what was probably meant."""
    if isinstance(value, type):
        raise TypeError(f"{name} must be a function, got the class {value.__name__}: make one, {value.__name__}(...)")
    if callable(value):
        return value  # type: ignore[no-any-return]
    raise TypeError(f"{name} must be a function, got {_shown(value)}{'; ' + hint if hint else ''}")


def state(value: Any, wanted: Mapping[str, type | tuple[type, ...]], of: str) -> Mapping[str, Any]:
    """Return a state dict that has the wanted keys, each with a value of the wanted type, or raise.

    TypeError where it is no mapping; ValueError where a key is missing or holds something else. `of` names the class.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"a state of {of} must be a dict as its state_dict() returns it, got {_shown(value)}")
    if missing := [key for key in wanted if key not in value]:
        raise ValueError(f"the state lacks {', '.join(map(repr, missing))}: it is not one of {of}")
    for key, kinds in wanted.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value[key], kinds) or (isinstance(value[key], bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{key!r} in the state of {of} must be {names}, got {_shown(value[key])}")
    return value


def require_values(name: str, tensor: Tensor, what: str = "parameter") -> None:
    """Raise TypeError, naming it, where a tensor's entries are not at hand: lazy, DTensor, meta, quantized, wrapped."""
    called = f"the {what} {name!r}"
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        raise TypeError(f"{called} is lazy, without a shape yet: run the model on one batch first")
    if is_distributed(tensor):
        raise TypeError(f"{called} is a DTensor (FSDP2 or tensor parallel), which is not supported here")
    if tensor.is_meta:
        raise TypeError(f"{called} is on the meta device, without values: materialize the model first (to_empty, load)")
    if tensor.is_quantized:
        raise TypeError(f"{called} is quantized: prune before quantizing")
    if is_quantized(tensor):
        raise TypeError(f"{called} is quantized: do it before, or with what gp.dequantize(model) returns")
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(f"{called} is a {type(tensor).__name__}, whose entries are held by other tensors: do it before")


def require_readable(name: str, tensor: Tensor, what: str = "parameter") -> None:
    """Raise TypeError, naming it, where a tensor cannot be read entry by entry: as ``require_values``, or sparse."""
    require_values(name, tensor, what)
    if tensor.layout != torch.strided:
        raise TypeError(f"the {what} {name!r} is sparse ({tensor.layout}): make it dense first, to_dense()")


def require_writable(name: str, tensor: Tensor, what: str = "parameter") -> None:
    """Raise, naming it, where a tensor cannot be read and written in place entry by entry.

    Call it on all tensors of a call before the first is changed. TypeError for a kind of tensor that is not supported
    (as ``require_readable``, and eight-bit floats), ValueError for one that could be made writable (entries that share
    memory, inference mode, the negative bit).
    """
    require_readable(name, tensor, what)
    called = f"the {what} {name!r}"
    if tensor.is_floating_point() and tensor.element_size() == 1:
        raise TypeError(f"{called} is {tensor.dtype}, which holds numbers with a scale elsewhere: convert it first")
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(f"entries of {called} share memory (it was expanded): clone it first")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{called} was made in inference mode and cannot be changed outside it: clone it first")
    if tensor.is_neg():
        raise ValueError(f"{called} is a view with the negative bit set: resolve it first, resolve_neg()")


def require_whole(tensors: Iterable[Any]) -> None:
    """Raise TypeError where FSDP1 has flattened a parameter: it is then a part of this rank's alone."""
    if "torch.distributed.fsdp" in sys.modules and any(getattr(t, "_fsdp_flattened", False) for t in tensors):
        raise TypeError(
            "the parameters are those of a FullyShardedDataParallel (FSDP1), of which each rank sees a flattened part, "
            "which is not supported: shard the model by torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor holds integers and scales in the place of its entries, as torchao's do."""
    return type(tensor).__module__.startswith("torchao.")


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    # By name: importing torch.distributed.tensor takes longer than importing this package.
    return any(kind.__name__ == "DTensor" and kind.__module__.startswith("torch.") for kind in type(tensor).__mro__)


def _plain(name: str, value: Any, wanted: str) -> int | float:
    """The value as a Python int or float."""
    found = value
    if isinstance(value, Tensor):
        if value.dim() or value.is_complex() or value.dtype == torch.bool or value.is_meta:
            raise TypeError(f"{name} must be {wanted}, got {_shown(value)}")
        found = value.item()
    elif isinstance(value, np.ndarray) and value.ndim == 0:
        found = value[()]
    if isinstance(found, bool | np.bool_) or not isinstance(found, numbers.Real | np.floating | np.integer):
        raise TypeError(f"{name} must be {wanted}, got {_shown(value)}")
    if isinstance(found, numbers.Rational) and found.denominator == 1:  # an integer, or a Fraction that is one
        return int(found.numerator)
    return _float(name, found)


def _float(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float, got {_shown(value)}") from None


def _range(least: float, most: float, above: float, below: float, finite: bool) -> str:
    if (least, most) == (0.0, 1.0):
        return "in [0, 1]"
    if (above, finite) == (0, True) and (least, most, below) == (-math.inf, math.inf, math.inf):
        return "positive and finite"
    parts = []
    if least > -math.inf:
        parts.append(f"at least {least:g}")
    if above > -math.inf:
        parts.append("positive" if above == 0 else f"above {above:g}")
    if most < math.inf:
        parts.append(f"at most {most:g}")
    if below < math.inf:
        parts.append(f"below {below:g}")
    kind = "a finite number" if finite else "a number"
    return f"{kind}, {' and '.join(parts)}" if parts else kind


def _shown(value: Any) -> str:
    """The value as an error shows it: short, with its type where that tells more."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and {value.dtype}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, bool | int | float | complex | str | np.generic | torch.dtype):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__

"""What do a caller's batches hold?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

from torch import Tensor

from gradprune.core.checks import require


def items(batches: Any, wanted: str) -> list[Any]:
    """What an iterable of batches yields, in a list that is not empty."""
    kept = list(_iterable(batches, wanted))
    require(bool(kept), "batches is empty; an iterator that was used up before cannot be used again")
    return kept


def inputs_of(batches: Any) -> Iterator[Any]:
    """The inputs of each batch, one at a time: of a pair (inputs, targets), or the batch itself."""
    if isinstance(batches, tuple) and len(batches) == 2 and isinstance(batches[0], Tensor):
        raise TypeError("batches is one pair of tensors: give [(inputs, targets)], or a list of inputs")
    return map(_inputs, _iterable(batches, "an iterable of batches"), count())


def _iterable(batches: Any, wanted: str) -> Iterable[Any]:
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(f"batches must be {wanted}, got {described(batches)}")
    return batches


def _inputs(batch: Any, i: int) -> Any:
    if isinstance(batch, Tensor | Mapping):
        return batch
    if isinstance(batch, tuple | list) and len(batch) in (1, 2):
        return batch[0]
    raise TypeError(
        f"batch {i} must be a pair (inputs, targets), or inputs: a tensor or a dict; got {described(batch)}. "
        "Several arguments go into one tuple: ((first, second), None)"
    )


def described(value: Any) -> str:
    """What a caller gave, as an error shows it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r}" if isinstance(value, str | bytes | int | float | None) else f"a {type(value).__name__}"

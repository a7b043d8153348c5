"""What did `evaluate` return: one number, or one for each example?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradprune.core.checks import require
from gradprune.recovery.original import Original

Measure = Callable[[nn.Module], float | Tensor]  # the higher, the better


@dataclass(frozen=True)
class Outcome:
    """The mean, and what it is the mean of; one number alone is its own mean."""

    mean: float
    each: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def by_example(self) -> bool:
        """Whether there is more than one number."""
        return self.each.size > 1


def measured(
    evaluate: Measure,
    model: nn.Module,
    where: str,
    original: Original | None = None,
    written: Iterable[nn.Parameter] = (),
) -> Outcome:
    """Evaluate a model, which keeps its buffers, modes and gradients; `where` says in errors what was evaluated.

    ValueError where `evaluate` changes its weights, as ``Original`` says; `written` are those that differ from the
    original ones already.
    """
    original = original or Original(model)
    with original.keeper.unchanged(), original.watched(where, written):
        returned = evaluate(model)
    each = _numbers(returned, where)
    require(
        bool(np.isfinite(each).all()),
        f"evaluate returned {_first_not_finite(each)} {where}: it must be finite; bound what may overflow",
    )
    return Outcome(float(each.mean()), each)


def mean_of(value: Any, where: str) -> float:
    """Return the mean of what `evaluate` returned, which may be NaN or infinite."""
    return float(_numbers(value, where).mean())


def _numbers(value: Any, where: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What was returned as a vector of doubles; ValueError where it is something else."""
    if isinstance(value, Tensor):
        wanted = not value.is_complex() and not value.is_meta and value.layout == torch.strided
        value = value.detach().to("cpu", torch.float64).numpy() if wanted else None
    scalar = isinstance(value, int | float | np.number) and not isinstance(value, bool | complex | np.complexfloating)
    array = (
        isinstance(value, np.ndarray)
        and (value.ndim <= 1 or value.size == 1)
        and value.size > 0
        and value.dtype.kind in "biuf"
    )
    if not (scalar or array):
        kind = f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(
            f"evaluate must return a number, or a tensor of one dimension with one result an example; {where} it "
            f"returned {'None' if value is None else kind}"
        )
    try:
        return np.asarray(value, dtype=np.float64).reshape(-1)
    except OverflowError:
        raise ValueError(f"evaluate returned an integer too large for a float {where}") from None


def _first_not_finite(each: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    bad = each[~np.isfinite(each)]
    return "NaN" if bad.size and math.isnan(bad[0]) else str(bad[0]) if bad.size else ""

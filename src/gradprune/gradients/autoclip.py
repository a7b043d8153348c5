"""What is a usual gradient norm? Clip to a percentile of the norms seen so far (chapter 2)."""

from __future__ import annotations

import bisect
import math
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradprune.core import checks
from gradprune.core.words import in_our_words
from gradprune.gradients.clip import scale_to_norm_
from gradprune.gradients.cliplog import ClipLog
from gradprune.gradients.gathered import require_log
from gradprune.gradients.nonfinite import NonFinite, known
from gradprune.gradients.params import Params
from gradprune.gradients.spread import gathered


class AutoClip:
    """Clip by norm at a percentile of the norms seen so far: ``clip_ = gp.AutoClip(10.0)``, then ``clip_(params)``.

    A call takes the norm of the gradients into its history, finds the percentile of it by linear interpolation, and,
    where the norm is above that, scales the gradients to it. Norms that are not finite or zero do not enter the
    history, since they say nothing about what is usual. Beside a ``Pruner`` the norm counts the gradients of pruned
    weights too, unless ``pruner.masks.mask_gradients_(model)`` comes first.

    Args:
        percentile: between 0, the smallest norm so far, and 100, the largest, which never scales.
        window: how many norms the history keeps.
        nonfinite: as for :func:`clip_by_value_`.
        log: where to note how often and how hard it engaged.

    Attributes:
        threshold: what was clipped to last; infinity before the first call.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for numbers out of range, and in a call as :func:`clip_by_norm_`.

    Example:
        >>> weight, clip_ = torch.nn.Parameter(torch.zeros(1)), gp.AutoClip(50.0)
        >>> for size in (1.0, 2.0, 30.0):
        ...     weight.grad = torch.tensor([size])
        ...     print(float(clip_(weight)), round(float(weight.grad), 3))
        1.0 1.0
        2.0 1.5
        30.0 2.0

    Seetharaman et al. (2020), who keep all norms; chapter 2.
    """

    @in_our_words
    def __init__(
        self,
        percentile: float = 10.0,
        *,
        window: int = 1000,
        nonfinite: NonFinite = "raise",
        log: ClipLog | None = None,
    ) -> None:
        self.percentile = _percentile(percentile)
        self.window = checks.whole("window", window, least=1)
        self.nonfinite, self.log = known(nonfinite), None if log is None else require_log(log)
        self.threshold = math.inf
        self._history: tuple[deque[float], list[float]] = (
            deque(maxlen=min(self.window, sys.maxsize)),
            [],
        )  # in time, and sorted

    @property
    def norms(self) -> list[float]:
        """The history, oldest first."""
        return list(self._history[0])

    @torch.no_grad()
    def __call__(self, params: Params) -> Tensor:
        """Clip the gradients of `params` in place; return their norm before, as :func:`clip_by_norm_` does."""
        asked = lambda: {"percentile": self.percentile, "window": self.window, "threshold": self.threshold}  # noqa: E731
        found, _ = gathered(params, self.nonfinite, self.log, "norm", asked)
        return scale_to_norm_(found, self._learn, 2.0)

    def _learn(self, norm: float) -> float:
        """Take the norm into the history; return what to clip to now."""
        norms, ordered = self._history[0].copy(), self._history[1].copy()
        if norm > 0:
            if len(norms) == self.window:
                ordered.pop(bisect.bisect_left(ordered, norms[0]))
            norms.append(norm)
            bisect.insort(ordered, norm)
        if ordered:
            at = self.percentile / 100 * (len(ordered) - 1)
            low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
            self.threshold = low + (high - low) * (at - math.floor(at))
        self._history = norms, ordered  # both at once, whatever interrupts
        return self.threshold

    def state_dict(self) -> dict[str, Any]:
        """Percentile, window, threshold and history: what ``load_state_dict`` needs to go on from here."""
        return {
            "percentile": self.percentile,
            "window": self.window,
            "threshold": self.threshold,
            "norms": self.norms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Args:
            state: what ``state_dict()`` returned.

        Raises:
            TypeError, ValueError: before anything is changed, where it is not a state of this class.
        """
        kinds: dict[str, Any] = {
            "norms": (list, tuple),
            "percentile": (int, float),
            "threshold": (int, float),
            "window": int,
        }
        state = checks.state(state, kinds, "AutoClip")
        percentile, window = _percentile(state["percentile"]), checks.whole("window", state["window"], least=1)
        threshold = checks.number("threshold", state["threshold"], above=0.0, finite=False)
        try:
            norms = [checks.number("norm", norm, above=0.0) for norm in state["norms"]]
        except (TypeError, ValueError) as error:
            raise ValueError(f"the state's norms must be each positive and finite: {error}") from None
        if len(norms) > window:
            raise ValueError(f"the state's norms must be at most {window}, each positive and finite; got {len(norms)}")
        history = deque(norms, maxlen=min(window, sys.maxsize)), sorted(norms)
        self.percentile, self.window, self.threshold, self._history = percentile, window, threshold, history


def _percentile(value: float) -> float:
    return checks.number("percentile", value, least=0.0, most=100.0)

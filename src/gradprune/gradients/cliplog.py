"""How often and how hard did clipping engage (chapter 2)?"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from gradprune.core import checks
from gradprune.gradients.plotting import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZES = {
    None: "size",
    "norm": "norm of the gradients",
    "value": "largest gradient entry",
    "adaptive": "norm of a unit, over its weights'",
}


class Call(NamedTuple):
    """What one call of a clip did; the fields are those of the log's lists."""

    size: float
    bound: float
    factor: float
    share: float


class ClipLog:
    """How often and how hard did clipping engage? Pass one as ``log=`` to a clip, call after call, and plot it.

    A log is for one kind of clipping, since sizes of different kinds do not compare.

    Args:
        window: of how many calls the lists are kept; the counts are over all.

    Attributes:
        calls: how many there were.
        engaged: in how many something was scaled down or skipped.
        skipped: in how many "skip" set everything to zero.
        nonfinite: how often each parameter's gradient was not finite, by name.
        kind: "norm", "value" or "adaptive"; None before the first call.

    Raises:
        TypeError: for a window that is no number.
        ValueError: for a window below 1, and in a clip of a second kind, before anything is changed.

    Example:
        >>> weight, log = torch.nn.Parameter(torch.zeros(2)), gp.ClipLog()
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> norm = gp.clip_by_norm_(weight, 10.0, log=log)
        >>> log.sizes, log.bounds, log.factors, log.rate
        ([5.0], [10.0], [1.0], 0.0)

    Chapter 2.
    """

    def __init__(self, window: int = 10_000) -> None:
        self.kind: str | None = None
        self.calls = self.engaged = self.skipped = 0
        self.nonfinite: dict[str, int] = {}
        self._rows: deque[Call] = deque(maxlen=min(sys.maxsize, checks.whole("window", window, least=1)))

    @property
    def steps(self) -> list[int]:
        """The numbers of the calls that are kept, from 0."""
        return list(range(self.calls - len(self._rows), self.calls))

    @property
    def sizes(self) -> list[float]:
        """What was bounded, before it was.

        The norm; by value, the largest magnitude; adaptive, the largest norm of a unit's gradient over that of its
        weights.
        """
        return [row.size for row in self._rows]

    @property
    def bounds(self) -> list[float]:
        """What it was bounded to."""
        return [row.bound for row in self._rows]

    @property
    def factors(self) -> list[float]:
        """The smallest factor that anything was scaled by: 1 where nothing was, 0 where all was skipped."""
        return [row.factor for row in self._rows]

    @property
    def shares(self) -> list[float]:
        """How much was scaled, 0 to 1: by norm, all or nothing; by value, of the entries; adaptive, of the units."""
        return [row.share for row in self._rows]

    @property
    def rate(self) -> float:
        """The share of all calls in which clipping engaged; 0.0 before the first."""
        return self.engaged / self.calls if self.calls else 0.0

    def _require_kind(self, kind: str) -> None:
        """Raise ValueError where the log is of another kind of clipping."""
        if self.kind not in (None, kind):
            raise ValueError(f"this log is of clipping by {self.kind}; clipping by {kind} needs one of its own")

    def _note(self, kind: str, row: Call, *, skipped: bool) -> None:
        """Note what one call of a clip did."""
        self.kind = kind
        self.calls += 1
        self.engaged += row.share > 0
        self.skipped += skipped
        self._rows.append(row)

    def plot(self) -> Figure:
        """Draw what was bounded, and to what, over the calls that are kept.

        Returns:
            A matplotlib figure: sizes and bounds above, on a logarithmic axis, the smallest factors below.

        Raises:
            ImportError: without matplotlib.
            ValueError: where no call was noted.

        Example:
            >>> weight, log = torch.nn.Parameter(torch.zeros(1)), gp.ClipLog()
            >>> for size in (1.0, 2.0, 0.5):
            ...     weight.grad = torch.tensor([size])
            ...     norm = gp.clip_by_norm_(weight, 1.0, log=log)
            >>> log.plot().get_suptitle()
            'clipping by norm engaged in 1 of 3 calls (33.3 %)'
        """
        checks.require(bool(self._rows), "there is nothing to plot: pass the log to a clip, log=log")
        figure = new_figure(4.5)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        finite = [(step, row.size) for step, row in zip(self.steps, self._rows, strict=True) if 0 < row.size < math.inf]
        above.plot(*zip(*finite, strict=True) if finite else ([], []), ".", color="tab:blue", label="before clipping")
        above.plot(self.steps, self.bounds, color="tab:orange", label="bound")
        above.set(yscale="log", ylabel=_SIZES[self.kind])
        above.legend()
        below.plot(self.steps, self.factors, color="tab:blue", drawstyle="steps-mid")
        below.set(xlabel="call", ylabel="smallest\nfactor", ylim=(-0.05, 1.05))
        rate = f"{self.engaged} of {self.calls} calls ({100 * self.rate:.1f} %)"
        figure.suptitle(f"clipping by {self.kind} engaged in {rate}".replace("by adaptive", "by unit"))
        return figure

    def __repr__(self) -> str:
        least = min(self.factors, default=1.0)
        bad, kind = sum(self.nonfinite.values()), f"by {self.kind}, " if self.kind else ""
        return (
            f"ClipLog({kind}{self.calls} calls, engaged in {self.engaged} ({100 * self.rate:.1f} %), smallest factor "
            f"{least:.3g}, {bad} gradients not finite, {self.skipped} calls skipped)"
        )

    def state_dict(self) -> dict[str, Any]:
        """All counts and the kept calls: what ``load_state_dict`` needs to go on from here."""
        return {
            "kind": self.kind,
            "calls": self.calls,
            "engaged": self.engaged,
            "skipped": self.skipped,
            "nonfinite": dict(self.nonfinite),
            "window": self._rows.maxlen,
            "rows": [list(row) for row in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Args:
            state: what ``state_dict()`` returned.

        Raises:
            TypeError, ValueError: before anything is changed, where it is not a state of this class.
        """
        kinds: dict[str, Any] = {"calls": int, "engaged": int, "kind": (str, type(None)), "nonfinite": Mapping}
        state = checks.state(state, kinds | {"rows": (list, tuple), "skipped": int, "window": int}, "ClipLog")
        kind = checks.choice("kind", state["kind"], list(_SIZES))
        calls = checks.whole("calls", state["calls"], least=0)
        window, rows = checks.whole("window", state["window"], least=1), [_call(row) for row in state["rows"]]
        if len(rows) > min(window, calls):
            raise ValueError(f"the state keeps {len(rows)} calls, of {calls} and at most {window}")
        engaged, skipped = (checks.whole(name, state[name], least=0, most=calls) for name in ("engaged", "skipped"))
        nonfinite = {str(name): checks.whole("nonfinite", count, least=1) for name, count in state["nonfinite"].items()}
        kept = deque(rows, maxlen=min(window, sys.maxsize))
        self.kind, self.nonfinite, self._rows = kind, nonfinite, kept
        self.calls, self.engaged, self.skipped = calls, engaged, skipped


def _call(row: Any) -> Call:
    numbers = isinstance(row, list | tuple) and all(isinstance(n, int | float) for n in row)
    if not numbers or len(row) != len(Call._fields):
        raise ValueError(
            f"a row of the state must be {len(Call._fields)} numbers ({', '.join(Call._fields)}), got {row}"
        )
    return Call(*map(float, row))

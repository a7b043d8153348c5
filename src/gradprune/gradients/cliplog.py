"""How often and how hard did clipping engage (chapter 2)?"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple


class Call(NamedTuple):
    """What one call of a clip did; the fields are those of the log's lists."""

    size: float
    bound: float
    factor: float
    share: float


class ClipLog:
    """How often and how hard did clipping engage? Pass one as ``log=`` to a clip, call after call, and plot its lists.

    Counted over all calls: `calls`; `engaged`, those in which something was scaled down or skipped; `skipped`, those in
    which "skip" set everything to zero; and `nonfinite`, how often each parameter's gradient was not finite, by name.
    Kept of the last `window` calls, one list entry for each: `steps`, their numbers from 0; `sizes`, what was bounded,
    before (the norm; by value, the largest magnitude; adaptive, the largest norm of a unit's gradient over that of its
    weights); `bounds`, what it was bounded to; `factors`, the smallest factor that anything was scaled by (1 where
    nothing was, 0 where all was skipped); `shares`, how much was scaled (by norm, all or nothing; by value, of the
    entries; adaptive, of the units).

    A log is for one kind of clipping, since sizes of different kinds do not compare; it raises ValueError for a second
    kind, before anything is changed, and where window < 1. Chapter 2 reads one.
    """

    def __init__(self, window: int = 10_000) -> None:
        self.kind: str | None = None
        self.calls = self.engaged = self.skipped = 0
        self.nonfinite: dict[str, int] = {}
        self._rows: deque[Call] = deque(maxlen=checked_window(window))

    @property
    def steps(self) -> list[int]:
        """The numbers of the calls that are kept, from 0."""
        return list(range(self.calls - len(self._rows), self.calls))

    @property
    def sizes(self) -> list[float]:
        """What was bounded, before it was."""
        return [row.size for row in self._rows]

    @property
    def bounds(self) -> list[float]:
        """What it was bounded to."""
        return [row.bound for row in self._rows]

    @property
    def factors(self) -> list[float]:
        """The smallest factor that anything was scaled by."""
        return [row.factor for row in self._rows]

    @property
    def shares(self) -> list[float]:
        """How much was scaled, 0 to 1."""
        return [row.share for row in self._rows]

    @property
    def rate(self) -> float:
        """The share of all calls in which clipping engaged; 0.0 before the first."""
        return self.engaged / self.calls if self.calls else 0.0

    def _require_kind(self, kind: str) -> None:
        if self.kind not in (None, kind):
            raise ValueError(f"this log is of clipping by {self.kind}; clipping by {kind} needs one of its own")

    def _note(self, kind: str, row: Call, *, skipped: bool) -> None:
        self.kind = kind
        self.calls += 1
        self.engaged += row.share > 0
        self.skipped += skipped
        self._rows.append(row)

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

        Raises ValueError, before anything is changed, where it is not a state of this class.
        """
        require_keys(state, self.state_dict())
        window, rows = checked_window(state["window"]), [Call(*row) for row in state["rows"]]
        if len(rows) > min(window, state["calls"]):
            raise ValueError(f"the state keeps {len(rows)} calls, of {state['calls']} and at most {window}")
        self.kind, self.nonfinite = state["kind"], dict(state["nonfinite"])
        self.calls, self.engaged, self.skipped = state["calls"], state["engaged"], state["skipped"]
        self._rows = deque(rows, maxlen=window)


def checked_window(value: int | None) -> int:
    """Return a window's length, or raise ValueError."""
    if value is None or value != int(value) or value < 1:
        raise ValueError(f"window must be a whole number of at least 1, not {value}")
    return int(value)


def require_keys(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where a state lacks one of the wanted keys."""
    if missing := wanted.keys() - state.keys():
        raise ValueError(f"the state lacks {', '.join(map(repr, sorted(missing)))}: it is not one of this class")

"""What did a pruning event change, and how is that kept in a state (chapter 5)?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gradprune.core.checks import state


class Event(NamedTuple):
    """What one pruning event changed: how many weights of each parameter went, and how many came back."""

    step: int
    amount: float
    removed: dict[str, int]
    regrown: dict[str, int]


def written(events: Iterable[Event]) -> str:
    """Return events as JSON: a list would be saved in pieces."""
    return json.dumps([event._asdict() for event in events])


def read(events: str | list[Any]) -> list[Event]:
    """Return the events of a state, or raise TypeError or ValueError where they are none."""
    return [_event(entry) for entry in _listed(events)]


def _listed(events: str | list[Any]) -> list[Any]:
    """The events of a state, which are a list in those saved by earlier versions."""
    try:
        found = json.loads(events) if isinstance(events, str) else events
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise ValueError(f"'events' in the state of Pruner must be a list in JSON, got {events!r:.60}")
    return found


def _event(entry: Any) -> Event:
    wanted: dict[str, Any] = {"step": int, "amount": (int, float), "removed": Mapping, "regrown": Mapping}
    state(entry, wanted, "an event of a Pruner")
    return Event(**{name: entry[name] for name in Event._fields})

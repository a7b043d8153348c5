"""How far has a long call come? A bar where tqdm is installed, in a terminal or a notebook."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from typing import Any


class _NoBar:
    """Where tqdm is not installed."""

    def update(self, n: int = 1) -> None:
        """Count nothing."""

    def set_description(self, desc: str) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Nothing is open."""


def is_off() -> bool:
    """Whether tqdm's own variable TQDM_DISABLE turns bars off."""
    return bool(os.environ.get("TQDM_DISABLE"))


def over(steps: range, description: str, done: int = 0) -> Iterable[int]:
    """Return the steps that are left, under a bar."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return steps[done:]
    disable = True if is_off() else None
    return tqdm(steps[done:], desc=description, initial=done, total=len(steps), disable=disable)  # type: ignore[no-any-return]


def bar(total: int | None, description: str, done: int = 0, *, unit: str = "it") -> contextlib.closing[Any]:
    """Return a context that gives a bar of `total`, of which `done` are done; the unit "B" is scaled to kB, MB."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return contextlib.closing(_NoBar())
    disable = True if is_off() else None
    shown = {"unit": unit, "unit_scale": unit == "B"}
    return contextlib.closing(tqdm(total=total, desc=description, initial=done, disable=disable, **shown))


def state(line: str) -> None:
    """Say beforehand what a call will cost, where bars go too: on standard error."""
    if not is_off():
        print(line, file=sys.stderr, flush=True)

"""How an argument is refused."""

from __future__ import annotations


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless the condition holds."""
    if not holds:
        raise ValueError(message)

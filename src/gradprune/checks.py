"""How an argument is refused."""

from __future__ import annotations


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless the condition holds."""
    if not holds:
        raise ValueError(message)


def require_fraction(name: str, value: float) -> None:
    """Raise ValueError unless the value is between 0 and 1."""
    require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")

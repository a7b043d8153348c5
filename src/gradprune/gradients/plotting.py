"""On what are the pictures of this package drawn? On a matplotlib figure of their own, which no window shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(height: float) -> Figure:
    """Return an empty figure of the width of a text, `height` inches high; raise ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(6.4, height), layout="constrained")

"""Networks that live in the page: the reader prunes and trains them in the browser, with no kernel and no network."""

from gradprune.lab.live.budget import Budget
from gradprune.lab.live.clip import Clip
from gradprune.lab.live.depth import Depth
from gradprune.lab.live.figure import Live, Still
from gradprune.lab.live.kinds import Kinds
from gradprune.lab.live.prune import Prune
from gradprune.lab.live.retrain import Retrain
from gradprune.lab.live.speed import Speed
from gradprune.lab.live.start import Start
from gradprune.lab.live.threshold import Threshold
from gradprune.lab.live.workers import Workers

__all__ = [
    "Budget",
    "Clip",
    "Depth",
    "Kinds",
    "Live",
    "Prune",
    "Retrain",
    "Speed",
    "Start",
    "Still",
    "Threshold",
    "Workers",
    "figure",
]

_FIGURES: dict[str, type[Live]] = {
    "budget": Budget,
    "clip": Clip,
    "depth": Depth,
    "kinds": Kinds,
    "prune": Prune,
    "retrain": Retrain,
    "speed": Speed,
    "start": Start,
    "threshold": Threshold,
    "workers": Workers,
}


def figure(name: str) -> Live:
    """Return the live figure `name`, as a page of text asks for it.

    Raises ValueError for an unknown name.
    """
    if name not in _FIGURES:
        raise ValueError(f"unknown live figure {name!r}; known are {', '.join(map(repr, _FIGURES))}")
    return _FIGURES[name]()

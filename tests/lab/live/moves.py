"""What does a reader do to a live figure, whichever it is, and what does it then say was chosen?"""

import re
from typing import Any

import traitlets
from playwright.sync_api import Locator

from gradprune.lab.live import _FIGURES, Live

PASSING = ("frame", "step", "drawn", "running")  # facts about the drawing, not about what is drawn
MOVING = [name for name, figure in _FIGURES.items() if str(figure._esm).count("animator(") > 1]


def chosen(name: str, facts: dict[str, str]) -> dict[str, Any]:
    """Return what the reader chose, of what the figure `name` says: the traits that its Python object takes."""
    read = {traitlets.Float: float, traitlets.Int: int, traitlets.Bool: "true".__eq__}
    said = {re.sub("[A-Z]", lambda capital: f"_{capital[0].lower()}", fact): value for fact, value in facts.items()}
    return {
        trait: next((how for of, how in read.items() if isinstance(kind, of)), str)(said[trait])
        for trait, kind in _FIGURES[name].class_traits(sync=True).items()
        if trait in said and trait not in Live.class_trait_names()
    }


def shown(facts: dict[str, str]) -> dict[str, str]:
    """Return what a figure says without what changes from drawing to drawing."""
    return {fact: value for fact, value in facts.items() if fact not in PASSING}


def slide(slider: Locator, share: float) -> None:
    """Move a slider, as a reader's hand does, to a share of its range."""
    to = "(input, share) => { input.value = Number(input.min) + share * (input.max - input.min);"
    slider.evaluate(f"{to} input.dispatchEvent(new Event('input', {{ bubbles: true }})); }}", share)


def go(root: Locator) -> Locator:
    """Return the button that sets a figure going: the one beside Reset."""
    return root.locator(".gp-live-controls button", has_not_text="Reset").first


def reset(root: Locator) -> Locator:
    """Return the button that restores the start."""
    return root.get_by_role("button", name="Reset")

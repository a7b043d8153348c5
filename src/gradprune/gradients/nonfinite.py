"""What becomes of a gradient that is not finite?"""

from __future__ import annotations

from typing import Any, Literal, get_args

from gradprune.core.checks import choice, warn

NonFinite = Literal["raise", "zero", "skip", "leave"]
"""Of a gradient with an entry that is NaN or infinite:

"raise" changes nothing and raises ValueError; "zero" sets that whole gradient to zero and goes on with the others;
"skip" sets all gradients to zero; "leave" changes nothing and says nothing, for a gradient scaler that skips the step.
"""


def known(value: Any) -> NonFinite:
    """Return the choice, or raise ValueError where it is none."""
    return choice("nonfinite", value, get_args(NonFinite))


def warn_of_zeroed(name: str, chosen: NonFinite, remedy: str) -> None:
    """Warn that a gradient, or all of them, were set to zero."""
    what = "it was" if chosen == "zero" else "all gradients were"
    warn(f"the gradient of {name!r} is not finite; {what} set to zero. {remedy}", RuntimeWarning)

"""How does a reader change a number or a choice and see what happens, in a page with no kernel behind it?"""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
from matplotlib.figure import Figure

from gradprune.lab import figures

Draw = Callable[..., tuple[Figure, str]]
IN_A_LINE = 60  # letters of radio buttons


class Explorer:
    """Pictures of one drawing at every value of one or two controls; displays as the controls over the picture.

    Every picture is drawn beforehand, and the link from control to picture runs in the browser, so that the same object
    works in a notebook and in a static page. Where widgets are not shown, the picture in the middle is: as a PNG in a
    notebook, and with its words in the built page, which puts them where no scripts run.
    """

    def __init__(
        self,
        widget: widgets.Widget,
        words: dict[tuple[Any, ...], str],
        names: list[str],
        middle: bytes,
        alt: str,
        frame: str,
    ) -> None:
        self.widget = widget
        self.words = words
        self.names = names
        self._middle = middle
        self._alt = alt
        self._frame = frame

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
        bundle = self.widget._repr_mimebundle_() or {}
        lines = [f"{', '.join(self.names)} = {', '.join(map(str, key))}: {text}" for key, text in self.words.items()]
        bundle["text/plain"] = "\n".join(lines)
        bundle["image/png"] = base64.b64encode(self._middle).decode()
        if figures.for_page():
            bundle["text/html"] = self._frame
        return dict(bundle), {"image/png": {"alt": self._alt}}


def explore(draw: Draw, **sliders: Sequence[Any]) -> Explorer:
    """Draw a picture at each value of one control, or of each pair of values of two, and return them under controls.

    `draw(name=value)` returns a figure and one sentence of what it shows there, which stands beside the control in
    words and is the picture's alternative text. Each keyword of `explore` is a control: its name (underscores become
    spaces) and its values in order. Numbers are on a slider; words are radio buttons, or a list to choose from where
    they do not fit in a line. A control starts in its middle.

    Raises ValueError where there is no slider, there are more than two, or one has no values or one of them twice,
    TypeError where the values are not a sequence, and RuntimeError where `draw` fails or returns something else, naming
    the values at which it did.

    Example: ``explore(draw, threshold=[0.0, 0.1, 0.2])`` (every chapter has one).
    """
    _check(sliders)
    names = list(sliders)
    frames: dict[tuple[Any, ...], widgets.HTML] = {}
    words: dict[tuple[Any, ...], str] = {}
    middle_key = tuple(values[len(values) // 2] for values in sliders.values())
    middle = b""
    for key in itertools.product(*sliders.values()):
        try:
            figure, text = draw(**dict(zip(names, key, strict=True)))
            if not isinstance(figure, Figure):
                raise TypeError(f"draw returns a figure and a sentence, not {figure!r}")
            frame = _frame(figure, text, _setting(names, key))
        except Exception as error:
            raise RuntimeError(f"drawing the picture for {_setting(names, key)} failed: {error}") from error
        words[key] = text
        frames[key] = widgets.HTML(frame)
        if key == middle_key:
            middle = figures.to_png(figure)
    controls = [_control(name, values) for name, values in sliders.items()]
    pictures = _stacks(frames, list(sliders.values()), controls)
    box = widgets.VBox([*controls, pictures])
    box.add_class("gp-explore")
    return Explorer(box, words, [_label(name) for name in names], middle, words[middle_key], frames[middle_key].value)


def _check(sliders: dict[str, Sequence[Any]]) -> None:
    if not 1 <= len(sliders) <= 2:
        raise ValueError(f"explore wants one or two sliders, each a keyword with its values; {len(sliders)} given")
    for name, values in sliders.items():
        try:
            count, distinct = len(values), len(set(values))
        except TypeError as error:
            raise TypeError(f"slider {name!r} wants a list of numbers or words, not {values!r}") from error
        if count == 0:
            raise ValueError(f"slider {name!r} has no values to show")
        if distinct < count:
            raise ValueError(f"slider {name!r} has a value twice: {list(values)}")


def _control(name: str, values: Sequence[Any]) -> widgets.Widget:
    """Return the control whose place among `values` is its `value` (a slider) or its `index` (a choice)."""
    common = {"description": _label(name), "disabled": len(values) == 1, "style": {"description_width": "initial"}}
    if not any(isinstance(value, str) for value in values):
        last = max(len(values) - 1, 1)  # a range of nothing is an error in the page
        layout = {"width": "auto", "max_width": "34rem"}
        return widgets.IntSlider(len(values) // 2, 0, last, readout=False, layout=layout, **common)
    words = [str(value) for value in values]
    choice = {"options": words, "index": len(words) // 2, "layout": {"width": "auto"}, **common}
    if sum(map(len, words)) <= IN_A_LINE:
        return widgets.RadioButtons(orientation="horizontal", **choice)
    return widgets.Dropdown(**choice)


def _stacks(
    frames: dict[tuple[Any, ...], widgets.HTML], values: list[Sequence[Any]], controls: list[widgets.Widget]
) -> widgets.Stack:
    """One stack for one control; for two, a stack of stacks, the inner ones all linked to the second control."""
    control, rest = controls[0], controls[1:]
    place = "value" if isinstance(control, widgets.IntSlider) else "index"
    start = getattr(control, place)
    if not rest:
        stack = widgets.Stack([frames[(value,)] for value in values[0]], selected_index=start)
    else:
        rows = [{key[1:]: frame for key, frame in frames.items() if key[0] == value} for value in values[0]]
        stack = widgets.Stack([_stacks(row, values[1:], rest) for row in rows], selected_index=start)
    widgets.jslink((control, place), (stack, "selected_index"))
    return stack


def _frame(figure: Figure, text: str, setting: str) -> str:
    words = f'<p class="gp-words"><strong>{html.escape(setting)}</strong> {html.escape(text)}</p>'
    return f'<div class="gp-frame" data-setting="{html.escape(setting)}">{words}{figures.to_svg(figure, text)}</div>'


def _setting(names: list[str], key: tuple[Any, ...]) -> str:
    return ", ".join(f"{_label(name)} {value}" for name, value in zip(names, key, strict=True))


def _label(name: str) -> str:
    return name.replace("_", " ")

"""How does every figure of the book look, and what does it say to a reader who cannot see it?

Two outputs from one drawing. In a notebook a figure is a PNG on white. In the built page (`GRADPRUNE_FIGURES=svg`) it
is an inline SVG whose ink is the page's own text colour, so that it is legible on light and on dark. Both carry the
same alternative text.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import count
from numbers import Integral, Real
from typing import Any, TypeVar

import matplotlib as mpl
from cycler import cycler
from IPython.display import display
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

# One colour, one meaning, in every chapter. Each has a contrast of at least 3 to 1 against white and against the dark
# page.
COLOURS = {
    "dense": "#0077bb",
    "pruned": "#cc5500",
    "corrected": "#00875f",
    "learned": "#8265d6",
    "random": "#808080",
    "largest": "#b0488c",
    "predicted": "#808080",
    "printed": "#b0488c",
    "sigmoid": "#cc5500",
    "tanh": "#0077bb",
    "relu": "#00875f",
    "gelu": "#b0488c",
    "linear": "#808080",
    "unclipped": "#cc5500",
    "clipped": "#0077bb",
    "percentile": "#00875f",
}
PAGE_BACKGROUNDS = ("#ffffff", "#121212")  # of the theme, light and dark
INK = "#010203"  # stands for the page's text colour until the SVG is written
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}(?!\d*e)")
_serial = count()
Kind = TypeVar("Kind", bound=Artist)

_STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=["#0077bb", "#cc5500", "#00875f", "#b0488c", "#808080"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlecolor": INK,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "grid.alpha": 0.18,
    "grid.color": INK,
    "boxplot.boxprops.color": INK,
    "boxplot.capprops.color": INK,
    "boxplot.flierprops.color": INK,
    "boxplot.flierprops.markeredgecolor": INK,
    "boxplot.whiskerprops.color": INK,
    "hatch.color": INK,
    "patch.edgecolor": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "gradprune",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def new(width: float = 5.6, height: float = 3.2, *, columns: int = 1, **subplot_options: Any) -> tuple[Figure, Any]:
    """Return a figure in the book's style and its axes (an array of them where `columns` > 1). Sizes are in inches.

    As wide as the text; the narrower it is, the larger is its writing where a page is narrow.

    Never touches pyplot, so that nothing is shown twice and nothing is left open.
    """
    mpl.rcParams.update(_STYLE)  # not only here: what is added to the axes later takes its ink from it too
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, **subplot_options)


def legend(axes: Any, columns: int = 3) -> None:
    """Put the legend under the axes, which keep the figure's width, so that it can be read where a page is narrow.

    The figure grows by the legend's lines. For a figure of :func:`new` with one pair of axes.
    """
    drawn, names = axes.get_legend_handles_labels()
    axes.figure.legend(drawn, names, loc="outside lower center", ncols=columns)
    width, height = axes.figure.get_size_inches()
    axes.figure.set_size_inches(width, height + 0.2 * math.ceil(len(names) / columns))


def to_svg(figure: Figure, alt: str, *, prefix: str | None = None) -> str:
    """Return `figure` as `<figure role="img">` around an inline SVG in the page's ink.

    `prefix` starts the ids inside the SVG; left out, it is one that no other figure of this process has.

    Raises ValueError where a title, a label or the legend is wider than the figure.
    """
    _require_alt(alt)
    written = _write(figure, 72, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<style.*?</style>\s*", "", svg, flags=re.DOTALL)  # it would style every drawing of the page
    svg = svg.replace('aria-hidden="true">', 'aria-hidden="true" style="stroke-linejoin:round">', 1)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"<[^>]+>", lambda tag: _LONG_NUMBER.sub(_shorten, tag[0]), svg)  # not in the text between the tags
    svg = _leaner(svg)
    prefix = f"gp{next(_serial)}-" if prefix is None else prefix
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    return f'<figure role="img" class="gp-figure" aria-label="{html.escape(alt, quote=True)}">{svg}</figure>'


def _leaner(svg: str) -> str:
    """The same drawing without what only the program that drew it needs: a page has many."""
    for family in re.findall(r" (font-family: [^;\"]*);", svg)[:1]:
        svg = svg.replace(f" {family};", "")
        svg = svg.replace('linejoin:round"', f'linejoin:round; {family}"', 1)  # of the root: once for all texts
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # nothing refers to a group
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", svg)
    svg = re.sub(r"(?<=>)\s*\n\s*|\s*\n\s*(?=<)", "", svg)
    svg = re.sub(r' style="[^"]*"', lambda style: re.sub("([:;]) ", r"\1", style[0]), svg)
    svg = re.sub(r' d="[^"]*"', lambda path: " " + re.sub(r"\s+(?=[A-Za-z\"])", "", path[0][1:]), svg)
    svg = re.sub(r'<path d="M [\d. -]+"[^>]*/>', "", svg)  # of a line of one point, which is its marker alone
    kept: list[bool] = []

    def group(tag: re.Match[str]) -> str:
        if tag[0].endswith("/>"):
            return ""
        if tag[0] == "</g>":
            return tag[0] if kept.pop() else ""
        kept.append(tag[0] != "<g>")
        return tag[0] if kept[-1] else ""

    return re.sub(r"<g\b[^>]*>|</g>", group, svg)


def _shorten(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def to_png(figure: Figure) -> bytes:
    """Return `figure` as a PNG in black on white.

    Raises ValueError where a title, a label or the legend is wider than the figure.
    """
    return _write(figure, 110, format="png", facecolor="white", metadata={"Software": None})


def for_page() -> bool:
    """Whether the figures are for the built page, where they are inline SVG."""
    return os.environ.get("GRADPRUNE_FIGURES") == "svg"


def show(figure: Figure, *, alt: str) -> None:
    """Display `figure` with its alternative text `alt`, which says what the figure shows, not that it is one.

    Raises ValueError where `alt` is empty.
    """
    _require_alt(alt)
    if for_page():
        bundle = {"text/html": to_svg(figure, alt), "text/plain": alt}
        display(bundle, raw=True)
    else:
        png = base64.b64encode(to_png(figure)).decode()
        display({"image/png": png, "text/plain": alt}, metadata={"image/png": {"alt": alt}}, raw=True)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], *, digits: int = 2) -> None:
    """Print what a figure plots as aligned columns; floats have `digits` significant digits.

    The numbers under a figure are what a screen reader reads and what the tests compare, since pictures are not
    compared. In the built page they are an HTML table, whose cells break lines where the page is narrow.

    Raises ValueError where the header is empty and where a row is not as long as it.
    """
    if not header:
        raise ValueError("a table needs a header: the name of each column")
    lines = [[cell(value, digits) for value in row] for row in rows]
    for line in lines:
        if len(line) != len(header):
            raise ValueError(f"a row of {len(line)} cells under a header of {len(header)}: {line}")
    rows = [list(header), *lines]
    text = "\n".join(aligned(rows))
    if for_page():
        display({"text/html": html_table(rows), "text/plain": text}, raw=True)
    else:
        print(text)


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts as an HTML table; the first is its header, the first of each other names its row."""
    header, *body = rows
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in header)
    lines = (
        f'<tr><th scope="row">{html.escape(first)}</th>{"".join(f"<td>{html.escape(text)}</td>" for text in rest)}</tr>'
        for first, *rest in body
    )
    return f'<table class="gp-numbers"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of texts as lines of columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def cell(value: Any, digits: int = 2) -> str:
    """Return a value as a table shows it: a float with `digits` significant digits."""
    if isinstance(value, Real) and not isinstance(value, Integral | Fraction):  # NumPy's floats too
        return f"{float(value) + 0.0:.{digits}g}"  # adding 0 takes the sign off a zero
    return str(value)


def power_of_ten(value: float) -> str:
    """Write a number as in running text, with one digit: 0.00002 as "2·10⁻⁵", numbers from 0.1 to 100 as they are."""
    if value == 0 or 0.1 <= abs(value) < 100:
        return f"{value:.1g}" if abs(value) < 1 else f"{value:.0f}"
    digit, exponent = f"{value:.0e}".split("e")
    return f"{digit}·10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _write(figure: Figure, dpi: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.set_dpi(dpi)  # for good: what is measured afterwards was laid out at it
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, **options)
    _require_room(figure)
    return buffer.getvalue()


def _require_room(figure: Figure) -> None:
    """Of a figure that was just written, and so laid out."""
    named = {text.get_text() for legend in _drawn(figure, Legend) for text in legend.get_texts()}
    for axes in figure.axes:
        named |= {axes.get_title(loc="left"), axes.get_title(), axes.get_xlabel()}
    width, _ = figure.canvas.get_width_height()
    for text in _drawn(figure, Text):
        extent = text.get_window_extent()
        if text.get_text() in named - {""} and (extent.x0 < -1 or extent.x1 > width + 1):
            raise ValueError(f"the figure cuts {text.get_text()!r} off: shorten it, or give the legend fewer columns")


def _drawn(figure: Figure, kind: type[Kind]) -> list[Kind]:
    return [part for part in figure.findobj(kind) if isinstance(part, kind)]


def _require_alt(alt: str) -> None:
    if not alt.strip():
        raise ValueError("a figure needs alt text: one sentence that says what it shows")

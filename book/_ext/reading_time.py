"""How long does a page take to read, and its code to run? A line under the title of each notebook's page says so."""

from typing import Any

from bs4 import BeautifulSoup, Tag
from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx

# What a reader gets through in a minute, as readers of seven pages estimated it.
WORDS, CODE_LINES, OUTPUT_LINES, EQUATIONS = 130, 15, 30, 2
# To follow each step takes this many times as long: the median of the last sixteen readings of pages as they are, which
# were 1.4 to 2.6. Exercises come on top.
FOLLOWING = 2.0
NO_PROSE = "details, .cell, script, style, noscript, .math, table"


def minutes(body: str) -> float:
    """Return the minutes that the text, the code, the outputs and the displayed formulas of a page's HTML take.

    What is folded away does not count, nor do pictures and the tables between the cells.
    """
    page = BeautifulSoup(body, "html.parser")
    for folded in page.select("details:not([open])"):
        folded.decompose()
    for unscripted in page("noscript"):
        unscripted.decompose()
    code = sum(bool(line.strip()) for pre in page.select(".cell_input pre") for line in _lines(pre))
    output = sum(len(_lines(pre)) for pre in page.select(".cell_output pre"))
    output += len(page.select(".cell_output .gp-numbers tr"))
    equations = len(page.select("div.math"))
    for part in page.select(NO_PROSE):
        if not part.decomposed:
            part.decompose()
    words = len(page.get_text().split())
    return words / WORDS + code / CODE_LINES + output / OUTPUT_LINES + equations / EQUATIONS


def _lines(pre: Tag) -> list[str]:
    return pre.get_text().rstrip().split("\n")


def sentence(reading: float, running: float | None, *, exercises: bool = True) -> str:
    """Return the line under the title; `reading` in minutes, `running` in seconds, None where it is unknown.

    `exercises` says whether the page has some.
    """
    whole = max(1, round(reading))
    said = f"About {whole} minute{'s' if whole > 1 else ''} to read"
    said += f", {max(1, round(FOLLOWING * reading))} following each step"
    said += ", exercises on top" if exercises else ""
    if running is None:
        return f"{said}."
    if running < 50:
        return f"{said}; code runs in {max(10, round(running, -1)):.0f} s."
    return f"{said}; code runs in {max(1, round(running / 60))} min."


def print_times(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Write the times under the title of a page that was made from a notebook."""
    ran = NbMetadataCollector.get_exec_data(app.env, page)
    if ran and "body" in context:
        heading, end, rest = context["body"].partition("</h1>")
        line = sentence(minutes(context["body"]), ran["runtime"], exercises='id="exercises"' in context["body"])
        context["body"] = f'{heading}{end}\n<p class="gp-times">{line}</p>{rest}'


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("html-page-context", print_times)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

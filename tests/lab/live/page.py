"""A live figure on a page of its own, opened from disk by the widget manager that the book ships."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipywidgets.embed import dependency_state, embed_data
from playwright.sync_api import Browser, Locator
from vendor import VENDOR, vendor

from gradprune.lab.live import Live

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>a live figure</title>
<script src="{manager}"></script>
<script type="application/vnd.jupyter.widget-state+json">{state}</script>
<main><script type="application/vnd.jupyter.widget-view+json">{view}</script></main></html>"""
SLOW = 20_000  # milliseconds


def write_page(figure: Live, path: Path, *, manager: str = "") -> Path:
    """Write a page that shows `figure`, as the book does, and return its path.

    `manager` is where the page finds the widget manager; by default, where the book's build keeps it.
    """
    vendor()
    data = embed_data(views=[figure], state=dependency_state([figure], drop_defaults=False))
    state, view = json.dumps(data["manager_state"]).replace("</", "<\\/"), json.dumps(data["view_specs"][0])
    manager = manager or (VENDOR / "widgets" / "embed.js").as_uri()
    path.write_text(PAGE.format(manager=manager, state=state, view=view))
    return path


@contextmanager
def opened(
    browser: Browser, path: Path, *, reduced_motion: str = "reduce", watch: str = "", **options: Any
) -> Iterator[Locator]:
    """Open a page without a network and give the root of its figure, drawn; a script's error is one of the test.

    `watch` is a script that runs before the page's own.
    """
    wrong: list[str] = []
    with browser.new_context(offline=True, reduced_motion=reduced_motion, **options) as context:
        page = context.new_page()
        page.add_init_script(watch)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        root = page.locator(".gp-live[data-drawn]")
        root.wait_for(timeout=SLOW)
        yield root
        assert wrong == []


def settled(root: Locator, change: Callable[[], object]) -> dict[str, str]:
    """Make a change, wait until the figure has drawn it, and return what it says in its data- attributes."""
    before = root.get_attribute("data-drawn")
    change()
    root.page.wait_for_function(
        "([root, before]) => root.dataset.drawn !== before && root.dataset.running !== 'true'",
        arg=[root.element_handle(), before],
        timeout=SLOW,
    )
    return facts(root)


def facts(root: Locator) -> dict[str, str]:
    """Return the data- attributes of a figure."""
    found: dict[str, str] = root.evaluate("(root) => ({ ...root.dataset })")
    return found


def heard(root: Locator, figure: Live) -> Live:
    """Give a figure what the page of `root` shows, as a kernel hears it, and return it."""
    bytes_of = "(view) => [...new Uint8Array(view.buffer, view.byteOffset, view.byteLength)]"
    every = "Object.entries(root.shown()).map(([name, of]) => [name, of instanceof DataView ? bytesOf(of) : of])"
    shown = root.evaluate(f"(root) => {{ const bytesOf = {bytes_of}; return Object.fromEntries({every}); }}")
    parts = {name: memoryview(bytes(of)) if isinstance(of, list) else of for name, of in shown.items()}
    figure.set_state({"_shown": parts})
    return figure


def words(root: Locator) -> str:
    """Return the sentence of a figure, its no-break spaces as plain ones."""
    return root.locator(".gp-live-words").inner_text().replace("\u00a0", " ")


def set_slider(root: Locator, label: str, value: float) -> dict[str, str]:
    """Move a slider, as a reader's hand does, and return what the figure then says."""
    slide = "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', { bubbles: true })); }"
    return settled(root, lambda: root.get_by_label(label).evaluate(slide, value))

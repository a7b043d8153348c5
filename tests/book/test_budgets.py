"""Is what a page measures what a reader sees, and is one that is over its budgets named? test_pages asks each page."""

import re
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from budgets import WINDOW, measures, over_budget
from playwright.sync_api import Browser, Page
from reading_time import minutes, sentence

from conftest import CHAPTERS, HTML, is_deeper, soup

STATED = re.compile(r"(\d+)\s*minute")


def stated(page: BeautifulSoup) -> list[int]:
    """Return the minutes of reading under the title, and all others that the page's first part names."""
    opening = page.select_one("main article section").find_all(["p", "li"], recursive=False)
    return [int(number) for part in opening for number in STATED.findall(part.get_text())[:1]]


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda path: path.stem)
def test_a_page_states_no_other_time(notebook: Path) -> None:
    page = soup(HTML / "chapters" / f"{notebook.stem}.html")
    assert len(stated(page)) == 1


# --- the measures themselves, on a page of which each is known ---

SMALL = """<!doctype html><style>* {{ margin: 0; padding: 0; line-height: 20px; font-size: 10px }}</style>
<main><article><section><h1>One title here</h1>
<p>{words}</p><div class="math">x</div>
<div class="cell"><div class="cell_input"><pre>{code}</pre></div>
<div class="cell_output"><pre>{output}</pre></div></div>
<details><summary>The answer</summary><p>{words}</p><div class="math">y</div>
<div class="cell"><div class="cell_input"><pre>{code}</pre></div>
<div class="cell_output"><pre>{output}</pre></div></div>
</details><div style="height: {gap}px"></div>
<div class="cell"><div class="cell_output">{figure}</div></div></section></article></main>"""
FIGURE = '<svg width="100" height="100"></svg>'


def small(*, words: int = 127, code: int = 15, output: int = 9, gap: int = 0, figure: str = FIGURE) -> str:
    lines = {"code": "\n\n".join(["pass"] * code), "output": "\n".join(["1"] * output)}
    return SMALL.format(words="word " * words, gap=gap, figure=figure, **lines)


@pytest.fixture
def window(browser: Browser):
    with browser.new_context(viewport=WINDOW) as context:
        yield context.new_page()


def test_what_is_folded_or_empty_takes_no_time_and_has_no_length(window: Page) -> None:
    window.set_content(small())
    found = measures(window)
    assert found["minutes"] == pytest.approx(130 / 130 + 15 / 15 + 9 / 30 + 1 / 2)
    assert (found["code lines"], found["longest cell"], found["longest table"]) == (15, 15, 9)


def test_the_build_takes_the_same_time_for_a_page_as_the_browser(window: Page) -> None:
    for page in (small(), small(words=1000, code=40, output=200)):
        window.set_content(page)
        assert minutes(page) == pytest.approx(measures(window)["minutes"])


@pytest.mark.parametrize(
    ("page", "over"),
    [
        (small(words=7000, code=0), {"minutes", "first figure"}),
        (small(words=0, output=0, code=0, gap=20_000), {"screens", "first figure"}),
        (small(words=0, code=13, output=0), {"code share"}),
        (small(code=160, gap=2000), {"code share", "code lines", "longest cell", "first figure"}),
        (small(code=21, gap=3000), {"longest cell", "first figure"}),
        (small(code=1, output=13, gap=100), {"longest table"}),
        (small(code=1, gap=300, figure=""), {"first figure"}),
        (small(gap=1000, code=1), {"first figure"}),
    ],
)
def test_each_budget_that_is_exceeded_is_named(window: Page, page: str, over: set[str]) -> None:
    window.set_content(page)
    assert {fault.split(":")[0] for fault in over_budget(measures(window), deeper=False)} == over


def test_an_empty_line_ends_a_table(window: Page) -> None:
    window.set_content(small(output=9).replace("1\n1\n1\n", "1\n1\n\n", 1))
    found = measures(window)
    assert found["longest table"] == 6
    assert found["minutes"] == pytest.approx(130 / 130 + 15 / 15 + 9 / 30 + 1 / 2)


def test_each_row_of_a_table_of_numbers_is_a_line(window: Page) -> None:
    page = small(output=2).replace(
        "<pre>1\n1</pre>", f"<table class='gp-numbers'>{'<tr><td>1</td></tr>' * 9}</table>", 1
    )
    window.set_content(page)
    found = measures(window)
    assert found["longest table"] == 9
    assert found["minutes"] == pytest.approx(130 / 130 + 15 / 15 + 9 / 30 + 1 / 2)
    assert minutes(page) == pytest.approx(found["minutes"])


def test_a_deeper_page_may_show_its_first_figure_half_a_screen_later(window: Page) -> None:
    window.set_content(small(gap=1000, code=1))
    assert over_budget(measures(window), deeper=True) == []
    assert [is_deeper(Path(f"{stem}.ipynb")) for stem in ("04b_one_weight", "04_magnitude_pruning")] == [True, False]


ON_TOP = "exercises on top"


@pytest.mark.parametrize(
    ("reading", "running", "said"),
    [
        (
            37.6,
            91.0,
            f"About 38 minutes to read, 75 following each step, {ON_TOP}; code runs in 2 min.",
        ),
        (
            0.2,
            3.0,
            f"About 1 minute to read, 1 following each step, {ON_TOP}; code runs in 10 s.",
        ),
        (
            20.0,
            62.0,
            f"About 20 minutes to read, 40 following each step, {ON_TOP}; code runs in 1 min.",
        ),
        (20.0, None, f"About 20 minutes to read, 40 following each step, {ON_TOP}."),
    ],
)
def test_the_line_under_a_title_says_both_times_where_both_are_known(
    reading: float, running: float | None, said: str
) -> None:
    assert sentence(reading, running) == said
    assert sentence(reading, running, exercises=False) == said.replace(f", {ON_TOP}", "")

"""Does a page keep its budgets: reading time, length, code, printed tables, and what is seen first?"""

import re
from pathlib import Path
from typing import Any

import pytest
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, Page
from reading_time import WORKING, minutes, sentence

from conftest import CHAPTERS, HTML, NOT_BUILT, is_deeper, soup

WINDOW = {"width": 1200, "height": 900}
AT_MOST = {
    "minutes": 45,
    "screens": 20,
    "code share": 0.25,
    "code lines": 150,
    "longest cell": 20,
    "longest table": 12,
}
FIRST_SEEN = {"main": 1.0, "deeper": 1.5}  # screens above the first live figure, picture or slider

# What a reader of the page sees: folded parts are not there, and an empty line of code takes no time.
MEASURES = r"""() => {
  const all = (selector) => [...document.querySelectorAll('main ' + selector)];
  const seen = (e) => e.getBoundingClientRect().height > 0 && !e.closest('details:not([open])');
  const lines = (pre) => pre.innerText.trimEnd().split('\n');
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const cells = all('.cell_input').filter(seen);
  const code = cells.map((e) => [...e.querySelectorAll('pre')].flatMap(lines).filter((l) => l.trim()).length);
  const outputs = all('.cell_output pre').filter(seen);
  const rows = all('.cell_output .gp-numbers').filter(seen).map((table) => table.rows.length);
  const printed = [...outputs.map((pre) => lines(pre).length), ...rows];
  // An empty line ends a table.
  const blocks = outputs.flatMap((pre) => pre.innerText.trim().split(/\n\s*\n/)).map((t) => t.split('\n').length);
  const tables = [...blocks, ...rows];
  const prose = document.querySelector('main article').cloneNode(true);
  prose.querySelectorAll('details, .cell, script, style, .math, mjx-container, table').forEach((e) => e.remove());
  const words = prose.textContent.split(/\s+/).filter(Boolean).length;
  const equations = all('div.math').filter(seen).length;
  const figures = all('.cell_output svg, .cell_output img, .cell_output .gp-live, .jupyter-widgets').filter(seen);
  const tops = figures.map((e) => e.getBoundingClientRect().top + scrollY).filter((top) => top > 0);
  const first = Math.min(...tops);
  const height = document.documentElement.scrollHeight;
  return {
    'minutes': words / 130 + sum(code) / 15 + sum(printed) / 30 + equations / 2,
    'screens': height / innerHeight,
    'code share': sum(cells.map((e) => e.getBoundingClientRect().height)) / height,
    'code lines': sum(code),
    'longest cell': Math.max(0, ...code),
    'longest table': Math.max(0, ...tables),
    'first figure': tops.length ? first / innerHeight : null,
  };
}"""

STATED = re.compile(r"(\d+)\s*minute")


def measures(page: Page) -> dict[str, float | None]:
    return page.evaluate(MEASURES)


def over_budget(found: dict[str, float | None], *, deeper: bool) -> list[str]:
    faults = [f"{name}: {found[name]:.3g}, at most {limit}" for name, limit in AT_MOST.items() if found[name] > limit]
    limit = FIRST_SEEN["deeper" if deeper else "main"]
    if found["first figure"] is None:
        faults.append("first figure: there is none")
    elif found["first figure"] > limit:
        faults.append(f"first figure: {found['first figure']:.3g} screens down, at most {limit}")
    return faults


def stated(page: BeautifulSoup) -> list[int]:
    """Return the minutes of reading under the title, and all others that the page's first part names."""
    opening = page.select_one("main article section").find_all(["p", "li"], recursive=False)
    return [int(number) for part in opening for number in STATED.findall(part.get_text())[:1]]


@pytest.fixture(scope="module")
def read(browser: Browser) -> dict[str, dict[str, Any]]:
    """What each chapter's page measures, as a reader's window shows it."""
    found = {}
    with browser.new_context(offline=True, viewport=WINDOW, reduced_motion="reduce") as context:
        for path in (HTML / "chapters" / f"{notebook.stem}.html" for notebook in CHAPTERS):
            if not path.exists():
                pytest.fail(NOT_BUILT)
            page = context.new_page()
            page.goto(path.as_uri())
            page.wait_for_load_state("load")
            page.evaluate("async () => document.querySelector('.math') && await window.MathJax.startup.promise")
            page.wait_for_function(
                "() => [...document.querySelectorAll('main .gp-live')].every((e) => 'drawn' in e.dataset)"
            )
            found[path.stem] = measures(page)
            page.close()
    return found


every_chapter = pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda path: path.stem)


@every_chapter
def test_a_page_keeps_its_budgets(read: dict[str, dict[str, Any]], notebook: Path) -> None:
    assert over_budget(read[notebook.stem], deeper=is_deeper(notebook)) == []


@every_chapter
def test_the_reading_time_under_the_title_is_what_the_page_takes(
    read: dict[str, dict[str, Any]], notebook: Path
) -> None:
    (line,) = soup(HTML / "chapters" / f"{notebook.stem}.html").select("h1 + .gp-times")
    printed = int(STATED.search(line.get_text())[1])
    takes = read[notebook.stem]["minutes"]
    assert abs(printed - takes) <= max(1, 0.1 * takes)


@every_chapter
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
        (small(code=1, output=13, gap=300), {"longest table"}),
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


@pytest.mark.parametrize(
    ("reading", "running", "said"),
    [
        (37.6, 91.0, f"Reading takes about 38 minutes, {WORKING}; all code on the page runs in about 2 minutes."),
        (0.2, 3.0, f"Reading takes about 1 minute, {WORKING}; all code on the page runs in about 10 seconds."),
        (20.0, 62.0, f"Reading takes about 20 minutes, {WORKING}; all code on the page runs in about 1 minute."),
        (20.0, None, f"Reading takes about 20 minutes, {WORKING}."),
    ],
)
def test_the_line_under_a_title_says_both_times_where_both_are_known(
    reading: float, running: float | None, said: str
) -> None:
    assert sentence(reading, running) == said

"""Does every page work for every reader: opened from disk with no network, in light and dark, on a phone, by keyboard?

Each page is opened once and looked at by all tests; the switch to dark happens in the open page, as the reader's does.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from budgets import measures, over_budget
from playwright.sync_api import Browser, Locator, Page, expect
from window import LOCAL, WINDOW, Found, Window

from conftest import CHAPTERS, HTML, NOT_BUILT, built_pages, is_deeper, page_name, soup
from gradprune.lab import claims

STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
COLOUR_RULES = ["color-contrast", "link-in-text-block"]  # in the dark theme only these can differ
NARROW = {"width": 400, "height": 800}
SECONDS = 90  # for what is asked of one page
VERDICTS = r"<table[^>]*\bgp-verdicts\b"
TYPED_FORMULA = r"\\[(\[].{0,40}|\$\$.{0,40}|\$[^$\s\d][^$\n]{0,60}\$|\$\d[^$\n]{0,60}[\\^_{][^$\n]{0,60}\$"

# Formulas typeset, every live figure drawn, every slider drawn and named.
READY = """async (sliders) => {
  if (document.querySelector('.math')) await window.MathJax.startup.promise;
  return document.querySelectorAll('.gp-explore, .gp-live[data-drawn]').length >= sliders
    && [...document.querySelectorAll('.gp-explore')].every((box) =>
      box.querySelector('.gp-frame') && box.querySelector('[role=slider][aria-valuetext], [role=radiogroup], select'));
}"""

# The text a reader sees that is neither code nor typeset.
PROSE = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const parts = [];
  while (walker.nextNode()) {
    const inside = walker.currentNode.parentElement.closest('code, pre, script, style, noscript, mjx-container, kbd');
    if (!inside) parts.push(walker.currentNode.data);
  }
  return parts.join('\\n');
}"""

# What stands out of the window and does not scroll by itself.
TOO_WIDE = """() => {
  const scrolls = (element) => ['auto', 'scroll', 'hidden', 'clip'].includes(getComputedStyle(element).overflowX);
  const contained = (element) => {
    for (let up = element.parentElement; up && up !== document.body; up = up.parentElement)
      if (scrolls(up) && up.getBoundingClientRect().right <= innerWidth + 1) return true;
    return false;
  };
  return [...document.querySelectorAll('.bd-article-container *, main footer *')]
    .filter((e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true }))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !contained(e))
    .map((e) => e.outerHTML.slice(0, 120));
}"""

# The formulas of which a part can neither be seen nor scrolled to.
CUT_OFF = """() => [...document.querySelectorAll('div.math')].filter((formula) => {
  let { left, right } = formula.querySelector('mjx-container > svg').getBoundingClientRect();
  for (let up = formula.querySelector('mjx-container'); up !== document.body; up = up.parentElement) {
    const box = up.getBoundingClientRect();
    const { overflowX } = getComputedStyle(up);
    if (overflowX !== 'visible' && left < box.left - 1) return true; // what starts at the left, no box scrolls to
    if (['hidden', 'clip'].includes(overflowX) && box.right + 1 < right) return true;
    if (['auto', 'scroll'].includes(overflowX)) [left, right] = [Math.max(left, box.left), Math.min(right, box.right)];
  }
  return false;
}).map((formula) => formula.querySelector('mjx-assistive-mml').textContent.trim().slice(0, 60))"""

# Of the words that look the same, on the same colour, one is measured: a page has thousands of words of few looks, and
# most of them another page has too. Marks the first of each look that is not known yet, and returns those looks.
MARK_LOOKS = """(known) => {
  const seen = new Set(known);
  const transparent = (colour) => /, 0\\)$|^transparent$/.test(colour);
  for (const word of document.querySelectorAll('body *')) {
    if (![...word.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim())) continue;
    const own = getComputedStyle(word), around = getComputedStyle(word.parentElement);
    const look = [word.tagName === 'A', own.color, own.fontSize, own.fontWeight, own.textDecorationLine, own.textShadow,
      around.color, around.fontWeight];
    for (let up = word; up; up = up.parentElement) {
      const { opacity, backgroundColor, backgroundImage, position, filter } = getComputedStyle(up);
      look.push(opacity, filter, backgroundImage, position === 'static' || position === 'relative' ? '' : position);
      if (!transparent(backgroundColor)) look.push(backgroundColor);
    }
    const key = look.filter((part) => !['', '1', 'none'].includes(part)).join();
    word.dataset.look = seen.has(key) ? 'repeated' : 'first';
    seen.add(key);
  }
  return [...seen].slice(known.length);
}"""
ONE_OF_EACH_LOOK = "[data-look=repeated] { visibility: hidden; } [data-look=first] { visibility: visible; }"

# The contrast of a slider's handle and track with the page, by the formula of WCAG.
CONTRASTS = """(explorer) => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const page = getComputedStyle(document.body).backgroundColor;
  const style = (selector) => getComputedStyle(explorer.querySelector(selector));
  return {
    handle: contrast(style('[role=slider]').borderTopColor, page),
    track: contrast(style('.noUi-connects').backgroundColor, page),
  };
}"""

# The contrast of each sign with its square, by the colour; where the square is empty, with the page.
SIGNS = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = getComputedStyle(document.body).backgroundColor;
  return Object.fromEntries([...document.querySelectorAll('.gp-square')].map((square) => {
    const { color, backgroundColor } = getComputedStyle(square);
    const behind = backgroundColor === 'rgba(0, 0, 0, 0)' ? page : backgroundColor;
    const [low, high] = [luminance(color), luminance(behind)].sort((a, b) => a - b);
    return [`${square.tagName} ${square.className}`, (high + 0.05) / (low + 0.05)];
  }));
}"""

# What each part of the page is drawn in, once no colour fades any more.
COLOURS = """() => {
  document.getAnimations().forEach((fade) => fade.finish());
  const parts = ['body', 'main article *'].flatMap((of) => [...document.querySelectorAll(of)]);
  const keys = new Map(), firsts = new Map();  // of elements of one kind in places of one kind the first is looked at
  for (const e of parts) {
    const own = `${e.tagName} ${e.getAttribute('class')} ${e.getAttribute('style')} ${e.hidden}`;
    keys.set(e, `${keys.get(e.parentElement) ?? ''} > ${own}`);
    if (!firsts.has(keys.get(e)) && e.checkVisibility()) firsts.set(keys.get(e), e);
  }
  return [...firsts.values()].map((e) => {
    const { color, backgroundColor, fill, stroke, borderTopColor } = getComputedStyle(e);
    const name = `${e.tagName} ${e.className.baseVal ?? e.className}`;
    return [name, color, backgroundColor, fill, stroke, borderTopColor].join(' | ');
  });
}"""

# Empties the results and searches again.
SEARCH = """(words) => {
  document.getElementById('search-results').replaceChildren();
  Search.performSearch(words);
}"""

# Of each picture that is to be seen: the words beside it, what is drawn, and its smaller side.
VISIBLE_FRAMES = """(box) => (box.matches('.gp-still') ? [box] : [...box.querySelectorAll('.gp-frame')])
  .filter((frame) => frame.checkVisibility({ visibilityProperty: true }))
  .map((frame) => {
    const picture = frame.querySelector('figure[role=img] svg');
    const box = picture.getBoundingClientRect();
    return [frame.querySelector('.gp-words').innerText, picture.innerHTML, Math.min(box.width, box.height)];
  })"""

PICTURES_WITHOUT_WORDS = """() => {
  const fileName = /\\.(png|svg|jpe?g|gif|webp)$|^[0-9a-f_-]{8,}$/i;
  const wordless = (text) => !text?.trim() || fileName.test(text.trim());
  const name = (e) =>
    e.getAttribute('aria-label') ?? document.getElementById(e.getAttribute('aria-labelledby'))?.textContent;
  const described = (e) => e.closest('[aria-hidden=true], mjx-container, [role=img], button');
  return [
    ...[...document.images].filter((e) => wordless(e.alt)),
    ...[...document.querySelectorAll('[role=img]:not(mjx-container, mjx-container *)')]
      .filter((e) => wordless(name(e)) && !e.closest('[aria-hidden=true]')),
    ...[...document.querySelectorAll('main svg, main canvas')].filter((e) => !described(e)),
  ].map((e) => e.outerHTML.slice(0, 160));
}"""


@dataclass
class Visit:
    """An open page, what went wrong while it was, and what it measured before its folds were opened."""

    window: Window
    path: Path
    page: Page
    wrong: list[str] = field(default_factory=list)
    measured: dict[str, float | None] = field(default_factory=dict)

    def ask(self, work: Callable[[Page], Found]) -> Found:
        """What the work finds on the page, in a new browser where this one hangs."""
        found = self.window.within(SECONDS, lambda: work(self.page))
        if found is not None:
            return found
        self.page = _visit(self.window, self.path, "").page
        return work(self.page)


@pytest.fixture(scope="module")
def window(browser: Browser) -> Window:
    if not (HTML / "index.html").exists():
        pytest.fail(NOT_BUILT)
    return Window(browser)


def visit(window: Window, path: Path, query: str = "") -> Visit:
    """Open a page, note what goes wrong from the first byte on, wait until it is ready, unfold what is folded.

    Once more where Chromium, on a busy machine, hangs or fails to read a file that is there: a missing one is another
    error.
    """
    first = window.within(SECONDS, lambda: _visit(window, path, query))
    if first and not any("net::ERR_FAILED" in line for line in first.wrong):
        return first
    if first:
        first.page.close()
    return _visit(window, path, query)


def _visit(window: Window, path: Path, query: str) -> Visit:
    visit = Visit(window, path, window.new_page())
    note = visit.wrong.append
    page = visit.page
    page.on("request", lambda r: None if r.url.startswith(LOCAL) else note(f"asked another host for {r.url}"))
    page.on("requestfailed", lambda r: note(f"did not get {r.url}: {r.failure}"))
    page.on("pageerror", lambda error: note(f"script error: {error}"))
    page.on("console", lambda message: note(f"console: {message.text}") if message.type == "error" else None)
    page.goto(path.as_uri() + query)
    page.wait_for_function(READY, arg=widgets_in(path))
    visit.measured = measures(page) if path in chapters() else {}
    page.evaluate("document.querySelectorAll('main details').forEach((fold) => { fold.open = true; })")
    page.evaluate("document.querySelectorAll('main .toggle-hidden button').forEach((fold) => fold.click())")
    return visit


def widgets_in(path: Path) -> int:
    return path.read_text(encoding="utf-8").count('<script type="application/vnd.jupyter.widget-view+json">')


def pages_of_each_kind() -> list[Path]:
    """Every page, but of the listings of sources, made by one template, as many as have between them what all have."""
    listings = {path: set(re.findall(r' class="([^"]*)"', path.read_text(encoding="utf-8"))) for path in built_pages()
                if "_modules" in path.parts and path.exists()}  # fmt: skip
    chosen, seen = [], set()
    for path in sorted(listings, key=lambda path: (-len(listings[path]), path)):
        if listings[path] - seen:
            chosen.append(path)
            seen |= listings[path]
    return [path for path in built_pages() if path not in listings or path in chosen]


@pytest.fixture(scope="module", params=pages_of_each_kind(), ids=page_name)
def opened(window: Window, request: pytest.FixtureRequest) -> Iterator[Visit]:
    opened = visit(window, request.param)
    yield opened
    opened.page.close()


def test_every_request_is_answered_from_disk_and_no_script_fails(opened: Visit) -> None:
    assert opened.wrong == []


def test_a_chapter_keeps_its_budgets_and_states_its_reading_time_and_no_other_page_does(opened: Visit) -> None:
    lines = soup(opened.path).select("h1 + .gp-times")
    if opened.path not in chapters():
        assert lines == []
        return
    assert over_budget(opened.measured, deeper=is_deeper(opened.path)) == []
    (line,) = lines
    printed, takes = int(re.search(r"(\d+)\s*minute", line.get_text())[1]), opened.measured["minutes"]
    assert abs(printed - takes) <= max(1, 0.1 * takes)


def test_every_formula_is_typeset(opened: Visit) -> None:
    formulas = len(soup(opened.path).select("span.math, div.math"))
    typeset = opened.page.locator(".math mjx-container")
    assert typeset.count() >= formulas, "formulas of the source are missing from the page"
    assert opened.page.locator("[data-mml-node=merror], [data-mjx-error]").count() == 0, (
        "MathJax could not read a formula"
    )
    left = re.findall(TYPED_FORMULA, opened.page.evaluate(PROSE))
    assert left == [], "formulas left as they were typed"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_reports_nothing(opened: Visit, theme: str) -> None:
    assert opened.ask(lambda page: faults(page, theme)) == []


READABLE: dict[str, list[str]] = {"light": [], "dark": []}  # the looks of words in which axe has found no fault


def faults(page: Page, theme: str) -> list[str]:
    """What axe finds in a theme: by every rule in the light one, by those of colours in the dark one."""
    page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    page.wait_for_function("(theme) => document.documentElement.dataset.theme === theme", arg=theme)
    # A change of theme fades: what is measured is its end.
    page.evaluate("for (const a of document.getAnimations()) try { a.finish(); } catch {}")
    found = [] if theme == "dark" else violations(page, {"type": "tag", "values": STANDARDS}, but=COLOUR_RULES)
    new = page.evaluate(MARK_LOOKS, READABLE[theme])
    if new:
        style = page.add_style_tag(content=ONE_OF_EACH_LOOK)
        unreadable = violations(page, {"type": "rule", "values": COLOUR_RULES})
        style.evaluate("(style) => style.remove()")
        READABLE[theme] += [] if unreadable else new
        found += unreadable
    return found


def violations(page: Page, only: dict[str, object], but: Sequence[str] = ()) -> list[str]:
    """What axe finds by these rules, each fault with its place."""
    options = {
        "runOnly": only,
        "rules": {rule: {"enabled": False} for rule in but},
        "resultTypes": ["violations"],
        "preload": False,  # a file cannot read another
    }
    found = Axe().run(page, options=options).response["violations"]
    return [f"{f['id']}: {n['target']} {n['failureSummary']}" for f in found for n in f["nodes"]]


@pytest.mark.parametrize(
    ("faint", "found"),
    [
        ('<p>black <em style="color: #ccc">faint</em> black</p>', True),
        ('<p>black <em>black</em> black</p><div style="background: #222"><p>black on dark</p></div>', True),
        ('<p>black</p><p style="opacity: 0.3">thin</p>', True),
        ('<p>black</p><p style="font-size: 14px; color: #888">small</p>', True),
        ("<p>black</p><p>black</p><p style='color: #444'>dark enough</p>", False),
    ],
)
def test_one_word_of_each_look_is_enough_to_find_a_faint_one(window: Window, faint: str, found: bool) -> None:
    page = window.new_page()
    page.set_content(f'<html lang="en"><title>t</title><main><p>black</p>{"<p>black</p>" * 3}{faint}</main></html>')
    looks = page.evaluate(MARK_LOOKS, [])
    assert len(looks) == page.locator("[data-look=first]").count()
    assert page.evaluate("document.querySelectorAll('[data-look=repeated]').length") >= 3
    page.add_style_tag(content=ONE_OF_EACH_LOOK)
    assert bool(violations(page, {"type": "rule", "values": COLOUR_RULES})) is found
    assert page.evaluate(MARK_LOOKS, looks) == []
    assert page.locator("[data-look=first]").count() == 0
    page.close()


def test_nothing_scrolls_sideways_at_400_pixels(opened: Visit) -> None:
    opened.page.set_viewport_size(NARROW)
    try:
        assert opened.page.evaluate(TOO_WIDE) == [], "cut off at the right edge"
        width = opened.page.evaluate("document.documentElement.scrollWidth")
        assert width <= NARROW["width"], f"the page is {width} px wide"
    finally:
        opened.page.set_viewport_size(WINDOW)


@pytest.mark.parametrize("chapter", [path.stem for path in CHAPTERS if not is_deeper(path)])
def test_the_first_figure_of_a_chapter_begins_on_the_first_screen_of_a_phone(window: Window, chapter: str) -> None:
    path, page = HTML / "chapters" / f"{chapter}.html", window.new_page()
    page.set_viewport_size(NARROW)
    page.goto(path.as_uri())
    page.wait_for_function(READY, arg=widgets_in(path))
    top = page.locator(".gp-live, .gp-explore").first.bounding_box()["y"]
    page.close()
    assert top < NARROW["height"]


def test_a_formula_wider_than_a_narrow_page_scrolls(opened: Visit) -> None:
    opened.page.set_viewport_size({"width": 390, "height": 800})
    try:
        assert opened.page.evaluate(CUT_OFF) == [], "cut off at an edge"
    finally:
        opened.page.set_viewport_size(WINDOW)


def test_every_picture_has_words(opened: Visit) -> None:
    assert opened.page.evaluate(PICTURES_WITHOUT_WORDS) == []


def test_a_page_that_is_dark_on_the_screen_is_light_on_paper(opened: Visit) -> None:
    printed = {}
    try:
        for theme in ("light", "dark"):
            opened.page.emulate_media(media="screen", color_scheme=theme, reduced_motion="reduce")
            opened.page.wait_for_function("(theme) => document.documentElement.dataset.theme === theme", arg=theme)
            opened.page.emulate_media(media="print", color_scheme=theme, reduced_motion="reduce")
            printed[theme] = opened.page.evaluate(COLOURS)
    finally:
        opened.page.emulate_media(media="screen", color_scheme="light", reduced_motion="reduce")
    assert [pair for pair in zip(*printed.values(), strict=True) if len(set(pair)) > 1] == []
    assert "rgb(34, 40, 50) | rgb(255, 255, 255)" in printed["dark"][0], "the body is not dark ink on white"


def test_every_slider_changes_picture_and_words_by_keyboard(opened: Visit) -> None:
    explorers = opened.page.locator(".gp-explore").all()
    live = opened.page.locator(".gp-live").count()
    assert len(explorers) + live == widgets_in(opened.path), "not every slider of the source is on the page"
    for explorer in explorers:
        for handle in explorer.locator("[role=slider]").all():
            walk(explorer, handle)
        for choice in explorer.locator("[role=radiogroup], select").all():
            choose(explorer, choice)
    assert opened.wrong == []


def with_sliders() -> list[Path]:
    return [path for path in built_pages() if path.exists() and widgets_in(path)] or [HTML / "index.html"]


@pytest.mark.parametrize("path", with_sliders(), ids=page_name)
def test_where_no_script_runs_a_picture_and_its_words_stand_for_each_slider(window: Window, path: Path) -> None:
    without = {"offline": True, "viewport": WINDOW, "java_script_enabled": False, "color_scheme": "dark"}
    with window.running().new_context(**without) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('main details').forEach((fold) => { fold.open = true; })")
        explorers = page.locator("noscript :is(.gp-explore, .gp-still)").all()
        assert len(explorers) == widgets_in(path) > 0
        for explorer in explorers:
            ((words, picture, smaller_side),) = explorer.evaluate(VISIBLE_FRAMES)
            assert words
            assert picture
            assert smaller_side > 50
        light = "rgb(34, 40, 50) | rgb(255, 255, 255)"  # the ink of the figures, and nothing dark behind it
        assert light in page.evaluate(COLOURS)[0]


def test_the_statements_are_narrowed_down_by_document_kind_and_verdict(window: Window) -> None:
    seen = visit(window, HTML / "book" / "claims.html")
    form, rows = seen.page.locator("form.gp-filter"), seen.page.locator("table.gp-claims tbody tr:visible")
    everything = list(claims.all_claims().values())
    assert rows.count() == len(everything) == 86
    wanted = [claim.id for claim in everything if claim.document == 1 and claim.kind == "formula"]
    form.get_by_label("document").focus()
    seen.page.keyboard.press("ArrowDown")
    seen.page.keyboard.press("ArrowDown")
    form.get_by_label("kind").select_option("formula")
    assert [row.locator("td").first.inner_text() for row in rows.all()] == wanted
    assert form.locator("output").inner_text() == f"{len(wanted)} shown"
    form.get_by_label("verdict").select_option("open")
    assert all("open, chapter" in row.inner_text() for row in rows.all())
    assert seen.wrong == []
    seen.page.close()


def test_the_claims_page_opens_with_a_square_for_each_statement_that_leads_to_it(window: Window) -> None:
    page = soup(HTML / "book" / "claims.html")
    squares = page.select(".gp-squares a.gp-square")
    everything = claims.all_claims()
    assert [square["href"] for square in squares] == [f"#{claim.lower()}" for claim in everything]
    signs: dict[str, set[str]] = {}
    for square, claim in zip(squares, everything.values(), strict=True):
        row = page.find(id=claim.id.lower())
        verdict = plain(row.find_all("td")[-1].get_text(" ", strip=True))
        said = square["aria-label"].removesuffix(f": {claim.says}").removeprefix(f"{claim.id}, ")
        assert square["title"] == square["aria-label"] == f"{claim.id}, {said}: {claim.says}"
        assert verdict.startswith(plain(f"{square.get_text()} {said}"))
        signs.setdefault(square["class"][-1], set()).add(square.get_text())
    assert all(len(of_colour) == 1 for of_colour in signs.values())
    assert len(set.union(*signs.values())) == len(signs), "two colours share a sign"
    counts = [int(number) for number in re.findall(r"\((\d+)\)", page.select_one(".gp-squares figcaption").get_text())]
    assert sum(counts) == len(everything)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_sign_is_read_on_the_colour_behind_it(window: Window, theme: str) -> None:
    seen = visit(window, HTML / "book" / "claims.html")
    seen.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    seen.page.wait_for_function("(theme) => document.documentElement.dataset.theme === theme", arg=theme)
    found = seen.page.evaluate(SIGNS)
    assert len(found) > 5
    assert {name: round(contrast, 1) for name, contrast in found.items() if contrast < 4.5} == {}
    seen.page.close()


def plain(text: str) -> str:
    """Return a text on one line, its quotation marks and dashes as they are typed."""
    for typeset, typed in {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "--", "…": "..."}.items():
        text = text.replace(typeset, typed)
    return " ".join(text.split())


def closing_tables() -> list[Path]:
    return [path for path in built_pages() if path.exists() and re.search(VERDICTS, path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", closing_tables() or [HTML / "index.html"], ids=page_name)
def test_a_closing_table_has_every_statement_of_its_chapter_with_the_verdict_of_its_cell(path: Path) -> None:
    rows = soup(path).select("table.gp-verdicts tbody tr")
    wanted = [claim for claim in claims.all_claims().values() if claim.chapter == int(path.name[:2])]
    assert [row.find("strong").get_text() for row in rows] == [claim.id for claim in wanted]
    for row, claim in zip(rows, wanted, strict=True):
        said, verdict, line = row.find_all("td")
        assert claim.zh == said.select_one("q[lang=zh-Hans]").get_text()
        assert plain(claim.en) in plain(said.get_text())
        link = verdict.find("a")
        if link is None:
            assert "open" in verdict.get_text()
            continue
        target, _, anchor = link["href"].partition("#")
        cell = soup((path.parent / target).resolve() if target else path).find(id=anchor)
        cell = cell if cell.get_text() else cell.parent
        shown = f"Verdict on {claim.id}: {link.get_text()}. {line.get_text(strip=True)[:40]}"
        assert plain(shown) in plain(cell.get_text())
        assert re.search(r"\d", line.get_text())


def test_a_link_to_a_verdict_opens_what_its_cell_is_folded_in(window: Window) -> None:
    path = closing_tables()[0]
    page = window.new_page()
    page.goto(path.as_uri())
    link = page.locator("table.gp-verdicts strong a").first
    cell = page.locator(f"[id={(link.get_attribute('href') or '').partition('#')[2]}]")
    assert not cell.is_visible()
    page.locator("details.gp-fold > summary").press("Enter")
    link.press("Enter")
    cell.wait_for(state="visible")
    page.close()


def test_rows_are_cards_on_a_phone_and_a_table_elsewhere(window: Window) -> None:
    seen = visit(window, HTML / "book" / "claims.html")
    display = "(row) => getComputedStyle(row).display"
    row = seen.page.locator("table.gp-cards tbody tr").first
    assert row.evaluate(display) == "table-row"
    seen.page.set_viewport_size({"width": 390, "height": 800})
    assert row.evaluate(display) == "block"
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
    seen.page.close()


def test_a_verdict_links_to_the_cell_that_computed_it(window: Window) -> None:
    seen = visit(window, HTML / "book" / "claims.html")
    links = seen.page.locator("table.gp-claims strong a").all()
    assert links
    for link in links:
        claim = link.locator("xpath=ancestor::tr").locator("td").first.inner_text()
        path, _, anchor = (link.get_attribute("href") or "").partition("#")
        cell = soup(HTML / "book" / path).find(id=anchor)
        assert cell is not None
        cell = cell if cell.get_text() else cell.parent  # a cell's second verdict has an anchor before its text
        assert plain(f"Verdict on {claim}: {link.inner_text()[:20]}") in plain(cell.get_text())
    seen.page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_slider_is_seen_without_and_with_focus(window: Window, theme: str) -> None:
    seen = visit(window, HTML / "chapters" / "01b_how_fast.html")
    seen.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    seen.page.wait_for_function("(theme) => document.documentElement.dataset.theme === theme", arg=theme)
    explorer = seen.page.locator(".gp-explore").first
    handle = explorer.locator("[role=slider]").first
    contrasts = explorer.evaluate(CONTRASTS)
    assert [f"{part}: {contrast:.1f}" for part, contrast in contrasts.items() if contrast < 3] == []
    assert handle.bounding_box()["width"] >= 24
    outline = "(handle) => getComputedStyle(handle).outlineStyle"
    assert handle.evaluate(outline) == "none"
    handle.press("ArrowRight")
    assert handle.evaluate(outline) == "solid"
    seen.page.close()


def walk(explorer: Locator, handle: Locator) -> None:
    """Take one slider from its first to its last value by keys, and look at picture, words and announcement."""
    name = handle.get_attribute("aria-label")
    assert name, "a slider has no accessible name"
    steps = int(float(handle.get_attribute("aria-valuemax"))) - int(float(handle.get_attribute("aria-valuemin")))
    handle.focus()
    keyboard = handle.page.keyboard
    keyboard.press("Home")
    states = [state(explorer, handle, name)]
    for _ in range(steps):
        keyboard.press("ArrowRight")
        states.append(state(explorer, handle, name))
    assert len({words for words, _ in states}) == steps + 1, f"{name}: two of its values have the same words"
    same = [words for (words, picture), (_, following) in pairwise(states) if picture == following]
    assert not same, f"{name}: the picture stays as it is after {same}"


def choose(explorer: Locator, choice: Locator) -> None:
    """Take radio buttons or a list through all that can be chosen, by the arrow keys."""
    if choice.get_attribute("role") == "radiogroup":
        name, options = (
            choice.get_attribute("aria-label"),
            [label.inner_text() for label in choice.locator("label").all()],
        )
        choice.locator("input:checked").focus()
    else:
        name, options = (
            choice.evaluate("(list) => list.labels[0].innerText"),
            choice.locator("option").all_inner_texts(),
        )
        choice.focus()
        for _ in options:
            choice.page.keyboard.press("ArrowUp")  # to the first
    assert name, "a choice has no accessible name"
    options = [option.replace("\xa0", " ").strip() for option in options]  # as the widget manager writes spaces
    states = [seen_frame(explorer, name)]
    for _ in options[1:]:
        choice.page.keyboard.press("ArrowDown")  # from the last radio button to the first
        states.append(seen_frame(explorer, name))
    for option in options:
        assert sum(f"{name} {option}" in words for words, _ in states) >= 1, f"{name}: {option} is not shown"
    assert len({words for words, _ in states}) == len(options), f"{name}: two choices have the same words"
    assert len({picture for _, picture in states}) == len(options), f"{name}: two choices have the same picture"


def state(explorer: Locator, handle: Locator, name: str) -> tuple[str, str]:
    """Return the words and the picture that are to be seen; the words must agree with what a screen reader says."""
    words, picture = seen_frame(explorer, name)
    setting = handle.get_attribute("aria-valuetext")
    assert setting, f"{name}: no value in words"
    assert name in setting, f"{name}: announced as {setting!r}, which does not say of what"
    assert words.startswith(setting), f"{name}: announced as {setting!r} beside the words {words!r}"
    return words, picture


def seen_frame(explorer: Locator, name: str) -> tuple[str, str]:
    """Return the words and the one picture that are to be seen."""
    frames = explorer.evaluate(VISIBLE_FRAMES)
    assert len(frames) == 1, f"{name}: {len(frames)} pictures at once"
    words, picture, smaller_side = frames[0]
    assert smaller_side > 50, f"{name}: a picture of {smaller_side} pixels"
    return words, re.sub(r"gp\d+-", "", picture)  # without the prefix that keeps ids apart


def test_search_finds_each_chapter_by_its_title(window: Window) -> None:
    """The first as an address asks for it, the others on the same page, by what the address calls."""
    titles = {path.stem: re.sub(r"[\d.#]", "", soup(path).h1.get_text()).strip() for path in chapters()}
    first, *others = titles
    seen = visit(window, HTML / "search.html", "?q=" + titles[first].replace(" ", "+"))
    missing = [] if found_by_search(seen.page, first) else [first]
    for name in others:
        seen.page.evaluate(SEARCH, titles[name])
        missing += [] if found_by_search(seen.page, name) else [name]
    assert missing == []
    assert seen.wrong == []
    seen.page.close()


def chapters() -> list[Path]:
    return [HTML / "chapters" / f"{notebook.stem}.html" for notebook in CHAPTERS]


def found_by_search(page: Page, name: str) -> bool:
    """Whether a page is among the results, which come one by one."""
    page.locator("#search-results").get_by_text("Search finished").wait_for()
    links = page.locator("#search-results li a").all()
    return any(f"{name}.html" in str(link.get_attribute("href")) for link in links)


def test_search_opens_by_keyboard_and_finds_a_term_of_the_package(window: Window) -> None:
    seen = visit(window, HTML / "book" / "start.html")
    seen.page.keyboard.press("Control+k")
    seen.page.keyboard.type("jacobian")
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_url("**/search.html?q=jacobian*")
    results = seen.page.locator("#search-results li a")
    seen.page.locator("#search-results").get_by_text("Search finished").wait_for()
    assert any("api/gradients" in str(link.get_attribute("href")) for link in results.all())
    assert seen.wrong == []
    seen.page.close()


def test_a_term_shows_its_definition_on_focus_and_hover_until_escape(window: Window) -> None:
    seen = visit(window, HTML / "chapters" / "04_magnitude_pruning.html")
    link, tip = seen.page.locator("a[data-definition]").first, seen.page.locator("#gp-tip")
    defined = soup(HTML / "book" / "glossary.html").find(id=link.get_attribute("href").split("#")[1]).find_next("dd")
    expect(tip).to_be_hidden()
    link.focus()
    expect(tip).to_be_visible()
    assert link.get_attribute("aria-describedby") == "gp-tip"
    assert tip.inner_text().split(".")[0] in " ".join(defined.get_text().split())
    seen.page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    assert link.get_attribute("aria-describedby") is None
    link.hover()
    expect(tip).to_be_visible()
    tip.hover()  # to select what it says
    expect(tip).to_be_visible()
    seen.page.mouse.move(0, 0)
    expect(tip).to_be_hidden()
    assert seen.wrong == []
    seen.page.close()


def test_every_term_of_the_glossary_that_a_page_links_to_has_its_definition_there() -> None:
    for path in built_pages():
        links = soup(path).select('main a.reference.internal[href*="glossary.html#term-"]')
        assert [link["href"] for link in links if not link.get("data-definition")] == [], path.name

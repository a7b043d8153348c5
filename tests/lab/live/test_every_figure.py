"""Can every reader use every live figure: on a phone, by name, by finger, from any folder, and at rest when unseen?"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from moves import MOVING, go, reset, shown, slide
from page import facts, opened, settled, write_page
from playwright.sync_api import Browser, Locator
from vendor import VENDOR

from conftest import ROOT
from gradprune.lab.live import _FIGURES

STANDARD = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
WINDOW = {"width": 1280, "height": 720}
WIDTHS = (390, 640, 1000)  # a phone; the least at which panels stand beside each other, about; a page of the book
LEAST_TEXT, LEAST_TARGET = 9, 24  # pixels on the screen

# How high each text of the charts is on the screen, and what it says.
TEXTS = """(root) => [...root.querySelectorAll('svg text')].filter((text) => text.textContent).map((text) => {
  const { a, b } = text.getScreenCTM();
  return [parseFloat(getComputedStyle(text).fontSize) * Math.hypot(a, b), text.textContent];
})"""
# What each control that is shown is called by its label, and how large the place is that can be hit.
CONTROLS = """(root) => [...root.querySelectorAll('button, input, select, [tabindex]')]
  .filter((control) => control.checkVisibility()).map((control) => {
  const words = control.getAttribute('aria-label') ?? [...control.labels].map((label) => label.textContent).join(' ');
  const place = (control.closest('label') ?? control).getBoundingClientRect();
  return { name: words.trim() || (control.matches('button') ? control.textContent.trim() : ''),
    side: Math.min(place.width, place.height), html: control.outerHTML };
})"""
# How many steps an animation takes in 20 frames.
STEPS = """async (root) => {
  let steps = 0;
  const watcher = new MutationObserver((seen) => { steps += seen.length; });
  watcher.observe(root, { attributeFilter: ['data-step'] });
  for (let frame = 0; frame < 20; frame++) await new Promise(requestAnimationFrame);
  watcher.disconnect();
  return steps;
}"""


@pytest.fixture(scope="module", params=_FIGURES)
def page_of(browser: Browser, pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Locator]:
    """Each figure, under reduced motion, on a page that is opened once."""
    with opened(browser, pages[request.param]) as root:
        yield root


@pytest.fixture
def root(page_of: Locator) -> Iterator[Locator]:
    """Each figure as it starts; what a test has changed is reset after it."""
    first = shown(facts(page_of))
    yield page_of
    page_of.page.set_viewport_size(WINDOW)
    if shown(facts(page_of)) != first:
        settled(page_of, reset(page_of).click)


@pytest.fixture
def moving(browser: Browser, pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Locator]:
    """The figure of a test's parameter, whose animation is seen."""
    with opened(browser, pages[request.param], reduced_motion="no-preference") as root:
        yield root


def change_everything(root: Locator) -> None:
    """Move every slider and press every choice."""
    for slider in root.locator("input[type=range]").all():
        settled(root, lambda slider=slider: slide(slider, 0.7))
    for radio in root.locator("input[type=radio]:not(:checked)").all():
        settled(root, radio.check)


def start(root: Locator) -> None:
    """Set the figure going; one that has nothing to train yet, after its first slider was moved."""
    if go(root).is_disabled():
        settled(root, lambda: slide(root.locator("input[type=range]").first, 0.9))
    go(root).click()
    root.page.wait_for_function("(root) => root.dataset.running === 'true'", arg=root.element_handle())


def test_axe_reports_nothing_at_the_start_and_after_changes(root: Locator) -> None:
    for change in (lambda root: None, change_everything):
        change(root)
        report = Axe().run(root.page, options={"runOnly": STANDARD, "preload": False})  # a file cannot read another
        faults = report.response["violations"]
        assert [f"{f['id']}: {n['target']} {n['failureSummary']}" for f in faults for n in f["nodes"]] == []


def test_at_every_width_nothing_scrolls_sideways_and_the_charts_can_be_read(root: Locator) -> None:
    change_everything(root)
    for width in WIDTHS:
        root.page.set_viewport_size({"width": width, "height": 800})
        assert root.page.evaluate("document.documentElement.scrollWidth") <= width
        texts = root.evaluate(TEXTS)
        assert texts
        assert [text for text in texts if text[0] < LEAST_TEXT] == [], f"in a window of {width} pixels"


def test_every_control_has_a_name_of_its_own_and_can_be_hit_by_a_finger(root: Locator) -> None:
    for width in WIDTHS:
        root.page.set_viewport_size({"width": width, "height": 800})
        controls = root.evaluate(CONTROLS)
        assert [control["html"] for control in controls if not control["name"]] == []
        names = [control["name"] for control in controls]
        assert len(set(names)) == len(names) > 1
        small = [control for control in controls if control["side"] < LEAST_TARGET]
        assert small == [], f"in a window of {width} pixels"


def test_reset_restores_what_was_shown(root: Locator) -> None:
    first, words = shown(facts(root)), root.locator(".gp-live-words").inner_text()
    change_everything(root)
    assert shown(facts(root)) != first
    assert shown(settled(root, reset(root).click)) == first
    assert root.locator(".gp-live-words").inner_text() == words


@pytest.mark.parametrize("moving", MOVING, indirect=True)
def test_reset_in_the_middle_of_an_animation_ends_it_and_restores_what_was_shown(moving: Locator) -> None:
    first = shown(facts(moving))
    start(moving)
    assert moving.evaluate(STEPS) > 0
    assert facts(moving)["running"] == "true", "too short to be interrupted"
    assert shown(settled(moving, reset(moving).click)) == first
    assert moving.evaluate(STEPS) == 0
    assert shown(facts(moving)) == first


@pytest.mark.parametrize("moving", MOVING, indirect=True)
def test_the_animation_rests_while_the_figure_is_out_of_sight_and_goes_on_after(moving: Locator) -> None:
    page = moving.page
    page.evaluate("document.body.style.paddingBottom = '5000px'")
    start(moving)
    assert moving.evaluate(STEPS) > 0
    page.evaluate("scrollTo(0, 4000)")
    page.wait_for_timeout(200)  # the browser says so once a frame or later
    assert moving.evaluate(STEPS) == 0
    assert facts(moving)["running"] == "true", "it has ended, not rested"
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(200)
    assert facts(moving)["running"] == "false" or moving.evaluate(STEPS) > 0


@pytest.mark.parametrize("name", _FIGURES)
def test_a_page_needs_nothing_beyond_its_folder(name: str, browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "another machine"
    written = write_page(_FIGURES[name](), tmp_path / "page.html", manager="_static/embed.js")
    shutil.copytree(VENDOR / "widgets", folder / "_static")
    written.rename(folder / "page.html")
    for file in filter(Path.is_file, folder.rglob("*")):
        assert str(ROOT) not in file.read_text(encoding="utf-8"), f"{file.name} names the folder that it was made in"
    asked: list[str] = []
    with opened(browser, folder / "page.html") as root:
        root.page.on("request", lambda request: asked.append(request.url))
        root.page.reload()
        root.wait_for()
        settled(root, lambda: slide(root.locator("input[type=range]").first, 0.6))
    files = {address for address in asked if not address.startswith(("blob:", "data:"))}
    assert files == {(folder / part).as_uri() for part in ("page.html", "_static/embed.js", "_static/embed.css")}

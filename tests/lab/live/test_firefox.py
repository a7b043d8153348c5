"""Do the live figures work in Firefox, opened from disk, as in Chromium and in Python?"""

import json
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from moves import chosen, slide
from page import opened, settled
from playwright.sync_api import Browser, Locator
from vendor import install, node

from conftest import HTML, NOT_BUILT, built_pages, page_name
from gradprune.lab.live import _FIGURES

# The four workers' masks are another matter: test_live_workers compares them.
_OF_ONE_NETWORK = [name for name, figure in _FIGURES.items() if hasattr(figure, "masks") and name != "workers"]

HERE = Path(__file__).resolve().parent
FIREFOX = ("firefox-esr", "firefox")
MOVES: list[dict[str, Any]] = [{"key": "ArrowRight"}, {"key": "End"}, {"share": 0.5}, {"button": "Reset"}]
# What is shown, in numbers and words, and how much is drawn: shapes of the charts, coloured pixels of the canvases.
LOOK = """(root) => {
  const { frame, step, drawn, ...facts } = root.dataset;
  const opaque = (canvas) => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
    .data.filter((value, i) => i % 4 === 3 && value > 0).length;
  const shapes = String(root.querySelectorAll("svg *").length);
  const pixels = String([...root.querySelectorAll("canvas")].map(opaque));
  return { ...facts, words: root.querySelector(".gp-live-words").textContent, shapes, pixels };
}"""

Visits = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def in_firefox(pages: dict[str, Path]) -> Visits:
    """What Firefox shows of each page at first and after each move, and what went wrong; one browser for all."""
    found = next(filter(None, map(shutil.which, FIREFOX)), None)
    if not found:
        pytest.fail(f"no Firefox found ({', '.join(FIREFOX)}): on Debian, `apt-get install firefox-esr`")
    install()
    addresses = {name: pages[name].as_uri() for name in _FIGURES} | {
        page_name(path): path.as_uri() for path in built_pages() if '"_esm"' in path.read_text(encoding="utf-8")
    }
    asked = json.dumps({"firefox": found, "pages": addresses, "look": LOOK, "moves": MOVES})
    done = subprocess.run(
        [node(), str(HERE / "firefox.js")], input=asked, capture_output=True, encoding="utf-8", check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["version"].lower().startswith("firefox/")
    visits: Visits = answer["visits"]
    return visits


@pytest.mark.parametrize("name", _FIGURES)
def test_the_figure_draws_and_follows_its_slider_and_no_script_fails(name: str, in_firefox: Visits) -> None:
    visit = in_firefox[name]
    assert visit["wrong"] == []
    first, *moved, last = visit["seen"]
    assert int(first["shapes"]) > 10, "no chart is drawn"
    shown = [chosen(name, seen) for seen in [first, *moved]]
    assert all(before != after for before, after in pairwise(shown)), "a move changed nothing"
    assert chosen(name, last) == chosen(name, first)


def test_the_figures_of_the_built_book_work_from_disk_without_a_network(in_firefox: Visits) -> None:
    if not (HTML / "index.html").exists():
        pytest.fail(NOT_BUILT)
    visits = {page: visit for page, visit in in_firefox.items() if page not in _FIGURES}
    assert [(page, visit["wrong"]) for page, visit in visits.items() if visit["wrong"]] == []
    names = {page: visit["seen"][0]["figure"] for page, visit in visits.items()}
    assert set(names.values()) == set(_FIGURES), "a figure stands on no page of the book"
    for page, name in names.items():
        first, *moved, last = (chosen(name, seen) for seen in visits[page]["seen"])
        assert all(before != after for before, after in pairwise([first, *moved])), f"{page}: a move changed nothing"
        assert last == first


@pytest.mark.parametrize("name", _OF_ONE_NETWORK)
def test_firefox_and_gradprune_keep_the_same_weights(name: str, in_firefox: Visits) -> None:
    for facts in in_firefox[name]["seen"]:
        masks = _FIGURES[name](**chosen(name, facts)).masks
        kept = facts["kept"] if "kept" in facts else facts["keptOnce"]  # of two networks: the one pruned at once
        assert int(kept) == sum(int(mask.sum()) for mask in masks.values()), facts


@pytest.mark.parametrize("name", _FIGURES)
def test_firefox_and_chromium_show_the_same(
    name: str, in_firefox: Visits, pages: dict[str, Path], browser: Browser
) -> None:
    with opened(browser, pages[name]) as root:
        seen = [root.evaluate(LOOK)]
        for move in MOVES:
            settled(root, lambda move=move: make(root, **move))
            seen.append(root.evaluate(LOOK))
    for firefox, chromium in zip(in_firefox[name]["seen"], seen, strict=True):
        assert firefox.keys() == chromium.keys()
        for fact, value in firefox.items():
            assert same(value, chromium[fact]), f"{fact}: {value} in Firefox, {chromium[fact]} in Chromium"


def make(root: Locator, *, key: str = "", share: float = 0.0, button: str = "") -> None:
    """Make a move in Chromium, as firefox.js does in Firefox."""
    slider = root.locator("input[type=range]").first
    if button:
        root.get_by_role("button", name=button).press("Enter")
    elif key:
        slider.press(key)
    else:
        slide(slider, share)


def same(one: str, other: str) -> bool:
    """Whether two facts are equal: as numbers to a millionth, since browsers may round exp differently."""
    try:
        return float(one) == pytest.approx(float(other), rel=1e-6)
    except ValueError:
        return one == other

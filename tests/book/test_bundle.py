"""Does the widget manager that the book ships show what its pages hold: live figures, sliders, links between them?"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
from execute import execute
from ipywidgets.embed import dependency_state, embed_data
from playwright.sync_api import Browser, Page, expect
from vendor import VENDOR, vendor

from conftest import ROOT, soup

STATE, VIEW = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("state", "view"))
LARGEST = 3e6  # bytes of a page with its widgets
SHOWN = ("figure", "share", "explorer")

# A figure that says what its bytes are and follows its number, a slider linked to that number in the page, and one
# linked to a stack, as an explorer's is.
WIDGETS = '''
import anywidget, ipywidgets, struct, traitlets

class Figure(anywidget.AnyWidget):
    _esm = """
    function render({ model, el }) {
      const numbers = model.get("numbers");
      const of = (at) => numbers.getFloat32(4 * at, true);
      const draw = () => {
        const bytes = `${numbers.constructor.name} of ${numbers.byteLength} bytes: ${of(0)}, ${of(1)}`;
        el.innerHTML = `<p class="figure">${bytes}; share ${model.get("share")}</p>`;
      };
      model.on("change:share", draw);
      draw();
    }
    export default { render };
    """
    _css = ".figure { color: rgb(1, 2, 3); }"
    numbers = traitlets.Bytes(struct.pack("<2f", 1, 2.5)).tag(sync=True)
    share = traitlets.Float(0.5).tag(sync=True)

figure = Figure()
share = ipywidgets.FloatSlider(value=0.5, min=0, max=1, step=0.25, description="share")
ipywidgets.jslink((share, "value"), (figure, "share"))

pictures = ipywidgets.Stack([ipywidgets.HTML(f"<b>picture {number}</b>") for number in range(3)], selected_index=1)
which = ipywidgets.IntSlider(value=1, min=0, max=2, description="which")
ipywidgets.jslink((which, "value"), (pictures, "selected_index"))
explorer = ipywidgets.VBox([which, pictures])
'''

Held = tuple[dict[str, Any], list[dict[str, Any]]]


def of_a_text(source: str = WIDGETS, shown: tuple[str, ...] = SHOWN) -> Held:
    """State and views of widgets as a page of text holds them."""
    made: dict[str, Any] = {"__name__": __name__}
    exec(source, made)
    views = [made[name] for name in shown]
    data = embed_data(views=views, state=dependency_state(views, drop_defaults=False))
    return data["manager_state"], data["view_specs"]


def of_a_chapter() -> Held:
    """State and views of the same widgets as a notebook holds them that has run in a kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (WIDGETS, *SHOWN)])
    execute(notebook, Path.cwd(), widget_state=True)
    return notebook.metadata["widgets"][STATE], [cell.outputs[0].data[VIEW] for cell in notebook.cells[1:]]


@pytest.fixture(scope="module", params=[of_a_text, of_a_chapter], ids=lambda function: function.__name__)
def held(request: pytest.FixtureRequest) -> Held:
    held: Held = request.param()
    return held


@contextmanager
def opened(browser: Browser, held: Held, path: Path) -> Iterator[tuple[Page, list[str]]]:
    """Open a page with these widgets from disk, without a network; also give the list of what goes wrong."""
    vendor()
    state, views = held
    scripts = [(STATE, state), *((VIEW, view) for view in views)]
    written = (f'<script type="{kind}">{json.dumps(content)}</script>' for kind, content in scripts)
    manager = (VENDOR / "widgets" / "embed.js").as_uri()
    path.write_text(f'<meta charset="utf-8"><script src="{manager}"></script><body>{"".join(written)}</body>')
    wrong: list[str] = []
    with browser.new_context(offline=True) as context:
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        yield page, wrong


def test_figures_sliders_and_their_links_work_from_disk(held: Held, browser: Browser, tmp_path: Path) -> None:
    with opened(browser, held, tmp_path / "page.html") as (page, wrong):
        figure, handles, pictures = page.locator(".figure"), page.locator("[role=slider]"), page.locator("b")
        expect(figure).to_have_text("DataView of 8 bytes: 1, 2.5; share 0.5")
        expect(figure).to_have_css("color", "rgb(1, 2, 3)")
        handles.nth(0).press("ArrowRight")
        expect(figure).to_have_text("DataView of 8 bytes: 1, 2.5; share 0.75")
        expect(pictures).to_have_text(["picture 1"])
        handles.nth(1).press("ArrowLeft")
        expect(pictures).to_have_text(["picture 0"])
        assert wrong == []


def test_widgets_are_laid_out_by_the_managers_sheet(held: Held, browser: Browser, tmp_path: Path) -> None:
    with opened(browser, held, tmp_path / "page.html") as (page, _):
        expect(page.locator(".widget-vbox")).to_have_css("flex-direction", "column")
        expect(page.locator(".widget-vbox")).to_have_css("position", "relative")
        expect(page.locator(".noUi-handle").first).to_have_css("position", "absolute")


def test_a_widget_of_another_module_is_an_error_that_names_it_and_the_others_are_shown(
    browser: Browser, tmp_path: Path
) -> None:
    stranger = "figure._model_module = 'elsewhere'; figure._view_module = 'elsewhere'"
    with opened(browser, of_a_text(f"{WIDGETS}\n{stranger}"), tmp_path / "page.html") as (page, wrong):
        expect(page.locator("[role=slider]")).to_have_count(2)
        expect(page.locator("b")).to_have_text(["picture 1"])
        page.get_by_text("Click to show javascript error").click()
        expect(page.locator(".jupyter-widgets-error-widget")).to_contain_text("elsewhere")
        assert any("elsewhere" in said for said in wrong)


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of a book of four texts, two with a live figure and one with one that there is not."""
    vendor()
    folder = tmp_path_factory.mktemp("book")
    settings = {
        "extensions": ["myst_nb", "sphinx.ext.autodoc", "gradprune_book"],
        "html_theme_options": {"repository_url": ""},
        "html_static_path": [str(VENDOR)],
        "nb_ipywidgets_js": {"widgets/embed.js": {}},
        "suppress_warnings": ["config", "theme"],
    }
    lines = [f"import sys; sys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})"]
    lines += [f"{name} = {value!r}" for name, value in settings.items()]
    (folder / "conf.py").write_text("\n".join(lines))
    (folder / "index.md").write_text("# One\n```{toctree}\nother\nwords\nunknown\n```\n```{live} prune\n```\n")
    (folder / "other.md").write_text("# Other\n```{live} prune\n```\n")
    (folder / "words.md").write_text("# Words\n\nNothing else.\n")
    (folder / "unknown.md").write_text("# Unknown\n```{live} prunes\n```\n")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", str(folder), str(folder / "html")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (folder / "said.txt").write_text(built.stderr)
    return folder / "html"


def test_a_text_shows_a_live_figure_and_only_pages_that_have_one_load_the_manager(book: Path, browser: Browser) -> None:
    loaded = {page: "widgets/embed.js" in (book / f"{page}.html").read_text() for page in ("index", "other", "words")}
    assert loaded == {"index": True, "other": True, "words": False}
    with browser.new_context(offline=True) as context:
        page = context.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((book / "index.html").as_uri())
        expect(page.locator(".gp-live[data-figure=prune][data-drawn]")).to_have_count(1)
        assert wrong == []


def test_a_text_holds_the_state_of_its_figure_alone_and_the_page_stays_small(book: Path) -> None:
    for page in (book / "index.html", book / "other.html"):
        state = json.loads(soup(page).find("script", type=STATE).string)["state"]
        assert [model["model_module"] for model in state.values()].count("anywidget") == 1
        assert sum(file.stat().st_size for file in [page, *(book / "_static" / "widgets").iterdir()]) < LARGEST


def test_where_no_script_runs_a_text_shows_the_picture_the_words_and_the_table_of_its_figure(book: Path) -> None:
    (still,) = soup(book / "index.html").select("noscript > .gp-live")
    assert still.select_one(".gp-words").get_text(strip=True)
    assert still.select_one("svg")
    assert len(still.select("table tr")) > 1


def test_an_unknown_live_figure_is_an_error_that_names_it_and_those_there_are(book: Path) -> None:
    said = (book.parent / "said.txt").read_text()
    assert "unknown live figure 'prunes'" in said
    assert "'prune'" in said

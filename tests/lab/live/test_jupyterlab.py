"""Does the same figure work beside a kernel, in a real JupyterLab?"""

from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_server_process import serving
from page import set_slider, settled
from playwright.sync_api import Browser, Page, expect

SLOW = 60_000  # milliseconds until the notebook has run
CELLS = [
    "from gradprune import lab\nfigure = lab.live.Prune()\nfigure",
    'print(figure.sparsity, f"{figure.accuracy:.4f}", figure.masks)',
    "figure.ranking = 'largest'\nprint('set')",
    "start = lab.live.Start()\nstart",
    "network = start.network\nkept = {name: int(mask.sum()) for name, mask in start.masks.items()}\n"
    "start.masks.apply_(network)\n"
    "share = lab.train.accuracy(network, lab.live.perceptron.digits().test)\n"
    'print(sum(kept.values()), f"{share:.4f}", "numbers" in start._shown)',
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A JupyterLab that knows one notebook; the notebook's address, with the token."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "figure.ipynb")
    quiet = ["--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with serving(tmp_path, "jupyterlab", *quiet) as (place, token):
        yield f"http://{place}/lab/tree/figure.ipynb?token={token}"


def test_what_the_reader_sets_arrives_in_the_kernel_and_what_a_cell_sets_in_the_figure(
    server: str, browser: Browser
) -> None:
    with browser.new_context(viewport={"width": 1300, "height": 2400}) as context:
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.goto(server)
        cells = page.locator(".jp-Notebook .jp-CodeCell")
        expect(cells).to_have_count(len(CELLS), timeout=SLOW)
        page.get_by_text("Python 3 (ipykernel) | Idle").or_(page.get_by_title("Python 3")).first.wait_for()
        run(page, 0)
        root = page.locator(".gp-live[data-figure=prune][data-drawn]")
        root.wait_for()
        seen = set_slider(root, "weights removed", 90)
        run(page, 1)
        said = cells.nth(1).locator(".jp-OutputArea-output")
        expect(said).to_contain_text(f"0.9 {float(seen['accuracy']):.4f} Masks(")
        expect(said).to_contain_text("0.9001")
        run(page, 2)
        expect(root).to_have_attribute("data-ranking", "largest")
        expect(root.locator("input[value=largest]")).to_be_checked()
        run(page, 3)
        trained = page.locator(".gp-live[data-figure=start][data-drawn]")
        trained.wait_for()
        set_slider(trained, "weights removed", 80)
        settled(trained, trained.get_by_role("button", name="Train again").click)
        seen = set_slider(trained, "weights removed", 90)
        run(page, 4)
        wanted = f"{seen['kept']} {float(seen['accuracy']):.4f} True"
        expect(cells.nth(4).locator(".jp-OutputArea-output")).to_contain_text(wanted)


def run(page: Page, number: int) -> None:
    """Run one cell, as a reader does: a click into it, then Shift and Enter."""
    page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")

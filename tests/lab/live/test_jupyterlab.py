"""Does the same figure work beside a kernel, in a real JupyterLab?"""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from page import set_slider
from playwright.sync_api import Browser, Page, expect

from conftest import ROOT

START, SLOW = 60, 60_000  # seconds until the server answers; milliseconds until the notebook has run
CELLS = [
    "from gradprune import lab\nfigure = lab.live.Prune()\nfigure",
    'print(figure.sparsity, f"{figure.accuracy:.4f}", figure.masks)',
    "figure.ranking = 'largest'\nprint('set')",
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A JupyterLab on loopback that knows one notebook; its address, with the token. It is stopped in any case."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "figure.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}", "--allow-root"]
    command += ["--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    settings = {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data")}
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT / "src")}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", process, tmp_path / "log.txt")
        yield f"http://127.0.0.1:{port}/lab/tree/figure.ipynb?token={token}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:
                json.load(answer)
                return
        except OSError:
            time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


def test_what_the_reader_sets_arrives_in_the_kernel_and_what_a_cell_sets_in_the_figure(
    server: str, browser: Browser
) -> None:
    with browser.new_context(viewport={"width": 1300, "height": 1600}) as context:
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.goto(server)
        cells = page.locator(".jp-Notebook .jp-CodeCell")
        expect(cells).to_have_count(len(CELLS), timeout=SLOW)
        page.get_by_text("Python 3 (ipykernel) | Idle").or_(page.get_by_title("Python 3")).first.wait_for()
        run(page, 0)
        root = page.locator(".gp-live[data-drawn]")
        root.wait_for()
        seen = set_slider(root, "weights removed", 90)
        run(page, 1)
        said = cells.nth(1).locator(".jp-OutputArea-output")
        expect(said).to_contain_text(f"0.9 {float(seen['accuracy']):.4f} Masks(")
        expect(said).to_contain_text("0.9001")
        run(page, 2)
        expect(root).to_have_attribute("data-ranking", "largest")
        expect(root.locator("input[value=largest]")).to_be_checked()


def run(page: Page, number: int) -> None:
    """Run one cell, as a reader does: a click into it, then Shift and Enter."""
    page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")

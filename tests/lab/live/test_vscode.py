"""Does the same figure work beside a kernel by the widget manager of Visual Studio Code?

Its Jupyter extension draws widgets by a package of its own, which is what is tried here, with require.js as there, on a
kernel of a Jupyter server.
"""

import base64
import hashlib
import os
import subprocess
import tarfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from jupyter_server_process import serving
from page import set_slider
from playwright.sync_api import Browser, expect
from vendor import MODULES, install, npm, tool

SLOW = 60_000  # milliseconds until a kernel has started
# Only tests need these, and with what they depend on they are large: one file of each is taken, by its hash.
MANAGER = ("@vscode/jupyter-ipywidgets8", "1.0.9", "dist/ipywidgets.js",
           "bocCThfa4JDIDd7qCFAfW3HpzHfTLYxOTpTbiDfw4DXOUjKHnr6ObkMBiIkuzYPRybh5bY4FhYLemuDuTvIbpQ==")  # fmt: skip
REQUIRE = ("requirejs", "2.3.8", "require.js",
           "7/cTSLOdYkNBNJcDMWf+luFvMriVm7eYxp4BcFCsAX0wF421Vyce5SXP17c+Jd5otXKGNehIonFlyQXSowL6Mw==")  # fmt: skip


def one_file(folder: Path, name: str, version: str, path: str, sha512: str) -> str:
    """The text of one file of a package from npm."""
    command = [*npm(), "pack", f"{name}@{version}", "--silent", "--prefer-offline", f"--pack-destination={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=120)
    assert done.returncode == 0, f"`npm pack {name}` failed; it needs a network once:\n{done.stderr}"
    packed = folder / done.stdout.split()[-1]
    assert base64.b64encode(hashlib.sha512(packed.read_bytes()).digest()).decode() == sha512
    with tarfile.open(packed) as archive:
        found = archive.extractfile(f"package/{path}")
        assert found is not None
        return found.read().decode()


@pytest.fixture
def page_of_vscode(tmp_path: Path) -> Path:
    """A page with require.js, Visual Studio Code's widget manager, and what connects it to a kernel."""
    install()
    bundle = tmp_path / "connect.js"
    command = [*tool("esbuild"), str(Path(__file__).with_name("vscode.js")), "--bundle", f"--outfile={bundle}"]
    command += ["--define:global=globalThis", '--define:process.env.NODE_ENV="production"', "--log-level=error"]
    subprocess.run(command, check=True, env={**os.environ, "NODE_PATH": str(MODULES)}, timeout=120)
    manager = f"{one_file(tmp_path, *MANAGER)}\n__webpack_exports__activate();"
    scripts = {"require.js": one_file(tmp_path, *REQUIRE), "manager.mjs": manager}
    for name, text in scripts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text(
        '<!doctype html><meta charset="utf-8"><script src="require.js"></script><script src="connect.js"></script>'
        '<div id="output"></div>'
    )
    return page


def test_sliders_arrive_in_the_kernel_and_what_the_kernel_sets_in_the_figure(
    page_of_vscode: Path, browser: Browser, tmp_path: Path
) -> None:
    open_to_all = ["--ServerApp.allow_origin=*", "--ServerApp.disable_check_xsrf=True"]
    with serving(tmp_path, "jupyter_server", *open_to_all) as (place, token), browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.goto(page_of_vscode.as_uri())
        page.add_script_tag(content=(tmp_path / "manager.mjs").read_text(encoding="utf-8"), type="module")
        page.wait_for_function("globalThis.vscIPyWidgets8")
        front_end = metadata.distribution("anywidget").locate_file("anywidget/nbextension/index")
        where = {"place": place, "token": token, "anywidget": Path(str(front_end)).as_uri()}
        page.evaluate("(where) => connect(where, document.querySelector('#output'))", where)

        def run(code: str) -> dict[str, Any]:
            said: dict[str, Any] = page.evaluate("(code) => run(code)", code)
            return said

        widget = run("from gradprune import lab\nfigure = lab.live.Prune()\nfigure")["widget"]
        page.evaluate("(id) => show(id)", widget)
        root = page.locator(".gp-live[data-drawn]")
        root.wait_for()
        seen = set_slider(root, "weights removed", 90)
        expected, said, asked = f"0.9 {float(seen['accuracy']):.4f} Masks(", "", time.monotonic()
        while (
            not said.startswith(expected) and time.monotonic() < asked + SLOW / 1000
        ):  # until both traits have arrived
            page.wait_for_timeout(50)
            said = run('print(figure.sparsity, f"{figure.accuracy:.4f}", figure.masks)')["text"]
        assert said.startswith(expected)
        assert "sparsity 0.9001" in said
        assert run("figure.ranking = 'largest'")["text"] == ""
        expect(root).to_have_attribute("data-ranking", "largest")

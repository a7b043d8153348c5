"""What the tests of the book share: where its pages and notebooks are, and a browser."""

import os
import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Timer

import psutil
import pytest
import torch
from bs4 import BeautifulSoup
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "book" / "_build" / "html"
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))
NOT_BUILT = "no built page in book/_build/html: run `make book` first (`make test` does)"

# What takes minutes, the longest first: whoever runs files side by side is not left waiting for one of them at the end.
LONG = ("book/test_pages", "scale/", "lab/live/", "book/test_results", "book/test_notebooks", "deploy/", "outside/")

PATIENCE = 300  # seconds that a browser has for one test
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

settings.register_profile("any machine", deadline=None)  # no test asserts a time
settings.register_profile("quick", deadline=None, max_examples=10)  # `make quick`
settings.load_profile("any machine")

os.environ.setdefault("GRADPRUNE_QUIET", "1")  # kernels started by a test inherit it: no progress bars in outputs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def turn(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((at for at, part in enumerate(LONG) if f"tests/{part}" in path), len(LONG))

    items.sort(key=turn)


def built_pages() -> list[Path]:
    """Return every built page but those that only send the reader on; index.html alone where nothing is built.

    Never an empty list: pytest would pass over a test without parameters, and an unbuilt book must fail.
    """
    pages = [path for path in sorted(HTML.rglob("*.html")) if "_static" not in path.parts]
    return [path for path in pages if not is_redirect(path)] or [HTML / "index.html"]


def is_deeper(notebook: Path) -> bool:
    """Whether a notebook is a deeper page of its chapter, as 04b_name is, and not its main page."""
    return bool(re.match(r"\d\d[a-z]_", notebook.name))


def is_redirect(path: Path) -> bool:
    return bool(re.match(r"\s*<meta http-equiv=\"refresh\"", path.read_text(encoding="utf-8"), re.IGNORECASE))


def page_name(path: Path) -> str:
    return str(path.relative_to(HTML)).removesuffix(".html")


@cache
def soup(path: Path) -> BeautifulSoup:
    """Return the page as it lies on the disk, before any script has run."""
    if not path.exists():
        pytest.fail(NOT_BUILT)
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test that asks a browser is an error where it has no answer in time, and not a run without an end."""
    if "browser" not in getattr(item, "fixturenames", ()):
        return (yield)
    with answered_within(PATIENCE):
        return (yield)


@contextmanager
def answered_within(seconds: float) -> Iterator[None]:
    """End the browsers of this process after so many seconds: playwright waits for ever for a page that has hung."""
    timer = Timer(seconds, end_browsers)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def end_browsers() -> None:
    for process in psutil.Process().children(recursive=True):
        try:
            if "chrom" in process.name():
                process.kill()
        except psutil.NoSuchProcess:
            pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium of the machine. It ends with the file: while it runs, no other event loop can, as notebooks need."""
    found = chromium()
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=ARGUMENTS)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each live figure by its name, as it starts, on a page of its own: made when first asked for, and once."""
    from page import write_page  # it lies beside the tests of the figures

    from gradprune.lab import live

    class Pages(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = write_page(live.figure(name), tmp_path_factory.mktemp(name) / "page.html")
            return self[name]

    return Pages()


def chromium() -> str:
    """Return where a Chromium of the machine is; fail with what to install where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.fail(f"no browser found ({', '.join(BROWSERS)}): on Debian and Ubuntu, `apt-get install chromium`")
    return found


class _OnCuda(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda"))
    is_cpu = property(lambda self: False)


class _OnMps(_OnCuda):
    device = property(lambda self: torch.device("mps"))


@pytest.fixture(params=[_OnCuda, _OnMps])
def on_accelerator(request):
    """Returns a tensor as one that says that it lies on an accelerator; what is done with it is done on the CPU."""
    return lambda tensor: tensor.as_subclass(request.param)

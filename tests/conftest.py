"""What the tests of the book share: where its pages and notebooks are."""

import os
import re
from functools import cache
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "book" / "_build" / "html"
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))
NOT_BUILT = "no built page in book/_build/html: run `make book` first (`make test` does)"

settings.register_profile("any machine", deadline=None)  # no test asserts a time
settings.register_profile("quick", deadline=None, max_examples=10)  # `make quick`
settings.load_profile("any machine")

os.environ.setdefault("GRADPRUNE_QUIET", "1")  # kernels started by a test inherit it: no progress bars in outputs


def built_pages() -> list[Path]:
    """Return every built page but those that only send the reader on; index.html alone where nothing is built.

    Never an empty list: pytest would pass over a test without parameters, and an unbuilt book must fail.
    """
    pages = [path for path in sorted(HTML.rglob("*.html")) if "_static" not in path.parts]
    return [path for path in pages if not is_redirect(path)] or [HTML / "index.html"]


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

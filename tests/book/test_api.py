"""Do the pages of the package show each name once, as users write it, and say what the types in it stand for?"""

import inspect
import re
from pathlib import Path

import pytest

import gradprune
from conftest import HTML, ROOT, soup

PAGES = sorted((ROOT / "book" / "api").glob("*.md"))
DIRECTIVE = re.compile(r"^\.\. auto(?:function|class):: gradprune\.(\w+)$", re.MULTILINE)
BUILT = [HTML / "book" / "api" / f"{path.stem}.html" for path in PAGES if DIRECTIVE.search(path.read_text())]


def test_each_public_name_is_on_one_page():
    shown = [name for path in PAGES for name in DIRECTIVE.findall(path.read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(gradprune.__all__)


def test_the_first_page_links_each_public_name():
    overview = (ROOT / "book" / "api" / "index.md").read_text(encoding="utf-8")
    linked = re.findall(r"\{(?:func|class)\}`~gradprune\.(\w+)`", overview)
    assert sorted(linked) == sorted(gradprune.__all__)


@pytest.mark.parametrize("name", gradprune.__all__)
def test_a_built_page_shows_a_name_as_users_write_it(name):
    (signature,) = [found for page in BUILT if (found := soup(page).find(id=f"gradprune.{name}"))]
    written = " ".join(signature.get_text().split())
    kind = "class " if inspect.isclass(getattr(gradprune, name)) else ""
    assert written.startswith(f"{kind}gradprune.{name}")
    assert not re.search(r"(torch|collections|typing|gradprune\.\w+)\.", written.removeprefix(f"{kind}gradprune."))


def test_a_long_signature_has_a_parameter_a_line():
    (signature,) = [found for page in BUILT if (found := soup(page).find(id="gradprune.prune"))]
    lines = [line.get_text() for line in signature.find_all("dd")]
    assert len(lines) == len(inspect.signature(gradprune.prune).parameters) + 1  # and the star


@pytest.mark.parametrize("page", BUILT, ids=lambda path: path.stem)
def test_the_names_of_our_types_in_signatures_are_linked(page: Path):
    names = {found["id"] for found in soup(HTML / "book" / "api" / "index.html").select("dl.type > dt")}
    assert {"Params", "Score", "Granularity"} <= names
    unlinked = set()
    for signature in soup(page).select("dt.sig"):
        words = {span.get_text() for span in signature.select("em.sig-param span.pre, span.sig-return span.pre")}
        unlinked |= (words & names) - {link.get_text() for link in signature.find_all("a")}
    assert unlinked == set()

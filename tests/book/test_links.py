"""Does every link lead somewhere, does every asset lie beside the pages, and are the pages light enough?"""

import re
from copy import copy
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from conftest import CHAPTERS, HTML, NOT_BUILT, built_pages, page_name, soup

MAX_CHAPTER_BYTES = 3_000_000
ASSETS = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src", "object": "data"}
IN_STYLE = re.compile(r"url\(\s*['\"]?([^'\")]+)['\"]?\s*\)|@import\s+['\"]([^'\"]+)['\"]")

CHAPTER_NUMBER = re.compile(r"\b[Cc]hapters? (\d+)")

every_page = pytest.mark.parametrize("page", built_pages(), ids=page_name)


@every_page
def test_every_internal_link_and_anchor_resolves(page: Path) -> None:
    addresses = [a["href"] for a in soup(page).find_all("a", href=True)]
    assert addresses, "a page without a single link"
    assert [address for address in addresses if not resolves(page, address)] == []


@every_page
def test_every_asset_lies_beside_the_pages(page: Path) -> None:
    addresses = assets(page)
    assert addresses, "a page without a stylesheet"
    assert [address for address in addresses if urlsplit(address).scheme in ("http", "https")] == [], "on another host"
    assert [address for address in addresses if address.startswith("//")] == [], "on another host"
    assert [address for address in addresses if not resolves(page, address)] == [], "missing"


@every_page
def test_external_links_are_well_formed_https(page: Path) -> None:
    addresses = [a["href"] for a in soup(page).find_all("a", href=True) if urlsplit(a["href"]).scheme]
    assert [address for address in addresses if not well_formed(address)] == []


@pytest.mark.parametrize(
    "path", sorted(HTML.rglob("*.css")) or [HTML / "_static" / "gradprune.css"], ids=lambda p: p.name
)
def test_stylesheets_take_nothing_from_another_host(path: Path) -> None:
    if not path.exists():
        pytest.fail(NOT_BUILT)
    addresses = [a or b for a, b in IN_STYLE.findall(path.read_text(encoding="utf-8"))]
    assert [a for a in addresses if a.startswith(("http:", "https:", "//"))] == []


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_weighs_at_most_3_megabytes(notebook: Path) -> None:
    """Its HTML, its images and the manager of its widgets, uncompressed; not what pages without them load too."""
    page = HTML / "chapters" / f"{notebook.stem}.html"
    images = {img["src"] for img in soup(page).find_all("img", src=True) if not img["src"].startswith("data:")}
    weight = page.stat().st_size + sum((page.parent / unquote(image)).stat().st_size for image in images)
    if soup(page).find("script", type="application/vnd.jupyter.widget-view+json"):
        weight += sum(file.stat().st_size for file in (HTML / "_static" / "widgets").iterdir())
    assert weight <= MAX_CHAPTER_BYTES, f"{weight / 1e6:.1f} MB"


@pytest.mark.parametrize("notebook", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_can_be_downloaded_and_launched(notebook: Path) -> None:
    page = HTML / "chapters" / f"{notebook.stem}.html"
    addresses = [a["href"] for a in soup(page).find_all("a", href=True)]
    downloads = [address for address in addresses if address.endswith(f"_sources/chapters/{notebook.name}")]
    assert downloads, "no link to download the notebook"
    assert all(resolves(page, address) for address in downloads)
    for host in ("mybinder.org", "colab.research.google.com"):
        launches = [unquote(address) for address in addresses if urlsplit(address).netloc == host]
        assert any(f"chapters/{notebook.name}" in address for address in launches), f"no link to {host}"


def test_the_front_door_leads_to_the_start_page() -> None:
    refresh = soup(HTML / "index.html").find("meta", attrs={"http-equiv": "Refresh"})
    assert resolves(HTML / "index.html", refresh["content"].partition("url=")[2])


def resolves(page: Path, address: str) -> bool:
    """Whether an address leads to a file of the book, its anchor to a place there; other hosts are not looked up."""
    parts = urlsplit(address)
    if parts.scheme:
        return True
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_file() or not target.is_relative_to(HTML.resolve()):
        return False
    return not parts.fragment or target.suffix != ".html" or unquote(parts.fragment) in anchors(target)


@cache
def anchors(page: Path) -> set[str]:
    return {tag["id"] for tag in soup(page).find_all(id=True)} | {
        tag["name"] for tag in soup(page).find_all("a", {"name": True})
    }


def assets(page: Path) -> list[str]:
    tags = [(tag, tag.get(ASSETS[tag.name])) for tag in soup(page).find_all(list(ASSETS))]
    linked = [address for tag, address in tags if address and not is_navigation(tag)]
    styles = [text.get_text() for text in soup(page).find_all("style")]
    styles += [tag["style"] for tag in soup(page).find_all(style=True)]
    inside = [a or b for style in styles for a, b in IN_STYLE.findall(style)]
    return linked + [address for address in inside if not address.startswith("#")]


def is_navigation(tag) -> bool:
    """Whether a <link> names a page, which browsers do not fetch, rather than an asset."""
    return tag.name == "link" and not {"stylesheet", "icon", "preload", "modulepreload"} & set(tag.get("rel", []))


def well_formed(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme == "https" and "." in parts.netloc and not re.search(r"\s", address)


@pytest.mark.parametrize("page", sorted((HTML / "book" / "api").glob("*.html")), ids=page_name)
def test_a_docstring_links_each_written_chapter_that_it_names(page: Path) -> None:
    written = {int(path.stem[:2]) for path in CHAPTERS}
    article = copy(soup(page).find("article"))
    named = {int(number) for number in CHAPTER_NUMBER.findall(article.get_text())}
    for link in article.find_all("a"):
        link.replace_with("(link)")
    unlinked = {int(number) for number in CHAPTER_NUMBER.findall(article.get_text())}
    assert unlinked & written == set()
    if page.stem == "gradients":
        assert named >= {1, 2, 3}, "the page of their room names the chapters"

"""Does every recipe run as it is printed, after the lines that all of them stand on?"""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "book" / "recipes.md").read_text(encoding="utf-8")
COMMON = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
SECTIONS = re.findall(r"^### \.\.\. (.+?)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
RECIPES = {title: re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for title, text in SECTIONS}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Recipes write files where they run, and ask no other machine for anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs_as_printed_and_warns_of_nothing(title):
    """What the trainers warn of is their own."""
    (code,) = RECIPES[title]
    namespace = {"__name__": "recipe"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if "trainer" in title.lower() or "Light" in title else "error")
        exec(compile(COMMON, "common lines", "exec"), namespace)
        exec(compile(code, title, "exec"), namespace)


def test_the_page_says_how_many_recipes_it_has():
    assert len(RECIPES) == 32
    assert "Thirty-two answers" in PAGE


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_is_short_and_fits_the_page(title):
    """Fourteen statements beside imports, twice as many lines where a trainer wants a class, and 80 columns."""
    (code,) = RECIPES[title]
    lines = [line for line in code.splitlines() if line.strip() and not re.match(r"\s*(import|from) ", line)]
    assert len(lines) <= (28 if "rainer" in code else 14)
    assert max(map(len, lines)) <= 80


def test_every_code_of_the_page_is_a_recipe():
    assert PAGE.count("```python") == len(RECIPES) + 1

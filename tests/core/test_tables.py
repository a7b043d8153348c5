"""Tables as text and as HTML."""

import sys

import pytest

from gradprune.core.tables import as_frame, as_html, as_text, cell

ROWS = [{"layer": "0.weight", "weights": 1200, "value": 0.51234}, {"layer": "<b>", "weights": 3, "value": None}]


def test_words_stand_to_the_left_and_numbers_to_the_right():
    assert as_text(ROWS, ["A note."]).split("\n") == [
        "layer     weights   value",
        "-------------------------",
        "0.weight    1,200  0.5123",
        "<b>             3",
        "A note.",
    ]


def test_html_is_escaped_and_holds_the_same():
    found = as_html(ROWS, ["a < b"])
    assert "<td>1,200</td>" in found
    assert "<td>&lt;b&gt;</td>" in found
    assert found.endswith("<p>a &lt; b</p>")


@pytest.mark.parametrize(("value", "shown"), [(None, ""), (True, "yes"), (False, "no"), (12345, "12,345"), ("x", "x")])
def test_one_value_is_shown_in_short(value, shown):
    assert cell(value) == shown


def test_a_frame_needs_pandas(monkeypatch):
    assert list(as_frame(ROWS).columns) == ["layer", "weights", "value"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        as_frame(ROWS)

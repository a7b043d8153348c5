"""A bar where tqdm is installed and wanted, and none elsewhere."""

import sys

from gradprune.core.progress import bar, over, state


def test_without_tqdm_there_is_no_bar_and_nothing_else_changes(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with bar(3, "work") as progress:
        progress.update()
        progress.set_description("more")
    assert list(over(range(4), "work", 1)) == [1, 2, 3]


def test_with_tqdm_the_same_steps_are_left(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with bar(3, "work", 1) as progress:
        progress.update()
    assert list(over(range(4), "work", 1)) == [1, 2, 3]


def test_a_cost_is_said_unless_bars_are_turned_off(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    state("at most 3 runs")
    assert capsys.readouterr().err == "at most 3 runs\n"
    monkeypatch.setenv("TQDM_DISABLE", "1")
    state("at most 3 runs")
    assert capsys.readouterr().err == ""


def test_bytes_are_shown_with_a_prefix(monkeypatch):
    import io

    from tqdm import auto

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    shown = io.StringIO()
    shown.isatty = lambda: True
    own = auto.tqdm
    monkeypatch.setattr(auto, "tqdm", lambda **given: own(file=shown, **given))
    with bar(3_000_000_000, "packing", unit="B") as progress:
        progress.update(1_500_000_000)
    assert "packing:  50%" in shown.getvalue()
    assert "1.50G/3.00G" in shown.getvalue()

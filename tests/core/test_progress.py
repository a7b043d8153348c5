"""A bar where tqdm is installed and wanted, and none elsewhere."""

import io
import sys

import pytest
from safetensors.torch import save_file
from torch import nn

import gradprune as gp
from gradprune.core.progress import bar, over, state
from gradprune.deploy.compared import contents, differences
from gradprune.deploy.pruned import prune_file


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


@pytest.fixture
def bars(monkeypatch):
    """All that were opened, with what came of them."""
    from tqdm import auto

    opened, own = [], auto.tqdm

    class Recorded(own):
        def __init__(self, **given):
            super().__init__(**given, file=io.StringIO())
            self.given, self.seen = given, 0
            opened.append(self)

        def update(self, n=1):
            self.seen += n

    monkeypatch.setattr(auto, "tqdm", Recorded)
    return opened


WORK = {
    "sharing": lambda model, file: gp.share_weights(model, levels=4),
    "pruning": lambda model, file: prune_file(file, file.with_name("p"), sparsity=0.5),
    "packing": lambda model, file: gp.pack(file, file.with_name("k")),
    "reading": lambda model, file: contents(file),
    "comparing": lambda model, file: differences(file, file),
}


@pytest.mark.parametrize("name", WORK)
def test_a_bar_is_full_when_the_work_is_done(name, bars, tmp_path):
    file = tmp_path / "m.safetensors"
    model = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 20))
    save_file(model.state_dict(), file)
    WORK[name](model, file)
    (one,) = bars
    assert one.given["desc"] == name
    assert 0.99 * one.given["total"] < one.seen <= one.given["total"]  # files have headers too
    assert one.given["unit"] == ("it" if name == "sharing" else "B")

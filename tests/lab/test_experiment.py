"""Does a long experiment survive a kill, and does its file say where it came from and nothing more?"""

import datetime
import json
import math
import os
import sys
from pathlib import Path

import pytest
import safetensors
import torch

from gradprune.lab import experiment, setup

CELLS = [{"method": method, "depth": depth} for method in ("a", "b") for depth in (1, 2, 3)]


class Killed(BaseException):
    """Stands for a kill: nothing that a program may catch by the way."""


class Measure:
    """Counts what is measured, and is killed when its turn has come."""

    def __init__(self, turns=math.inf):
        self.turns, self.cells = turns, []

    def __call__(self, cell):
        if len(self.cells) == self.turns:
            raise Killed
        self.cells.append(cell)
        return {"value": 10 * cell["depth"] + (cell["method"] == "b")}


def strict(path):
    """JSON as its standard has it, without the numbers that Python adds."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


WANTED = [cell | {"value": 10 * cell["depth"] + (cell["method"] == "b")} for cell in CELLS]


@pytest.mark.parametrize("turns", range(len(CELLS) + 1))
def test_a_run_killed_at_any_cell_goes_on_where_it_stopped(tmp_path, turns):
    path = tmp_path / "results" / "e.json"
    first = Measure(turns)
    if turns < len(CELLS):
        with pytest.raises(Killed):
            experiment.run(path, CELLS, first, seeds=[0, 1])
        if turns:
            assert strict(path)["rows"] == WANTED[:turns]
        else:
            assert not path.exists()
    else:
        experiment.run(path, CELLS, first, seeds=[0, 1])
    second = Measure()
    assert experiment.run(path, CELLS, second, seeds=[0, 1]) == WANTED
    assert first.cells + second.cells == CELLS
    assert strict(path)["rows"] == WANTED
    assert os.listdir(path.parent) == ["e.json"]


@pytest.mark.parametrize("rows", [[], [1], [{"a": [1, 2.5], "b": math.inf}, {"a": [], "b": {"c": "x\ny"}}]])
def test_a_row_has_a_line_of_the_file_and_so_has_each_other_entry(tmp_path, rows):
    result = {"about": "lines", "versions": {"torch": "2"}, "rows": rows, "seeds": [0, 1]}
    experiment.save(tmp_path / "e.json", result)
    lines = (tmp_path / "e.json").read_text().splitlines()
    assert len(lines) == 6 + (len(rows) + 1 if rows else 0)
    at = next(number for number, line in enumerate(lines) if line.startswith(' "rows"'))
    for row, line in zip(rows, lines[at + 1 :], strict=False):
        assert experiment._unspelled(json.loads(line.rstrip(","))) == row
    assert experiment._unspelled(strict(tmp_path / "e.json")) == result


def test_the_file_is_whole_at_any_time_also_where_writing_is_cut_off(tmp_path, monkeypatch):
    path = tmp_path / "e.json"
    experiment.save(path, {"rows": [1]})
    before = path.read_bytes()

    def cut(source, target):
        raise Killed

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(Killed):
        experiment.save(path, {"rows": [1, 2]})
    assert path.read_bytes() == before
    with pytest.raises(TypeError):
        experiment.save(path, {"rows": [torch.ones(1)]})
    assert path.read_bytes() == before
    monkeypatch.undo()
    experiment.save(path, {"rows": [1, 2]})
    assert strict(path) == {"rows": [1, 2]}
    assert path.stat().st_mode & 0o777 == 0o644


def test_rows_come_in_the_order_of_the_cells_and_new_cells_are_added(tmp_path):
    path = tmp_path / "e.json"
    experiment.run(path, CELLS[3:], Measure(), seeds=[0])
    more = Measure()
    assert experiment.run(path, CELLS, more, seeds=[0]) == WANTED
    assert more.cells == CELLS[:3]
    assert strict(path)["rows"] == WANTED


@pytest.mark.parametrize("change", ["seeds", "torch"])
def test_a_file_of_other_seeds_or_another_torch_is_measured_anew(tmp_path, change):
    path = tmp_path / "e.json"
    experiment.run(path, CELLS, Measure(), seeds=[0])
    if change == "torch":
        old = json.loads(path.read_text())
        old["versions"]["torch"] = "1.0"
        path.write_text(json.dumps(old))
    again = Measure()
    experiment.run(path, CELLS, again, seeds=[1] if change == "seeds" else [0])
    assert again.cells == CELLS
    assert strict(path)["seeds"] == ([1] if change == "seeds" else [0])
    assert strict(path)["versions"]["torch"] == torch.__version__


def test_cells_that_differ_only_in_what_some_name_are_told_apart(tmp_path):
    cells = [{"net": "mlp"}, {"net": "mlp", "skip": True}]
    rows = experiment.run(tmp_path / "e.json", cells, lambda cell: {"v": cell.get("skip", False)}, seeds=[0])
    assert [row["v"] for row in rows] == [False, True]
    again = experiment.run(tmp_path / "e.json", cells, lambda cell: pytest.fail("measured again"), seeds=[0])
    assert again == rows


def test_what_is_measured_may_have_the_name_that_another_cell_is_told_by(tmp_path):
    cells = [{"what": "time"}, {"what": "time", "batch": 1}, {"what": "time", "batch": 32}, {"what": "step"}]
    path, measured = tmp_path / "e.json", []

    def measure(cell):
        measured.append(cell)
        return {"batch": 128, "seconds": len(measured)} if cell["what"] == "step" else {"seconds": len(measured)}

    rows = experiment.run(path, cells, measure, seeds=[0])
    assert experiment.run(path, cells, measure, seeds=[0]) == rows
    assert measured == cells


def test_no_cells_give_no_rows(tmp_path):
    experiment.run(tmp_path / "e.json", CELLS, Measure(), seeds=[0])
    for path in (tmp_path / "e.json", tmp_path / "other.json"):
        assert experiment.run(path, [], Measure(), seeds=[0]) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": []}', '{"versions": {}, "seeds": [0]}'])
def test_a_file_that_is_no_result_is_named_and_left_as_it_is(tmp_path, text):
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"e\.json is not the result of an experiment; move it away"):
        experiment.run(path, CELLS, Measure(), seeds=[0])
    assert path.read_text() == text


def test_numbers_that_are_not_finite_survive_in_a_file_that_is_json(tmp_path, monkeypatch):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "claims.yml").touch()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "chapters" / "results" / "e.json"
    values = {1: math.inf, 2: -math.inf, 3: math.nan}
    cells = [{"i": i} for i in values]
    rows = experiment.run(path, cells, lambda cell: {"v": [values[cell["i"]]], "w": 0.5}, seeds=[0])
    assert [row["v"] for row in strict(path)["rows"]] == [["inf"], ["-inf"], ["nan"]]
    again = experiment.run(path, cells, lambda cell: pytest.fail("measured again"), seeds=[0])
    for found in (rows, again, experiment.load("e")["rows"]):
        assert found[0]["v"] == [math.inf]
        assert found[1]["v"] == [-math.inf]
        assert math.isnan(found[2]["v"][0])
        assert found[0]["w"] == 0.5


def test_the_head_says_what_made_the_file_without_a_path_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{here}/chapters/e.py", "--out=/srv/x/y.json", "/srv/secret/a b", "--n", "1/2"])
    head = experiment.provenance(range(3))
    assert head["command"] == "python chapters/e.py --out=y.json 'a b' --n 1/2"
    assert head["seeds"] == [0, 1, 2]
    assert head["versions"]["torch"] == torch.__version__
    assert set(head["versions"]) == {"python", "torch", "numpy"}
    assert datetime.date.fromisoformat(head["date"]) <= datetime.date.today()
    monkeypatch.setattr(sys, "argv", [f"{Path(here).parent}/elsewhere/ipykernel_launcher.py", "-f", "/r/k.json"])
    assert experiment.provenance([])["command"] == "python ipykernel_launcher.py -f k.json"
    text = json.dumps(head)
    for private in (here, str(Path.home()), os.uname().nodename):
        assert private not in text


def test_the_machine_is_named_by_its_processor_and_the_cores_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    name, cores = experiment.machine().rsplit(", ", 1)
    assert name
    assert cores == "3 cores"


def test_a_result_is_loaded_by_name_and_a_missing_one_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "repository", lambda: tmp_path)
    experiment.save(tmp_path / "chapters" / "results" / "decay.json", {"rows": [1]})
    assert experiment.load("decay") == {"rows": [1]}
    with pytest.raises(FileNotFoundError, match=r"no recall\.json; `python chapters/experiments/recall\.py` measures"):
        experiment.load("recall")


def test_no_progress_bar_is_drawn_under_a_test(tmp_path, capsys, monkeypatch):
    experiment.run(tmp_path / "e.json", CELLS, Measure(), seeds=[0])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(experiment, "progress_wanted", lambda: True)
    experiment.run(tmp_path / "f.json", CELLS, Measure(), seeds=[0])
    assert "6/6" in capsys.readouterr().err


def test_every_result_of_the_book_is_json_a_row_a_line_and_names_no_path_of_a_machine(tmp_path):
    results = sorted((setup.repository() / "chapters" / "results").glob("*.json"))
    assert results
    for path in results:
        found = strict(path)
        assert {"command", "seeds", "versions", "machine", "date", "rows"} <= set(found)
        assert found["rows"]
        experiment.save(tmp_path / path.name, found)
        assert path.read_text() == (tmp_path / path.name).read_text()
        assert not any(word.startswith("/") for word in found["command"].split())


def test_a_stored_network_comes_back_in_eval_mode_and_says_where_it_came_from(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "repository", lambda: tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    model(torch.randn(8, 3))
    (tmp_path / "chapters" / "results").mkdir(parents=True)
    path = tmp_path / "chapters" / "results" / "small.safetensors"
    experiment.store_network(path, model)
    with safetensors.safe_open(path, framework="pt") as file:
        assert {"command", "versions", "machine", "date"} <= set(json.loads(file.metadata()["gradprune.network"]))

    fresh = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    found = experiment.network("small", fresh)
    assert found is fresh
    assert not found.training
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


def test_a_network_that_was_not_stored_names_the_command_that_trains_it(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "repository", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python chapters/experiments/absent\.py"):
        experiment.network("absent", torch.nn.Linear(1, 1))


def test_another_networks_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "repository", lambda: tmp_path)
    (tmp_path / "chapters" / "results").mkdir(parents=True)
    experiment.store_network(tmp_path / "chapters" / "results" / "small.safetensors", torch.nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        experiment.network("small", torch.nn.Linear(2, 2))


def test_an_experiment_is_imported_with_those_that_it_imports_and_leaves_the_search_path_alone():
    before = list(sys.path)
    assert experiment.script("residual_correction").base is experiment.script("residual_pruning")
    with pytest.raises(FileNotFoundError, match=r"no experiment 'absent': chapters/experiments has no absent\.py"):
        experiment.script("absent")
    assert sys.path == before


def test_of_tied_tensors_one_is_stored_and_both_come_back_tied(tmp_path, monkeypatch):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight

    monkeypatch.setattr(experiment, "repository", lambda: tmp_path)
    (tmp_path / "chapters" / "results").mkdir(parents=True)
    path, model = tmp_path / "chapters" / "results" / "tied.safetensors", Tied()
    experiment.store_network(path, model)
    with safetensors.safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["embedding.weight"]
    found = experiment.network("tied", Tied())
    assert found.head.weight is found.embedding.weight
    assert torch.equal(found.head.weight, model.head.weight)

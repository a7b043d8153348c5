"""Does one run of a stored table, measured again, come out as it is stored, where no chapter does that?"""

import importlib.util
from types import ModuleType

import pytest
import torch

from gradprune import lab
from gradprune.lab.setup import repository


def script(name: str) -> ModuleType:
    """The experiment of that name, imported as a module; nothing is run."""
    path = repository() / "chapters" / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_random_mask_of_the_lottery_reaches_what_is_stored():
    experiment = script("lottery_mnist1d")
    rows = [row for row in lab.experiment.load("lottery_mnist1d")["rows"] if row["method"] == "random"]
    row = max(rows, key=lambda row: row["sparsity"])
    assert experiment.random_mask(row["sparsity"], 0) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_what_a_gate_of_the_lstm_keeps_is_what_is_stored():
    experiment = script("kept_shares")
    rows = lab.experiment.load("kept_shares")["rows"]
    row = next(row for row in rows if row["block"] == "cell, from h")
    found = experiment.measure({name: row[name] for name in ("network", "seed", "block")})
    assert found["weights"] == row["weights"]
    assert found["mean size"] == pytest.approx(row["mean size"], rel=0.05)
    assert found["stays"] == pytest.approx(row["stays"], abs=0.02)


def test_the_stored_residual_network_reads_what_its_row_says():
    data = lab.data.load("mnist1d", seed=0)
    model = lab.experiment.network("residual_network", lab.models.residual())
    rows = lab.experiment.load("residual_pruning")["rows"]
    row = next(row for row in rows if row["seed"] == 0 and row["what"] == "dense")
    assert lab.train.accuracy(model, data.test) == pytest.approx(row["test"], abs=0.01)


def test_a_small_dense_network_trained_again_reads_what_its_row_says(monkeypatch):
    monkeypatch.syspath_prepend(repository() / "chapters" / "experiments")
    experiment = script("residual_correction")
    cell = {"seed": 0, "what": "smaller", "equal": "FLOPs", "sparsity": 0.98}
    rows = lab.experiment.load("residual_correction")["rows"]
    (row,) = (row for row in rows if all(row.get(name) == value for name, value in cell.items()))
    torch.manual_seed(0)
    model = lab.models.residual(row["width"])
    experiment.base.train(model, 0, experiment.STEPS)
    assert lab.train.accuracy(model, experiment.base.data(0).test) == pytest.approx(row["test"], abs=0.06)


def test_the_network_of_a_document_trained_again_reads_what_its_row_says():
    experiment = script("procedures")
    cell = {"what": "rule", "rule": "document 2, program", "threshold": 0.4}
    stored = experiment.row("digits", **cell)
    again = experiment.measure({"data": "digits"} | cell, [0])
    assert again["test"][0] == pytest.approx(stored["test"][0], abs=0.03)
    assert again["zeros"][0] == pytest.approx(stored["zeros"][0], abs=0.02)


def test_the_stored_network_of_the_documents_reads_what_its_row_says():
    data = lab.data.load("digits", seed=0)
    model = lab.experiment.network("documents_network", lab.models.mlp([64, 64, 32, 10]))
    stored = script("procedures").row("digits", "left alone")["test"][0]
    assert lab.train.accuracy(model, data.test) == pytest.approx(stored, abs=0.01)

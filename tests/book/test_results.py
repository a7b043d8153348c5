"""Does one run of a stored table, measured again, come out as it is stored, where no chapter does that?"""

import importlib.util
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

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


def first_row(name: str, **cell: object) -> dict:
    """The row of a stored table that has these values."""
    return next(row for row in lab.experiment.load(name)["rows"] if all(row[key] == cell[key] for key in cell))


DIGITS = {"data": "digits", "network": "perceptron"}


@pytest.fixture
def tested(monkeypatch) -> Callable[[nn.Module], float]:
    """The test accuracy of a perceptron on the digits, seed 0; the experiments may import one another."""
    monkeypatch.syspath_prepend(repository() / "chapters" / "experiments")
    split = lab.data.load("digits", seed=0).test
    return lambda model: lab.train.accuracy(model, split)


def test_a_corrected_perceptron_reads_what_its_row_says(tested):
    row = first_row("correction", **DIGITS, way="magnitude", sparsity=0.9, rounds=1, steps=300)
    _, model, _ = script("correction").corrected(row, row["share of the dense rate"], seed=0)
    assert tested(model) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_a_perceptron_of_five_rounds_reads_what_its_row_says(tested):
    row = first_row("rewinding", **DIGITS, method="learning-rate rewinding", sparsity=0.98)
    model, _ = script("rewinding").run("digits", "perceptron", "learning-rate rewinding", 0)
    assert tested(model) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_a_perceptron_pruned_on_the_cubic_curve_reads_what_its_row_says(tested):
    row = first_row("gradual", **DIGITS, method="cubic", sparsity=0.9)
    model, _ = script("gradual").corrected(row, row["share of the dense rate"], seed=0)
    assert tested(model) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_a_perceptron_of_the_comparison_of_libraries_reads_what_its_row_says(tested):
    row = first_row("peers", **DIGITS, method="gradprune, gradual", sparsity=0.9)
    model, _, _ = script("peers").corrected(row, (row["share of the dense rate"], row["option"]), seed=0)
    assert tested(model) == pytest.approx(row["accuracy"][0], abs=0.04)

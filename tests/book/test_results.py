"""Does one run of a stored table, measured again, come out as it is stored, where no chapter does that?"""

import importlib.util
from types import ModuleType

import pytest

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

"""Do chapter 7's rows say what the protocol says, and does a row work where it can be pruned and size does it?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.zoo import table

protocol = table.protocol()
KNOWN = dataclasses.replace(zoo.by_name("logistic regression"), level=0.95)
SPARSITIES = list(protocol.SPARSITIES)


def cells(
    magnitude: Sequence[float], random: Sequence[float], validation: float = 0.97, name: str = KNOWN.name
) -> list[dict[str, Any]]:
    """A row's cells with these accuracies at each sparsity, over ten seeds that hardly differ."""
    noise = np.linspace(-0.001, 0.001, 10)
    dense = {"validation": [validation] * 10, "test": list(0.90 + noise), "continued": list(0.95 + noise)}
    found = [{"architecture": name, "score": "dense", "scope": "none"} | dense]
    for score, means in (("magnitude", magnitude), ("random", random)):
        values = [list(mean + noise[::-1]) for mean in means]
        for scope in protocol.SCOPES:
            cell = {"architecture": name, "score": score, "scope": scope}
            found.append(cell | {"sparsities": SPARSITIES, "corrected": values})
    return found


def row(*args: Any, **kwargs: Any) -> table.Row:
    return table.rows([KNOWN], cells(*args, **kwargs))[KNOWN.name]


def works_to(*args: Any, **kwargs: Any) -> float | None:
    found = {KNOWN.name: row(*args, **kwargs)}
    return table.works_to(KNOWN.name, table.outcomes(found))


def test_a_row_is_read_where_all_its_cells_are_there():
    whole = cells([0.95] * 5, [0.9] * 5)
    assert list(table.rows([KNOWN], whole)) == [KNOWN.name]
    assert table.rows([KNOWN], whole[:-1]) == {}
    assert table.rows([], whole) == {}


def test_the_growth_is_against_the_dense_network_trained_on():
    found = row([0.95, 0.945, 0.94, 0.9, 0.5], [0.9] * 5)
    assert found.growth(0.5).growth == pytest.approx(0.1)  # 0.055 for 0.05
    assert found.growth(0.8).growth == pytest.approx(0.2)
    assert found.growth(0.8, "random").growth == pytest.approx(1.0)
    assert found.growth(0.5, tolerance=0.05).outcome == "fails"
    assert found.dense("test") == pytest.approx(1 - np.linspace(0.899, 0.901, 10))
    assert found.lead(0.5).mean == pytest.approx(0.045)


def test_it_works_to_where_it_can_be_pruned_and_size_was_better_at_one_sparsity_at_least():
    good, half, lots = [0.95] * 5, [0.95, 0.95, 0.8, 0.8, 0.5], [0.9] * 5
    assert works_to(good, lots) == 0.8
    assert works_to(half, lots) == 0.5
    assert works_to(good, [0.95, 0.95, 0.8, 0.8, 0.8]) == 0.8  # chance is as good at 50 %, and not at 80 %
    assert works_to(half, [0.95, 0.95, 0.7, 0.7, 0.7]) is None  # a lead among ruins is none
    assert works_to(good, good) is None
    assert works_to([0.95, 0.8, 0.95, 0.8, 0.5], lots) is None  # a gap below is no success above
    assert works_to(good, lots, validation=0.94) is None  # never trained to its level


def test_a_row_is_contradicted_only_where_it_fails_at_every_sparsity_judged():
    def contradicted(*args: Any, **kwargs: Any) -> bool:
        return table.contradicted(KNOWN.name, table.outcomes({KNOWN.name: row(*args, **kwargs)}))

    assert contradicted([0.8] * 5, [0.8] * 5)
    assert contradicted([0.95] * 5, [0.97] * 5)  # random pruning errs less at both
    assert not contradicted([0.95, 0.95, 0.8, 0.8, 0.8], [0.8] * 5)
    assert not contradicted([0.8] * 5, [0.8] * 5, validation=0.94)


def test_a_row_below_its_level_is_in_no_family():
    found = {KNOWN.name: row([0.95] * 5, [0.9] * 5, validation=0.94)}
    assert table.outcomes(found) == {}


def test_rows_that_share_a_network_are_one_kind():
    names = ["RNN", "GAN, both pruned", "LSTM", "GAN, generator pruned"]
    assert table.kinds(names) == [("RNN",), ("GAN, both pruned", "GAN, generator pruned"), ("LSTM",)]
    assert table.percent(0.8) == "80 %"


def test_the_measured_rows_were_run_by_the_protocol():
    result = lab.experiment.load("architectures_again")
    assert result["seeds"] == list(protocol.SEEDS)
    assert str(protocol.settings()) in result["about"]
    found = table.rows((*zoo.ARCHITECTURES, *zoo.TODAY), result["rows"])
    assert found
    for one in found.values():
        assert one.sparsities == SPARSITIES
        assert len(one.dense()) == len(one.errors(0.5)) == len(protocol.SEEDS)
        assert set(one.cells["dense", "none"]["shares"].values()) <= set(protocol.SHARES)
        assert one.cells["dense", "none"]["rate"] in one.architecture.rates


def test_one_measured_cell_comes_out_again():
    experiment = lab.experiment.script("architectures_again")
    one = table.rows([zoo.by_name("logistic regression")])["logistic regression"]
    tuned = one.cells["dense", "none"]
    row = dataclasses.replace(one.architecture, rate=tuned["rate"])
    model = experiment.corrected(row, tuned["shares"]["magnitude"], 0, ("magnitude", "layer", 0.8))
    stored = one.cells["magnitude", "layer"]
    found = zoo.base.score(row.task(0), model, "test")
    assert found == pytest.approx(stored["corrected"][SPARSITIES.index(0.8)][0], abs=0.012)  # 4 of 359 digits

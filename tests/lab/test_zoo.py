"""Is every architecture of chapter 7 trained, pruned, held and judged by the one protocol?"""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import gradprune as gp
from gradprune import lab
from gradprune.lab import zoo
from gradprune.lab.zoo import base, tasks

every = pytest.mark.parametrize(
    "architecture", [*zoo.ARCHITECTURES, *zoo.TODAY], ids=lambda architecture: architecture.name
)


def short(architecture: zoo.Architecture, steps: int = 4) -> zoo.Architecture:
    """The same row with a training of a few steps."""
    return dataclasses.replace(architecture, steps=steps)


@every
def test_a_row_trains_prunes_holds_and_is_scored(architecture: zoo.Architecture) -> None:
    task = architecture.task(0)
    model = base.network(architecture, 0)
    before = copy.deepcopy(model.state_dict())
    base.train(architecture, model, task, 2, rate=architecture.rate, seed=0)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    masks = base.prune(architecture, model, "magnitude", "layer", 0.5, 0)
    eligible = sum(mask.numel() for mask in masks.values())
    assert masks.sparsity == pytest.approx(0.5, abs=0.51 / eligible + 0.5 * len(masks) / eligible)
    pruned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    base.train(architecture, model, task, 2, rate=architecture.rate, seed=1, masks=masks)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
    assert any(not torch.equal(value, model.get_parameter(name)) for name, value in pruned.items())
    for part in ("validation", "test"):
        assert math.isfinite(base.score(task, model, part))
        assert all(math.isfinite(value) for value in base.details(task, model, part).values())


@every
def test_a_rows_network_and_data_are_those_of_its_seed(architecture: zoo.Architecture) -> None:
    first, again, other = (base.network(architecture, seed) for seed in (0, 0, 1))
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)]
    assert all(same)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert base.score(architecture.task(0), first, "test") == base.score(architecture.task(0), again, "test")


@every
def test_the_test_part_is_not_what_is_chosen_on(architecture: zoo.Architecture) -> None:
    task, model = architecture.task(0), base.network(architecture, 0)
    base.train(architecture, model, task, 2, rate=architecture.rate, seed=0)
    validation, test = (base.score(task, model, part) for part in ("validation", "test"))
    assert validation != test or architecture.metric == "accuracy"  # two shares of few examples may be equal


@every
def test_a_row_says_what_counts_before_it_is_run(architecture: zoo.Architecture) -> None:
    assert set(architecture.claims) <= set(lab.claims.all_claims())
    assert {lab.claims.all_claims()[claim].chapter for claim in architecture.claims} == {7}
    assert architecture.rate in architecture.rates
    assert len(architecture.rates) == 3
    assert architecture.tolerance > 0
    assert not set(base.SEEDS) & set(base.TUNING_SEEDS)


def test_names_are_unique_and_an_unknown_one_is_an_error() -> None:
    names = [architecture.name for architecture in (*zoo.ARCHITECTURES, *zoo.TODAY)]
    assert len(set(names)) == len(names)
    assert zoo.by_name(names[-1]) is zoo.TODAY[-1]
    with pytest.raises(ValueError, match=r"unknown architecture 'perceptron'; known are .*'perceptron, SGD'"):
        zoo.by_name("perceptron")


def test_one_metric_has_one_tolerance() -> None:
    kinds = {(a.metric, a.higher, a.tolerance, a.relative) for a in zoo.ARCHITECTURES}
    assert len(kinds) == len({metric for metric, *_ in kinds})


ACCURACY = dataclasses.replace(zoo.by_name("logistic regression"), tolerance=0.02)
ERROR = dataclasses.replace(zoo.by_name("linear regression"), tolerance=0.1)


@pytest.mark.parametrize(
    ("architecture", "dense", "corrected", "wanted"),
    [
        (ACCURACY, [0.9, 1.0], [[0.94, 0.93], [0.93, 0.94], [0.5, 0.5]], 0.8),
        (ACCURACY, [0.9, 1.0], [[0.9, 0.9], [0.95, 0.95], [0.95, 0.95]], None),  # a gap below is no success above
        (ACCURACY, [0.9, 1.0], [[0.96, 0.96], [0.9, 0.9], [0.95, 0.95]], 0.5),
        (ACCURACY, [0.9, 1.0], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], 0.9),
        (ACCURACY, [0.9, 1.0], [[math.nan, 1.0], [1.0, 1.0], [1.0, 1.0]], None),
        (ERROR, [0.2, 0.2], [[0.1, 0.1], [0.215, 0.215], [0.23, 0.23]], 0.8),
        (ERROR, [2.0, 2.0], [[2.3, 2.3], [2.0, 2.0], [2.0, 2.0]], None),
    ],
)
def test_the_largest_sparsity_is_the_last_before_the_first_miss(
    architecture: zoo.Architecture, dense: list[float], corrected: list[list[float]], wanted: float | None
) -> None:
    assert base.largest_sparsity(architecture, dense, corrected, [0.5, 0.8, 0.9]) == wanted
    assert base.largest_sparsity(architecture, dense, corrected[::-1], [0.9, 0.8, 0.5]) == wanted  # in any order


def test_lost_tolerance_is_one_at_its_edge_in_either_direction() -> None:
    assert ACCURACY.lost(0.95, 0.93) == pytest.approx(1)
    assert ERROR.lost(0.2, 0.22) == pytest.approx(1)
    assert ACCURACY.lost(0.95, 0.96) == pytest.approx(-0.5)
    assert ACCURACY.reaches(ACCURACY.level)
    assert not ERROR.reaches(ERROR.level + 0.01)


def test_an_advantage_is_paired_and_has_the_sign_of_better() -> None:
    assert base.advantage(ACCURACY, [0.9, 0.8, 0.7], [0.8, 0.7, 0.6]) == pytest.approx((0.1, 0.1, 0.1))
    mean, low, high = base.advantage(ERROR, [0.1, 0.2, 0.3], [0.3, 0.3, 0.5])
    assert mean == pytest.approx(0.5 / 3)
    assert low < mean < high


def test_random_pruning_depends_on_the_seed_and_on_nothing_else() -> None:
    architecture = zoo.by_name("logistic regression")
    one, again, other = (
        base.prune(architecture, base.network(architecture, 0), "random", "global", 0.9, seed)["weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_rate_falls_on_a_straight_line_from_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, *args: object, **kwargs: object) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setitem(base.OPTIMIZERS, "sgd", Watched)
    architecture = dataclasses.replace(zoo.by_name("one weight"), optimizer="sgd", rate=0.4, steps=8)
    model, task = base.network(architecture, 0), architecture.task(0)
    base.correct(architecture, model, task, 0, None)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_two_players_take_turns_each_with_its_own_parameters_and_held_masks() -> None:
    class Game:
        """One player wants its output large, the other small; each moves its own weights alone."""

        def players(self, model: torch.nn.Module) -> list[base.Player]:
            x = torch.ones(1, 4)
            return [
                (model[0].parameters(), lambda generator: -model[0](x).sum()),
                (model[1].parameters(), lambda generator: model[1](x).sum()),
            ]

        def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
            raise AssertionError("a task with players is not asked for its loss")

        def score(self, model: torch.nn.Module, part: str) -> float:
            return 0.0

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    before = [layer.weight.detach().clone() for layer in model]
    masks = gp.prune(model, sparsity=0.5, include="0.weight")
    architecture = dataclasses.replace(zoo.by_name("one weight"), optimizer="sgd")
    base.train(architecture, model, Game(), 3, rate=0.1, seed=0, masks=masks)
    kept = masks["0.weight"]
    assert bool((model[0].weight[kept] > before[0][kept]).all())
    assert not model[0].weight[~kept].any()
    assert bool((model[1].weight < before[1]).all())


def test_a_cell_holds_a_list_over_seeds_for_each_sparsity() -> None:
    architecture = short(zoo.by_name("logistic regression"), 40)
    dense_cell, pruned_cell = base.cells([architecture])[:2]
    assert pruned_cell == {"architecture": "logistic regression", "score": "magnitude", "scope": "global"}
    dense = base.measure(architecture, dense_cell, seeds=(0, 1))
    assert dense["weights"] == 640
    row = base.measure(architecture, pruned_cell, seeds=(0, 1), sparsities=(0.0, 0.98))
    assert np.shape(row["pruned"]) == np.shape(row["corrected"]) == (2, 2)
    assert row["pruned"][0] == dense["test"]  # nothing pruned
    assert row["corrected"][0] == dense["continued"]  # and nothing held
    assert max(row["pruned"][1]) < min(dense["test"])


def test_one_measured_cell_of_the_experiment_comes_out_again() -> None:
    result = lab.experiment.load("architectures")
    rows = {(row["architecture"], row["score"], row["scope"]): row for row in result["rows"]}
    architecture = zoo.by_name("logistic regression")
    seeds, sparsities = base.SEEDS[:2], base.SPARSITIES[1:3]
    for cell in base.cells([architecture])[:2]:
        stored = rows[tuple(cell.values())]
        found = base.measure(architecture, cell, seeds=seeds, sparsities=sparsities)
        if cell["score"] == "dense":
            assert found["test"] == pytest.approx(stored["test"][:2], abs=0.012)  # 4 of 359 digits
        else:
            wanted = [values[:2] for values in stored["corrected"][1:3]]
            np.testing.assert_allclose(found["corrected"], wanted, atol=0.012)


def test_every_row_was_measured_with_the_seeds_and_sparsities_it_is_said_to() -> None:
    result = lab.experiment.load("architectures")
    assert result["seeds"] == list(base.SEEDS)
    found = [{name: row[name] for name in ("architecture", "score", "scope")} for row in result["rows"]]
    assert found == base.cells(zoo.ARCHITECTURES)
    for row in result["rows"]:
        if row["score"] == "dense":
            assert len(row["test"]) == len(row["continued"]) == len(row["validation"]) == len(base.SEEDS)
        else:
            assert row["sparsities"] == list(base.SPARSITIES)
            assert np.shape(row["corrected"]) == (len(base.SPARSITIES), len(base.SEEDS))


def test_the_sparse_line_is_made_by_its_eight_weights() -> None:
    weights = tasks.true_weights(3)
    assert (weights != 0).sum() == tasks.RELEVANT
    split = tasks.sparse_line(3).test
    noise = split.y.numpy()[:, 0] - split.x.numpy() @ weights
    assert noise.std() == pytest.approx(tasks.NOISE, rel=0.1)


def test_a_window_holds_the_past_alone_and_none_reaches_over_an_edge() -> None:
    task = tasks.own_past(0)
    x, y = task.train.x, task.train.y
    assert torch.equal(x[1:, -1], y[:-1, 0])  # what was to be told is the newest of the next window
    before, after = task.train.y[-1, 0], task.validation.x
    assert not (after == before).any()


def test_the_language_model_sees_no_later_character() -> None:
    model = base.network(zoo.by_name("Transformer, text"), 0).eval()
    x = zoo.sequences.text()[:32].repeat(2, 1)
    x[1, 20:] = 0
    with torch.no_grad():
        first, second = model(x)
    torch.testing.assert_close(first[:20], second[:20])
    assert not torch.allclose(first[20:], second[20:])


def test_the_parts_of_the_text_share_no_block() -> None:
    task = zoo.sequences.descriptions(0)
    total = len(zoo.sequences.text())
    assert len(task.train) + len(task.validation) + len(task.test) == total
    spelled = {part: "".join(zoo.sequences.ALPHABET[i] for i in getattr(task, part)) for part in ("train", "test")}
    assert spelled["test"][:200] not in spelled["train"]


def made_up(magnitude: list[float], random: list[float], validation: float = 0.97) -> zoo.table.Row:
    """A row of accuracies at 50, 80 and 90 %, the same after either scope, over three seeds that hardly differ."""
    architecture = dataclasses.replace(ACCURACY, level=0.95)

    def cell(means: list[float]) -> dict[str, object]:
        values = [[mean - 0.001, mean, mean + 0.001] for mean in means]
        return {"sparsities": [0.5, 0.8, 0.9], "pruned": values, "corrected": values}

    dense = {"validation": [validation] * 3, "test": [0.96, 0.96, 0.96], "continued": [0.979, 0.979, 0.979]}
    cells = {("magnitude", s): cell(magnitude) for s in base.SCOPES} | {
        ("random", s): cell(random) for s in base.SCOPES
    }
    return zoo.table.Row(architecture, dense, cells)


def test_it_works_where_magnitude_holds_at_80_percent_and_beats_chance_somewhere() -> None:
    assert made_up([0.96, 0.95, 0.5], [0.9, 0.7, 0.4]).works()
    assert not made_up([0.96, 0.93, 0.5], [0.9, 0.7, 0.4]).works()  # too much lost at 80 %
    assert not made_up([0.96, 0.95, 0.5], [0.96, 0.95, 0.5]).works()  # no better than chance
    assert not made_up([0.96, 0.95, 0.5], [0.9, 0.7, 0.4], validation=0.94).works()  # never trained to its level


def test_it_is_contradicted_where_the_loss_at_80_percent_is_above_the_tolerance_beyond_the_interval() -> None:
    assert not made_up([0.96, 0.95, 0.5], [0.9, 0.7, 0.4]).contradicted()  # it works
    assert made_up([0.96, 0.93, 0.5], [0.9, 0.7, 0.4]).contradicted()
    assert not made_up([0.96, 0.939, 0.5], [0.9, 0.7, 0.4]).contradicted()  # the interval reaches into the tolerance
    assert not made_up([0.96, 0.93, 0.5], [0.9, 0.7, 0.4], validation=0.94).contradicted()  # never trained
    assert not made_up([0.96, 0.95, 0.5], [0.96, 0.95, 0.5]).contradicted()  # no better than chance: not shown


def test_a_rows_summary_is_of_its_own_cells() -> None:
    row = made_up([0.96, 0.95, 0.5], [0.9, 0.95, 0.6])
    assert row.largest("magnitude", "global") == 0.8
    assert row.largest("random", "global") is None
    assert row.largest("magnitude", "global", against="continued") == 0.5
    assert row.ahead("layer") == [True, False, False]
    assert row.behind("layer") == [False, False, True]
    assert row.lost("magnitude", "layer") == pytest.approx([0, 0.5, 23])
    assert zoo.table.percent(0.95) == "95 %"
    assert zoo.table.percent(None) == "none"

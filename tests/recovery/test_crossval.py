"""Folds that are the same for every setting, intervals that know of their overlap, and the choice beside the best."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

import gradprune as gp

X = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50)


def build():
    return nn.Linear(4, 1)


def untrained(model, data, setting):
    pass


def test_each_example_is_evaluated_once_a_setting_and_never_trained_on_in_its_fold():
    seen = {"a": [], "b": []}
    trained = []

    def train(model, data, setting):
        trained.append(set(data[1].tolist()))
        model.setting = setting

    def evaluate(model, data):
        rows = data[1].tolist()
        assert not trained[-1] & set(rows)
        assert trained[-1] | set(rows) == set(range(50))
        seen[model.setting] += [rows]
        return 0.0 if model.setting == "a" else 1.0

    table = gp.cross_validate(build, train, evaluate, (X, Y), folds=4, settings=["a", "b"])
    assert seen["a"] == seen["b"]
    assert sorted(row for rows in seen["a"] for row in rows) == list(range(50))
    assert sorted(map(len, seen["a"])) == [12, 12, 13, 13]
    assert table.values == {"a": [0.0] * 4, "b": [1.0] * 4}


def test_on_one_fold_all_settings_start_from_the_same_random_state_which_is_put_back():
    drawn = {1: [], 2: []}
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def train(model, data, setting):
        drawn[setting].append((model.weight.sum().item(), torch.rand(()).item()))

    gp.cross_validate(build, train, lambda m, d: 0.0, X, folds=3, settings={"a": 1, "b": 2})
    assert drawn[1] == drawn[2]
    assert len(set(drawn[1])) == 3
    assert torch.equal(state, torch.get_rng_state())


VALUES = {"sparse": [0.90, 0.80, 0.85, 0.95], "half": [0.94, 0.85, 0.88, 0.99], "dense": [0.95, 0.84, 0.90, 0.99]}


def validated(values):
    left = {name: list(row) for name, row in values.items()}
    evaluate = lambda model, data: left[model.name].pop(0)  # noqa: E731

    def train(model, data, setting):
        model.name = setting

    return gp.cross_validate(build, train, evaluate, X, folds=4, settings=list(values))


def test_it_goes_on_from_the_file_and_ends_as_if_it_had_not_stopped(tmp_path):
    path, calls = tmp_path / "folds.json", []

    def train(model, data, setting):
        calls.append(setting)
        if len(calls) == 6:
            raise KeyboardInterrupt
        model.weight.data.add_(setting * torch.rand(1, 4))

    def evaluate(model, data):
        return -model(data[0]).square().mean()

    def call(file, train=train, **how):
        given = {"folds": 4, "settings": {"a": 0.0, "b": 1.0}} | how
        return gp.cross_validate(build, train, evaluate, (X, Y), file=file, **given)

    with pytest.raises(KeyboardInterrupt):
        call(path)
    found = call(path)
    assert calls == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert found.values == call(tmp_path / "other.json").values == call(None).values
    assert call(path, train=lambda model, data, setting: 1 / 0).values == found.values
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folds.json", "other.json"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"folds": 3}, "other folds"),
        ({"seed": 1}, "other seed"),
        ({"settings": ["a", "c"]}, "other settings"),
        ({"settings": {"a": "a", "b": "c"}}, "other values of settings"),
        ({"settings": {"a": "a", "b": {"rate": 0.1}}}, "other values of settings"),
        ({"data": X + 1}, "other data"),
        ({"data": X[:40]}, "other examples"),
        ({"text": "[]"}, "is no file of gp.cross_validate, or damaged"),
        ({"text": "{"}, "or damaged"),
        ({"text": lambda t: t.replace("0.0", '"0"')}, "or damaged"),
        ({"text": lambda t: t.replace("0.0, 0.0, ", "", 1).replace('"b": [0.0', '"b": [NaN')}, "or damaged"),
        ({"text": lambda t: t.replace("[0.0, ", "[", 1).replace("[0.0, ", "[", 1)}, "or damaged"),
    ],
)
def test_a_file_of_another_call_is_refused_before_anything_is_trained(tmp_path, how, said):
    path = tmp_path / "folds.json"
    call = {"folds": 4, "settings": ["a", "b"], "data": X}
    run = lambda train, data, **how: gp.cross_validate(build, train, lambda m, d: 0.0, data, file=path, **how)  # noqa: E731
    run(untrained, **call)
    text = how.pop("text", None) if "text" in how else None
    if text is not None:
        path.write_text(text(path.read_text()) if callable(text) else text)
    with pytest.raises(ValueError, match=said):
        run(lambda model, data, setting: 1 / 0, **call | how)


def test_differences_are_paired_and_their_intervals_know_that_folds_share_examples():
    table = validated(VALUES)
    gaps = np.subtract(VALUES["half"], VALUES["sparse"])
    error = gaps.std(ddof=1) * np.sqrt(1 / 4 + 1 / 3)
    found = table.difference("half")
    low, high = stats.t.interval(0.95, 3, gaps.mean(), error)
    assert (found.mean, found.low, found.high) == pytest.approx((gaps.mean(), low, high))
    assert found.p == pytest.approx(2 * stats.t.sf(gaps.mean() / error, 3))
    assert table.standard_error("half") == pytest.approx(np.std(VALUES["half"], ddof=1) * np.sqrt(7 / 12))


def test_the_one_standard_error_choice_is_the_first_that_is_about_as_good_as_the_best():
    table = validated(VALUES)
    assert (table.best, table.one_standard_error) == ("dense", "sparse")
    close = validated(VALUES | {"dense": [1.0, 0.999, 1.0, 0.999], "sparse": [0.5, 0.6, 0.5, 0.6]})
    assert close.one_standard_error == "dense"
    assert "first within one standard error of it: 'sparse'" in str(table)


def test_outcomes_are_those_of_holm():
    table = validated(VALUES)
    assert set(table.outcomes()) == {"half", "dense"}
    apart = validated({"a": [0.1, 0.2, 0.1, 0.2], "b": [0.9, 1.0, 0.9, 1.01], "c": [0.1, 0.2, 0.1, 0.2]})
    assert apart.outcomes() == {"b": "better", "c": "not shown"}
    rows = apart.rows()
    assert rows[0]["outcome"] == "reference"
    assert rows[1]["low"] > 0


class Guess(nn.Module):
    """The mean of one column of what it was trained on."""

    def fit(self, data, at):
        self.at, self.guess = at, data[:, at].mean()


def test_the_corrected_interval_says_a_difference_where_there_is_none_less_often_than_the_plain_one():
    """Two settings that are alike, over many data sets."""
    generator = torch.Generator().manual_seed(0)
    plain = corrected = 0
    for run in range(150):
        table = gp.cross_validate(
            lambda: Guess(),
            lambda model, data, at: model.fit(data, at),
            lambda model, data: -(data[:, model.at] - model.guess).square().mean(),
            torch.randn(30, 2, generator=generator),
            settings={"a": 0, "b": 1},
            seed=run,
        )
        gap = table.difference("b")
        corrected += gap.low > 0 or gap.high < 0
        plain += stats.ttest_rel(table.values["b"], table.values["a"]).pvalue < 0.05
    assert corrected < plain
    assert corrected / 150 < 0.08


def test_data_sets_arrays_and_several_tensors_come_back_in_their_form():
    kinds = []

    def evaluate(model, data):
        kinds.append(type(data).__name__)
        return torch.ones(len(data[0]))

    for data in (X, X.numpy(), (X, Y), TensorDataset(X, Y)):
        gp.cross_validate(build, untrained, evaluate, data, folds=2, settings=[1])
    assert kinds[::2] == ["Tensor", "ndarray", "tuple", "Subset"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"folds": 1}, "folds"),
        ({"folds": 51}, "fewer than folds"),
        ({"settings": []}, "settings is empty"),
        ({"settings": ["a", "a"]}, "one name"),
        ({"reference": "z"}, "reference must be one of"),
        ({"data": (X, Y[:3])}, "one length"),
        ({"evaluate": lambda m, d: float("nan")}, "nan for 'a' on fold 0"),
        ({"evaluate": lambda m, d: None}, "returned None"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(given, said):
    arguments = {
        "build": build, "train": untrained, "evaluate": lambda m, d: 1.0, "data": X, "folds": 2, "settings": ["a", "b"],
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        gp.cross_validate(**(arguments | given))


def test_a_network_that_was_trained_before_is_refused_whole_or_in_part():
    net, trained = nn.Linear(4, 1), []
    train = lambda model, data, setting: trained.append(1)  # noqa: E731
    for build in (lambda: net, lambda: nn.Sequential(net, nn.ReLU())):
        with pytest.raises(ValueError, match="build returned a network that was trained before"):
            gp.cross_validate(build, train, lambda m, d: 1.0, X, folds=2, settings=["a"])
    assert len(trained) == 2
    gp.cross_validate(lambda: copy.deepcopy(net), train, lambda m, d: 1.0, X, folds=2, settings=["a"])
    frozen = nn.Linear(4, 4).requires_grad_(False)
    build = lambda: nn.Sequential(frozen, nn.Linear(4, 1))  # noqa: E731
    gp.cross_validate(build, train, lambda m, d: 1.0, X, folds=2, settings=["a"])


def test_a_network_in_the_place_of_what_builds_one_is_said():
    with pytest.raises(TypeError, match=r"build must be a function that returns a new network, got a Linear.*deepcopy"):
        gp.cross_validate(nn.Linear(4, 1), untrained, lambda m, d: 1.0, X, folds=2, settings=["a"])


def test_it_prints_a_table_and_draws_the_folds():
    table = validated(VALUES)
    assert "standard error" in str(table)
    assert "<table>" in table._repr_html_()
    assert list(table.to_frame().index) == list(VALUES)
    assert [text.get_text() for text in table.plot().axes[0].get_xticklabels()] == list(VALUES)


def test_settings_are_called_as_functions_are_or_as_they_print():
    given = {"build": build, "train": untrained, "evaluate": lambda m, d: 1.0, "data": X, "folds": 2}
    found = gp.cross_validate(**given, settings=[gp.magnitude, 0.5, "a"])
    assert list(found.to_frame().index) == ["magnitude", "0.5", "a"]

"""A search: what a trial does, that it goes on from its file, and that the model stays as it was."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import gradprune as gp

optuna = pytest.importorskip("optuna")

X = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


TRUTH = network()(X).argmax(1)


def correct(model):
    return model(X).argmax(1) == TRUTH


def nonzeros(model):
    return gp.report(model).total.nonzeros


SPACE = {"score": [gp.magnitude, gp.random], "sparsity": [0.3, 0.6, 0.9], "scope": ["global", "layer"]}


def test_a_grid_tries_every_combination_once_and_the_best_is_that_of_a_loop():
    model = network()
    before = copy.deepcopy(model.state_dict())
    space = {"sparsity": [0.3, 0.6, 0.9], "scope": ["global", "layer", "row"]}
    study = gp.search(model, correct, space, sampler="grid")
    assert len({(row["sparsity"], row["scope"]) for row in study.rows()}) == len(study) == 9
    values = {}
    for scope in space["scope"]:
        for sparsity in space["sparsity"]:
            pruned = copy.deepcopy(model)
            gp.prune(pruned, sparsity=sparsity, scope=scope)
            values[scope, sparsity] = float(correct(pruned).float().mean())
    assert study.study.best_value == pytest.approx(max(values.values()))
    assert values[study.best["scope"], study.best["sparsity"]] == pytest.approx(max(values.values()))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    gp.prune(copy.deepcopy(model), **study.best)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_seed_draws_the_same_trials_again(sampler):
    space = SPACE | {"sparsity": (0.2, 0.9), "score": gp.magnitude}
    one, two = (gp.search(network(), correct, space, trials=6, sampler=sampler, seed=3) for _ in range(2))
    assert one.rows() == two.rows()
    assert one.rows() != gp.search(network(), correct, space, trials=6, sampler=sampler, seed=4).rows()


def test_two_aims_give_the_front_that_no_other_trial_beats():
    space = {"sparsity": (0.1, 0.95), "scope": ["global", "layer"]}
    study = gp.search(network(), correct, space, trials=12, cost=nonzeros, seed=0)
    rows, front = study.rows(), study.pareto
    theirs = {trial.number for trial in study.study.best_trials}
    assert {row["trial"] for row in front} == theirs
    assert [row["cost"] for row in front] == sorted(row["cost"] for row in front)
    assert [row["value"] for row in front] == sorted(row["value"] for row in front)
    assert len(front) < len(rows)
    assert study.two_aims
    assert [line.get_label() for line in study.plot().axes[0].get_lines()] == ["a trial", "no other beats it"]


def test_a_trial_trains_with_what_was_drawn_and_its_masks_hold():
    seen = []

    def train(model, trial):
        optimizer = torch.optim.SGD(model.parameters(), lr=trial["lr"])
        trial.hold(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), TRUTH).backward()
            optimizer.step()
        seen.append((trial["lr"], trial.masks.holds(model), trial.masks.sparsity, trial["sparsity"]))

    gp.search(network(), correct, {"sparsity": (0.2, 0.9), "lr": (0.01, 0.1)}, trials=4, train=train, seed=0)
    assert len({lr for lr, *_ in seen}) == 4
    assert all(holds for _, holds, *_ in seen)
    assert all(abs(a - b) < 0.01 for *_, a, b in seen)


def test_where_no_amount_is_drawn_train_prunes_by_the_schedule_that_was():
    schedules = {"at once": gp.OneShot(0.5), "in rounds": gp.Geometric(0.2, every=1, rounds=3)}

    def train(model, trial):
        assert trial.masks is None
        assert trial.hold(torch.optim.SGD(model.parameters(), lr=0.1)) is None
        for step in range(1, 4):
            gp.prune(model, sparsity=trial["schedule"](step), score=trial["score"])

    study = gp.search(
        network(), nonzeros, {"schedule": schedules, "score": [gp.magnitude]}, sampler="grid", train=train
    )
    assert {row["schedule"] for row in study.rows()} == {"at once", "in rounds"}
    assert study.best["schedule"] is schedules["in rounds"]


def test_hopeless_trials_are_ended_early():
    steps = []

    def train(model, trial):
        for step in range(10):
            steps.append(trial.number)
            trial.report(-float(trial["sparsity"]), step)

    study = gp.search(
        network(), nonzeros, {"sparsity": [0.1 + 0.02 * k for k in range(20)]}, sampler="grid", train=train
    )
    ended = [row for row in study.rows() if row["ended"] == "hopeless"]
    assert len(ended) >= 3
    assert all(row["value"] is None and steps.count(row["trial"]) < 10 for row in ended)
    assert f"{len(ended)} ended as hopeless" in str(study)


def test_what_prune_refuses_and_what_is_not_finite_is_noted_and_passed_over():
    space = {"granularity": ["weight", "2:4"], "sparsity": [0.3, 0.9]}
    study = gp.search(
        network(), lambda m: float("nan") if gp.report(m).total.sparsity > 0.6 else 1.0, space, sampler="grid"
    )
    ended = {(row["granularity"], row["sparsity"]): row["ended"] for row in study.rows()}
    assert ended["weight", "0.3"] == ""
    assert "nan" in ended["weight", "0.9"]
    assert "itself a sparsity" in ended["2:4", "0.9"]
    assert f"0 ended as hopeless, {sum(map(bool, ended.values()))} did not fit" in str(study)
    with pytest.raises(ValueError, match="no trial fitted; the first: granularity 2:4"):
        gp.search(network(), correct, {"granularity": "2:4", "sparsity": [0.3, 0.9]}, sampler="grid")


def test_an_error_of_the_users_passes_and_the_file_goes_on_after_it(tmp_path):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("a user's own")
        return correct(model)

    file, space = tmp_path / "study.db", {"sparsity": (0.1, 0.9)}
    with pytest.raises(RuntimeError, match="a user's own"):
        gp.search(network(), evaluate, space, trials=8, storage=file, seed=0)
    study = gp.search(network(), evaluate, space, trials=8, storage=file, seed=0)
    assert sum(row["value"] is not None for row in study.rows()) == 8
    assert len(calls) == 9
    ended = [row["ended"] for row in study.rows()]
    assert (ended.count("broken off"), ended.count("hopeless")) == (1, 0)
    assert "0 ended as hopeless, 0 did not fit, 1 were broken off" in str(study)
    assert len({row["sparsity"] for row in study.rows()}) == len(study)
    assert len(gp.search(network(), lambda m: 1 / 0, space, trials=8, storage=file).rows()) == len(study)


def test_a_space_named_in_another_order_is_the_same(tmp_path):
    space = {"sparsity": (0.1, 0.9), "scope": ["global", "layer"]}
    other = dict(reversed(space.items()))
    gp.search(network(), correct, space, trials=1, storage=tmp_path / "study.db")
    assert len(gp.search(network(), correct, other, trials=2, storage=tmp_path / "study.db").rows()) == 2


def test_choices_without_a_name_are_refused():
    with pytest.raises(ValueError, match=r"space\['scope'\] must have names as keys"):
        gp.search(network(), correct, {"sparsity": (0.1, 0.9), "scope": {}}, trials=1)


def test_a_file_of_another_space_or_kind_is_refused(tmp_path):
    file = tmp_path / "study.db"
    gp.search(network(), correct, {"sparsity": (0.1, 0.9)}, trials=1, storage=file)
    with pytest.raises(ValueError, match="other space"):
        gp.search(network(), correct, {"sparsity": (0.1, 0.8)}, trials=1, storage=file)
    with pytest.raises(ValueError, match=r"without a cost|with a cost"):
        gp.search(network(), correct, {"sparsity": (0.1, 0.9)}, trials=1, storage=file, cost=nonzeros)
    other = network()
    other[0].bias.data.add_(1)
    with pytest.raises(ValueError, match="other weights"):
        gp.search(other, lambda m: 1 / 0, {"sparsity": (0.1, 0.9)}, trials=1, storage=file)
    (tmp_path / "text").write_text("something else")
    with pytest.raises(ValueError, match="no SQLite file"):
        gp.search(network(), correct, {"sparsity": (0.1, 0.9)}, trials=1, storage=tmp_path / "text")


SCRIPT = """
import sys, time, torch
from torch import nn
import gradprune as gp
torch.manual_seed(0)
model, calls = nn.Linear(8, 8), []
def evaluate(model):
    calls.append(1)
    if len(calls) > int(sys.argv[2]):
        print("waiting", flush=True)
        time.sleep(600)
    return float((model.weight != 0).sum())
study = gp.search(model, evaluate, {"sparsity": [0.1, 0.3, 0.5, 0.7], "score": [gp.magnitude, gp.random]},
                  sampler="grid", storage=sys.argv[1])
print(len(calls), sum(row["value"] is not None for row in study.rows()),
      len({(row["sparsity"], row["score"]) for row in study.rows() if row["value"] is not None}), flush=True)
"""


def test_a_killed_search_is_gone_on_from_in_a_fresh_process_without_losing_a_combination(tmp_path):
    def start(allowed):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "study.db"), str(allowed)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    killed = start(3)
    assert killed.stdout.readline() == "waiting\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    resumed, _ = start(100).communicate()
    assert resumed.split() == ["5", "8", "8"]


def test_several_processes_share_one_file(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "study.db"), "100"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    outputs = [process.communicate()[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [int(distinct) for _, _, distinct in outputs] == [8, 8]


def test_threads_share_the_trials():
    study = gp.search(network(), correct, {"sparsity": (0.1, 0.9)}, trials=8, n_jobs=2)
    assert len(study) == 8


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "space is empty"),
        ({"sparsity": (0.9, 0.1)}, "low < high"),
        ({"sparsity": (0.5, 0.5)}, "low < high"),
        ({"sparsity": (0.1, 0.5, 0.9)}, "a pair"),
        ({"sparsity": []}, "empty"),
        ({"score": [lambda m: None, lambda m: 1]}, "need names, as a dict"),
        ({"score": [object()]}, "need names, as a dict"),
        ({"score": [lambda m: None]}, "need names, as a dict"),
        ({"sparsty": (0.0, 0.9)}, "names 'sparsty', which prune does not take; did you mean 'sparsity'"),
        ({"sparsity": 0.5, "lr": (0.1, 0.2)}, "names 'lr', which prune does not take: Only train"),
        ({"score": [gp.magnitude, gp.random]}, "says nowhere how much"),
        ({"model": [1]}, "names 'model', which prune does not take"),
        ({"sparsity": [0.5, 0.5]}, "need names, as a dict"),
    ],
)
def test_a_space_that_says_too_little_is_refused(space, said):
    with pytest.raises(ValueError, match=said):
        gp.search(network(), correct, space, trials=1)


def test_distributions_of_optuna_are_taken_as_they_are():
    space = {"sparsity": optuna.distributions.FloatDistribution(0.001, 0.9, log=True), "min_keep": range(1, 3)}
    row = gp.search(network(), correct, space, trials=1, seed=0).rows()[0]
    assert 0.001 <= row["sparsity"] <= 0.9
    with pytest.raises(ValueError, match="a grid needs lists"):
        gp.search(network(), correct, space, sampler="grid")
    with pytest.raises(ValueError, match="trials is missing"):
        gp.search(network(), correct, space)


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'gradprune\[search\]'"):
        gp.search(network(), correct, {"sparsity": [0.5]}, trials=1)


def test_optunas_own_lines_are_silent_only_meanwhile(capfd):
    before = optuna.logging.get_verbosity()
    study = gp.search(network(), correct, {"sparsity": [0.2, 0.5]}, sampler="grid")
    assert "Trial" not in capfd.readouterr().err
    assert optuna.logging.get_verbosity() == before
    assert "<table>" in study._repr_html_()
    assert list(study.to_frame().trial) == [0, 1]
    assert study.plot().axes[0].get_xlabel() == "trial"


def test_a_file_is_named_in_the_message_that_refuses_it(tmp_path):
    gp.search(network(), correct, {"sparsity": (0.1, 0.9)}, trials=1, storage=tmp_path / "study.db")
    with pytest.raises(ValueError, match=r"study\.db' is of a search with other space"):
        gp.search(network(), correct, {"sparsity": (0.1, 0.8)}, trials=1, storage=tmp_path / "study.db")
    with pytest.raises(ValueError, match=r"study\.db' is of a search without a cost"):
        gp.search(network(), correct, {"sparsity": (0.1, 0.9)}, trials=1, storage=tmp_path / "study.db", cost=nonzeros)
    (tmp_path / "text").write_text("something else")
    with pytest.raises(ValueError, match=r"text' is no SQLite file"):
        gp.search(network(), correct, {"sparsity": (0.1, 0.9)}, trials=1, storage=tmp_path / "text")


@pytest.mark.parametrize(("granularity", "pruned"), [((2, 4), True), ("2:4", True), ((2, 2), False), ("2x2", False)])
def test_only_n_of_m_prunes_without_an_amount(granularity, pruned):
    given = []
    gp.search(
        network(),
        correct,
        {"granularity": {"drawn": granularity}},
        sampler="grid",
        train=lambda model, trial: given.append(trial.masks),
    )
    assert [masks is not None for masks in given] == [pruned]


@pytest.mark.parametrize("name", ["sparsity", "threshold"])
def test_a_sparsity_between_whole_numbers_is_a_fraction(name):
    rows = gp.search(network(), lambda m: 0.0, {name: (0, 1)}, trials=5, seed=0).rows()
    assert all(0 < row[name] < 1 for row in rows)
    drawn = gp.search(network(), correct, {"sparsity": 0.5, "min_keep": (1, 3)}, trials=3, seed=0).rows()
    assert all(row["min_keep"] in (1, 2, 3) for row in drawn)


def test_an_interrupted_trial_is_not_said_to_be_hopeless(tmp_path):
    def interrupted(model):
        raise KeyboardInterrupt

    file, space = tmp_path / "study.db", {"sparsity": (0.1, 0.9)}
    with pytest.raises(KeyboardInterrupt):
        gp.search(network(), interrupted, space, trials=2, storage=file)
    assert [row["ended"] for row in gp.search(network(), correct, space, trials=2, storage=file).rows()] == [
        "broken off",
        "",
        "",
    ]


def test_a_study_says_in_a_line_how_many_trials_and_the_best_value():
    study = gp.search(network(), lambda m: 0.25, {"sparsity": [0.2, 0.5]}, sampler="grid")
    assert repr(study) == "Study(2 trials, the best value 0.25, see .best)"


def test_an_address_of_a_database_is_refused_in_words():
    with pytest.raises(ValueError, match=r"the path of an SQLite file, such as 'study\.db', not an address"):
        gp.search(network(), correct, {"sparsity": (0.1, 0.9)}, trials=1, storage="sqlite:///study.db")


def test_a_combination_that_was_broken_off_is_tried_again(tmp_path):
    seen, space = [], {"sparsity": [0.1, 0.3, 0.5, 0.7], "scope": ["global", "layer"]}

    def evaluate(model):
        seen.append(1)
        if len(seen) in (2, 5):
            raise KeyboardInterrupt
        return nonzeros(model)

    how = {"sampler": "grid", "storage": tmp_path / "study.db"}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            gp.search(network(), evaluate, space, **how)
    rows = [row for row in gp.search(network(), evaluate, space, **how).rows() if row["value"] is not None]
    assert len(rows) == len({(row["sparsity"], row["scope"]) for row in rows}) == 8
    assert len(seen) == 8 + 2

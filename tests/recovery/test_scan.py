"""A scan of layers: what it evaluates, what it leaves behind, and that it goes on where it was killed."""

import copy
import json
import os
import signal
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import gradprune as gp

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
LEVELS = [0.25, 0.5, 0.9]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def correct(model):
    """Which answers are those of the dense network; in training mode, so that a norm's averages move."""
    model.train()
    return model(X).argmax(1) == TRUTH


TRUTH = network()(X).argmax(1)


def everything(model):
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return {n: t.clone() for n, t in model.state_dict().items()}, [m.training for m in model.modules()], gradients


def same(before, after):
    tensors = all(
        torch.equal(before[0][n].view(-1).view(torch.uint8), after[0][n].view(-1).view(torch.uint8)) for n in before[0]
    )
    gradients = all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    return tensors and before[0].keys() == after[0].keys() and before[1] == after[1] and gradients


@pytest.mark.parametrize("granularity", ["weight", "channel", "1x4"])
def test_each_layer_alone_is_pruned_as_prune_does_and_nothing_else_is_evaluated(granularity):
    model, seen = network(), []

    def evaluate(pruned):
        seen.append([p.detach().clone() for p in pruned.parameters()])
        return 1.0

    found = gp.sensitivity(model, evaluate, LEVELS, granularity=granularity)
    assert len(seen) == 1 + 2 * len(LEVELS)
    states = iter(seen[1:])
    for name in found.values:
        for sparsity in LEVELS:
            wanted = copy.deepcopy(model)
            gp.prune(wanted, scope={name: sparsity}, granularity=granularity)
            assert all(torch.equal(a, b) for a, b in zip(next(states), wanted.parameters(), strict=True))


def test_a_group_of_coupled_channels_is_pruned_alone_with_its_norms_and_goes_on_from_the_file(tmp_path):
    pytest.importorskip("torch_pruning")
    model, seen = network(), []
    model[1].bias.data.fill_(0.5)
    before = everything(model)

    def evaluate(pruned):
        seen.append({name: p.detach().clone() for name, p in pruned.named_parameters()})
        if len(seen) == 3:
            raise KeyboardInterrupt
        return float(len(seen))

    how = {"granularity": "group", "example": X, "file": tmp_path / "scan.json"}
    with pytest.raises(KeyboardInterrupt):
        gp.sensitivity(model, evaluate, LEVELS, **how)
    assert same(before, everything(model))
    found = gp.sensitivity(model, evaluate, LEVELS, **how)
    assert same(before, everything(model))
    assert list(found.values) == ["0.weight"]  # the others are the network's outputs
    assert found.weights == {"0.weight": 96}
    assert len(seen) == 1 + len(LEVELS) + 1  # one was broken off
    for sparsity, state in zip([0.25, 0.5, 0.5, 0.9], seen[1:], strict=True):
        wanted = copy.deepcopy(model)
        gp.prune(wanted, scope={"0.weight": sparsity}, granularity="group", example=X)
        assert all(torch.equal(state[name], p) for name, p in wanted.named_parameters())
        assert int((state["1.bias"] == 0).sum()) == round(12 * sparsity)
    with pytest.raises(ValueError, match="example is for granularity='group'"):
        gp.sensitivity(model, evaluate, LEVELS, example=X)
    with pytest.raises(ValueError, match="needs example="):
        gp.sensitivity(model, evaluate, LEVELS, granularity="group")


def test_the_masks_of_a_layer_lie_within_each_other():
    zeros = []
    gp.sensitivity(network(), lambda m: zeros.append(m[0].weight.detach() == 0) or 0.0, LEVELS, include="0.*")
    for fewer, more in pairwise(zeros):
        assert bool((more | ~fewer).all())
    assert [int(z.sum()) for z in zeros] == [0, 24, 48, 86]


def test_the_score_is_asked_once():
    asked = []

    def score(model):
        asked.append(1)
        return gp.magnitude(model)

    gp.sensitivity(network(), correct, LEVELS, score=score)
    assert len(asked) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_the_model_is_as_it_was_bit_by_bit_after_an_exception(error, after):
    model = network()
    model(X).sum().backward()
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[0, 1] = -0.0, float("inf")
    before, calls = everything(model), []

    def evaluate(pruned):
        pruned.eval()
        pruned.zero_grad()
        calls.append(1)
        if len(calls) > after:
            raise error
        return 0.5

    with pytest.raises(error):
        gp.sensitivity(model, evaluate, LEVELS)
    assert same(before, everything(model))


def test_a_network_in_training_mode_keeps_its_averages_and_every_evaluation_starts_from_them():
    model = network()
    before, seen = everything(model), []
    gp.sensitivity(model, lambda m: seen.append(m[1].running_mean.clone()) or correct(m).float(), LEVELS)
    assert same(before, everything(model))
    assert all(torch.equal(mean, before[0]["1.running_mean"]) for mean in seen)


def test_it_goes_on_from_the_file_and_ends_as_if_it_had_not_stopped(tmp_path):
    path, model, calls = tmp_path / "scan.json", network(), []

    def evaluate(pruned):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return correct(pruned)

    with pytest.raises(KeyboardInterrupt):
        gp.sensitivity(model, evaluate, LEVELS, file=path)
    found = gp.sensitivity(model, evaluate, LEVELS, file=path)
    assert len(calls) == 1 + 2 * len(LEVELS) + 1  # the one that was interrupted
    assert found == gp.sensitivity(model, correct, LEVELS)
    assert found.values == gp.sensitivity(model, correct, LEVELS).values
    again = gp.sensitivity(model, lambda m: 1 / 0, LEVELS, file=path)
    assert again.values == found.values
    assert [p.name for p in tmp_path.iterdir()] == ["scan.json"]


SCRIPT = """
import sys, time, torch
from torch import nn
import gradprune as gp
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
calls = []
def evaluate(model):
    calls.append(1)
    if len(calls) > int(sys.argv[2]):
        print("waiting", flush=True)
        time.sleep(600)
    return model(torch.ones(4, 8)).sum()
found = gp.sensitivity(model, evaluate, [0.25, 0.5, 0.9], file=sys.argv[1])
print(len(calls), found.values, flush=True)
"""


def test_a_killed_process_is_gone_on_from_in_a_fresh_one(tmp_path):
    def start(allowed):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "scan.json"), str(allowed)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    killed = start(4)
    assert killed.stdout.readline() == "waiting\n"
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    resumed, _ = start(100).communicate()
    whole = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "other.json"), "100"], capture_output=True, text=True, check=True
    ).stdout
    assert resumed.split(" ", 1)[0] == "3"
    assert whole.split(" ", 1)[0] == "7"
    assert resumed.split(" ", 1)[1] == whole.split(" ", 1)[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told["gradprune.sensitivity"].update(sparsities=[0.1, 0.2, 0.3]), "other sparsities"),
        (lambda told: told["gradprune.sensitivity"].update(weights=1), "other weights"),
        (lambda told: told.update(values={}), "damaged"),
        (lambda told: told.update(dense="x"), "damaged"),
        (lambda told: told.pop("gradprune.sensitivity"), "damaged"),
    ],
)
def test_a_file_of_another_scan_is_refused_before_anything_is_evaluated(tmp_path, change, said):
    path = tmp_path / "scan.json"
    gp.sensitivity(network(), correct, LEVELS, file=path)
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=said):
        gp.sensitivity(network(), lambda m: 1 / 0, LEVELS, file=path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"gradprune.sensitivity": 1}'])
def test_a_file_that_is_something_else_is_refused(tmp_path, text):
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(ValueError, match="no scan"):
        gp.sensitivity(network(), correct, LEVELS, file=tmp_path / "scan.json")


@pytest.mark.parametrize(
    "returned",
    [float("nan"), float("inf"), None, "0.9", True, [0.9], {"a": 1}, 1j, torch.ones(2, 2), torch.ones(0), torch.nan],
)
def test_what_is_no_finite_number_is_a_value_error_that_says_where(returned):
    model = network()
    before = everything(model)
    with pytest.raises(ValueError, match="dense network"):
        gp.sensitivity(model, lambda m: returned)
    assert same(before, everything(model))


@pytest.mark.parametrize(
    ("sparsities", "said"),
    [([], "empty"), ([0.5, 0.5], "grow"), ([0.0], "positive"), ([0.9, 0.5], "grow"), ([1.5], r"in \[0, 1\]")],
)
def test_sparsities_must_grow_within_their_range(sparsities, said):
    with pytest.raises(ValueError, match=said):
        gp.sensitivity(network(), correct, sparsities)


def test_n_of_m_is_one_level():
    found = gp.sensitivity(network(), correct, granularity="2:4")
    assert [list(row) for row in found.values.values()] == [[0.5], [0.5]]
    with pytest.raises(ValueError, match="give no others"):
        gp.sensitivity(network(), correct, [0.5], granularity="2:4")


def test_losses_are_what_is_missing_to_the_dense_value_and_the_table_shows_the_values():
    found = gp.sensitivity(network(), lambda m: float((m[0].weight != 0).float().mean()), [0.5], include="0.*")
    assert found.losses() == {"0.weight": {0.5: 0.5}}
    assert found.rows() == [{"layer": "0.weight", "weights": 96, "0.5": 0.5}]
    assert "0.weight" in str(found)
    assert "dense 1" in str(found)
    assert "<table>" in found._repr_html_()
    assert found.to_frame().loc["0.weight", "0.5"] == 0.5
    lines = found.plot().axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["dense", "0.weight"]


def test_of_many_layers_the_picture_names_those_that_lose_most():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(14)))
    found = gp.sensitivity(model, lambda m: -float((m[3].weight == 0).sum()), [0.5])
    labels = [line.get_label() for line in found.plot().axes[0].get_lines()]
    assert "3.weight" in labels
    assert labels[-1] == "4 more"


def test_a_scan_takes_no_longer_than_its_evaluations_in_calls():
    """The scan evaluates and nothing else: no forward pass of its own."""
    model, passes = network(), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    gp.sensitivity(model, correct, LEVELS)
    assert len(passes) == 1 + 2 * len(LEVELS)


def test_that_every_layer_gains_is_said_and_that_one_does_is_not():
    loss = lambda model: float(sum((p == 0).sum() for p in model.parameters()))  # noqa: E731
    with pytest.warns(UserWarning, match=r"every layer gains with 0\.9 of it pruned.*give its negative"):
        gp.sensitivity(network(), loss, LEVELS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.sensitivity(network(), lambda m: -loss(m), LEVELS)
        gp.sensitivity(network(), lambda m: float((m[0].weight == 0).sum()), LEVELS)

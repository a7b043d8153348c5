"""Does one run of a stored table, measured again, come out as it is stored, where no chapter does that?"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune import lab


def test_a_random_mask_of_the_lottery_reaches_what_is_stored():
    experiment = lab.experiment.script("lottery_mnist1d")
    rows = [row for row in lab.experiment.load("lottery_mnist1d")["rows"] if row["method"] == "random"]
    row = max(rows, key=lambda row: row["sparsity"])
    assert experiment.random_mask(row["sparsity"], 0) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_the_stored_residual_network_reads_what_its_row_says():
    data = lab.data.load("mnist1d", seed=0)
    model = lab.experiment.network("residual_network", lab.models.residual())
    rows = lab.experiment.load("residual_pruning")["rows"]
    row = next(row for row in rows if row["seed"] == 0 and row["what"] == "dense")
    assert lab.train.accuracy(model, data.test) == pytest.approx(row["test"], abs=0.01)


def test_a_small_dense_network_trained_again_reads_what_its_row_says():
    experiment = lab.experiment.script("residual_correction")
    cell = {"seed": 0, "what": "smaller", "equal": "FLOPs", "sparsity": 0.98}
    rows = lab.experiment.load("residual_correction")["rows"]
    (row,) = (row for row in rows if all(row.get(name) == value for name, value in cell.items()))
    torch.manual_seed(0)
    model = lab.models.residual(row["width"])
    experiment.base.train(model, 0, experiment.STEPS)
    assert lab.train.accuracy(model, experiment.base.data(0).test) == pytest.approx(row["test"], abs=0.06)


@pytest.mark.parametrize(("order", "kept"), [("size", "equal"), ("size", "but the stem"), ("chance", "global")])
def test_the_stored_network_pruned_by_other_shares_reads_about_what_its_row_says(order, kept, monkeypatch):
    experiment = lab.experiment.script("residual_shares")
    network = lab.experiment.network("residual_network", lab.models.residual())
    monkeypatch.setattr(experiment.base, "dense", lambda seed: copy.deepcopy(network))
    cell = {"seed": 0, "what": "pruned", "order": order, "shares": kept, "sparsity": 0.5}
    row, found = stored("residual_shares", **cell), experiment.measure(cell)
    assert found["sparsity reached"] == row["sparsity reached"] == pytest.approx(0.5, abs=1e-4)
    assert found["stem keeps"] == pytest.approx(row["stem keeps"], abs=0.03)
    assert found["recalibrated test"] == pytest.approx(row["recalibrated test"], abs=0.12)


def stored(name: str, **cell: object) -> dict:
    """The one row of a stored result that has these values."""
    rows = lab.experiment.load(name)["rows"]
    (row,) = (row for row in rows if all(row.get(key) == value for key, value in cell.items()))
    return row


@pytest.mark.parametrize(("result", "steps"), [("sent_bytes", "STEPS"), ("sent_longer", "LONGER")])
def test_four_workers_send_as_much_and_read_as_well_as_their_row_says(result, steps):
    experiment, seen = lab.experiment.script("sent_bytes"), {}
    cell = experiment.cell("density", 0.001, "waits")
    row = stored(result, **cell)
    model, data = experiment.train(cell, getattr(experiment, steps), row["learning_rate"], 0, seen=seen)
    assert seen[0]["bytes"] == row["bytes"][0]
    assert lab.train.accuracy(model, data.test) == pytest.approx(row["accuracy"][0], abs=0.06)


@pytest.mark.parametrize(("rule", "amount"), [("density", 0.01), ("threshold", 0.05), ("ratio", 3.0)])
def test_the_simulated_workers_send_what_gradprune_would(rule, amount):
    experiment, data = lab.experiment.script("sent_bytes"), lab.data.load("mnist1d", seed=0)
    torch.manual_seed(0)
    model = lab.models.mlp([data.features, 128, 128, 10], "relu")
    x, y = (part[: experiment.BATCH].unflatten(0, (experiment.WORKERS, -1)) for part in (data.train.x, data.train.y))
    found, sizes = experiment.gradients(model, x, y), [p.numel() for p in model.parameters()]
    sent = found * experiment.chosen(found, sizes, rule, amount)
    for worker in range(experiment.WORKERS):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x[worker]), y[worker]).backward()
        gp.ErrorFeedback(model, **{rule: amount}).step()
        by_gradprune = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(sent[worker], by_gradprune)


def test_networks_pruned_by_a_gradient_read_what_their_rows_say():
    experiment = lab.experiment.script("gradient_pruned")
    cell = {"data": "digits", "seed": 0, "score": "gradient"}
    row, found = stored("gradient_pruned", **cell), experiment.measure(cell)
    assert found["sparsity"] == pytest.approx(row["sparsity"], abs=0.03)
    assert found["trained on"] == pytest.approx(row["trained on"], abs=0.03)


def test_feedback_at_a_rate_and_a_threshold_reads_what_its_row_says():
    row = stored("rate_times_threshold", rate=0.3, threshold=0.1)
    accuracy, zeros = lab.experiment.script("rate_times_threshold").trained(0.3, 0.1, 0)
    assert accuracy == pytest.approx(row["accuracy"][0], abs=0.03)
    assert zeros == pytest.approx(row["zeros"][0], abs=0.05)


def test_a_thresholded_training_with_feedback_reads_what_its_row_says():
    experiment = lab.experiment.script("gradient_thresholds")
    row = stored("gradient_thresholds", data="digits", optimizer="SGD", rule="fixed 0.03", feedback=True)
    model, data = experiment.train("digits", "SGD", "fixed 0.03", True, row["learning_rate"], 0, seen={})
    assert lab.train.accuracy(model, data.test) == pytest.approx(row["accuracy"][0], abs=0.05)


def test_magnitude_by_layer_before_training_reads_what_its_row_says():
    experiment = lab.experiment.script("gradient_scores")
    cell = {"when": "at initialisation", "score": "magnitude, by layer", "sparsity": 0.9}
    row = stored("gradient_scores", **cell)
    model, data = experiment.train(*cell.values(), 0.0, row["learning_rate"], 0, seen={})
    assert lab.train.accuracy(model, data.test) == pytest.approx(row["accuracy"][0], abs=0.06)


def test_the_share_of_a_gradient_above_half_its_mean_is_what_is_stored():
    experiment = lab.experiment.script("gradient_tails")
    row = stored("gradient_tails", data="digits", steps=300)
    at = experiment.RATIOS.index(0.5)
    found = experiment.survives(experiment.gradients("digits", 300, 0), 0.5)
    assert found == pytest.approx(row["kept"][at][0], abs=0.03)


def test_the_network_of_a_document_trained_again_reads_what_its_row_says():
    experiment = lab.experiment.script("procedures")
    cell = {"what": "rule", "rule": "document 2, program", "threshold": 0.4}
    stored = experiment.row("digits", **cell)
    again = experiment.measure({"data": "digits"} | cell, [0])
    assert again["test"][0] == pytest.approx(stored["test"][0], abs=0.03)
    assert again["zeros"][0] == pytest.approx(stored["zeros"][0], abs=0.02)


def test_the_stored_network_of_the_documents_reads_what_its_row_says():
    data = lab.data.load("digits", seed=0)
    model = lab.experiment.network("documents_network", lab.models.mlp([64, 64, 32, 10]))
    stored = lab.experiment.script("procedures").row("digits", "left alone")["test"][0]
    assert lab.train.accuracy(model, data.test) == pytest.approx(stored, abs=0.01)


def first_row(name: str, **cell: object) -> dict:
    """The row of a stored table that has these values."""
    return next(row for row in lab.experiment.load(name)["rows"] if all(row[key] == cell[key] for key in cell))


DIGITS = {"data": "digits", "network": "perceptron"}


@pytest.fixture
def tested() -> Callable[[nn.Module], float]:
    """The test accuracy of a perceptron on the digits, seed 0."""
    split = lab.data.load("digits", seed=0).test
    return lambda model: lab.train.accuracy(model, split)


def test_a_corrected_perceptron_reads_what_its_row_says(tested):
    row = first_row("correction", **DIGITS, way="magnitude", sparsity=0.9, rounds=1, steps=300)
    _, model, _ = lab.experiment.script("correction").corrected(row, row["share of the dense rate"], seed=0)
    assert tested(model) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_a_perceptron_of_five_rounds_reads_what_its_row_says(tested):
    row = first_row("rewinding", **DIGITS, method="learning-rate rewinding", sparsity=0.98)
    model, _ = lab.experiment.script("rewinding").run("digits", "perceptron", "learning-rate rewinding", 0)
    assert tested(model) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_a_perceptron_pruned_on_the_cubic_curve_reads_what_its_row_says(tested):
    row = first_row("gradual", **DIGITS, method="cubic", sparsity=0.9)
    model, _ = lab.experiment.script("gradual").corrected(row, row["share of the dense rate"], seed=0)
    assert tested(model) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_a_perceptron_of_the_comparison_of_libraries_reads_what_its_row_says(tested):
    row = first_row("peers", **DIGITS, method="gradprune, gradual", sparsity=0.9)
    model, _, _ = lab.experiment.script("peers").corrected(row, (row["share of the dense rate"], row["option"]), seed=0)
    assert tested(model) == pytest.approx(row["accuracy"][0], abs=0.04)


def test_the_stored_network_pruned_to_a_budget_costs_and_reads_what_its_row_says(monkeypatch):
    experiment = lab.experiment.script("how_much")
    network = lab.experiment.network("residual_network", lab.models.residual())
    monkeypatch.setattr(experiment.base, "dense", lambda seed: copy.deepcopy(network))
    cell = {"seed": 0, "what": "budget", "of": "flops", "share": 0.4, "rule": "lamp", "trained on": False}
    row, found = stored("how_much", **cell), experiment.measure(cell)
    assert found["sparsity reached"] == pytest.approx(row["sparsity reached"], abs=0.02)
    assert found["cost"] == pytest.approx(row["cost"], rel=0.001)
    assert found["test"] == pytest.approx(row["test"], abs=0.03)


def test_the_network_with_one_group_of_channels_cut_counts_what_its_row_says():
    pytest.importorskip("torch_pruning")
    script = lab.experiment.script("milliseconds")
    dense = lab.models.residual().eval()
    for group, level in (("stem.weight", 0.875), ("block2.project.weight", 0.5)):
        row = stored("milliseconds", what="time", group=group, level=level)
        narrow = script.cut(dense, scope={group: level})
        assert script.flops(narrow) / script.flops(dense) == pytest.approx(row["FLOPs"], abs=1e-4)


def test_a_sparsity_chosen_again_with_few_examples_claims_what_is_stored():
    experiment = lab.experiment.script("few_examples")
    cell = {"data": "wine", "seed": 0}
    row, found = stored("few_examples", **cell), experiment.measure(cell)
    for way, claimed in found["claimed"].items():
        assert claimed == pytest.approx(row["claimed"][way], abs=0.06)


def test_the_stored_network_shrunk_counts_weighs_and_reads_what_its_row_says(monkeypatch):
    experiment = lab.experiment.script("deploy_residual")
    network = lab.experiment.network("residual_network", lab.models.residual())
    monkeypatch.setattr(experiment.base, "dense", lambda seed: copy.deepcopy(network))
    experiment.stage.cache_clear()
    cell = {"seed": 0, "what": "stage", "stage": "shrunk"}
    row, found = stored("deploy_residual", **cell), experiment.measure(cell)
    experiment.stage.cache_clear()
    for name in ("parameters", "FLOPs"):
        assert found[name] == row[name]
    assert found["bytes"] == pytest.approx(row["bytes"], rel=0.01)
    assert found["test"] == pytest.approx(row["test"], abs=0.06)
    assert found["difference"] < 1e-4


def test_the_files_for_each_runtime_weigh_what_their_row_says():
    experiment = lab.experiment.script("deploy_residual")
    cell = {"seed": 0, "what": "exported"}
    assert experiment.measure(cell)["bytes"] == pytest.approx(stored("deploy_residual", **cell)["bytes"], rel=0.01)


def test_a_perceptron_pruned_and_rounded_reads_what_its_row_says():
    experiment = lab.experiment.script("combined")
    for cell in (
        {"way": "trained", "pruned": True, "bits": 4, "order": "rounded within", "teacher": False, "seed": 0},
        {"way": "at once", "pruned": True, "bits": 2, "order": "pruned first", "teacher": False, "seed": 1},
    ):
        row, found = stored("combined", **cell), experiment.measure(cell)
        assert found["bytes"] == row["bytes"]
        assert found["test"] == pytest.approx(row["test"], abs=0.04)


def test_the_networks_whose_steps_are_timed_count_what_their_rows_say():
    experiment = lab.experiment.script("step_time")
    for row in lab.experiment.load("step_time")["rows"]:
        build, length = experiment.NETWORKS[row["kind"]][row["network"]]
        total = gp.report(build(), torch.zeros(1, length)).total
        assert (total.parameters, total.flops) == (row["parameters"], row["FLOPs"])


def test_a_small_layer_is_measured_slower_by_rows_as_its_row_says():
    cell = {"size": 64, "batch": 1, "sparsity": 0.9}
    row, found = stored("sparse_kernels", **cell), lab.experiment.script("sparse_kernels").measure(cell)
    assert row["CSR"]["high"] < 1 > found["CSR"]["low"]


def test_the_stored_network_is_the_one_whose_ranking_was_measured():
    experiment = lab.experiment.script("inversion")
    rows = {(r["change"], r["ranking"], r["sparsity"]): r for r in lab.experiment.load("inversion")["rows"]}
    assert list(rows) == [(c["change"], c["ranking"], c["sparsity"]) for c in experiment.cells()]
    task, dense = experiment.ROW.task(0), lab.zoo.base.network(experiment.ROW, 0)
    lab.experiment.network("inversion", dense)
    for ranking in ("global", "layer", "layer, head as in global"):
        row, model = rows["none", ranking, 0.9], copy.deepcopy(dense)
        assert lab.zoo.base.score(task, model, "test") == pytest.approx(row["dense"][0], abs=0.02)
        experiment.prune(model, ranking, 0.9, 0)
        assert lab.zoo.base.score(task, model, "test") == pytest.approx(row["pruned"][0], abs=0.02)
        silent = (model.head.weight == 0).all(1).double().mean()
        assert float(silent) == pytest.approx(row["silent"][0], abs=0.04)


def test_the_language_model_pruned_by_size_needs_the_bits_that_are_stored():
    pytest.importorskip("transformers")
    experiment = lab.experiment.script("reconstruct")
    rows = lab.experiment.load("reconstruct")["rows"]
    row = next(r for r in rows if (r["method"], r["level"], r["scope"]) == ("magnitude", 0.7, "row"))
    assert experiment.measure(row)["bits"] == pytest.approx(row["bits"], abs=0.01)


def test_the_second_protocol_asks_for_the_lead_only_inside_the_tolerance():
    protocol = lab.experiment.script("architectures_protocol")
    row = lab.zoo.by_name("logistic regression")
    dense, noise = [0.9, 0.91, 0.89, 0.9], [0.001, -0.001, 0.002, 0.0]
    good, bad = ([v - d + e for v, e in zip(dense, noise, strict=True)] for d in (0.001, 0.08))
    judged = {
        "good": (protocol.prunable(row, good, dense), protocol.lead(row, good, bad)),
        "bad": (protocol.prunable(row, bad, dense), protocol.lead(row, bad, [v - 0.1 for v in bad])),
    }
    assert protocol.outcomes(judged) == {"good": ("holds", "holds"), "bad": ("fails", "not asked")}
    text = lab.zoo.by_name("Transformer, text")
    assert (protocol.error(row, 0.9), protocol.error(text, 3.0)) == (pytest.approx(0.1), 8.0)


def test_one_change_of_a_stalled_network_brings_what_its_row_says():
    experiment = lab.experiment.script("stalled")
    row = stored("stalled", fault="below epsilon", changed=True)
    assert experiment.accuracy("below epsilon", True, 0) == pytest.approx(row["accuracy"][0], abs=0.1)


def test_the_factor_of_a_trained_network_is_what_its_row_says():
    row = stored("trained_factor", seed=1)
    found = lab.experiment.script("trained_factor").measure({"seed": 1})
    assert found["before"] == pytest.approx(row["before"], abs=2e-4)
    assert found["after"] == pytest.approx(row["after"], abs=0.03)


def test_one_process_pruned_and_trained_on_reads_about_what_its_row_says(monkeypatch):
    row = stored("out_of_step", way="one process", pruned=True)
    experiment = lab.experiment.script("out_of_step")
    monkeypatch.syspath_prepend(Path(experiment.__file__).parent)  # for the process that it starts
    found = experiment.measure({"way": "one process", "pruned": True})
    assert found["zeros"] == row["zeros"]
    assert found["differ"] == [0] * 10
    assert found["test"] == pytest.approx(row["test"], abs=0.015)


def test_a_whole_pair_of_players_that_trains_on_stays_as_near_as_is_stored():
    experiment = lab.experiment.script("two_players")
    row = stored("two_players", pruned="nothing", order="both train")
    model = copy.deepcopy(lab.zoo.base.dense(experiment.ROW, 0))
    found = experiment.corrected(model, "nothing", 0.0, "both train", 0)
    assert found["distance"][0] == pytest.approx(row["distance"][0][0], abs=0.02)
    assert max(found["distance"]) < 0.2
    assert found["heaps"] == 1


def test_a_generator_that_waits_stays_where_it_is_for_the_first_half_as_is_stored():
    experiment = lab.experiment.script("two_players")
    row = stored("two_players", pruned="nothing", order="discriminator first")
    found = experiment.corrected(copy.deepcopy(lab.zoo.base.dense(experiment.ROW, 0)), "nothing", 0.0, row["order"], 0)
    waits = sum(step <= experiment.STEPS // 2 for step in experiment.AT)
    for distance in (found["distance"], *row["distance"]):
        assert set(distance[:waits]) == {distance[0]}
        assert distance[waits] != distance[0]
    assert found["distance"][-1] == pytest.approx(row["distance"][0][-1], abs=0.02)


def test_a_whole_discriminator_passes_on_all_and_a_pruned_one_about_what_is_stored():
    experiment, row = lab.experiment.script("two_players"), stored("two_players", sparsity=0.8, order="no step")
    assert experiment.passed_on(0.0, 0) == {"length": 1, "cosine": 1, "silent": 0}
    found = experiment.passed_on(0.8, 0)
    assert found["length"] == pytest.approx(row["length"][0], abs=0.1)
    assert found["cosine"] == pytest.approx(row["cosine"][0], abs=0.2)
    assert found["silent"] == row["silent"][0] == 0

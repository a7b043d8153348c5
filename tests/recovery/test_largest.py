"""The largest sparsity: found exactly without noise, with a confidence that holds with it, and nothing left behind."""

import re
import warnings

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.recovery.largest import MOST_LOOKS

X = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))


def network(width=20):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3)).eval()


TRUTH = network()(X).argmax(1)


def correct(model):
    return model(X).argmax(1) == TRUTH


def alive(model):
    """The share of the weights that are not zero: a curve that is known."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((p != 0).sum()) for p in weights) / sum(p.numel() for p in weights)


def plain(weights=1000):
    torch.manual_seed(0)
    return nn.Linear(weights // 10, 10)


@pytest.mark.parametrize("at_least", [0.9, 0.5, 0.123, 0.02])
@pytest.mark.parametrize("scope", ["global", "layer", "row"])
def test_a_falling_curve_is_followed_to_its_crossing_within_the_tolerance(at_least, scope):
    model = plain(10_000)
    found = gp.largest_sparsity(model, alive, at_least=at_least, scope=scope)
    assert 1 - at_least - 0.001 <= found.sparsity <= 1 - at_least + 1e-9
    assert found.evaluations <= MOST_LOOKS
    assert found.falls
    wanted = gp.prune(model, sparsity=found.sparsity, scope=scope)
    assert found.masks == wanted


def test_it_is_what_trying_every_sparsity_finds():
    model = plain(200)
    found = gp.largest_sparsity(model, alive, at_least=0.371)
    best = max(k / 200 for k in range(200) if (200 - k) / 200 >= 0.371)
    assert found.sparsity == pytest.approx(best)


def test_no_sparsity_is_evaluated_twice():
    seen = []
    found = gp.largest_sparsity(plain(20), lambda m: seen.append(alive(m)) or seen[-1], at_least=0.5)
    assert len(seen) == len(set(seen)) == found.evaluations


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("train", [None, lambda model, work: model[0].weight.data.add_(1.0)])
def test_the_model_is_as_it_was_after_an_exception(error, train):
    model, calls = network(), []
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def evaluate(pruned):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return 1.0

    with pytest.raises((error, RuntimeError)):
        gp.largest_sparsity(
            model, evaluate, at_least=0.5, train=train, steps=None if train is None else 1, include="0.*"
        )
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not any(m.training for m in model.modules())


def test_a_curve_that_rises_again_is_said():
    def evaluate(model):
        kept = alive(model)
        return 0.0 if 0.4 < kept < 0.6 else 1.0  # fails between the sparsities 0.4 and 0.6 only

    with pytest.warns(UserWarning, match="the curve rises again"):
        found = gp.largest_sparsity(plain(), evaluate, at_least=0.5)
    assert not found.falls
    assert "rises again" in repr(found)
    assert found.sparsity == pytest.approx(0.4, abs=0.001)


def test_a_falling_curve_is_not_said_to_rise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gp.largest_sparsity(plain(), alive, at_least=0.5).falls


@pytest.mark.parametrize(
    ("evaluate", "wish"),
    [(lambda m: 1 - alive(m), {"margin": 0.02}), (lambda m: 100 * alive(m) + 1, {"at_least": 0.9})],
)
def test_that_every_look_passes_is_said(evaluate, wish):
    with pytest.warns(UserWarning, match=r"every look passes, up to sparsity 0\.999.* a loss .* per cent"):
        gp.largest_sparsity(plain(10_000), evaluate, **wish)


@pytest.mark.parametrize("returned", [float("nan"), None, "x", float("-inf")])
def test_what_is_no_finite_number_is_a_value_error_that_says_at_which_sparsity(returned):
    model = plain()
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"at sparsity 0\.5"):
        gp.largest_sparsity(model, lambda m: returned if alive(m) < 1 else 1.0, at_least=0.5)
    assert torch.equal(before, model.weight)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one of at_least and margin"),
        ({"at_least": 0.5, "margin": 0.1}, "got both"),
        ({"margin": -0.1}, "margin"),
        ({"at_least": 0.5, "confidence": 1.0}, "confidence"),
        ({"at_least": 0.5, "tolerance": 1e-9}, "is the least"),
        ({"at_least": 0.5, "lowest": 0.9, "highest": 0.8}, "below highest"),
        ({"at_least": 0.5, "granularity": "2:4"}, "itself a sparsity"),
        ({"at_least": 0.5, "scope": {"weight": 0.5}}, "by name"),
        ({"at_least": 0.5, "steps": 3}, "needs train"),
        ({"at_least": 0.5, "train": lambda m, r: None}, "needs steps"),
        ({"at_least": 2.0}, "nothing can be"),
        ({"at_least": 0.5, "confidence": 0.95}, "example by example"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(given, said):
    with pytest.raises(ValueError, match=said):
        gp.largest_sparsity(plain(), alive, **given)


def test_too_few_examples_are_said_before_anything_is_pruned():
    seen = []

    def evaluate(model):
        seen.append(alive(model))
        return torch.ones(50)

    with pytest.raises(ValueError, match="cannot be shown even for the dense network, by 50 results"):
        gp.largest_sparsity(plain(), evaluate, margin=0.01, confidence=0.95)
    assert seen == [1.0]


def test_results_of_another_number_of_examples_are_refused():
    with pytest.raises(ValueError, match="of the same examples"):
        gp.largest_sparsity(plain(), lambda m: torch.ones(5 if alive(m) == 1 else 6), margin=0.9, confidence=0.6)


def test_with_a_confidence_the_answer_is_more_careful_and_pairs_are_sharper_than_a_mean():
    model = network()
    exact = gp.largest_sparsity(model, correct, margin=0.1)
    paired = gp.largest_sparsity(model, correct, margin=0.1, confidence=0.95)
    alone = gp.largest_sparsity(model, correct, at_least=0.9, confidence=0.95)
    assert exact.sparsity >= paired.sparsity >= alone.sparsity
    assert "with 95 % confidence" in repr(paired)


def crossing(noise, *, binary, searches=300):
    """How often the answer lies above the true crossing, where the true curve is 1 - sparsity / 4."""
    generator = torch.Generator().manual_seed(1)
    model, too_high, found = plain(), 0, []
    for _ in range(searches):
        truth = torch.rand(200, generator=generator)

        def evaluate(pruned, truth=truth):
            value = 0.75 + alive(pruned) / 4
            if binary:
                return (truth < value).float()  # the same examples each time
            return value + noise * torch.randn(40, generator=generator)

        result = gp.largest_sparsity(model, evaluate, at_least=0.85, confidence=0.9, tolerance=0.02, probes=0)
        too_high += result.sparsity > 0.6 + 1e-9
        found.append(result.sparsity)
    return too_high / searches, sum(found) / searches


def test_a_statement_with_90_percent_is_wrong_in_less_than_10_percent_of_noisy_searches():
    wrong, mean = crossing(0.1, binary=False)
    assert wrong <= 0.10 + 2 * (0.1 * 0.9 / 300) ** 0.5
    assert 0.3 < mean < 0.6


def test_it_holds_for_one_set_of_examples_that_every_look_shares():
    wrong, mean = crossing(0.0, binary=True)
    assert wrong <= 0.10 + 2 * (0.1 * 0.9 / 300) ** 0.5
    assert 0.2 < mean < 0.6


def test_without_a_confidence_the_luckiest_point_is_often_too_high():
    generator, wrong = torch.Generator().manual_seed(2), 0
    model = plain()
    for _ in range(100):
        found = gp.largest_sparsity(
            model,
            lambda m: 0.75 + alive(m) / 4 + 0.02 * float(torch.randn((), generator=generator)),
            at_least=0.85,
            tolerance=0.02,
            probes=0,
        )
        wrong += found.sparsity > 0.6
    assert wrong > 25


def test_repeated_evaluations_of_one_number_carry_a_statement_too():
    generator = torch.Generator().manual_seed(3)
    found = gp.largest_sparsity(
        plain(),
        lambda m: alive(m) + 0.01 * float(torch.randn((), generator=generator)),
        margin=0.3,
        confidence=0.95,
        repeats=8,
        tolerance=0.02,
        probes=0,
    )
    assert found.evaluations == 8 * (1 + 6)
    assert 0.2 < found.sparsity < 0.3


@pytest.mark.parametrize("wish", [{"margin": 0.02}, {"at_least": 0.9}])
def test_a_number_that_does_not_vary_is_no_evidence_however_often_it_is_repeated(wish):
    calls = []
    with pytest.raises(ValueError, match="evaluate does not vary: 3 repetitions gave 1 for the dense network"):
        gp.largest_sparsity(plain(), lambda m: calls.append(1) or alive(m), confidence=0.95, repeats=3, **wish)
    assert len(calls) == 3


def test_repetitions_may_be_alike_where_those_of_the_dense_network_vary():
    generator = torch.Generator().manual_seed(3)

    def evaluate(model):
        return alive(model) + 0.01 * float(torch.randn((), generator=generator)) * (alive(model) > 0.6)

    how = {"confidence": 0.95, "repeats": 8, "tolerance": 0.1, "probes": 0}
    assert 0.5 < gp.largest_sparsity(plain(), evaluate, at_least=0.3, **how).sparsity < 0.7


@pytest.mark.parametrize("scale", [1, 100])
def test_results_in_percent_give_the_sparsity_that_shares_give(scale):
    how = {"confidence": 0.95, "tolerance": 0.02}
    found = gp.largest_sparsity(network(), lambda m: scale * correct(m).double(), margin=0.1 * scale, **how)
    assert found.sparsity == gp.largest_sparsity(network(), correct, margin=0.1, **how).sparsity


def train(model, work):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    work.hold(optimizer)
    for _ in work.steps:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), TRUTH).backward()
        optimizer.step()


def test_training_between_prunes_further_and_its_cost_is_said_before(capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    without = gp.largest_sparsity(model, correct, at_least=0.85, tolerance=0.05)
    found = gp.largest_sparsity(model, correct, at_least=0.85, tolerance=0.05, train=train, steps=60)
    said = capfd.readouterr().err
    assert "at most 5 runs of train, 300 steps, and 6 evaluations" in said
    assert found.sparsity > without.sparsity
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.load_state_dict(found.state)
    assert found.masks.holds(model)
    assert float(correct(model).float().mean()) >= 0.85


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("stopped_at", [1, 2, 4, 6])
def test_it_goes_on_from_the_file_and_ends_as_if_it_had_not_stopped(tmp_path, trained, stopped_at):
    path, calls, trainings = tmp_path / "looks", [], []

    def counted(model, work):
        trainings.append(1)
        train(model, work)

    def evaluate(pruned):
        calls.append(1)
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        return correct(pruned)

    how = {"margin": 0.15, "confidence": 0.9, "tolerance": 0.05}
    how |= {"train": counted, "steps": 20} if trained else {}
    with pytest.raises(KeyboardInterrupt):
        gp.largest_sparsity(network(), evaluate, file=path, **how)
    found = gp.largest_sparsity(network(), evaluate, file=path, **how)
    whole = gp.largest_sparsity(network(), correct, **how)
    assert len(calls) == whole.evaluations + 1  # the one that was broken off
    assert found.evaluations == whole.evaluations
    assert (found.curve, found.masks, found.dense, found.sparsity) == (
        whole.curve,
        whole.masks,
        whole.dense,
        whole.sparsity,
    )
    again = gp.largest_sparsity(network(), lambda model: 1 / 0, file=path, **how)
    assert again.curve == whole.curve
    if trained:
        assert all(torch.equal(again.state[name], value) for name, value in whole.state.items())
        model = network()
        model.load_state_dict(again.state)
        assert again.masks.holds(model)
    assert [p.name for p in tmp_path.iterdir()] == ["looks"]


def test_a_complex_network_that_was_trained_comes_back_from_the_file(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Linear(8, 8, dtype=torch.complex64)

    def correct(model):
        with torch.no_grad():
            model.bias.mul_(2)

    how = {"at_least": 0.5, "tolerance": 0.2, "train": lambda model, work: correct(model), "steps": 1}
    found = gp.largest_sparsity(build(), alive, file=tmp_path / "looks", **how)
    again = gp.largest_sparsity(build(), lambda model: 1 / 0, file=tmp_path / "looks", **how)
    assert again.state["weight"].is_complex()
    assert all(torch.equal(again.state[name], value) for name, value in found.state.items())


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"at_least": 0.4}, "other wish"),
        ({"tolerance": 0.1}, "other ends"),
        ({"score": gp.random}, "other score"),
        ({"scope": "layer"}, "other scope"),
        ({"granularity": "channel"}, "other granularity"),
        ({"min_keep": 2}, "other min_keep"),
        ({"model": plain(2000)}, "other weights"),
        ({"train": train, "steps": 1}, "other steps"),
    ],
)
def test_a_file_of_another_search_is_refused_before_anything_is_evaluated(tmp_path, how, said):
    path, call = tmp_path / "looks", {"model": plain(), "at_least": 0.5, "tolerance": 0.2}
    gp.largest_sparsity(**call, evaluate=alive, file=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=said):
        gp.largest_sparsity(**call | how, evaluate=lambda model: 1 / 0, file=path)
    assert path.read_bytes() == before


def test_a_file_that_is_something_else_is_refused(tmp_path):
    path, call = tmp_path / "looks", {"at_least": 0.5, "tolerance": 0.2}
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"is no file of gp\.largest_sparsity"):
        gp.largest_sparsity(plain(), alive, file=path, **call)
    path.unlink()
    gp.largest_sparsity(plain(), alive, file=path, **call)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole.replace(b'\\"passed\\": true', b'\\"passed\\": null')):
        assert broken != whole
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            gp.largest_sparsity(plain(), lambda model: 1 / 0, file=path, **call)
    with pytest.raises(ValueError, match="a folder"):
        gp.largest_sparsity(plain(), alive, file=tmp_path, **call)


def test_training_that_revives_pruned_weights_is_an_error():
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"round\.hold"):
        gp.largest_sparsity(
            model, correct, at_least=0.5, train=lambda m, r: m[0].weight.data.add_(1.0), steps=1, tolerance=0.1
        )
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_where_the_lowest_does_not_pass_it_is_said():
    with pytest.raises(ValueError, match=r"sparsity 0\.5 gives 0\.5"):
        gp.largest_sparsity(plain(), alive, at_least=0.6, lowest=0.5)


def test_channels_are_found_too_and_the_sparsity_is_that_of_the_masks():
    found = gp.largest_sparsity(network(), alive, at_least=0.5, granularity="channel", exclude="3.*")
    assert found.sparsity == found.masks.sparsity
    assert found.masks["0.weight"].all(1).logical_or(~found.masks["0.weight"].any(1)).all()


def test_it_prints_a_table_and_draws_the_looks():
    found = gp.largest_sparsity(plain(), alive, at_least=0.5)
    assert "passed" in str(found)
    assert "<table>" in found._repr_html_()
    assert list(found.to_frame().sparsity) == sorted(look.sparsity for look in found.curve)
    axes = found.plot().axes[0]
    assert sum(len(line.get_xdata()) for line in axes.get_lines()[2:4]) == len(found.curve)


@pytest.mark.parametrize("given", [{}, {"probes": 7}, {"lowest": 0.25, "probes": 0}])
def test_the_tolerance_that_is_said_to_be_the_least_is_taken_and_half_of_it_is_not(given):
    with pytest.raises(ValueError, match=r"a tolerance of (\S+) is the least") as refused:
        gp.largest_sparsity(plain(), alive, at_least=0.5, tolerance=1e-300, **given)
    least = float(re.search(r"a tolerance of (\S+) is the least", str(refused.value)).group(1))
    gp.largest_sparsity(plain(), alive, at_least=0.5, tolerance=1.05 * least, **given)
    with pytest.raises(ValueError, match="is the least"):
        gp.largest_sparsity(plain(), alive, at_least=0.5, tolerance=least / 2, **given)

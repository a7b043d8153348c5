"""A plan meets its cost, loses as little as any, and predicts what comes out."""

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradprune as gp

X = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(144, 5)
    ).eval()


TRUTH = network()(X).argmax(1)


def correct(model):
    return model(X).argmax(1) == TRUTH


def planned(model, plan):
    pruned = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that outputs of the last layer go
        plan.apply_(pruned)
    return gp.report(pruned, X).total


COSTS = {"parameters": ("nonzeros", 0.4), "flops": ("effective_flops", 0.5), "bytes": ("bytes_bitmask", 0.4)}


@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize("cost", COSTS)
def test_the_cost_of_what_comes_out_is_the_predicted_one_and_within_the_limit(cost, granularity):
    model = network()
    column, share = COSTS[cost]
    limit = share * getattr(gp.report(model, X).total, column)
    plan = gp.fit_budget(model, X, **{cost: limit}, evaluate=correct, granularity=granularity)
    out = getattr(planned(model, plan), column)
    assert out == pytest.approx(plan.predicted, abs=3)  # a report rounds each layer's FLOPs
    assert plan.predicted <= limit
    assert plan.dense == pytest.approx(getattr(gp.report(model, X).total, column), abs=3)
    assert 0 <= plan.loss <= 3


@pytest.mark.parametrize(("cost", "step"), [("parameters", 1), ("bytes", 4)])
def test_with_single_weights_the_limit_is_met_to_one_weight(cost, step):
    model = network()
    found = gp.sensitivity(model, correct)
    for limit in (1700, 2500, 3000) if cost == "bytes" else (400, 700, 1000):
        plan = gp.fit_budget(model, sensitivities=found, **{cost: limit})
        assert limit - step < plan.predicted <= limit
        assert getattr(planned(model, plan), COSTS[cost][0]) == plan.predicted


def layers(sizes):
    return nn.Sequential(*(nn.Linear(size, 1, bias=False) for size in sizes))


def losses(curves):
    """{layer: {sparsity: loss}}, a loss for each weight that goes."""
    return {
        f"{at}.weight": {gone / len(curve): loss for gone, loss in enumerate(curve, 1)}
        for at, curve in enumerate(curves)
    }


def by_brute_force(curves, limit):
    """The least loss over every combination of numbers of weights."""
    best = float("inf")
    for gone in itertools.product(*(range(len(curve) + 1) for curve in curves)):
        cost = sum(len(curve) - n for curve, n in zip(curves, gone, strict=True))
        if cost <= limit:
            best = min(best, sum(curve[n - 1] if n else 0.0 for curve, n in zip(curves, gone, strict=True)))
    return best


CURVE = st.lists(st.floats(0.01, 1), min_size=2, max_size=7)


@given(st.lists(CURVE, min_size=2, max_size=3), st.floats(0.05, 0.95))
def test_for_convex_losses_the_plan_is_the_best_of_all(steps, share):
    curves = [list(itertools.accumulate(sorted(curve))) for curve in steps]
    limit = max(1, round(share * sum(map(len, curves))))
    plan = gp.fit_budget(layers(map(len, curves)), parameters=limit, sensitivities=losses(curves))
    assert plan.predicted == limit
    assert plan.loss == pytest.approx(by_brute_force(curves, limit))


@given(st.lists(CURVE, min_size=2, max_size=3), st.floats(0.05, 0.95))
def test_for_any_losses_the_plan_is_the_best_up_to_one_layers_step(curves, share):
    """What it truly loses, at most one segment of one hull beside the predicted loss, which no choice can be below."""
    limit = max(1, round(share * sum(map(len, curves))))
    plan = gp.fit_budget(layers(map(len, curves)), parameters=limit, sensitivities=losses(curves))
    best = by_brute_force(curves, limit)
    assert plan.loss <= best + 1e-9
    gone = [round(s * len(curve)) for curve, s in zip(curves, plan.values(), strict=True)]
    true = [curve[n - 1] if n else 0.0 for curve, n in zip(curves, gone, strict=True)]
    off = [t - row["loss"] for t, row in zip(true, plan.rows(), strict=True)]
    assert sum(abs(o) > 1e-9 for o in off) <= 1  # the others stop at points that were measured
    assert plan.multiplier >= 0


def test_channels_meet_the_limit_to_within_a_unit_of_the_last_layer():
    model = network()
    found = gp.sensitivity(model, correct, granularity="channel")
    dense = gp.report(model, X).total.effective_flops
    plan = gp.fit_budget(model, X, flops=0.5 * dense, sensitivities=found)
    largest = max(row["FLOPs dense"] / units for row, units in zip(plan.rows(), (8, 4, 5), strict=True))
    assert 0.5 * dense - largest <= plan.predicted <= 0.5 * dense


def test_a_granularity_saves_what_it_can():
    """Per FLOP saved the convolutions are cheaper, per byte the matrix."""
    model = network()
    found = gp.sensitivity(model, lambda m: -sum(float((p == 0).sum()) for p in m.parameters() if p.dim() > 1))
    flops = gp.fit_budget(model, X, flops=0.7 * gp.report(model, X).total.flops, sensitivities=found)
    assert flops["5.weight"] == 0
    assert max(flops["0.weight"], flops["3.weight"]) > 0.5


def test_latency_takes_seconds_of_the_whole_network_that_are_given_and_only_channels():
    model = network()
    table = {"3.weight": {0.5: 0.1, 0.75: 0.3}, "0.weight": {0.5: 0.4}}
    plan = gp.fit_budget(
        model, X, latency=0.9, sensitivities=table, granularity="channel", seconds=lambda name, share: 0.5 + share / 2
    )
    assert plan["3.weight"] == 0.5  # of what was asked for; 0.25 would do if times were in proportion
    assert plan["0.weight"] == 0
    assert plan.dense == pytest.approx(1.0)
    assert plan.predicted == pytest.approx(0.75)
    with pytest.raises(ValueError, match="zeros alone save no time"):
        gp.fit_budget(model, X, latency=0.9, sensitivities=table, seconds=lambda name, share: share)


def test_latency_is_measured_here_where_no_seconds_are_given():
    model = network()
    table = {"3.weight": {0.5: 0.1, 0.75: 0.3}, "5.weight": {0.8: 0.1}}
    plan = gp.fit_budget(model, X, latency=60.0, sensitivities=table, granularity="channel")
    assert 0 < plan.predicted == plan.dense < 60
    assert not any(plan.values())
    with pytest.raises(ValueError, match=r"cannot be met: .* the least is"):
        gp.fit_budget(model, X, latency=1e-9, sensitivities=table, granularity="channel")
    depthwise = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3))
    with pytest.raises(ValueError, match="give seconds="):
        gp.fit_budget(depthwise, X, latency=1.0, sensitivities={"0.weight": {0.5: 0.1}}, granularity="channel")


class Residual(nn.Module):
    """A sum of two convolutions, whose channels go together, and one inside."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.outer, self.outer_norm = nn.Conv2d(32, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.outer_norm(self.outer(self.inner_norm(self.inner(x)).relu()))).mean((2, 3)))


def test_coupled_channels_are_planned_by_what_the_cut_network_takes_and_the_cut_network_is_the_planned_one():
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = Residual().eval()
    for norm in (model.norm, model.inner_norm, model.outer_norm):
        nn.init.uniform_(norm.bias, 0.1, 0.5)  # a channel without weights still comes out
    right = model(X).argmax(1)
    scan = gp.sensitivity(model, lambda m: m(X).argmax(1) == right, [0.25, 0.5, 0.75], granularity="group", example=X)
    assert list(scan.values) == ["stem.weight", "inner.weight"]
    assert scan.weights == {"inner.weight": 32 * 16 * 9, "stem.weight": 16 * 3 * 9 + 16 * 32 * 9}

    def cut(scope):
        pruned = copy.deepcopy(model)
        gp.prune(pruned, granularity="group", scope=scope, example=X)
        return gp.report(gp.shrink(pruned, X), X[:1]).total.flops

    whole = gp.report(model, X[:1]).total.flops

    def count(name, stays):  # FLOPs for seconds: they are the same each time
        return cut({name: 1 - stays}) / whole

    plan = gp.fit_budget(model, X, latency=0.2, sensitivities=scan, seconds=count)
    assert plan.dense == 1
    assert 0.05 < plan.predicted <= 0.2
    assert set(plan.values()) <= {0.0, 0.25, 0.5, 0.75}
    assert min(plan.values()) > 0
    pruned = copy.deepcopy(model)
    masks = plan.apply_(pruned, X)
    out = gp.shrink(pruned, X)
    assert gp.report(out, X[:1]).total.flops / whole == pytest.approx(plan.predicted, rel=0.02)
    alone = {row["layer"]: row["seconds planned"] for row in plan.rows()}
    assert plan.predicted == pytest.approx(alone["stem.weight"] * alone["inner.weight"])
    assert (out.stem.out_channels, out.inner.out_channels) == (
        round(16 * (1 - plan["stem.weight"])),
        round(32 * (1 - plan["inner.weight"])),
    )
    assert torch.allclose(out(X), pruned(X), atol=1e-5)
    assert not bool(pruned.norm.bias[~masks["norm.bias"]].any())
    by_both = gp.fit_budget(
        model,
        X,
        latency=0.6,
        evaluate=lambda m: m(X).argmax(1) == right,
        granularity="group",
        seconds=count,
    )
    assert by_both.predicted <= 0.6
    with pytest.raises(ValueError, match="goes with latency and seconds"):
        gp.fit_budget(model, X, flops=0.5 * whole, sensitivities=scan)
    with pytest.raises(ValueError, match="goes with latency and seconds"):
        gp.fit_budget(model, X, latency=0.5, sensitivities=scan)
    with pytest.raises(ValueError, match="a plan for granularity='group'"):
        gp.prune(model, scope=plan, granularity="channel")
    table = {name: {0.9: 0.1} for name in ("stem.weight", "inner.weight", "outer.weight")}
    of_weights = gp.fit_budget(model, parameters=5000, sensitivities=table)
    with pytest.raises(ValueError, match="a plan for granularity='weight'"):
        gp.prune(model, scope=of_weights, granularity="group", example=X)


def test_heads_are_planned_whole_and_as_many_go_as_planned():
    pytest.importorskip("torch_pruning")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=11)).eval()
    x, query = {"input_ids": torch.tensor([[1, 2, 3]])}, "encoder.layer.0.attention.self.query.weight"
    asked = []

    def seconds(name, stays):
        asked.append(stays)
        return 0.2 + 0.8 * stays

    table = {query: {0.25: 0.1, 0.5: 0.2, 0.75: 0.6, 0.9: 0.8}}
    for limit, heads in ((0.85, 3), (0.7, 2), (0.5, 1)):
        plan = gp.fit_budget(model, x, latency=limit, sensitivities=table, granularity="group", seconds=seconds)
        assert plan[query] == 1 - heads / 4
        assert plan.predicted == pytest.approx(0.2 + 0.2 * heads)
        assert plan.rows()[0]["stay"] == 3 * 16 * 16 * heads // 4
        pruned = copy.deepcopy(model)
        plan.apply_(pruned, x)
        assert int(pruned.get_parameter(query).view(4, -1).any(1).sum()) == heads
    assert set(asked) == {1.0, 0.75, 0.5, 0.25}
    other = {query.replace("query", "value"): {0.5: 0.1}}
    with pytest.raises(ValueError, match=r"value\.weight', which is not eligible"):
        gp.fit_budget(model, x, latency=0.5, sensitivities=other, granularity="group", seconds=seconds)


def test_layers_that_take_longer_alone_than_in_the_model_leave_no_seconds_below_zero(monkeypatch):
    def measured(model, example, layers, counts):
        return 1e-9, {name: dict.fromkeys(wanted, 1.0) for name, wanted in counts.items()}

    monkeypatch.setattr("gradprune.recovery.prices.seconds_here", measured)
    table = {"3.weight": {0.5: 0.1}, "5.weight": {0.8: 0.1}}
    with pytest.raises(ValueError, match="latency=1e-09 cannot be met"):
        gp.fit_budget(network(), X, latency=1e-9, sensitivities=table, granularity="channel")


def test_what_cannot_be_met_is_said_with_the_least_that_can():
    model = layers([10, 10])
    with pytest.raises(ValueError, match=r"parameters=3 cannot be met: .* the least is 10"):
        gp.fit_budget(model, parameters=3, sensitivities={"0.weight": {0.5: 0.1}, "1.weight": {0.5: 0.1}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parameters": 1}, "parameters=1 cannot be met"),
        ({"bytes": 1}, "bytes=1 cannot be met"),
        ({"flops": 1, "example": X}, "flops=1 cannot be met"),
        ({"flops": 1e4, "example": X[:, :2]}, "does not run on the example"),
        ({"latency": 1, "example": X, "granularity": "channel", "seconds": lambda n, s: 2.0}, "cannot be met"),
    ],
)
def test_what_cannot_be_met_or_priced_is_said_before_anything_is_evaluated(given, said):
    with pytest.raises(ValueError, match=said):
        gp.fit_budget(network(), evaluate=lambda model: 1 / 0, **given)


def test_the_scan_of_a_plan_is_written_down_and_gone_on_from(tmp_path):
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return correct(model)

    with pytest.raises(KeyboardInterrupt):
        gp.fit_budget(network(), parameters=800, evaluate=evaluate, file=tmp_path / "scan.json")
    plan = gp.fit_budget(network(), parameters=800, evaluate=evaluate, file=tmp_path / "scan.json")
    assert len(calls) == 1 + 3 * 7 + 1  # the one that was broken off
    assert plan == gp.fit_budget(network(), parameters=800, evaluate=correct)
    again = gp.fit_budget(network(), bytes=2000, evaluate=lambda m: 1 / 0, file=tmp_path / "scan.json")
    assert again.predicted <= 2000
    with pytest.raises(ValueError, match="file is where the scan of evaluate is written down"):
        gp.fit_budget(network(), parameters=800, sensitivities={"0.weight": {0.5: 0.1}}, file=tmp_path / "x")


def test_a_budget_above_the_cost_plans_nothing_and_a_gain_is_no_loss():
    model = layers([10, 10])
    plan = gp.fit_budget(model, parameters=100, sensitivities={"0.weight": {0.5: -0.1}})
    assert dict(plan) == {"0.weight": 0.0}
    plan = gp.fit_budget(model, parameters=16, sensitivities={"0.weight": {0.5: -0.1}, "1.weight": {0.5: 0.1}})
    assert (plan.loss, plan["1.weight"]) == (0.0, 0.0)


def test_prune_takes_the_plan_as_its_scope_and_a_plan_for_channels_only_with_channels():
    model = network()
    plan = gp.fit_budget(model, parameters=900, sensitivities={"5.weight": {0.5: 0.1}}, granularity="channel")
    with pytest.raises(ValueError, match="scope is a plan for granularity='channel'"):
        gp.prune(model, scope=plan)
    masks = gp.prune(copy.deepcopy(model), scope=plan, granularity="channel", include="5.*")
    assert masks["5.weight"].any(1).sum() == round(5 * (1 - plan["5.weight"]))
    assert plan.apply_(copy.deepcopy(model))["5.weight"].equal(masks["5.weight"])


def test_another_score_is_kept_with_the_plan():
    model = layers([10, 10])
    plan = gp.fit_budget(model, parameters=15, evaluate=lambda m: float((m[0].weight != 0).sum()), score=gp.random)
    assert plan.score is gp.random
    assert plan["1.weight"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "exactly one of parameters"),
        ({"parameters": 1, "bytes": 2}, "got parameters, bytes"),
        ({"parameters": 0}, "positive"),
        ({"flops": 10}, "flops needs an example"),
        ({"parameters": 10, "sensitivities": None}, "give evaluate"),
        ({"parameters": 10, "evaluate": len}, "not both"),
        ({"parameters": 10, "granularity": "1:2"}, "itself a sparsity"),
        ({"parameters": 10, "sensitivities": {}}, "empty"),
        ({"parameters": 10, "sensitivities": {"x": {0.5: 0.1}}}, "not eligible"),
        ({"parameters": 10, "sensitivities": {"0.weight": {1.5: 0.1}}}, r"in \[0, 1\]"),
        ({"parameters": 10, "sensitivities": {"0.weight": {0.5: float("nan")}}}, "loss of"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(given, said):
    arguments = {"sensitivities": {"0.weight": {0.5: 0.1}}} | given
    with pytest.raises(ValueError, match=said):
        gp.fit_budget(layers([10, 10]), **arguments)


def test_what_the_sensitivities_say_is_not_said_again():
    model = layers([10, 10])
    found = gp.sensitivity(model, lambda m: 0.0, include="0.*")
    with pytest.raises(ValueError, match=r"score and granularity|granularity and score"):
        gp.fit_budget(model, parameters=15, sensitivities=found, score=gp.random, granularity="channel")
    assert list(gp.fit_budget(model, parameters=15, sensitivities=found)) == ["0.weight"]


def test_it_prints_a_table_and_draws_a_bar_a_layer():
    plan = gp.fit_budget(network(), parameters=800, evaluate=correct)
    assert "parameters planned" in str(plan)
    assert "<table>" in plan._repr_html_()
    assert list(plan.to_frame().sparsity) == list(plan.values())
    assert len(plan.plot().axes[0].patches) == 3
    assert "at most 800" in repr(plan)
    assert plan == dict(plan)


def test_a_lower_precision_takes_fewer_bytes_and_a_tied_weight_counts_once():
    model = layers([16, 16]).to(torch.bfloat16)
    plan = gp.fit_budget(model, bytes=61, sensitivities={"0.weight": {0.5: 0.1}})
    assert (plan.dense, plan.predicted) == (2 * (2 + 32), 60)
    tied = layers([16, 16])
    tied[1].weight = tied[0].weight
    assert gp.fit_budget(tied, parameters=12, sensitivities={"0.weight": {0.5: 0.1}}).dense == 16

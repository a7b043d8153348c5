"""Pruning takes exactly what was asked for, and a call that fails changes nothing."""

import copy
import itertools
import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

import gradprune as gp


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 5)
    )


WEIGHTS = {"0.weight": 72, "4.weight": 2560, "6.weight": 200}
TOTAL = sum(WEIGHTS.values())
DATA = (torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(3)), torch.arange(6) % 5)
LOSS = nn.functional.cross_entropy


def zeros(model, masks):
    return {name: int((model.get_parameter(name) == 0).sum()) for name in masks}


def snapshot(model, optimizer=None):
    return copy.deepcopy(
        [
            model.state_dict(),
            {n: p.grad for n, p in model.named_parameters()},
            {n: m.training for n, m in model.named_modules()},
            torch.get_rng_state(),
            optimizer.state_dict() if optimizer else None,
        ]
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------------------ exact counts


@settings(max_examples=40, deadline=None)
@given(
    sparsity=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1 / TOTAL, 1 - 1 / TOTAL])),
    scope=st.sampled_from(["global", "layer", "erk", "lamp"]),
    score=st.sampled_from([gp.magnitude, gp.random]),
)
@pytest.mark.filterwarnings("ignore:the sparsity leaves")
def test_exactly_the_rounded_number_becomes_zero(sparsity, scope, score):
    model = small_model()
    masks = gp.prune(model, score, sparsity=sparsity, scope=scope)
    assert sum(zeros(model, masks).values()) == round(sparsity * TOTAL)
    assert {name: int((~mask).sum()) for name, mask in masks.items()} == zeros(model, masks)


@settings(max_examples=20, deadline=None)
@given(sparsity=st.floats(0, 0.95), seed=st.integers(0, 50))
def test_global_magnitude_takes_what_torch_nn_utils_prune_takes(sparsity, seed):
    ours, theirs = small_model(seed), small_model(seed)
    sizes = torch.cat([ours[i].weight.detach().abs().flatten() for i in (0, 4, 6)]).sort().values
    assume(
        sizes[round(sparsity * TOTAL)] > sizes[max(round(sparsity * TOTAL) - 1, 0)] or sparsity * TOTAL < 0.5
    )  # no tie
    masks = gp.prune(ours, sparsity=sparsity, min_keep=0)
    layers = [(theirs[i], "weight") for i in (0, 4, 6)]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=round(sparsity * TOTAL))
    for module, name in ((theirs[0], "0.weight"), (theirs[4], "4.weight"), (theirs[6], "6.weight")):
        assert torch.equal(module.weight, ours.get_parameter(name))
    assert masks.sparsity == pytest.approx(sparsity, abs=1 / TOTAL)


def test_among_equal_scores_the_later_position_stays():
    model = nn.Linear(4, 3, bias=False)
    model.weight.data = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.5, 1.0, -1.0, 1.0], [1.0, 1.0, 1.0, 2.0]])
    masks = gp.prune(model, sparsity=0.5)
    assert masks["weight"].tolist() == [[False] * 4, [False, False, True, True], [True] * 4]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_weights_are_pruned_to_the_exact_count(value):
    model = nn.Linear(10, 10, bias=False)
    nn.init.constant_(model.weight, value)
    assert int((~gp.prune(model, sparsity=0.37)["weight"]).sum()) == 37


def test_half_precision_and_infinite_weights_are_pruned_exactly():
    for dtype in (torch.float16, torch.bfloat16):
        model = nn.Linear(100, 50, dtype=dtype)
        model.weight.data[0, 0] = -math.inf
        masks = gp.prune(model, sparsity=0.9)
        assert int((model.weight == 0).sum()) == 4500
        assert masks["weight"][0, 0]


def test_a_model_in_mixed_precision_is_ranked_as_one():
    model = nn.Sequential(
        nn.Linear(10, 10, dtype=torch.bfloat16), nn.Linear(10, 10), nn.Linear(10, 10, dtype=torch.half)
    )
    masks = gp.prune(model, sparsity=0.5)
    joined = torch.cat([p.detach().double().reshape(-1) for p in small_copy(model, masks)])
    assert int((joined == 0).sum()) == 150


def small_copy(model, masks):
    return [model.get_parameter(name) for name in masks]


# ------------------------------------------------------------------------------------------------------- thresholds


def test_scores_below_the_threshold_go_and_the_threshold_itself_stays():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[0.5, -0.5, 0.25], [-0.75, 0.0, 0.49]])
    masks = gp.prune(model, threshold=0.5)
    assert masks["weight"].tolist() == [[True, True, False], [True, False, False]]


@settings(max_examples=20, deadline=None)
@given(threshold=st.floats(-0.1, 0.3), lazily=st.booleans())
def test_a_threshold_agrees_with_a_plain_comparison(threshold, lazily):
    model = small_model()
    expected = {name: model.get_parameter(name).detach().abs() >= threshold for name in WEIGHTS}
    masks = gp.prune(model, gp.magnitude if lazily else lambda m: gp.magnitude(m), threshold=threshold)
    assert all(torch.equal(masks[name], expected[name]) for name in WEIGHTS)


def test_a_threshold_may_empty_a_layer_unless_min_keep_says_otherwise():
    assert gp.prune(small_model(), threshold=100.0).sparsity == 1.0
    masks = gp.prune(small_model(), threshold=100.0, min_keep=2)
    assert [int(mask.sum()) for mask in masks.values()] == [2, 2, 2]


# ------------------------------------------------------------------------------------------------------------ scope


def test_layer_scope_takes_the_same_fraction_of_each_layer():
    masks = gp.prune(small_model(), sparsity=0.75, scope="layer")
    assert {name: int((~m).sum()) for name, m in masks.items()} == {n: round(0.75 * c) for n, c in WEIGHTS.items()}


def test_a_dict_gives_sparsities_by_name_and_the_rest_stays_dense_or_gets_the_sparsity():
    masks = gp.prune(small_model(), scope={"4.weight": 0.9, "6.weight": 1.0})
    assert {n: int((~m).sum()) for n, m in masks.items()} == {"0.weight": 0, "4.weight": 2304, "6.weight": 200}
    masks = gp.prune(small_model(), scope={"4.weight": 0.9}, sparsity=0.5)
    assert {n: int((~m).sum()) for n, m in masks.items()} == {"0.weight": 36, "4.weight": 2304, "6.weight": 100}


def layer_of_tiny_weights():
    model = small_model()
    with torch.no_grad():
        model[6].weight.mul_(1e-6)
    return model


def test_no_layer_is_emptied_unless_asked():
    assert int(gp.prune(layer_of_tiny_weights(), sparsity=0.9)["6.weight"].sum()) == 1
    assert int(gp.prune(layer_of_tiny_weights(), sparsity=0.9, min_keep=7)["6.weight"].sum()) == 7
    assert int(gp.prune(layer_of_tiny_weights(), sparsity=0.9, min_keep=0)["6.weight"].sum()) == 0
    for keep in (0, 1, 7):
        model = layer_of_tiny_weights()
        masks = gp.prune(model, sparsity=0.9, min_keep=keep)
        assert sum(zeros(model, masks).values()) == round(0.9 * TOTAL)
        kept = model[6].weight[masks["6.weight"]].abs()
        assert kept.numel() == 0 or kept.min() >= small_model()[6].weight.abs().sort().values.flatten()[0] * 1e-6


def test_layers_that_come_down_to_their_floor_are_warned_of_once_by_name_with_counts():
    model = layer_of_tiny_weights()
    with pytest.warns(UserWarning, match=r"'6\.weight' keeps 1 of 200 weights.*min_keep=") as caught:
        masks = gp.prune(model, sparsity=0.9)
    assert len(caught) == 1
    assert "'0.weight'" not in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"'6\.weight' keeps 10 of 200 weights"):
        gp.prune(layer_of_tiny_weights(), sparsity=0.5, granularity=(5, 2), include=["4.*", "6.*"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was there before, or the floor was asked for, or it is a fair share
        gp.prune(model, sparsity=0.95, within=masks)
        gp.prune(layer_of_tiny_weights(), sparsity=0.9, min_keep=1)
        gp.prune(layer_of_tiny_weights(), sparsity=0.9, scope="layer")
        gp.prune(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1), nn.Linear(1, 2)), sparsity=0.5)


def test_a_layer_that_ends_at_its_floor_by_itself_is_warned_of_too():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1, 101).view(10, 10))
        model[1].weight.fill_(0.5)
        model[1].weight[3, 3] = 200
    with pytest.warns(UserWarning, match=r"'1\.weight' keeps 1 of 100 weights"):
        masks = gp.prune(model, sparsity=0.75)
    assert [int(mask.sum()) for mask in masks.values()] == [49, 1]


@pytest.mark.parametrize("layers", [5, 6])
def test_the_warning_of_floors_names_at_most_five_layers(layers):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), *[nn.Linear(40, 40) for _ in range(layers)])
    with torch.no_grad():
        model[0].weight.mul_(1e6)
    with pytest.warns(UserWarning, match=r"'1\.weight' keeps 1 of 1,600 weights") as caught:
        gp.prune(model, sparsity=0.95)
    assert ("and 1 more layers" in str(caught[0].message)) == (layers == 6)
    assert "'5.weight'" in str(caught[0].message)
    assert "'6.weight'" not in str(caught[0].message)


def test_a_budget_below_one_weight_a_layer_warns_and_min_keep_refuses():
    model = small_model()
    with pytest.warns(UserWarning, match="leaves 2 weights for 3 layers"):
        masks = gp.prune(model, sparsity=1 - 2 / TOTAL)
    assert sum(int(m.sum()) for m in masks.values()) == 2
    with pytest.raises(ValueError, match="min_keep=1 needs 3 weights over all layers, the sparsity leaves 2"):
        gp.prune(small_model(), sparsity=1 - 2 / TOTAL, min_keep=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 100 % is asking
        assert gp.prune(small_model(), sparsity=1.0).sparsity == 1.0
    with pytest.warns(UserWarning, match=r"sparsity=1 prunes every weight: it is a fraction"):
        gp.prune(small_model(), sparsity=1)


# ------------------------------------------------------------------------------------------------------ granularity


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
@pytest.mark.parametrize("score", [gp.magnitude, gp.random])
def test_channels_go_whole_and_come_nearest_to_the_count(scope, score):
    model = small_model()
    masks = gp.prune(model, score, sparsity=0.5, scope=scope, granularity="channel")
    for mask in masks.values():
        rows = mask.flatten(1)
        assert (rows.all(dim=1) | ~rows.any(dim=1)).all()
    assert abs(sum(zeros(model, masks).values()) - TOTAL / 2) <= 64


def test_the_channels_with_the_smallest_norm_go():
    model = nn.Linear(8, 10, bias=False)
    norms = model.weight.detach().abs().sum(dim=1)
    mask = gp.prune(model, sparsity=0.3, granularity="channel")["weight"]
    assert set((~mask[:, 0]).nonzero().flatten().tolist()) == set(norms.argsort()[:3].tolist())


@pytest.mark.parametrize("granularity", [(2, 4), "2:4"])
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_two_of_four_stay_along_the_input_dimension(granularity, sparsity):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(8, 6))
    masks = gp.prune(model, sparsity=sparsity, granularity=granularity)
    assert (masks["1.weight"].view(6, 2, 4).sum(dim=2) == 2).all()
    assert (masks["0.weight"].sum(dim=1) == 2).all()


@pytest.mark.parametrize(
    ("granularity", "block"), [((4, 4), (4, 4)), ("2x4", (2, 4)), ((4, 1), (4, 1)), ("1x2", (1, 2))]
)
def test_blocks_go_whole(granularity, block):
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Conv2d(8, 4, 3, bias=False))
    expected = {
        name: p.detach().abs().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).mean(dim=(1, 3))
        for name, p in model.named_parameters()
    }
    masks = gp.prune(model, sparsity=0.5, scope="layer", granularity=granularity)
    for name, mask in masks.items():
        tiles = mask.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).transpose(1, 2).flatten(2)
        kept = tiles.any(dim=2)
        assert torch.equal(kept, tiles.all(dim=2))
        means = expected[name].flatten(2).mean(dim=2) if expected[name].dim() > 2 else expected[name]
        assert means[kept].min() >= means[~kept].max()
        assert int(kept.sum()) == kept.numel() // 2


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ((2, 4), r"'0\.weight' has 2 entries along dimension 1, not a multiple of 4; exclude it"),
        ((3, 1), r"'0\.weight' has 4 entries along dimension 0, not a multiple of 3"),
        ("1x1x1", r"a block of shape \(1, 1, 1\) does not fit '4\.weight', which has shape \(40, 64\)"),
        ("rows", 'granularity must be "weight", "channel"'),
        ((0, 2), "granularity must be"),
        ("4:2", "granularity must be"),
        (3, "granularity must be"),
    ],
)
def test_a_granularity_that_does_not_fit_is_an_error(granularity, message):
    with pytest.raises(ValueError, match=message):
        gp.prune(small_model(), sparsity=0.5, granularity=granularity)


# ------------------------------------------------------------------------------------------------------ eligibility


def test_eligible_are_trainable_matrices_of_neither_embeddings_nor_norms():
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(10, 8),
            "norm": nn.LayerNorm((4, 8)),
            "frozen": nn.Linear(8, 8).requires_grad_(False),
            "linear": nn.Linear(8, 8),
            "head": nn.Linear(8, 10, bias=False),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    assert list(gp.prune(model, sparsity=0.5)) == [
        "linear.weight", "head.weight", "attention.in_proj_weight", "attention.out_proj.weight",
    ]  # fmt: skip
    model["head"].weight = model["embedding"].weight
    assert "head.weight" not in gp.prune(model, sparsity=0.5)


def test_include_and_exclude_are_glob_patterns():
    assert list(gp.prune(small_model(), sparsity=0.5, include="[46].*")) == ["4.weight", "6.weight"]
    assert list(gp.prune(small_model(), sparsity=0.5, include=["4.*", "6.*"], exclude="6.weight")) == ["4.weight"]
    assert list(gp.prune(small_model(), sparsity=0.5, exclude=["0.*"])) == ["4.weight", "6.weight"]


def test_a_tied_tensor_counts_once():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[1].weight = model[0].weight
    masks = gp.prune(model, sparsity=0.3)
    assert list(masks) == ["0.weight"]
    assert int((model[1].weight == 0).sum()) == 30


# ----------------------------------------------------------------------------------------------------------- errors


def scores_of_nan(model):
    return {name: p * math.nan for name, p in model.named_parameters()}


def negative_scores(model):
    return {name: -p.abs() for name, p in model.named_parameters()}


BAD_CALLS = [
    ({"sparsity": 1.2}, r"sparsity must be in \[0, 1\], got 1\.2"),
    ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\], got -0\.1"),
    ({"sparsity": math.nan}, r"sparsity must be in \[0, 1\], got nan"),
    ({}, "exactly one of sparsity and threshold; got neither"),
    ({"sparsity": 0.5, "threshold": 0.1}, "exactly one of sparsity and threshold; got both"),
    ({"threshold": math.nan}, "threshold must be a number"),
    ({"sparsity": 0.5, "include": "nothing.*"}, r"include pattern 'nothing\.\*' matches none of \['0\.weight'"),
    ({"sparsity": 0.5, "include": "*.bias"}, r"include pattern '\*\.bias' matches only \['0\.bias'.*not eligible"),
    ({"sparsity": 0.5, "exclude": ["0.*", "x"]}, "exclude pattern 'x' matches none"),
    ({"sparsity": 0.5, "exclude": "*"}, "leave nothing of"),
    ({"sparsity": 0.5, "scope": "model"}, r"scope must be one of \('global', 'layer', 'erk', 'lamp'\)"),
    ({"threshold": 0.5, "scope": "erk"}, "scope='erk' shares out a sparsity"),
    ({"threshold": 0.5, "scope": {"0.weight": 0.5}}, "does not go with a threshold"),
    ({"scope": {"fc": 0.5}}, r"scope names 'fc', which is not eligible; eligible are \['0\.weight'"),
    ({"scope": {"0.weight": 1.5}}, r"sparsity of '0\.weight' must be in \[0, 1\], got 1\.5"),
    ({"sparsity": 0.5, "min_keep": -1}, "min_keep must be a whole number from 0, got -1"),
    ({"sparsity": 0.7, "min_keep": 1000}, "min_keep=1000 needs 1272 weights over all layers, the sparsity leaves 850"),
    ({"sparsity": 0.4, "granularity": "2:4", "include": "4.*"}, "granularity 2:4 is itself a sparsity of 0.5"),
    ({"threshold": 0.4, "granularity": "2:4", "include": "4.*"}, "granularity 2:4 is itself a sparsity of 0.5"),
    ({"granularity": "2:4", "include": "4.*", "scope": "erk"}, "leaves nothing to allocate; got scope='erk'"),
    ({"sparsity": 0.5, "within": {"0.weight": torch.ones(1)}}, r"`within` has shape \(1,\) for '0\.weight'"),
    ({"sparsity": 0.5, "within": {}}, r"`within` has no mask for '0\.weight'"),
    ({"sparsity": 0.5, "score": lambda m: {}}, r"the score has no value for '0\.weight'; give it one, or exclude"),
    ({"sparsity": 0.5, "score": lambda m: dict.fromkeys(WEIGHTS, torch.ones(2))}, r"\(2,\), wanted \(4, 2, 3, 3\)"),
    ({"sparsity": 0.5, "score": scores_of_nan}, r"'0\.weight' contains NaN"),
    ({"threshold": 0.5, "score": scores_of_nan}, r"'0\.weight' contains NaN"),
    ({"sparsity": 0.5, "scope": "lamp", "score": negative_scores}, "neither negative"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=[str(i) for i in range(len(BAD_CALLS))])
def test_a_call_that_fails_says_why_and_changes_nothing(arguments, message):
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    LOSS(model(DATA[0]), DATA[1]).backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        gp.prune(model, **arguments)
    assert same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("amount", [{"sparsity": 0.0}, {"sparsity": 0.5}, {"sparsity": 1.0}, {"threshold": 0.1}])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_nan_weight_is_named_and_nothing_changes(amount, granularity):
    model = small_model()
    model[4].weight.data[3, 3] = math.nan
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"'4\.weight' contains NaN"):
        gp.prune(model, granularity=granularity, **amount)
    assert torch.equal(before, model[0].weight)


@pytest.mark.parametrize(
    "model", [nn.ReLU(), nn.LayerNorm(4), nn.Embedding(4, 4), nn.Linear(2, 2).requires_grad_(False)]
)
def test_a_model_with_nothing_to_prune_is_an_error(model):
    with pytest.raises(ValueError, match="nothing to prune: none of its"):
        gp.prune(model, sparsity=0.5)


def test_an_interrupted_score_leaves_the_model_as_it_was():
    model = small_model().train()
    LOSS(model(DATA[0]), DATA[1]).backward()
    before = snapshot(model)

    def failing_loss(output, target):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gp.prune(model, partial(gp.taylor, batches=[DATA], loss=failing_loss), sparsity=0.5)
    assert same(before, snapshot(model))


# ----------------------------------------------------------------------------------------------------------- within


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize("score", [gp.magnitude, gp.random])
def test_within_earlier_masks_nothing_comes_back(scope, granularity, score):
    model = small_model()
    masks = None
    for sparsity in (0.3, 0.6, 0.9):
        earlier, masks = (
            masks,
            gp.prune(model, score, sparsity=sparsity, scope=scope, granularity=granularity, within=masks),
        )
        if earlier is not None:
            assert not any((masks[name] & ~earlier[name]).any() for name in masks)
        if granularity == "weight":
            assert sum(zeros(model, masks).values()) == round(sparsity * TOTAL)


def test_within_masks_that_keep_too_little_is_an_error():
    model = small_model()
    masks = gp.prune(model, sparsity=0.5)
    with pytest.raises(ValueError, match=r"sparsity 0\.3 lets 1982 weights stay, but `within` allows only 1416"):
        gp.prune(model, sparsity=0.3, within=masks)
    with pytest.raises(ValueError, match=r"weight' is to keep \d+ units, but `within` allows only"):
        gp.prune(model, scope={"4.weight": 0.0}, within=masks)


# ----------------------------------------------------------------------------------------------------------- pruner


def train(model, optimizer, steps, seed=11):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(6, 2, 6, 6, generator=generator), torch.randint(0, 5, (6,), generator=generator)
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
        yield


@pytest.mark.parametrize(
    "schedule",
    [
        gp.OneShot(0.8),
        gp.OneShot(0.8, at=3),
        gp.Linear(0.9, 2, 8, every=2),
        gp.Cubic(0.9, 1, 9),
        gp.Geometric(0.2, 2, 4),
        lambda step: min(step, 5) / 10,
    ],
)
@pytest.mark.parametrize("score", [gp.magnitude, gp.taylor])
def test_the_pruner_follows_its_schedule_exactly(schedule, score):
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), 0.01, weight_decay=0.01)
    LOSS(model(DATA[0]), DATA[1]).backward()
    pruner = gp.Pruner(model, optimizer, schedule, score)
    for step in itertools.chain([0], range(1, 12)):
        if step:
            next(train(model, optimizer, 1, seed=step))
        wanted = round(schedule(step) * TOTAL)
        assert pruner.step == step
        assert sum(int((~m).sum()) for m in pruner.masks.values()) == wanted
        assert all(not model.get_parameter(n)[~m].any() for n, m in pruner.masks.items())
        assert sum(sum(e.removed.values()) for e in pruner.events) == wanted
        assert len(optimizer._optimizer_step_post_hooks) <= 2


def test_the_log_says_what_each_event_removed_where():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = gp.Pruner(model, optimizer, gp.Linear(0.4, 0, 4, every=2), scope="layer")
    list(train(model, optimizer, 6))
    assert [e.step for e in pruner.events] == [2, 4]
    assert [e.amount for e in pruner.events] == [pytest.approx(0.2), pytest.approx(0.4)]
    # a fifth of 72, 2560 and 200; the fractions of a weight go to the largest remainders
    assert pruner.events[0].removed == {"0.weight": 14, "4.weight": 512, "6.weight": 40}
    assert not any(pruner.events[0].regrown.values())


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("regrow", [None, "RigL"])
def test_a_run_resumed_in_the_middle_of_the_schedule_is_the_same_bit_for_bit(optimizer_class, regrow):
    def start():
        model = small_model()
        options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
        optimizer = optimizer_class(model.parameters(), 0.05, weight_decay=0.01, **options)
        growth = gp.Regrow(gp.gradient, 0.3, every=3) if regrow else None
        return model, optimizer, gp.Pruner(model, optimizer, gp.Cubic(0.9, 1, 10, every=2), regrow=growth)

    whole = start()
    list(train(whole[0], whole[1], 6, seed=1))
    checkpoint = copy.deepcopy([part.state_dict() for part in whole])
    list(train(whole[0], whole[1], 8, seed=2))

    resumed = start()
    for part, state in zip(resumed, checkpoint, strict=True):
        part.load_state_dict(state)
    list(train(resumed[0], resumed[1], 8, seed=2))
    assert same(whole[0].state_dict(), resumed[0].state_dict())
    assert same(whole[1].state_dict(), resumed[1].state_dict())
    assert same(dict(whole[2].masks), dict(resumed[2].masks))
    assert whole[2].events == resumed[2].events


def test_a_threshold_can_be_scheduled():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = gp.Pruner(model, optimizer, lambda step: 0.02 * (step // 2), amount="threshold")
    list(train(model, optimizer, 4))
    assert [e.step for e in pruner.events] == [2, 4]
    assert 0 < pruner.masks.sparsity < 1


def test_n_of_m_is_reached_by_a_schedule():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=2), granularity=(2, 4), include=["4.*", "6.*"])
    list(train(model, optimizer, 3))
    assert pruner.masks.sparsity == 0.5


@pytest.mark.parametrize("by", [gp.gradient, gp.random], ids=["RigL", "SET"])
def test_regrowth_swaps_weights_and_keeps_the_count_of_each_layer(by):
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.8), scope="erk", regrow=gp.Regrow(by, 0.25, every=2))
    before = {n: m.clone() for n, m in pruner.masks.items()}
    list(train(model, optimizer, 2))
    event = pruner.events[-1]
    assert event.step == 2
    for name, mask in pruner.masks.items():
        kept = int(before[name].sum())
        swapped = min(int(0.25 * kept), before[name].numel() - kept)
        assert event.removed[name] == event.regrown[name] == swapped
        assert int(mask.sum()) == kept
        back = mask & ~before[name]
        assert int(back.sum()) == swapped
        assert not model.get_parameter(name)[back].any()  # at zero, without momentum
        assert not optimizer.state[model.get_parameter(name)]["momentum_buffer"][back].any()
    list(train(model, optimizer, 1))
    assert all(model.get_parameter(n)[m & ~before[n]].any() for n, m in pruner.masks.items() if event.regrown[n])


def test_rigl_grows_where_the_dense_gradient_is_largest():
    model = nn.Linear(12, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5), regrow=gp.Regrow(gp.gradient, 0.1, every=1))
    pruned = ~pruner.masks["weight"]
    model.weight.grad = torch.randn(10, 12)
    expected = torch.where(pruned, model.weight.grad.abs(), -1.0).view(-1).topk(6).indices
    weakest = torch.where(pruned, math.inf, model.weight.detach().abs()).view(-1).argsort()[:6]
    optimizer.step()
    back = pruner.masks["weight"] & pruned
    assert set(back.view(-1).nonzero().flatten().tolist()) == set(expected.tolist())
    gone = ~pruner.masks["weight"] & ~pruned
    assert set(gone.view(-1).nonzero().flatten().tolist()) == set(weakest.tolist())


def test_removing_the_pruner_ends_pruning_and_holding():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = gp.Pruner(model, optimizer, gp.Linear(0.9, 0, 10))
    list(train(model, optimizer, 4))
    pruner.remove()
    list(train(model, optimizer, 2))
    assert pruner.step == 4
    assert not optimizer._optimizer_step_post_hooks
    assert model[4].weight[~pruner.masks["4.weight"]].any()


def test_pruner_errors_say_what_is_wrong_before_anything_changes():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = snapshot(model, optimizer)
    for arguments, message in [
        ({"schedule": gp.OneShot(0.5), "include": "x"}, "include pattern 'x' matches none"),
        ({"schedule": lambda step: 1.5}, r"sparsity must be in \[0, 1\], got 1\.5"),
        ({"schedule": gp.OneShot(0.5), "score": scores_of_nan}, r"'0\.weight' contains NaN"),
        ({"schedule": gp.OneShot(0.5), "amount": "share"}, "amount must be one of 'sparsity', 'threshold'"),
        ({"schedule": gp.OneShot(0.5), "scope": {"0.weight": 0.5}}, "exclude each other"),
        ({"schedule": gp.OneShot(0.5), "granularity": "channel", "regrow": gp.Regrow(gp.random)}, "regrow needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            gp.Pruner(model, optimizer, **arguments)
    with pytest.raises(ValueError, match="optimizer owns none of"):
        gp.Pruner(model, torch.optim.SGD(small_model().parameters(), 0.1), gp.OneShot(0.5))
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        gp.Regrow(gp.random, every=0)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 2"):
        gp.Regrow(gp.random, fraction=2.0)
    assert same(before, snapshot(model, optimizer))
    assert not optimizer._optimizer_step_post_hooks


def test_a_schedule_that_falls_is_an_error_when_it_does():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gp.Pruner(model, optimizer, lambda step: 0.5 if step < 2 else 0.4)
    with pytest.raises(ValueError, match=r"falls from 0\.5 to 0\.4 at step 2; pruned weights come back only by regrow"):
        list(train(model, optimizer, 2))


def test_a_state_for_other_parameters_is_refused():
    model = small_model()
    pruner = gp.Pruner(model, torch.optim.SGD(model.parameters(), 0.1), gp.OneShot(0.5), include="4.*")
    other = gp.Pruner(model, torch.optim.SGD(model.parameters(), 0.1), gp.OneShot(0.5), include="6.*")
    with pytest.raises(ValueError, match=r"masks for \['6\.weight'\], this pruner prunes \['4\.weight'\]"):
        pruner.load_state_dict(other.state_dict())


def test_ten_lines_prune_ones_own_training_loop_on_digits(capsys):
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.tensor(part) for part in datasets.load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(0)
    shuffled = torch.randperm(len(x))
    train_part, test_part = shuffled[:1300], shuffled[1300:]

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pruner = gp.Pruner(model, optimizer, gp.Cubic(final=0.9, begin=50, end=300, every=25))
    for _ in range(40):
        for part in train_part[torch.randperm(len(train_part))].split(100):
            optimizer.zero_grad()
            LOSS(model(x[part]), y[part]).backward()
            optimizer.step()

    with torch.no_grad():
        accuracy = (model(x[test_part]).argmax(dim=1) == y[test_part]).float().mean().item()
    with capsys.disabled():
        print(
            f" [digits, {100 * pruner.masks.sparsity:.1f} % of weights pruned: test accuracy {100 * accuracy:.1f} %]",
            end="",
        )
    kept = sum(int((p != 0).sum()) for n, p in model.named_parameters() if n in pruner.masks)
    assert kept <= 64 * 128 + 1280 - round(0.9 * (64 * 128 + 1280))
    assert accuracy > 0.93


def test_erk_shares_by_the_layers_shapes():
    model = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.Linear(40, 20, bias=False))
    masks = gp.prune(model, sparsity=0.8, scope="erk")
    kept = [int(mask.sum()) for mask in masks.values()]
    assert sum(kept) == round(0.2 * 944)
    assert kept[0] / kept[1] == pytest.approx((2 + 8 + 3 + 3) / (40 + 20), rel=0.05)


def test_where_one_weight_is_left_for_two_layers_that_is_said_and_where_none_is_left_it_is_meant():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with pytest.warns(UserWarning, match="the sparsity leaves 1 weights for 2 layers: some layers become empty"):
        gp.prune(model, sparsity=31 / 32, scope="layer")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.prune(model, sparsity=1.0, scope="layer")

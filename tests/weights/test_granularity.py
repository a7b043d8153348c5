"""Channels, n of m, blocks and rows lie along the axes that the layer has, whatever the order of its storage."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradprune as gp
from gradprune.weights.plan import keep_in_rows


class Stacked(nn.Module):
    """Matrices of a kind of layer that nobody knows: `w` [out, in], `experts` [experts, in, out]."""

    def __init__(self, experts=True):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 8))
        if experts:
            self.experts = nn.Parameter(torch.randn(3, 8, 4))


# --------------------------------------------------------------------------------------------- transposed convolutions


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("layer", "extent"), [(nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)]
)
def test_channels_of_a_transposed_convolution_are_its_outputs(layer, extent, groups):
    torch.manual_seed(0)
    model = layer(4, 6, 3, groups=groups, bias=False)
    gp.prune(model, sparsity=0.5, granularity="channel")
    out = model(torch.rand(2, 4, *(5,) * extent) + 1)
    silent = [not out[:, unit].any() for unit in range(6)]
    assert sum(silent) == 3
    norms = torch.stack([w.detach().abs().sum() for w in layer_units(layer, groups)])
    assert [bool(n) for n in norms < norms.median().nextafter(torch.tensor(math.inf))] == silent


def layer_units(layer, groups):
    """The weights of each output unit, taken from the layer by its gradient."""
    torch.manual_seed(0)
    model = layer(4, 6, 3, groups=groups, bias=False)
    extent = model.weight.dim() - 2
    out = model(torch.rand(2, 4, *(5,) * extent) + 1)
    for unit in range(6):
        (gradient,) = torch.autograd.grad(out[:, unit].sum(), model.weight, retain_graph=True)
        yield model.weight[gradient != 0]


@pytest.mark.parametrize("groups", [1, 2])
def test_two_of_four_inputs_of_a_transposed_convolution_stay(groups):
    model = nn.ConvTranspose2d(8, 6, 3, groups=groups)
    mask = gp.prune(model, granularity="2:4")["weight"]
    assert bool((mask.unflatten(0, (-1, 4)).sum(1) == 2).all())
    each = "8 entries" if groups == 1 else "4 entries a group"
    with pytest.raises(ValueError, match=f"'weight' has {each} along dimension 0, not a multiple of 16"):
        gp.prune(model, granularity="3:16")


def test_a_block_lies_over_outputs_then_inputs():
    model = nn.ConvTranspose1d(8, 6, 1)
    mask = gp.prune(model, sparsity=0.5, granularity="3x4")["weight"].squeeze(-1).T  # [out, in]
    tiles = mask.unflatten(1, (2, 4)).unflatten(0, (2, 3)).transpose(1, 2).flatten(2)
    assert bool((tiles.all(2) == tiles.any(2)).all())
    assert int(tiles.any(2).sum()) == 2


# ------------------------------------------------------------------------------------------------- axes at one's word


@pytest.mark.parametrize(
    "how", [{"granularity": "channel", "sparsity": 0.5}, {"granularity": "2:4"}, {"scope": "row", "sparsity": 0.5}]
)
def test_matrices_of_an_unknown_layer_are_taken_as_out_in_with_a_warning(how):
    with pytest.warns(UserWarning, match=r"taken as \[out, in\].*'w' of a Stacked; axes= says otherwise"):
        gp.prune(Stacked(experts=False), **how)
    model = Stacked()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"axis of 'experts', \(3, 8, 4\) in a Stacked.*axes=\{'experts': \(output"):
        gp.prune(model, **how)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_stated_axes_are_used_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = gp.prune(Stacked(), granularity="2:4", axes={"experts": (2, 1), "w": (0, 1)})
        assert bool((masks["experts"].unflatten(1, (2, 4)).sum(2) == 2).all())
        assert bool((masks["w"].unflatten(1, (2, 4)).sum(2) == 2).all())
        masks = gp.prune(Stacked(), sparsity=0.75, scope="row", axes={"*": (-1, -2)})
        assert masks["experts"].sum(1).unique().tolist() == [2]
        assert masks["w"].sum(0).unique().tolist() == [1]
        masks = gp.prune(Stacked(), sparsity=0.5, granularity="channel", axes={"*": (-1, -2)}, include="experts")
        units = masks["experts"].transpose(1, 2)
        assert bool((units.all(2) == units.any(2)).all())
        assert int(units.any(2).sum()) == 6


def test_single_weights_need_no_axes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gp.prune(Stacked(), sparsity=0.5).sparsity == 0.5


@pytest.mark.parametrize(
    ("axes", "error", "words"),
    [
        (3, TypeError, "axes must be a dict"),
        ({3: (0, 1)}, TypeError, "axes must be a glob pattern"),
        ({"x": (0, 1)}, ValueError, "axes pattern 'x' matches none of"),
        ({"w": 1}, ValueError, r"the axes of 'w' must be a pair of ints, \(output, input\), got 1"),
        ({"w": (0, 2)}, ValueError, r"two different ones of its 2, got \(0, 2\)"),
    ],
)
def test_axes_that_cannot_be_are_refused(axes, error, words):
    with pytest.raises(error, match=words):
        gp.prune(Stacked(), sparsity=0.5, axes=axes)


# ------------------------------------------------------------------------------------------------------- the last layer


def body_and_head():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(8, 8), "head": nn.Linear(8, 10)})


def test_pruning_the_last_layer_s_outputs_is_warned_of_unless_asked_for():
    with pytest.warns(UserWarning, match=r"outputs of 'head.weight', the model's last layer.*exclude='head.weight'"):
        gp.prune(body_and_head(), sparsity=0.5, granularity="channel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.prune(body_and_head(), sparsity=0.5, granularity="channel", exclude="head.weight")
        gp.prune(body_and_head(), sparsity=0.5, granularity="channel", include=["body.*", "head.*"])
        gp.prune(body_and_head(), sparsity=0.5)
        gp.prune(nn.Linear(8, 10), sparsity=0.9, granularity="channel")  # there is nothing else that could go


# ----------------------------------------------------------------------------------------------------------------- rows


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.one_of(st.integers(1, 9), st.integers(30, 80))),
    sparsity=st.floats(0, 1),
    ties=st.booleans(),
    by_magnitude=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:rows are too short", "ignore:.*weights are zero already")
def test_each_row_keeps_its_largest_and_the_later_of_equals(shape, sparsity, ties, by_magnitude):
    model = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randint(-2, 3, shape) if ties else torch.randn(shape))
    values = model.weight.detach().abs().clone()
    score = gp.magnitude if by_magnitude else lambda m: {"weight": values}
    mask = gp.prune(model, score, sparsity=sparsity, scope="row")["weight"]
    keep = shape[1] - round(sparsity * shape[1])
    for row, kept in zip(values.tolist(), mask.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (row[i], i))
        assert [i for i, stays in enumerate(kept) if stays] == sorted(order[len(row) - keep :])


@pytest.mark.parametrize("by", ["magnitude", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["drawn", "ties", "zeros of both signs", "infinities", "equal"])
def test_long_rows_are_those_of_a_sort(dtype, by, kind):
    rows = torch.randn(7, 90, generator=torch.Generator().manual_seed(0))
    rows = {
        "drawn": rows,
        "ties": rows.round(),
        "zeros of both signs": (rows.round() * 0).copysign(rows),
        "infinities": torch.where(rows.abs() > 1, rows * torch.inf, rows),
        "equal": torch.ones_like(rows),
    }[kind].to(dtype)
    size = rows.abs() if by == "magnitude" else rows
    for view, sizes in ((rows, size), (rows.T.contiguous().T, size), (rows[:, ::2], size[:, ::2])):
        for count in (0, 1, 17, 44, view.shape[1]):
            goes = sizes.sort(dim=1, stable=True).indices[:, : view.shape[1] - count]
            wanted = torch.ones(view.shape, dtype=torch.bool).scatter_(1, goes, False)
            assert torch.equal(keep_in_rows("w", view, count, by, None), wanted)


def test_rows_of_convolutions_are_whole_filters_and_groups_have_their_own():
    for model in (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2)):
        mask = gp.prune(model, sparsity=0.5, scope="row")["weight"]
        assert mask.flatten(1).sum(1).unique().tolist() == [mask[0].numel() // 2]
    mask = gp.prune(nn.ConvTranspose2d(4, 6, 3, groups=2), sparsity=0.5, scope="row")["weight"]
    assert mask.unflatten(0, (2, 2)).sum((1, 3, 4)).unique().tolist() == [9]


def test_rows_obey_earlier_masks():
    torch.manual_seed(0)
    model = nn.Linear(10, 6, bias=False)
    first = gp.prune(model, sparsity=0.3, scope="row")
    second = gp.prune(model, gp.random, sparsity=0.8, scope="row", within=first)
    assert second["weight"].sum(1).tolist() == [2] * 6
    assert not bool((second["weight"] & ~first["weight"]).any())
    with pytest.raises(ValueError, match="row of 'weight' is to keep 5 weights, but `within` allows only 2 in one"):
        gp.prune(model, sparsity=0.5, scope="row", within=second)


def test_rows_too_short_warn_and_min_keep_refuses():
    with pytest.warns(UserWarning, match=r"rows are too short for a sparsity of 0.95: \['weight'\] become empty"):
        assert gp.prune(nn.Linear(8, 4), sparsity=0.95, scope="row").sparsity == 1.0
    with pytest.raises(ValueError, match="'weight' keeps 4 weights, 1 a row, fewer than min_keep=5"):
        gp.prune(nn.Linear(8, 4), sparsity=0.9, scope="row", min_keep=5)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"threshold": 0.1}, "scope='row' shares out a sparsity; it does not go with a threshold"),
        ({"sparsity": 0.5, "granularity": "channel"}, "scope='row' prunes single weights"),
        ({"granularity": "2:4"}, "leaves nothing to allocate; got scope='row'"),
    ],
)
def test_rows_go_with_a_sparsity_of_single_weights_alone(how, words):
    with pytest.raises(ValueError, match=words):
        gp.prune(nn.Linear(8, 4), scope="row", **how)


# ------------------------------------------------------------------------------------------------------- earlier masks


@pytest.mark.parametrize("score", [gp.magnitude, gp.random])
@pytest.mark.parametrize("how", [{"granularity": "2:4"}, {"granularity": (2, 2), "sparsity": 0.6}, {"threshold": 0.1}])
def test_what_earlier_masks_prune_stays_pruned(score, how):
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    first = gp.prune(model, gp.random, sparsity=0.3)
    second = gp.prune(model, score, within=first, **how)
    assert not bool((second["weight"] & ~first["weight"]).any())
    assert torch.equal(model.weight == 0, ~second["weight"])
    if how == {"granularity": "2:4"}:  # two of four where so many are left
        left = first["weight"].view(-1, 4).sum(1).clamp(max=2)
        assert torch.equal(second["weight"].view(-1, 4).sum(1), left)


def test_an_empty_layer_is_passed_over():
    for how in ({"sparsity": 0.5}, {"sparsity": 0.5, "granularity": "channel"}, {"sparsity": 0.5, "scope": "row"}):
        model = nn.ModuleDict({"layer": nn.Linear(4, 4)})
        model["none"] = nn.Linear(4, 4)
        model["none"].weight = nn.Parameter(torch.empty(4, 0))
        masks = gp.prune(model, **how)
        assert int((~masks["layer.weight"]).sum()) == 8
        assert masks["none.weight"].shape == (4, 0)


def test_a_pair_is_n_of_m_where_n_is_less_and_a_block_elsewhere_and_text_is_n_of_m_also_where_they_are_equal():
    def masks(**how):
        torch.manual_seed(0)
        return gp.prune(nn.Linear(8, 8), **how)["weight"]

    two_of_four = masks(granularity=(2, 4))
    assert (two_of_four.view(8, 2, 4).sum(-1) == 2).all()
    for how in ({"granularity": "2:4"}, {"granularity": (2, 4), "sparsity": 0.5}):
        assert torch.equal(masks(**how), two_of_four)
    with pytest.raises(ValueError, match="is itself a sparsity of"):
        masks(granularity=(2, 4), sparsity=0.6)
    assert masks(granularity="4:4").all()
    for block in ((4, 4), (4, 2)):
        tiles = masks(granularity=block, sparsity=0.5).unfold(0, 4, 4).unfold(1, block[1], block[1]).flatten(2)
        assert (tiles.all(-1) | ~tiles.any(-1)).all()
    with pytest.raises(ValueError, match=r'\(n, m\) with n < m, "n:m" with n <= m'):
        masks(granularity="4:2", sparsity=0.5)


def test_a_bias_asked_for_by_include_is_refused_with_what_rules_it_out():
    with pytest.raises(ValueError, match=r"'\*\.bias' matches only \['0\.bias'\], .*has 1 dimension, fewer than two"):
        gp.prune(nn.Sequential(nn.Linear(4, 4)), sparsity=0.5, include="*.bias")

"""Weights share the best few values there are, and what was zero is zero."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import digits, gpt2
from sklearn.cluster import KMeans
from torch import nn

import gradprune as gp
from gradprune.deploy import share


def cost(values, counts, of_value, centers):
    return float((counts * (values - centers[of_value]) ** 2).sum())


def least(values, counts, k):
    """Of all ways to cut, by trying them."""
    n, found = len(values), np.inf
    for cuts in itertools.combinations(range(1, n), k - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *cuts, n)):
            mean = np.average(values[a:b], weights=counts[a:b])
            total += float((counts[a:b] * (values[a:b] - mean) ** 2).sum())
        found = min(found, total)
    return found


@settings(max_examples=200)
@given(
    values=st.lists(st.one_of(st.integers(-9, 9).map(float), st.floats(-10, 10, width=32)), min_size=1, max_size=10),
    k=st.integers(1, 6),
    data=st.data(),
)
def test_no_way_to_cut_costs_less(values, k, data):
    values = np.unique(values)
    counts = np.array(data.draw(st.lists(st.integers(1, 5), min_size=len(values), max_size=len(values))))
    of_value, centers = share.clusters(values, counts, k)
    if len(values) <= k:
        assert np.array_equal(centers[of_value], values)
    else:
        assert len(centers) == k
        assert cost(values, counts, of_value, centers) == pytest.approx(least(values, counts, k), abs=1e-8)


@pytest.mark.parametrize("k", [4, 16])
def test_scikit_learn_never_finds_less(k):
    values = np.unique(np.random.default_rng(0).standard_t(3, 2000))
    found = cost(values, 1, *share.clusters(values, np.ones(2000, int), k))
    for seed in range(5):
        theirs = KMeans(k, n_init=1, random_state=seed).fit(values[:, None]).inertia_
        assert found <= theirs * (1 + 1e-9)


@pytest.mark.parametrize("draw", [lambda g: g.normal(size=20_000), lambda g: g.standard_t(2, 20_000)])
def test_above_the_exact_size_the_cost_is_near_the_least(draw, monkeypatch):
    values = np.unique(draw(np.random.default_rng(0)))
    counts = np.ones(len(values), int)
    exact = cost(values, counts, *share.clusters(values, counts, 16))
    monkeypatch.setattr(share, "EXACT", 1000)
    monkeypatch.setattr(share, "GROUPS", 2000)
    near = cost(values, counts, *share.clusters(values, counts, 16))
    assert exact <= near * (1 + 1e-12)
    assert near < 1.001 * exact


@pytest.mark.parametrize("build", [digits, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_has_so_many_values_and_its_zeros(build, dtype):
    model = build().to(dtype)
    masks = gp.prune(model, sparsity=0.6, scope="layer")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shared = gp.share_weights(model, 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for name, parameter in shared.named_parameters():
        if name in masks:
            assert torch.equal(parameter != 0, masks[name])
            assert parameter[parameter != 0].unique().numel() == 8
        else:
            assert torch.equal(parameter, before[name])
    assert [layer.values for layer in shared.shared.layers] == [8] * len(masks)
    assert all(0 < layer.error < 0.4 for layer in shared.shared.layers)


def test_as_many_values_as_there_are_change_nothing():
    model = nn.Linear(8, 8)
    model.weight.data = torch.randint(-3, 4, (8, 8)).float()
    shared = gp.share_weights(model, 6)
    assert torch.equal(shared.weight, model.weight)
    assert shared.shared.layers[0].error == 0
    assert torch.equal(
        gp.share_weights(nn.Linear(4, 4), 1).weight.unique().numel() == torch.tensor(1), torch.tensor(True)
    )


def test_what_is_not_zero_does_not_become_so():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    assert gp.share_weights(model, 1).weight.count_nonzero() == 2


def test_masks_patterns_and_an_empty_layer():
    model = digits()
    masks = gp.Masks({"0.weight": torch.zeros(48, 64) > 0})
    shared = gp.share_weights(model, 4, masks=masks, include="0.*")
    assert shared[0].weight.count_nonzero() == 0
    assert [layer.name for layer in shared.shared.layers] == ["0.weight"]
    assert torch.equal(shared[2].weight, model[2].weight)
    assert model[0].weight.count_nonzero() == 48 * 64


def test_what_cannot_be_shared_is_refused_in_words():
    with pytest.raises(ValueError, match="levels must be between 1 and 65536"):
        gp.share_weights(digits(), 0)
    model = digits()
    model[2].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"'2\.weight' has weights that are infinite or NaN"):
        gp.share_weights(model)
    with pytest.raises(TypeError, match=r"'0\.weight' is quantized"):
        gp.share_weights(gp.quantize(digits()))


def test_a_step_that_would_empty_a_cluster_is_not_taken(monkeypatch):
    monkeypatch.setattr(share, "EXACT", 10)
    monkeypatch.setattr(share, "GROUPS", 0)  # so few that 1001 and 1099 are in one, whatever is nearest to each
    far = np.arange(21) / 100
    values = np.concatenate([far, [999.0, 1001.0, 1099.0, 1101.0], 2000 + far[2:]])
    of_value, centers = share.clusters(values, np.ones(len(values), int), 5)
    assert list(np.unique(of_value)) == list(range(5))
    assert centers[1:4] == pytest.approx([999, 1050, 1101])

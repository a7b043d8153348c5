"""Do coupled channels go together, are they the least, and is their number exact?"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.lab import models

pytest.importorskip("torch_pruning")
sys.path.append(str(Path(__file__).parents[1] / "deploy"))

from networks import IMAGES, NETWORKS, Depthwise, Grouped, Residual, size, trained


def pruned(model, x=IMAGES, **how):
    masks = gp.prune(model, granularity="group", example=x, **how)
    assert masks.holds(model)
    return masks


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_goes_is_exactly_zero_and_can_be_taken_out(kind):
    model = trained(NETWORKS[kind])
    masks = pruned(model, sparsity=0.2)
    small = gp.shrink(model, IMAGES)
    assert size(small) < 0.9 * size(model)
    with torch.no_grad():
        assert torch.allclose(small(IMAGES), model(IMAGES), atol=1e-5)
    again = gp.prune(small, granularity="group", example=IMAGES, sparsity=0.0)  # nothing zero is left
    assert all(bool((p != 0).any(dim=-1).all()) for p in small.parameters() if p.dim() == 2)
    assert masks.sparsity > 0.1
    assert again.sparsity == 0


def test_a_residual_sum_loses_the_same_channels_on_both_sides_with_their_norms():
    model = trained(Residual)
    masks = pruned(model, sparsity=0.4, exclude="body.0.*")
    assert torch.equal(masks["stem.0.weight"].any(dim=(1, 2, 3)), masks["body.3.weight"].any(dim=(1, 2, 3)))
    kept = masks["stem.0.weight"].any(dim=(1, 2, 3))
    for name in ("stem.0.bias", "stem.1.weight", "stem.1.bias", "body.4.weight", "body.4.bias"):
        assert torch.equal(masks[name], kept)
    assert "head.bias" not in masks
    assert "body.1.weight" not in masks


def test_the_lowest_by_the_mean_of_their_scores_go_and_the_number_is_the_nearest():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))
    before = copy.deepcopy(model)
    masks = pruned(model, torch.randn(3, 10), sparsity=0.5)  # of 240 weights; each channel has 10
    gone = ~masks["0.weight"].any(1)
    assert int(gone.sum()) == 12
    assert masks.sparsity == 0.5
    scores = before[0].weight.detach().abs().mean(1)
    assert scores[gone].max() < scores[~gone].min()
    assert torch.equal(masks["0.bias"], ~gone)
    assert bool(masks["2.weight"].all())
    assert torch.equal(before[2].weight, model[2].weight)


def test_counts_speak_of_the_weights_and_the_masks_say_what_else_went():
    model, x = trained(models.residual), torch.randn(4, 40)
    masks = pruned(model, x, sparsity=0.5)
    weights = {name: mask for name, mask in masks.items() if mask.dim() > 1}
    total = sum(mask.numel() for mask in weights.values())
    gone = sum(int((~mask).sum()) for mask in weights.values())
    assert masks.sparsity == pytest.approx(gone / total)
    assert abs(gone - total / 2) <= 320
    assert {name for name in masks if name not in weights} >= {"block1.norm1.weight", "block1.norm1.bias"}
    assert f"{total:,} weights" in repr(masks)


def test_layer_takes_the_share_of_each_group():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.mul_(100)
    masks = pruned(model, torch.randn(3, 10), sparsity=0.5, scope="layer")
    assert [int(masks[name].any(1).sum()) for name in ("0.weight", "2.weight")] == [10, 4]


def test_a_group_is_named_by_any_weight_of_it_and_the_others_stay_unless_a_sparsity_is_given():
    model = trained(Residual)
    sizes = {"stem.0.weight": 0.5, "body.3.weight": 0.5, "body.0.weight": 0.25}
    alone = pruned(copy.deepcopy(model), scope={"body.3.weight": 0.5})
    assert torch.equal(alone["stem.0.weight"].any(dim=(1, 2, 3)), alone["body.3.weight"].any(dim=(1, 2, 3)))
    assert bool(alone["body.0.weight"].all())
    both = pruned(copy.deepcopy(model), scope={"body.3.*": 0.5}, sparsity=0.25)
    for name, sparsity in sizes.items():
        assert 1 - both[name].any(dim=(1, 2, 3)).double().mean() == pytest.approx(sparsity, abs=0.05)
    assert torch.equal(both["body.3.weight"], alone["body.3.weight"])
    pruned(model, scope={"head.weight": 0.0, "body.3.weight": 0.5})  # what stays needs no group
    assert torch.equal(model.stem[1].bias == 0, ~alone["stem.1.bias"])


def test_a_threshold_takes_what_scores_less_but_leaves_a_channel_of_each_group():
    model = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 5.0).unsqueeze(1).expand(4, 10))
    assert pruned(copy.deepcopy(model), torch.randn(3, 10), threshold=2.5)["0.weight"].any(1).tolist() == [0, 0, 1, 1]
    assert pruned(model, torch.randn(3, 10), threshold=99.0)["0.weight"].any(1).tolist() == [0, 0, 0, 1]


def test_grouped_convolutions_lose_equally_many_in_each_group():
    model = trained(Grouped)
    masks = pruned(model, sparsity=0.4)
    kept = masks["grouped.weight"].any(dim=(1, 2, 3)).view(4, 6).sum(1)
    assert len(set(kept.tolist())) == 1
    small = gp.shrink(model, IMAGES)
    assert small.grouped.out_channels == int(kept.sum())


def test_earlier_masks_stay_and_their_channels_go_first():
    model = trained(Depthwise)
    first = pruned(model, sparsity=0.1)
    second = pruned(model, sparsity=0.2, within=first)
    for name, mask in first.items():
        assert not bool((second[name] & ~mask).any())
    assert second.sparsity > first.sparsity


def test_another_score_and_holding_work_as_for_weights():
    model = trained(Residual).train()
    masks = pruned(model, sparsity=0.3, score=gp.random)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    masks.hold(optimizer)
    for _ in range(3):
        model(IMAGES).pow(2).sum().backward()
        optimizer.step()
    assert masks.holds(model)
    small = gp.shrink(model, IMAGES).eval()
    with torch.no_grad():
        assert torch.allclose(small(IMAGES), model.eval()(IMAGES), atol=1e-4)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"sparsity": 0.5, "example": None}, "needs example="),
        ({"sparsity": 0.5, "scope": "erk"}, "scope 'global', 'layer' or sparsities by name"),
        ({"scope": {"body.0.weight": 0.5}, "threshold": 0.1}, "does not go with a threshold"),
        ({"scope": {"head.weight": 0.5}}, "'head.weight', whose channels cannot go"),
        ({"scope": {"nothing": 0.5}}, "'nothing', which is not eligible"),
        ({"scope": {"stem.0.weight": 0.5, "body.3.weight": 0.25}}, "whose channels go together, different sparsities"),
        ({"sparsity": 0.5, "min_keep": 2}, "takes no min_keep"),
        ({}, "exactly one of sparsity and threshold; got neither"),
        ({"sparsity": 0.5, "threshold": 0.1}, "got both"),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\]"),
        ({"sparsity": 0.99}, "only .* are of coupled channels that can go"),
        ({"sparsity": 0.1, "include": "head.*"}, "couples no channels that can go"),
        ({"sparsity": 0.1, "include": "nothing"}, "pattern 'nothing' matches none"),
        ({"sparsity": 0.1, "granularity": "channel"}, "example is for granularity='group'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(how, said):
    model = trained(Residual)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        gp.prune(model, **{"granularity": "group", "example": IMAGES} | how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_does_not_take_groups_says_what_does():
    model = trained(Residual)
    with pytest.raises(
        ValueError, match=r'"group", coupled channels, needs an example .* it is for gp.prune, gp.Pruner'
    ):
        gp.largest_sparsity(model, lambda m: 1.0, at_least=0.5, granularity="group")


def test_a_nan_score_names_its_tensor():
    model = trained(Residual)
    with pytest.raises(ValueError, match=r"the score of 'stem.0.weight' contains NaN"):
        gp.prune(
            model,
            lambda m: {name: p.detach() * float("nan") for name, p in m.named_parameters()},
            sparsity=0.2,
            granularity="group",
            example=IMAGES,
        )


def test_channels_under_a_norm_over_channels_and_outputs_are_left():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2))
    masks = pruned(model, torch.randn(3, 4), sparsity=0.2)
    assert bool(masks["0.weight"].all())
    assert bool(masks["4.weight"].all())
    assert not bool(masks["2.weight"].all())


def test_torchs_defaults_do_not_leak_into_the_masks_of_channels():
    model = trained(Residual)
    wanted = pruned(copy.deepcopy(model), sparsity=0.3)
    torch.set_default_device("meta")
    try:
        found = gp.prune(model, granularity="group", example=IMAGES, sparsity=0.3)
    finally:
        torch.set_default_device(None)
    assert found == wanted
    assert any(mask.dim() == 1 for mask in found.values())  # biases and norms go with their channels

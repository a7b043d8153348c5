"""Are the diffusion model and the adapters of the zoo what their docstrings say?"""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.lab.zoo import adapters, base, by_name, diffusion, generative, tasks

# -------------------------------------------------------------------------------------------------------- diffusion


class KnowsTheMiddle(nn.Module):
    """Tells the noise exactly where all real points are one."""

    def __init__(self, middle):
        super().__init__()
        self.middle = torch.tensor(middle)

    def forward(self, points, step):
        _, left = diffusion.schedule()
        left = left[step, None]
        return (points - left.sqrt() * self.middle) / (1 - left).sqrt()


class SaysNothing(nn.Module):
    def forward(self, points, step):
        return torch.zeros_like(points)


def test_the_schedule_ends_in_noise_alone():
    variances, left = diffusion.schedule()
    assert len(variances) == diffusion.STEPS
    assert bool((variances.diff() > 0).all())
    assert left[0] == pytest.approx(1 - float(variances[0]))
    assert 0 < float(left[-1]) < 1e-4


def test_a_network_that_knows_the_noise_draws_the_real_points():
    drawn = diffusion.denoising(0).draw(KnowsTheMiddle([0.6, -0.8]), torch.Generator().manual_seed(0))
    assert drawn.shape == (generative.DRAWN, 2)
    torch.testing.assert_close(drawn, torch.tensor([0.6, -0.8]).expand_as(drawn), atol=1e-4, rtol=0)


def test_the_loss_is_0_for_the_noise_and_1_for_no_answer(monkeypatch):
    middle = torch.tensor([0.6, -0.8])
    monkeypatch.setattr(diffusion, "real_points", lambda count, generator: middle.expand(count, 2))
    task = diffusion.denoising(0)
    losses = [float(task.loss(KnowsTheMiddle([0.6, -0.8]), torch.Generator().manual_seed(s))) for s in range(5)]
    assert losses == pytest.approx([0] * 5, abs=1e-6)
    losses = [float(task.loss(SaysNothing(), torch.Generator().manual_seed(s))) for s in range(50)]
    assert sum(losses) / len(losses) == pytest.approx(1, abs=0.1)


def test_points_are_those_of_their_seed_and_part():
    torch.manual_seed(0)
    model = diffusion.NoisePredictor()
    with torch.no_grad():
        drawn = [
            diffusion.denoising(seed)._points(model, part)[0]
            for seed, part in ((3, "test"), (3, "test"), (4, "test"), (3, "validation"))
        ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_the_network_hears_the_step():
    torch.manual_seed(0)
    model, points = diffusion.NoisePredictor(), torch.randn(5, 2)
    told = [model(points, torch.full((5,), step)) for step in range(0, diffusion.STEPS, 7)]
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(told))


def test_every_layer_of_the_noise_predictor_is_pruned():
    row = by_name("diffusion model")
    masks = base.prune(row, base.network(row, 0), "magnitude", "layer", 0.5, 0)
    assert sorted(mask.shape for mask in masks.values()) == [(2, 64), (64, 26), (64, 64)]


# --------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapted():
    return adapters.adapted(0)


def test_adapters_start_as_the_network_below_them(adapted):
    x = tasks.digits(0).test.x
    with torch.no_grad():
        assert torch.equal(adapted(x), base.dense(adapters.BASE, 0)(x))


def test_the_network_below_knows_the_upright_digits_and_not_the_turned_ones(adapted):
    assert base.score(tasks.digits(0), adapted, "validation") > adapters.BASE.level
    assert base.score(adapters.turned(0), adapted, "validation") < 0.3


def test_a_turned_digit_is_a_quarter_round():
    upright, turned = tasks.digits(0).test, adapters.turned(0).test
    image, other = upright.x[0].view(8, 8), turned.x[0].view(8, 8)
    assert all(other[7 - column, row] == image[row, column] for row in range(8) for column in range(8))
    assert torch.equal(upright.y, turned.y)


def test_training_moves_the_adapters_alone(adapted):
    row = by_name("LoRA adapters")
    model = copy.deepcopy(adapted)
    base.train(row, model, adapters.turned(0), 3, rate=0.03, seed=0)
    before = adapted.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".down." in name or ".up." in name}
    assert len(changed) == 6


def test_frozen_weights_are_left_alone_unless_a_pattern_names_them(adapted):
    alone = base.prune(by_name("LoRA adapters"), copy.deepcopy(adapted), "random", "layer", 0.5, 0)
    assert len(alone) == 6
    assert all(name.endswith((".down.weight", ".up.weight")) for name in alone)
    row = by_name("LoRA adapters, base pruned")
    model = copy.deepcopy(adapted)
    masks = base.prune(row, model, "magnitude", "layer", 0.8, 0)
    assert len(masks) == 3
    assert all(name.endswith(".base.weight") for name in masks)
    base.train(row, model, adapters.turned(0), 3, rate=0.03, seed=0, masks=masks)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), adapted.get_parameter(name) * mask)


def test_sparse_adapters_merged_are_one_dense_layer():
    torch.manual_seed(0)
    layer = adapters.Adapted(nn.Linear(64, 128))
    nn.init.normal_(layer.up.weight)
    by = functools.partial(gp.random, generator=torch.Generator().manual_seed(0))
    gp.prune(layer, by, sparsity=0.5, scope="layer")
    assert float((layer.up.weight == 0).float().mean()) == pytest.approx(0.5)
    product = layer.up.weight @ layer.down.weight
    assert float((product != 0).float().mean()) == pytest.approx(1 - (1 - 0.5 * 0.5) ** adapters.RANK, abs=0.05)
    gp.prune(layer, sparsity=0.8, scope="layer", include="base.weight")
    assert bool((layer.merged()[product != 0] != 0).all())
    x = torch.randn(5, 64)
    merged = nn.functional.linear(x, layer.merged(), layer.base.bias)
    torch.testing.assert_close(layer(x), merged, atol=1e-5, rtol=1e-4)

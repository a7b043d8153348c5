"""Are the statistics of a batch norm those of the data it now sees, and is nothing else changed?"""

import copy

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune import lab


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 3, generator=generator) * rows for rows in (5, 20, 7)]


def test_the_statistics_are_those_of_all_samples_of_all_batches(model, batches):
    seen = model[0](torch.cat(batches)).detach()
    assert gp.recalibrate_(model, batches) == 1
    torch.testing.assert_close(model[1].running_mean, seen.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, seen.var(0), rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 3


def test_positions_of_a_convolution_count_as_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3))
    x = torch.randn(4, 1, 6, 6)
    gp.recalibrate_(model, [x[:1], x[1:]])
    torch.testing.assert_close(model[1].running_var, model[0](x).detach().var((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_a_pruned_network_in_eval_mode_then_answers_as_in_training_mode():
    torch.manual_seed(0)
    model, x = lab.models.residual(8), torch.randn(64, 40)
    gp.prune(model, sparsity=0.5)
    before = model.eval()(x)
    with torch.no_grad():
        wanted = copy.deepcopy(model).train()(x)
    gp.recalibrate_(model, [x])
    torch.testing.assert_close(model(x), wanted, rtol=0.02, atol=0.02)  # n - 1 values for n
    assert (before - wanted).abs().max() > 0.1


def test_a_norm_used_twice_counts_both_calls():
    norm = nn.BatchNorm1d(2)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return self.norm(x) + self.norm(x + 10)

    x = torch.randn(50, 2)
    assert gp.recalibrate_(Twice(), [x]) == 1
    torch.testing.assert_close(norm.running_mean, torch.cat([x, x + 10]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.cat([x, x + 10]).var(0))


def test_weights_modes_momentum_hooks_and_random_state_stay(model, batches):
    model.train()
    model[4].eval()
    weights = {name: p.clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    gp.recalibrate_(model, [(batches[0], None), [batches[1], None]])
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert [part.training for part in model] == [True] * 4 + [False]
    assert model[1].momentum == 0.1
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), random)


def test_statistics_of_half_precision_are_summed_in_double(batches):
    model = nn.Sequential(nn.BatchNorm1d(3)).to(torch.bfloat16)
    rows = [batch.to(torch.bfloat16) for batch in batches] * 50
    gp.recalibrate_(model, rows)
    seen = torch.cat(rows).double()
    torch.testing.assert_close(model[0].running_var.double(), seen.var(0), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: [x, torch.full((4, 3), torch.inf)], "not finite"),
        (lambda x: [x, x[:1]], "1 values a channel"),
        (lambda x: [], "reach no batch norm"),
        (lambda x: [x, x[:, :2]], "does not run on batch 1"),
    ],
    ids=["not finite", "one sample", "no batch", "another width"],
)
def test_a_failed_call_leaves_the_model_as_it_was(model, batches, wrong, words):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        gp.recalibrate_(model, wrong(batches[0]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[1].momentum == 0.1
    assert not model[1]._forward_hooks


def test_one_pair_of_tensors_is_no_list_of_batches(model, batches):
    with pytest.raises(TypeError, match=r"one pair of tensors: give \[\(inputs, targets\)\]"):
        gp.recalibrate_(model, (batches[0], torch.zeros(5)))


def test_a_model_without_running_statistics_is_refused():
    for model in (nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))):
        with pytest.raises(ValueError, match="no batch norm that keeps running statistics"):
            gp.recalibrate_(model, [torch.randn(4, 2)])


def test_a_norm_that_nothing_reaches_keeps_its_statistics(batches):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(x)

    model = Beside()
    assert gp.recalibrate_(model, batches) == 1
    assert torch.equal(model.unused.running_var, torch.ones(3))
    assert not torch.equal(model.used.running_var, torch.ones(3))

"""Are the networks of the chapters drawn and wired as they say?"""

import copy
import io
import math

import pytest
import torch
from torch import nn

from gradprune.lab import models, train
from gradprune.lab.data import load


@pytest.mark.parametrize("gain", [None, 0.5, 3.0])
@pytest.mark.parametrize(
    ("init", "variance"),
    [
        ("torch", lambda fan_in, fan_out: 1 / (3 * fan_in)),
        ("lecun", lambda fan_in, fan_out: 1 / fan_in),
        ("xavier", lambda fan_in, fan_out: 2 / (fan_in + fan_out)),
        ("he", lambda fan_in, fan_out: 2 / fan_in),
    ],
)
def test_the_variance_of_the_weights_is_that_of_the_formula(init, variance, gain):
    torch.manual_seed(0)
    model = models.mlp([300, 500, 200], init=init, gain=gain)
    for layer in (model[0].linear, model[1]):
        fan_out, fan_in = layer.weight.shape
        expected = variance(fan_in, fan_out) * (gain or 1.0) ** 2
        count = layer.weight.numel()
        assert layer.weight.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / count))
        assert layer.weight.mean().item() == pytest.approx(0, abs=5 * math.sqrt(expected / count))
        assert bool(layer.bias.any()) is (init == "torch")


def test_the_default_is_what_torch_does_to_the_bit():
    torch.manual_seed(0)
    model = models.mlp([5, 7, 3])
    torch.manual_seed(0)
    for layer in (model[0].linear, model[1]):  # the constructors draw once, and the init draws anew
        nn.Linear(layer.in_features, layer.out_features)
    for layer in (model[0].linear, model[1]):
        fresh = nn.Linear(layer.in_features, layer.out_features)
        assert torch.equal(layer.weight, fresh.weight)
        assert torch.equal(layer.bias, fresh.bias)


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8)])
def test_orthogonal_weights_are_so_up_to_the_gain(shape):
    layer = nn.Linear(*shape)
    models.initialise_(layer, "orthogonal", gain=2.0)
    values = torch.linalg.svdvals(layer.weight)
    assert torch.allclose(values, torch.full_like(values, 2.0), atol=1e-5)
    assert not layer.bias.any()


@pytest.mark.parametrize("init", ["torch", "lecun", "xavier", "he", "orthogonal"])
def test_biases_have_the_spread_that_is_asked_for_and_a_layer_without_one_stays_so(init):
    torch.manual_seed(0)
    layer = nn.Linear(3, 20_000)
    models.initialise_(layer, init, bias_std=0.3) if init != "orthogonal" else models.initialise_(
        layer := nn.Linear(3, 4000), init, bias_std=0.3
    )
    assert layer.bias.std().item() == pytest.approx(0.3, rel=0.05)
    bare = nn.Linear(3, 4, bias=False)
    models.initialise_(bare, init, bias_std=0.3)
    assert bare.bias is None


def test_a_perceptron_computes_what_its_formula_says():
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    for name, f in (("sigmoid", torch.sigmoid), ("tanh", torch.tanh), ("relu", torch.relu), ("linear", lambda x: x)):
        for skip in (False, True):
            model = models.mlp([4, 5, 5, 3], name, init="he", bias_std=0.1, skip=skip)
            first, second, last = model[0].linear, model[1].linear, model[2]
            h = f(x @ first.weight.T + first.bias)  # no skip where the widths differ
            h = skip * h + f(h @ second.weight.T + second.bias)
            assert torch.allclose(model(x), h @ last.weight.T + last.bias, atol=1e-6)
    gelu = models.mlp([4, 5, 3], "gelu")
    z = gelu[0].linear(x)
    assert torch.allclose(gelu[0](x), z * 0.5 * (1 + torch.erf(z / math.sqrt(2))), atol=1e-6)


@pytest.mark.parametrize(("normalise", "dim"), [("batch", 0), ("layer", 1)])
def test_normalisation_stands_before_the_activation(normalise, dim):
    torch.manual_seed(0)
    model, x = models.mlp([4, 32, 3], "linear", normalise=normalise), torch.randn(64, 4) * 9 + 5
    hidden = model[0](x)
    assert torch.allclose(hidden.mean(dim), torch.zeros(()), atol=1e-5)
    assert torch.allclose(hidden.var(dim, correction=0), torch.ones(()), atol=1e-3)


def test_two_widths_make_a_linear_classifier():
    model = models.mlp([4, 3])
    assert [type(layer) for layer in model] == [nn.Linear]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "swish"}, "unknown activation 'swish'; known are 'sigmoid', 'tanh', 'relu'"),
        ({"init": "zeros"}, "unknown init 'zeros'; known are 'torch', 'lecun', 'xavier', 'he', 'orthogonal'"),
        ({"normalise": "group"}, "unknown normalise 'group'; known are 'none', 'batch', 'layer'"),
        ({"widths": [4]}, r"at least an input and an output width, not \[4\]"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.mlp(**({"widths": [4, 5, 3]} | arguments))


def test_an_unknown_init_leaves_the_model_as_it_was():
    layer = nn.Linear(3, 3)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="unknown init"):
        models.initialise_(layer, "best")
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(("cell", "whole"), [("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_a_recurrent_net_reads_as_torchs_own_does(cell, whole):
    torch.manual_seed(0)
    model, x = models.Recurrent(cell, 3, 5, 2), torch.randn(4, 7, 3)
    oracle = whole(3, 5, batch_first=True)
    oracle.load_state_dict({f"{name}_l0": value for name, value in model.cell.state_dict().items()})
    outputs, final = oracle(x)
    assert torch.allclose(model(x), model.head(outputs[:, -1]), atol=1e-6)
    states = model.states(x)
    assert len(states) == 7
    assert torch.allclose(states[-1], final[1][0] if cell == "lstm" else outputs[:, -1], atol=1e-6)
    assert torch.allclose(model.last, outputs[:, -1], atol=1e-6)
    gradients = torch.autograd.grad(model.head(model.last).sum(), states)  # each is a node of the graph
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_recurrent_net_can_be_copied_and_saved_after_it_was_used():
    model, x = models.Recurrent("lstm", 1, 4, 2), torch.randn(2, 3, 1)
    scores = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), scores)


def test_a_recurrent_net_refuses_an_unknown_cell_and_an_empty_sequence():
    with pytest.raises(ValueError, match="unknown cell 'mamba'; known are 'rnn', 'gru', 'lstm'"):
        models.Recurrent("mamba", 1, 4, 2)
    with pytest.raises(ValueError, match=r"at least one step; the input is of shape \(2, 0, 1\)"):
        models.Recurrent("rnn", 1, 4, 2)(torch.zeros(2, 0, 1))


@pytest.mark.parametrize("normalise", ["none", "batch"])
@pytest.mark.parametrize("name", ["digits", "mnist1d"])
def test_a_convolutional_network_takes_what_the_data_sets_give(name, normalise):
    shape = {"digits": (8, 8), "mnist1d": (40,)}[name]
    model = models.conv(shape, normalise=normalise)
    x = torch.randn(7, math.prod(shape))
    assert model(x).shape == (7, 10)
    assert torch.equal(model.input(x), x.view(7, 1, *shape))
    kinds = [type(m) for m in model if "norm" in type(m).__module__]
    assert kinds == ([] if normalise == "none" else [(nn.BatchNorm1d, nn.BatchNorm2d)[len(shape) - 1]] * 3)


def test_the_published_network_for_mnist1d_has_its_5210_parameters():
    # greydanus/mnist1d: convolutions 1-25 (5 wide), 25-25, 25-25 (3 wide), stride 2, padding 1, and 125 to 10.
    model = models.conv((40,), channels=(25, 25, 25), kernels=(5, 3, 3))
    assert model.head.in_features == 125
    assert sum(p.numel() for p in model.parameters()) == (25 * 5 + 25) + 2 * (25 * 25 * 3 + 25) + (125 * 10 + 10)
    assert [name for name, _ in model.named_parameters()][::2] == [
        "conv1.weight", "conv2.weight", "conv3.weight", "head.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (2, 3, 4)}, r"one or two dimensions.*\(2, 3, 4\)"),
        ({"shape": (8, 8), "channels": ()}, "one kernel for each"),
        ({"shape": (8, 8), "kernels": (5, 3)}, r"one kernel for each of the channels \[16, 32, 32\].*\[5, 3\]"),
        ({"shape": (8,), "kernels": 12}, r"layer 1 leaves nothing of an input of shape \(8,\)"),
        ({"shape": (8, 8), "activation": "swish"}, "unknown activation 'swish'"),
        ({"shape": (8, 8), "normalise": "layer"}, "unknown normalisation 'layer'"),
    ],
)
def test_a_convolutional_network_that_cannot_be_is_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.conv(**arguments)


def test_a_residual_network_has_the_parts_of_a_present_day_network():
    model = models.residual()
    kinds = [type(module) for module in model.modules()]
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv1d) and m.groups > 1]
    assert sum(p.numel() for p in model.parameters()) == 30_250
    assert kinds.count(nn.Conv1d) == kinds.count(nn.BatchNorm1d) == 11
    assert [(m.groups, m.in_channels) for m in depthwise] == [(64, 64), (64, 64)]
    assert isinstance(model.block3.shortcut, nn.Identity)
    assert model(torch.zeros(2, 40)).shape == (2, 10)


def test_a_residual_block_adds_its_input():
    block = models.residual().block3.eval()
    x = torch.rand(2, 64, 10)
    with torch.no_grad():
        for norm in (block.norm1, block.norm2, block.norm3):
            norm.weight.zero_()
    assert torch.equal(block(x), x)


def test_a_residual_network_takes_other_widths_lengths_and_classes():
    assert models.residual(4, 3, length=25)(torch.zeros(2, 25)).shape == (2, 3)
    with pytest.raises(ValueError, match="at least 1, not 0, 10 and 40"):
        models.residual(0)


def test_a_residual_network_learns_mnist1d():
    data = load("mnist1d")
    torch.manual_seed(0)
    model = models.residual(8)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    train.fit(model, data, steps=150, optimizer=adamw, watch=False, rate=train.cosine(150))
    assert train.accuracy(model, data.validation) > 0.7

"""Are the norms of gradients those of the gradients, and is the model left as it was?"""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from torch import nn

import gradprune as gp
from examples import oracle_norm, small_net

QUICK = settings(deadline=None, max_examples=40, derandomize=True)


def test_gradient_norms_after_backward_are_the_norms_of_grad_in_the_order_of_the_parameters():
    model = small_net()
    model(torch.randn(5, 4)).square().sum().backward()
    norms = gp.gradient_norms(model)
    assert list(norms) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert isinstance(norms[name], float)
        assert norms[name] == pytest.approx(oracle_norm(parameter.grad), rel=1e-5)


def test_gradient_norms_of_a_loss_are_those_of_finite_differences():
    model, x = small_net(torch.float64), torch.randn(5, 4, dtype=torch.float64)
    norms = gp.gradient_norms(model, model(x).square().sum())
    for name, parameter in model.named_parameters():
        slopes = []
        with torch.no_grad():
            for i in range(parameter.numel()):
                flat, step = parameter.view(-1), 1e-6
                flat[i] += step
                above = model(x).square().sum()
                flat[i] -= 2 * step
                below = model(x).square().sum()
                flat[i] += step
                slopes.append(float(above - below) / (2 * step))
        assert norms[name] == pytest.approx(math.hypot(*slopes), rel=1e-6)


def test_gradient_norms_given_a_loss_leave_grad_and_graph_alone():
    model, x = small_net(), torch.randn(5, 4)
    model[0].weight.grad = torch.full((6, 4), 7.0)
    loss = model(x).square().sum()
    norms = gp.gradient_norms(model, loss)
    assert torch.equal(model[0].weight.grad, torch.full((6, 4), 7.0))
    assert model[2].weight.grad is None
    model.zero_grad()
    loss.backward()
    assert gp.gradient_norms(model) == pytest.approx(norms)


def test_gradient_norms_work_without_gradients_enabled_and_on_a_loss_of_shape_one():
    model = small_net()
    loss = model(torch.randn(5, 4)).sum().reshape(1, 1)
    with torch.no_grad():
        assert gp.gradient_norms(model, loss)["2.bias"] == pytest.approx(5 * math.sqrt(3))


def test_gradient_norms_sum_the_rows_that_a_sparse_gradient_holds_twice():
    model = nn.Embedding(10, 3, sparse=True)
    model(torch.tensor([2, 2, 5])).sum().backward()
    assert model.weight.grad.is_sparse
    assert gp.gradient_norms(model)["weight"] == pytest.approx(math.sqrt(3 * 2**2 + 3 * 1))
    loss = model(torch.tensor([2, 2, 5])).sum()
    assert gp.gradient_norms(model, loss)["weight"] == pytest.approx(math.sqrt(15))


def test_gradient_norms_leave_out_what_is_frozen_or_unused():
    model = small_net()
    model[0].weight.requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    loss = model[:3](torch.randn(5, 4)).sum()
    assert set(gp.gradient_norms(model, loss)) == {"0.bias", "2.weight", "2.bias"}
    loss.backward()
    assert set(gp.gradient_norms(model)) == {"0.bias", "2.weight", "2.bias"}


@QUICK
@given(
    exponent=st.integers(-44, 38), sign=st.sampled_from([-1.0, 1.0]), size=st.integers(1, 70), at=st.integers(0, 10**6)
)
def test_gradient_norms_are_right_where_the_squares_leave_the_range_of_float32(exponent, sign, size, at):
    gradient = torch.linspace(0.1, 1.0, size) * sign * 10.0**exponent
    gradient[at % size] = 0.0
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(size))})
    model["w"].grad = gradient
    assert gp.gradient_norms(model)["w"] == pytest.approx(oracle_norm(gradient), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_gradient_norms_have_more_digits_and_more_range_than_half_precision(dtype):
    gradient = torch.full((1000,), 6e4 if dtype == torch.float16 else 3.0, dtype=dtype)
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(1000, dtype=dtype))})
    model["w"].grad = gradient
    assert gp.gradient_norms(model)["w"] == pytest.approx(abs(gradient[0].item()) * math.sqrt(1000), rel=1e-6)


def test_gradient_norms_in_double_are_not_rounded_to_float32():
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, dtype=torch.float64))})
    for size in (1e200, 1e-200, 1 / 3):
        model["w"].grad = torch.tensor([3.0, 4.0], dtype=torch.float64) * size
        assert gp.gradient_norms(model)["w"] == pytest.approx(5 * size, rel=1e-14)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned_and_the_others_with_it(bad):
    model = small_net()
    model(torch.ones(5, 4)).sum().backward()
    model[0].weight.grad[1, 1] = bad
    norms = gp.gradient_norms(model)
    assert math.isnan(norms["0.weight"]) if math.isnan(bad) else norms["0.weight"] == math.inf
    assert norms["2.bias"] == pytest.approx(5 * math.sqrt(3))


def test_an_empty_gradient_and_an_all_zero_one_have_norm_zero():
    model = nn.ParameterList([nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(4))])
    model[0].grad, model[1].grad = torch.zeros(0, 3), torch.zeros(4)
    assert gp.gradient_norms(model) == {"0": 0.0, "1": 0.0}


def test_gradient_norms_say_what_is_missing():
    model, x = small_net(), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"call loss\.backward\(\) first, or pass the loss"):
        gp.gradient_norms(model)
    with pytest.raises(ValueError, match=r"a scalar, not of shape \(5, 3\); take its mean"):
        gp.gradient_norms(model, model(x))
    with pytest.raises(ValueError, match=r"not of shape \(0,\)"):
        gp.gradient_norms(model, torch.zeros(0, requires_grad=True))
    with pytest.raises(ValueError, match="computed without gradients, or detached"):
        gp.gradient_norms(model, model(x).sum().detach())
    with pytest.raises(ValueError, match="depends on no parameter of the model"):
        gp.gradient_norms(model, small_net()(x).sum())
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        gp.gradient_norms(small_net().requires_grad_(False), model(x).sum())
    with pytest.raises(ValueError, match="no parameter of the model"):
        gp.gradient_norms(nn.ReLU(), model(x).sum())
    with pytest.raises(ValueError, match="must be real, not complex"):
        gp.gradient_norms(model, torch.complex(model(x).sum(), model(x).sum()))


def test_gradients_inside_a_reentrant_checkpoint_are_no_silent_gap():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    x = torch.randn(2, 4, requires_grad=True)
    for reentrant in (True, False):
        model.zero_grad()
        hidden = torch.utils.checkpoint.checkpoint(model["body"], x, use_reentrant=reentrant)
        loss = model["head"](hidden).square().sum()
        if reentrant:
            with pytest.raises(ValueError, match=r"reentrant checkpoint.*call loss\.backward\(\)"):
                gp.gradient_norms(model, loss)
            loss.backward()
            wanted = gp.gradient_norms(model)
        else:
            assert gp.gradient_norms(model, loss) == pytest.approx(wanted)
    assert set(wanted) == {"body.weight", "body.bias", "head.weight", "head.bias"}


def test_gradient_norms_say_what_was_given_instead_of_a_model_or_a_loss():
    model = small_net()
    loss = model(torch.randn(5, 4)).sum()
    for wrong, message in (
        (model.state_dict(), "model must be a torch.nn.Module, got OrderedDict; this looks like a state dict"),
        (nn.Linear, "got the class Linear; Linear is the class: make one"),
        (None, "got None"),
        (torch.optim.SGD(model.parameters(), 0.1), "got SGD"),
    ):
        with pytest.raises(TypeError, match=message):
            gp.gradient_norms(wrong, loss)
    for wrong in (3.0, "loss", [loss]):
        with pytest.raises(TypeError, match="loss must be a tensor, got"):
            gp.gradient_norms(model, wrong)
    used = model(torch.randn(5, 4)).square().sum()
    used.backward()
    with pytest.raises(ValueError, match=r"the graph of loss is gone, as backward\(\) was called on it"):
        gp.gradient_norms(model, used)


def test_gradient_norms_name_a_gradient_without_values():
    layer = nn.Linear(2, 1).to("meta")
    layer.weight.grad = torch.ones(1, 2, device="meta")
    with pytest.raises(TypeError, match="the gradient of 'weight' is on the meta device"):
        gp.gradient_norms(layer)


def test_an_error_of_the_backward_pass_comes_through_as_it_is():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("my own backward is broken")

    layer = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="my own backward is broken"):
        gp.gradient_norms(layer, Breaks.apply(layer(torch.ones(1, 2))).sum())


def test_a_reentrant_checkpoint_is_found_behind_what_needs_no_gradient():
    body, x = nn.Linear(4, 4), torch.ones(2, 4, requires_grad=True)
    hidden = torch.utils.checkpoint.checkpoint(body, x, use_reentrant=True)
    for loss in ((hidden * torch.ones(4)).sum(), (torch.ones(4) * hidden).sum(), (hidden * hidden + hidden).sum()):
        with pytest.raises(ValueError, match="reentrant checkpoint"):
            gp.gradient_norms(body, loss + body.bias.sum())
        with pytest.raises(ValueError, match="reentrant checkpoint"):
            gp.gradient_norms(body, body.bias.sum() + loss)

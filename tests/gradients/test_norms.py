"""Are the norms of gradients right, for any size of the entries and any number of them?"""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from torch import nn

import gradprune as gp

QUICK = settings(deadline=None, max_examples=40, derandomize=True)


def small_net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def oracle_norm(tensor):
    """In NumPy, in double, scaled so that no square can leave the range."""
    flat = np.abs(np.asarray(tensor.detach().to_dense().to(torch.complex128).numpy()).ravel())
    largest = flat.max(initial=0.0)
    return float(largest * math.sqrt(((flat / largest) ** 2).sum())) if 0 < largest < math.inf else float(largest)


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


# ------------------------------------------------------------------------------------ many entries, and what is left


def with_grad(gradient):
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros_like(gradient))})
    model["w"].grad = gradient
    return model


LARGE = {
    "equal": lambda: torch.full((2**22 + 3,), 0.1),
    "thirds": lambda: torch.full((3, 2**20), 1 / 3),
    "random": lambda: torch.randn(2**22, generator=torch.Generator().manual_seed(0)),
    "bfloat16": lambda: torch.full((2**21 + 1,), 0.1, dtype=torch.bfloat16),
    "float16": lambda: torch.full((2**21 + 1,), 0.1, dtype=torch.float16),
    "complex": lambda: torch.full((2**20 + 7,), 0.1 - 0.2j),
    "transposed": lambda: torch.full((2**11, 2**10), 0.1).t(),
    "every second": lambda: torch.full((2**21,), 0.1)[::2],
    "channels last": lambda: torch.full((64, 64, 16, 16), 0.1).to(memory_format=torch.channels_last),
}
every_large = pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)


@every_large
def test_the_norm_of_millions_of_entries_is_right_to_six_digits(make):
    gradient = make()
    assert gp.gradient_norms(with_grad(gradient))["w"] == pytest.approx(oracle_norm(gradient), rel=1e-6)


@every_large
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_clipped_millions_of_entries_do_not_exceed_the_bound(make, p):
    model = with_grad(make().clone())
    wide = torch.complex128 if model["w"].is_complex() else torch.float64
    true = float(torch.linalg.vector_norm(model["w"].grad.to(wide), p))
    assert float(gp.clip_by_norm_(model, true / 4, norm_type=p)) == pytest.approx(true, rel=5e-6)
    after = float(torch.linalg.vector_norm(model["w"].grad.to(wide), p))
    half = model["w"].dtype in (torch.float16, torch.bfloat16)
    assert after == pytest.approx(true / 4, rel=5e-3 if half else 2e-5)
    if not half:
        assert after <= true / 4 * (1 + 6e-6)


@every_large
def test_units_of_millions_of_entries_do_not_exceed_their_bound(make):
    gradient = make().clone()
    for one in (gradient, gradient.reshape(1, -1)):
        model = with_grad(one.clone())
        gp.clip_adaptive_(model, 0.01, eps=1.0)
        after = model["w"].grad.flatten(1) if one.ndim > 1 else model["w"].grad.view(1, -1)
        most = float(torch.linalg.vector_norm(after.to(torch.complex128), dim=1).max())
        assert most == pytest.approx(0.01, rel=5e-3)
        if gradient.dtype not in (torch.float16, torch.bfloat16):
            assert most <= 0.01 * (1 + 1e-6)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_norm_of_zeros_has_no_sign(zero):
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), zero)
    log = gp.ClipLog()
    for p in (0.5, 1.0, 2.0, 3.0, math.inf):
        assert not torch.signbit(gp.clip_by_norm_(parameter, 1.0, norm_type=p, log=log))
    assert [math.copysign(1.0, size) for size in log.sizes] == [1.0] * 5
    assert math.copysign(1.0, gp.gradient_norms(nn.ParameterList([parameter]))["0"]) == 1.0
    value, adaptive = gp.ClipLog(), gp.ClipLog()
    gp.clip_by_value_(parameter, 1.0, log=value)
    gp.clip_adaptive_(parameter, log=adaptive)
    assert [math.copysign(1.0, log.sizes[0]) for log in (value, adaptive)] == [1.0, 1.0]


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


@pytest.mark.parametrize("p", [1e-3, 1e-300, 1e-320])
def test_an_order_near_zero_is_an_error_that_names_it(p):
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(300)]
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"the norm of order .* of these gradients is beyond float64"):
        gp.clip_by_norm_(parameters, 1.0, norm_type=p)
    assert all((parameter.grad == 1).all() for parameter in parameters)

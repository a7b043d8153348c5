"""Are norms right for any number of entries, and are bounds kept by what is measured so?"""

import math

import pytest
import torch
from torch import nn

import gradprune as gp
from examples import oracle_norm


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


@pytest.mark.parametrize("p", [1e-3, 1e-300, 1e-320])
def test_an_order_near_zero_is_an_error_that_names_it(p):
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(300)]
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"the norm of order .* of these gradients is beyond float64"):
        gp.clip_by_norm_(parameters, 1.0, norm_type=p)
    assert all((parameter.grad == 1).all() for parameter in parameters)

"""Are norms right for any number of entries, and are bounds kept by what is measured so?"""

import math

import pytest
import torch
from torch import nn

import gradprune as gp
from examples import oracle_norm
from gradprune.gradients.norms import combined_norm, norm_of


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


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def gradients_of_all_kinds(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (5, 2), (2**13 + 1,), (0,)]
    return [torch.randn(shape, generator=generator, dtype=torch.complex64).to(dtype) for shape in shapes]


def as_model(gradients):
    model = nn.ParameterList([nn.Parameter(torch.zeros_like(g)) for g in gradients])
    for parameter, gradient in zip(model, gradients, strict=True):
        parameter.grad = gradient
    return model


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_on_an_accelerator_are_those_on_the_cpu(dtype, on_accelerator):
    gradients = gradients_of_all_kinds(dtype)
    wanted = gp.gradient_norms(as_model(gradients))
    found = gp.gradient_norms(as_model([on_accelerator(g) for g in gradients]))
    assert list(found) == list(wanted)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert all(type(norm) is float for norm in found.values())


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_all_on_an_accelerator_is_that_on_the_cpu(dtype, p, on_accelerator):
    gradients = gradients_of_all_kinds(dtype)
    assert norm_of([on_accelerator(g) for g in gradients], p) == pytest.approx(norm_of(gradients, p), rel=1e-5)


def test_half_precision_beside_full_has_one_norm_on_an_accelerator(on_accelerator):
    half, full = torch.full((4,), 300.0, dtype=torch.float16), torch.full((4,), 400.0)  # squares beyond float16
    assert norm_of([on_accelerator(half), on_accelerator(full)], 2.0) == pytest.approx(1000.0)
    assert norm_of([on_accelerator(half)], 2.0) == pytest.approx(600.0)


def test_norms_beyond_every_float_are_infinite_not_an_error():
    assert combined_norm([1e308] * 4, 1.0) == math.inf
    assert combined_norm([3.0, 4.0], 2.0) == 5.0
    assert combined_norm([], 2.0) == norm_of([], math.inf) == 0.0
    assert combined_norm([1e308, 1e308], 1e-3) == math.inf  # 2 to the power of 1000 times that
    assert combined_norm([1.0] * 2**12, 1e-3) == math.inf  # more than a power can give

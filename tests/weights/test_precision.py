"""A product is in the parameter's dtype where its entries fit, in float64 where they do not, and refused beyond."""

import numpy as np
import pytest
import torch

from gradprune.weights.precision import add_products_, narrowed, product, wide

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def numbers(dtype, size=1.0, seed=0):
    values = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)
    return (size * (values if dtype.is_complex else values.real)).to(dtype)


def exact(w, g):
    """In NumPy, in double; of complex numbers the products of the real and of the imaginary parts, added up."""
    w, g = (t.to(torch.complex128 if t.is_complex() else torch.float64).numpy() for t in (w, g))
    return np.real(np.conj(w) * g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**40])
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_a_product_has_the_digits_of_its_dtype_whatever_its_size(dtype, size, scale):
    if dtype in (torch.float16, torch.bfloat16):
        size = min(max(size, 1e-3), 1.0)
    w, g = numbers(dtype, size), numbers(dtype, size, seed=1)
    found, wanted = product("w", w, g, scale), exact(w, g) * scale
    assert found.dtype in (wide(dtype).to_real(), torch.float64)
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=1e-4, atol=1e-6 * abs(wanted).max())
    fits = np.finfo(np.float32).tiny < abs(wanted).min() and abs(wanted).max() < np.finfo(np.float32).max
    if wide(dtype).to_real() == torch.float32:
        plain = size in (1e-3, 1.0)  # where neither the product nor w g before the scale leaves the range
        assert (found.dtype == torch.float32) == (plain and bool(fits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_add_up_in_float64(dtype, sign):
    a, b = numbers(dtype), numbers(dtype, seed=1)
    total = torch.ones(40, dtype=torch.float64)
    add_products_(total, a, b, sign)
    np.testing.assert_allclose(total.numpy(), 1 + sign * exact(a, b), rtol=1e-12)


def test_what_cannot_be_held_is_refused_by_name():
    huge, tiny = torch.full((2,), 1e200, dtype=torch.float64), torch.full((2,), 1e-200, dtype=torch.float64)
    with pytest.raises(ValueError, match="the score of 'w' contains NaN or infinities"):
        product("w", huge, huge)
    with pytest.raises(ValueError, match="the score of 'w' is too small for float64: scale the loss"):
        product("w", tiny, tiny)
    assert product("w", torch.zeros(2), torch.ones(2)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="the score of 'w' contains NaN"):
        narrowed("w", torch.tensor([float("nan")], dtype=torch.float64), torch.float32)


@pytest.mark.parametrize(
    ("dtype", "value", "kept"),
    [
        (torch.float16, 1.0, torch.float32),
        (torch.float32, 1.0, torch.float32),
        (torch.complex64, 1.0, torch.float32),
        (torch.float32, 1e-60, torch.float64),
        (torch.float32, 1e60, torch.float64),
        (torch.float32, 0.0, torch.float32),
        (torch.float64, 1.0, torch.float64),
        (torch.complex128, 1.0, torch.float64),
    ],
)
def test_a_score_is_narrowed_to_its_parameter_s_precision_where_nothing_is_lost(dtype, value, kept):
    score = torch.tensor([value, 1.0], dtype=torch.float64)
    found = narrowed("w", score, dtype)
    assert found.dtype == kept
    torch.testing.assert_close(found.double(), score)

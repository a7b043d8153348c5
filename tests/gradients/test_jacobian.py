"""Are the singular values those of the Jacobian, and is what is differentiated left as it was?"""

import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import gradprune as gp

QUICK = settings(deadline=None, max_examples=40, derandomize=True)


def matrix_with(values, m, n, dtype=torch.float64, seed=0):
    """An m by n matrix of the given singular values, between random orthogonal ones."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.as_tensor(values, dtype=torch.float64)
    return (u[:, : len(values)] * values @ v[:, : len(values)].T).to(dtype)


def by_torch(f, x):
    """The oracle: torch's own Jacobian, decomposed by NumPy."""
    jacobian = torch.autograd.functional.jacobian(f, x)
    return np.linalg.svd(jacobian.reshape(-1, x.numel()).double().numpy(), compute_uv=False)


@QUICK
@given(
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**30),
    share=st.floats(0, 1),
)
def test_singular_values_are_those_of_torchs_own_jacobian(n, m, dtype, seed, share):
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((m, n), (1, n)))

    def f(x):
        return torch.sin(x @ weight.T) * 3

    expected, scale = by_torch(f, x), 1e-5 if dtype == torch.float32 else 1e-12
    every = gp.jacobian_singular_values(f, x)
    assert every.dtype == dtype
    assert every.shape == (min(m, n),)
    assert np.allclose(every, expected, atol=scale * expected[0], rtol=0)
    assert (every.diff() <= 0).all()
    k = 1 + round(share * (min(m, n) - 1))
    largest = gp.jacobian_singular_values(f, x, k=k)
    assert largest.shape == (k,)
    assert (largest.diff() <= 0).all()
    assert np.allclose(largest, expected[:k], atol=1e-3 * expected[0], rtol=0)


@pytest.mark.parametrize(
    ("values", "m", "n"),
    [
        ([3.0], 1, 1),
        ([2.0, 2.0, 2.0, 2.0], 4, 4),
        ([5.0, 5.0, 1.0, 0.0, 0.0], 5, 9),
        ([5.0, 2.0, 1e-9], 8, 3),
        ([0.0, 0.0, 0.0], 3, 3),
        ([1e-30, 1e-31], 2, 6),
        ([1e30, 1.0], 6, 2),
        ([4.0, 1.0], 30, 2),
    ],
)
def test_a_known_spectrum_is_found_all_of_it_and_each_first_part(values, m, n):
    a = matrix_with(values, m, n)
    x = torch.randn(n, dtype=torch.float64)
    every = gp.jacobian_singular_values(lambda x: a @ x, x)
    assert np.allclose(every, values, atol=1e-12 * values[0], rtol=0)
    for k in range(1, min(m, n) + 1):
        largest = gp.jacobian_singular_values(lambda x: a @ x, x, k=k, tolerance=1e-6)
        assert np.allclose(largest, values[:k], atol=2e-6 * values[0], rtol=0)
        assert not torch.signbit(largest).any()


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("spectrum", ["clustered", "geometric", "flat", "spiked", "harmonic", "low rank"])
def test_each_of_the_k_largest_is_as_near_to_a_singular_value_as_the_tolerance_says(spectrum, tolerance):
    size, k = 120, 5
    values = {
        "clustered": np.r_[np.linspace(1.0, 0.999, 10), np.linspace(0.9, 0.1, size - 10)],
        "geometric": 0.9 ** np.arange(size),
        "flat": np.ones(size),
        "spiked": np.r_[1.0, np.full(size - 1, 0.9)],
        "harmonic": 1 / np.arange(1, size + 1),
        "low rank": np.r_[np.ones(3), np.zeros(size - 3)],
    }[spectrum]
    for m, n in ((size, size), (size, 2 * size), (2 * size, size)):
        a = matrix_with(values, m, n, seed=m + n)
        found = gp.jacobian_singular_values(
            lambda x, a=a: a @ x, torch.zeros(n, dtype=torch.float64), k=k, tolerance=tolerance
        ).numpy()
        nearest = np.abs(found[:, None] - values).min(axis=1)
        assert (nearest <= tolerance * (1 + 1e-6)).all()
        assert np.allclose(found, values[:k], atol=3 * tolerance)  # and they are the largest, which is more


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
def test_one_large_value_above_many_equal_ones_is_not_passed_over(tolerance):
    # A random start is nearly all in the space of the equal ones, and within 0.01 of being a singular vector of theirs.
    values = torch.full((2**15,), 0.9)
    for at in (0, 77, 12345):
        spiked = values.clone()
        spiked[at] = 1.0
        found = gp.jacobian_singular_values(lambda x, s=spiked: s * x, torch.zeros(2**15), k=1, tolerance=tolerance)
        assert found.item() == pytest.approx(1.0, abs=tolerance)


def modules():
    torch.manual_seed(0)
    gru, lstm, attention = nn.GRU(3, 4, batch_first=True), nn.LSTM(3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
    return {
        "gru": (lambda x: gru(x)[0], torch.randn(1, 5, 3), [gru]),
        "lstm": (lambda x: lstm(x)[0][-1], torch.randn(5, 1, 3), [lstm]),
        "attention": (lambda x: attention(x, x, x, need_weights=False)[0], torch.randn(1, 5, 4), [attention]),
        "transformer": (module := nn.TransformerEncoderLayer(4, 2, 8).eval(), torch.randn(3, 1, 4), [module]),
        "convolution": (module := nn.Conv2d(2, 3, 3, padding=1), torch.randn(1, 2, 6, 6), [module]),
        "pooling": (module := nn.MaxPool2d(2), torch.randn(1, 1, 6, 6), [module]),
        "batch norm": (module := nn.BatchNorm1d(4).eval(), torch.randn(5, 4), [module]),
        "in place": (module := nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), torch.randn(6), [module]),
        "frozen": (module := nn.Linear(5, 7).requires_grad_(False), torch.randn(5), [module]),
    }


@pytest.mark.parametrize("name", list(modules()))
def test_modules_of_every_kind_are_differentiated_without_a_trace(name):
    f, x, parts = modules()[name]
    given_x, state = x.clone(), torch.get_rng_state()
    expected = by_torch(lambda x: f(x.clone()), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        every = gp.jacobian_singular_values(f, x)
        largest = gp.jacobian_singular_values(f, x, k=2)
    assert np.allclose(every, expected, atol=1e-5 * expected[0])
    assert np.allclose(largest, expected[:2], atol=1e-3 * expected[0])
    assert torch.equal(x, given_x)
    assert not x.requires_grad
    assert x.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())
    assert not every.requires_grad
    assert not largest.requires_grad


def test_the_callers_gradient_mode_does_not_matter():
    f, x = torch.tanh, torch.linspace(-1, 1, 4)
    expected = np.sort(1 - np.tanh(x.numpy()) ** 2)[::-1]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            made_here = x.clone()  # in inference mode a tensor that autograd refuses
            assert np.allclose(gp.jacobian_singular_values(f, made_here), expected)
            assert np.allclose(gp.jacobian_singular_values(f, x, k=2), expected[:2], atol=1e-3)
    x.requires_grad_(True)
    assert np.allclose(gp.jacobian_singular_values(f, x), expected)
    assert x.grad is None


def test_a_derivative_that_is_zero_everywhere_has_singular_values_zero():
    x = torch.linspace(-1, 1, 4)
    for f in (torch.sign, lambda x: 0 * x, lambda x: torch.relu(x - 5)):
        assert torch.equal(gp.jacobian_singular_values(f, x), torch.zeros(4))
        assert torch.equal(gp.jacobian_singular_values(f, x, k=2), torch.zeros(2))


def test_half_precision_is_decomposed_in_float32_and_a_wider_output_in_its_own_dtype():
    x = torch.tensor([1.0, 2.0, 4.0])
    for dtype in (torch.float16, torch.bfloat16):
        every = gp.jacobian_singular_values(lambda x: x * x, x.to(dtype))
        assert every.dtype == torch.float32
        assert every.tolist() == [8.0, 4.0, 2.0]
        largest = gp.jacobian_singular_values(lambda x: x * x, x.to(dtype), k=2, tolerance=0.02)
        assert np.allclose(largest, [8.0, 4.0], rtol=0.02)
    for k in (None, 2):
        wide = gp.jacobian_singular_values(lambda x: x.double() ** 2, x, k=k)
        assert wide.dtype == torch.float64
        assert np.allclose(wide, [8.0, 4.0, 2.0][: len(wide)], rtol=1e-3)


class Stubborn(torch.autograd.Function):
    """A derivative that cannot be batched, as a user may write one: it looks at a number."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient if float(gradient.detach().abs().sum()) >= 0 else gradient


def test_a_derivative_that_cannot_be_batched_is_taken_row_by_row():
    for k in (None, 2):
        found = gp.jacobian_singular_values(Stubborn.apply, torch.ones(3), k=k)
        assert np.allclose(found, 2.0)
        found = gp.jacobian_singular_values(lambda x: Stubborn.apply(x).sin(), torch.ones(3), k=k)
        assert np.allclose(found, -2 * np.cos(2.0))  # and what the graph has saved serves every row


def test_a_tall_jacobian_takes_no_more_memory_than_itself():
    # Row by row it would be 2^21 passes, and an identity of 2^42 entries.
    every = gp.jacobian_singular_values(lambda x: x.repeat(2**21), torch.ones(1))
    assert every.item() == pytest.approx(2**10.5, rel=1e-5)


def test_singular_values_say_what_is_wrong():
    x, outside = torch.ones(4), torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"floating dtype to be differentiated, not torch\.int64"):
        gp.jacobian_singular_values(torch.sin, torch.arange(3))
    with pytest.raises(ValueError, match="floating dtype"):
        gp.jacobian_singular_values(torch.abs, torch.ones(2, dtype=torch.complex64))
    for k in (0, -1, 5):
        with pytest.raises(ValueError, match=f"between 1 and 4, the smaller side of the Jacobian, not {k}"):
            gp.jacobian_singular_values(torch.sin, x, k=k)
    for k in (None, 1):
        with pytest.raises(ValueError, match="does not depend on x"):
            gp.jacobian_singular_values(lambda x: torch.ones(3), x, k=k)
        with pytest.raises(ValueError, match="does not depend on x"):
            gp.jacobian_singular_values(lambda x: outside * 2, x, k=k)
        with pytest.raises(ValueError, match="does not depend on x"):
            gp.jacobian_singular_values(lambda x: x.argmax(), x, k=k)
        with pytest.raises(ValueError, match=r"f\(x\) is not finite"):
            gp.jacobian_singular_values(torch.log, -x, k=k)
        with pytest.raises(ValueError, match="Jacobian of f at x has entries that are not finite"):
            gp.jacobian_singular_values(torch.sqrt, 0 * x, k=k)
        with pytest.raises(TypeError, match=r"a tensor, not tuple; for a part of it pass lambda x: f\(x\)\[0\]"):
            gp.jacobian_singular_values(lambda x: (x, x), x, k=k)
        with pytest.raises(ValueError, match="complex; pass its real and imaginary parts"):
            gp.jacobian_singular_values(torch.fft.fft, x, k=k)
    for tolerance in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance must be positive and finite"):
            gp.jacobian_singular_values(torch.sin, x, k=1, tolerance=tolerance)
    with pytest.raises(ValueError, match=r"4097 x 4097 entries; pass k"):
        gp.jacobian_singular_values(torch.sin, torch.ones(4097))


def test_an_empty_output_has_no_singular_values():
    assert gp.jacobian_singular_values(lambda x: x[:0], torch.ones(3)).shape == (0,)


def test_too_few_rounds_are_an_error_that_names_the_two_ways_out():
    a = matrix_with(np.linspace(1, 0.5, 200), 200, 200)
    x = torch.zeros(200, dtype=torch.float64)
    for rounds in (0, 1, 2):
        with pytest.raises(RuntimeError, match=rf"{rounds} rounds did not .* more rounds or a larger tolerance"):
            gp.jacobian_singular_values(lambda x: a @ x, x, k=3, tolerance=1e-6, max_rounds=rounds)


def test_arguments_of_another_kind_are_named():
    x = torch.ones(4)
    for call, message in (
        (lambda: gp.jacobian_singular_values(None, x), "f must be a function, got None"),
        (lambda: gp.jacobian_singular_values(x, torch.sin), "f must be a function, got a tensor"),
        (lambda: gp.jacobian_singular_values(nn.Linear, x), r"the class Linear: make one, Linear\(\.\.\.\)"),
        (lambda: gp.jacobian_singular_values(torch.sin, [1.0]), "x must be a tensor, got list"),
        (lambda: gp.jacobian_singular_values(torch.sin, x.to_sparse()), "the input 'x' is sparse"),
        (lambda: gp.jacobian_singular_values(torch.sin, x.to("meta")), "the input 'x' is on the meta device"),
        (lambda: gp.jacobian_singular_values(torch.sin, x.to(torch.float8_e4m3fn)), r"'x' is torch\.float8"),
        (lambda: gp.jacobian_singular_values(lambda x: x.to_sparse(), x), "f must return a dense tensor"),
        (lambda: gp.jacobian_singular_values(torch.sin, x, k=True), "k must be a whole number"),
        (lambda: gp.jacobian_singular_values(torch.sin, x, k="1"), "k must be a whole number"),
        (lambda: gp.jacobian_singular_values(torch.sin, x, k=1, tolerance="x"), "tolerance must be a number"),
        (lambda: gp.jacobian_singular_values(torch.sin, x, k=1, max_rounds=None), "max_rounds must be a whole number"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    for call, message in (
        (lambda: gp.jacobian_singular_values(torch.sin, x, k=1.5), "k must be a whole number"),
        (lambda: gp.jacobian_singular_values(torch.sin, x, k=1, max_rounds=-1), "max_rounds must be at least 0"),
        (lambda: gp.jacobian_singular_values(torch.sin, x[:0], k=1), "has 0 x 0 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert gp.jacobian_singular_values(torch.sin, torch.ones(1).expand(4), k=np.int64(2)).shape == (2,)


@pytest.mark.parametrize("seed", [1, 3, 5])
@pytest.mark.parametrize("k", [3, 8])
def test_where_values_follow_each_other_closely_it_goes_on_until_they_are_as_near_as_the_tolerance_says(seed, k):
    values = np.linspace(1, 0.5, 400)
    a = matrix_with(values, 400, 400, seed=seed)
    found = gp.jacobian_singular_values(lambda x: a @ x, torch.zeros(400, dtype=torch.float64), k=k, tolerance=1e-2)
    assert np.allclose(found, values[:k], rtol=0, atol=1e-2)

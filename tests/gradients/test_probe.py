"""Does the probe see what is there, and leave it as it was?"""

import copy
import io
import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional

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


# ---------------------------------------------------------------------------------------------- gradient_norms


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


# --------------------------------------------------------------------------------- jacobian_singular_values


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
        with pytest.raises(ValueError, match="tolerance must be positive"):
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


# -------------------------------------------------------------------------------------------------- Recorder


def train(model, optimizer, steps=6, recorded=None, seed=1):
    """A plain loop, as anyone would write it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y).backward()
        optimizer.step()
        if recorded is not None:
            recorded()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_numbers_are_those_computed_by_hand(every, dtype):
    model = small_net(dtype)
    by_hand = copy.deepcopy(model)
    optimizer, optimizer_by_hand = sgd(model), sgd(by_hand)
    recorder = gp.Recorder(model, optimizer, every=every)
    train(model, optimizer)

    expected = gp.Trace()
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        x, y = torch.randn(8, 4, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)
        outputs = [x]
        for layer in by_hand:
            outputs.append(layer(outputs[-1]))
        optimizer_by_hand.zero_grad()
        functional.cross_entropy(outputs[-1].float(), y).backward()
        before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
        optimizer_by_hand.step()
        if step % every:
            continue
        expected.steps.append(step)
        for name, p in by_hand.named_parameters():
            expected.gradients.setdefault(name, []).append(oracle_norm(p.grad))
            change = oracle_norm(p - before[name]) / oracle_norm(before[name])
            expected.updates.setdefault(name, []).append(change)
        for name, out in zip("012", outputs[1:], strict=True):
            values = out.detach().double().numpy()
            for key, value in (("mean", values.mean()), ("std", values.std()), ("zero", (values == 0).mean())):
                expected.activations.setdefault(name, {}).setdefault(key, []).append(value)

    trace = recorder.trace
    assert trace.steps == expected.steps
    for found, wanted in ((trace.gradients, expected.gradients), (trace.updates, expected.updates)):
        assert list(found) == list(wanted)
        assert all(found[name] == pytest.approx(wanted[name], rel=1e-4) for name in wanted)
    assert list(trace.activations) == ["0", "1", "2"]
    for name, wanted in expected.activations.items():
        for key in wanted:
            assert trace.activations[name][key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6)


def test_the_statistics_of_an_output_far_from_zero_do_not_cancel():
    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(4096.0))

        def forward(self, x):
            return x + self.shift

    model, x = Far(), torch.linspace(-1, 1, 1000)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gp.Recorder(model, optimizer)
    out = model(x)
    out.sum().backward()
    optimizer.step()
    assert recorder.trace.activations[""]["std"] == [pytest.approx(out.detach().double().numpy().std(), rel=1e-4)]
    assert recorder.trace.activations[""]["zero"] == [0.0]


def test_the_share_of_zeros_counts_exact_zeros_of_either_sign():
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0], [-0.0], [1e-30]]))
    optimizer = sgd(model)
    with gp.Recorder(model, optimizer) as recorder:
        model(torch.ones(2, 1)).sum().backward()
        optimizer.step()
    assert recorder.trace.activations["0"]["zero"] == [0.25]
    assert recorder.trace.activations["1"]["zero"] == [0.5]


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), 0.01)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"updates": False}], ids=str)
def test_training_and_every_state_are_the_same_to_the_bit_with_and_without(make, options):
    models = [small_net(), small_net()]
    optimizers = [make(model) for model in models]
    keys = list(models[1].state_dict())
    recorder = gp.Recorder(models[1], optimizers[1], **options)
    assert list(models[1].state_dict()) == keys
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(5)
        train(model, optimizer)
        after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))  # it draws no random number
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    plain, recorded = (optimizer.state_dict() for optimizer in optimizers)
    assert plain.keys() == recorded.keys()
    assert plain["param_groups"] == recorded["param_groups"]
    for key, state in plain["state"].items():
        for name, value in state.items():
            other = recorded["state"][key][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert len(recorder.trace.steps) == (2 if "every" in options else 6)
    assert bool(recorder.trace.updates) is options.get("updates", True)


def test_evaluation_without_gradients_is_not_recorded():
    model, x = small_net(), torch.randn(3, 4)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    model(x).sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(torch.full((3, 4), 100.0))
    optimizer.step()
    assert recorder.trace.activations["0"]["mean"] == [pytest.approx(gp_mean_before_step(x), rel=1e-5)]
    with torch.no_grad():
        model(x)
    optimizer.step()
    assert math.isnan(recorder.trace.activations["0"]["mean"][1])


def gp_mean_before_step(x):
    return small_net()[0](x).mean().item()


def test_accumulated_gradients_are_recorded_as_the_step_finds_them_and_the_last_pass_with_them():
    model, batches = small_net(), torch.randn(3, 5, 4)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    for x in batches:
        model(x).sum().backward()
    optimizer.step()
    assert recorder.trace.steps == [0]
    assert recorder.trace.gradients["2.bias"] == [pytest.approx(15 * math.sqrt(3))]
    assert recorder.trace.activations["0"]["mean"] == [pytest.approx(gp_mean_before_step(batches[2]), rel=1e-5)]


def test_clipping_before_the_step_shows_in_the_trace():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    model(torch.randn(5, 4)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert math.hypot(*(norms[0] for norms in recorder.trace.gradients.values())) == pytest.approx(1e-3, rel=1e-3)


def test_steps_that_a_scaler_skips_are_not_counted():
    model = small_net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    recorder = gp.Recorder(model, optimizer)
    for factor in (1.0, math.inf, 1.0, math.inf, 1.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.ones(5, 4)).float().sum() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert recorder.trace.steps == [0, 1, 2]
    assert recorder.trace.gradients["2.bias"] == pytest.approx([5 * math.sqrt(3)] * 3, rel=1e-2)
    assert all(map(math.isfinite, recorder.trace.updates["0.weight"]))


@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize("name", ["LBFGS", "SGD"])
def test_with_a_closure_the_gradients_are_those_of_its_first_call(name, as_keyword):
    model, x = small_net(), torch.randn(20, 4)
    twin = copy.deepcopy(model)
    optimizers = [getattr(torch.optim, name)(m.parameters(), lr=0.1) for m in (model, twin)]
    calls, wanted = [], []

    def closure(m, optimizer):
        optimizer.zero_grad()
        loss = m(x).square().mean()
        loss.backward()
        calls.append(m)
        return loss.detach()

    recorder = gp.Recorder(model, optimizers[0])
    losses = []
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(3):
            if m is twin:
                wanted.append(gp.gradient_norms(m, m(x).square().mean())["0.weight"])
            evaluate = lambda m=m, o=optimizer: closure(m, o)  # noqa: E731
            losses.append(float(optimizer.step(closure=evaluate) if as_keyword else optimizer.step(evaluate)))
    assert calls.count(model) == calls.count(twin) == (3 if name == "SGD" else len(calls) // 2)
    assert losses[:3] == losses[3:]
    assert recorder.trace.gradients["0.weight"] == pytest.approx(wanted, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_copy_of_the_model_a_saved_one_and_a_copy_of_the_optimizer_record_nothing():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    train(model, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    seen = copy.deepcopy(recorder.trace)
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other(torch.ones(2, 4)), model(torch.ones(2, 4)))
        train(other, sgd(other), 3)
    pair = copy.deepcopy((model, optimizer))
    train(*pair, 3)
    assert recorder.trace == seen
    train(model, optimizer, 1)
    assert recorder.trace.steps == [0, 1, 2]


def test_a_replica_that_shares_its_hooks_with_a_module_is_not_taken_for_it():
    model, x = small_net(), torch.randn(5, 4)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    model(x).sum().backward()
    replica = copy.copy(model[0])  # as data parallelism makes them
    assert replica._forward_hooks is model[0]._forward_hooks
    replica(100 * x)
    optimizer.step()
    assert recorder.trace.activations["0"]["mean"] == [pytest.approx(gp_mean_before_step(x), rel=1e-5)]


def test_closing_removes_every_hook_and_keeps_what_was_recorded():
    model = small_net()
    optimizer = sgd(model)
    with gp.Recorder(model, optimizer) as recorder:
        train(model, optimizer, 2)
    train(model, optimizer, 3)
    assert recorder.trace.steps == [0, 1]
    assert all(not module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    recorder.close()
    with pytest.raises(KeyError), gp.Recorder(model, optimizer) as recorder:
        raise KeyError
    assert all(not module._forward_hooks for module in model.modules())


def test_two_recorders_on_one_model_see_the_same():
    model = small_net()
    optimizer = sgd(model)
    one, other = gp.Recorder(model, optimizer), gp.Recorder(model, optimizer)
    train(model, optimizer)
    assert one.trace == other.trace


def test_reading_the_trace_while_training_changes_nothing():
    traces = []
    for reads in (False, True):
        model = small_net()
        optimizer = sgd(model)
        recorder = gp.Recorder(model, optimizer, every=2)
        train(model, optimizer, 150, (lambda r=recorder: r.trace) if reads else None)
        traces.append(recorder.trace)
    assert traces[0] == traces[1]
    assert traces[0].steps == list(range(0, 150, 2))


def test_a_module_used_twice_in_one_pass_shows_its_last_output():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    out = model(torch.randn(7, 3))
    out.sum().backward()
    optimizer.step()
    assert list(recorder.trace.activations) == ["0", "1"]
    assert list(recorder.trace.gradients) == ["0.weight", "0.bias"]
    assert recorder.trace.activations["0"]["std"] == [pytest.approx(out.std(correction=0).item(), rel=1e-4)]


def test_a_frozen_parameter_has_no_gradient_and_no_update_until_it_thaws():
    model = small_net()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    train(model, optimizer, 2)
    assert "0.weight" not in recorder.trace.gradients
    assert recorder.trace.updates["0.weight"] == [0.0, 0.0]
    model[0].requires_grad_(True)
    train(model, optimizer, 2)
    thawed = recorder.trace.gradients["0.weight"]
    assert [math.isnan(norm) for norm in thawed] == [True, True, False, False]
    assert recorder.trace.updates["0.weight"][3] > 0
    model[0].requires_grad_(False)
    train(model, optimizer, 1)
    assert math.isnan(recorder.trace.gradients["0.weight"][4])
    assert len(recorder.trace.gradients["2.bias"]) == 5


def test_parameters_and_layers_that_appear_later_are_recorded_from_then_on():
    model = small_net()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    recorder = gp.Recorder(model, optimizer)
    train(model, optimizer, 2)
    assert set(recorder.trace.gradients) == {"2.weight", "2.bias"}
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[3].parameters()]})
    train(model, optimizer, 2)
    trace = recorder.trace
    assert trace.steps == [0, 1, 2, 3]
    assert [math.isnan(norm) for norm in trace.gradients["3.weight"]] == [True, True, False, False]
    assert math.isfinite(trace.activations["3"]["std"][3])
    assert {len(column) for column in trace.gradients.values()} == {4}


def test_a_parameter_that_leaves_zero_has_an_infinite_update_and_one_that_stays_there_nan():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.bias)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gp.Recorder(model, optimizer)
    model(torch.zeros(3, 2)).sum().backward()
    optimizer.step()
    assert recorder.trace.updates["bias"] == [math.inf]
    assert math.isnan(recorder.trace.updates["weight"][0])


def test_updates_are_measured_where_they_are_far_too_small_to_square():
    model = nn.ParameterList([nn.Parameter(torch.full((3,), 1e-30))])
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    recorder = gp.Recorder(model, optimizer)
    model[0].grad = torch.full((3,), 1e-32)
    optimizer.step()
    assert recorder.trace.gradients["0"] == [pytest.approx(math.sqrt(3) * 1e-32, rel=1e-4)]
    assert recorder.trace.updates["0"] == [pytest.approx(1e-2, rel=1e-4)]


class Odd(nn.Module):
    """Outputs of every sort: half precision, integers, tuples, none, empty ones."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.parts = nn.ModuleDict({name: Say() for name in ("halved", "whole", "none", "empty", "words", "doubled")})

    def forward(self, x):
        out = self.linear(x)
        self.parts["halved"](out.bfloat16())
        self.parts["whole"](out.argmax(1))
        self.parts["none"](None)
        self.parts["empty"](out[:0])
        self.parts["words"]({"out": out})
        self.parts["doubled"]((out.double(), None))
        return out


class Say(nn.Module):
    def forward(self, x):
        return x


def test_outputs_that_have_no_mean_are_passed_over_and_half_precision_is_summed_in_float32():
    model, x = Odd(), torch.randn(4000, 3)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    out = model(x)
    out.sum().backward()
    optimizer.step()
    activations = recorder.trace.activations
    assert set(activations) == {"linear", "parts.halved", "parts.doubled"}
    half = out.detach().bfloat16().double()
    assert activations["parts.halved"]["mean"] == [pytest.approx(half.mean().item(), abs=1e-5)]
    assert activations["parts.halved"]["std"] == [pytest.approx(half.std(correction=0).item(), rel=1e-4)]
    assert activations["parts.doubled"]["mean"] == [pytest.approx(out.double().mean().item(), rel=1e-6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_recorded(dtype):
    model = small_net(dtype)
    optimizer = sgd(model, momentum=0.0)
    recorder = gp.Recorder(model, optimizer)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    change = oracle_norm(model[0].weight.detach().double() - before.double()) / oracle_norm(before)
    assert recorder.trace.updates["0.weight"] == [pytest.approx(change, rel=2e-2)]
    assert recorder.trace.gradients["0.weight"] == [pytest.approx(oracle_norm(model[0].weight.grad), rel=1e-5)]


def test_complex_and_sparse_parameters_are_recorded():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.tensor([3 + 4j, 0j]))
            self.table = nn.Embedding(5, 2, sparse=True)

        def forward(self, i):
            return (self.phase.abs()[:1].sum() + self.table(i)).sum()

    model = Both()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    recorder = gp.Recorder(model, optimizer)
    model(torch.tensor([1, 1])).backward()
    grads = {name: oracle_norm(p.grad) for name, p in model.named_parameters()}
    size = oracle_norm(model.table.weight)
    optimizer.step()
    assert {name: norms[0] for name, norms in recorder.trace.gradients.items()} == pytest.approx(grads, rel=1e-5)
    assert recorder.trace.updates["phase"] == [pytest.approx(0.5 * grads["phase"] / 5, rel=1e-5)]
    assert recorder.trace.updates["table.weight"] == [pytest.approx(0.5 * grads["table.weight"] / size, rel=1e-5)]


def test_a_layer_with_a_parametrised_weight_and_one_with_an_empty_child_are_watched_as_one():
    class Hollow(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.later = nn.Sequential()

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), Hollow())
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert list(recorder.trace.activations) == ["0"]
    assert all("parametrizations" in name for name in recorder.trace.gradients if name.startswith("0.p"))


def test_a_step_without_any_gradient_or_forward_pass_is_a_row_of_nan():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    optimizer.step()
    train(model, optimizer, 1)
    assert recorder.trace.steps == [0, 1]
    assert math.isnan(recorder.trace.gradients["0.weight"][0])
    assert math.isfinite(recorder.trace.gradients["0.weight"][1])
    assert math.isnan(recorder.trace.activations["0"]["std"][0])


def test_a_step_that_raises_is_not_recorded_and_the_next_one_is():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    train(model, optimizer, 1)
    assert recorder.trace.steps == [0]
    assert math.isfinite(recorder.trace.updates["0.weight"][0])


def test_a_recorder_refuses_what_it_cannot_record():
    model = small_net()
    for every in (0, -3):
        with pytest.raises(ValueError, match=f"every must be at least 1, not {every}"):
            gp.Recorder(model, sgd(model), every=every)
    with pytest.raises(ValueError, match="the optimizer holds none of the model's parameters"):
        gp.Recorder(model, sgd(small_net()))
    assert all(not module._forward_hooks for module in model.modules())

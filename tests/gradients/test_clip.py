"""Are gradients bounded as the formulas say, and is nothing that is not finite ever passed over in silence?"""

from __future__ import annotations

import copy
import json
import math
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

import gradprune as gp
from gradprune.gradients import norms

QUICK = settings(deadline=None, max_examples=50, derandomize=True)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
SHAPES = st.lists(
    st.sampled_from([(), (1,), (7,), (0,), (3, 0), (4, 5), (1, 9), (2, 3, 3), (6, 2, 3, 3), (300, 70)]),
    min_size=1,
    max_size=6,
)


def held(*grads):
    """Parameters of ones with these gradients."""
    parameters = [nn.Parameter(torch.ones(g.shape, dtype=g.dtype)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return parameters


def random_grads(shapes, dtype=torch.float32, *, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * size).to(dtype) for shape in shapes]


def twins(grads):
    return held(*grads), held(*grads)


def bits(parameters):
    """What a call that fails must leave as it was, sparse gradients included."""
    return copy.deepcopy([p.grad for p in parameters])


def same(before, parameters):
    return all(
        (a is None and p.grad is None)
        or (
            a.layout == p.grad.layout
            and torch.equal(torch.nan_to_num(a.to_dense()), torch.nan_to_num(p.grad.to_dense()))
            and torch.equal(a.to_dense().isnan(), p.grad.to_dense().isnan())
        )
        for a, p in zip(before, parameters, strict=True)
    )


def oracle_norm(grads, p):
    """In NumPy's extended precision, scaled by the largest entry."""
    flat = np.concatenate([np.abs(g.to_dense().to(torch.complex128).numpy()).ravel() for g in grads])
    flat = flat.astype(np.longdouble)
    most = flat.max(initial=0)
    if p == math.inf or not 0 < most < math.inf:
        return float(most)
    return float(most * ((flat / most) ** np.longdouble(p)).sum() ** (1 / np.longdouble(p)))


def embedding(*rows, rows_in_all=10, width=3):
    """An embedding whose gradient is sparse and not summed."""
    model = nn.Embedding(rows_in_all, width, sparse=True)
    (model(torch.tensor(rows)) * torch.arange(1.0, width + 1)).sum().backward()
    assert not model.weight.grad.is_coalesced()
    return model


# ------------------------------------------------------------------------------------------------------ by norm


@QUICK
@given(
    shapes=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    p=st.sampled_from([0.5, 1.0, 1.7, 2.0, 3.0, 10.0, math.inf]),
    max_norm=st.sampled_from([1e-3, 0.3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_norm_and_clipped_gradients_are_those_of_torch(shapes, dtype, p, max_norm, seed):
    shapes = [shape for shape in shapes if p != math.inf or math.prod(shape)]  # torch has no maximum of nothing
    ours, theirs = twins(random_grads(shapes, dtype, seed=seed))
    norm = gp.clip_by_norm_(ours, max_norm, norm_type=p)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type=p)
    assert norm.shape == expected.shape == ()
    if shapes:
        assert norm.dtype == expected.dtype
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert float(norm) == pytest.approx(float(expected), rel=rounding)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=rounding, atol=0)


@QUICK
@given(
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-44, 38),
    p=st.sampled_from([0.5, 1.0, 2.0, 3.0, 10.0, math.inf]),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
)
def test_the_norm_is_right_where_powers_of_the_entries_leave_the_range_of_their_dtype(dtype, exponent, p, sizes):
    limits = torch.finfo(dtype)
    exponent = max(exponent, math.ceil(math.log10(limits.smallest_normal)) + 1)
    exponent = min(exponent, math.floor(math.log10(limits.max)) - 1)
    grads = [(torch.linspace(-1, 1, size, dtype=torch.float64) * 10.0**exponent).to(dtype) for size in sizes]
    parameters = held(*grads)
    expected = oracle_norm(grads, p)
    norm = gp.clip_by_norm_(parameters, math.inf, norm_type=p)
    assert float(norm) == pytest.approx(expected, rel=1e-5)
    assert same(grads, parameters)


@pytest.mark.parametrize(
    ("dtype", "entry"), [(torch.float16, 6e4), (torch.bfloat16, 1e38), (torch.float32, 1e38), (torch.float64, 1e300)]
)
def test_gradients_are_clipped_where_torchs_own_norm_overflows(dtype, entry):
    ours, theirs = twins([torch.full((200,), entry, dtype=dtype)])
    norm = gp.clip_by_norm_(ours, 1.0)
    assert torch.isinf(torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    assert float(norm) == pytest.approx(float(torch.tensor(entry, dtype=dtype)) * math.sqrt(200), rel=1e-3)
    after = float(ours[0].grad.double().norm())
    assert after == pytest.approx(1.0, rel=1e-2)


def test_gradients_whose_squares_underflow_are_clipped_by_their_true_norm():
    ours, theirs = twins([torch.full((4,), 1e-25)])
    assert float(torch.nn.utils.clip_grad_norm_(theirs, 1e-24)) == 0
    assert float(gp.clip_by_norm_(ours, 1e-24)) == pytest.approx(2e-25, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_half_precision_is_summed_in_float32_also_in_pieces(dtype):
    for size in (10, 3 * norms.CHUNK + 5):
        grad = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
        strided = torch.empty(size, 2, dtype=dtype)[:, 0]
        strided.copy_(grad)
        for gradient in (grad, strided):
            parameter = nn.Parameter(torch.zeros(size, dtype=dtype))
            parameter.grad = gradient
            norm = gp.clip_by_norm_(parameter, math.inf)
            assert norm.dtype == torch.float32
            assert float(norm) == pytest.approx(float(grad.double().norm()), rel=1e-4)


def test_clipping_by_norm_keeps_the_direction_and_ends_at_the_bound():
    grads = random_grads([(5, 4), (4,)], torch.float64)
    parameters = held(*grads)
    gp.clip_by_norm_(parameters, 0.1)
    before, after = (torch.cat([g.flatten() for g in gs]) for gs in (grads, [p.grad for p in parameters]))
    assert float(after.norm()) == pytest.approx(0.1, rel=1e-5)
    assert float(torch.nn.functional.cosine_similarity(before, after, dim=0)) == pytest.approx(1.0, abs=1e-12)


def test_what_is_within_the_bound_is_not_written():
    parameters = held(*random_grads([(5, 4), (4,)]))
    versions = [p.grad._version for p in parameters]
    gp.clip_by_norm_(parameters, 100.0)
    gp.clip_by_value_(parameters, 100.0)
    gp.clip_adaptive_(parameters, 100.0)
    assert [p.grad._version for p in parameters] == versions


def test_mixed_dtypes_are_one_vector():
    grads = [g.to(dtype) for g, dtype in zip(random_grads([(50,)] * 4), DTYPES, strict=True)]
    parameters = held(*grads)
    norm = gp.clip_by_norm_(parameters, 1.0)
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(oracle_norm(grads, 2), rel=1e-6)
    assert oracle_norm([p.grad for p in parameters], 2) == pytest.approx(1.0, rel=1e-3)
    assert [p.grad.dtype for p in parameters] == DTYPES


def test_several_devices_are_one_vector():
    parameters = held(*random_grads([(3,), (4,)]))
    meta = torch.device("meta")
    assert list(norms.grouped_by_device([parameters[0].grad, torch.empty(2, device=meta)])) == [
        torch.device("cpu"),
        meta,
    ]
    assert norms.combined_norm([3.0, 4.0], 2.0) == pytest.approx(5.0)
    assert norms.combined_norm([3e200, 4e200], 2.0) == pytest.approx(5e200)
    assert norms.combined_norm([0.0, 0.0], 2.0) == 0.0


def test_complex_gradients_have_the_norm_of_their_moduli():
    grad = torch.tensor([3 + 4j, -5j, 0.1 + 0j])
    (parameter,) = held(grad)
    assert float(gp.clip_by_norm_(parameter, 1.0)) == pytest.approx(math.sqrt(50.01), rel=1e-6)
    assert torch.allclose(parameter.grad, grad / math.sqrt(50.01), rtol=1e-5)
    (parameter,) = held(grad)
    gp.clip_by_value_(parameter, 1.0)
    assert torch.allclose(parameter.grad, torch.tensor([0.6 + 0.8j, -1j, 0.1 + 0j]))


def test_a_norm_beyond_float64_is_an_error_that_names_the_order():
    with pytest.raises(ValueError, match=r"the norm of order 0\.01 of these gradients is beyond float64"):
        gp.clip_by_norm_(held(torch.ones(10_000)), 1.0, norm_type=0.01)


def test_a_sparse_gradient_counts_its_rows_summed():
    model = embedding(2, 2, 5)
    dense = model.weight.grad.to_dense()
    assert float(gp.clip_by_norm_(model, 1.0)) == pytest.approx(float(dense.norm()), rel=1e-6)
    assert model.weight.grad.is_sparse
    assert torch.allclose(model.weight.grad.to_dense(), dense / dense.norm(), rtol=1e-5)
    torch.optim.SGD(model.parameters(), lr=1.0).step()  # what was written is what an optimizer finds


def test_sparse_and_dense_gradients_are_clipped_together_as_if_all_were_dense():
    model = nn.Sequential(embedding(1, 1, 7), nn.Linear(3, 2))
    model[1](torch.ones(1, 3)).sum().backward()
    dense = held(*(p.grad.to_dense() for p in model.parameters()))
    for call in (lambda p: gp.clip_by_norm_(p, 0.5), lambda p: gp.clip_by_value_(p, 0.05)):
        call(model)
        call(dense)
        for a, b in zip(model.parameters(), dense, strict=True):
            assert torch.allclose(a.grad.to_dense(), b.grad, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- by value


@QUICK
@given(
    shapes=SHAPES,
    dtype=st.sampled_from(DTYPES),
    limit=st.sampled_from([1e-3, 0.5, 1.0, 100.0]),
    seed=st.integers(0, 99),
    together=st.booleans(),
)
def test_entries_are_clamped_as_by_torch_but_to_no_number_above_the_limit(shapes, dtype, limit, seed, together):
    ours, theirs = twins(random_grads(shapes, dtype, seed=seed))
    for call in [ours] if together else [[p] for p in ours]:
        assert gp.clip_by_value_(call, limit) is None
    torch.nn.utils.clip_grad_value_(theirs, limit)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad.double().abs() <= limit).all()
        above = b.grad.double().abs() > limit  # torch rounds the limit to the dtype
        below = (b.grad.view(BITS[dtype]) - 1).view(dtype)
        assert torch.equal(a.grad, torch.where(above, below, b.grad))


def test_a_large_limit_is_no_error_for_a_small_dtype():
    (parameter,) = held(torch.full((3,), 6e4, dtype=torch.float16))
    gp.clip_by_value_(parameter, 1e30)
    assert (parameter.grad == 6e4).all()


def test_clipping_by_value_turns_the_step():
    (parameter,) = held(torch.tensor([100.0, 1.0]))
    gp.clip_by_value_(parameter, 1.0)
    assert parameter.grad.tolist() == [1.0, 1.0]


# ----------------------------------------------------------------------------------------------------- adaptive


def by_loop(parameter, factor, eps, dim):
    """Equation 3 of Brock et al., one parameter, straight from the paper."""
    w, g = parameter.detach().double(), parameter.grad.double()
    w_norm = w.norm() if dim is None else torch.linalg.vector_norm(w, dim=dim, keepdim=True)
    g_norm = g.norm() if dim is None else torch.linalg.vector_norm(g, dim=dim, keepdim=True)
    bound = factor * w_norm.clamp(min=eps)
    return torch.where(g_norm > bound, g * bound / g_norm.clamp(min=1e-300), g)


def weights_and_grads(shapes, dtype=torch.float32, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for shape in shapes:
        scales = 10 ** (4 * torch.rand(shape[:1] + (1,) * (len(shape) - 1), generator=generator) - 3)
        parameter = nn.Parameter((torch.randn(shape, generator=generator) * scales).to(dtype))
        parameter.grad = (torch.randn(shape, generator=generator) * size).to(dtype)
        parameters.append(parameter)
    return parameters


@QUICK
@given(
    shapes=st.lists(
        st.sampled_from([(), (6,), (1,), (4, 5), (4, 5), (9, 5), (5, 1), (2, 3, 3), (6, 2, 3, 3), (0, 3), (300, 70)]),
        min_size=1,
        max_size=8,
    ),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
    factor=st.sampled_from([0.01, 0.5, 10.0]),
    eps=st.sampled_from([1e-3, 1.0, 1e-20]),
    seed=st.integers(0, 99),
)
def test_adaptive_clipping_is_the_formula_of_the_paper_unit_by_unit(shapes, dtype, factor, eps, seed):
    parameters = weights_and_grads(shapes, dtype, seed)
    expected = [by_loop(p, factor, eps, tuple(range(1, p.ndim)) if p.ndim > 1 else None) for p in parameters]
    assert gp.clip_adaptive_(parameters, factor, eps=eps) is None
    rounding = {torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for parameter, wanted in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad.double(), wanted, rtol=rounding, atol=1e-7)


def test_units_of_every_kind_of_layer_are_what_one_output_is_computed_from():
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(4, 5), (1,)),
        "conv1d": (nn.Conv1d(3, 4, 2), (1, 2)),
        "conv2d": (nn.Conv2d(4, 6, 3, groups=2), (1, 2, 3)),
        "embedding": (nn.Embedding(5, 4), (1,)),
        "bilinear": (nn.Bilinear(2, 3, 4), (1, 2)),
        "transposed": (nn.ConvTranspose2d(4, 6, 3), (0, 2, 3)),
    }
    model = nn.ModuleDict({name: layer for name, (layer, _) in layers.items()})
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = {name: by_loop(layer.weight, 0.1, 1e-3, dim) for name, (layer, dim) in layers.items()} | {
        f"{name}.bias": by_loop(layer.bias, 0.1, 1e-3, None)
        for name, (layer, _) in layers.items()
        if name != "embedding"
    }
    gp.clip_adaptive_(model, 0.1)
    for name, (layer, _) in layers.items():
        assert torch.allclose(layer.weight.grad.double(), expected[name], rtol=1e-5), name
        if name != "embedding":
            assert torch.allclose(layer.bias.grad.double(), expected[f"{name}.bias"], rtol=1e-5), name


def test_the_outputs_of_a_grouped_transposed_convolution_are_its_units():
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2)
    layer.weight.grad = torch.randn_like(layer.weight)
    expected = layer.weight.grad.clone()
    for group in range(2):
        for out in range(3):
            part = (slice(2 * group, 2 * group + 2), out)
            bound = 0.01 * layer.weight.detach()[part].norm().clamp(min=1e-3)
            expected[part] *= min(1.0, float(bound / expected[part].norm()))
    gp.clip_adaptive_(layer, 0.01)
    assert torch.allclose(layer.weight.grad, expected, rtol=1e-5)


def test_channels_last_gradients_are_clipped_like_contiguous_ones():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, bias=False)
    layer.weight.grad = torch.randn_like(layer.weight)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    other.weight.grad = layer.weight.grad.to(memory_format=torch.channels_last)
    for call in (
        lambda m: gp.clip_adaptive_(m),
        lambda m: gp.clip_by_norm_(m, 0.1),
        lambda m: gp.clip_by_value_(m, 1e-3),
    ):
        call(layer)
        call(other)
        assert torch.allclose(layer.weight.grad, other.weight.grad, rtol=1e-5)


def test_adaptive_clipping_of_a_sparse_gradient_bounds_the_rows_it_holds():
    model = embedding(2, 2, 5)
    dense = nn.Parameter(model.weight.detach().clone())
    dense.grad = model.weight.grad.to_dense()
    log = gp.ClipLog()
    gp.clip_adaptive_(model, 0.1, log=log)
    gp.clip_adaptive_(dense, 0.1)
    assert torch.allclose(model.weight.grad.to_dense(), dense.grad, rtol=1e-5)
    assert log.shares == [0.2]  # two of ten rows


def test_norms_of_units_are_right_where_their_squares_leave_the_range():
    parameter = nn.Parameter(torch.full((2, 4), 1e25))
    parameter.grad = torch.tensor([[1e30] * 4, [1e-3] * 4])
    gp.clip_adaptive_(parameter, 0.01)
    assert torch.allclose(parameter.grad, torch.tensor([[1e23] * 4, [1e-3] * 4]), rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- AutoClip


@QUICK
@given(
    percentile=st.floats(0, 100),
    window=st.integers(1, 12),
    norms=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30),
)
def test_autoclip_clips_to_the_percentile_of_the_last_norms(percentile, window, norms):
    clip_ = gp.AutoClip(percentile, window=window)
    for step, norm in enumerate(norms):
        (parameter,) = held(torch.tensor([norm], dtype=torch.float64))
        assert float(clip_(parameter)) == norm
        expected = np.percentile(norms[max(0, step + 1 - window) : step + 1], percentile)
        assert clip_.threshold == pytest.approx(expected, rel=1e-12)
        assert float(parameter.grad) == pytest.approx(min(norm, expected), rel=1e-12)
    assert clip_.norms == norms[-window:]


def test_autoclip_goes_on_from_a_saved_state():
    first, grads = gp.AutoClip(30.0, window=4), random_grads([(5,)] * 9)
    for grad in grads[:6]:
        first(held(grad))
    second = gp.AutoClip()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for grad in grads[6:]:
        a, b = twins([grad])
        assert first(a) == second(b)
        assert torch.equal(a[0].grad, b[0].grad)
    assert first.state_dict() == second.state_dict()


def test_norms_of_zero_and_norms_that_are_not_finite_stay_out_of_the_history():
    clip_ = gp.AutoClip(0.0, nonfinite="skip", log=gp.ClipLog())
    for entry in (0.0, math.inf, math.nan, 2.0, 0.0, 3.0):
        clip_(held(torch.tensor([entry])))
    assert clip_.norms == [2.0, 3.0]
    assert clip_.threshold == 2.0
    assert clip_.log.skipped == 2


# --------------------------------------------------------------------------------------- gradients not finite

CALLS = {
    "value": lambda p, **more: gp.clip_by_value_(p, 0.1, **more),
    "norm": lambda p, **more: gp.clip_by_norm_(p, 0.1, **more),
    "infinity": lambda p, **more: gp.clip_by_norm_(p, 0.1, norm_type=math.inf, **more),
    "adaptive": lambda p, **more: gp.clip_adaptive_(p, 0.1, **more),
    "auto": lambda p, **more: gp.AutoClip(**more)(p),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
every_bad = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def sick(bad, dtype=torch.float32):
    """A linear layer between two others, with one entry of its gradient not finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).to(dtype)
    model(torch.randn(5, 3, dtype=dtype)).square().sum().backward()
    model[1].weight.grad[1, 2] = bad
    return model


@every_call
@every_bad
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_is_not_finite_raises_by_name_and_leaves_every_bit(call, bad, dtype):
    model = sick(bad).to(dtype)
    before = bits(model.parameters())
    with pytest.raises(
        ValueError, match=r"gradient of '1\.weight' is not finite in 1 of 16 entries; nothing was changed"
    ):
        call(model)
    with pytest.raises(ValueError, match=r"gradient of '1\.weight'"):
        call(model.named_parameters())
    with pytest.raises(ValueError, match=r"gradient of 'parameter 2'.*'zero' sets such a gradient to zero"):
        call(model.parameters())
    model[2].bias.grad[0] = bad
    with pytest.raises(ValueError, match="and those of 1 others neither"):
        call(list(model.parameters()))
    model[2].bias.grad[0] = before[-1][0]
    assert same(before, model.parameters())


@every_call
@every_bad
def test_zero_sets_that_gradient_to_zero_and_clips_the_others(call, bad):
    model, without = sick(bad), sick(0.0)
    without[1].weight.grad.zero_()
    log = gp.ClipLog()
    call(model, nonfinite="zero", log=log)
    call(without)
    for a, b in zip(model.parameters(), without.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5)
    assert (model[1].weight.grad == 0).all()
    assert log.nonfinite == {"1.weight": 1}
    assert (log.calls, log.skipped) == (1, 0)
    assert not math.isfinite(log.sizes[0])


@every_call
@every_bad
def test_skip_sets_all_gradients_to_zero_and_counts_the_call(call, bad):
    model, log = sick(bad), gp.ClipLog()
    model[0].bias.grad[0] = bad
    call(model, nonfinite="skip", log=log)
    assert all((p.grad == 0).all() for p in model.parameters())
    assert log.nonfinite == {"0.bias": 1, "1.weight": 1}
    assert (log.calls, log.engaged, log.skipped, log.factors, log.shares) == (1, 1, 1, [0.0], [1.0])


@every_call
@pytest.mark.parametrize(("choice", "what"), [("zero", "it was"), ("skip", "all gradients were")])
def test_without_a_log_a_choice_warns_and_the_warning_points_here(call, choice, what):
    with pytest.warns(RuntimeWarning, match=rf"'1\.weight' is not finite; {what} set to zero") as caught:
        call(sick(math.nan), nonfinite=choice)
    assert caught[0].filename == __file__


@every_call
def test_finite_gradients_warn_of_nothing(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(sick(1.0), nonfinite="zero")


@every_bad
def test_the_norm_returned_is_not_finite_where_a_gradient_was_not(bad):
    norm = gp.clip_by_norm_(sick(bad), 1.0, nonfinite="zero", log=gp.ClipLog())
    assert math.isnan(norm) if math.isnan(bad) else norm == math.inf


@every_call
def test_sparse_gradients_that_are_not_finite_are_settled_like_dense_ones(call):
    model = embedding(2, 2, 5)
    model.weight.grad._values()[0, 0] = math.inf
    before = bits(model.parameters())
    with pytest.raises(ValueError, match="gradient of 'weight' is not finite"):
        call(model)
    assert same(before, model.parameters())
    assert model.weight.grad._nnz() == 3  # not even summed
    call(model, nonfinite="zero", log=gp.ClipLog())
    assert (model.weight.grad.to_dense() == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_bound_nothing_and_raise(bad):
    model = sick(1.0)
    model[2].weight.data[0, 0] = bad
    before = bits(model.parameters())
    with pytest.raises(ValueError, match=r"the weights of '2\.weight' are not finite"):
        gp.clip_adaptive_(model, nonfinite="skip")
    assert same(before, model.parameters())


# ----------------------------------------------------------------------------------------- what is given, and not


@every_call
def test_no_gradients_are_no_error(call):
    for nothing in ([], nn.Linear(2, 2), nn.Linear(2, 2).parameters(), nn.Parameter(torch.ones(2)), nn.ReLU()):
        result = call(nothing)
        assert result is None or float(result) == 0.0


@every_call
def test_a_model_its_pairs_its_parameters_and_a_generator_mean_the_same(call):
    models = [sick(1.0) for _ in range(5)]
    models[0][0].bias.grad = None
    for other in models[1:]:
        other[0].bias.grad = None
    call(models[0])
    call(models[1].named_parameters())
    call(list(models[2].parameters()))
    call(p for p in models[3].parameters())
    call([*models[4].parameters(), models[4][1].weight])  # twice is once
    wanted = [p.grad for p in models[0].parameters()]
    for other in models[1:]:
        assert same(wanted, list(other.parameters()))


@every_call
def test_gradients_that_are_all_zero_stay_so(call):
    parameters = held(torch.zeros(3), torch.zeros(2, 2), torch.zeros(0))
    call(parameters)
    assert all((p.grad == 0).all() for p in parameters)


@every_call
def test_gradients_with_a_graph_are_clipped_in_place(call):
    parameter = nn.Parameter(torch.ones(3))
    (parameter**3).sum().backward(create_graph=True)
    grad = parameter.grad
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(parameter)
    assert parameter.grad is grad


def test_bad_settings_are_errors_that_say_what_was_given_and_change_nothing():
    parameters = held(torch.tensor([3.0, 4.0]))
    before = bits(parameters)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"limit must be a number, positive, got {bad}"):
            gp.clip_by_value_(parameters, bad)
        with pytest.raises(ValueError, match=rf"max_norm must be a number, positive, got {bad}"):
            gp.clip_by_norm_(parameters, bad)
        with pytest.raises(ValueError, match=rf"norm_type must be a number, positive, got {bad}"):
            gp.clip_by_norm_(parameters, 1.0, norm_type=bad)
        with pytest.raises(ValueError, match=rf"factor must be a number, positive, got {bad}"):
            gp.clip_adaptive_(parameters, bad)
        with pytest.raises(ValueError, match=rf"eps must be a number, positive, got {bad}"):
            gp.clip_adaptive_(parameters, eps=bad)
    for percentile in (-1, 101, math.nan):
        with pytest.raises(
            ValueError, match=f"percentile must be a finite number, at least 0 and at most 100, got {percentile}"
        ):
            gp.AutoClip(percentile)
    for window in (0, -3, 1.5):
        with pytest.raises(ValueError, match=f"window must be a(t least 1| whole number).*, got {window}"):
            gp.AutoClip(window=window)
    with pytest.raises(TypeError, match=r"window must be a whole number.*, got None"):
        gp.AutoClip(window=None)
    for call in CALLS.values():
        with pytest.raises(ValueError, match="nonfinite must be one of 'raise', 'zero', 'skip', 'leave'; got 'ignore'"):
            call(parameters, nonfinite="ignore")
        with pytest.raises(TypeError, match="entry 0 is int"):
            call([3])
    assert same(before, parameters)


def test_layouts_that_cannot_be_clipped_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta
        parameter = nn.Parameter(torch.eye(2).to_sparse_csr())
        parameter.grad = torch.eye(2).to_sparse_csr()
    with pytest.raises(TypeError, match=r"the gradient of 'parameter 0' is of layout torch\.sparse_csr"):
        gp.clip_by_norm_(parameter, 1.0)
    whole = nn.Parameter(torch.ones(2, 2))
    whole.grad = torch.eye(2).to_sparse()
    gp.clip_by_norm_(whole, 0.5)
    assert float(whole.grad.to_dense().norm()) == pytest.approx(0.5, rel=1e-5)
    with pytest.raises(ValueError, match="the sparse gradient of 'parameter 0' has 2 sparse axes"):
        gp.clip_adaptive_(whole)


# ------------------------------------------------------------------------------------------------------ the log


def test_a_log_of_norms_says_how_often_and_how_hard():
    log = gp.ClipLog()
    for size in (0.5, 4.0, 1.0, 10.0):
        gp.clip_by_norm_(held(torch.tensor([size])), 2.0, log=log)
    assert (log.calls, log.engaged, log.rate, log.skipped) == (4, 2, 0.5, 0)
    assert log.steps == [0, 1, 2, 3]
    assert log.sizes == pytest.approx([0.5, 4.0, 1.0, 10.0])
    assert log.bounds == [2.0] * 4
    assert log.factors == pytest.approx([1.0, 0.5, 1.0, 0.2], rel=1e-5)
    assert log.shares == [0.0, 1.0, 0.0, 1.0]
    assert repr(log) == (
        "ClipLog(by norm, 4 calls, engaged in 2 (50.0 %), smallest factor 0.2, 0 gradients not finite, 0 calls skipped)"
    )


def test_a_log_by_value_counts_entries_and_an_adaptive_one_units():
    log = gp.ClipLog()
    gp.clip_by_value_(held(torch.tensor([0.1, -8.0]), torch.ones(2, 3)), 2.0, log=log)
    assert (log.sizes, log.factors, log.shares) == ([8.0], [0.25], [1 / 8])
    log = gp.ClipLog()
    parameter = nn.Parameter(torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
    parameter.grad = torch.tensor([[0.0, 10.0], [0.0, 1.0]])
    gp.clip_adaptive_(parameter, 0.5, log=log)
    assert log.sizes == pytest.approx([2.0])
    assert log.factors == pytest.approx([0.25])
    assert (log.bounds, log.shares) == ([0.5], [0.5])


def test_a_log_keeps_its_window_and_counts_everything():
    log = gp.ClipLog(window=3)
    for size in range(1, 11):
        gp.clip_by_norm_(held(torch.tensor([float(size)])), 5.5, log=log)
    assert (log.calls, log.engaged) == (10, 5)
    assert log.steps == [7, 8, 9]
    assert log.sizes == [8.0, 9.0, 10.0]


def test_a_log_goes_on_from_a_saved_state():
    log = gp.ClipLog(window=3)
    for bad in (1.0, math.nan, 5.0, 2.0):
        gp.clip_by_norm_([("w", *held(torch.tensor([bad])))], 2.5, nonfinite="zero", log=log)
    other = gp.ClipLog()
    other.load_state_dict(copy.deepcopy(log.state_dict()))
    assert repr(other) == repr(log)
    assert other.nonfinite == {"w": 1}
    assert other.factors == log.factors
    gp.clip_by_norm_(held(torch.ones(1)), 2.5, log=other)
    assert len(other.steps) == 3
    assert (log.calls, other.calls) == (4, 5)


def test_a_log_is_for_one_kind_of_clipping():
    log, parameters = gp.ClipLog(), held(torch.tensor([3.0]))
    gp.clip_by_norm_(parameters, 5.0, log=log)
    gp.AutoClip(log=log)(parameters)
    before = bits(parameters)
    with pytest.raises(ValueError, match="this log is of clipping by norm; clipping by value needs one of its own"):
        gp.clip_by_value_(parameters, 1.0, log=log)
    assert same(before, parameters)


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    clip_, log = gp.AutoClip(20.0), gp.ClipLog()
    clip_(held(torch.tensor([3.0])))
    gp.clip_by_norm_(held(torch.tensor([3.0])), 1.0, log=log)
    before = clip_.state_dict(), log.state_dict()
    for state, message in (
        ({"norms": []}, "the state lacks 'percentile', 'threshold', 'window'"),
        (before[0] | {"norms": [1.0] * 2000}, "at most 1000, each positive and finite"),
        (before[0] | {"norms": [-1.0]}, "positive and finite"),
        (before[0] | {"percentile": 300.0}, "percentile must be a finite number, at least 0 and at most 100"),
        (before[0] | {"window": 0}, "window must be"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_.load_state_dict(state)
    with pytest.raises(ValueError, match="the state lacks 'calls'"):
        log.load_state_dict({})
    for name, wrong in (("calls", -1), ("window", 0), ("engaged", 2), ("skipped", 2), ("kind", "norms")):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            log.load_state_dict(before[1] | {name: wrong})
    with pytest.raises(ValueError, match=r"^nonfinite must be"):
        log.load_state_dict(before[1] | {"nonfinite": {"weight": 0}})
    with pytest.raises(ValueError, match="the state keeps 1 calls, of 0 and at most"):
        log.load_state_dict(before[1] | {"calls": 0})
    assert (clip_.state_dict(), log.state_dict()) == before


# ----------------------------------------------------------------------------------------------- where it is used


def test_training_is_torchs_training_step_for_step():
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randn(64, 2) * 30
    first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    second = copy.deepcopy(first)
    norms = []
    for model, call in ((first, gp.clip_by_norm_), (second, torch.nn.utils.clip_grad_norm_)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(50):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            norms.append(float(call(model.parameters(), 1.0)))
            optimizer.step()
    assert norms[:50] == pytest.approx(norms[50:], rel=1e-4)
    assert max(norms) > 1
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_under_a_loss_scale_clipping_comes_after_unscaling():
    torch.manual_seed(0)
    model, x = nn.Linear(6, 1), torch.randn(32, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((model(x) - 50).square().mean()).backward()
    scaler.unscale_(optimizer)
    true = [p.grad.clone() for p in model.parameters()]
    norm = gp.clip_by_norm_(model, 1.0)
    assert float(norm) == pytest.approx(oracle_norm(true, 2), rel=1e-5)
    assert oracle_norm([p.grad for p in model.parameters()], 2) == pytest.approx(1.0, rel=1e-5)


# ------------------------------------------------------------------------------------- the bound, and what is below it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0.3, 0.1, 1e-3, 0.7, 1 / 3, 1e-40, 5e4])
@pytest.mark.parametrize("size", [5, 20_000])
def test_no_entry_exceeds_the_limit_whatever_numbers_the_dtype_has(dtype, limit, size):
    (parameter,) = held(torch.linspace(-60000, 60000, size, dtype=torch.float64).to(dtype))
    log = gp.ClipLog()
    gp.clip_by_value_(parameter, limit, log=log)
    largest = float(parameter.grad.double().abs().max())
    assert largest <= limit
    assert largest >= limit * (1 - 2 * torch.finfo(dtype).eps) - torch.finfo(dtype).smallest_normal
    assert log.engaged == 1
    gp.clip_by_value_(parameter, limit, log=log)
    assert log.engaged == 1  # nothing is left to do, and the log says so


def test_the_log_counts_entries_by_the_limit_itself():
    step = torch.tensor([0.298828125, 0.30078125], dtype=torch.bfloat16)  # below and above 0.3, neighbours
    log = gp.ClipLog()
    gp.clip_by_value_(held(step), 0.3, log=log)
    assert log.shares == [0.5]


@QUICK
@given(parts=st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=9))
def test_no_complex_entry_exceeds_the_limit(parts):
    (parameter,) = held(torch.tensor([complex(*part) for part in parts], dtype=torch.complex64))
    gp.clip_by_value_(parameter, 0.3)
    assert float(parameter.grad.to(torch.complex128).abs().max()) <= 0.3


@QUICK
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    exponent=st.integers(-12, 6),
    share=st.sampled_from([0.01, 0.5, 0.999, 1.0, 1.001, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_a_norm_within_the_bound_stays_and_one_above_ends_within(sizes, exponent, share, dtype, seed):
    grads = random_grads([(size,) for size in sizes], dtype, size=10.0**exponent, seed=seed)
    norm = oracle_norm(grads, 2)
    for call in (lambda p, bound: gp.clip_by_norm_(p, bound), clip_to):
        parameters = held(*grads)
        call(parameters, share * norm)
        after = oracle_norm([p.grad for p in parameters], 2)
        assert after <= share * norm * (1 + 1e-6)
        if share > 1:
            assert same(grads, parameters)
    assert after == pytest.approx(min(norm, share * norm), rel=1e-6)  # and no less, where the bound is exact


def clip_to(parameters, bound):
    """AutoClip with a history that makes this its threshold."""
    clip_ = gp.AutoClip(0.0)
    clip_.load_state_dict(clip_.state_dict() | {"norms": [bound], "threshold": bound})
    clip_(parameters)


def test_at_percentile_100_nothing_is_ever_scaled_and_the_log_agrees():
    parameter, log = nn.Parameter(torch.ones(4)), gp.ClipLog()
    clip_ = gp.AutoClip(100.0, log=log)
    for size in (4e-8, 3e-8, 1.0, 1e-30, 2.0):
        parameter.grad = torch.full((4,), size)
        clip_(parameter)
        assert (parameter.grad == torch.tensor(size)).all()
    assert (log.factors, log.shares, log.engaged) == ([1.0] * 5, [0.0] * 5, 0)


def test_factors_shares_and_engagement_agree_near_the_bound():
    log = gp.ClipLog()
    for size in (1.0, 1.0 + 1e-6, 1.0 - 1e-6, 2.0):
        gp.clip_by_norm_(held(torch.tensor([size], dtype=torch.float64)), 1.0, log=log)
    assert [factor < 1 for factor in log.factors] == [share > 0 for share in log.shares] == [False, True, False, True]
    assert log.engaged == 2


def test_a_factor_below_all_numbers_makes_zeros_and_no_endless_loop():
    (parameter,) = held(torch.full((3,), 1e300, dtype=torch.float64))
    gp.clip_by_norm_(parameter, 1e-300)
    assert (parameter.grad == 0).all()


# ----------------------------------------------------------------------------------------- what torch is set to


SETTINGS = {
    "meta": (torch.set_default_device, "meta", None),
    "bfloat16": (torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": (torch.set_default_dtype, torch.float64, torch.float32),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_defaults_change_nothing(setting, dtype):
    grads = random_grads([(40, 30), (3, 4, 5), (70,), (), (0,)], dtype, size=3.0)
    changed, plain = twins(grads)
    change, to, back = SETTINGS[setting]
    calls = (*CALLS.values(), lambda p: gp.clip_by_norm_(p, 0.01, norm_type=3.0), lambda p: gp.clip_by_value_(p, 0.3))
    for call in calls:
        wanted = call(plain)
        change(to)
        try:
            found = call(changed)
        finally:
            change(back)
        assert same([p.grad for p in plain], changed)
        if wanted is not None:
            assert (found.device, found.dtype, float(found)) == (wanted.device, wanted.dtype, float(wanted))
    for name in ("meta", "bfloat16"):
        change, to, back = SETTINGS[name]
        change(to)
        try:
            nothing = gp.clip_by_norm_([], 1.0)
        finally:
            change(back)
        assert (nothing.device.type, nothing.dtype) == ("cpu", torch.float32)


# ----------------------------------------------------------------------------------------------- arguments and states


NUMBERS = {
    "limit": lambda p, x: gp.clip_by_value_(p, x),
    "max_norm": lambda p, x: gp.clip_by_norm_(p, x),
    "norm_type": lambda p, x: gp.clip_by_norm_(p, 1.0, norm_type=x),
    "factor": lambda p, x: gp.clip_adaptive_(p, x),
    "eps": lambda p, x: gp.clip_adaptive_(p, eps=x),
    "percentile": lambda p, x: gp.AutoClip(x),
    "window": lambda p, x: gp.AutoClip(window=x),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_another_kind_is_named_and_one_of_any_library_is_taken(name):
    parameters = held(torch.tensor([3.0, 4.0]))
    before = bits(parameters)
    for wrong in (True, "1.0", None, 1j, [1.0], torch.ones(2), torch.tensor(1j), gp.clip_by_norm_):
        with pytest.raises(TypeError, match=f"{name} must be"):
            NUMBERS[name](parameters, wrong)
    for wrong in (math.nan, -1, torch.tensor(math.nan), np.float32(-2)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            NUMBERS[name](parameters, wrong)
    with pytest.raises(ValueError, match=f"{name} (is too large|must be)"):
        NUMBERS[name](parameters, -(10**400))
    assert same(before, parameters)
    for fine in (torch.tensor(2.0), np.float16(2), np.int64(2), 2):
        NUMBERS[name](held(torch.tensor([3.0, 4.0])), fine)


@every_call
def test_a_log_of_another_kind_is_an_error_before_anything_changes(call):
    model = sick(1.0)
    before = bits(model.parameters())
    for wrong in ([], "log", gp.ClipLog):
        with pytest.raises(TypeError, match=r"log must be a gp\.ClipLog\(\) or None, got"):
            call(model, log=wrong)
    assert same(before, model.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"percentile": "x"},
        {"window": 2.5},
        {"window": True},
        {"threshold": math.nan},
        {"threshold": -1.0},
        {"norms": 3},
        {"norms": "12"},
        {"norms": [1.0, "2"]},
        {"norms": [None]},
        {"norms": [math.nan]},
    ],
    ids=str,
)
def test_a_damaged_state_of_autoclip_changes_nothing(change):
    clip_ = gp.AutoClip(20.0)
    clip_(held(torch.tensor([3.0])))
    before = clip_.state_dict()
    with pytest.raises(ValueError, match=next(iter(change))):
        clip_.load_state_dict(before | change)
    for wrong in (None, 3, [1], "state"):
        with pytest.raises(TypeError, match="a state of AutoClip must be a dict"):
            clip_.load_state_dict(wrong)
    assert clip_.state_dict() == before


def test_an_interrupt_while_autoclip_learns_leaves_its_history_whole(monkeypatch):
    clip_ = gp.AutoClip(50.0, window=2)
    for size in (1.0, 2.0):
        clip_(held(torch.tensor([size])))

    def interrupted(*_):
        raise KeyboardInterrupt

    before = clip_.state_dict()
    with monkeypatch.context() as patched:
        patched.setattr("gradprune.gradients.autoclip.bisect.insort", interrupted)
        with pytest.raises(KeyboardInterrupt):
            clip_(held(torch.tensor([5.0])))
    assert clip_.norms == before["norms"]
    clip_(held(torch.tensor([3.0])))
    assert clip_.norms == [2.0, 3.0]
    assert clip_.threshold == 2.5


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "many"])
def test_a_state_of_a_log_with_impossible_counts_is_refused(count):
    log = gp.ClipLog()
    with pytest.raises((TypeError, ValueError), match="nonfinite must be"):
        log.load_state_dict(log.state_dict() | {"nonfinite": {"weight": count}})
    assert log.nonfinite == {}


@pytest.mark.parametrize("weights", [1.0, 100.0])
def test_adaptive_clipping_of_many_small_layers_is_that_of_each_by_itself(weights):
    torch.manual_seed(0)
    together = [nn.Parameter(weights * torch.randn(shape)) for shape in ((4, 3), (4, 3), (3,), (5,), (4, 3, 2), (1, 3))]
    for p in together:
        p.grad = torch.randn_like(p)
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    for one, p in zip(alone, together, strict=True):
        one.grad = p.grad.clone()
        gp.clip_adaptive_(one, 0.1)
    gp.clip_adaptive_(together, 0.1)
    for one, p in zip(alone, together, strict=True):
        torch.testing.assert_close(p.grad, one.grad, rtol=1e-6, atol=0)


def test_a_sparse_gradient_of_a_vector_is_one_unit():
    weight = nn.Parameter(torch.full((4,), 2.0))
    weight.grad = torch.sparse_coo_tensor([[0, 2]], [30.0, 40.0], (4,))
    gp.clip_adaptive_(weight, 0.1)
    torch.testing.assert_close(weight.grad.to_dense(), torch.tensor([0.24, 0.0, 0.32, 0.0]))  # 0.1 of the norm of 4


def test_an_empty_gradient_beside_one_whose_squares_leave_the_range_says_nothing():
    large, empty = nn.Parameter(torch.full((2,), 1e30)), nn.Parameter(torch.ones(0, 3))
    large.grad, empty.grad = torch.full((2,), 1e25), torch.ones(0, 3)
    log = gp.ClipLog()
    gp.clip_adaptive_([large, empty], 0.01, log=log)
    assert log.sizes == pytest.approx([1e-5])
    assert log.factors == [1.0]


def test_sparse_gradients_of_vectors_that_hold_equally_much_are_bounded_each_by_its_own_weights():
    small, large = nn.Parameter(torch.full((4,), 2.0)), nn.Parameter(torch.full((16,), 2.0))
    for weight in (small, large):
        weight.grad = torch.sparse_coo_tensor([[0, 2]], [30.0, 40.0], weight.shape)
    gp.clip_adaptive_([small, large], 0.1)
    for weight, norm in ((small, 4.0), (large, 8.0)):
        assert float(weight.grad.to_dense().norm()) == pytest.approx(0.1 * norm)


def test_autoclip_takes_the_tenth_percentile_of_the_last_thousand_unless_told_otherwise():
    clip_, parameter = gp.AutoClip(), nn.Parameter(torch.zeros(1))
    for norm in range(1, 1202):
        parameter.grad = torch.full((1,), float(norm))
        clip_(parameter)
    assert clip_.threshold == pytest.approx(np.percentile(np.arange(202, 1202), 10))

"""What is kept is what a plain loop over the entries keeps; what is sent and what waits add up to what was given."""

import copy
import gc
import io
import math
import weakref
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradprune as gp
from gradprune.gradients import representable, sparsify

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(0,), (1,), (), (3,), (2, 3), (5, 1, 4), (7, 9)]

finite = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 65504.0, 6e-8, -1e-45]),
    st.floats(-4, 4, allow_nan=False, width=16),
    st.floats(-6e4, 6e4, allow_nan=False, width=32),
)
small_integers = st.integers(-8, 8).map(float)


def with_gradients(values, dtype=torch.float32):
    """Parameters whose gradients are the given tensors."""
    parameters = []
    for value in values:
        parameter = nn.Parameter(torch.zeros(value.shape, dtype=dtype))
        parameter.grad = value.to(dtype, copy=True)
        parameters.append(parameter)
    return parameters


@st.composite
def gradients(draw, element=finite, dtypes=FLOATS, mixed=True):
    dtype = draw(st.sampled_from(dtypes))
    parameters = []
    for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4)):
        size = math.prod(shape)
        data = draw(st.lists(element, min_size=size, max_size=size))
        value = torch.tensor(data, dtype=torch.float64).reshape(shape)
        own = draw(st.sampled_from([dtype, torch.float32])) if mixed else dtype
        parameters += with_gradients([value], own)
    return parameters


def entries(parameters):
    """All gradient entries as exact numbers, in order."""
    return [x for p in parameters for x in p.grad.double().reshape(-1).tolist()]


def bits(parameters):
    """All gradient entries as they lie in memory, so that zeros with and without a sign differ."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [p.grad.contiguous().view(integer[p.grad.element_size()]).reshape(-1).tolist() for p in parameters]


def top_by_plain_sort(values, count):
    """The values with all but the `count` largest magnitudes set to zero; of equals the later stays."""
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), i))
    kept = set(order[len(values) - count :])
    return [v if i in kept else 0.0 for i, v in enumerate(values)]


def count_of(density, total):
    return 0 if density == 0 else max(round(density * total), min(1, total))


# ------------------------------------------------------------------------------------------------------ thresholds


@settings(max_examples=150, deadline=None)
@given(parameters=gradients(), threshold=st.one_of(finite.map(abs), st.floats(0, 5)))
def test_a_threshold_keeps_exactly_what_a_loop_over_the_entries_keeps(parameters, threshold):
    before = entries(parameters)
    share = gp.threshold_gradients_(parameters, threshold)
    assert entries(parameters) == [x if abs(x) >= threshold else 0.0 for x in before]
    kept = sum(abs(x) >= threshold for x in before)
    assert share == (kept / len(before) if before else 1.0)


@settings(max_examples=150, deadline=None)
@given(parameters=gradients(element=small_integers), ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 40.0]))
def test_a_ratio_is_of_the_mean_of_each_tensor(parameters, ratio):
    expected = []
    for p in parameters:
        values = [Fraction(x) for x in entries([p])]
        cut = Fraction(ratio) * sum(map(abs, values)) / len(values) if values else 0
        # The threshold is a number of double precision: an entry within its rounding may fall on either side.
        assert not any(0 < abs(abs(x) - cut) < 1e-12 for x in values)
        expected += [float(x) if abs(x) >= cut else 0.0 for x in values]
    gp.threshold_gradients_(parameters, ratio=ratio)
    assert entries(parameters) == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [1, 3, 7, 1000, 300_007])
def test_a_constant_gradient_lies_not_below_its_own_mean(dtype, size):
    (parameter,) = with_gradients([torch.full((size,), -0.1)], dtype)
    assert gp.threshold_gradients_(parameter, ratio=1.0) == 1.0
    assert gp.threshold_gradients_(parameter, ratio=1.01) == 0.0


def test_a_mean_of_many_values_is_that_of_their_exact_sum():
    values = torch.randn(700_001, generator=torch.Generator().manual_seed(0))
    exact = math.fsum(values.abs().tolist()) / len(values)
    assert sparsify.mean_magnitude(values) == pytest.approx(exact, rel=1e-14)
    assert sparsify.mean_magnitude(values[::3]) == pytest.approx(values[::3].double().abs().mean().item(), rel=1e-14)


def test_a_threshold_between_two_numbers_of_the_dtype_is_not_rounded():
    third = torch.tensor(1 / 3)  # in float32 a little above one third
    below = torch.nextafter(third, torch.tensor(0.0))
    parameters = with_gradients([torch.stack([below, third, -third, -below])])
    assert gp.threshold_gradients_(parameters, 1 / 3) == 0.5
    assert entries(parameters) == [0.0, third.item(), -third.item(), 0.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_neighbour_of_a_threshold_falls_on_its_side(dtype):
    for cut in (1e-300, 1e-45, 6e-8, 0.1, 1.0, 3.7, 65504.0, 1e5, 3e38):
        at_least = torch.tensor(representable.at_least(cut, dtype), dtype=dtype)
        assert at_least.double() >= cut
        assert representable.neighbour(at_least, -1).double() < cut


def test_threshold_zero_changes_no_bit_and_keeps_all():
    parameters = with_gradients([torch.tensor([0.0, -0.0, 1.0])])
    before = bits(parameters)
    assert gp.threshold_gradients_(parameters, 0) == 1.0
    assert gp.threshold_gradients_(parameters, ratio=0.0) == 1.0
    assert bits(parameters) == before


def test_the_parameters_themselves_do_not_change():
    model = small_model()
    state = copy.deepcopy(model.state_dict())
    gp.threshold_gradients_(model, ratio=1.0)
    gp.keep_top_gradients_(model, 0.1)
    gp.ErrorFeedback(model, 0.1).step()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------- top part


@settings(max_examples=150, deadline=None)
@given(parameters=gradients(), density=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, 1e-9])))
def test_the_top_fraction_agrees_with_a_plain_sort_over_all_tensors(parameters, density):
    before = entries(parameters)
    share = gp.keep_top_gradients_(parameters, density)
    count = count_of(density, len(before))
    assert entries(parameters) == top_by_plain_sort(before, count)
    assert share == (count / len(before) if before else 1.0)


@settings(max_examples=100, deadline=None)
@given(parameters=gradients(), density=st.floats(0, 1))
def test_the_top_fraction_of_each_layer_agrees_with_a_plain_sort_of_each(parameters, density):
    before = [entries([p]) for p in parameters]
    gp.keep_top_gradients_(parameters, density, scope="layer")
    for p, values in zip(parameters, before, strict=True):
        assert entries([p]) == top_by_plain_sort(values, count_of(density, len(values)))


def test_a_density_above_zero_starves_no_layer_of_its_own_scope():
    parameters = with_gradients([torch.ones(3), torch.ones(1000) * 5])
    assert gp.keep_top_gradients_(parameters, 0.01, scope="layer") == 11 / 1003
    assert [int((p.grad != 0).sum()) for p in parameters] == [1, 10]


# ------------------------------------------------------------------------------------------- what may be passed


def small_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    backward(model)
    return model


def backward(model, seed=7):
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    model(torch.randn(8, 2, 6, 6, generator=generator)).square().mean().backward()


CALLS = {
    "threshold": lambda params: gp.threshold_gradients_(params, 0.01),
    "ratio": lambda params: gp.threshold_gradients_(params, ratio=1.0),
    "top": lambda params: gp.keep_top_gradients_(params, 0.3),
    "top of each layer": lambda params: gp.keep_top_gradients_(params, 0.3, scope="layer"),
    "feedback": lambda params: gp.ErrorFeedback(params, 0.3).step(),
    "feedback over a threshold": lambda params: gp.ErrorFeedback(params, threshold=0.01).step(),
    "feedback over a ratio": lambda params: gp.ErrorFeedback(params, ratio=1.0).step(),
    "feedback with momentum": lambda params: gp.ErrorFeedback(params, 0.3, momentum=0.9).step(),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_a_model_its_pairs_its_tensors_and_a_generator_mean_the_same(call):
    found = []
    for give in (lambda m: m, lambda m: m.named_parameters(), lambda m: list(m.parameters()), lambda m: m.parameters()):
        model = small_model()
        share = call(give(model))
        found.append((share, entries(model.parameters())))
    assert all(f == found[0] for f in found)
    assert 0 < found[0][0] < 1


@every_call
def test_what_has_no_gradient_is_left_alone_and_a_tied_tensor_counts_once(call):
    once, twice = small_model(), small_model()
    for model in (once, twice):
        model[0].weight.grad = None
        model[3].bias.requires_grad_(False).grad = None
    share = call(list(once.parameters()))
    assert call([*twice.parameters(), twice[0].bias, twice[3].weight]) == share
    assert twice[0].weight.grad is None
    assert torch.equal(once[3].weight.grad, twice[3].weight.grad)


@every_call
def test_without_any_gradient_nothing_is_dropped(call):
    model = small_model()
    model.zero_grad()
    assert call(model) == 1.0


def test_an_empty_iterable_is_nothing_to_threshold():
    assert gp.threshold_gradients_([], 1.0) == 1.0
    assert gp.keep_top_gradients_([], 0.5) == 1.0


@every_call
def test_layouts_other_than_contiguous_give_the_same(call):
    plain, other = small_model(), small_model()
    for p in other.parameters():
        memory = torch.full((2 * p.numel(),), 7.0)
        spaced = memory[::2].view(p.shape) if p.ndim == 1 else p.grad.transpose(0, -1).contiguous().transpose(0, -1)
        p.grad = spaced.copy_(p.grad)
    assert call(plain) == call(other)
    assert entries(plain.parameters()) == entries(other.parameters())


def nan_last(model):
    model[3].bias.grad[-1] = math.nan


def infinite(model):
    model[3].bias.grad[0] = -math.inf


def sparse(model):
    model[3].bias.grad = model[3].bias.grad.to_sparse()


def expanded(model):
    model[3].bias.grad = torch.tensor(1.0).expand(5)


BAD = {
    nan_last: r"the gradient of '3\.bias' is not finite \(NaN or infinity\)",
    infinite: r"the gradient of '3\.bias' is not finite \(NaN or infinity\)",
    sparse: r"the gradient of '3\.bias' is sparse \(torch\.sparse_coo\) already; leave that parameter out",
    expanded: r"entries of the gradient of '3\.bias' share memory \(it was expanded\): clone it first",
}


@every_call
@pytest.mark.parametrize("spoil", BAD)
def test_a_gradient_that_has_no_threshold_is_named_before_any_changes(call, spoil):
    model = small_model()
    spoil(model)
    before = bits(p for n, p in model.named_parameters() if n != "3.bias")
    with pytest.raises(ValueError, match=BAD[spoil]):
        call(model)
    assert bits(p for n, p in model.named_parameters() if n != "3.bias") == before


@every_call
def test_a_complex_gradient_is_an_error(call):
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    parameter.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"the gradient of 'parameter 0' is torch\.complex64; thresholds are for real"):
        call([parameter])


ARGUMENTS = {
    "exactly one of threshold, ratio; got none": lambda m: gp.threshold_gradients_(m),
    "exactly one of threshold, ratio; got threshold, ratio": lambda m: gp.threshold_gradients_(m, 1.0, ratio=1.0),
    "threshold must be a finite number, at least 0, got -1": lambda m: gp.threshold_gradients_(m, -1),
    "threshold must be a finite number, at least 0, got nan": lambda m: gp.threshold_gradients_(m, math.nan),
    "ratio must be a finite number, at least 0, got inf": lambda m: gp.threshold_gradients_(m, ratio=math.inf),
    r"density must be in \[0, 1\], got 1.5": lambda m: gp.keep_top_gradients_(m, 1.5),
    r"density must be in \[0, 1\], got nan": lambda m: gp.ErrorFeedback(m, math.nan),
    "scope must be one of 'global', 'layer'; got 'erk'": lambda m: gp.keep_top_gradients_(m, 0.5, scope="erk"),
    "scope must be one of 'global', 'layer'; got 'all'": lambda m: gp.ErrorFeedback(m, 0.5, scope="all"),
    "exactly one of density, threshold, ratio; got none": lambda m: gp.ErrorFeedback(m),
    "one of density, threshold, ratio; got density, ratio": lambda m: gp.ErrorFeedback(m, 0.1, ratio=1.0),
    "momentum must be .*at least 0 and below 1, got 1.0": lambda m: gp.ErrorFeedback(m, 0.1, momentum=1.0),
    "params is empty": lambda m: gp.ErrorFeedback([], 0.1),
    r"density at step 0 must be in \[0, 1\], got 2": lambda m: gp.ErrorFeedback(m, lambda step: 2).step(),
    "ratio at step 0 must be a finite number, at least 0, got -1": lambda m: gp.ErrorFeedback(
        m, ratio=lambda step: -1
    ).step(),
}


@pytest.mark.parametrize("message", ARGUMENTS)
def test_a_bad_argument_is_an_error_that_says_what_is_wanted_and_changes_nothing(message):
    model = small_model()
    before = bits(model.parameters())
    with pytest.raises(ValueError, match=message):
        ARGUMENTS[message](model)
    assert bits(model.parameters()) == before


def test_something_else_than_a_tensor_is_an_error_that_says_where():
    with pytest.raises(TypeError, match="entry 1 is str"):
        gp.threshold_gradients_([nn.Parameter(torch.zeros(1)), "weight"], 0.1)


# --------------------------------------------------------------------------------------------------- error feedback

RULES = {
    "density": {"density": 0.3},
    "density of each layer": {"density": 0.3, "scope": "layer"},
    "threshold": {"threshold": 6.0},
    "ratio": {"ratio": 1.5},
    "schedule": {"density": lambda step: 0.5 ** (1 + step)},
    "nothing": {"density": 0.0},
}


def sums_of_gradients(steps, rule, *, momentum=0.0, dtypes=(torch.float32,), element=small_integers, seed_data=None):
    """Run `steps` steps on drawn gradients; return what was given, sent, and waits in the end, per entry."""
    parameters = seed_data.draw(gradients(element=element, dtypes=list(dtypes), mixed=False))
    feedback = gp.ErrorFeedback(parameters, **rule, momentum=momentum)
    given_sum = [Fraction(0)] * len(entries(parameters))
    sent_sum = list(given_sum)
    for _ in range(steps):
        for p in parameters:
            data = seed_data.draw(st.lists(element, min_size=p.numel(), max_size=p.numel()))
            p.grad = torch.tensor(data, dtype=torch.float64).reshape(p.shape).to(p.dtype)
        given_sum = [a + Fraction(b) for a, b in zip(given_sum, entries(parameters), strict=True)]
        feedback.step()
        sent_sum = [a + Fraction(b) for a, b in zip(sent_sum, entries(parameters), strict=True)]
    waits = [Fraction(x) for r in feedback.residuals.values() for x in r.double().reshape(-1).tolist()]
    return given_sum, sent_sum, waits


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), steps=st.integers(1, 5))
def test_what_was_sent_and_what_waits_add_up_to_what_was_given_exactly(rule, data, steps):
    """Small integers are added without rounding, so nothing may be missing."""
    given_sum, sent_sum, waits = sums_of_gradients(steps, rule, dtypes=FLOATS, seed_data=data)
    assert [s + w for s, w in zip(sent_sum, waits, strict=True)] == given_sum


@settings(max_examples=60, deadline=None)
@given(data=st.data(), steps=st.integers(1, 4))
def test_the_rounding_of_what_is_sent_in_half_precision_waits_too(data, steps):
    """Quarters up to 1,000 add up exactly in float32, and not in bfloat16."""
    quarters = st.integers(-250, 250).map(lambda n: n / 4)
    dtypes = (torch.bfloat16, torch.float16)
    given_sum, sent_sum, waits = sums_of_gradients(
        steps, {"density": 0.5}, dtypes=dtypes, element=quarters, seed_data=data
    )
    assert [s + w for s, w in zip(sent_sum, waits, strict=True)] == given_sum


def test_half_precision_gradients_wait_in_float32():
    (parameter,) = with_gradients([torch.tensor([256.0, 1.0])], torch.bfloat16)
    feedback = gp.ErrorFeedback(parameter, 0.5)
    feedback.step()
    parameter.grad = torch.tensor([0.0, 256.0], dtype=torch.bfloat16)
    feedback.step()  # 257 is no bfloat16 number
    assert parameter.grad.tolist() == [0.0, 256.0]
    assert feedback.residuals["parameter 0"].tolist() == [0.0, 1.0]
    assert feedback.residuals["parameter 0"].dtype == torch.float32


@settings(max_examples=80, deadline=None)
@given(parameters=gradients(mixed=True), density=st.floats(0, 1), data=st.data())
def test_feedback_sends_the_top_of_the_sum_by_a_plain_sort(parameters, density, data):
    feedback = gp.ErrorFeedback(parameters, density)
    feedback.step()
    waits = [x for r in feedback.residuals.values() for x in r.double().reshape(-1).tolist()]
    for p in parameters:
        values = data.draw(st.lists(small_integers, min_size=p.numel(), max_size=p.numel()))
        p.grad = torch.tensor(values, dtype=p.dtype).reshape(p.shape)
    wide = [torch.promote_types(p.dtype, torch.float32) for p in parameters for _ in range(p.numel())]
    sums = [
        (torch.tensor(a, dtype=d) + torch.tensor(b, dtype=d)).item()
        for a, b, d in zip(waits, entries(parameters), wide, strict=True)
    ]
    own = [p.dtype for p in parameters for _ in range(p.numel())]
    if any(abs(x) > torch.finfo(d).max for x, d in zip(sums, own, strict=True)):  # 65504 + 8 in float16
        with pytest.raises(ValueError, match="leaves the range"):
            feedback.step()
        return
    feedback.step()
    expected = [
        torch.tensor(x, dtype=torch.float64).to(d).item()
        for x, d in zip(top_by_plain_sort(sums, count_of(density, len(sums))), own, strict=True)
    ]
    assert entries(parameters) == expected


def test_density_one_sends_everything_and_is_plain_training():
    model, plain = small_model(), small_model()
    feedback = gp.ErrorFeedback(model, 1.0)
    for seed in range(3):
        backward(model, seed)
        backward(plain, seed)
        assert feedback.step() == 1.0
        assert bits(model.parameters()) == bits(plain.parameters())


def test_a_small_gradient_that_persists_is_sent_in_the_end():
    (parameter,) = with_gradients([torch.zeros(2)])
    feedback = gp.ErrorFeedback(parameter, threshold=1.0)
    sent = torch.zeros(2)
    for step in range(20):
        parameter.grad = torch.tensor([1.0 if step % 2 else -1.0, 0.25])
        feedback.step()
        sent += parameter.grad
    assert sent.tolist() == [0.0, 5.0]


def test_momentum_is_that_of_the_optimizer_where_all_is_sent_late():
    """All gradients at step 0 only, sent at step 3: the sum of what momentum SGD would have applied until then."""
    (parameter,) = with_gradients([torch.ones(4)])
    feedback = gp.ErrorFeedback(parameter, density=lambda step: float(step == 3), momentum=0.5)
    for step in range(4):
        parameter.grad = torch.full((4,), 1.0 if step == 0 else 0.0)
        feedback.step()
    assert parameter.grad.tolist() == [1 + 0.5 + 0.25 + 0.125] * 4
    assert feedback.state_dict()["velocities"]["parameter 0"].tolist() == [0.0] * 4  # factor masking


def dgc_by_hand(gradient_steps, density, momentum):
    """Lin et al. (2018), momentum correction and factor masking in one process, on Python numbers."""
    size = len(gradient_steps[0])
    u, v, sent = [0.0] * size, [0.0] * size, []
    for g in gradient_steps:
        u = [momentum * a + b for a, b in zip(u, g, strict=True)]
        v = [a + b for a, b in zip(v, u, strict=True)]
        sent.append(top_by_plain_sort(v, count_of(density, size)))
        order = sorted(range(size), key=lambda i: (abs(v[i]), i))[size - count_of(density, size) :]
        for i in order:
            u[i] = v[i] = 0.0
    return sent, u, v


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 12), steps=st.integers(1, 6), density=st.floats(0, 1))
def test_momentum_correction_and_factor_masking_agree_with_the_papers_algorithm(data, size, steps, density):
    given_steps = [data.draw(st.lists(small_integers, min_size=size, max_size=size)) for _ in range(steps)]
    sent, u, v = dgc_by_hand(given_steps, density, 0.5)
    (parameter,) = with_gradients([torch.zeros(size)], torch.float64)
    feedback = gp.ErrorFeedback(parameter, density, momentum=0.5)
    for values, expected in zip(given_steps, sent, strict=True):
        parameter.grad = torch.tensor(values, dtype=torch.float64)
        feedback.step()
        assert parameter.grad.tolist() == expected
    state = feedback.state_dict()
    assert state["velocities"]["parameter 0"].tolist() == u
    assert state["residuals"]["parameter 0"].tolist() == v


def test_a_schedule_sees_the_number_of_steps_taken():
    (parameter,) = with_gradients([torch.arange(1.0, 11.0)])
    growing = gp.Linear(0.8, begin=0, end=4)
    feedback = gp.ErrorFeedback(parameter, density=lambda step: 1 - growing(step))
    shares = []
    for _ in range(6):
        parameter.grad = torch.arange(1.0, 11.0)
        shares.append(feedback.step())
    assert shares == [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert feedback.steps == 6


def test_a_parameter_without_gradient_waits_and_does_not_count():
    parameters = with_gradients([torch.ones(4), torch.tensor([3.0, 0.5])])
    feedback = gp.ErrorFeedback(parameters, 0.5)
    assert feedback.step() == 0.5
    waiting = feedback.residuals["parameter 1"].clone()
    parameters[1].grad = None
    parameters[0].grad = torch.ones(4)
    assert feedback.step() == 0.5
    assert parameters[1].grad is None
    assert torch.equal(feedback.residuals["parameter 1"], waiting)
    parameters[0].grad = None
    parameters[1].grad = torch.zeros(2)
    feedback.step()
    assert parameters[1].grad.tolist() == [0.0, 0.5]


def test_a_residual_goes_with_its_parameter():
    first, second = with_gradients([torch.ones(3), torch.ones(2)])
    feedback = gp.ErrorFeedback([first, second], 0.5, momentum=0.9)
    feedback.step()
    kept = weakref.ref(feedback.residuals["parameter 1"])
    del second
    gc.collect()
    assert kept() is None
    assert list(feedback.residuals) == ["parameter 0"]
    first.grad = torch.ones(3)
    assert 0 < feedback.step() < 1


def test_one_residual_for_each_parameter_two_with_momentum():
    for momentum, kinds in ((0.0, 1), (0.9, 2)):
        model = small_model()
        feedback = gp.ErrorFeedback(model, 0.1, momentum=momentum)
        for seed in range(5):
            backward(model, seed)
            feedback.step()
        state = feedback.state_dict()
        held = [t for kind in ("residuals", "velocities") for t in state[kind].values()]
        assert sum(t.numel() for t in held) == kinds * sum(p.numel() for p in model.parameters())


def trained(steps, *, momentum, save_at=None):
    """Train with feedback; with `save_at`, write all state to bytes there and go on with fresh objects."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rule = {"density": lambda step: 0.5 if step < 3 else 0.1, "momentum": momentum}
    feedback = gp.ErrorFeedback(model, **rule)
    for step in range(steps):
        if step == save_at:
            file = io.BytesIO()
            torch.save([model.state_dict(), feedback.state_dict()], file)
            file.seek(0)
            weights, state = torch.load(file, weights_only=True)
            model = small_model()
            model.load_state_dict(weights)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            feedback = gp.ErrorFeedback(model, **rule)
            feedback.load_state_dict(state)
        backward(model, step)
        feedback.step()
        optimizer.step()
    return model


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_resumed_run_goes_on_bit_for_bit(momentum):
    whole, resumed = trained(8, momentum=momentum), trained(8, momentum=momentum, save_at=4)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_taken_does_not_change_with_later_steps():
    model = small_model()
    feedback = gp.ErrorFeedback(model, 0.1, momentum=0.9)
    feedback.step()
    state = feedback.state_dict()
    before = copy.deepcopy(state)
    backward(model, 1)
    feedback.step()
    assert state["steps"] == 1
    for kind in ("residuals", "velocities"):
        assert all(torch.equal(before[kind][name], value) for name, value in state[kind].items())


def feedback_and_state(momentum=0.0):
    model = small_model()
    feedback = gp.ErrorFeedback(model, 0.1, momentum=momentum)
    feedback.step()
    return model, feedback, copy.deepcopy(feedback.state_dict())


def unknown_name(state):
    state["residuals"]["9.weight"] = torch.zeros(2)


def other_shape(state):
    state["residuals"]["3.bias"] = torch.zeros(2)


def not_finite(state):
    state["residuals"]["3.bias"][1] = math.nan


def velocities(state):
    state["velocities"] = state["residuals"]


STATES = {
    unknown_name: r"the state has residuals of '9\.weight', which is not among the parameters here",
    other_shape: r"the state's residuals of '3\.bias' have shape \(2,\), the parameter has shape \(5,\)",
    not_finite: r"the state's residuals of '3\.bias' are not finite",
    velocities: r"the state has velocities, and momentum here is 0\.0",
}


@pytest.mark.parametrize("spoil", STATES)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(spoil):
    model, feedback, state = feedback_and_state()
    backward(model, 2)
    feedback.step()
    before = copy.deepcopy(feedback.state_dict())
    spoil(state)
    with pytest.raises(ValueError, match=STATES[spoil]):
        feedback.load_state_dict(state)
    after = feedback.state_dict()
    assert after["steps"] == before["steps"] == 2
    assert all(torch.equal(after["residuals"][name], value) for name, value in before["residuals"].items())


def test_a_state_without_velocities_does_not_fit_momentum():
    _owner, feedback, _ = feedback_and_state(momentum=0.9)  # the model has to live, or its names are gone
    _model, _, plain = feedback_and_state()
    with pytest.raises(ValueError, match=r"the state has no velocities, and momentum here is 0\.9"):
        feedback.load_state_dict(plain)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_failed_step_changes_neither_gradients_nor_what_waits(momentum):
    model, feedback, before = feedback_and_state(momentum)
    backward(model, 3)
    model[3].bias.grad[2] = math.nan
    gradients_before = bits(model.parameters())
    with pytest.raises(ValueError, match=r"'3\.bias' is not finite"):
        feedback.step()
    assert bits(model.parameters()) == gradients_before
    after = feedback.state_dict()
    assert after["steps"] == 1
    for kind in ("residuals", "velocities"):
        assert all(torch.equal(after[kind][name], value) for name, value in before[kind].items())


def test_a_sum_beyond_the_dtypes_range_is_named():
    (parameter,) = with_gradients([torch.tensor([60000.0, 1.0])], torch.float16)
    feedback = gp.ErrorFeedback([("head", parameter)], 0.0)
    feedback.step()
    parameter.grad = torch.tensor([60000.0, 1.0], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"the gradient of 'head' plus what waits for it leaves the range of torch"):
        feedback.step()
    assert feedback.residuals["head"].tolist() == [60000.0, 1.0]


def test_a_parameter_of_another_shape_than_what_waits_for_it_is_named():
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    feedback = gp.ErrorFeedback([("head", parameter)], 0.5)
    feedback.step()
    parameter.grad = None
    parameter.data = torch.zeros(2)
    parameter.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"residuals of 'head' have shape \(3,\), the parameter has shape \(2,\)"):
        feedback.step()


def test_two_names_for_one_tensor_are_one_residual_and_one_name_for_two_is_an_error():
    parameter = with_gradients([torch.ones(3)])[0]
    feedback = gp.ErrorFeedback([("a", parameter), ("b", parameter)], 0.5)
    feedback.step()
    assert list(feedback.residuals) == ["a"]
    with pytest.raises(ValueError, match="two different parameters are called 'a'"):
        gp.ErrorFeedback([("a", parameter), ("a", nn.Parameter(torch.zeros(1)))], 0.5)


# ------------------------------------------------------------------------------------------------ what chapter 3 says


def test_without_feedback_plain_thresholding_never_moves_a_small_coordinate_and_with_it_does():
    """Chapter 3's counterexample: f(x, y) = x²/2 + y²/2 seen through noise of ±1 in x, threshold above |y|."""
    found = {}
    for kind in ("plain", "feedback"):
        point = nn.Parameter(torch.tensor([0.0, 0.4]))
        optimizer = torch.optim.SGD([point], lr=0.1)
        feedback = gp.ErrorFeedback([point], threshold=0.5)
        for step in range(400):
            noise = 1.0 if step % 2 else -1.0
            point.grad = torch.stack([point.detach()[0] + noise, point.detach()[1]])
            gp.threshold_gradients_([point], 0.5) if kind == "plain" else feedback.step()
            optimizer.step()
        found[kind] = point[1].item()
    assert found["plain"] == pytest.approx(0.4)
    assert abs(found["feedback"]) < 0.1


def test_the_share_above_a_multiple_of_the_mean_is_the_predicted_one():
    """Normal: erfc(r / sqrt(pi)); Laplace: exp(-r). A million draws: five standard deviations are 0.0025."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(10**6, generator=generator)
    uniform = torch.rand(10**6, generator=generator, dtype=torch.float64)
    laplace = -uniform.log() * torch.where(torch.rand(10**6, generator=generator) < 0.5, -1.0, 1.0)
    for ratio in (0.25, 0.5, 1.0, 2.0):
        (parameter,) = with_gradients([normal])
        assert gp.threshold_gradients_(parameter, ratio=ratio) == pytest.approx(
            math.erfc(ratio / math.sqrt(math.pi)), abs=0.0025
        )
        (parameter,) = with_gradients([laplace], torch.float64)
        assert gp.threshold_gradients_(parameter, ratio=ratio) == pytest.approx(math.exp(-ratio), abs=0.0025)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_on_an_accelerator_are_sparsified_as_on_the_cpu(dtype, on_accelerator):
    made = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = (nn.Parameter(torch.zeros_like(made)) for _ in range(2))
    here.grad, there.grad = made.clone(), on_accelerator(made.clone())
    wanted = gp.threshold_gradients_(here, ratio=1.0)
    assert 0.2 < wanted < 0.8
    assert gp.threshold_gradients_(there, ratio=1.0) == wanted
    assert torch.equal(there.grad.as_subclass(torch.Tensor), here.grad)

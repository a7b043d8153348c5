"""A request is checked when it is made, and answers for as many amounts as one asks of it."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import gradprune as gp
from examples import two_layers
from gradprune.weights.plan import at_least
from gradprune.weights.request import Request


def refused(kind, words, score=gp.magnitude, **how):
    model = two_layers()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(kind, match=words):
        gp.prune(model, score, **how)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# ------------------------------------------------------------------------------------------------------ wrong objects


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (0.9, "got 0.9; the number was taken as the score: sparsity=0.9 or threshold=0.9 is given by name"),
        ("magnitude", "got 'magnitude'; give the function itself, gp.magnitude; there are magnitude, random, .*taylor"),
        (gp.magnitude(two_layers()), "got dict; give the function, not the scores it returned: gp.magnitude"),
        (torch.optim.SGD(two_layers().parameters(), 0.1), r"got SGD; .*masks\.hold\(optimizer\)"),
        (None, "score must be a function, got None"),
    ],
)
def test_a_score_that_is_no_function_says_what_was_meant(score, words):
    refused(TypeError, words, score, sparsity=0.5)


def named(make):
    return lambda model: {name: make(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("score", "error", "words"),
    [
        (lambda m: None, TypeError, "returned None"),
        (lambda m: [1.0], TypeError, "returned list"),
        (lambda m: torch.ones(2), TypeError, "returned Tensor"),
        (named(lambda p: 1.0), TypeError, r"score of '0\.weight' must be a tensor of shape \(8, 8\), got 1\.0"),
        (named(lambda p: p.detach().numpy()), TypeError, "must be a tensor"),
        (named(lambda p: p.detach().to("meta")), TypeError, "dense tensor with values, got .* on meta"),
        (named(lambda p: p.detach().to_sparse()), TypeError, "dense tensor with values, got torch.sparse_coo"),
        (named(lambda p: p.detach()[:1]), ValueError, "has shape"),
        (named(lambda p: p * math.nan), ValueError, "NaN"),
    ],
)
@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"threshold": 0.1}, {"sparsity": 0.5, "scope": "row"}])
def test_what_a_score_returns_is_checked(score, error, words, how):
    refused(error, words, score, **how)


@pytest.mark.parametrize("make", [lambda p: p > 0, lambda p: (100 * p).int(), lambda p: p.double(), lambda p: p.half()])
@pytest.mark.parametrize("how", [{}, {"scope": "row"}, {"granularity": "channel", "include": "*"}])
def test_scores_of_any_real_dtype_are_taken(make, how):
    assert gp.prune(two_layers(), named(lambda p: make(p.detach())), sparsity=0.5, **how).sparsity == 0.5


@pytest.mark.parametrize("within", [3, [1], "masks"])
def test_within_must_be_masks(within):
    refused(TypeError, "`within` must be masks", sparsity=0.5, within=within)


@pytest.mark.parametrize("mask", [1, torch.ones(8, 8), np.ones((8, 8), bool)])
def test_within_must_hold_bool_tensors(mask):
    refused(
        TypeError, r"`within` must hold bool tensors; that of '0\.weight' is", sparsity=0.5, within={"0.weight": mask}
    )


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("wrong", [True, "0.5", 1j, [0.5], torch.tensor([0.5]), np.bool_(True)])
def test_what_is_no_number_is_a_type_error(wrong):
    refused(TypeError, "sparsity must be a number", sparsity=wrong)
    refused(TypeError, "threshold must be a number", threshold=wrong)
    refused(TypeError, "min_keep must be a whole number", sparsity=0.5, min_keep=wrong)
    refused(TypeError, r"sparsity of '0\.weight' must be a number", scope={"0.weight": wrong})


@pytest.mark.parametrize("wrong", [math.nan, -0.1, 1.1, math.inf, 10**400])
def test_a_sparsity_out_of_range_is_a_value_error(wrong):
    refused(ValueError, "sparsity (must be in|is too large)", sparsity=wrong)
    refused(ValueError, r"sparsity of '0\.weight' (must be in|is too large)", scope={"0.weight": wrong})


def test_min_keep_is_a_whole_number():
    refused(ValueError, "min_keep must be a whole number, got 2.5", sparsity=0.5, min_keep=2.5)
    refused(ValueError, "min_keep must be a whole number from 0, got -1", sparsity=0.5, min_keep=-1)


@pytest.mark.parametrize("half", [0.5, np.float16(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor(0.5).half()])
def test_numbers_of_every_library_are_taken(half):
    assert gp.prune(two_layers(), sparsity=half).sparsity == 0.5
    assert gp.prune(two_layers(), scope={"*": half}).sparsity == 0.5
    assert gp.prune(two_layers(), threshold=half, min_keep=np.int64(1)).sparsity > 0.9


# ---------------------------------------------------------------------------------------------------------- thresholds


@settings(max_examples=300)
@given(
    threshold=st.one_of(st.floats(allow_nan=False), st.floats(-1, 1), st.sampled_from([0.7, 1e-8, -1e-8, 70000.0])),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_threshold_is_compared_exactly_whatever_the_dtype(threshold, dtype):
    near = torch.tensor([threshold], dtype=torch.float64).to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[near.element_size()]
    around = torch.cat([near, (near.view(integer) + 1).view(dtype), (near.view(integer) - 1).view(dtype)])
    values = torch.cat([around, torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf], dtype=dtype)])
    values = values[~values.isnan()]
    assert at_least(values, threshold).tolist() == [v >= threshold for v in values.tolist()]


@given(threshold=st.floats(allow_nan=False))
@example(threshold=-1e19)  # beyond the 64 bits that hold whole scores, on either side
@example(threshold=-(2.0**63))
@example(threshold=2.0**63)
@example(threshold=1e19)
def test_whole_scores_are_compared_exactly_too(threshold):
    for dtype in (torch.int8, torch.int64, torch.uint8):
        limits = torch.iinfo(dtype)
        values = torch.tensor([limits.min, 0, 1, 5, limits.max], dtype=dtype)
        assert at_least(values, threshold).tolist() == [v >= threshold for v in values.tolist()]


def test_a_threshold_just_above_half_precision_weights_prunes_them():
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    nn.init.constant_(model.weight, 0.69921875)
    assert gp.prune(model, threshold=0.7).sparsity == 1.0
    nn.init.constant_(model.weight, -0.69921875)
    assert gp.prune(model, threshold=0.69).sparsity == 0.0
    assert gp.prune(model, lambda m: {"weight": m.weight.abs()}, threshold=0.7).sparsity == 1.0


@pytest.mark.parametrize(("threshold", "sparsity"), [(math.inf, 1.0), (-math.inf, 0.0), (0.0, 0.0)])
def test_thresholds_at_the_ends_are_taken(threshold, sparsity):
    assert gp.prune(two_layers(), threshold=threshold).sparsity == sparsity


# --------------------------------------------------------------------------------------------------------------- scope


def test_a_scope_by_name_takes_patterns_and_names_overrule_them():
    masks = gp.prune(two_layers(), scope={"1.weight": 0.75, "*": 0.5})
    assert [int((~m).sum()) for m in masks.values()] == [32, 48]
    refused(ValueError, r"two patterns of scope give '0\.weight' different sparsities", scope={"*": 0.5, "0*": 0.25})
    refused(ValueError, r"scope names '0\.bias', which is not eligible", scope={"0.bias": 0.5})


def test_an_empty_scope_is_refused_unless_there_is_a_sparsity():
    refused(ValueError, "scope is an empty dict, and no sparsity is given", scope={})
    assert gp.prune(two_layers(), scope={}, sparsity=0.5).sparsity == 0.5


@pytest.mark.parametrize("scope", [None, 3, ["global"], ("layer",)])
def test_a_scope_that_is_no_name_is_a_type_error(scope):
    refused(TypeError, "scope must be one of", sparsity=0.5, scope=scope)


@pytest.mark.parametrize("granularity", [None, [4, 4], (True, 4), (2.0, 4.0), "2:4:8", ":", "4x", "-1:4", (), "2:4 "])
def test_a_granularity_that_is_none_is_refused(granularity):
    refused(ValueError, "granularity must be", sparsity=0.5, granularity=granularity)


# ------------------------------------------------------------------------------------------------------ pruning twice


@pytest.mark.parametrize("again", [{"sparsity": 0.25}, {"threshold": 0.0}, {"sparsity": 0.5, "score": gp.random}])
def test_pruning_again_without_within_warns_that_zeros_come_back(again):
    model = two_layers()
    gp.prune(model, sparsity=0.5)
    with pytest.warns(UserWarning, match=r"of the 128 weights are zero already and yet stay.*within="):
        gp.prune(model, **again)


@pytest.mark.parametrize(("zeros", "noticed"), [(1, False), (2, True)])
def test_one_in_a_thousand_is_few(zeros, noticed):
    model = nn.Linear(10, 100)
    model.weight.data.view(-1)[:zeros] = 0.0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gp.prune(model, gp.random, sparsity=0.0)
    assert any("zero already" in str(w.message) for w in warned) == noticed


@pytest.mark.parametrize(("zeros", "noticed"), [(0, False), (400, False), (40_000, True)])
def test_few_zeros_among_many_weights_are_passed_over(zeros, noticed):
    model = nn.Sequential(nn.Linear(2000, 1000), nn.Linear(10, 10))  # of which a sample is looked at
    with torch.no_grad():
        model[0].weight.view(-1)[torch.randperm(2_000_000)[:zeros]] = 0.0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gp.prune(model, gp.random, sparsity=0.0)
    assert any("zero already" in str(w.message) for w in warned) == noticed


def test_pruning_further_or_within_earlier_masks_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = two_layers()
        masks = gp.prune(model, sparsity=0.5)
        gp.prune(model, sparsity=0.75)
        gp.prune(model, gp.random, sparsity=0.9, within=masks)


def test_a_warning_made_an_error_leaves_the_model_as_it_was():
    model = two_layers()
    gp.prune(model, sparsity=0.5)
    before = model[0].weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="weights are zero already"):
            gp.prune(model, gp.random, sparsity=0.6)
    assert torch.equal(before, model[0].weight)


# -------------------------------------------------------------------------------------------------------- the request


def test_a_request_keeps_the_parameters_that_it_was_made_with():
    model = two_layers()
    model[0].requires_grad_(False)
    request = Request.of(model)
    model[0].requires_grad_(True)
    model[1].requires_grad_(False)
    assert list(request.layers) == list(request.masks(model, gp.magnitude, sparsity=0.5)) == ["1.weight"]
    assert request.parameters["1.weight"] is model[1].weight


def test_a_request_writes_nothing():
    model = two_layers()
    before = model[0].weight.clone()
    assert Request.of(model, scope="erk").masks(model, gp.magnitude, sparsity=0.5).sparsity == 0.5
    assert torch.equal(before, model[0].weight)


def test_the_amounts_of_a_schedule_are_checked_beforehand():
    model = two_layers()
    request = Request.of(model, granularity="2:4")
    request.check_amounts([0.0, 0.5, 0.5])
    for schedule in (gp.Cubic(0.5, begin=2, end=6), gp.OneShot(0.9, at=3), gp.Linear(0.5, 0, 2)):
        with pytest.raises(ValueError, match=r"comes to a sparsity of .*does not fit: granularity 2:4 is itself"):
            request.check_amounts(schedule(step) for step in range(8))
    with pytest.raises(ValueError, match="min_keep=10 needs 20 weights"):
        Request.of(model, min_keep=10).check_amounts([0.5, 0.9])
    with pytest.raises(ValueError, match="does not go with a threshold"):
        Request.of(model, scope="erk").check_amounts([0.1], "threshold")
    with pytest.raises(TypeError, match="sparsity must be a number"):
        Request.of(model).check_amounts([True])


@pytest.mark.parametrize("how", [{"threshold": 0.2}, {"granularity": "2:4"}, {"scope": "row", "sparsity": 0.5}])
def test_torch_s_defaults_do_not_leak_in(how):
    wanted, model = gp.prune(two_layers(torch.bfloat16), **how), two_layers(torch.bfloat16)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        found = gp.prune(model, **how)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], mask) for name, mask in wanted.items())


def test_scores_of_eight_bits_are_compared_with_a_threshold():
    layer = nn.Linear(4, 2)
    score = torch.tensor([[0.5, 1.0, 1.5, 2.0]] * 2)
    masks = gp.prune(layer, lambda model: {"weight": score.to(torch.float8_e4m3fn)}, threshold=1.25)
    assert masks["weight"].tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("layout", [lambda w: w, torch.t], ids=["contiguous", "transposed"])
def test_zeros_that_would_come_back_are_counted_in_layers_of_any_size(layout):
    """Large ones are looked at by a sample first; what is said is exact."""
    layer = nn.Linear(600, 600, bias=False)
    layer.weight = nn.Parameter(layout(torch.randn(600, 600, generator=torch.Generator().manual_seed(0))))
    zeros = 360_000 // 10 + 7
    gone = torch.randperm(360_000, generator=torch.Generator().manual_seed(1))[:zeros]
    with torch.no_grad():
        layer.weight.masked_fill_(torch.zeros(360_000, dtype=torch.bool).index_fill_(0, gone, True).view(600, 600), 0.0)
    with pytest.warns(UserWarning, match="^36,007 of the 360,000 weights are zero already and yet stay"):
        gp.prune(layer, gp.random, sparsity=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.prune(layer, sparsity=0.2)

"""An argument is converted, or refused by one clear error: for every kind of number that users hand over."""

import math
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradprune as gp
from gradprune.core import checks

# The same number as Python, NumPy and torch know it.
FLOATS = [float, np.float64, np.array, lambda v: torch.tensor(v, dtype=torch.float64)]
HALVES = [np.float16, np.float32, lambda v: torch.tensor(v, dtype=torch.bfloat16)]
INTS = [int, float, np.int64, np.float64, np.array, torch.tensor, lambda v: Fraction(v, 1)]

NO_NUMBERS = [
    True,
    False,
    np.bool_(True),
    torch.tensor(True),
    np.array(True),
    "0.5",
    b"1",
    None,
    1j,
    np.complex64(1),
    torch.tensor(1j),
    [0.5],
    (1,),
    np.ones(1),
    torch.ones(1),
    torch.ones(2, 2),
    torch.ones((), device="meta"),
    Decimal("0.5"),
    object(),
    float,
    nn.Linear(1, 1),
    np.array("0.5"),
    np.array(None, dtype=object),
]


@given(value=st.floats(0, 1), kind=st.sampled_from(FLOATS))
def test_a_number_comes_back_as_the_same_plain_float(value, kind):
    for found in (checks.number("x", kind(value)), checks.fraction("x", kind(value))):
        assert type(found) is float
        assert found == value


@pytest.mark.parametrize("kind", HALVES)
def test_a_number_of_less_precision_comes_back_as_it_is(kind):
    assert checks.number("x", kind(0.375)) == 0.375


@given(value=st.integers(-(2**53), 2**53), kind=st.sampled_from(INTS))
def test_a_whole_number_comes_back_as_the_same_plain_int(value, kind):
    found = checks.whole("x", kind(value))
    assert type(found) is int
    assert found == value


@given(st.integers())
def test_no_whole_number_is_too_large_and_none_is_rounded(value):
    assert checks.whole("x", value) == value
    assert checks.whole("x", Fraction(value, 1)) == value


@given(st.fractions())
def test_a_fraction_is_whole_where_its_denominator_is_1(value):
    if value.denominator == 1:
        assert checks.whole("x", value) == value
    else:
        with pytest.raises(ValueError, match="x must be a whole number"):
            checks.whole("x", value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=map(str, range(len(NO_NUMBERS))))
@pytest.mark.parametrize("check", [checks.number, checks.whole, checks.fraction], ids=lambda c: c.__name__)
def test_what_is_no_real_number_is_a_type_error_that_names_the_argument(value, check):
    with pytest.raises(TypeError, match=r"^limit must be a .*, got "):
        check("limit", value)


@pytest.mark.parametrize("kind", [float, np.float32, np.float16, torch.tensor, np.array], ids=lambda k: k.__name__)
@pytest.mark.parametrize("check", [checks.number, checks.whole, checks.fraction], ids=lambda c: c.__name__)
def test_nan_and_infinities_are_value_errors(kind, check):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"^x must be .*, got "):
            check("x", kind(value))


def test_infinities_are_numbers_where_they_are_asked_for_and_nan_is_not():
    assert checks.number("x", np.float32(math.inf), finite=False) == math.inf
    assert checks.number("x", -math.inf, finite=False) == -math.inf
    with pytest.raises(ValueError, match=r"x must be a number, got nan"):
        checks.number("x", math.nan, finite=False)


@pytest.mark.parametrize("value", [10**400, -(10**400), Fraction(10**400, 3), 10**5000], ids=list("abcd"))
def test_a_number_beyond_all_floats_is_a_value_error_of_one_line(value):
    with pytest.raises(ValueError, match="x is too large for a float") as error:
        checks.number("x", value)
    assert len(str(error.value)) < 150


def test_a_huge_number_out_of_range_is_a_value_error_of_one_line():
    with pytest.raises(ValueError, match="x must be between 0 and 9") as error:
        checks.whole("x", 10**5000, least=0, most=9)
    assert len(str(error.value)) < 150


@given(value=st.floats(-3, 3), ends=st.tuples(st.floats(-2, 2), st.floats(-2, 2)))
def test_the_ends_of_a_range_belong_to_it_or_not_as_it_says(value, ends):
    low, high = sorted(ends)
    for bounds, inside in (
        ({"least": low, "most": high}, low <= value <= high),
        ({"above": low, "below": high}, low < value < high),
    ):
        if inside:
            assert checks.number("x", value, **bounds) == value
        else:
            with pytest.raises(ValueError, match="x must be"):
                checks.number("x", value, **bounds)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checks.fraction("sparsity", 1.2), r"sparsity must be in \[0, 1\], got 1.2"),
        (lambda: checks.number("t", 0, above=0), "t must be positive and finite, got 0"),
        (lambda: checks.number("t", 1, above=2), "t must be a finite number, above 2, got 1"),
        (lambda: checks.number("t", 0, above=0, most=3), "t must be a finite number, positive and at most 3, got 0"),
        (lambda: checks.number("t", 9, least=1, below=9, finite=False), "t must be a number, at least 1 and below 9"),
        (lambda: checks.number("t", math.nan), "t must be a finite number, got nan"),
        (lambda: checks.whole("every", 9, least=1, most=8), "every must be between 1 and 8, got 9"),
        (lambda: checks.whole("every", 0, least=1), "every must be at least 1, got 0"),
        (lambda: checks.whole("every", 1.5), "every must be a whole number, got 1.5"),
        (lambda: checks.whole("every", torch.tensor(1.5)), "every must be a whole number, got a tensor of shape"),
        (lambda: checks.choice("kind", "c", ("a", "b")), "kind must be one of 'a', 'b'; got 'c'"),
        (lambda: checks.choice("kind", ["a"], ("a", "b")), "kind must be one of 'a', 'b'; got list"),
        (lambda: checks.choice("kind", np.array(["a", "b"]), ("a", "b")), "kind must be one of 'a', 'b'; got an array"),
        (lambda: checks.choice("kind", torch.ones(2), (1, 2)), "kind must be one of 1, 2; got a tensor"),
    ],
)
def test_what_is_out_of_range_is_said_with_what_is_wanted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (nn.Linear, "Linear is the class: make one"),
        (nn.Linear(2, 2).state_dict(), "looks like a state dict"),
        (torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), "the optimizer is another argument"),
        (None, "got None"),
        ([], "got list"),
        (lambda x: x, "got function"),
    ],
)
def test_what_is_no_module_is_named_with_a_hint(value, hint):
    with pytest.raises(
        TypeError, match=f"^model must be a torch.nn.Module, got .*{hint}|^model must be a torch.nn.Module, {hint}$"
    ):
        checks.module(value)


def test_a_module_and_a_function_come_back():
    model = nn.Linear(1, 1)
    assert checks.module(model) is model
    assert checks.function("score", abs) is abs
    with pytest.raises(TypeError, match=r"score must be a function, got 'abs'; give gp\.magnitude"):
        checks.function("score", "abs", hint="give gp.magnitude")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (None, TypeError, "state of Clip must be a dict as its state_dict"),
        ([1], TypeError, "got list"),
        ({}, ValueError, "the state lacks 'step', 'norms'"),
        ({"step": 1}, ValueError, "the state lacks 'norms'"),
        ({"step": "x", "norms": []}, ValueError, "'step' in the state of Clip must be int, got 'x'"),
        ({"step": True, "norms": []}, ValueError, "'step' in the state of Clip must be int, got True"),
        ({"step": 1, "norms": None}, ValueError, "'norms' in the state of Clip must be list or tuple, got None"),
    ],
)
def test_a_state_is_checked_key_by_key(value, error, message):
    with pytest.raises(error, match=message):
        checks.state(value, {"step": int, "norms": (list, tuple)}, "Clip")


def test_a_state_that_holds_more_than_is_wanted_comes_back():
    given = {"step": 1, "norms": [1.0], "more": None}
    assert checks.state(given, {"step": int, "norms": (list, tuple)}, "Clip") is given


def inference_tensor():
    with torch.inference_mode():
        return torch.ones(3)


UNWRITABLE = {
    "lazy": (lambda: nn.LazyLinear(2).weight, TypeError, "is lazy"),
    "meta": (lambda: torch.ones(2, device="meta"), TypeError, "on the meta device"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), TypeError, "is quantized"),
    "sparse": (lambda: torch.eye(3).to_sparse(), TypeError, "is sparse"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), TypeError, "is sparse"),
    "float8": (
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        TypeError,
        "float8_e4m3fn, which holds numbers with a scale",
    ),
    "expanded": (lambda: torch.ones(1, 3).expand(4, 3), ValueError, "share memory"),
    "inference": (inference_tensor, ValueError, "inference mode"),
    "negative": (lambda: torch.complex(torch.ones(2), torch.ones(2)).conj().imag, ValueError, "negative bit"),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_what_cannot_be_written_is_refused_by_name(kind):
    make, error, message = UNWRITABLE[kind]
    with pytest.raises(error, match=message) as raised:
        checks.require_writable("fc.weight", make(), "gradient of")
    assert "the gradient of 'fc.weight'" in str(raised.value)


@pytest.mark.parametrize("kind", ["expanded", "inference", "negative", "float8"])
def test_what_cannot_be_written_may_be_readable(kind):
    checks.require_readable("fc.weight", UNWRITABLE[kind][0]())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3),
        torch.ones(()),
        torch.ones(0, 3),
        torch.ones(1, 3).expand(1, 3),
        torch.ones(3, 4).T,
        torch.ones(3, dtype=torch.complex64).conj(),
        nn.Parameter(torch.ones(2)),
        torch.ones(2, dtype=torch.bfloat16)[::2],
    ],
)
def test_what_can_be_written_passes(tensor):
    checks.require_writable("w", tensor)


def test_the_int_1_is_warned_of_where_it_may_be_a_percentage():
    with pytest.warns(UserWarning, match="x=1 is all: it is a fraction, and 0.01 is one per cent"):
        assert checks.fraction("x", 1, one="is all") == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (1.0, np.int64(1), 0, 0.5):
            checks.fraction("x", value, one="is all")
        checks.fraction("x", 1)


@pytest.mark.parametrize("category", [UserWarning, RuntimeWarning])
def test_a_warning_is_of_its_kind_and_at_the_callers_line(category):
    with pytest.warns(category, match="^m$") as caught:
        checks.warn("m", category)
    assert caught[0].filename == __file__


def test_a_tensor_whose_entries_others_hold_is_refused_by_its_kind():
    class Wrapped(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

    with pytest.raises(TypeError, match="the weight 'w' is a Wrapped, whose entries are held by other tensors"):
        checks.require_values("w", torch.ones(2).as_subclass(Wrapped), "weight")


def test_a_warning_points_at_the_line_of_the_user_s_that_called_in_however_deep_it_arises():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = gp.Pruner(model, optimizer, gp.OneShot(0.5, at=1), granularity="channel")
    model(torch.ones(1, 4)).sum().backward()
    calls = {
        "at once": lambda: checks.warn("at once"),
        "in a function": lambda: gp.prune(model, sparsity=0.5, granularity="channel"),
        "in a hook that torch calls": optimizer.step,
    }
    for call in calls.values():
        with pytest.warns(UserWarning, match="at once|last layer") as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}
    assert pruner.masks.sparsity == 0.5

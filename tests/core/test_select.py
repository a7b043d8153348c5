"""The k-th value and the k largest agree with a plain stable sort, whatever the values are."""

import math
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradprune import keep_largest, kth_smallest
from gradprune.core import select, select_cpu, select_device
from gradprune.core.collect import Values
from gradprune.core.select import keep_n_of_m

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
SIZES = {"chunks of 8 and a bracket": (8, 128, 4, 16), "the sizes as they are": None}


@contextmanager
def sizes(name):
    """The engine with buffers so small that a few values take every path of it."""
    if SIZES[name] is None:
        yield
        return
    names = ("CHUNK", "SAMPLE", "GATHER_ALL", "PARALLEL")
    small = {"CHUNK": 8, "ROW": 4, "SAMPLE": (32, 128), "GATHER_ALL": 16}
    with (
        mock.patch.multiple(select_cpu, **dict(zip(names, SIZES[name], strict=True))),
        mock.patch.multiple(select_device, **small),
    ):
        yield


@pytest.fixture(scope="module", autouse=True, params=["the CPU's way", "the way for accelerators"])
def way(request):
    """Every test of this file, by both ways; CPU tensors can take that for accelerators too."""
    with mock.patch.object(Values, "on_cpu", request.param == "the CPU's way"):
        yield request.param


def plain_sort(tensors, by="value"):
    """(value, position) of all values, ascending; equal values in order of position."""
    joined = (
        [x for t in tensors for x in t.detach().double().reshape(-1).tolist()]
        if not _integers(tensors)
        else [x for t in tensors for x in t.reshape(-1).tolist()]
    )
    ranked = [abs(x) for x in joined] if by == "magnitude" else joined
    return sorted(zip(ranked, range(len(ranked)), strict=True), key=lambda pair: pair[0])


def _integers(tensors):
    return all(not t.is_floating_point() for t in tensors)


def kept_by_plain_sort(tensors, k, by="value"):
    ascending = plain_sort(tensors, by)
    keep = [False] * len(ascending)
    for _, position in ascending[len(ascending) - k :]:
        keep[position] = True
    return keep


def flat(masks):
    return [x for m in masks for x in m.reshape(-1).tolist()]


values_with_extremes = st.one_of(
    st.sampled_from([0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 1e-45, -1e-45, 65504.0, 6e-8]),
    st.floats(-4, 4, allow_nan=False, width=16),
    st.floats(allow_nan=False, width=32),
)


@st.composite
def float_tensors(draw, dtypes=FLOATS):
    dtype = draw(st.sampled_from(dtypes))
    shapes = draw(st.lists(st.sampled_from([(0,), (1,), (), (3,), (2, 3), (5, 1, 4), (7, 9)]), min_size=1, max_size=4))
    if draw(st.booleans()):  # few different values: ties everywhere
        element = st.sampled_from(draw(st.lists(values_with_extremes, min_size=1, max_size=3)))
    else:
        element = values_with_extremes
    tensors = []
    for shape in shapes:
        size = math.prod(shape)
        data = draw(st.lists(element, min_size=size, max_size=size))
        tensors.append(torch.tensor(data, dtype=torch.float64).to(dtype).reshape(shape))
    return tensors


@st.composite
def integer_tensors(draw):
    dtype = draw(st.sampled_from(INTEGERS))
    info = torch.iinfo(dtype)
    element = st.one_of(st.integers(info.min, info.max), st.sampled_from([info.min, info.max, 0, 1]))
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    return [torch.tensor(draw(st.lists(element, min_size=n, max_size=n)), dtype=dtype) for n in lengths]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("by", ["value", "magnitude"])
@settings(max_examples=40, deadline=None)
@given(tensors=float_tensors(), data=st.data())
def test_floats_agree_with_a_plain_sort(size, by, tensors, data):
    total = sum(t.numel() for t in tensors)
    k = data.draw(st.integers(0, total))
    with sizes(size):
        masks = keep_largest(tensors, k, by=by)
        assert flat(masks) == kept_by_plain_sort(tensors, k, by)
        assert [m.shape for m in masks] == [t.shape for t in tensors]
        if k:
            kth = kth_smallest(tensors, k, by=by)
            assert kth.item() == plain_sort(tensors, by)[k - 1][0]
            assert kth.dtype == tensors[0].dtype
            assert kth.shape == ()


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=40, deadline=None)
@given(tensors=integer_tensors(), data=st.data())
def test_integers_agree_with_a_plain_sort(size, tensors, data):
    total = sum(t.numel() for t in tensors)
    k = data.draw(st.integers(0, total))
    with sizes(size):
        assert flat(keep_largest(tensors, k)) == kept_by_plain_sort(tensors, k)
        if k:
            assert kth_smallest(tensors, k).item() == plain_sort(tensors)[k - 1][0]


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=40, deadline=None)
@given(tensors=float_tensors(), data=st.data())
def test_what_is_barred_never_stays(size, tensors, data):
    among = [
        torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=t.numel(), max_size=t.numel())), dtype=torch.bool
        ).reshape(t.shape)
        for t in tensors
    ]
    k = data.draw(st.integers(0, sum(int(a.sum()) for a in among)))
    allowed = [t[a] for t, a in zip(tensors, among, strict=True)]
    with sizes(size):
        kept = keep_largest(tensors, k, by="magnitude", among=among)
    assert flat([m[a] for m, a in zip(kept, among, strict=True)]) == kept_by_plain_sort(allowed, k, "magnitude")
    assert not any((m & ~a).any() for m, a in zip(kept, among, strict=True))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
@pytest.mark.parametrize("kind", ["spread", "constant", "two values", "heavy zero", "sorted", "outliers"])
def test_large_tensors_agree_with_torchs_sort(dtype, kind):
    generator = torch.Generator().manual_seed(0)
    n = 300_001
    values = {
        "spread": torch.randn(n, generator=generator),
        "constant": torch.full((n,), 3.0),
        "two values": torch.randint(0, 2, (n,), generator=generator).float(),
        "heavy zero": torch.relu(torch.randn(n, generator=generator)),
        "sorted": torch.linspace(-5, 5, n),
        "outliers": torch.randn(n, generator=generator).pow(31),
    }[kind]
    values = (values * 1000 if dtype == torch.int32 else values).clamp(-6e4, 6e4).to(dtype)
    parts = [values[:100], values[100:200_002].reshape(-1, 2), values[200_002:]]
    order = values.sort(stable=True).indices
    for k in (0, 3, n // 3, n // 2, round(0.9 * n), n):
        expected = torch.zeros(n, dtype=torch.bool)
        expected[order[n - k :]] = True
        assert torch.equal(torch.cat([m.reshape(-1) for m in keep_largest(parts, k)]), expected)
        if k:
            assert kth_smallest(parts, k) == values[order[k - 1]]


def test_layouts_other_than_contiguous_keep_their_logical_order():
    base = torch.randint(0, 3, (6, 5, 4, 3), generator=torch.Generator().manual_seed(0)).float()
    layouts = [
        base.contiguous(memory_format=torch.channels_last),
        base.transpose(0, 2),
        base[::2, :, 1:],
        torch.tensor(2.0).expand(4, 3),
    ]
    for k in (0, 1, 50, 200):
        with sizes("chunks of 8 and a bracket"):
            assert flat(keep_largest(layouts, k)) == kept_by_plain_sort(layouts, k)


def test_dtypes_mix_within_floats_and_within_integers():
    floats = [torch.tensor([1.0, 3.0], dtype=torch.float16), torch.tensor([2.0, 4.0], dtype=torch.bfloat16)]
    assert flat(keep_largest(floats, 2)) == [False, True, False, True]
    assert kth_smallest(floats, 2).dtype == torch.float32
    integers = [torch.tensor([-1, 100], dtype=torch.int8), torch.tensor([200], dtype=torch.uint8)]
    assert kth_smallest(integers, 3).item() == 200
    assert kth_smallest(torch.tensor([True, False, True]), 2).item() == 1
    with pytest.raises(ValueError, match=r"all floating or all integer, got \['torch.float32', 'torch.int64'\]"):
        kth_smallest([torch.ones(1), torch.ones(1, dtype=torch.int64)], 1)


def test_eight_bit_floats_are_ranked():
    values = torch.tensor([1.0, -2.0, 0.5, 4.0]).to(torch.float8_e4m3fn)
    assert kth_smallest(values, 3).float().item() == 1.0
    assert keep_largest(values, 2)[0].tolist() == [True, False, False, True]


def test_what_needs_gradients_is_ranked_without_recording():
    weight = torch.nn.Parameter(torch.tensor([3.0, 1.0, 2.0]))
    assert kth_smallest(weight, 1).item() == 1.0
    assert not kth_smallest(weight, 1).requires_grad


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("by", ["value", "magnitude"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_an_error_that_names_its_tensor(size, dtype, by, sign):
    nan = torch.full((40,), math.inf, dtype=dtype)
    nan[17] = torch.tensor(math.nan).copysign(torch.tensor(sign)).to(dtype)
    with sizes(size):
        with pytest.raises(ValueError, match=r"'fc\.weight' contains NaN"):
            kth_smallest({"conv.weight": torch.ones(40, dtype=dtype), "fc.weight": nan}, 3, by=by)
        for k in (0, 1, 80):
            with pytest.raises(ValueError, match=r"tensor 1 of 2 \(counted from 0\) contains NaN"):
                keep_largest([torch.ones(40, dtype=dtype), nan], k, by=by)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_rank_out_of_range_is_an_error_that_says_the_range(k):
    with pytest.raises(ValueError, match=rf"between 1 and the number of values, which is 3; got {k}"):
        kth_smallest(torch.ones(3), k)


def test_empty_input_has_no_kth_value_but_an_empty_mask():
    with pytest.raises(ValueError, match="number of values, which is 0"):
        kth_smallest([], 1)
    assert keep_largest([], 0) == []
    assert keep_largest(torch.empty(2, 0), 0)[0].shape == (2, 0)
    with pytest.raises(ValueError, match="between 0 and the number of values, which is 3; got 4"):
        keep_largest(torch.ones(3), 4)


def test_other_bad_arguments_are_errors_that_say_what_is_wanted():
    with pytest.raises(TypeError, match=r"tensor 1 of 2 \(counted from 0\) must be a tensor, got list"):
        kth_smallest([torch.ones(1), [2.0]], 1)
    with pytest.raises(ValueError, match=r"'z' is .*complex64"):
        kth_smallest({"z": torch.ones(1, dtype=torch.complex64)}, 1)
    with pytest.raises(ValueError, match='by must be "value" or "magnitude"'):
        kth_smallest(torch.ones(1), 1, by="size")
    with pytest.raises(ValueError, match="ranks floating values, got"):
        kth_smallest(torch.ones(1, dtype=torch.int64), 1, by="magnitude")
    with pytest.raises(ValueError, match=r"k must be a whole number, got 1\.5"):
        kth_smallest(torch.ones(3), 1.5)
    with pytest.raises(ValueError, match=r"bool of shape \(3,\), got torch.float32"):
        keep_largest(torch.ones(3), 1, among=[torch.ones(3)])
    with pytest.raises(ValueError, match="one bool tensor for each of 1 tensors, got 0"):
        keep_largest(torch.ones(3), 1, among=[])
    with pytest.raises(ValueError, match="needs floating values"):
        keep_largest(torch.ones(3, dtype=torch.int32), 1, among=[torch.ones(3, dtype=torch.bool)])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), m=st.integers(1, 6), rows=st.integers(0, 5), groups=st.integers(0, 4))
def test_n_of_m_keeps_the_n_largest_of_each_group(data, m, rows, groups):
    n = data.draw(st.integers(0, m))
    size = rows * groups * m
    values = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size)), dtype=torch.float32)
    values = values.reshape(rows, groups * m)
    kept = select.keep_n_of_m(values, n, m)
    for row, mask in zip(values.reshape(-1, m), kept.reshape(-1, m), strict=True):
        assert mask.tolist() == kept_by_plain_sort([row], n)


def test_n_of_m_runs_along_the_input_channels_of_a_convolution():
    weight = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    kept = select.keep_n_of_m(weight, 2, 4, by="magnitude")
    assert (kept.reshape(3, 2, 4, 2, 2).sum(dim=2) == 2).all()
    dropped = torch.where(kept, math.inf, weight.abs()).reshape(3, 2, 4, 2, 2).sort(dim=2).values[:, :, 1]
    smallest_kept = torch.where(kept, weight.abs(), math.inf).reshape(3, 2, 4, 2, 2).amin(dim=2)
    assert (dropped <= smallest_kept).all()


def test_n_of_m_errors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="'fc': dimension 1 has 6 entries, not a multiple of m = 4"):
        select.keep_n_of_m(torch.ones(2, 6), 2, 4, name="'fc'")
    with pytest.raises(ValueError, match="0 <= n <= m"):
        select.keep_n_of_m(torch.ones(2, 6), 4, 3)
    with pytest.raises(ValueError, match=r"^tensor contains NaN"):
        select.keep_n_of_m(torch.full((1, 2), math.nan), 1, 2)
    with pytest.raises(ValueError, match="contains NaN"):
        select.keep_n_of_m(torch.full((1, 2), math.nan), 1, 2)


NUMBERS = [True, "3", None, float("nan"), 2.5, 1j, torch.ones(2), 10**400]


@pytest.mark.parametrize("k", NUMBERS)
def test_a_rank_that_is_no_whole_number_in_range_is_refused(k):
    for call in (
        lambda: kth_smallest(torch.ones(3), k),
        lambda: keep_largest(torch.ones(3), k),
        lambda: keep_n_of_m(torch.ones(4, 4), k, 4),
        lambda: keep_n_of_m(torch.ones(4, 4), 0, k),
    ):
        with pytest.raises((TypeError, ValueError), match=r"k must be|n must be|m must be|n of m|multiple"):
            call()


def test_numbers_of_numpy_and_torch_are_ranks():
    for k in (np.int64(2), np.float32(2), torch.tensor(2), 2.0):
        assert kth_smallest(torch.tensor([5.0, 1.0, 3.0]), k).item() == 3
        assert keep_n_of_m(torch.tensor([[5.0, 1.0, 3.0]]), k, 3).tolist() == [[True, False, True]]


UNREADABLE = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "on the meta device": lambda: torch.empty(3, device="meta"),
    "lazy": lambda: torch.nn.LazyLinear(3).weight,
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "float4_e2m1fn_x2": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "got ndarray": lambda: np.ones(3),
    "got str": lambda: "abc",
    "got Linear": lambda: torch.nn.Linear(2, 2),
    "got NoneType": lambda: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_ranked_is_refused_by_kind(kind):
    given = UNREADABLE[kind]()
    for call in (kth_smallest, keep_largest):
        with pytest.raises(TypeError, match=kind):
            call(given, 1)
    with pytest.raises(TypeError, match=kind):
        keep_n_of_m(given, 1, 1)


def test_n_of_m_says_which_dimension_and_which_order_is_lacking():
    with pytest.raises(ValueError, match="has 2 dimensions, none of them is dim = 2"):
        keep_n_of_m(torch.ones(2, 4), 2, 4, dim=2)
    with pytest.raises(ValueError, match="by must be"):
        keep_n_of_m(torch.ones(2, 4), 2, 4, by="size")
    with pytest.raises(ValueError, match="by='magnitude' ranks complex ones by their modulus"):
        keep_n_of_m(torch.ones(2, 4, dtype=torch.complex64), 2, 4)
    eight_bits = torch.tensor([[1.0, -2.0, 0.5, 4.0]]).to(torch.float8_e4m3fn)
    assert keep_n_of_m(eight_bits, 2, 4).tolist() == [[True, False, False, True]]


def test_complex_numbers_rank_by_their_modulus():
    values = torch.tensor([3 + 4j, -1j, 0.5, 2 - 2j])
    assert kth_smallest(values, 4, by="magnitude").item() == 5.0
    assert kth_smallest([values, torch.ones(1, dtype=torch.float16)], 4, by="magnitude").item() == pytest.approx(8**0.5)
    assert keep_largest(values.conj(), 2, by="magnitude")[0].tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="contains NaN"):
        keep_largest(torch.tensor([complex(math.inf, math.nan), 1j]), 1, by="magnitude")


def test_views_with_the_negative_bit_and_strided_rare_dtypes_are_ranked():
    imaginary = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert kth_smallest(imaginary, 1).item() == -2
    with sizes("chunks of 8 and a bracket"):
        rare = torch.arange(60).reshape(10, 6).to(torch.uint16).T
        assert kth_smallest(rare, 31).item() == 30
        assert flat(keep_largest(rare, 1)) == [False] * 59 + [True]
        eights = torch.arange(-30.0, 30).reshape(10, 6).to(torch.float8_e5m2).T
        assert kth_smallest(eights, 60).float().item() == eights.float().max()


def test_among_is_a_list_of_bool_tensors():
    for among in (torch.ones(3, dtype=torch.bool), 3, "abc"):
        with pytest.raises((TypeError, ValueError), match="`among` must"):
            keep_largest(torch.ones(3), 1, among=among)
    with pytest.raises(TypeError, match="must be a bool tensor, got list"):
        keep_largest(torch.ones(3), 1, among=[[True, True, False]])


def test_random_numbers_of_torch_stay_as_they_were():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    keep_largest(torch.arange(300_000.0), 1000)
    assert torch.equal(torch.get_rng_state(), state)

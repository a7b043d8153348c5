"""The way for accelerators reads each weight once, waits once, and takes no memory to speak of."""

import math
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradprune import keep_largest, kth_smallest
from gradprune.core import masked, select_device
from gradprune.core.collect import Values
from gradprune.core.masked import zero_pruned_
from gradprune.core.select import keep_and_count


@pytest.fixture(autouse=True, scope="module")
def as_on_a_device():
    with mock.patch.object(Values, "on_cpu", False), mock.patch.object(masked, "_on_cpu", return_value=False):
        yield


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, what they allocate, and how often the host waits for a number."""

    def __init__(self):
        super().__init__()
        self.read = self.written = self.waits = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        self.waits += name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
        if function.is_view or name in ("empty", "detach", "lift_fresh"):
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        out = (kwargs or {}).get("out")
        given = [t for t in given if t is not out]
        self.largest = max([self.largest, *(t.nbytes for t in made if all(t is not g for g in (*given, out)))])
        if name == "index":  # of what is indexed only as much as comes out
            given = [*given[1:], *made]
        if name == "index_put_":
            given, made = given[1:], given[2:]
        self.read += sum(t.nbytes for t in given)
        self.written += sum(t.nbytes for t in made)
        return result


KINDS = {
    "spread": lambda n, g: torch.randn(n, generator=g),
    "nearly all zero": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.02),
    "zeros to just below the cut": lambda n, g: torch.randn(n, generator=g) * (torch.rand(n, generator=g) < 0.1),
    "all equal": lambda n, g: torch.full((n,), -3.0),
    "layers of other sizes": lambda n, g: (
        torch.randn(n, generator=g) * torch.logspace(-2, 2, 4).repeat_interleave(n // 4)
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "reads", "writes"), [(torch.float32, 6, 3.2), (torch.bfloat16, 8, 4), (torch.float16, 8, 4)]
)
def test_choosing_and_masking_reads_and_writes_a_few_times_what_the_model_takes(kind, dtype, reads, writes):
    # Half precision in its own bytes: its masks and positions are as large as single precision's.
    n = 2**22
    weights = list(KINDS[kind](n, torch.Generator().manual_seed(0)).to(dtype).reshape(-1, 2**10).chunk(4))
    size = sum(w.nbytes for w in weights)
    expected = torch.cat([w.abs().view(-1) for w in weights]).sort(stable=True).indices[n - n // 10 :]
    with mock.patch.multiple(select_device, CHUNK=2**20), Traffic() as traffic:
        masks, at_least = keep_and_count(weights, n // 10, by="magnitude")
        zero_pruned_(zip(weights, masks, strict=True))
    assert traffic.read <= reads * size
    assert traffic.written <= writes * size
    assert traffic.waits == 0  # but for the one in _read, which copies
    assert traffic.largest <= max(2**20 * weights[0].element_size(), masks[0].nbytes)
    kept = torch.zeros(n, dtype=torch.bool)
    kept[expected] = True
    assert torch.equal(torch.cat([m.view(-1) for m in masks]), kept)
    assert all(least <= int(m.sum()) for least, m in zip(at_least, masks, strict=True))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zeros to just below the cut"])
def test_the_device_is_waited_for_once(kind):
    values = KINDS[kind](2**20, torch.Generator().manual_seed(0)).reshape(-1)
    with mock.patch.object(select_device, "_read", wraps=select_device._read) as read:
        keep_largest(values, 2**17)
        assert read.call_count == 1
        kth_smallest(values, 900_000)
        assert read.call_count == 2


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_a_bracket_that_misses_is_noticed_and_widened(share):
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(1))
    k = round(share * values.numel())

    def misled(values, every):
        return torch.full((1000,), 7)

    with mock.patch.multiple(select_device, GATHER_ALL=100, CHUNK=2**13, ROW=64, _sample=misled):
        kept = keep_largest(values, k)[0]
    expected = torch.zeros(values.numel(), dtype=torch.bool)
    expected[values.sort().indices[values.numel() - k :]] = True
    assert torch.equal(kept, expected)


def test_a_device_that_cannot_compact_by_itself_is_asked():
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(1))

    def lacking(*_, **__):
        raise NotImplementedError

    with mock.patch.multiple(select_device, GATHER_ALL=100, CHUNK=2**13), mock.patch("torch.nonzero_static", lacking):
        assert kth_smallest(values, 12_345) == values.sort().values[12_344]


@pytest.mark.parametrize("number", [1, 3000])
def test_nan_is_found_wherever_it_stands(number):
    values = [torch.ones(30_000), torch.randn(30_000, generator=torch.Generator().manual_seed(0))]
    values[1][-number:] = math.nan
    barred = [torch.ones(30_000, dtype=torch.bool), torch.arange(30_000) < 100]
    with mock.patch.multiple(select_device, GATHER_ALL=100, CHUNK=2**13):
        for among in (None, barred):
            with pytest.raises(ValueError, match="'b' contains NaN"):
                keep_largest(dict(zip("ab", values, strict=True)), 10, among=among)


def test_more_than_is_allowed_is_refused_after_the_one_wait():
    with pytest.raises(ValueError, match="number of values, which is 2; got 3"):
        keep_largest(torch.ones(5), 3, among=[torch.tensor([True, False, True, False, False])])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("end", ["min", "max"])
@pytest.mark.parametrize("k", [100, 12_000, 24_999])
def test_integers_tie_at_the_ends_of_their_range(dtype, end, k):
    values = torch.randint(0, 100, (25_000,), generator=torch.Generator().manual_seed(0)).to(dtype)
    values[torch.rand(25_000, generator=torch.Generator().manual_seed(1)) < 0.9] = getattr(torch.iinfo(dtype), end)
    expected = torch.zeros(25_000, dtype=torch.bool)
    expected[values.sort(stable=True).indices[25_000 - k :]] = True
    with mock.patch.multiple(select_device, GATHER_ALL=100, CHUNK=2**13, ROW=64):
        assert torch.equal(keep_largest(values, k)[0], expected)


def test_strided_tensors_are_not_copied_whole():
    values = torch.randn(2**10, 2**10, generator=torch.Generator().manual_seed(0)).T
    expected = torch.zeros(2**20, dtype=torch.bool)
    expected[values.reshape(-1).sort(stable=True).indices[-1000:]] = True
    with mock.patch.multiple(select_device, CHUNK=2**14), Traffic() as traffic:
        mask = keep_largest(values, 1000)[0]
    assert traffic.largest <= 2**16 * 4
    assert torch.equal(mask.reshape(-1), expected)


@pytest.mark.parametrize("make", [torch.randn, lambda *shape: torch.randint(-9, 9, shape)], ids=["floats", "integers"])
def test_torchs_defaults_do_not_leak_in(make):
    values = [make(300, 40), make(2**11), make(40, 300).t()]
    k, few = 9_000, {"CHUNK": 2**11, "GATHER_ALL": 100}
    with mock.patch.multiple(select_device, **few):
        wanted, number = keep_and_count(values, k).masks, kth_smallest(values, k)
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        try:
            found, same = keep_and_count(values, k).masks, kth_smallest(values, k)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert torch.equal(same, number)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)

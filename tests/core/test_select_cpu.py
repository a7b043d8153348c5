"""The CPU's way to the k-th value holds where its sample misleads it, on any number of threads."""

from unittest import mock

import numpy as np
import pytest
import torch

from gradprune import keep_largest, kth_smallest
from gradprune.core import select_cpu
from gradprune.core.select import keep_and_count


def test_a_bracket_that_misses_is_noticed_and_moved():
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(1))
    misleading = np.sort(values[:5000].view(torch.int32).numpy() * 0 + 7)  # a sample of one single wrong key
    small = {"CHUNK": 4096, "SAMPLE": 128, "GATHER_ALL": 4, "PARALLEL": 16}
    with mock.patch.multiple(select_cpu, **small, _sample=lambda *_: misleading):
        assert kth_smallest(values, 123_456) == values.sort().values[123_455]


def test_gathering_stops_at_its_limit():
    # Every stratum's sample is 0 or 1, and almost all of the values lie between them: nothing may be gathered whole.
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gathered = []
    kth_inside = select_cpu._kth_inside

    def spy(inside, k, below):
        gathered.append(sum(a.size for a in inside))
        return kth_inside(inside, k, below)

    wide = np.array([0.0] * 100 + [1.0] * 100).view(np.int64)
    with mock.patch.multiple(select_cpu, GATHER_ALL=100, CHUNK=1000, _kth_inside=spy, _sample=lambda *a: wide):
        assert kth_smallest(values, 100_000) == values.sort().values[99_999]
    assert max(gathered) <= 200_000 // 32


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads):
    values = [torch.randn(300_000, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    expected = torch.cat(values).sort().values[700_000 - 1]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with mock.patch.object(select_cpu, "GATHER_ALL", 100):
            assert kth_smallest(values, 700_000) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stay", [0.001, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_ties_are_cut_from_either_end(stay):
    values = torch.zeros(50_000)
    values[::100] = torch.arange(500.0)
    k = round(stay * values.numel())
    expected = torch.zeros(values.numel(), dtype=torch.bool)
    expected[values.sort(stable=True).indices[values.numel() - k :]] = True
    with mock.patch.multiple(select_cpu, CHUNK=999, GATHER_ALL=100, PARALLEL=100):
        (mask,), counts = keep_and_count(values, k)
        assert torch.equal(mask, expected)
        assert counts == [k]


def test_counts_are_each_tensors_own():
    parts = torch.randn(3000, generator=torch.Generator().manual_seed(0)).split([5, 0, 1995, 1000])
    masks, counts = keep_and_count(parts, 700)
    assert counts == [int(m.sum()) for m in masks]


def test_torchs_defaults_do_not_leak_in():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    expected = values.sort().values[1799]
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        assert kth_smallest(values, 1800).item() == expected.item()
        assert kth_smallest(values, 1800).dtype == torch.float32
        (mask,) = keep_largest(values, 201)
        assert mask.sum().item() == 201
        assert mask.device.type == "cpu"
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("k", [1, 3, 60_000, 99_997, 99_999])
@pytest.mark.parametrize("value", [0.0, -0.0, 5.0, float("inf")])
def test_ties_at_an_end_of_all_ranks_are_found_in_three_passes(k, value):
    values = torch.full((100_000,), value)
    values[::50] = 1.0
    with (
        mock.patch.multiple(select_cpu, CHUNK=9_999, GATHER_ALL=100, SAMPLE=1000),
        mock.patch.object(select_cpu, "count_between", wraps=select_cpu.count_between) as count,
    ):
        assert kth_smallest(values, k, by="magnitude") == values.sort().values[k - 1]
    assert count.call_count <= 3


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("sorted_before", [False, True])
def test_a_rank_among_values_of_many_sizes_is_found_in_one_pass_and_few_are_gathered(share, sorted_before):
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    values = values.sort().values if sorted_before else values
    k = round(share * values.numel())
    with (
        mock.patch.object(select_cpu, "GATHER_ALL", 100),
        mock.patch.object(select_cpu, "count_between", wraps=select_cpu.count_between) as count,
        mock.patch.object(select_cpu, "_kth_inside", wraps=select_cpu._kth_inside) as gathered,
    ):
        assert kth_smallest(values, k) == values.sort().values[k - 1]
    assert count.call_count == 1
    inside = sum(part.size for part in gathered.call_args.args[0])
    spread = 400_000 * (share * (1 - share) / select_cpu.SAMPLE) ** 0.5  # of the rank that a sample gives
    assert 5 * spread < inside < 20 * spread + 100

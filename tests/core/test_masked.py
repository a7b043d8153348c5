"""Pruned entries become +0.0 whatever stands there, in every layout, and autograd notices."""

import math
from unittest import mock

import pytest
import torch

from gradprune.core import masked
from gradprune.core.masked import count_alive, count_kept, zero_pruned_

DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.int8, torch.int64),
]


WAYS = {  # on the CPU, PIECE, SHARED
    "whole": (True, 2**18, 2**24),
    "in pieces": (True, 2, 2**24),
    "shared by threads": (True, 2, 0),
    "for accelerators": (False, 2**18, 0),
}


@pytest.fixture(params=WAYS, autouse=True)
def way(request):
    on_cpu, piece, shared = WAYS[request.param]
    with (
        mock.patch.object(masked, "_on_cpu", return_value=on_cpu),
        mock.patch.multiple(masked, PIECE=piece, SHARED=shared),
        mock.patch("torch.get_num_threads", return_value=3),
    ):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_pruned_is_plus_zero_and_the_rest_bit_for_bit_the_same(dtype):
    values = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)) * 50
    values = torch.complex(values, -values).to(dtype) if dtype.is_complex else values.to(dtype)
    if dtype.is_floating_point:
        values[0, :4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    mask = torch.rand(6, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[0] = torch.tensor([False, True, False, False, True, True, False])
    for layout in (lambda t: t, torch.t, lambda t: t.expand(2, 6, 7).clone()[:, ::2], lambda t: t.conj()):
        tensor, kept = layout(values.clone()), layout(mask)
        before = tensor.clone()
        zero_pruned_([(tensor, kept.clone())])
        parts = torch.view_as_real(tensor.resolve_conj()) if dtype.is_complex else tensor
        assert not (parts[~kept].to(torch.float64).abs() > 0).any()
        if dtype.is_floating_point:
            assert not tensor[~kept].signbit().any()
        assert torch.equal(tensor[kept].nan_to_num(), before[kept].nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_a_tensor_larger_than_a_piece(dtype):
    values, mask = torch.ones(110, 100, dtype=dtype), torch.zeros(110, 100, dtype=torch.bool)
    mask[::3] = True
    with mock.patch.object(masked, "PIECE", 2**8):
        zero_pruned_([(values, mask)])
    assert torch.equal(values != 0, mask)


def test_empty_tensors_and_scalars():
    scalar = torch.tensor(3.0)
    zero_pruned_([(torch.empty(0, 4), torch.empty(0, 4, dtype=torch.bool)), (scalar, torch.tensor(False))])
    assert scalar == 0


def test_a_mask_may_be_given_as_its_bytes():
    mask = torch.tensor([[True, False], [False, True]])
    tensors = [torch.full((2, 2), -torch.inf), torch.full((2, 2), 1 - 1j, dtype=torch.complex128)]
    zero_pruned_((tensor, mask.view(torch.int8)) for tensor in tensors)
    assert all(torch.equal(tensor != 0, mask) for tensor in tensors)


def test_a_parameter_that_has_gradients_is_written_and_keeps_them():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.square().sum().backward()
    before = weight._version
    zero_pruned_([(weight, torch.tensor([True, False, True]))])
    assert weight.tolist() == [1, 0, 1]
    assert weight.grad.tolist() == [2, 2, 2]
    assert weight.requires_grad
    assert weight.grad_fn is None
    assert weight._version > before
    assert torch.is_grad_enabled()


def test_autograd_notices_the_write():
    weight = torch.nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    zero_pruned_([(weight, torch.tensor([True, False, True]))])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_all_pairs_are_taken_before_the_first_is_written():
    first = torch.ones(3)

    def pairs():
        yield first, torch.tensor([True, False, True])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zero_pruned_(pairs())
    assert first.tolist() == [1, 1, 1]


def test_an_interrupt_between_two_tensors_waits_for_the_last():
    tensors = [torch.ones(3) for _ in range(3)]
    mask = torch.tensor([True, False, True])
    multiply, calls = masked._multiply_, []

    def interrupted(pairs):
        calls.append(1)
        if len(calls) == 1:
            multiply(list(pairs)[:1])
            raise KeyboardInterrupt
        multiply(pairs)

    with mock.patch.object(masked, "_multiply_", interrupted), pytest.raises(KeyboardInterrupt):
        zero_pruned_((t, mask) for t in tensors)
    assert [t.tolist() for t in tensors] == [[1, 0, 1]] * 3


def test_a_tensor_of_inference_mode_is_written_in_it():
    with torch.inference_mode():
        tensor = torch.ones(3)
        zero_pruned_([(tensor, torch.tensor([True, False, True]))])
        assert tensor.tolist() == [1, 0, 1]


def test_counting():
    assert count_kept(torch.tensor([[True, False], [True, True]])) == 3
    assert count_kept(torch.empty(0, dtype=torch.bool)) == 0


def test_what_is_not_zero_though_it_is_pruned_is_counted():
    values = torch.tensor([[1.0, -0.0, 0.0], [math.nan, 2.0, -math.inf]])
    mask = torch.tensor([[True, False, False], [False, True, False]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert count_alive([(values.to(dtype), mask), (values.T.to(dtype), mask.T)]) == 4
    assert count_alive([]) == 0
    assert count_alive([(values, torch.ones_like(mask))]) == 0

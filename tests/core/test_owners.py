"""Whoever runs a model to look at it knows whose weights its operators get, and leaves it as it was."""

import pytest
import torch
from torch import nn

from gradprune.core.evaluate import arguments, as_written, call, evaluated, plain_kernels, tensors_in
from gradprune.core.owners import Owners, aten, memory


class Seen(Owners):
    """Notes every product with its weight and the module that has it."""

    def __init__(self, model):
        super().__init__(model)
        self.products = []

    def ran(self, operator, args, kwargs, result):
        if operator in (aten.mm, aten.addmm):
            module, weight = self.weight_among(args)
            self.products.append((module, None if weight is None else tuple(weight.shape)))


def products(model, x):
    seen = Seen(model)
    with torch.no_grad(), seen.watching():
        model(x)
    return seen.products


def test_a_product_belongs_to_the_module_that_runs_if_it_has_the_weight_and_else_to_who_has_it():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert products(nn.Sequential(first, second), torch.ones(2, 4)) == [(first, (4, 4)), (second, (4, 4))]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x @ self.inner.weight[:, :2], x @ x.T

    outer = Outer()
    assert products(outer, torch.ones(2, 4)) == [(outer.inner, (4, 2)), (outer, None)]


def test_memory_given_back_is_not_taken_for_the_copy_that_was_there():
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            for _ in range(2000):
                _ = self.layer.weight.clone()
                x = torch.ones(64, 64)
            return x @ x

    model = Copying()
    assert products(model, torch.ones(1)) == [(model, None)]


def test_tensors_share_a_key_exactly_where_they_share_memory():
    w = torch.randn(4, 4)
    assert memory(w) == memory(w.T) == memory(w[1:, 2]) != memory(w.clone())
    sparse = w.to_sparse_csr()
    assert memory(sparse) == memory(sparse.values())


def test_a_model_is_evaluated_without_a_trace():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x):
            self.steps = self.steps + torch.rand(1)
            self.norm.num_batches_tracked += 1
            assert not self.training
            assert not torch.backends.mha.get_fastpath_enabled()
            raise KeyboardInterrupt

    model = Noisy().train()
    model.norm.eval()
    steps, random_state = model.steps, torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), evaluated(model), plain_kernels():
        call(model, torch.ones(2, 3))
    assert (model.training, model.norm.training) == (True, False)
    assert model.steps is steps
    assert not steps.any()
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


def test_inputs_are_one_tensor_several_arguments_or_named_ones():
    x = torch.ones(1)
    packed = nn.utils.rnn.pack_sequence([torch.ones(2, 3)])
    assert arguments(x) == ((x,), {})
    assert arguments([x, 1]) == ((x, 1), {})
    assert arguments({"a": x}) == ((), {"a": x})
    assert arguments(packed) == ((packed,), {})
    assert list(tensors_in(("label", {"a": [x]}, None))) == [x]


def test_a_tensor_without_memory_of_its_own_has_none_that_can_be_told():
    assert memory(torch.ones(2, 2).to_mkldnn()) is None


def test_a_sparse_weight_is_known_by_the_values_that_it_stores():
    w = torch.eye(3).to_sparse()
    assert memory(w) == memory(w._values())


def test_what_is_compiled_runs_as_it_is_written():
    compiled_with = []

    def backend(graph, inputs):
        compiled_with.append(inputs)
        return graph.forward

    model = torch.compile(nn.Linear(2, 2), backend=backend)
    with as_written():
        model(torch.ones(1, 2))
    assert not compiled_with
    model(torch.ones(1, 2))
    assert len(compiled_with) == 1

"""Tensors, generators, pairs and models all say which gradients are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gradprune.gradients.params import by_name, with_gradient


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model(torch.randn(5, 3)).sum().backward()
    return model


def test_a_model_its_pairs_and_its_parameters_mean_the_same_gradients() -> None:
    model = _model()
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(with_gradient(model)) == names
    assert list(with_gradient(model.named_parameters())) == names
    bare = with_gradient(p for p in model.parameters())
    assert list(bare) == [f"parameter {at}" for at in range(4)]
    assert all(a is b for a, b in zip(bare.values(), model.parameters(), strict=True))
    assert list(with_gradient(model[0].weight).values()) == [model[0].weight]


def test_what_has_no_gradient_is_left_out_and_positions_still_count_it() -> None:
    model = _model()
    model[0].weight.grad = None
    assert list(with_gradient(model.parameters())) == ["parameter 1", "parameter 2", "parameter 3"]
    assert with_gradient([]) == {}
    assert with_gradient(nn.Linear(2, 2)) == {}


def test_a_tensor_given_twice_counts_once() -> None:
    weight = _model()[0].weight
    assert len(with_gradient([weight, weight])) == 1


@pytest.mark.parametrize("wrong", [[1.0], [("a", 2)], [(3, torch.zeros(1))], ["weight"]])
def test_something_else_than_a_tensor_is_an_error_that_says_where(wrong: Any) -> None:
    with pytest.raises(TypeError, match="entry 0 is"):
        with_gradient(wrong)


def test_one_name_for_two_tensors_is_an_error() -> None:
    first, second = _model().parameters(), _model().parameters()
    with pytest.raises(ValueError, match="two different parameters are called 'a'"):
        with_gradient([("a", next(first)), ("a", next(second))])


def test_by_name_is_all_parameters_with_or_without_a_gradient() -> None:
    model = _model()
    model[0].weight.grad = None
    assert list(by_name(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(by_name([model[0].weight, model[0].weight])) == ["parameter 0"]
    with pytest.raises(ValueError, match="two different parameters are called 'a'"):
        by_name([("a", model[0].weight), ("a", model[0].bias)])

"""Tensors, generators, pairs and models all say which gradients are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gradprune as gp
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


# ------------------------------------------------------------------------------------- what is no set of parameters

FUNCTIONS = {
    "by value": lambda p: gp.clip_by_value_(p, 1.0),
    "by norm": lambda p: gp.clip_by_norm_(p, 1.0),
    "adaptive": lambda p: gp.clip_adaptive_(p),
    "auto": lambda p: gp.AutoClip()(p),
    "threshold": lambda p: gp.threshold_gradients_(p, 0.1),
    "ratio": lambda p: gp.threshold_gradients_(p, ratio=0.1),
    "top": lambda p: gp.keep_top_gradients_(p, 0.1),
    "feedback": lambda p: gp.ErrorFeedback(p, 0.1),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
def test_an_iterator_that_yields_nothing_is_an_error(function: Any) -> None:
    used = _model().parameters()
    list(used)
    for empty in (used, iter([]), filter(None, []), nn.ReLU().named_parameters()):
        with pytest.raises(ValueError, match=r"an iterator that .*was used up before"):
            function(empty)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "feedback"])
def test_an_empty_list_and_a_model_without_gradients_have_nothing_to_bound(name: str) -> None:
    for nothing in ([], (), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)):
        result = FUNCTIONS[name](nothing)
        assert result is None or float(result) in (0.0, 1.0)


WRONG = [
    (lambda m: None, "got None"),
    (lambda m: type(m), "got the class Sequential: make one"),
    (lambda m: torch.optim.SGD(m.parameters(), 0.1), r"got the optimizer SGD: give the model, or \[p for group in"),
    (lambda m: torch.optim.SGD(m.parameters(), 0.1).param_groups, r"entry 0 is dict: of an optimizer's groups"),
    (lambda m: m.state_dict(), "got a mapping, as a state dict is: give the model"),
    (lambda m: dict(m.named_parameters()), r"got a mapping: give its items\(\)"),
    (lambda m: m.parameters, "got a function, parameters: call it"),
    (lambda m: "weight", "got str"),
    (lambda m: 3, "got int"),
    (lambda m: [m, m], r"entry 0 is Sequential: of several models"),
    (lambda m: [None, m[0].weight], "entry 0 is NoneType: where a parameter has no gradient"),
]


@every_function
@pytest.mark.parametrize("case", WRONG, ids=[message for _, message in WRONG])
def test_what_is_no_set_of_parameters_is_named_with_what_was_meant(function: Any, case: Any) -> None:
    make, message = case
    model = _model()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=message):
        function(make(model))
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "feedback"])
def test_gradients_in_the_place_of_parameters_are_an_error(name: str) -> None:
    model = _model()
    for wrong in ([p.grad for p in model.parameters()], model.state_dict().items(), torch.ones(3)):
        with pytest.raises(ValueError, match="give the parameters themselves, not their gradients"):
            FUNCTIONS[name](wrong)
    with pytest.raises(ValueError, match="were computed from others, so that no gradient is kept"):
        FUNCTIONS[name]([p * 1 for p in model.parameters()])


def test_of_what_is_no_tensor_and_no_gradient_only_the_kind_is_said() -> None:
    with pytest.raises(TypeError, match=r"entry 0 is str$"):
        with_gradient(["weight"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"entry 1 is NoneType: where a parameter has no gradient, give the parameter"):
        with_gradient([nn.Parameter(torch.ones(1)), None])  # type: ignore[list-item]

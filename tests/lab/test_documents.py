"""Does each literal reading do what the document's line does, faults included, and nothing else?

The cases are worked out by hand from the line; the properties are what the line says of every tensor and threshold.
"""

import copy
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from torch import nn

from gradprune.lab import documents

W = torch.tensor([-0.5, -0.1, -0.05, 0.0, 0.05, 0.1, 0.5], dtype=torch.float64)
BY_HAND = {  # at the threshold 0.1
    "keep_large": [-0.5, -0.1, 0, 0, 0, 0.1, 0.5],
    "bound": [-0.1, -0.1, -0.05, 0, 0.05, 0.1, 0.1],
    "drop_large": [0, -0.1, -0.05, 0, 0.05, 0.1, 0],
    "keep_above": [0, 0, 0, 0, 0, 0.1, 0.5],
    "cap": [-0.5, -0.1, -0.05, 0, 0.05, 0.1, 0.1],
    "clamp": [0, 0, 0, 0, 0.05, 0.1, 0.1],
    "drop_unimportant": [0, 0, 0, 0, 0, 0, 0.5],  # 0.1 * 0.1 = 0.01 and 0.5 * 0.5 = 0.25
}
RULES = [getattr(documents, name) for name in BY_HAND]

numbers = st.floats(-4, 4, width=32).map(lambda v: 0.0 if abs(v) < 1e-6 else v)
tensors = arrays(np.float64, st.integers(1, 12), elements=numbers).map(torch.from_numpy)
thresholds = st.floats(0.001, 3)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_rule_gives_what_its_line_gives_by_hand_and_leaves_its_argument(name):
    before = W.clone()
    after = getattr(documents, name)(W, 0.1)
    assert after.tolist() == pytest.approx(BY_HAND[name], abs=1e-15)
    assert torch.equal(before, W)


def test_importance_by_hand_has_the_sign_of_the_weight():
    assert documents.importance(torch.tensor([-3.0, -0.5, 0.0, 2.0])).tolist() == [-9.0, -0.25, 0.0, 4.0]


@settings(deadline=None)
@given(w=tensors, t=thresholds)
def test_properties_of_the_rules_for_every_tensor_and_threshold(w, t):
    assert documents.cap(w, t).tolist() == pytest.approx(np.minimum(w.numpy(), t).tolist(), abs=1e-12)
    assert documents.clamp(w, t).tolist() == [min(max(v, 0.0), t) for v in w.tolist()]
    assert torch.equal(documents.keep_large(w, t) + documents.drop_large(w, t).where(w.abs() != t, 0.0), w)
    changed_by_bound, changed_by_threshold = documents.bound(w, t) != w, documents.keep_large(w, t) != w
    assert not (changed_by_bound & changed_by_threshold).any()
    assert torch.equal(documents.keep_above(w, t), documents.keep_large(w, t).clamp(min=0.0))
    assert (documents.drop_large(w, t).abs() <= t).all()
    for rule in RULES:  # a rule is one of each entry: cutting the tensor in two cuts the result in two
        assert torch.equal(torch.cat([rule(w[:1], t), rule(w[1:], t)]), rule(w, t))


@settings(deadline=None)
@given(w=tensors, t=thresholds)
def test_signed_importance_ranks_as_the_weight_itself(w, t):
    order = documents.importance(w).argsort(stable=True)
    assert (w[order].diff() >= 0).all()
    root = math.sqrt(t)
    clear = (w - root).abs() > 1e-9
    assert torch.equal(documents.drop_unimportant(w, t)[clear], documents.keep_above(w, root)[clear])


def test_the_five_rules_differ_from_each_other_and_from_what_the_field_has_names_for():
    found = [rule(W, 0.1) for rule in documents.RULES.values()]
    found += [documents.keep_large(W, 0.1), documents.bound(W, 0.1), nn.functional.softshrink(W, 0.1)]
    assert len(documents.RULES) == 5
    assert len({tuple(values.tolist()) for values in found}) == 8


def test_target_times_output_by_hand_does_not_look_at_inputs_or_errors():
    y, output = np.array([[1.0], [0.0], [2.0]]), np.array([[0.5, -1.0], [9.0, 9.0], [0.25, 1.0]])
    by_weights, by_biases = documents.target_times_output(y, output)
    assert by_weights.tolist() == [[1.0, 1.0]]
    assert by_biases.tolist() == [9.75 / 3, 3.0]


def test_one_epoch_of_the_tanh_layer_by_hand():
    x, y = np.array([[1.0], [0.0]]), np.array([[1.0], [0.0]])
    start = np.array([[0.0]]), np.array([1.0])
    weights, biases, losses = documents.train_tanh_layer(x, y, *start, rate=0.5, threshold=0.7, epochs=1)
    h = math.tanh(1.0)  # 0.76: the output on both examples, the "gradient" of both, over the bound
    assert losses == [pytest.approx(((1 - h) ** 2 + h**2) / 2)]
    assert weights.tolist() == [[-0.35]]
    assert biases.tolist() == [0.65]
    assert start[0].tolist() == [[0.0]]  # and the arguments are as they were
    assert start[1].tolist() == [1.0]


def test_the_tanh_layer_bounds_moves_both_rows_alike_and_stops_at_shapes_that_do_not_stretch():
    generator = np.random.default_rng(0)
    x = np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = np.array([[0.0], [1], [1], [0]])
    weights, biases = generator.normal(size=(2, 2)), generator.normal(size=2)
    after, after_biases, losses = documents.train_tanh_layer(x, y, weights, biases)
    assert len(losses) == 100
    moved = after - weights
    assert moved[0] == pytest.approx(moved[1])
    assert max(np.abs(moved).max(), np.abs(after_biases - biases).max()) <= 100 * 0.01 * 0.1 + 1e-12
    with pytest.raises(ValueError, match="broadcast"):
        documents.train_tanh_layer(np.ones((4, 3)), np.ones((4, 2)), np.ones((3, 2)), np.ones(2))


def test_gradients_are_assigned_to_the_weights_by_hand():
    weight, bias = torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([3.0])
    weight.grad, bias.grad = torch.tensor([-4.0, 1.0, 0.5, 2.0]), torch.tensor([0.0])
    documents.assign_gradients_([weight, bias], 0.5)  # mean |g| = 1.875; half of it is 0.9375
    assert weight.tolist() == [-4.0, 1.0, 0.0, 2.0]
    assert bias.tolist() == [0.0]
    assert weight.grad.tolist() == [-4.0, 1.0, 0.5, 2.0]


@settings(deadline=None)
@given(w=tensors, g=tensors, rate=st.floats(0, 3))
def test_what_the_weights_were_leaves_no_trace(w, g, rate):
    size = min(len(w), len(g))
    one, other = w[:size].clone(), torch.zeros(size, dtype=torch.float64)
    one.grad = other.grad = g[:size].clone()
    documents.assign_gradients_([one], rate)
    documents.assign_gradients_([other], rate)
    assert torch.equal(one, other)
    assert ((one == 0) | (one == g[:size])).all()


def test_assigning_gradients_refuses_before_it_changes_anything():
    first, second = torch.ones(2), torch.ones(2)
    first.grad = torch.zeros(2)
    with pytest.raises(ValueError, match="1 of 2 parameters have no gradient"):
        documents.assign_gradients_([first, second])
    assert first.tolist() == [1.0, 1.0]


def test_clamp_and_pickle_bounds_every_parameter_and_writes_a_whole_module(tmp_path):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, 0.05, 1.0], [0.1, -0.01, 0.0]]))
        model.bias.copy_(torch.tensor([-2.0, 2.0]))
    documents.clamp_and_pickle_(model, tmp_path / "model.pth")
    assert model.weight.flatten().tolist() == pytest.approx([0, 0.05, 0.1, 0.1, 0, 0])
    assert model.bias.tolist() == pytest.approx([0, 0.1])
    loaded = torch.load(tmp_path / "model.pth", weights_only=False)
    assert isinstance(loaded, nn.Linear)
    assert torch.equal(loaded.weight, model.weight)


def test_a_difference_along_an_array_is_no_derivative_of_a_loss():
    assert documents.difference_along(2.5, 0.7) == ()
    with pytest.raises(TypeError, match="number of arguments"):
        documents.difference_along(2.5, np.zeros(3))
    grid = np.linspace(0, 1, 11)
    assert documents.difference_along(grid**2, grid)[1:-1] == pytest.approx(2 * grid[1:-1])


@settings(deadline=None)
@given(w=numbers, g=numbers, rate=st.floats(0, 1), t=st.floats(0, 10), other=st.floats(0, 10))
def test_both_branches_are_the_same_step_whatever_the_threshold(w, g, rate, t, other):
    start = np.array([w]), np.array([0.0])
    step = documents.step_in_both_branches(*start, np.array([g]), np.array([1.0]), rate=rate, threshold=t)
    assert step[0].item() == w - rate * g
    assert step[1].item() == -rate
    again = documents.step_in_both_branches(*start, np.array([g]), np.array([1.0]), rate=rate, threshold=other)
    assert step == again


def test_an_epoch_of_the_linear_model_takes_the_same_step_twice():
    def by_hand(w, b):  # of (w^2 + b^2) / 2
        seen.append(w.item())
        return w, b

    seen = []
    w, b = documents.train_linear(by_hand, np.array([1.0]), np.array([4.0]), rate=0.25, threshold=0.1, epochs=2)
    assert (w.item(), b.item()) == (0.25, 1.0)  # 1 - 2 * 0.25 = 0.5 an epoch
    assert seen == [1.0, 0.5]


def test_training_on_noise_draws_a_new_input_and_target_each_step():
    class Seen(nn.Linear):
        def forward(self, x):
            inputs.append(x)
            return super().forward(x)

    inputs = []
    torch.manual_seed(0)
    model = Seen(3, 2)
    reference = copy.deepcopy(model)
    torch.manual_seed(1)
    losses = documents.train_on_noise(model, inputs=3, outputs=2, steps=2, rate=0.5)
    torch.manual_seed(1)
    x, target = torch.randn(1, 3), torch.randn(2)
    torch.testing.assert_close(inputs[0], x)
    error = (nn.functional.linear(x, reference.weight, reference.bias) - target).detach()
    assert losses[0] == pytest.approx(error.square().mean().item())
    with torch.no_grad():  # by hand: the derivative of the mean of two squares by an output is its error
        weight, bias = reference.weight - 0.5 * error.T @ x, reference.bias - 0.5 * error[0]
    second = torch.randn(1, 3)
    error = nn.functional.linear(second, weight, bias) - torch.randn(2)
    assert losses[1] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert not torch.equal(inputs[0], inputs[1])


def test_importances_cannot_be_summed_over_tensors_with_gradients_or_of_unequal_shapes():
    model = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="requires grad"):
        documents.summed_importance(model.parameters())
    with pytest.raises(ValueError, match="inhomogeneous"):
        documents.summed_importance([p.detach() for p in model.parameters()])
    equal = [torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 4.0])]
    assert np.asarray(documents.summed_importance(equal)).tolist() == [4.0, 6.0]  # one number a place, over tensors


@settings(deadline=None)
@given(w=st.lists(tensors, max_size=4), t=thresholds)
def test_a_tensor_goes_whole_or_stays_whole(w, t):
    before = [values.clone() for values in w]
    dropped = documents.drop_small_tensors_(w, t)
    small = [values.abs().sum().item() < t for values in before]
    assert dropped == sum(small)
    for values, old, goes in zip(w, before, small, strict=True):
        assert torch.equal(values, torch.zeros_like(old) if goes else old)

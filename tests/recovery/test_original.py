"""What `evaluate` does to the weights is noticed, said and undone; what it undoes itself passes."""

import copy

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.recovery.original import Original


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


def writes(model):
    model[3].bias.data.add_(1)


def counted_write(model):
    with torch.no_grad():
        model[3].bias.add_(1)


def steps(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().mean().backward()
    optimizer.step()


def other_memory(model):
    model[0].weight.data = torch.zeros_like(model[0].weight)


def other_parameter(model):
    model[0].weight = nn.Parameter(torch.zeros(6, 4))


def other_module(model):
    model[2] = nn.Tanh()


def frozen(model):
    model.requires_grad_(False)


CHANGES = [writes, counted_write, steps, nn.Module.half, other_memory, other_parameter, other_module, frozen]


def state(model):
    return {
        "parameters": [(n, id(p), p.data_ptr(), p.dtype, p.requires_grad) for n, p in model.named_parameters()],
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "values": [t.detach().clone() for t in model.state_dict().values()],
    }


def same(a, b):
    values = all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a["values"], b["values"], strict=True))
    return values and all(a[key] == b[key] for key in ("parameters", "modules"))


def scan(model, evaluate):
    gp.sensitivity(model, evaluate, [0.5, 0.9])


def halve(model, evaluate):
    gp.largest_sparsity(model, evaluate, at_least=0.0, tolerance=0.1)


def plan(model, evaluate):
    gp.fit_budget(model, parameters=40, evaluate=evaluate)


@pytest.mark.parametrize("call", [scan, halve, plan])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("raises", [False, True])
def test_what_evaluate_changes_is_put_back_and_said(call, change, first, raises):
    model, calls = network(), []
    (model(X).sum()).backward()
    gradients = [p.grad for p in model.parameters()]
    before = state(model)

    def evaluate(pruned):
        calls.append(1)
        if len(calls) >= first:
            change(pruned)
            if raises:
                raise KeyError("the user's own")
        return 0.5

    with pytest.raises(KeyError if raises else ValueError, match=r"user's own" if raises else r"copy\.deepcopy"):
        call(model, evaluate)
    assert same(before, state(model))
    assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
    if change is not writes:  # torch counts it: noticed at once
        assert len(calls) == first


def test_a_write_that_torch_does_not_count_is_said_after_the_first_evaluation_or_at_the_end():
    model, calls = nn.Linear(4, 2), []
    with pytest.raises(ValueError, match="the values of 'bias' for the dense network"):
        gp.sensitivity(model, lambda q: (q.bias.data.add_(1), calls.append(1), 0.5)[-1], [0.5])
    assert len(calls) == 1
    with pytest.raises(ValueError, match="the values of 'bias', which are put back"):
        gp.sensitivity(model, lambda q: (len(calls) > 1 and q.bias.data.add_(1), calls.append(1), 0.5)[-1], [0.5])
    assert len(calls) == 3


def test_an_evaluate_that_puts_back_what_it_changed_passes():
    model = network()
    other = copy.deepcopy(model.state_dict())

    def evaluate(pruned):
        own = {n: t.clone() for n, t in pruned.state_dict().items()}
        pruned.load_state_dict(other)
        pruned.load_state_dict(own)
        return 0.5

    scan(model, evaluate)
    halve(model, lambda q: evaluate(q) * (q[0].weight != 0).float().mean())


def test_the_same_values_in_other_memory_are_no_change_and_the_memory_is_the_old_one_again():
    """As after model.cuda() and model.cpu() in `evaluate`."""
    model = network()
    before = state(model)

    def evaluate(pruned):
        for parameter in pruned.parameters():
            parameter.data = parameter.data.clone()
        return float((pruned[0].weight != 0).float().mean())

    scan(model, evaluate)
    assert gp.largest_sparsity(model, evaluate, at_least=0.5, tolerance=0.1).falls
    assert same(before, state(model))


def test_a_nan_and_complex_weights_are_compared_by_their_bits():
    model = nn.Linear(4, 2, dtype=torch.complex64)
    with torch.no_grad():
        model.bias[0] = float("nan")
    gp.sensitivity(model, lambda q: 0.5, [0.5])
    with pytest.raises(ValueError, match="evaluate changed the values of 'bias'"):
        gp.sensitivity(model, lambda q: (q.bias.data.neg_(), 0.5)[1], [0.5])


def test_training_between_may_change_the_weights_and_evaluate_may_not():
    model = network()
    before = state(model)
    how = {"at_least": 0.0, "tolerance": 0.3, "train": lambda m, work: m[3].bias.data.add_(1), "steps": 1}
    gp.largest_sparsity(model, lambda q: float((q[0].weight != 0).float().mean()), **how)
    with pytest.raises(ValueError, match=r"'3\.bias' at sparsity 0\.5"):
        gp.largest_sparsity(model, lambda q: counted_write(q) or 0.5 if (q[0].weight == 0).any() else 0.5, **how)
    assert same(before, state(model))


def test_what_was_kept_is_the_same_memory_that_the_network_had():
    model = nn.Linear(2, 2)
    place = model.weight.data_ptr()
    with pytest.raises(ValueError, match="evaluate changed"), Original(model).kept(), torch.no_grad():
        model.weight.mul_(2)
    assert model.weight.data_ptr() == place

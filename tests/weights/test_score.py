"""Scores are their papers' formulas on nets small enough to compute them by hand, and leave no trace."""

import copy
import math

import pytest
import torch
from torch import nn

import gradprune as gp

LOSS = nn.functional.cross_entropy


def small_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(dtype)
    nn.init.normal_(model[3].running_mean)
    return model


def batches(count=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 4, generator=generator).to(dtype), torch.randint(0, 3, (5,), generator=generator))
        for _ in range(count)
    ]


def mean_loss(model, data):
    return sum(LOSS(model(x), y) for x, y in data) / len(data)


def at_weights(model, vector):
    """The mean loss of `model` in eval mode as a function of all its parameters joined."""
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    parts = vector.split([math.prod(s) for s in shapes])
    state = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
    return mean_loss(lambda x: torch.func.functional_call(model, state, (x,)), batches())


def joined(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


DATA_SCORES = {
    "gradient": lambda m: gp.gradient(m, batches(), LOSS),
    "taylor": lambda m: gp.taylor(m, batches(), LOSS),
    "snip": lambda m: gp.snip(m, batches(), LOSS),
    "grasp": lambda m: gp.grasp(m, batches(), LOSS),
    "synflow": lambda m: gp.synflow(m, batches()[0][0]),
    "fisher": lambda m: gp.fisher(m, batches(), LOSS),
    "movement": lambda m: gp.movement(m, batches(), LOSS, lr=0.1),
    "activation": lambda m: gp.activation(m, batches()),
}
ALL_SCORES = {"magnitude": gp.magnitude, "random": gp.random, **DATA_SCORES}


@pytest.mark.parametrize("name", ALL_SCORES)
def test_a_score_has_the_shape_of_each_parameter(name):
    model = small_model()
    scores = ALL_SCORES[name](model)
    wanted = ["0.weight", "4.weight"] if name == "activation" else [n for n, _ in model.named_parameters()]
    assert list(scores) == wanted
    for key, score in scores.items():
        assert score.shape == model.get_parameter(key).shape
        assert not score.requires_grad


@pytest.mark.parametrize("name", DATA_SCORES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_mode_gradients_buffers_and_random_state_are_as_before(name, interrupted):
    model = small_model().train()
    model[4].eval()
    mean_loss(model, batches()).backward()
    weights, gradients = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    if interrupted:

        def fail(*_):
            torch.rand(1)
            raise KeyboardInterrupt

        hook = model[1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            ALL_SCORES[name](model)
        hook.remove()
    else:
        ALL_SCORES[name](model)
    assert [m.training for m in model.modules()] == [True, True, True, True, True, False]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_data_scores_do_not_depend_on_dropout_or_on_how_the_samples_are_batched():
    model = small_model()
    x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
    for name in ("gradient", "taylor", "snip", "fisher"):
        function = getattr(gp, name)
        whole = function(model, [(x, y)], LOSS)
        for key, score in function(model, batches(), LOSS).items():
            torch.testing.assert_close(score, whole[key])


def test_magnitude_and_random_are_what_they_say():
    model = small_model()
    assert torch.equal(gp.magnitude(model)["0.weight"], model[0].weight.detach().abs())
    first = gp.random(model, torch.Generator().manual_seed(3))
    again = gp.random(model, torch.Generator().manual_seed(3))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert min(s.min() for s in first.values()) >= 0
    torch.manual_seed(5)
    expected = torch.rand(6, 4)
    torch.manual_seed(5)
    assert torch.equal(gp.random(model)["0.weight"], expected)


def test_taylor_predicts_the_change_of_the_loss_when_a_small_weight_is_removed():
    model = small_model().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e-2)
    scores = joined(gp.taylor(model, batches(), LOSS).values())
    start = joined(model.parameters())
    loss = at_weights(model, start)
    for i in range(0, len(start), 3):
        without = start.clone()
        without[i] = 0.0
        assert float((at_weights(model, without) - loss).abs()) == pytest.approx(float(scores[i]), rel=0.02, abs=1e-9)


def test_gradient_and_snip_are_the_derivative_of_the_loss():
    model = small_model().eval()
    start = joined(model.parameters()).requires_grad_()
    (g,) = torch.autograd.grad(at_weights(model, start), start)
    torch.testing.assert_close(joined(gp.gradient(model, batches(), LOSS).values()), g.abs())
    # SNIP: the derivative with respect to a switch on each weight, as a share of the whole.
    switches = torch.ones_like(start, requires_grad=True)
    (s,) = torch.autograd.grad(at_weights(model, start.detach() * switches), switches)
    torch.testing.assert_close(joined(gp.snip(model, batches(), LOSS).values()), s.abs() / s.abs().sum())


def test_stored_gradients_serve_where_there_are_no_batches():
    model = small_model()
    with pytest.raises(ValueError, match=r"no parameter holds a gradient: call backward\(\) first, or pass batches"):
        gp.gradient(model)
    model(batches()[0][0]).sum().backward()
    model[0].bias.grad = None
    scores = gp.taylor(model)
    torch.testing.assert_close(scores["4.weight"], (model[4].weight * model[4].weight.grad).abs().detach())
    assert not scores["0.bias"].any()


def test_grasp_is_weight_times_hessian_times_gradient():
    model = small_model().eval()
    start = joined(model.parameters())
    hessian = torch.autograd.functional.hessian(lambda v: at_weights(model, v), start)
    v = start.clone().requires_grad_()
    (g,) = torch.autograd.grad(at_weights(model, v), v)
    torch.testing.assert_close(joined(gp.grasp(model, batches(), LOSS).values()), start * (hessian @ g))


def test_grasp_is_zero_where_the_loss_is_linear():
    model = nn.Linear(3, 1, bias=False)
    scores = gp.grasp(model, [(torch.randn(4, 3), torch.zeros(4))], lambda out, target: out.mean())
    assert not scores["weight"].any()


def test_synflow_is_the_sum_over_paths_of_a_linear_net():
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    a, b = model[0].weight.detach().abs().double(), model[2].weight.detach().abs().double()
    scores = gp.synflow(model, torch.randn(7, 3))
    # Seven rows of ones; the flow through a weight is the sum over all paths that use it.
    torch.testing.assert_close(scores["0.weight"], 7 * a * b.sum(dim=0)[:, None])
    torch.testing.assert_close(scores["2.weight"], 7 * b * a.sum(dim=1)[None, :])
    # Conservation: every layer carries the same flow in all.
    assert float(scores["0.weight"].sum()) == pytest.approx(float(scores["2.weight"].sum()))


def test_fisher_is_half_the_weight_squared_times_the_mean_squared_gradient():
    model = small_model().eval()
    start = joined(model.parameters())
    squares, count = torch.zeros_like(start), 0
    for x, y in batches():
        for i in range(len(y)):
            model.zero_grad()
            LOSS(model(x[i : i + 1]), y[i : i + 1]).backward()
            squares += joined(p.grad for p in model.parameters()) ** 2
            count += 1
    expected = start**2 * squares / count / 2
    torch.testing.assert_close(joined(gp.fisher(model, batches(), LOSS).values()), expected)


def test_activation_is_the_weight_times_the_norm_of_its_input():
    model = small_model().eval()
    hidden = torch.cat([model[:4](x) for x, _ in batches()]).detach()
    scores = gp.activation(model, batches())
    torch.testing.assert_close(
        scores["4.weight"], (model[4].weight.abs() * hidden.norm(dim=0)).detach(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_activation_of_a_convolution_uses_the_channel_each_filter_sees(groups):
    conv = nn.Conv2d(4, 8, 3, groups=groups)
    x = torch.randn(5, 4, 7, 7)
    norms = x.transpose(0, 1).flatten(1).norm(dim=1)
    score = gp.activation(conv, [(x, None)])["weight"]
    for filter_index in range(8):
        group = filter_index // (8 // groups)
        for j in range(4 // groups):
            expected = conv.weight[filter_index, j].abs() * norms[group * (4 // groups) + j]
            torch.testing.assert_close(score[filter_index, j], expected.detach())


def test_activation_of_a_tied_weight_adds_up_over_its_layers():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    x = torch.randn(6, 4)
    expected = model[0].weight.abs() * (x.norm(dim=0) + model[0](x).norm(dim=0))
    torch.testing.assert_close(gp.activation(model, [(x, None)])["0.weight"], expected.detach())


def test_movement_adds_up_minus_weight_times_gradient_along_the_run():
    model = small_model().eval()
    before = copy.deepcopy(model.state_dict())
    scores = gp.movement(model, batches(), LOSS, lr=0.3)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.3)
    expected = [torch.zeros_like(p) for p in twin.parameters()]
    for x, y in batches():
        optimizer.zero_grad()
        LOSS(twin(x), y).backward()
        expected = [s - (p * p.grad).detach() for s, p in zip(expected, twin.parameters(), strict=True)]
        optimizer.step()
    torch.testing.assert_close(joined(scores.values()), joined(expected))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_inputs_may_be_tuples_or_dicts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 2)

        def forward(self, left, right):
            return {"logits": self.a(left) + self.b(right)}

    model, left, right, target = Two(), torch.randn(5, 3), torch.randn(5, 4), torch.arange(5) % 2

    def loss(out, y):
        return LOSS(out["logits"], y)

    for inputs in ((left, right), {"right": right, "left": left}):
        for score in (gp.taylor, gp.fisher, gp.grasp, gp.movement):
            assert score(model, [(inputs, target)], loss)["b.weight"].any()
        assert gp.synflow(model, inputs)["b.weight"].all()
        assert gp.activation(model, [(inputs, target)])["b.weight"].all()


def test_frozen_parameters_have_no_data_score_and_do_not_matter():
    model = small_model()
    model[0].weight.requires_grad_(False)
    assert "0.weight" not in gp.taylor(model, batches(), LOSS)
    assert "0.weight" in gp.magnitude(model)


def test_data_scores_work_where_gradients_are_off():
    with torch.no_grad():
        assert gp.taylor(small_model(), batches(), LOSS)["0.weight"].any()


@pytest.mark.parametrize("name", ["gradient", "taylor", "snip", "grasp", "fisher", "movement"])
def test_errors_say_what_the_data_lack(name):
    function = getattr(gp, name)
    with pytest.raises(ValueError, match="an iterator that was used up before cannot be used again"):
        function(small_model(), iter([]), LOSS)
    if name == "fisher":  # passes samples one by one
        return
    with pytest.raises(ValueError, match=r"loss must return a scalar, got shape \(5,\)"):
        function(small_model(), batches(), lambda out, y: torch.nn.functional.cross_entropy(out, y, reduction="none"))
    if name in ("gradient", "taylor", "snip"):
        with pytest.raises(ValueError, match=r"batches need a loss\(outputs, targets\)"):
            function(small_model(), batches())


def test_every_score_prunes():
    for score in ALL_SCORES.values():
        model = small_model()
        masks = gp.prune(model, score, sparsity=0.5)
        assert int((~masks["0.weight"]).sum() + (~masks["4.weight"]).sum()) == 21


def test_where_no_weight_matters_snip_is_zero_everywhere():
    layer = nn.Linear(3, 2)
    scores = gp.snip(layer, [(torch.zeros(1, 3), None)], lambda outputs, _: outputs.sum())
    assert scores["weight"].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    "score", [lambda m, b, loss: gp.movement(m, b, loss, lr=0.1), lambda m, *_: gp.synflow(m, torch.ones(3, 4))]
)
def test_a_model_that_has_a_module_under_two_names_keeps_its_weights(score):
    twice = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(twice, nn.Tanh(), twice)
    before, own = {name: t.clone() for name, t in model.state_dict().items()}, list(model.parameters())
    x = torch.linspace(-1, 1, 12).view(3, 4)
    found = [score(model, [(x, x)] * 2, nn.functional.mse_loss) for _ in range(2)]
    assert all(torch.equal(found[0][name], again) for name, again in found[1].items())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p is q for p, q in zip(model.parameters(), own, strict=True))

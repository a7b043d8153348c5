"""Does the recorder see what is there, and leave it as it was?"""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradprune as gp
from examples import Delegating, oracle_norm, small_net
from gradprune.gradients.recorder import _statistics


def train(model, optimizer, steps=6, recorded=None, seed=1):
    """A plain loop, as anyone would write it."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y).backward()
        optimizer.step()
        if recorded is not None:
            recorded()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_numbers_are_those_computed_by_hand(every, dtype):
    model = small_net(dtype)
    by_hand = copy.deepcopy(model)
    optimizer, optimizer_by_hand = sgd(model), sgd(by_hand)
    recorder = gp.Recorder(model, optimizer, every=every)
    train(model, optimizer)

    expected = gp.Trace()
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        x, y = torch.randn(8, 4, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)
        outputs = [x]
        for layer in by_hand:
            outputs.append(layer(outputs[-1]))
        optimizer_by_hand.zero_grad()
        functional.cross_entropy(outputs[-1].float(), y).backward()
        before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
        optimizer_by_hand.step()
        if step % every:
            continue
        expected.steps.append(step)
        for name, p in by_hand.named_parameters():
            expected.gradients.setdefault(name, []).append(oracle_norm(p.grad))
            change = oracle_norm(p - before[name]) / oracle_norm(before[name])
            expected.updates.setdefault(name, []).append(change)
        for name, out in zip("012", outputs[1:], strict=True):
            values = out.detach().double().numpy()
            for key, value in (("mean", values.mean()), ("std", values.std()), ("zero", (values == 0).mean())):
                expected.activations.setdefault(name, {}).setdefault(key, []).append(value)

    trace = recorder.trace
    assert trace.steps == expected.steps
    for found, wanted in ((trace.gradients, expected.gradients), (trace.updates, expected.updates)):
        assert list(found) == list(wanted)
        assert all(found[name] == pytest.approx(wanted[name], rel=1e-4) for name in wanted)
    assert list(trace.activations) == ["0", "1", "2"]
    for name, wanted in expected.activations.items():
        for key in wanted:
            assert trace.activations[name][key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6)


def test_the_statistics_of_an_output_far_from_zero_do_not_cancel():
    class Far(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(4096.0))

        def forward(self, x):
            return x + self.shift

    model, x = Far(), torch.linspace(-1, 1, 1000)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gp.Recorder(model, optimizer)
    out = model(x)
    out.sum().backward()
    optimizer.step()
    assert recorder.trace.activations[""]["std"] == [pytest.approx(out.detach().double().numpy().std(), rel=1e-4)]
    assert recorder.trace.activations[""]["zero"] == [0.0]


def test_the_share_of_zeros_counts_exact_zeros_of_either_sign():
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0], [-0.0], [1e-30]]))
    optimizer = sgd(model)
    with gp.Recorder(model, optimizer) as recorder:
        model(torch.ones(2, 1)).sum().backward()
        optimizer.step()
    assert recorder.trace.activations["0"]["zero"] == [0.25]
    assert recorder.trace.activations["1"]["zero"] == [0.5]


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), 0.01)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"every": 3}, {"updates": False}], ids=str)
def test_training_and_every_state_are_the_same_to_the_bit_with_and_without(make, options):
    models = [small_net(), small_net()]
    optimizers = [make(model) for model in models]
    keys = list(models[1].state_dict())
    recorder = gp.Recorder(models[1], optimizers[1], **options)
    assert list(models[1].state_dict()) == keys
    for model, optimizer in zip(models, optimizers, strict=True):
        torch.manual_seed(5)
        train(model, optimizer)
        after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))  # it draws no random number
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    plain, recorded = (optimizer.state_dict() for optimizer in optimizers)
    assert plain.keys() == recorded.keys()
    assert plain["param_groups"] == recorded["param_groups"]
    for key, state in plain["state"].items():
        for name, value in state.items():
            other = recorded["state"][key][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert len(recorder.trace.steps) == (2 if "every" in options else 6)
    assert bool(recorder.trace.updates) is options.get("updates", True)


def test_evaluation_without_gradients_is_not_recorded():
    model, x = small_net(), torch.randn(3, 4)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    model(x).sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(torch.full((3, 4), 100.0))
    optimizer.step()
    assert recorder.trace.activations["0"]["mean"] == [pytest.approx(gp_mean_before_step(x), rel=1e-5)]
    with torch.no_grad():
        model(x)
    optimizer.step()
    assert math.isnan(recorder.trace.activations["0"]["mean"][1])


def gp_mean_before_step(x):
    return small_net()[0](x).mean().item()


def test_accumulated_gradients_are_recorded_as_the_step_finds_them_and_the_last_pass_with_them():
    model, batches = small_net(), torch.randn(3, 5, 4)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    for x in batches:
        model(x).sum().backward()
    optimizer.step()
    assert recorder.trace.steps == [0]
    assert recorder.trace.gradients["2.bias"] == [pytest.approx(15 * math.sqrt(3))]
    assert recorder.trace.activations["0"]["mean"] == [pytest.approx(gp_mean_before_step(batches[2]), rel=1e-5)]


def test_clipping_before_the_step_shows_in_the_trace():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    model(torch.randn(5, 4)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert math.hypot(*(norms[0] for norms in recorder.trace.gradients.values())) == pytest.approx(1e-3, rel=1e-3)


def test_steps_that_a_scaler_skips_are_not_counted():
    model = small_net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    recorder = gp.Recorder(model, optimizer)
    for factor in (1.0, math.inf, 1.0, math.inf, 1.0):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.ones(5, 4)).float().sum() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert recorder.trace.steps == [0, 1, 2]
    assert recorder.trace.gradients["2.bias"] == pytest.approx([5 * math.sqrt(3)] * 3, rel=1e-2)
    assert all(map(math.isfinite, recorder.trace.updates["0.weight"]))


@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize("name", ["LBFGS", "SGD"])
def test_with_a_closure_the_gradients_are_those_of_its_first_call(name, as_keyword):
    model, x = small_net(), torch.randn(20, 4)
    twin = copy.deepcopy(model)
    optimizers = [getattr(torch.optim, name)(m.parameters(), lr=0.1) for m in (model, twin)]
    calls, wanted = [], []

    def closure(m, optimizer):
        optimizer.zero_grad()
        loss = m(x).square().mean()
        loss.backward()
        calls.append(m)
        return loss.detach()

    recorder = gp.Recorder(model, optimizers[0])
    losses = []
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(3):
            if m is twin:
                wanted.append(gp.gradient_norms(m, m(x).square().mean())["0.weight"])
            evaluate = lambda m=m, o=optimizer: closure(m, o)  # noqa: E731
            losses.append(float(optimizer.step(closure=evaluate) if as_keyword else optimizer.step(evaluate)))
    assert calls.count(model) == calls.count(twin) == (3 if name == "SGD" else len(calls) // 2)
    assert losses[:3] == losses[3:]
    assert recorder.trace.gradients["0.weight"] == pytest.approx(wanted, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_a_copy_of_the_model_a_saved_one_and_a_copy_of_the_optimizer_record_nothing():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    train(model, optimizer, 2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    seen = copy.deepcopy(recorder.trace)
    for other in (copy.deepcopy(model), loaded):
        assert torch.equal(other(torch.ones(2, 4)), model(torch.ones(2, 4)))
        train(other, sgd(other), 3)
    pair = copy.deepcopy((model, optimizer))
    train(*pair, 3)
    assert recorder.trace == seen
    train(model, optimizer, 1)
    assert recorder.trace.steps == [0, 1, 2]


def test_a_replica_that_shares_its_hooks_with_a_module_is_not_taken_for_it():
    model, x = small_net(), torch.randn(5, 4)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    model(x).sum().backward()
    replica = copy.copy(model[0])  # as data parallelism makes them
    assert replica._forward_hooks is model[0]._forward_hooks
    replica(100 * x)
    optimizer.step()
    assert recorder.trace.activations["0"]["mean"] == [pytest.approx(gp_mean_before_step(x), rel=1e-5)]


def test_closing_removes_every_hook_and_keeps_what_was_recorded():
    model = small_net()
    optimizer = sgd(model)
    with gp.Recorder(model, optimizer) as recorder:
        train(model, optimizer, 2)
    train(model, optimizer, 3)
    assert recorder.trace.steps == [0, 1]
    assert all(not module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    recorder.close()
    with pytest.raises(KeyError), gp.Recorder(model, optimizer) as recorder:
        raise KeyError
    assert all(not module._forward_hooks for module in model.modules())


def test_two_recorders_on_one_model_see_the_same():
    model = small_net()
    optimizer = sgd(model)
    one, other = gp.Recorder(model, optimizer), gp.Recorder(model, optimizer)
    train(model, optimizer)
    assert one.trace == other.trace


def test_reading_the_trace_while_training_changes_nothing():
    traces = []
    for reads in (False, True):
        model = small_net()
        optimizer = sgd(model)
        recorder = gp.Recorder(model, optimizer, every=2)
        train(model, optimizer, 150, (lambda r=recorder: r.trace) if reads else None)
        traces.append(recorder.trace)
    assert traces[0] == traces[1]
    assert traces[0].steps == list(range(0, 150, 2))


def test_a_module_used_twice_in_one_pass_shows_its_last_output():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    out = model(torch.randn(7, 3))
    out.sum().backward()
    optimizer.step()
    assert list(recorder.trace.activations) == ["0", "1"]
    assert list(recorder.trace.gradients) == ["0.weight", "0.bias"]
    assert recorder.trace.activations["0"]["std"] == [pytest.approx(out.std(correction=0).item(), rel=1e-4)]


def test_a_frozen_parameter_has_no_gradient_and_no_update_until_it_thaws():
    model = small_net()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    train(model, optimizer, 2)
    assert "0.weight" not in recorder.trace.gradients
    assert recorder.trace.updates["0.weight"] == [0.0, 0.0]
    model[0].requires_grad_(True)
    train(model, optimizer, 2)
    thawed = recorder.trace.gradients["0.weight"]
    assert [math.isnan(norm) for norm in thawed] == [True, True, False, False]
    assert recorder.trace.updates["0.weight"][3] > 0
    model[0].requires_grad_(False)
    train(model, optimizer, 1)
    assert math.isnan(recorder.trace.gradients["0.weight"][4])
    assert len(recorder.trace.gradients["2.bias"]) == 5


def test_parameters_and_layers_that_appear_later_are_recorded_from_then_on():
    model = small_net()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    recorder = gp.Recorder(model, optimizer)
    train(model, optimizer, 2)
    assert set(recorder.trace.gradients) == {"2.weight", "2.bias"}
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[3].parameters()]})
    train(model, optimizer, 2)
    trace = recorder.trace
    assert trace.steps == [0, 1, 2, 3]
    assert [math.isnan(norm) for norm in trace.gradients["3.weight"]] == [True, True, False, False]
    assert math.isfinite(trace.activations["3"]["std"][3])
    assert {len(column) for column in trace.gradients.values()} == {4}


def test_a_parameter_that_leaves_zero_has_an_infinite_update_and_one_that_stays_there_nan():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.bias)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gp.Recorder(model, optimizer)
    model(torch.zeros(3, 2)).sum().backward()
    optimizer.step()
    assert recorder.trace.updates["bias"] == [math.inf]
    assert math.isnan(recorder.trace.updates["weight"][0])


def test_updates_are_measured_where_they_are_far_too_small_to_square():
    model = nn.ParameterList([nn.Parameter(torch.full((3,), 1e-30))])
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    recorder = gp.Recorder(model, optimizer)
    model[0].grad = torch.full((3,), 1e-32)
    optimizer.step()
    assert recorder.trace.gradients["0"] == [pytest.approx(math.sqrt(3) * 1e-32, rel=1e-4)]
    assert recorder.trace.updates["0"] == [pytest.approx(1e-2, rel=1e-4)]


class Odd(nn.Module):
    """Outputs of every sort: half precision, integers, tuples, none, empty ones."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.parts = nn.ModuleDict({name: Say() for name in ("halved", "whole", "none", "empty", "words", "doubled")})

    def forward(self, x):
        out = self.linear(x)
        self.parts["halved"](out.bfloat16())
        self.parts["whole"](out.argmax(1))
        self.parts["none"](None)
        self.parts["empty"](out[:0])
        self.parts["words"]({"out": out})
        self.parts["doubled"]((out.double(), None))
        return out


class Say(nn.Module):
    def forward(self, x):
        return x


def test_outputs_that_have_no_mean_are_passed_over_and_half_precision_is_summed_in_float32():
    model, x = Odd(), torch.randn(4000, 3)
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    out = model(x)
    out.sum().backward()
    optimizer.step()
    activations = recorder.trace.activations
    assert set(activations) == {"linear", "parts.halved", "parts.doubled"}
    half = out.detach().bfloat16().double()
    assert activations["parts.halved"]["mean"] == [pytest.approx(half.mean().item(), abs=1e-5)]
    assert activations["parts.halved"]["std"] == [pytest.approx(half.std(correction=0).item(), rel=1e-4)]
    assert activations["parts.doubled"]["mean"] == [pytest.approx(out.double().mean().item(), rel=1e-6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_are_recorded(dtype):
    model = small_net(dtype)
    optimizer = sgd(model, momentum=0.0)
    recorder = gp.Recorder(model, optimizer)
    before = model[0].weight.detach().clone()
    train(model, optimizer, 1)
    change = oracle_norm(model[0].weight.detach().double() - before.double()) / oracle_norm(before)
    assert recorder.trace.updates["0.weight"] == [pytest.approx(change, rel=2e-2)]
    assert recorder.trace.gradients["0.weight"] == [pytest.approx(oracle_norm(model[0].weight.grad), rel=1e-5)]


def test_complex_and_sparse_parameters_are_recorded():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.tensor([3 + 4j, 0j]))
            self.table = nn.Embedding(5, 2, sparse=True)

        def forward(self, i):
            return (self.phase.abs()[:1].sum() + self.table(i)).sum()

    model = Both()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    recorder = gp.Recorder(model, optimizer)
    model(torch.tensor([1, 1])).backward()
    grads = {name: oracle_norm(p.grad) for name, p in model.named_parameters()}
    size = oracle_norm(model.table.weight)
    optimizer.step()
    assert {name: norms[0] for name, norms in recorder.trace.gradients.items()} == pytest.approx(grads, rel=1e-5)
    assert recorder.trace.updates["phase"] == [pytest.approx(0.5 * grads["phase"] / 5, rel=1e-5)]
    assert recorder.trace.updates["table.weight"] == [pytest.approx(0.5 * grads["table.weight"] / size, rel=1e-5)]


def test_a_layer_with_a_parametrised_weight_and_one_with_an_empty_child_are_watched_as_one():
    class Hollow(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.later = nn.Sequential()

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), Hollow())
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert list(recorder.trace.activations) == ["0"]
    assert all("parametrizations" in name for name in recorder.trace.gradients if name.startswith("0.p"))


def test_a_step_without_any_gradient_or_forward_pass_is_a_row_of_nan():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    optimizer.step()
    train(model, optimizer, 1)
    assert recorder.trace.steps == [0, 1]
    assert math.isnan(recorder.trace.gradients["0.weight"][0])
    assert math.isfinite(recorder.trace.gradients["0.weight"][1])
    assert math.isnan(recorder.trace.activations["0"]["std"][0])


def test_a_step_that_raises_is_not_recorded_and_the_next_one_is():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fails)
    train(model, optimizer, 1)
    assert recorder.trace.steps == [0]
    assert math.isfinite(recorder.trace.updates["0.weight"][0])


def test_a_recorder_refuses_what_it_cannot_record():
    model = small_net()
    for every in (0, -3):
        with pytest.raises(ValueError, match=f"every must be .*at least 1, got {every}"):
            gp.Recorder(model, sgd(model), every=every)
    with pytest.raises(ValueError, match="the optimizer holds none of the model's parameters"):
        gp.Recorder(model, sgd(small_net()))
    assert all(not module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------ what else looks at the model


class Wide(nn.Module):
    """A layer whose output has millions of equal entries."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        return x * self.weight


def test_statistics_of_millions_of_entries_are_right():
    model, x = Wide(), torch.arange(2**21).remainder(7).float()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = gp.Recorder(model, optimizer)
    out = model(x)
    out.sum().backward()
    optimizer.step()
    seen, values = recorder.trace.activations[""], out.detach().double().numpy()
    assert seen["std"] == [pytest.approx(values.std(), rel=1e-5)]
    assert seen["mean"] == [pytest.approx(values.mean(), rel=1e-5)]
    assert type(seen["zero"][0]) is float


WATCHERS = {
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "per-sample gradients": lambda m, x: torch.func.vmap(
        torch.func.grad(lambda p, row: torch.func.functional_call(m, p, (row,)).sum()), (None, 0)
    )(dict(m.named_parameters()), x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x[0]),
    "functional jacobian": lambda m, x: torch.autograd.functional.jacobian(m, x, vectorize=True),
    "export": lambda m, x: torch.export.export(m, (x,)).module()(x),
    "export, strict": lambda m, x: torch.export.export(m, (x,), strict=True).module()(x),
    "compile": lambda m, x: torch.compile(m, backend="eager", fullgraph=True)(x),
    "script": lambda m, x: torch.jit.script(m)(x),
    "trace": lambda m, x: torch.jit.trace(m, x)(x),
    "fx": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "flop counter": lambda m, x: counted(m, x),
    "meta": lambda m, x: torch.func.functional_call(
        m, {k: v.to("meta") for k, v in m.named_parameters()}, x.to("meta")
    ),
}


def on_meta(model, x):
    parameters = {name: parameter.to("meta") for name, parameter in model.named_parameters()}
    return torch.func.functional_call(model, parameters, x.to("meta"))


def counted(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", WATCHERS)
@pytest.mark.filterwarnings("ignore")
def test_what_transforms_or_reads_the_model_is_not_disturbed(name):
    torch.compiler.reset()
    x, plain, model = torch.randn(2, 4), small_net(), small_net()
    optimizer = sgd(model)
    expected = WATCHERS[name](plain, x)
    recorders = [gp.Recorder(model, optimizer), gp.Recorder(model, optimizer)]
    found = WATCHERS[name](model, x)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        assert not isinstance(a, torch.Tensor) or a.is_meta or torch.allclose(a, b)
    model(x).sum().backward()
    optimizer.step()
    assert recorders[0].trace == recorders[1].trace
    assert recorders[0].trace.activations["0"]["mean"] == [pytest.approx(gp_mean_before_step(x), rel=1e-4)]
    for recorder in recorders:
        recorder.close()
    assert not model[0]._forward_hooks
    WATCHERS[name](model, x)


def test_a_compiled_step_is_recorded_without_activations():
    torch.compiler.reset()
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    trace = recorder.trace
    assert trace.steps == [0, 1]
    assert all(map(math.isfinite, trace.gradients["0.weight"]))
    assert trace.activations == {}


# ------------------------------------------------------------------------------------------------ who steps, and when


def test_a_wrapped_optimizer_is_recorded_as_the_one_inside():
    traces = []
    for wrap in (lambda o: o, Delegating):
        model = small_net()
        optimizer = wrap(sgd(model))
        recorder = gp.Recorder(model, optimizer)
        train(model, optimizer, 3)
        traces.append(recorder.trace)
    assert traces[0] == traces[1]
    assert traces[0].steps == [0, 1, 2]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_no_step_fused_or_not(fused):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    recorder = gp.Recorder(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (True, True, False, True):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 8)).sum()).backward()
        if bad:
            model.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert recorder.trace.steps == [0]
    assert math.isfinite(recorder.trace.gradients["weight"][0])
    assert recorder.trace.updates["weight"][0] > 0


def test_the_step_by_which_a_checkpoint_makes_an_optimizers_state_is_none():
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = small_net()
    optimizer = torch.optim.Adam(model.parameters())
    recorder = gp.Recorder(model, optimizer)
    get_state_dict(model, optimizer)
    train(model, optimizer, 1)
    assert recorder.trace.steps == [0]
    assert math.isfinite(recorder.trace.gradients["0.weight"][0])


# ------------------------------------------------------------------------------------------- copies, errors, pictures


def test_a_copy_of_the_recorder_keeps_its_trace_and_records_nothing():
    model = small_net()
    optimizer = sgd(model)
    recorder = gp.Recorder(model, optimizer)
    train(model, optimizer, 2)
    other_model, other_optimizer, copied = copy.deepcopy((model, optimizer, recorder))
    train(other_model, other_optimizer, 2)
    assert copied.trace == recorder.trace
    assert copied.trace is not recorder.trace
    buffer = io.BytesIO()
    torch.save(recorder, buffer)
    buffer.seek(0)
    with torch.load(buffer, weights_only=False) as loaded:
        assert loaded.trace == recorder.trace
    train(model, optimizer, 1)
    assert recorder.trace.steps == [0, 1, 2]
    assert copied.trace.steps == loaded.trace.steps == [0, 1]


def test_an_interrupted_constructor_leaves_no_hook(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    model = small_net()
    optimizer = sgd(model)
    for place in ("torch.optim.Optimizer.register_step_post_hook", "torch.nn.Tanh.register_forward_hook"):
        with monkeypatch.context() as patched:
            patched.setattr(place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                gp.Recorder(model, optimizer)
        assert all(not module._forward_hooks for module in model.modules())
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    recorder = gp.Recorder(model, optimizer)
    train(model, optimizer, 1)
    assert list(recorder.trace.activations) == ["0", "1", "2"]


def test_a_recorder_says_what_was_given_instead():
    model = small_net()
    optimizer = sgd(model)
    for wrong, message in (
        (lambda: gp.Recorder(model.state_dict(), optimizer), "looks like a state dict"),
        (lambda: gp.Recorder(optimizer, model), "model must be a torch.nn.Module, got SGD"),
        (lambda: gp.Recorder(nn.Linear, optimizer), "is the class: make one"),
        (lambda: gp.Recorder(model, None), "optimizer must be a torch optimizer"),
        (lambda: gp.Recorder(model, torch.optim.SGD), "the class SGD: make one"),
        (lambda: gp.Recorder(model, model), "got a model"),
        (lambda: gp.Recorder(model, optimizer, every="2"), "every must be a whole number"),
        (lambda: gp.Recorder(model, optimizer, every=True), "every must be a whole number"),
        (lambda: gp.Recorder(model, optimizer, updates=None), "updates must be True or False"),
        (lambda: gp.Recorder(lazy := nn.LazyLinear(3), sgd(lazy)), "'weight' is lazy, without a shape"),
        (lambda: gp.Recorder(meta := nn.Linear(3, 3, device="meta"), sgd(meta)), "'weight' is on the meta device"),
    ):
        with pytest.raises(TypeError, match=message):
            wrong()
    for wrong in (2.5, math.nan, 10**400 * -1):
        with pytest.raises(ValueError, match="every"):
            gp.Recorder(model, optimizer, every=wrong)
    with pytest.raises(ValueError, match="one optimizer: make one for each"):
        gp.Recorder(model, [optimizer, sgd(model)])
    assert all(not module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("change", "to", "back"),
    [(torch.set_default_device, "meta", None), (torch.set_default_dtype, torch.bfloat16, torch.float32)],
    ids=["meta", "bfloat16"],
)
def test_torchs_defaults_change_no_number(change, to, back):
    x, traces = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), []
    for at in range(2):
        model = small_net()
        optimizer = sgd(model)
        recorder = gp.Recorder(model, optimizer)
        if at:
            change(to)
        try:
            for _ in range(2):
                model(x).sum().backward()
                optimizer.step()
            norms, traces = gp.gradient_norms(model), [*traces, recorder.trace]
            values = gp.jacobian_singular_values(model, x[0], k=2)
        finally:
            change(back)
    assert traces[0] == traces[1]
    assert norms == pytest.approx({name: norm[-1] for name, norm in traces[0].gradients.items()})
    assert torch.allclose(values, gp.jacobian_singular_values(model, x[0])[:2], rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_an_output_on_an_accelerator_has_the_numbers_that_it_has_on_the_cpu(dtype, on_accelerator):
    output = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).relu().to(dtype)
    wanted = [output.double().mean(), output.double().std(correction=0), (output == 0).double().mean()]
    for place in (lambda t: t, on_accelerator):
        assert [float(x) for x in _statistics(place(output))] == pytest.approx([float(x) for x in wanted], rel=1e-5)


def test_parameters_that_change_their_precision_or_their_shape_are_recorded_on():
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    recorder = gp.Recorder(layer, optimizer)

    def step(size):
        for p in layer.parameters():
            p.data.fill_(1.0)
            p.grad = torch.full_like(p, size)
        optimizer.step()

    step(0.5)
    layer.double()
    step(1e-12)  # which float32 would lose beside 1
    layer.weight.data = torch.ones(5, 4, dtype=torch.float64)
    step(0.25)
    assert recorder.trace.updates["weight"] == pytest.approx([0.5, 1e-12, 0.25], rel=1e-3)


@pytest.mark.parametrize(("wrong", "named"), [(1, "int"), (None, "NoneType"), ("yes", "str")])
def test_updates_are_wanted_or_not(wrong, named):
    layer = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=f"updates must be True or False, got {named}"):
        gp.Recorder(layer, torch.optim.SGD(layer.parameters(), lr=0.1), updates=wrong)

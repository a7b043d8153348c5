"""Does a network without its zero channels do the same, and is it what it was otherwise?"""

import copy
import sys
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import IMAGES, NETWORKS, Dense, Depthwise, Gated, Grouped, Residual, Shaped, silence_, size, trained
from torch import nn

import gradprune as gp
from gradprune.deploy.constant import inputs_like
from gradprune.lab import models

tp = pytest.importorskip("torch_pruning")


def apart(model, small, x):
    """How far outputs are apart, on other inputs than those that were shrunk with."""
    with torch.no_grad():
        a, b = model(torch.randn_like(x)), None
        torch.manual_seed(7)
        x = torch.randn_like(x)
        a, b = model(x), small(x)
    assert a.abs().max() > 1e-3
    return float((a - b).abs().max())


def shrunk(model, x, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = gp.shrink(model, x, **how)
    assert apart(model, small, x) < 1e-5
    return small


# ------------------------------------------------------------------------------------------------ what is coupled


def test_channels_inside_a_residual_block_go_and_those_of_the_sum_only_together():
    model = trained(Residual)
    silence_([model.body[0], model.body[1]], range(5))  # inside
    silence_([model.body[3], model.body[4]], range(6))  # one side of the sum
    silence_([model.stem[0], model.stem[1]], range(4, 8))  # the other: 4 and 5 are zero in both
    small = shrunk(model, IMAGES)
    assert small.body[0].out_channels == small.body[1].num_features == small.body[3].in_channels == 7
    assert small.stem[0].out_channels == small.body[3].out_channels == small.head.in_features == 6
    assert len(small.body[4].running_mean) == 6


def test_a_depthwise_filter_takes_its_channel_with_it_on_both_sides():
    model = trained(Depthwise)
    silence_([model.depthwise], [0, 3])
    silence_([model.expand, model.norm, model.depthwise], [5])
    small = shrunk(model, IMAGES)
    layer = small.depthwise
    assert layer.in_channels == layer.out_channels == layer.groups == small.expand.out_channels == 9
    assert small.norm.num_features == small.project.in_channels == 9


def test_what_a_zero_depthwise_filter_puts_out_by_its_bias_is_folded():
    model = trained(Depthwise)
    with torch.no_grad():
        model.depthwise.weight[[1, 2]] = 0  # its bias stays, and what reads it has no padding
        model.depthwise.bias[1] = 0.5
    small = shrunk(model, IMAGES)
    assert small.depthwise.groups == 10
    assert not torch.equal(small.project.bias, model.project.bias)


def test_grouped_convolutions_lose_equally_many_channels_in_each_group():
    model = trained(Grouped)
    silence_([model.first], [0, 1, 5, 8, 10, 11, 15])  # in groups of four: 2, 1, 3, 1
    silence_([model.grouped, model.norm], [0, 1, 6, 12, 13, 18])  # in groups of six: 2, 1, 2, 1; halves: 3, 3
    small = shrunk(model, IMAGES)
    assert (small.first.out_channels, small.grouped.in_channels) == (12, 12)
    assert small.grouped.out_channels == small.norm.num_features == small.second.in_channels == 20
    assert small.grouped.weight.shape == (20, 3, 3, 3)


def test_concatenated_channels_go_from_the_right_place_beside_the_networks_input():
    model = trained(Dense)
    silence_([model.first], [0, 4])
    silence_([model.second], [1])
    small = shrunk(model, IMAGES)
    assert small.second.weight.shape[:2] == (4, 7)
    assert small.third.in_channels == 11
    assert torch.equal(small.third.weight[:, :4], model.third.weight[:, [0, 2, 3, 4]])
    assert torch.equal(small.second.weight[:, :3], model.second.weight[[0, 2, 3, 4], :3])


def test_a_u_loses_channels_on_the_way_down_up_and_across():
    model = trained(Shaped)
    silence_([model.down1, model.norm], [0, 1])
    silence_([model.down2], range(6))
    silence_([model.middle], [3])
    silence_([model.up], [2, 7])
    silence_([model.across], [0])
    small = shrunk(model, IMAGES)
    assert small.across.weight.shape == (7, 12, 3, 3)
    assert small.up.weight.shape == (9, 6, 2, 2)
    assert small.down2.weight.shape == (10, 6, 3, 3)


def test_the_two_halves_of_a_gated_layer_go_together():
    model, x = trained(Gated), torch.randn(2, 5, 6)
    with torch.no_grad():
        model.up.weight[[0, 3, 24]] = 0  # a value, another, and the gate of the fourth
        model.up.bias[[0, 3, 24]] = 0
    small = shrunk(model, x)
    assert (small.up.out_features, small.down.in_features) == (34, 17)


def test_channels_that_nothing_reads_go_and_then_what_only_they_read():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    with torch.no_grad():
        model[4].weight[:, :3] = 0
        model[2].weight[3:, :5] = 0
    small = shrunk(model, torch.randn(3, 4))
    assert [tuple(layer.weight.shape) for layer in small[::2]] == [(3, 4), (3, 3), (2, 3)]


def test_flattened_maps_take_all_their_positions_with_them():
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 2))
    silence_([model[0]], [1, 4])
    assert shrunk(model, IMAGES)[3].in_features == 48


@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 10**6), share=st.sampled_from([0.3, 0.6, 1.0]))
def test_whatever_channels_are_zero_the_outputs_are_the_same(kind, seed, share):
    model = trained(NETWORKS[kind], seed)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d) and name not in ("out", "head"):
                norm = next((m for m in model.modules() if getattr(m, "num_features", 0) == layer.out_channels), None)
                gone = torch.nonzero(torch.rand(layer.out_channels) < share).flatten().tolist()
                silence_([layer] if norm is None else [layer, norm], gone)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            small = gp.shrink(model, IMAGES)
        except ValueError as error:  # the norm is another layer's, and this one's still gives constants
            small = model if "cannot be folded" in str(error) else None
        torch.manual_seed(seed)
        x = torch.randn(3, 3, 4, 4)
        assert torch.allclose(small(x), model(x), atol=1e-5)
        assert size(gp.shrink(small, IMAGES)) == size(small) if small is not model else True
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --------------------------------------------------------------------------------------------------- constants


def test_constants_are_folded_into_a_bias_that_is_made_where_there_is_none():
    model = trained(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 2, bias=False)))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = torch.tensor([1.0, -1.0, 0.5])
    small = shrunk(model, IMAGES)
    assert small[0].out_channels == 3
    assert small[2].bias.requires_grad
    assert model[2].bias is None


@pytest.mark.parametrize(
    ("build", "called"),
    [
        (lambda: nn.Conv2d(6, 4, 3, padding=1), r"'2' \(Conv2d\) pads its input with zeros"),
        (lambda: nn.Conv2d(6, 4, 3, padding="same"), r"'2' \(Conv2d\) pads its input with zeros"),
        (lambda: nn.ConvTranspose2d(6, 4, 2, stride=2), r"'2' \(ConvTranspose2d\) is transposed"),
        (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), r"'2' \(Conv2d\) pads its input with zeros"),
    ],
)
def test_a_constant_before_padding_is_an_error_that_names_the_operator(build, called):
    model = trained(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), build(), nn.Conv2d(build().out_channels, 2, 1))
    )
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 0.25
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"channel 2 of '0' .* as 0\.25, .* {called}.* cannot be folded"):
        gp.shrink(model, IMAGES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("padding", [{"padding_mode": "circular", "padding": 1}, {"padding": 0}])
def test_a_constant_before_padding_by_what_is_there_is_folded(padding):
    model = trained(lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 4, 3, **padding)))
    with torch.no_grad():
        model[0].weight[2] = 0
    assert shrunk(model, IMAGES)[0].out_channels == 5


def test_a_relu_that_is_off_on_every_example_is_not_taken_for_a_zero():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].bias[0] = -100.0
    small = gp.shrink(model, torch.rand(64, 4))
    assert small[0].out_features == 6
    x = 1000 * torch.randn(64, 4)
    assert torch.equal(model(x), small(x))


# --------------------------------------------------------------------------------------------- what stays, and why


@pytest.mark.parametrize("norm", [nn.LayerNorm([6, 4, 4]), nn.GroupNorm(2, 6)])
def test_channels_under_a_norm_over_channels_stay_with_a_warning(norm):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), norm, nn.Conv2d(6, 2, 1))
    silence_([model[0]], [0])
    with pytest.warns(UserWarning, match=r"channels of '0' are zero and stay: '1' .*normalises over channels"):
        small = gp.shrink(model, IMAGES)
    assert apart(model, small, IMAGES) == 0


def test_what_depends_on_the_position_stays_with_a_warning():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AvgPool2d(3, 1, padding=1), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        model[0].weight[0] = 0  # its bias is averaged with zeros at the edge
    with pytest.warns(UserWarning, match=r"channels of '0' are zero and stay: what reads them gets no constant"):
        small = gp.shrink(model, IMAGES)
    assert apart(model, small, IMAGES) == 0


class MixesChannels(nn.Module):
    """In a way that no graph of channels shows."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x)).softmax(-1))


def test_what_would_come_out_otherwise_is_put_back_and_the_rest_still_goes():
    model = MixesChannels()
    silence_([model.a, model.b], [0, 1])
    with pytest.warns(UserWarning, match=r"'b' are zero and stay: (without them output 0 differs|what reads)"):
        small = gp.shrink(model, torch.randn(3, 4))
    assert (small.a.out_features, small.b.out_features) == (6, 8)
    assert apart(model, small, torch.randn(3, 4)) < 1e-6


def test_one_channel_of_a_layer_stays_where_all_are_zero():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    silence_([model[0]], range(8))
    assert shrunk(model, torch.randn(3, 4))[0].out_features == 1


def test_outputs_of_the_network_stay():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    silence_([model[2]], [1])
    assert shrunk(model, torch.randn(3, 4))[2].out_features == 3


def test_layers_that_compute_their_weight_stay():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.nn.utils.parametrizations.spectral_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original[0] = 0
    assert gp.shrink(model, torch.randn(3, 4))[0].weight.shape == (8, 4)


# -------------------------------------------------------------------------------------------- what it is otherwise


def silenced_pair():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    silence_([model[0]], [0, 1, 2])
    return model


def test_a_model_without_zero_channels_comes_back_as_an_equal_copy():
    model = trained(Residual)
    small = shrunk(model, IMAGES)
    assert small is not model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), small.state_dict().values(), strict=True))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}


def test_masks_are_applied_to_the_copy_only():
    model = silenced_pair()
    masks = gp.prune(copy.deepcopy(model), sparsity=0.5, granularity="channel", include="0.*")
    before = copy.deepcopy(model.state_dict())
    small = gp.shrink(model, torch.randn(2, 4), masks)
    assert small[0].out_features == 4
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_modes_flags_and_hooks_are_those_of_before():
    model = silenced_pair()
    model[2].eval()
    model[0].weight.requires_grad_(False)
    model(torch.randn(2, 4)).sum().backward()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    small = gp.shrink(model, torch.randn(2, 4))
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in small.parameters()] == [False, True, True]
    assert all(p.grad is None for p in small.parameters())
    assert model[2].weight.grad is not None
    assert len(small[0]._forward_hooks) == 1
    assert not small[0]._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_stay(dtype):
    model = silenced_pair().to(dtype)
    small = gp.shrink(model, torch.randn(2, 4, dtype=dtype))
    assert small[0].out_features == 5
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_the_random_state_and_no_grad_of_the_caller_are_left_alone():
    model = silenced_pair()
    state = torch.get_rng_state()
    with torch.no_grad():
        assert gp.shrink(model, torch.randn(2, 4, generator=torch.Generator()))[0].out_features == 5
    assert torch.equal(state, torch.get_rng_state())


def test_a_shrunk_network_trains_and_keeps_its_widths():
    model = trained(Residual)
    silence_([model.body[0], model.body[1]], range(5))
    small = gp.shrink(model, IMAGES).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(small(IMAGES), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert small.body[0].out_channels == 7


def test_it_can_be_shrunk_again_and_copied_and_reported():
    model = silenced_pair()
    small = copy.deepcopy(gp.shrink(model, torch.randn(2, 4)))
    silence_([small[0]], [0])
    again = gp.shrink(small, torch.randn(2, 4))
    assert again[0].out_features == 4
    report = gp.report(again, torch.randn(2, 4))
    assert report.total.parameters == size(again) == 16 + 8 + 2
    assert report.total.flops < gp.report(model, torch.randn(2, 4)).total.flops


def test_tied_weights_stay_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.c((self.a(x) + self.b(-x)).relu())

    model = Tied()
    silence_([model.a, model.b], [0, 1])
    small = gp.shrink(model, torch.randn(2, 4))
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (4, 4)


def test_a_layer_that_is_called_twice_is_cut_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.b(self.b(self.a(x).relu()).relu()).relu())

    model = Twice()
    silence_([model.a, model.b], [0, 1])
    small = shrunk(model, torch.randn(2, 4))
    assert small.b.weight.shape == (4, 4)


# ------------------------------------------------------------------------------------------------------ refusals


def test_without_torch_pruning_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"gp.shrink needs Torch-Pruning: pip install 'gradprune\[deploy\]'"):
        gp.shrink(silenced_pair(), torch.randn(2, 4))


def test_a_network_that_cannot_be_followed_is_an_error_that_says_so():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                return self.a(x)

    with pytest.raises(ValueError, match=r"cannot follow this Detached from layer to layer.*no output depends"):
        gp.shrink(Detached(), torch.randn(2, 4))


def test_an_example_that_does_not_fit_is_shown_with_the_models_own_error():
    model, wrong = silenced_pair(), torch.randn(2, 5)
    before = copy.deepcopy(model.state_dict())
    for call in (gp.shrink, partial(gp.prune, sparsity=0.5, granularity="group", example=wrong)):
        with pytest.raises(ValueError, match=r"Sequential does not run .* \(2, 5\).* shapes cannot be multiplied"):
            call(model, wrong) if call is gp.shrink else call(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_wrong_arguments_are_refused_in_our_words():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        gp.shrink(silenced_pair().state_dict(), torch.randn(2, 4))
    with pytest.raises(TypeError, match=r"masks must be a mapping"):
        gp.shrink(silenced_pair(), torch.randn(2, 4), 0.5)
    with pytest.raises(ValueError, match=r"no parameter 'x'"):
        gp.shrink(silenced_pair(), torch.randn(2, 4), {"x": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(TypeError, match=r"script module"):
        gp.shrink(torch.jit.script(silenced_pair()), torch.randn(2, 4))


# --------------------------------------------------------------------------------------------- beside Torch-Pruning


def test_at_equal_channels_it_is_torch_prunings_own_network():
    """Torch-Pruning takes living channels out; with the same ones zeroed first, ours is as wide and gives the same."""
    model = trained(models.residual)
    x = torch.randn(4, 40)
    theirs, masked = copy.deepcopy(model), copy.deepcopy(model)
    pruner = tp.pruner.MagnitudePruner(
        theirs, x, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[theirs.head]
    )
    names = {module: name for name, module in theirs.named_modules()}
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            layer = names.get(dependency.target.module)
            if (
                layer is not None
                and pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                and hasattr(masked.get_submodule(layer), "weight")
            ):
                silence_([masked.get_submodule(layer)], channels)
        group.prune()
    small = shrunk(masked, x)
    shapes = [tuple(p.shape) for p in small.parameters()]
    assert shapes == [tuple(p.shape) for p in theirs.eval().parameters()]
    assert size(small) < 0.35 * size(model)
    with torch.no_grad():
        assert torch.allclose(small(x), theirs(x), atol=1e-5)
        assert not torch.allclose(small(x), model(x), atol=1e-2)


def test_inputs_near_the_example_hold_its_own_whole_numbers_and_leave_truth_values():
    tokens, where, waves = torch.arange(50), torch.arange(50) % 3 == 0, torch.polar(torch.ones(9), torch.arange(9.0))
    first, *near = inputs_like({"tokens": tokens, "where": where, "waves": waves, "one": torch.tensor(7)})
    assert first["tokens"] is tokens
    for each in near:
        assert not torch.equal(each["tokens"], tokens)
        assert torch.equal(each["tokens"].sort().values, tokens)
        assert torch.equal(each["where"], where)
        assert sorted(each["waves"].tolist(), key=str) == sorted(waves.tolist(), key=str)
        assert int(each["one"]) == 7

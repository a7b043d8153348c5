"""A quantized network keeps its zeros, its function to rounding and its way into a file."""

import copy
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import digits, gpt2, llama
from torch import nn

import gradprune as gp
from gradprune.lab import models

SCHEMES = ["int8", "int8_dynamic"]
X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(20).view(2, 10)


def apart(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# -------------------------------------------------------------------------------------------------------- what it does


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-30, 1e-5, 1.0, 1e4]),
    scheme=st.sampled_from(SCHEMES),
)
def test_a_weight_is_the_nearest_multiple_and_zero_is_zero(seed, dtype, scale, scheme):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(24, 6, dtype=torch.float64)
    weight = torch.randn(6, 24, generator=generator, dtype=torch.float64) * scale
    weight[torch.rand(6, 24, generator=generator) < 0.5] = 0
    weight[3] = 0
    layer = layer.to(dtype)
    layer.weight.data = weight.to(dtype)
    held = gp.quantize(layer, scheme).weight
    exact, step = layer.weight.double(), held.scale.double()
    assert held.qdata.dtype == torch.int8
    assert ((held.qdata.double() * step - exact).abs() <= 0.5001 * step).all()
    assert (held.qdata[layer.weight == 0] == 0).all()
    negative = copy.deepcopy(layer)
    negative.weight.data.neg_()
    assert torch.equal(gp.quantize(negative, scheme).weight.qdata, -held.qdata)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("build", [digits, gpt2, llama])
def test_the_outputs_are_those_of_the_rounded_network(build, scheme):
    model, inputs = build(), X if build is digits else IDS
    small = gp.quantize(model, scheme)
    run = (lambda m: m(inputs)) if build is digits else (lambda m: m(inputs).logits)
    rounded = gp.dequantize(small)
    assert 0 < apart(run(small), run(model)) < 0.05
    # Weights alone are rounded once; with the dynamic scheme the inputs are too, by half of 1/127 of the largest.
    assert apart(run(small), run(rounded)) < (1e-5 if scheme == "int8" else 0.05)
    assert not any(p.requires_grad for p in small.parameters() if p.dim() == 2 and hasattr(p, "qdata"))


def test_the_model_itself_is_not_changed():
    model = gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    model.train()
    small = gp.quantize(model, masks=gp.Masks({"transformer.h.0.mlp.c_fc.weight": torch.zeros(64, 256) > 1}))
    assert model.training
    assert not small.training
    assert kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert (small.transformer.h[0].mlp.c_fc.weight.qdata == 0).all()


def test_what_is_left_says_why():
    layers = {layer.name: layer for layer in gp.quantize(gpt2()).quantized.layers}
    assert layers["transformer.wte.weight"].reason == "is shared by several layers"  # with the head
    assert layers["transformer.wpe.weight"].reason == "is an embedding's"
    assert sum(layer.scheme == "int8" for layer in layers.values()) == 8
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.MultiheadAttention(8, 2), nn.Linear(8, 8, dtype=torch.float64))
    model.append(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))).append(nn.Linear(8, 4))
    reasons = {layer.name: layer.reason for layer in gp.quantize(model).quantized.layers}
    assert reasons["0.weight"] == "belongs to a Conv1d"
    assert "MultiheadAttention" in reasons["1.out_proj.weight"]
    assert reasons["2.weight"] == "is torch.float64"
    assert reasons["3.parametrizations.weight.original1"] == "is computed by a parametrization"
    assert reasons["4.weight"] == ""


def test_patterns_say_what_is_taken():
    small = gp.quantize(digits(), include="*.weight", exclude="2.*")
    assert [layer.reason for layer in small.quantized.layers] == ["", "is excluded"]
    assert [layer.reason for layer in gp.quantize(digits(), include="2.*").quantized.layers] == ["is not included", ""]


def test_the_table_counts_the_bytes():
    found = gp.quantize(digits()).quantized
    assert [layer.bytes_after for layer in found.layers] == [64 * 48 + 4 * 48, 48 * 10 + 4 * 10]
    assert str(found).endswith("2 of 2 matrices are int8: 3.78 kB instead of 14.2 kB")


def test_the_head_of_a_convolutional_network_is_taken_and_the_rest_is_left():
    torch.manual_seed(0)
    model, x = models.residual(8).eval(), torch.randn(4, 40)
    small = gp.quantize(model)
    taken = [layer.name for layer in small.quantized.layers if layer.scheme]
    assert len(taken) == 1
    assert apart(small(x), model(x)) < 0.02


# ---------------------------------------------------------------------------------------------------- in both orders


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pruned_then_quantized_the_zeros_stay(scheme):
    model = gpt2()
    masks = gp.prune(model, sparsity=0.7, exclude="*wte*")
    rounded = gp.dequantize(gp.quantize(model, scheme))
    for name, mask in masks.items():
        weight = rounded.get_parameter(name)
        assert (weight[~mask.t()] == 0).all()  # what was Conv1D is a Linear now


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_then_pruned_no_integer_that_stays_changes(dtype):
    first = gp.quantize(digits().to(dtype))
    rounded = gp.dequantize(first)
    masks = gp.prune(rounded, sparsity=0.5, scope="row")
    second = gp.quantize(rounded)
    for i in (0, 2):
        kept = masks[f"{i}.weight"]
        assert torch.equal(second[i].weight.qdata, first[i].weight.qdata * kept)
    assert masks.holds(gp.dequantize(second))


def test_a_quantized_network_is_not_pruned_and_the_error_says_how():
    small = gp.quantize(digits())
    with pytest.raises(TypeError, match=r"'0\.weight' is quantized: gp\.dequantize\(model\) gives its rounded values"):
        gp.prune(small, sparsity=0.5)
    with pytest.raises(ValueError, match=r"not eligible: '0\.weight' is quantized: gp\.dequantize"):
        gp.prune(small, sparsity=0.5, include="0.*")
    with pytest.raises(TypeError, match=r"'0\.weight' is quantized.*gp\.dequantize"):
        gp.Masks({"0.weight": torch.ones(48, 64) > 0}).apply_(small)
    mixed = gp.quantize(digits(), exclude="2.*")
    assert list(gp.prune(mixed, sparsity=0.5, exclude="0.*")) == ["2.weight"]


def test_held_masks_go_on_holding_the_model_that_was_quantized():
    model = digits()
    masks = gp.prune(model, sparsity=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks.hold(optimizer)
    gp.quantize(model)
    model(X).square().sum().backward()
    optimizer.step()
    assert masks.holds(model)
    assert (gp.quantize(model)[0].weight.qdata[~masks["0.weight"]] == 0).all()


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("build", [digits, gpt2, llama])
def test_a_quantized_network_is_saved_small_and_loaded_the_same(build, scheme, tmp_path):
    small, inputs = gp.quantize(build(), scheme), X if build is digits else IDS
    gp.save(small, tmp_path / "small.safetensors")
    found = gp.load(build(), tmp_path / "small.safetensors")
    a, b = small(inputs), found(inputs)
    assert torch.equal(a, b) if build is digits else torch.equal(a.logits, b.logits)
    assert [type(m) for m in small.modules()] == [type(m) for m in found.modules()]
    gp.pack(tmp_path / "small.safetensors", tmp_path / "packed.safetensors")
    gp.unpack(tmp_path / "packed.safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "small.safetensors").read_bytes()


def test_shrunk_and_quantized_goes_into_a_file_too(tmp_path):
    model = digits()
    gp.prune(model, sparsity=0.5, granularity="channel", include="0.*")
    small = gp.quantize(gp.shrink(model, X))
    gp.save(small, tmp_path / "small.safetensors")
    found = gp.load(digits(seed=1), tmp_path / "small.safetensors")
    assert torch.equal(found(X), small(X))
    assert found[0].out_features < 48


def test_a_narrower_model_is_refused(tmp_path):
    gp.save(gp.quantize(digits()), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"'0\.weight' has shape \(48, 64\)"):
        gp.load(nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10)), tmp_path / "small.safetensors")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_quantized_is_refused_in_words(monkeypatch):
    with pytest.raises(ValueError, match="scheme must be one of 'int8', 'int8_dynamic'; got 'int4'"):
        gp.quantize(digits(), "int4")
    with pytest.raises(ValueError, match=r"nothing to quantize: '0.weight' belongs to a Conv2d"):
        gp.quantize(nn.Sequential(nn.Conv2d(3, 3, 3)))
    with pytest.raises(ValueError, match=r"include pattern '9\.\*' matches none of '0.weight', '2.weight'"):
        gp.quantize(digits(), include="9.*")
    broken = digits()
    broken[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'2.weight' has weights that are infinite or NaN"):
        gp.quantize(broken)
    with pytest.raises(ValueError, match="no weight of the model is quantized"):
        gp.dequantize(digits())
    with pytest.raises(ValueError, match=r"nothing to quantize: '0.weight' is quantized already"):
        gp.quantize(gp.quantize(digits()))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ImportError, match=r"torchao: pip install 'gradprune\[deploy\]'"):
        gp.quantize(digits())


def test_without_vnni_the_integers_leave_room_for_a_sum_of_two_products(monkeypatch):
    """Two products of an unsigned and a signed number of eight bits are added in sixteen there."""
    from torchao import utils

    monkeypatch.setattr(utils, "should_reduce_range", lambda device: True)
    weight = gp.quantize(digits(), "int8_dynamic")[0].weight
    assert int(weight.qdata.abs().max()) == 63
    assert 2 * 255 * 63 < 2**15
    assert weight.act_quant_kwargs.reduce_range
    assert int(gp.quantize(digits(), "int8")[0].weight.qdata.abs().max()) == 127

"""What is a weight, along which axis are its outputs, and what is none."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from gradprune.core.layers import Axes, last_of, require_layers, stated_axes, weights_of
from gradprune.core.memory import require_own_memory


def only(model, name="weight"):
    return weights_of(model)[name]


# -------------------------------------------------------------------------------------------------------------- axes


def layers():
    for groups in (1, 2):
        for n, (conv, transposed) in enumerate(
            [(nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)], 1
        ):
            for kind in (conv, transposed):
                layer = kind(4, 6, 3, groups=groups)
                yield pytest.param(layer, (2, 4, *(5,) * n), id=f"{kind.__name__} in {groups} groups")
    yield pytest.param(nn.Linear(4, 6), (2, 4), id="Linear")


@pytest.mark.parametrize(("layer", "shape"), list(layers()))
def test_zeros_in_one_canonical_output_silence_that_output_alone(layer, shape):
    weight = only(layer)
    seen = weight.axes.canonical(weight.parameter.detach())
    matrices = seen.flatten(0, weight.axes.depth - 1) if weight.axes.depth else seen.unsqueeze(0)
    x, per_group = torch.randn(shape), matrices.shape[1]
    before, stored = layer(x).detach(), weight.parameter.detach().clone()
    for matrix in range(len(matrices)):
        for output in range(per_group):
            (seen[matrix] if weight.axes.depth else seen)[output] = 0
            after = layer(x).detach()
            unit = matrix * per_group + output
            others = [i for i in range(6) if i != unit]
            torch.testing.assert_close(after[:, others], before[:, others])
            assert torch.equal(after[:, unit], layer.bias[unit].detach().expand_as(after.movedim(1, -1)[..., unit]))
            weight.parameter.detach().copy_(stored)


@pytest.mark.parametrize("groups", [1, 2])
def test_zeros_in_one_canonical_input_make_a_transposed_convolution_deaf_to_it(groups):
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    weight = only(layer)
    seen = weight.axes.canonical(weight.parameter.detach())
    (seen[1] if groups == 2 else seen)[:, 1] = 0
    deaf = 3 if groups == 2 else 1
    x = torch.randn(2, 4, 5, 5)
    changed = [not torch.equal(layer(x), layer(x.index_add(1, torch.tensor([i]), x[:, :1] + 1))) for i in range(4)]
    assert changed == [i != deaf for i in range(4)]


def test_a_bilinear_layer_s_outputs_come_first():
    layer = nn.Bilinear(3, 4, 5, bias=False)
    only(layer).axes.canonical(layer.weight.detach())[2] = 0
    out = layer(torch.randn(2, 3), torch.randn(2, 4))
    assert (out == 0).all(0).tolist() == [False, False, True, False, False]


@settings(max_examples=60)
@given(data=st.data())
def test_the_canonical_order_is_a_view_with_the_axes_where_they_are_said_to_be(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    order = data.draw(st.permutations(range(len(sizes))))
    output, inputs, *others = order
    stack = tuple(sorted(others[: data.draw(st.integers(0, len(others)))]))
    tensor = torch.randn(sizes)
    seen = Axes(output, inputs, stack).canonical(tensor)
    rest = [axis for axis in range(len(sizes)) if axis not in (output, inputs, *stack)]
    assert torch.equal(seen, tensor.permute(*stack, output, inputs, *rest))
    seen.fill_(7.0)
    assert bool((tensor == 7).all())


def test_axes_that_a_caller_states_stack_what_comes_before_them():
    assert stated_axes("w", (2, 1), 3) == Axes(2, 1, (0,))
    assert stated_axes("w", (0, -1), 3) == Axes(0, 2)
    assert stated_axes("w", [-2, -1], 4) == Axes(2, 3, (0, 1))
    for wrong in (3, (0,), (0, 0), (0, 3), (0, -4), (True, 0), "01", (0.0, 1.0)):
        with pytest.raises(ValueError, match="the axes of 'w' must be"):
            stated_axes("w", wrong, 3)


@pytest.mark.parametrize(
    ("model", "packed", "plain"),
    [
        (nn.LSTM(4, 6, proj_size=3), ["weight_ih_l0", "weight_hh_l0"], ["weight_hr_l0"]),
        (nn.GRUCell(4, 6), ["weight_ih", "weight_hh"], []),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), ["in_proj_weight"], ["out_proj.weight"]),
        (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            [],
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
    ],
)
def test_packed_weights_are_known_as_such(model, packed, plain):
    found = {name: w for name, w in weights_of(model).items() if not w.reason}
    assert sorted(found) == sorted(packed + plain)
    assert all(w.axes == Axes() for w in found.values())
    assert sorted(name for name, w in found.items() if w.packed) == sorted(packed)


# ----------------------------------------------------------------------------------------------- what is no weight


class Raw(nn.Module):
    """Parameters in a module whose kind nobody knows."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))


class HandmadeRMSNorm(Raw):
    """A normalisation, by its name."""


class PatchEmbeddings(Raw):
    """An embedding, by its name."""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Raw(cls_token=(1, 1, 8)), "'cls_token'"),
        (Raw(pos_embed=(1, 5, 8)), "'pos_embed'"),
        (Raw(A_log=(8, 4)), "'A_log'"),
        (Raw(w=(8, 1)), "is a vector"),
        (Raw(w=(1, 8)), "is a vector"),
        (Raw(w=(8, 1, 1)), "is a vector"),
        (Raw(w=(1, 5, 8)), "is broadcast over its first axis"),
        (Raw(gate_up_proj_bias=(4, 16)), "is a bias"),
        (Raw(relative_position_bias_table=(49, 4)), "is a bias"),
        (Raw(scale_shift_table=(6, 8)), "'scale_shift_table'"),
        (HandmadeRMSNorm(weight=(2, 8)), "belongs to a HandmadeRMSNorm"),
        (PatchEmbeddings(weight=(9, 8)), "belongs to a PatchEmbeddings"),
        (PatchEmbeddings(mask=(9, 8)), "no matrix of a product"),
    ],
)
def test_what_is_called_or_shaped_otherwise_is_taken_for_no_weight(model, words):
    (weight,) = weights_of(model).values()
    assert words in weight.reason
    assert weight.guessed


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Embedding(5, 8), "an embedding's"),
        (nn.EmbeddingBag(5, 8), "an embedding's"),
        (nn.LayerNorm((4, 8), bias=False), "a normalisation's"),
        (Raw(w=(8,)), "has 1 dimension, fewer than two$"),
        (nn.ParameterList([nn.Parameter(torch.ones(3, 3, dtype=torch.int32), requires_grad=False)]), "int32"),
    ],
)
def test_what_can_be_no_weight_is_none_whatever_its_name(model, words):
    (weight,) = weights_of(model).values()
    assert not weight.guessed
    assert re.search(words, weight.reason)


@pytest.mark.parametrize(
    "model", [nn.Linear(8, 1, bias=False), nn.Linear(1, 8, bias=False), nn.Conv1d(1, 1, 1, bias=False)]
)
def test_the_weight_of_a_known_layer_is_one_whatever_its_shape(model):
    assert not only(model).reason


@pytest.mark.parametrize("shape", [(8, 4), (2, 2)])
@pytest.mark.parametrize("name", ["w", "proj", "kernel", "weight", "pos_proj_weight", "token_weight"])
def test_a_matrix_of_an_unknown_module_is_a_weight_without_known_axes(name, shape):
    (weight,) = weights_of(Raw(**{name: shape})).values()
    assert not weight.reason
    assert weight.axes is None


# ------------------------------------------------------------------------------------------------------------ names


def test_a_parameter_is_found_once_with_all_its_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4, bias=False)})
    model["c"].weight = shared.weight
    every = weights_of(model)
    assert list(every) == ["a.weight", "a.bias"]
    assert every["a.weight"].names == ("a.weight", "b.weight", "c.weight")
    names = [name for w in every.values() for name in w.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_a_head_tied_to_an_embedding_is_no_weight_and_says_to_which(first):
    parts = {"embedding": nn.Embedding(9, 8), "head": nn.Linear(8, 9, bias=False)}
    model = nn.ModuleDict({name: parts[name] for name in sorted(parts, key=lambda name: name != first)})
    model["head"].weight = model["embedding"].weight
    (weight,) = weights_of(model).values()
    assert "an embedding's" in weight.reason
    if first == "head":
        assert "tied to 'embedding.weight'" in weight.reason


def test_the_last_matrix_is_the_one_whose_last_name_comes_last():
    body, head = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleDict({"head": head, "body": body})
    assert last_of(model).name == "body.weight"
    model["again"] = head
    assert last_of(model).name == "head.weight"
    assert last_of(nn.ReLU()) is None


# -------------------------------------------------------------------------------------------------- parametrizations


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize(
    ("normed", "direction", "gain"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original1", "parametrizations.weight.original0"),
        (nn.utils.weight_norm, "weight_v", "weight_g"),
    ],
)
def test_the_direction_of_a_weight_norm_is_the_weight_and_its_gain_is_none(normed, direction, gain, dim):
    every = weights_of(normed(nn.ConvTranspose1d(4, 6, 3), dim=dim))
    assert every[direction].axes == Axes(1, 0)
    assert every[direction].attribute == "weight"
    assert not every[direction].reason
    assert every[direction].direction == tuple(axis for axis in range(3) if axis != dim)
    assert "gain" in every[gain].reason or "1 dimension" in every[gain].reason or "0 dimension" in every[gain].reason


@pytest.mark.parametrize("normed", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_multiple_of_the_weight_has_its_zeros(normed):
    layer = normed(nn.Linear(6, 4, bias=False))
    (weight,) = weights_of(layer).values()
    assert not weight.refused
    weight.parameter.detach()[weight.axes.output] = 0
    assert torch.equal(layer(torch.randn(3, 6))[:, 0], torch.zeros(3))


class AddLowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, w):
        return w + self.up @ self.down


@pytest.mark.parametrize("kind", ["orthogonal", "own"])
def test_a_parametrization_whose_zeros_are_not_the_layer_s_says_how_to_remove_it(kind):
    layer = nn.Linear(4, 4)
    if kind == "orthogonal":
        parametrizations.orthogonal(layer)
    else:
        parametrize.register_parametrization(layer, "weight", AddLowRank())
    every = weights_of(layer)
    assert "remove_parametrizations" in every["parametrizations.weight.original"].refused
    assert all(w.reason for name, w in every.items() if name.startswith("parametrizations.weight.0"))


# ------------------------------------------------------------------------------------------------- kinds that are lost


def test_models_that_lost_their_layers_kinds_are_refused():
    model = nn.Sequential(nn.Embedding(50, 8), nn.LayerNorm((3, 8)), nn.Flatten(), nn.Linear(24, 8))
    exported = torch.export.export(model, (torch.randint(0, 50, (2, 3)),))
    for lost in (exported.module(), torch.export.unflatten(exported)):
        with pytest.raises(TypeError, match=r"torch.export .*prune the model before you export"):
            require_layers(lost)
    single = torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),)).module()
    with pytest.raises(TypeError, match="prune the model before you export"):
        require_layers(nn.Sequential(single))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_refused():
    for lost in (torch.jit.script(nn.LSTM(3, 3)), torch.jit.trace(nn.Linear(3, 3), torch.randn(2, 3))):
        with pytest.raises(TypeError, match=r"script module .*before you script or trace"):
            require_layers(nn.ModuleDict({"part": lost}))


def test_models_that_keep_their_layers_kinds_are_taken():
    model = nn.Sequential(nn.Linear(3, 3))
    bare = nn.Module()
    bare.w = nn.Parameter(torch.randn(3, 3))
    for kept in (model, torch.compile(model), torch.fx.symbolic_trace(model), bare):
        require_layers(kept)
    assert "_orig_mod.0.weight" in weights_of(torch.compile(model))


# ------------------------------------------------------------------------------------------------------------ memory


def views(draw, storage):
    """Some view of a vector."""
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    strides = [draw(st.integers(1, 5)) for _ in shape]
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return storage.as_strided(shape, strides, draw(st.integers(0, storage.numel() - reach - 1)))


@settings(max_examples=200)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float16, torch.complex64]))
def test_two_views_are_refused_exactly_where_they_share_an_entry(data, dtype):
    storage = torch.zeros(40, dtype=dtype)
    first, second = views(data.draw, storage), views(data.draw, storage)
    places = torch.arange(40)
    entries = [places.as_strided(v.shape, v.stride(), v.storage_offset()).flatten().tolist() for v in (first, second)]
    twice = len(set(entries[0])) < len(entries[0])
    if set(entries[0]) & set(entries[1]):
        with pytest.raises(ValueError, match="'a' and 'b' share memory"):
            require_own_memory({"a": first}, {"a": first, "b": second})
    elif twice:
        with pytest.raises(ValueError, match="entries of 'a' share memory with each other"):
            require_own_memory({"a": first}, {"a": first, "b": second})
    else:
        require_own_memory({"a": first}, {"a": first, "b": second})
    require_own_memory({}, {"a": first, "b": second})


def test_views_of_another_dtype_share_memory_too():
    w = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="'w' and 'half' share memory"):
        require_own_memory({"w": w}, {"w": w, "half": w.view(torch.float16)[:1]})


def test_the_parts_of_one_flat_vector_are_taken_however_many():
    flat = torch.zeros(3000)
    parts = {str(i): flat[3 * i : 3 * i + 3] for i in range(1000)}
    require_own_memory(parts, parts | {"elsewhere": torch.zeros(3)})


def test_a_model_s_copy_is_looked_at_like_the_model():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    for name, weight in weights_of(copy.deepcopy(model)).items():
        ours = weights_of(model)[name]
        assert (weight.axes, weight.reason, weight.direction) == (ours.axes, ours.reason, ours.direction)


def of_transformers(name, **attributes):
    """A module of a kind that transformers has, which is known by its name."""
    kind = type(name, (nn.Module,), {"__module__": "transformers.models"})
    module = kind()
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    return module


STACK = (3, 4, 5)
KINDS_OF_TRANSFORMERS = {
    "Conv1D": ("Conv1D", "weight", (4, 5), {}, Axes(1, 0)),
    "a router": ("MixtralTopKRouter", "weight", (4, 5), {}, Axes()),
    "experts, inputs first": ("Llama4TextExperts", "gate_up_proj", STACK, {}, Axes(2, 1, (0,))),
    "experts, outputs first": ("JetMoeParallelExperts", "weight", STACK, {}, Axes(1, 2, (0,))),
    "experts that say inputs first": ("AnyExperts", "gate_up_proj", STACK, {"is_transposed": True}, Axes(2, 1, (0,))),
    "experts that say outputs first": ("AnyExperts", "down_proj", STACK, {"is_transposed": False}, Axes(1, 2, (0,))),
}


@pytest.mark.parametrize("case", KINDS_OF_TRANSFORMERS.values(), ids=KINDS_OF_TRANSFORMERS)
def test_layers_of_transformers_say_where_their_outputs_are(case):
    name, attribute, shape, more, axes = case
    layer = of_transformers(name, **{attribute: nn.Parameter(torch.ones(shape))}, **more)
    assert only(layer, attribute).axes == axes
    renamed = type(name, (nn.Module,), {"__module__": "elsewhere"})()  # of another library nothing is known
    setattr(renamed, attribute, nn.Parameter(torch.ones(shape)))
    assert only(renamed, attribute).axes is None


def test_a_stack_s_bias_and_a_matrix_beside_it_are_no_stack():
    layer = of_transformers(
        "Experts", is_transposed=True, up_bias=nn.Parameter(torch.ones(STACK)), gate=nn.Parameter(torch.ones(4, 5))
    )
    assert only(layer, "up_bias").reason == "is a bias"
    assert only(layer, "gate").axes is None


def test_a_parameter_that_layers_store_in_different_orders_has_no_outputs():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1))
    model[1].weight = model[0].weight
    found = only(model, "0.weight")
    assert found.names == ("0.weight", "1.weight")
    assert found.packed == "layers that store it in different orders share it"
    model[1] = nn.Conv1d(4, 4, 1)
    model[1].weight = model[0].weight
    assert only(model, "0.weight").packed == ""


def test_what_torchs_own_pruning_renamed_is_the_layer_s_weight():
    layer = nn.Conv1d(4, 6, 1)
    torch.nn.utils.prune.random_unstructured(layer, "weight", 0.5)
    found = only(layer, "weight_orig")
    assert (found.module, found.attribute, found.axes) == (layer, "weight", Axes())

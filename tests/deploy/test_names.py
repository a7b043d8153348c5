"""The rules about names tell the weights of real architectures as their layers do, and say what they go by."""

import re

import pytest
import torch

from gradprune.core.checkpoint import Memory
from gradprune.core.header import Entry
from gradprune.core.layers import Axes, weights_of
from gradprune.deploy import names
from gradprune.weights.eligible import eligible

pytest.importorskip("transformers")
from outside.test_architectures import MODELS, Conv1D, made

# What names do not tell: single letters, and the direction of a weight_norm, of which a row must not be emptied.
UNLIKE = {"XLNet": r"\.rel_attn\.[qkvor]$", "Wav2Vec 2": r"\.parametrizations\.weight\.original1$"}


def entry(name, *shape, dtype="F32"):
    return Entry(name, dtype, shape, 0, 4 * int(torch.tensor(shape).prod()))


def known(*entries, **config):
    return names.known(entries, config)


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_by_name_are_those_of_the_layers(name):
    model = made(name)
    part = Memory("m", model.state_dict(), {})
    found = names.known(part.header.entries.values(), model.config.to_dict())
    by_name = {key for key, it in found.items() if not it.reason}
    unlike = {key for key in eligible(model) if name in UNLIKE and re.search(UNLIKE[name], key)}
    assert by_name == eligible(model).keys() - unlike
    turned = {key for key in by_name if isinstance(model.get_submodule(key.rpartition(".")[0]), Conv1D)}
    assert {key for key in by_name if found[key].axes == Axes(1, 0)} == turned
    included = names.chosen(found, include=[*by_name, *(unlike - by_name)])
    assert included.keys() >= by_name


@pytest.mark.parametrize("name", MODELS)
def test_what_the_layers_say_is_taken_as_they_say_it(name):
    model = made(name)
    part = Memory("m", model.state_dict(), {})
    weights = {key: weight for weight in weights_of(model).values() for key in weight.names}
    found = names.told_by_layers(part.header.entries.values(), weights)
    told = [key for key, it in found.items() if not it.reason]
    directions = {key for key, weight in eligible(model).items() if weight.direction is not None}
    assert told == [key for key in eligible(model) if key not in directions]
    assert all(found[key].axes == weights[key].axes for key in told)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (entry("a.weight", 3), "has 1 dimension, fewer than two"),
        (entry("a.weight"), "has 0 dimensions, fewer than two"),
        (entry("a.weight", 2, 2, dtype="I8"), "is I8"),
        (entry("a.weight", 2, 2, dtype="F8_E4M3"), "is in eight bits, whose scale is elsewhere"),
        (entry("a.qweight_bias", 2, 2), "is a bias, by its name"),
        (entry("wte.weight", 2, 2), "is looked up or added, as an embedding, by its name"),
        (entry("x.position_embeddings.weight", 2, 2), "is looked up or added"),
        (entry("pos_embed", 1, 2, 2), "is looked up or added"),
        (entry("a.norm2.weight", 2, 2), "belongs to a normalisation, by its name"),
        (entry("a.weight_v", 2, 2), "is a part of which a layer computes its weight"),
        (entry("a.weight_mask", 2, 2), "is a part of which a layer computes its weight"),
        (entry("a.A_log", 2, 2), "is called 'A_log', which is no name of a weight"),
    ],
)
def test_what_is_no_weight_has_a_reason(given, says):
    assert says in known(given)[given.name].reason


@pytest.mark.parametrize(
    "given",
    [
        entry("weight", 2, 2),
        entry("layers.0.self_attn.q_proj.weight", 2, 2),
        entry("patch_embedding.weight", 2, 3, 4, 4),  # a convolution
        entry("rnn.weight_ih_l0", 8, 2),
        entry("attn.in_proj_weight", 6, 2),
        entry("experts.gate_up_proj", 2, 4, 4),
        entry("lm_head.weight", 9, 2),
    ],
)
def test_what_enters_a_product_is_a_weight(given):
    assert known(given)[given.name].reason == ""


def test_a_head_is_left_alone_only_where_config_json_ties_it():
    tensors = entry("model.embed_tokens.weight", 9, 2), entry("lm_head.weight", 9, 2)
    assert known(*tensors, tie_word_embeddings=False)["lm_head.weight"].reason == ""
    assert known(*tensors)["lm_head.weight"].reason == ""
    tied = known(*tensors, tie_word_embeddings=True)["lm_head.weight"].reason
    assert tied == known(*tensors, text_config={"tie_word_embeddings": True})["lm_head.weight"].reason
    assert tied == "is tied to an embedding, by config.json"


def test_layers_come_in_the_order_of_their_numbers():
    given = [entry(f"h.{i}.weight", 2, 2) for i in (10, 2, 1)]
    assert list(known(*given)) == ["h.1.weight", "h.2.weight", "h.10.weight"]


def test_include_may_take_what_only_a_name_rules_out():
    every = known(entry("a.weight", 2, 2), entry("wte.weight", 2, 2), entry("a.bias", 2))
    assert list(names.chosen(every)) == ["a.weight"]
    assert list(names.chosen(every, include="wte.*")) == ["wte.weight"]
    assert list(names.chosen(every, include="*")) == ["a.weight"]
    with pytest.raises(ValueError, match=r"matches only 'a.bias', which has 1 dimension"):
        names.chosen(every, include="*.bias")
    with pytest.raises(
        ValueError, match=r"none of the 3 tensors is a weight that include=None and exclude='a.*' leave"
    ):
        names.chosen(every, exclude="a.*")
    with pytest.raises(ValueError, match=r"^none of the 1 tensors is a weight$"):
        names.chosen(known(entry("a.bias", 2)))
    with pytest.raises(TypeError, match="include must be a glob pattern"):
        names.chosen(every, include=3)


def test_a_shape_that_is_not_the_model_s_is_an_error():
    weights = weights_of(torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"'weight' has shape \(2, 4\), by config.json it has \(2, 3\)"):
        names.told_by_layers([entry("weight", 2, 4)], weights)

"""A checkpoint that is pruned as a file has, bit for bit, the weights that ``prune`` leaves in the loaded model."""

import os
import re
import shutil
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from configurations; nothing is downloaded

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import gradprune as gp
from gradprune.core.checkpoint import File
from gradprune.deploy import stays, threshold
from gradprune.deploy.pruned import prune_file

tr = pytest.importorskip("transformers")

WAYS = {
    "half": {"sparsity": 0.5},
    "nine tenths": {"sparsity": 0.9},
    "one in a hundred": {"sparsity": 0.01},
    "nearly all": {"sparsity": 0.9995},
    "all": {"sparsity": 1.0},
    "none": {"sparsity": 0.0},
    "layer": {"sparsity": 0.7, "scope": "layer"},
    "erk": {"sparsity": 0.7, "scope": "erk"},
    "row": {"sparsity": 0.7, "scope": "row"},
    "2:4": {"granularity": "2:4"},
    "channel": {"sparsity": 0.5, "granularity": "channel"},
    "channel, layer": {"sparsity": 0.5, "granularity": "channel", "scope": "layer"},
    "blocks": {"sparsity": 0.5, "granularity": "4x4"},
    "lamp": {"sparsity": 0.7, "scope": "lamp"},
    "lamp, nearly all": {"sparsity": 0.999, "scope": "lamp"},
    "lamp, a floor": {"sparsity": 0.995, "scope": "lamp", "min_keep": 9},
    "threshold": {"threshold": 0.013},
    "threshold of nothing": {"threshold": 0.0},
    "threshold, at least": {"threshold": 10.0, "min_keep": 7},
    "at least": {"sparsity": 0.99, "min_keep": 20},
    "layer, at least": {"sparsity": 0.99, "scope": "layer", "min_keep": 20},
    "channel, threshold": {"threshold": 0.016, "granularity": "channel"},
    "blocks, at least": {"sparsity": 0.9, "granularity": "4x4", "min_keep": 64},
    "some": {"sparsity": 0.3, "include": "*.mlp.*", "exclude": "*.1.*"},
}


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = tr.GPT2Config(
        n_layer=11, n_embd=32, n_head=4, vocab_size=96, n_positions=32, bos_token_id=0, eos_token_id=1, pad_token_id=0
    )
    return tr.GPT2LMHeadModel(config).to(dtype)


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return tr.LlamaForCausalLM(tr.LlamaConfig(**sizes, **heads, **tokens)).to(dtype)


_saved = {}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Returns the folder of a saved model, in one file or in shards."""

    def save(make, dtype, shards):
        if (make, dtype, shards) not in _saved:
            folder = tmp_path_factory.mktemp("saved")
            make(dtype).save_pretrained(folder, **({"max_shard_size": "100KB"} if shards else {}))
            assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
            _saved[make, dtype, shards] = folder
        return _saved[make, dtype, shards]

    return save


def tensors_of(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def pruned(model, **way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gp.prune(model, **way)
    return model.state_dict()


def prune_quietly(*arguments, **way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prune_file(*arguments, **way)


def assert_same_bits(found, wanted):
    assert found
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)), name


# ------------------------------------------------------------------------------------------ the same as of the model


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_of_prune_on_the_loaded_gpt2(way, dtype, shards, saved, tmp_path):
    folder = saved(gpt2, dtype, shards)
    wanted = pruned(tr.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype), **WAYS[way])
    done = prune_quietly(folder, tmp_path / "out", by_name=True, **WAYS[way])
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors_of(folder).keys()
    assert "lm_head.weight" not in found  # tied, stored once
    assert_same_bits(found, wanted)
    assert done.pruned == sum(int((t == 0).sum()) - int((b == 0).sum()) for t, b in both(found, tensors_of(folder)))


def both(found, before):
    return [(found[name], before[name]) for name in found]


@pytest.mark.parametrize("way", ["half", "layer", "row", "2:4", "channel"])
def test_ties_are_resolved_in_the_order_of_the_model_s_layers_where_they_can_be_asked(way, saved, tmp_path):
    folder = saved(llama, torch.bfloat16, False)
    wanted = pruned(tr.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), **WAYS[way])
    done = prune_quietly(folder, tmp_path / "out", **WAYS[way])
    assert_same_bits(tensors_of(tmp_path / "out"), wanted)
    assert "was asked of LlamaForCausalLM" in done.notes[0]
    by_name = prune_quietly(folder, tmp_path / "named", by_name=True, **WAYS[way])
    assert by_name.pruned == done.pruned
    assert "told by their names" in by_name.notes[0]


def test_a_pruned_folder_is_loaded_by_transformers_as_it_is(saved, tmp_path):
    folder = saved(gpt2, torch.float32, True)
    prune_quietly(folder, tmp_path / "out", sparsity=0.5, by_name=True)
    model = tr.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    wanted = pruned(tr.GPT2LMHeadModel.from_pretrained(folder), sparsity=0.5)
    assert_same_bits(model.state_dict(), wanted)
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".json"}
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.suffix == ".json"}


SHAPES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=1, max_size=5)


@settings(max_examples=60)
@given(
    shapes=SHAPES,
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), min_size=5),
    few=st.sampled_from([1, 2, 7, 10**6]),
    sparsity=st.floats(0, 1),
    scope=st.sampled_from(["global", "layer", "erk", "row"]),
    seed=st.integers(0, 9),
)
def test_any_dtypes_ties_and_sparsity_give_the_weights_of_prune(
    shapes, dtypes, few, sparsity, scope, seed, tmp_path_factory
):
    """With pieces so small that the small tensors here are large."""
    torch.manual_seed(seed)
    model = nn.Module()
    for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False)):
        layer = nn.Linear(shape[1], shape[0]).to(dtype)
        with torch.no_grad():
            layer.weight.copy_((torch.randn(shape) * few).round() / few * (-1) ** i)
        model.add_module(str(i), layer)
    folder = tmp_path_factory.mktemp("any")
    save_file(model.state_dict(), folder / "model.safetensors")
    with pytest.MonkeyPatch.context() as patched:
        for module, name, value in (
            *((module, "VALUES", 64) for module in (threshold, stays)),
            *((stays, name, 100) for name in ("IN_MEMORY", "SLAB")),
            *((threshold, name, value) for name, value in (("BLOCKS", 8), ("IN_BLOCK", 4), ("BINS", 32))),
            (threshold, "GATHERED", 20),
        ):
            patched.setattr(module, name, value)
        done = prune_quietly(folder / "model.safetensors", folder / "out.safetensors", sparsity=sparsity, scope=scope)
    assert_same_bits(load_file(folder / "out.safetensors"), pruned(model, sparsity=sparsity, scope=scope))
    assert done.pruned == done.goal
    shutil.rmtree(folder)


def test_a_layer_that_would_become_empty_keeps_its_largest_as_in_prune(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
        model[2].weight.fill_(1e-9)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="'1.weight', '2.weight' would become empty"):
        prune_file(tmp_path / "m.safetensors", tmp_path / "out.safetensors", sparsity=0.9)
    found = load_file(tmp_path / "out.safetensors")
    assert int((found["1.weight"] != 0).sum()) == int((found["2.weight"] != 0).sum()) == 1
    assert_same_bits(found, pruned(model, sparsity=0.9))


def test_a_stored_order_of_config_json_is_heeded(saved, tmp_path):
    """GPT-2 stores [in, out]: two of four inputs stay, which are consecutive along the first axis."""
    folder = saved(gpt2, torch.float32, False)
    prune_quietly(folder, tmp_path / "out", granularity="2:4", by_name=True)
    weight = tensors_of(tmp_path / "out")["transformer.h.0.attn.c_attn.weight"]
    assert bool(((weight.view(8, 4, 96) != 0).sum(1) == 2).all())


# --------------------------------------------------------------------------------------------------- reads and writes


def test_the_file_is_read_at_most_twice_and_a_sample(tmp_path, monkeypatch):
    torch.manual_seed(0)
    save_file({f"{i}.weight": torch.randn(512, 2048) for i in range(8)}, tmp_path / "m.safetensors")
    size, read = (tmp_path / "m.safetensors").stat().st_size, []
    own = File.read
    monkeypatch.setattr(File, "read", lambda self, e, a, b: (read.append(b - a), own(self, e, a, b))[1])
    sample = threshold.BLOCKS * threshold.IN_BLOCK * 4
    for way, most in ((WAYS["half"], 2 * size + sample), (WAYS["layer"], size), (WAYS["2:4"], size)):
        read.clear()
        prune_quietly(tmp_path / "m.safetensors", tmp_path / "out.safetensors", **way)
        assert sum(read) <= most


def test_what_is_not_pruned_the_metadata_and_the_order_of_tensors_stay_to_the_byte(tmp_path):
    tensors = {
        "embed.weight": torch.randn(7, 3),
        "a.weight": torch.randn(5, 8, dtype=torch.bfloat16),
        "a.bias": torch.tensor([float("nan"), -0.0]),
        "steps": torch.tensor(3),
        "empty.weight": torch.empty(0, 4),
        "on": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "von": "Zoë"})
    prune_quietly(tmp_path / "m.safetensors", tmp_path / "out.safetensors", sparsity=0.0)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    prune_quietly(tmp_path / "m.safetensors", tmp_path / "out.safetensors", sparsity=0.5)
    a, b = (tmp_path / "m.safetensors").read_bytes(), (tmp_path / "out.safetensors").read_bytes()
    length = 8 + int.from_bytes(a[:8], "little")
    assert a[:length] == b[:length]
    found = load_file(tmp_path / "out.safetensors")
    assert int((found.pop("a.weight") == 0).sum()) == 20
    assert_same_bits(found, tensors)


def test_negative_zero_stays_where_it_stays_and_goes_to_zero_where_it_goes(tmp_path):
    save_file({"a.weight": torch.tensor([[-0.0, -1.0, 0.0, 2.0]])}, tmp_path / "m.safetensors")
    prune_quietly(tmp_path / "m.safetensors", tmp_path / "out.safetensors", sparsity=0.5)
    found = load_file(tmp_path / "out.safetensors")["a.weight"]
    assert found.tolist() == [[0.0, -1.0, 0.0, 2.0]]
    assert not bool(found[0, 0].signbit())


def test_a_file_may_be_its_own_target(tmp_path):
    save_file({"a.weight": torch.arange(1.0, 9).view(2, 4)}, tmp_path / "m.safetensors")
    prune_quietly(tmp_path / "m.safetensors", tmp_path / "m.safetensors", sparsity=0.5)
    assert load_file(tmp_path / "m.safetensors")["a.weight"].tolist() == [[0, 0, 0, 0], [5, 6, 7, 8]]
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_state_dict_of_torch_save_is_pruned_into_a_safetensors_file_with_tied_tensors_once(tmp_path):
    model = gpt2()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    prune_quietly(tmp_path / "m.pt", tmp_path / "out.safetensors", sparsity=0.6)
    found = load_file(tmp_path / "out.safetensors")
    assert "lm_head.weight" not in found
    wanted = pruned(model, sparsity=0.6)
    assert_same_bits(found, wanted)


def test_a_dry_run_says_what_would_be_done_and_reads_and_writes_nothing(tmp_path, monkeypatch):
    save_file({"a.weight": torch.ones(4, 4), "norm.weight": torch.ones(4)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(File, "read", None)
    told = prune_file(tmp_path / "m.safetensors", sparsity=0.5, dry_run=True)
    assert (told.goal, told.weights, told.done) == (8, 16, False)
    assert [(row.name, bool(row.reason)) for row in told.rows] == [("a.weight", False), ("norm.weight", True)]
    assert len(list(tmp_path.iterdir())) == 1


TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


@pytest.mark.parametrize("way", ["half", "layer", "row", "erk", "lamp", "2:4", "channel"])
def test_names_of_before_are_those_of_the_loaded_model(way, tmp_path):
    torch.manual_seed(0)
    tr.GPTNeoXForCausalLM(tr.GPTNeoXConfig(**TEXT)).save_pretrained(tmp_path / "in")
    tensors = tensors_of(tmp_path / "in")
    tensors["embed_out.weight"] = tensors.pop("lm_head.weight", tensors.get("embed_out.weight"))  # as Pythia's are
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    done = prune_quietly(tmp_path / "in", tmp_path / "out", **WAYS[way])
    assert "was asked of GPTNeoXForCausalLM" in done.notes[0]
    wanted = pruned(tr.GPTNeoXForCausalLM.from_pretrained(tmp_path / "in"), **WAYS[way])
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert float((found["embed_out.weight"] == 0).double().mean()) > 0.1  # a head is a weight
    found["lm_head.weight"] = found.pop("embed_out.weight")
    assert_same_bits(found, wanted)


def test_the_head_of_pythia_is_a_weight_by_its_name_too(tmp_path):
    save_file({"embed_out.weight": torch.randn(8, 4), "embed_in.weight": torch.randn(8, 4)}, tmp_path / "m.safetensors")
    told = prune_quietly(tmp_path / "m.safetensors", sparsity=0.5, dry_run=True)
    assert [row.name for row in told.rows if not row.reason] == ["embed_out.weight"]


def test_where_loading_makes_other_tensors_a_note_says_so(tmp_path):
    config = tr.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
    tr.MixtralForCausalLM(config).save_pretrained(tmp_path / "in")
    tensors = tensors_of(tmp_path / "in")
    if not any(".experts.0.w1." in name for name in tensors):
        pytest.skip("this transformers stores experts as it holds them")
    done = prune_quietly(tmp_path / "in", tmp_path / "out", sparsity=0.5, scope="layer")
    assert any("makes other tensors of 'model.layers.0." in note for note in done.notes)
    assert done.pruned == done.weights // 2


@pytest.mark.parametrize("name", ["m.pt", "out.pth", "out.bin", "out.ckpt"])
def test_a_name_by_which_it_would_be_read_as_a_pickle_is_refused(name, tmp_path):
    torch.save({"a.weight": torch.randn(4, 4)}, tmp_path / "m.pt")
    before = (tmp_path / "m.pt").read_bytes()
    with pytest.raises(ValueError, match=f"the output is written as safetensors.*call it '{name[:-3].rstrip('.')[:3]}"):
        prune_quietly(tmp_path / "m.pt", tmp_path / name, sparsity=0.5)
    assert (tmp_path / "m.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    gp.pack(tmp_path / "m.pt", tmp_path / "packed")
    with pytest.raises(ValueError, match="into is written as safetensors"):
        gp.unpack(tmp_path / "packed", tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ({}, "a sparsity is missing"),
        ({"sparsity": 1.2}, "sparsity must be in [0, 1], got 1.2"),
        ({"threshold": 0.5, "scope": "lamp"}, "scope='lamp' shares out a sparsity; it does not go with a threshold"),
        ({"sparsity": 0.5, "threshold": 0.5}, "give a sparsity or a threshold, not both"),
        ({"sparsity": 0.5, "min_keep": -1}, "min_keep must be at least 0"),
        ({"sparsity": 0.9, "min_keep": 30}, "min_keep=30 needs"),
        ({"threshold": 0.1, "granularity": "2:4"}, "2:4 is itself a sparsity of 0.5"),
        (
            {"sparsity": 0.5, "scope": "wide"},
            "global, layer, row, erk, lamp for files, got 'wide'",
        ),
        ({"sparsity": 0.6, "granularity": "2:4"}, "2:4 is itself a sparsity of 0.5"),
        ({"granularity": "2:4", "scope": "row"}, "leaves nothing to allocate"),
        ({"sparsity": 0.5, "granularity": "channel", "scope": "row"}, "scope='row' prunes single weights"),
        ({"granularity": "2:3"}, "not a multiple of 3"),
        ({"sparsity": 0.5, "granularity": "many"}, "granularity must be"),
        ({"sparsity": 0.5, "include": "a"}, "include pattern 'a' matches no tensor; did you mean 'a.*'?"),
        ({"sparsity": 0.5, "include": "norm.*"}, "matches only 'norm.weight', which has 1 dimension, fewer than two"),
        (
            {"sparsity": 0.5, "exclude": "*"},
            "none of the 4 tensors is a weight that include=None and exclude='*' leave",
        ),
        ({"sparsity": 0.5, "granularity": "channel", "include": "rnn.*"}, "packs the gates of a recurrent layer"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(way, says, tmp_path):
    tensors = {"a.weight": torch.ones(4, 8), "norm.weight": torch.ones(4), "rnn.weight_hh_l0": torch.ones(8, 4)}
    save_file(tensors | {"experts.down_proj": torch.ones(2, 4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=re.escape(says)):
        prune_file(tmp_path / "m.safetensors", tmp_path / "out.safetensors", **{"exclude": "experts.*", **way})
    assert len(list(tmp_path.iterdir())) == 1


def test_a_stack_whose_axes_are_not_known_is_refused_where_they_matter(tmp_path):
    save_file({"experts.down_proj": torch.ones(2, 4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"which axis of 'experts.down_proj', \(2, 4, 4\), is the output"):
        prune_file(tmp_path / "m.safetensors", tmp_path / "out.safetensors", granularity="2:4")
    prune_quietly(tmp_path / "m.safetensors", tmp_path / "out.safetensors", sparsity=0.5)


@pytest.mark.parametrize("way", ["half", "layer", "row", "2:4", "channel"])
def test_a_nan_is_an_error_that_names_its_tensor_and_leaves_what_was_there(way, tmp_path):
    weight = torch.ones(4, 8)
    weight[2, 3] = float("nan")
    save_file({"a.weight": torch.ones(4, 8), "b.weight": weight}, tmp_path / "m.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"before")
    with pytest.raises(ValueError, match=r"b\.weight.*NaN"):
        prune_quietly(tmp_path / "m.safetensors", tmp_path / "out.safetensors", **WAYS[way])
    assert (tmp_path / "out.safetensors").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 2


def test_eight_bit_floats_are_refused_by_name(tmp_path):
    tensors = {"a.weight": torch.ones(4, 8).to(torch.float8_e4m3fn), "b.weight": torch.ones(4, 8)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"'a.weight' is in eight bits, whose scale is elsewhere: prune it before"):
        prune_file(tmp_path / "m.safetensors", tmp_path / "out.safetensors", sparsity=0.5)
    prune_quietly(tmp_path / "m.safetensors", tmp_path / "out.safetensors", sparsity=0.5, exclude="a.*")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["a.weight"].view(torch.uint8), tensors["a.weight"].view(torch.uint8))
    assert int((found["b.weight"] == 0).sum()) == 16


def test_what_is_ranked_in_memory_is_refused_where_it_is_too_much(tmp_path, monkeypatch):
    save_file({"a.weight": torch.ones(40, 80)}, tmp_path / "m.safetensors")
    monkeypatch.setattr(stays, "MOST_HELD", 1000)
    for way in ({"sparsity": 0.5}, {"threshold": 0.5}):
        with pytest.raises(ValueError, match=r"these are 3,200: .* load the model and call gp\.prune"):
            prune_file(tmp_path / "m.safetensors", tmp_path / "p.safetensors", min_keep=3, **way)
    assert not (tmp_path / "p.safetensors").exists()
    prune_file(tmp_path / "m.safetensors", tmp_path / "p.safetensors", sparsity=0.5, scope="layer", min_keep=3)

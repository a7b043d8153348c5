"""Real architectures, made small: what is pruned in them, which axis is the output, and that they still run."""

import copy
import os
import warnings
from fnmatch import fnmatchcase

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from configurations; nothing is downloaded

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.core.layers import weights_of
from gradprune.weights.eligible import eligible

tr = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

VOCABULARY = 96
TEXT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = GROUPED | {"num_local_experts": 4}
HEADS = {"head_dim": 8}
IMAGE = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
CONVOLUTIONS = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10}


def whisper():
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 20, "max_target_positions": 20}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return tr.WhisperForConditionalGeneration(
        tr.WhisperConfig(d_model=32, vocab_size=VOCABULARY, num_mel_bins=16, **sizes, **tokens)
    )


def wav2vec2():
    convolutions = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    return tr.Wav2Vec2ForCTC(tr.Wav2Vec2Config(**TEXT, **convolutions, **positions))


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
    return tr.T5ForConditionalGeneration(tr.T5Config(**sizes, tie_word_embeddings=True))


MODELS = {
    "BERT": lambda: tr.BertForSequenceClassification(tr.BertConfig(**TEXT)),
    "GPT-2": lambda: tr.GPT2LMHeadModel(
        tr.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=VOCABULARY, n_positions=32)
    ),
    "Llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED)),
    "Llama 4": lambda: tr.Llama4ForCausalLM(tr.Llama4TextConfig(**EXPERTS, **HEADS, intermediate_size_mlp=64)),
    "Mixtral": lambda: tr.MixtralForCausalLM(tr.MixtralConfig(**EXPERTS)),
    "gpt-oss": lambda: tr.GptOssForCausalLM(tr.GptOssConfig(**EXPERTS, **HEADS, layer_types=["full_attention"] * 2)),
    "Qwen 3": lambda: tr.Qwen3ForCausalLM(tr.Qwen3Config(**GROUPED, **HEADS)),
    "Gemma 3": lambda: tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**GROUPED, **HEADS)),
    "T5": t5,
    "XLNet": lambda: tr.XLNetForSequenceClassification(
        tr.XLNetConfig(vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64)
    ),
    "Mamba": lambda: tr.MambaForCausalLM(
        tr.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=VOCABULARY)
    ),
    "ViT": lambda: tr.ViTForImageClassification(tr.ViTConfig(**IMAGE, num_labels=10)),
    "Swin": lambda: tr.SwinForImageClassification(
        tr.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    ),
    "ResNet": lambda: tr.ResNetForImageClassification(
        tr.ResNetConfig(embedding_size=16, layer_type="basic", **CONVOLUTIONS)
    ),
    "ConvNeXt": lambda: tr.ConvNextForImageClassification(tr.ConvNextConfig(num_stages=2, **CONVOLUTIONS)),
    "Wav2Vec 2": wav2vec2,
    "Whisper": whisper,
}
# Eligible, beside the weights of linear layers and convolutions that are not tied to an embedding.
ALSO = {
    "Mixtral": ["*.experts.gate_up_proj", "*.experts.down_proj", "*.mlp.gate.weight"],
    "gpt-oss": ["*.experts.gate_up_proj", "*.experts.down_proj", "*.router.weight"],
    "Llama 4": ["*.experts.gate_up_proj", "*.experts.down_proj"],
    "Wav2Vec 2": ["*.parametrizations.weight.original1"],
    "XLNet": ["*.rel_attn.[qkvor]"],
}
TIED = {"GPT-2": "lm_head", "Gemma 3": "lm_head", "Mamba": "lm_head", "T5": "lm_head", "Whisper": "proj_out"}
LAYERS = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)

_made = {}


def made(name):
    """A copy of the model, in eval mode, and inputs for it."""
    if name not in _made:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1)  # some are made without values, some constant
        _made[name] = model
    return copy.deepcopy(_made[name])


def outputs(name, model):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    inputs = {"input_ids": ids}
    if name in ("T5",):
        inputs = {"input_ids": ids, "decoder_input_ids": ids}
    elif name == "Whisper":
        inputs = {"input_features": torch.randn(2, 16, 40, generator=generator), "decoder_input_ids": ids}
    elif name == "Wav2Vec 2":
        inputs = {"input_values": torch.randn(2, 400, generator=generator)}
    elif model.main_input_name == "pixel_values":
        size = 16 if name == "ViT" else 32
        inputs = {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    with torch.no_grad():
        return model(**inputs).logits


def expected(name, model):
    """The names of what is to be eligible, from the kinds of layers alone."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    plain = {
        f"{path}.weight"
        for path, m in model.named_modules()
        if isinstance(m, LAYERS) and "weight" in m._parameters and id(m.weight) not in embeddings
    }
    every = dict(model.named_parameters())
    also = {n for n in every if any(fnmatchcase(n, pattern) for pattern in ALSO.get(name, []))}
    assert len(also) >= len(ALSO.get(name, []))
    return plain | also


def rows_of(model, name, mask):
    """A mask as (rows, all else), one row an output of one matrix, from what the layer's forward does."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, Conv1D):
        return mask.T
    if mask.dim() == 3 and "experts" in name:
        transposed = "GptOss" in type(module).__name__ or "Llama4" in type(module).__name__
        return (mask.transpose(1, 2) if transposed else mask).flatten(0, 1)
    return mask.flatten(1)


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", MODELS)
def test_the_matrices_of_products_are_eligible_and_nothing_else_is(name):
    model = made(name)
    assert set(eligible(model)) == expected(name, model)
    every = weights_of(model)
    assert list(every) == [n for n, _ in model.named_parameters()]
    assert sorted(n for w in every.values() for n in w.names) == sorted(
        n for n, _ in model.named_parameters(remove_duplicate=False)
    )
    if name in TIED:
        (tied,) = [w for w in every.values() if f"{TIED[name]}.weight" in w.names]
        assert "embedding" in tied.reason
        with pytest.raises(ValueError, match=f"{TIED[name]}.weight' is tied to .*embedding"):
            gp.prune(model, sparsity=0.5, include=f"{TIED[name]}.weight")
        gp.prune(model, sparsity=0.5, exclude=f"{TIED[name]}.weight")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("score", [gp.magnitude, gp.random])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_exactly_the_wanted_number_of_weights_goes_and_the_model_runs(name, score, sparsity):
    model = made(name)
    before = {n: int((p == 0).sum()) for n, p in model.named_parameters()}
    masks = gp.prune(model, score, sparsity=sparsity)
    names = expected(name, model)
    zeros = {n: int((p == 0).sum()) for n, p in model.named_parameters()}
    weights = sum(model.get_parameter(n).numel() for n in names)
    assert sum(zeros[n] for n in names) == round(sparsity * weights) == sum(int((~m).sum()) for m in masks.values())
    assert {n: zeros[n] for n in zeros if n not in names} == {n: before[n] for n in before if n not in names}
    assert bool(outputs(name, model).isfinite().all())


def independent_of(function, x, axis, at):
    """Whether the function's value stays when one feature of its input changes."""
    other = x.clone()
    other.select(axis, at).add_(1.0)
    with torch.no_grad():
        return torch.equal(function(x), function(other))


@pytest.mark.parametrize("name", MODELS)
def test_an_output_s_zeros_silence_that_output_and_an_input_s_zeros_make_the_layer_deaf_to_it(name):
    model = made(name)
    checked = 0
    for weight in eligible(model).values():
        module, tensor = weight.module, weight.parameter.detach()
        if not isinstance(module, LAYERS) or isinstance(module, tr.models.llama4.modeling_llama4.Llama4Router):
            continue  # the router is a linear layer that returns more than its product
        assert weight.axes is not None
        linear = isinstance(module, nn.Linear | Conv1D)
        width = getattr(module, "in_features", getattr(module, "nx", getattr(module, "in_channels", None)))
        shape = (3, width) if linear else (2, width, *(12,) * (tensor.dim() - 2))
        x = torch.randn(shape)
        stored, seen = tensor.clone(), weight.axes.canonical(tensor)
        assert seen.data_ptr() == tensor.data_ptr()
        with torch.no_grad():
            dense = module(x)
            unit = seen.shape[0] - 1
            seen[unit] = 0
            silent = module(x)
            if weight.direction is None:  # else the others are scaled, as their norms lose a part
                assert torch.equal(silent[:, :unit], dense[:, :unit])
            assert torch.all(silent[:, unit] == (0 if module.bias is None else module.bias[unit]))
            assert not torch.equal(dense[:, unit], silent[:, unit])
            tensor.copy_(stored)
            if linear:
                assert not independent_of(module, x, 1, width - 1)
                seen[:, width - 1] = 0
                assert independent_of(module, x, 1, width - 1)
                tensor.copy_(stored)
        checked += 1
    assert checked > 5


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "Llama 4"])
def test_experts_are_a_stack_of_matrices_whose_axes_are_those_of_their_products(name):
    model = made(name)
    found = [w for w in eligible(model).values() if "experts" in w.name]
    assert found
    for weight in found:
        assert weight.axes is not None
        assert weight.axes.stack == (0,)
        module, tensor = weight.module, weight.parameter.detach()
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"

        def forward(x, module=module):
            if name == "Llama 4":
                return module(x.repeat(4, 1))
            return module(x, torch.zeros(len(x), 1, dtype=torch.long), torch.ones(len(x), 1))

        x, seen = torch.randn(6, 32), weight.axes.canonical(tensor)
        if weight.attribute == "gate_up_proj":
            assert seen.shape == (4, 128, 32)
            assert not independent_of(forward, x, 1, 5)
            seen[:, :, 5] = 0
            assert independent_of(forward, x, 1, 5)
        else:
            assert seen.shape == (4, 32, 64)
            seen[:, 5] = 0
            with torch.no_grad():
                out = forward(x)
            assert torch.equal(out[:, 5], out[:1, 5].expand(len(out)))
            assert not torch.equal(out[:, 4], out[:1, 4].expand(len(out)))


def unfit(name, model):
    """The names of the weights whose inputs four does not divide, or whose layer does not say which they are."""
    names = []
    for path in expected(name, model):
        module = model.get_submodule(path.rpartition(".")[0])
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d)
        narrow = isinstance(module, nn.Linear) and module.in_features % 4
        if (
            narrow
            or (convolution and module.in_channels // module.groups % 4)
            or fnmatchcase(path, "*.rel_attn.[qkvor]")
        ):
            names.append(path)
    return names


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:outputs of")
def test_channels_go_whole_along_the_outputs(name):
    model = made(name)
    exclude = "*.rel_attn.[qkvor]" if name == "XLNet" else None
    if exclude:
        with pytest.raises(ValueError, match=r"which axis of .*rel_attn.*is not known: say it by axes="):
            gp.prune(model, sparsity=0.5, granularity="channel")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="taken as")  # every layer's kind is known
        masks = gp.prune(model, sparsity=0.5, granularity="channel", exclude=exclude)
    assert masks.sparsity == pytest.approx(0.5, abs=0.1)
    for n, mask in masks.items():
        if "original1" not in n:
            rows = rows_of(model, n, mask)
            assert bool((rows.all(1) | ~rows.any(1)).all()), n
    assert bool(outputs(name, model).isfinite().all())


@pytest.mark.parametrize("name", MODELS)
def test_two_of_four_stay_along_the_inputs_and_rows_keep_alike(name):
    model = made(name)
    exclude = unfit(name, model) or None
    masks = gp.prune(copy.deepcopy(model), granularity="2:4", exclude=exclude)
    by_row = gp.prune(model, sparsity=0.75, scope="row", exclude=exclude)
    for n, mask in masks.items():
        if mask.dim() > 2 and "experts" not in n:
            assert bool((mask.unflatten(1, (-1, 4)).sum(2) == 2).all()), n
        else:
            assert bool((rows_of(model, n, mask).unflatten(1, (-1, 4)).sum(2) == 2).all()), n
        rows = rows_of(model, n, by_row[n])
        assert rows.sum(1).unique().tolist() == [rows.shape[1] - round(0.75 * rows.shape[1])], n
    assert bool(outputs(name, model).isfinite().all())

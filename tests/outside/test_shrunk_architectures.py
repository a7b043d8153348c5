"""Are transformers' architectures shrunk, heads and gated perceptrons, and saved and loaded?"""

import os
import warnings

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # the models are made from configurations; nothing is downloaded
transformers = pytest.importorskip("transformers")
pytest.importorskip("torch_pruning")

import gradprune as gp  # noqa: E402

IDS = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=50, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config)


def neox():
    config = transformers.GPTNeoXConfig(**SMALL, vocab_size=50, max_position_embeddings=32)
    return transformers.GPTNeoXForCausalLM(config)


def bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=50))


def resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


# build, example, {layer: channels that are zero (the axis of the outputs)}, {layer: its shape afterwards}
CASES = {
    "vit": (
        vit,
        {"pixel_values": IMAGES},
        {"layers.0.attention.v_proj": range(8, 16), "layers.1.mlp.fc1": range(10)},
        {"layers.0.attention.q_proj": (24, 32), "layers.0.attention.o_proj": (32, 24), "layers.1.mlp.fc2": (32, 38)},
    ),
    "gpt2": (
        gpt2,
        {"input_ids": IDS},
        {"h.0.attn.c_attn": range(64, 80), "h.1.mlp.c_fc": range(28)},
        {"h.0.attn.c_attn": (32, 48), "h.0.attn.c_proj": (16, 32), "h.1.mlp.c_fc": (32, 100)},
    ),
    "llama": (
        llama,
        {"input_ids": IDS},
        {
            "layers.0.self_attn.v_proj": range(8),
            "layers.1.mlp.gate_proj": range(5),
            "layers.1.mlp.up_proj": range(3, 8),
        },
        {
            "layers.0.self_attn.q_proj": (16, 32),
            "layers.0.self_attn.k_proj": (8, 32),
            "layers.1.mlp.down_proj": (32, 40),
        },
    ),
    "gpt-neox": (
        neox,
        {"input_ids": IDS},
        {"layers.0.attention.query_key_value": range(40, 48), "layers.1.mlp.dense_h_to_4h": range(8)},
        {
            "layers.0.attention.query_key_value": (72, 32),
            "layers.0.attention.dense": (32, 24),
            "layers.1.mlp.dense_4h_to_h": (32, 40),
        },
    ),
    "bert": (
        bert,
        {"input_ids": IDS},
        {"layer.0.attention.self.value": range(16), "layer.1.intermediate.dense": range(8)},
        {"layer.0.attention.output.dense": (32, 16), "layer.1.output.dense": (32, 40)},
    ),
}


def layers(model, ending):
    return next(m for name, m in model.named_modules() if name.endswith(ending))


def outputs(model, example):
    with torch.no_grad():
        return model(**example)[0]


def silence_(layer, channels):
    with torch.no_grad():
        axis = 1 if type(layer).__name__ == "Conv1D" else 0
        layer.weight.movedim(axis, 0)[list(channels)] = 0
        if layer.bias is not None:
            layer.bias[list(channels)] = 0


@pytest.mark.parametrize("name", CASES)
def test_heads_and_hidden_units_go_and_the_outputs_stay(name, tmp_path):
    build, example, zero, shapes = CASES[name]
    torch.manual_seed(0)
    model = build().eval()
    for p in model.parameters():  # as drawn, the biases are zero
        torch.nn.init.normal_(p, std=0.2)
    for ending, channels in zero.items():
        silence_(layers(model, ending), channels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = gp.shrink(model, example)
    for ending, shape in shapes.items():
        assert tuple(layers(small, ending).weight.shape) == shape
    other = {key: torch.flip(value, (-1,)) for key, value in example.items()}
    for inputs in (example, other):
        expected = outputs(model, inputs)
        assert torch.allclose(outputs(small, inputs), expected, atol=1e-5 * float(expected.abs().max()))
    gp.save(small, tmp_path / "small")
    back = gp.load(build(), tmp_path / "small").eval()
    assert torch.equal(outputs(back, other), outputs(small, other))
    assert gp.report(small, example).total.parameters == sum(p.numel() for p in set(small.parameters()))


def test_gpt2_without_a_head_says_so_everywhere_and_generates():
    model = gpt2().eval()
    silence_(layers(model, "h.0.attn.c_attn"), range(64, 80))
    small = gp.shrink(model, {"input_ids": IDS})
    attention = small.transformer.h[0].attn
    assert (attention.num_heads, attention.head_dim, attention.split_size, attention.embed_dim) == (2, 8, 16, 16)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(IDS, **how), model.generate(IDS, **how))


def test_a_value_that_is_only_its_bias_is_folded_into_what_reads_the_head():
    model = bert().eval()
    value = layers(model, "layer.0.attention.self.value")
    with torch.no_grad():
        value.weight[:8] = 0
        value.bias.normal_()
    small = gp.shrink(model, {"input_ids": IDS})
    assert layers(small, "layer.0.attention.output.dense").in_features == 24
    assert torch.allclose(outputs(small, {"input_ids": IDS}), outputs(model, {"input_ids": IDS}), atol=1e-5)


def test_a_single_channel_of_a_head_and_a_single_query_head_of_shared_values_stay():
    model = llama().eval()
    silence_(layers(model, "layers.0.self_attn.v_proj"), [0])
    with torch.no_grad():
        layers(model, "layers.1.self_attn.o_proj").weight[:, :8] = 0
    small = gp.shrink(model, {"input_ids": IDS})
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]


def test_the_stream_between_layer_norms_stays_with_a_warning():
    model = vit().eval()
    for name in ("layers.0.attention.o_proj", "layers.0.mlp.fc2"):
        silence_(layers(model, name), [3])
    with pytest.warns(UserWarning, match="are zero and stay: .*Norm.* normalises over channels"):
        small = gp.shrink(model, {"pixel_values": IMAGES})
    assert [p.shape for p in small.parameters()] == [p.shape for p in model.parameters()]


def test_a_resnet_of_bottlenecks_loses_the_channels_within_them():
    model = resnet().eval()
    for name, module in model.named_modules():
        if name.endswith(("layer.0.convolution", "layer.0.normalization")) and ".stages." in f".{name}":
            silence_(module, [0, 1])
    small = gp.shrink(model, {"pixel_values": IMAGES})
    assert torch.allclose(outputs(small, {"pixel_values": IMAGES}), outputs(model, {"pixel_values": IMAGES}), atol=1e-5)
    first = [m.out_channels for n, m in small.named_modules() if n.endswith("layer.0.convolution")]
    assert first == [m.out_channels - 2 for n, m in model.named_modules() if n.endswith("layer.0.convolution")]


def others():
    """Other architectures: build, example, the share of the weights that goes."""
    images, t = torch.randn(2, 3, 32, 32), transformers
    text = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 50}
    return {
        "ConvNext": (
            lambda: t.ConvNextForImageClassification(
                t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3)
            ),
            {"pixel_values": images},
            0.1,
        ),
        "MobileNetV2": (
            lambda: t.MobileNetV2ForImageClassification(
                t.MobileNetV2Config(image_size=32, num_labels=3, depth_multiplier=0.25)
            ),
            {"pixel_values": images},
            0.3,
        ),
        "RegNet": (
            lambda: t.RegNetForImageClassification(
                t.RegNetConfig(
                    embedding_size=8, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], groups_width=8, num_labels=3
                )
            ),
            {"pixel_values": images},
            0.3,
        ),
        "Segformer": (
            lambda: t.SegformerForSemanticSegmentation(
                t.SegformerConfig(
                    hidden_sizes=[8, 16, 24, 32],
                    depths=[1, 1, 1, 1],
                    num_attention_heads=[1, 2, 3, 4],
                    decoder_hidden_size=16,
                    num_labels=3,
                )
            ),
            {"pixel_values": images},
            0.3,
        ),
        "Swin": (
            lambda: t.SwinForImageClassification(
                t.SwinConfig(
                    image_size=32,
                    patch_size=4,
                    embed_dim=16,
                    depths=[1, 1],
                    num_heads=[2, 4],
                    window_size=4,
                    num_labels=3,
                )
            ),
            {"pixel_values": images},
            0.2,
        ),
        "T5": (
            lambda: t.T5ForConditionalGeneration(
                t.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50)
            ),
            {"input_ids": IDS, "decoder_input_ids": IDS},
            0.1,
        ),
        "Phi3": (
            lambda: t.Phi3ForCausalLM(
                t.Phi3Config(**text, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
            ),
            {"input_ids": IDS},
            0.2,
        ),
        "ALBERT": (  # the norm in its attention is of what comes out
            lambda: t.AlbertModel(t.AlbertConfig(**text, num_hidden_layers=2, embedding_size=16)),
            {"input_ids": IDS},
            0.35,  # more than the hidden units are: heads go too
        ),
        "DistilBert": (
            lambda: t.DistilBertModel(t.DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48)),
            {"input_ids": IDS},
            0.4,  # more than the hidden units are: heads go too
        ),
        "GPT-NeoX": (  # queries, keys and values are one layer's, head by head, which is not followed
            lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**text, num_hidden_layers=2)),
            {"input_ids": IDS},
            0.1,
        ),
        "Olmo2": (  # norms over all queries and all keys: no head can go
            lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**text, num_hidden_layers=2, pad_token_id=0)),
            {"input_ids": IDS},
            0.2,
        ),
        "Qwen2": (
            lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**text, num_hidden_layers=2, num_key_value_heads=2)),
            {"input_ids": IDS},
            0.3,
        ),
    }


@pytest.mark.parametrize("name", others())
def test_channels_that_are_chosen_together_can_be_taken_out(name, tmp_path):
    build, example, share = others()[name]
    torch.manual_seed(0)
    model = build().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    masks = gp.prune(model, granularity="group", example=example, sparsity=share, score=gp.random)
    assert masks.sparsity == pytest.approx(share, abs=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = gp.shrink(model, example)
    expected = outputs(model, example)
    assert torch.allclose(outputs(small, example), expected, atol=1e-5 * float(expected.abs().max()))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    gone = sum(int((~mask).sum()) for mask in masks.values())
    assert after <= before - gone
    gp.save(small, tmp_path / "small")
    assert torch.equal(outputs(gp.load(build(), tmp_path / "small").eval(), example), outputs(small, example))

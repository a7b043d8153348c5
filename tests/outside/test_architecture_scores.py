"""Scores and reports of whole architectures, built small from their configurations: nothing is downloaded."""

import copy
import os
from functools import partial

import pytest
import torch

import gradprune as gp
from gradprune.weights.eligible import eligible

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

HIDDEN, LAYERS, WORDS, TOKENS, BATCH, LENGTH = 32, 2, 50, 10, 2, 5
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
IDS = {"input_ids": torch.arange(TOKENS).view(BATCH, LENGTH)}
DECODER = {"decoder_input_ids": torch.arange(8).view(BATCH, 4)}


def pixels(size):
    return {"pixel_values": torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(1))}


def built(model, config, **sizes):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**sizes))


ARCHITECTURES = {
    "BERT": (built("BertForSequenceClassification", "BertConfig", **SIZES), IDS),
    "GPT-2": (
        built(
            "GPT2LMHeadModel", "GPT2Config", n_embd=HIDDEN, n_layer=LAYERS, n_head=4, vocab_size=WORDS, n_positions=64,
            bos_token_id=0, eos_token_id=0,
        ),
        IDS,
    ),
    "Llama": (built("LlamaForCausalLM", "LlamaConfig", **SIZES, num_key_value_heads=2), IDS),
    "Mixtral": (built("MixtralForCausalLM", "MixtralConfig", **SIZES, **EXPERTS), IDS),
    "gpt-oss": (built("GptOssForCausalLM", "GptOssConfig", **SIZES, **EXPERTS, **ROPE, head_dim=8), IDS),
    "ViT": (
        built(
            "ViTForImageClassification", "ViTConfig", hidden_size=HIDDEN, intermediate_size=64,
            num_hidden_layers=LAYERS, num_attention_heads=4, image_size=16, patch_size=8,
        ),
        pixels(16),
    ),
    "T5": (
        built(
            "T5ForConditionalGeneration", "T5Config", d_model=HIDDEN, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4,
            vocab_size=WORDS, decoder_start_token_id=0,
        ),
        IDS | DECODER,
    ),
    "Mamba": (
        built(
            "MambaForCausalLM", "MambaConfig", hidden_size=HIDDEN, state_size=8, num_hidden_layers=LAYERS,
            vocab_size=WORDS,
        ),
        IDS,
    ),
    "ConvNeXt": (
        built(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 1, 1],
            num_stages=4,
        ),
        pixels(32),
    ),
    "Whisper": (
        built(
            "WhisperForConditionalGeneration", "WhisperConfig", d_model=HIDDEN, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
            vocab_size=WORDS, num_mel_bins=8, max_source_positions=8, max_target_positions=16, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        {"input_features": torch.randn(BATCH, 8, 16, generator=torch.Generator().manual_seed(1))} | DECODER,
    ),
}  # fmt: skip


def loss(outputs, _):
    return outputs.logits.square().mean() + outputs.logits.mean()


SCORES = {
    **{name: partial(getattr(gp, name), loss=loss) for name in ("gradient", "taylor", "snip", "grasp", "fisher")},
    "movement": partial(gp.movement, loss=loss, lr=0.1),
    "synflow": lambda model, batches: gp.synflow(model, batches[0][0]),
    "activation": gp.activation,
    "magnitude": lambda model, batches: gp.magnitude(model),
    "random": lambda model, batches: gp.random(model),
}


def network(name):
    torch.manual_seed(0)
    build, inputs = ARCHITECTURES[name]
    return build(), inputs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_score_tells_the_weights_of_every_architecture_apart(name):
    model, inputs = network(name)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "bias" in parameter_name:
                p.normal_(std=0.02)  # they start at zero, where |w g| is
    before = copy.deepcopy(model.state_dict())
    for kind, score in SCORES.items():
        scores = score(model, batches=[(inputs, None)])
        for weight, found in eligible(model).items():
            assert scores[weight].shape == found.parameter.shape, (kind, weight)
            assert bool(scores[weight].isfinite().all()), (kind, weight)
            assert float(scores[weight].double().std()) > 0, (kind, weight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    masks = gp.prune(model, partial(gp.activation, batches=[inputs]), sparsity=0.5)
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)


def products(out, into, rows=TOKENS):
    return 2 * out * into * rows


def attention(heads=4, size=8):
    return 2 * products(LENGTH, size, rows=BATCH * heads * LENGTH)


def flops_by_hand(name):
    """Two a multiplication of each linear product, and of attention's own two."""
    if name == "BERT":  # the pooler and the classifier look at one token of each text
        layer = 4 * products(HIDDEN, HIDDEN) + 2 * products(64, HIDDEN) + attention()
        return LAYERS * layer + products(HIDDEN, HIDDEN, rows=BATCH) + products(2, HIDDEN, rows=BATCH)
    if name == "GPT-2":
        layer = 4 * products(HIDDEN, HIDDEN) + 2 * products(4 * HIDDEN, HIDDEN) + attention()
        return LAYERS * layer + products(WORDS, HIDDEN)
    shared = 2 * products(HIDDEN, HIDDEN) + 2 * products(HIDDEN // 2, HIDDEN) + attention()
    if name == "Llama":
        return LAYERS * (shared + 3 * products(64, HIDDEN)) + products(WORDS, HIDDEN)
    experts = products(4, HIDDEN) + 3 * products(64, HIDDEN, rows=2 * TOKENS)  # a router, and two experts a token
    return LAYERS * (shared + experts) + products(WORDS, HIDDEN)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "Mixtral"])
def test_the_flops_of_an_architecture_are_those_counted_by_hand(name):
    model, inputs = network(name)
    report = gp.report(model, inputs)
    assert report.total.flops == report.total.effective_flops == flops_by_hand(name)
    assert not report.uncounted


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_experts_count_and_score_alike_however_they_are_multiplied(how):
    model, inputs = network("Mixtral")
    model.set_experts_implementation("eager")
    wanted, flow = gp.activation(model, [inputs]), gp.synflow(model, inputs)
    model.set_experts_implementation(how)
    for name, score in gp.activation(model, [inputs]).items():
        torch.testing.assert_close(score, wanted[name], rtol=1e-4, atol=1e-7)
    for name, score in gp.synflow(model, inputs).items():
        torch.testing.assert_close(score, flow[name])
    assert gp.report(model, inputs).total.flops == flops_by_hand("Mixtral")


def test_effective_flops_of_experts_are_those_of_the_tokens_that_each_gets():
    model, inputs = network("Mixtral")
    chosen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _, args, out: chosen.append(out[-1]))
        for layer in model.model.layers
    ]
    model.eval()(**inputs)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj[0].zero_()
    rows = {row.name: row for row in gp.report(model, inputs).rows}
    for i, experts in enumerate(chosen):
        row = rows[f"model.layers.{i}.mlp.experts"]
        first = int((experts == 0).sum())
        assert row.flops - row.effective_flops == products(2 * 64, HIDDEN, rows=first)

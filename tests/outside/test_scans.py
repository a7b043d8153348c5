"""Networks that nobody here wrote: scanned, bisected, planned, and left bit by bit as they were."""

import copy
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from configurations; nothing is downloaded

import pytest
import torch

import gradprune as gp

tr = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 96, (8, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def gpt2():
    return tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=96, n_positions=32))


def bert():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    return tr.BertForSequenceClassification(tr.BertConfig(**sizes, vocab_size=96))


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return tr.ResNetForImageClassification(tr.ResNetConfig(**sizes, num_labels=5))


MODELS = {"GPT-2": (gpt2, TOKENS), "BERT": (bert, TOKENS), "ResNet": (resnet, IMAGES)}


@pytest.fixture(params=MODELS)
def outside(request):
    """A model, its input, and an evaluation: how near its answers are to those of the dense network, by example."""
    make, x = MODELS[request.param]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        truth = model.eval()(x).logits
    model.train()

    def evaluate(pruned):
        pruned.eval()
        with torch.inference_mode():
            return -(pruned(x).logits - truth).square().flatten(1).mean(1)

    return model, x, evaluate


def bits(model):
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return {n: t.flatten().view(torch.uint8) for n, t in tensors.items()}, [m.training for m in model.modules()]


def test_a_scan_evaluates_each_layer_and_leaves_the_network_as_it_was(outside):
    model, _, evaluate = outside
    before, calls = bits(model), []
    found = gp.sensitivity(model, lambda m: calls.append(1) or evaluate(m), [0.5, 0.9])
    assert len(calls) == 1 + 2 * len(found.values)
    assert found.dense == 0
    assert all(row[0.9] <= 0 for row in found.values.values())
    after = bits(model)
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert before[1] == after[1]
    one = max(found.values, key=lambda name: found.weights[name])
    pruned = copy.deepcopy(model)
    gp.prune(pruned, scope={one: 0.9})
    assert float(evaluate(pruned).mean()) == pytest.approx(found.values[one][0.9], rel=1e-4)


def test_a_plan_of_flops_costs_what_it_predicts(outside):
    model, x, evaluate = outside
    model.eval()
    total = gp.report(model, x).total
    plan = gp.fit_budget(model, x, flops=0.6 * total.effective_flops, evaluate=evaluate)
    pruned = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gp.prune(pruned, scope=plan)
    out = gp.report(pruned, x).total.effective_flops
    assert out == pytest.approx(plan.predicted, rel=1e-3)
    assert 0.59 * total.effective_flops < out <= 0.6 * total.effective_flops + len(plan)


def test_bisection_finds_how_far_it_goes(outside):
    model, _, evaluate = outside
    before = bits(model)
    at_least = 0.5 * float(evaluate(pruned_copy(model, 0.5)).mean())
    found = gp.largest_sparsity(model, evaluate, at_least=at_least, tolerance=0.01)
    assert 0 < found.sparsity < 0.5
    assert float(evaluate(pruned_copy(model, found.sparsity)).mean()) >= at_least
    after = bits(model)
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert before[1] == after[1]


def pruned_copy(model, sparsity):
    pruned = copy.deepcopy(model)
    gp.prune(pruned, sparsity=sparsity)
    return pruned

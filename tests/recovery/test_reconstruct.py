"""Layers that are pruned one after another: against direct solves, in whatever model, and nothing left behind."""

import copy
import os
import warnings
import weakref

os.environ["HF_HUB_OFFLINE"] = "1"  # models are made from configurations; nothing is downloaded

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradprune as gp
from gradprune.core.evaluate import call, plain_layers, tensors_in
from gradprune.lab.residual import residual
from gradprune.recovery import reconstruct, replay

tr = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

DAMP = 0.01
TEXT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 96}
GROUPED = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = [{"input_ids": torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(i))} for i in range(3)]
SIGNALS = [torch.randn(64, 40, generator=torch.Generator().manual_seed(i)) for i in range(2)]
PICTURES = [{"pixel_values": torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(2)]
pytestmark = pytest.mark.filterwarnings("ignore:fewer inputs than columns")


def gpt2():
    words = {"vocab_size": 96, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    return tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=32, n_head=4, n_layer=3, **words))


def vit():
    sizes = {k: v for k, v in TEXT.items() if k != "vocab_size"}
    return tr.ViTForImageClassification(tr.ViTConfig(**sizes, image_size=16, patch_size=8))


def attention():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


MODELS = {
    "GPT-2": (gpt2, TOKENS),
    "Llama": (lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**GROUPED)), TOKENS),
    "Mixtral": (lambda: tr.MixtralForCausalLM(tr.MixtralConfig(**GROUPED, num_local_experts=4)), TOKENS),
    "ViT": (vit, PICTURES),
    "torch's attention": (attention, [torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(0))]),
    "residual": (lambda: residual(8), SIGNALS),
}


def made(name):
    torch.manual_seed(0)
    model, batches = MODELS[name]
    return model(), batches


def answer(model, batch):
    with torch.no_grad():
        return next(iter(tensors_in(call(model, batch))))


def everything(model):
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return tensors, gradients, [m.training for m in model.modules()], hooks


def same(one, other):
    tensors = all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    gradients = all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    return tensors and gradients and one[2:] == other[2:]


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))


X = torch.randn(200, 12, generator=torch.Generator().manual_seed(1)) + 0.5


# ---------------------------------------------------------------------------------------------------- against a solve


def solved(x, weights, masks, damp=DAMP):
    """Each row by torch's own least squares in double; the damping as further samples, of no change."""
    x, weights = x.double(), weights.double()
    wide = torch.cat([x, (damp * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1])])
    found = torch.zeros_like(weights)
    for row, (w, mask) in enumerate(zip(weights, masks, strict=True)):
        if mask.any():
            found[row, mask] = torch.linalg.lstsq(wide[:, mask], (wide @ w).unsqueeze(1)).solution[:, 0]
    return found


def close(found, wanted):
    return float((found.detach().double() - wanted).norm()) <= 1e-4 * float(wanted.norm())


def random_masks(model):
    generator = torch.Generator().manual_seed(3)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.dim() > 1}
    return {name: torch.rand(shape, generator=generator) < 0.6 for name, shape in shapes.items()}


def test_each_layer_is_the_least_squares_for_what_the_pruned_layers_before_give_it():
    model = two_layers()
    dense, masks = copy.deepcopy(model), random_masks(model)
    gp.reconstruct_(model, X.split(50), masks=masks)
    assert close(model[0].weight, solved(X, dense[0].weight.detach(), masks["0.weight"]))
    with torch.no_grad():
        hidden = model[:2](X)
    assert close(model[2].weight, solved(hidden, dense[2].weight.detach(), masks["2.weight"]))
    assert all(torch.equal(model[i].bias, dense[i].bias) for i in (0, 2))


def test_a_conv1d_of_transformers_has_its_inputs_first():
    torch.manual_seed(0)
    model = Conv1D(7, 12)
    weight, mask = model.weight.detach().clone(), random_masks(model)["weight"]
    gp.reconstruct_(model, [X], masks={"weight": mask})
    assert close(model.weight.detach().T, solved(X, weight.T, mask.T))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        (lambda **k: nn.Conv1d(4, 6, 3, **k), (9,)),
        (lambda **k: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular", **k), (9,)),
        (lambda **k: nn.Conv2d(4, 6, 3, stride=2, padding=1, **k), (9, 8)),
        (lambda **k: nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2, **k), (9, 8)),
        (lambda **k: nn.Conv2d(4, 8, 3, groups=4, **k), (9, 8)),
        (lambda **k: nn.Conv3d(4, 6, 2, **k), (4, 3, 5)),
    ],
)
def test_a_convolution_is_solved_by_what_each_filter_multiplies(convolution, size, bias):
    """The columns are found by another way: what each single weight alone answers."""
    torch.manual_seed(0)
    model, x = convolution(bias=bias), torch.randn(20, 4, *size) + 0.3
    weight, mask = model.weight.detach().clone(), random_masks(model)["weight"]
    gp.reconstruct_(model, [x[:5], x[5:]], masks={"weight": mask})
    wanted = torch.zeros_like(weight, dtype=torch.double)
    probe = copy.deepcopy(model).double()
    nn.init.zeros_(probe.bias) if bias else None
    for filter in range(len(weight)):
        columns = []
        for at in range(weight[0].numel()):
            nn.init.zeros_(probe.weight)
            probe.weight.data[filter].view(-1)[at] = 1
            columns.append(probe(x.double())[:, filter].flatten())
        inputs, w, m = torch.stack(columns, 1).detach(), weight[filter].view(1, -1), mask[filter].view(1, -1)
        group = slice(filter - filter % (len(weight) // model.groups), None)
        assert group.start <= filter
        wanted[filter] = solved(inputs, w, m).view(weight[filter].shape)
    assert close(model.weight, wanted)
    assert torch.equal(model.weight != 0, mask)


@settings(max_examples=30)
@given(
    samples=st.integers(1, 60),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 1000),
    score=st.sampled_from([gp.magnitude, gp.random]),
)
def test_answers_differ_no_more_than_by_plain_masking(samples, sparsity, seed, score):
    torch.manual_seed(seed)
    model, x = nn.Linear(10, 5), torch.randn(samples, 10)
    plain, dense = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(seed)
    masks = gp.prune(plain, score, sparsity=sparsity, scope="layer")
    gp.reconstruct_(model, [x], masks=masks)
    with torch.no_grad():
        wanted, by_masking, found = (m(x).double() for m in (dense, plain, model))
    assert float((found - wanted).square().sum()) <= float((by_masking - wanted).square().sum()) * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_answers_nearer_to_the_dense_one_than_by_plain_masking(name):
    dense, batches = made(name)
    plain, model = copy.deepcopy(dense), copy.deepcopy(dense)
    masks = gp.prune(plain, sparsity=0.5, scope="layer")
    gp.reconstruct_(model, batches, masks=masks)
    wanted, by_masking, found = (answer(m.eval(), batches[0]) for m in (dense, plain, model))
    assert float((found - wanted).norm()) < float((by_masking - wanted).norm())
    assert masks.holds(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{"sparsity": 0.5, "solve": "one pass"}, {"sparsity": 0.5, "score": gp.magnitude}])
def test_what_is_kept_between_blocks_is_what_the_whole_model_would_give(name, how, monkeypatch):
    model, batches = made(name)
    whole = copy.deepcopy(model)
    masks = gp.reconstruct_(model, batches, **how)
    seen = replay.look
    monkeypatch.setattr(
        reconstruct, "look", lambda *given, **how: ([[n] for g in seen(*given, **how)[0] for n in g], None)
    )
    assert gp.reconstruct_(whole, batches, **how) == masks
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mixtral", "ViT", "torch's attention"])
def test_the_blocks_of_a_transformer_are_a_chain_and_queries_keys_and_values_share_their_inputs(name):
    model, batches = made(name)
    layers = reconstruct.Request.of(model, exclude=["*experts*", "*gate.weight"] if name == "Mixtral" else None).layers
    with torch.no_grad(), plain_layers(), reconstruct._without_cache(model):
        groups, chain = replay.look(model.eval(), batches, layers)
    assert chain is not None
    assert len(chain.blocks) == (2 if name == "torch's attention" else 3)
    if name in ("Llama", "Mixtral", "ViT"):
        together = next(group for group in groups if "att" in group[0])
        assert [name.split(".")[-2][0] for name in together] == ["q", "k", "v"]


def test_a_block_that_writes_into_what_it_is_given_is_replayed_on_a_copy():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 12)) for _ in range(3)]
    model = nn.Sequential(nn.Linear(12, 12), *blocks)
    dense, masks = copy.deepcopy(model), random_masks(model)
    gp.reconstruct_(model, [X], masks=masks)
    x = X
    for i, block in enumerate(model):
        inputs = x if i == 0 else x.clamp(min=0)
        weight = next(p for n, p in dense[i].named_parameters() if n.endswith("weight"))
        own = next(n for n in masks if n.startswith(f"{i}."))
        assert close(model.state_dict()[own], solved(inputs, weight.detach(), masks[own]))
        with torch.no_grad():
            x = block(x.clone())


def damped_error(dense, found, x):
    """What a layer's answers differ by, with the damping."""
    change, wide = (found.weight - dense.weight).detach().double(), x.double()
    return float((wide @ change.T).square().sum() + DAMP * wide.square().sum(0).mean() * change.square().sum())


def test_exact_weights_for_the_chosen_masks_answer_better_than_those_of_one_pass():
    models = {solve: nn.Sequential(nn.Linear(12, 16)) for solve in ("dense", "exact", "one pass")}
    for model in models.values():
        model.load_state_dict({k: v for k, v in two_layers().state_dict().items() if k.startswith("0")})
    masks = [gp.reconstruct_(models[solve], [X], sparsity=0.5, solve=solve) for solve in ("exact", "one pass")]
    assert masks[0] == masks[1]
    exact, one_pass = (damped_error(models["dense"][0], models[solve][0], X) for solve in ("exact", "one pass"))
    assert exact < one_pass
    assert close(models["exact"][0].weight, solved(X, models["dense"][0].weight.detach(), masks[0]["0.weight"]))


def test_one_pass_for_given_masks_is_that_of_the_choice():
    one, other = two_layers(), two_layers()
    masks = gp.reconstruct_(one, [X], sparsity=0.5, solve="one pass")
    gp.reconstruct_(other, [X], masks=masks, solve="one pass")
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# -------------------------------------------------------------------------------------------------------------- counts


@settings(max_examples=30)
@given(inputs=st.integers(1, 300), outputs=st.integers(1, 6), sparsity=st.floats(0, 1))
@pytest.mark.filterwarnings("ignore:the sparsity leaves")
def test_counts_are_exact_in_each_layer_and_in_each_row(inputs, outputs, sparsity):
    x = torch.randn(40, inputs, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(inputs, outputs)
    mask = gp.reconstruct_(model, [x], sparsity=sparsity)["weight"]
    least = 1 if sparsity < 1 and round(sparsity * mask.numel()) < mask.numel() else 0
    assert int(mask.sum()) == max(mask.numel() - round(sparsity * mask.numel()), least)
    assert not bool(model.weight[~mask].any())
    model = nn.Linear(inputs, outputs)
    mask = gp.reconstruct_(model, [x], sparsity=sparsity, scope="row")["weight"]
    assert mask.sum(1).tolist() == [inputs - round(sparsity * inputs)] * outputs


@pytest.mark.parametrize("scope", ["layer", "row", "erk", {"*attn*": 0.75}])
def test_each_scope_prunes_as_many_of_each_layer_as_prune_does(scope):
    model, batches = made("Llama")
    plain, sparsity = copy.deepcopy(model), 0.4
    masks = gp.reconstruct_(model, batches, sparsity=sparsity, scope=scope)
    wanted = gp.prune(plain, sparsity=sparsity, scope=scope)
    assert {n: int(m.sum()) for n, m in masks.items()} == {n: int(m.sum()) for n, m in wanted.items()}


@pytest.mark.parametrize("granularity", ["2:4", (1, 4), (3, 8)])
def test_n_of_m_holds_along_the_inputs_whatever_the_order_of_axes(granularity):
    n, m = (2, 4) if granularity == "2:4" else granularity
    torch.manual_seed(0)
    linear, conv1d, conv = nn.Linear(16, 8), Conv1D(8, 16), nn.Conv2d(16, 8, 3)
    inputs = torch.randn(100, 16), torch.randn(100, 16), torch.randn(9, 16, 6, 6)
    for model, x, dim in zip((linear, conv1d, conv), inputs, (1, 0, 1), strict=True):
        plain = copy.deepcopy(model)
        mask = gp.reconstruct_(model, [x], granularity=granularity)["weight"]
        assert mask.movedim(dim, -1).reshape(-1, m).sum(1).unique().tolist() == [n]
        gp.prune(masked := copy.deepcopy(plain), granularity=granularity)
        with torch.no_grad():
            assert float((model(x) - plain(x)).norm()) < float((masked(x) - plain(x)).norm())


def test_a_score_says_what_goes_by_whatever_scope_and_granularity():
    for how in ({"sparsity": 0.5, "scope": "global"}, {"sparsity": 0.5, "scope": "layer", "granularity": "channel"}):
        model, plain = two_layers(), two_layers()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = gp.reconstruct_(model, [X], score=gp.magnitude, **how)
            assert gp.prune(plain, **how) == masks


def test_wanda_and_its_weights_by_least_squares_are_one_line():
    model, batches = made("GPT-2")
    masks = gp.reconstruct_(
        model, batches, sparsity=0.5, scope="row", score=lambda dense: gp.activation(dense, batches)
    )
    plain, _ = made("GPT-2")
    assert masks == gp.prune(plain, lambda dense: gp.activation(dense, batches), sparsity=0.5, scope="row")


def test_a_sparsity_of_zero_changes_nothing():
    model = two_layers()
    before = everything(model)
    assert gp.reconstruct_(model, [X], sparsity=0.0).sparsity == 0
    assert same(before, everything(model))


# ----------------------------------------------------------------------------------------------------- nothing is left


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_the_weights_changes(name, training):
    model, batches = made(name)
    model.train(training)
    random = torch.get_rng_state()
    before = everything(model)
    masks = gp.reconstruct_(model, batches, sparsity=0.3)
    after = everything(model)
    assert all(torch.equal(t, after[0][n]) for n, t in before[0].items() if n not in masks and "lm_head" not in n)
    assert before[1:] == after[1:]
    assert torch.equal(random, torch.get_rng_state())
    assert getattr(getattr(model, "config", None), "use_cache", True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [1, 4, 7])
def test_the_model_is_as_it_was_after_an_exception_in_the_middle(error, after, monkeypatch):
    model, batches = made("residual")
    model.train()
    answer(model, batches[0])
    before, solve, calls = everything(model), reconstruct.eliminate, []

    def fails(*given):
        calls.append(1)
        if len(calls) > after:
            raise error
        return solve(*given)

    monkeypatch.setattr(reconstruct, "eliminate", fails)
    with pytest.raises(error):
        gp.reconstruct_(model, batches, sparsity=0.5)
    assert len(calls) == after + 1
    assert same(before, everything(model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2])
def test_inputs_that_are_not_finite_are_refused_and_nothing_changes(bad, at):
    model = two_layers()
    before, batches = everything(model), [X.clone() for _ in range(3)]
    batches[at][3, 4] = bad
    with pytest.raises(ValueError, match=r"what '0.weight' multiplies contains NaN or infinities"):
        gp.reconstruct_(model, batches, sparsity=0.5)
    assert same(before, everything(model))


@pytest.mark.parametrize("wrong", [torch.zeros(4, 11), (X, X)], ids=["another width", "two arguments"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_that_the_model_does_not_take_is_named_and_nothing_changes(wrong, at):
    model = two_layers()
    before, batches = everything(model), [X] * 3
    batches[at] = (wrong, None) if isinstance(wrong, tuple) else wrong
    with pytest.raises(ValueError, match=rf"^Sequential does not run on batch {at}, a t\w+ of .*It raises \w+Error: "):
        gp.reconstruct_(model, batches, sparsity=0.5)
    assert same(before, everything(model))


def test_weights_that_are_not_finite_are_refused():
    model = two_layers()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'2.weight' contains NaN or infinities"):
        gp.reconstruct_(model, [X], sparsity=0.5)


# ------------------------------------------------------------------------------------------------- batches and models


class Named(nn.Module):
    """Takes two inputs and returns a dict."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, a, b):
        return {"sum": self.one(a) + self.other(b)}


@pytest.mark.parametrize("batch", [{"a": X, "b": X.flip(0)}, ((X, X.flip(0)), None)], ids=["dict", "tuple"])
def test_batches_may_be_dicts_or_tuples_and_answers_dicts(batch):
    model = Named()
    masks = gp.reconstruct_(model, [batch], sparsity=0.5)
    assert masks.holds(model)


@pytest.mark.parametrize(("model", "batches"), [(two_layers(), [X]), (residual(8), SIGNALS)], ids=["chain", "residual"])
def test_batches_may_be_from_inference_mode(model, batches):
    plain = copy.deepcopy(model)
    with torch.inference_mode():
        copies = [x.clone() for x in batches]
    assert gp.reconstruct_(model, copies, sparsity=0.5) == gp.reconstruct_(plain, batches, sparsity=0.5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_targets_are_not_used():
    one, other = two_layers(), two_layers()
    gp.reconstruct_(one, [(X, torch.zeros(200))], sparsity=0.5)
    gp.reconstruct_(other, [X], sparsity=0.5)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precisions_are_solved_alike(dtype):
    model = two_layers().to(dtype)
    dense, masks = copy.deepcopy(model), random_masks(model)
    gp.reconstruct_(model, [X.to(dtype)], masks=masks)
    wanted = solved(X.to(dtype), dense[0].weight.detach(), masks["0.weight"])
    assert model[0].weight.dtype == dtype
    assert torch.allclose(model[0].weight.double(), wanted, rtol=2 * torch.finfo(dtype).eps + 1e-9, atol=1e-6)


def test_weights_cast_by_autocast_are_those_of_the_parameter():
    model, plain = two_layers(), two_layers()
    with torch.autocast("cpu", torch.bfloat16):
        masks = gp.reconstruct_(model, [X], sparsity=0.5, score=gp.magnitude)
    assert gp.reconstruct_(plain, [X], sparsity=0.5, score=gp.magnitude) == masks
    assert torch.allclose(model[0].weight, plain[0].weight, atol=0.01)
    assert torch.allclose(model[2].weight, plain[2].weight, atol=0.01)


@pytest.mark.parametrize("rest", ["eager", "grouped_mm", "batched_mm"])
def test_experts_have_each_their_own_inputs_however_they_are_called(rest):
    model, batches = made("Mixtral")
    model.config._experts_implementation = rest
    dense = copy.deepcopy(model)
    if rest == "batched_mm":
        with pytest.raises(ValueError, match=r"how 'model\.layers\.0\.mlp\.experts\.gate_up_proj' of a Mix"):
            gp.reconstruct_(model, batches, sparsity=0.5)
        return
    masks = gp.reconstruct_(model, batches, sparsity=0.5, score=gp.magnitude)
    name, layer = "model.layers.0.mlp.experts.gate_up_proj", model.model.layers[0].mlp
    given = []
    handle = layer.experts.register_forward_pre_hook(lambda _, args: given.append(args))
    for batch in batches:
        answer(model.eval(), batch)
    handle.remove()
    for expert in range(4):
        own = [hidden.view(-1, 32)[(index == expert).any(-1)] for hidden, index, _ in given]
        wanted = solved(torch.cat(own), dense.state_dict()[name][expert], masks[name][expert])
        assert close(model.state_dict()[name][expert], wanted)


def test_an_expert_that_no_input_reaches_is_pruned_by_magnitude_and_that_is_said():
    model, _ = made("Mixtral")
    dense, name = copy.deepcopy(model), "model.layers.0.mlp.experts.down_proj"
    one_token = [{"input_ids": TOKENS[0]["input_ids"][:1, :1]}]  # which goes to two of four experts
    with pytest.warns(UserWarning, match=r"fewer inputs than columns.*down_proj' \(0 for 64 columns\)"):
        masks = gp.reconstruct_(model, one_token, sparsity=0.5, include="*down_proj")
    assert masks[name].flatten(1).sum(1).tolist() == [masks[name][0].numel() // 2] * 4
    was, found = dense.state_dict()[name], model.state_dict()[name]
    untouched = [e for e in range(4) if torch.allclose(found[e], was[e] * masks[name][e], rtol=1e-4, atol=1e-8)]
    assert len(untouched) == 2
    for expert in untouched:
        assert float(was[expert][masks[name][expert]].abs().mean()) > float(was[expert].abs().mean())


# ------------------------------------------------------------------------------------------------- what is undetermined


def test_fewer_samples_than_columns_are_damped_and_that_is_said():
    model = two_layers()
    dense, masks = copy.deepcopy(model), random_masks(model)
    with pytest.warns(
        UserWarning, match=r"fewer inputs than columns.*'0.weight' \(5 for 12 columns\), '2.weight' \(5 "
    ):
        gp.reconstruct_(model, [X[:5]], masks=masks)
    assert close(model[0].weight, solved(X[:5], dense[0].weight.detach(), masks["0.weight"]))


def test_enough_samples_are_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gp.reconstruct_(two_layers(), [X], sparsity=0.5)
        x = X.clone()
        x[:, 3] = 0
        gp.reconstruct_(two_layers(), [x], sparsity=0.5, damp=0.0, include="0.*")


def test_no_damping_of_inputs_that_do_not_determine_the_layer_is_raised_and_that_is_said():
    x = X.clone()
    x[:, 3] = x[:, 4]
    model = two_layers()
    with pytest.warns(UserWarning, match=r"inputs that follow from each other: '0.weight'"):
        gp.reconstruct_(model, [x], sparsity=0.5, damp=0, include="0.*")
    assert bool(model[0].weight.isfinite().all())


def test_a_column_that_is_always_zero_is_pruned_first():
    x = X.clone()
    x[:, [3, 7]] = 0
    model = nn.Linear(12, 6)
    mask = gp.reconstruct_(model, [x], sparsity=2 / 12, damp=1e-9)["weight"]
    assert not bool(mask[:, [3, 7]].any())


# ------------------------------------------------------------------------------------------------------ what is refused


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return self.layer(self.other(self.layer(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 12)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.one(x) + self.other(x)


def test_a_layer_that_is_used_twice_at_once_has_the_inputs_of_both():
    torch.manual_seed(0)
    model, mask = Tied(), torch.rand(12, 12) < 0.5
    weight = model.one.weight.detach().clone()
    gp.reconstruct_(model, [X], masks={"one.weight": mask})
    assert close(model.one.weight, solved(X, weight, mask))
    assert model.one.weight is model.other.weight


class Across(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x):
        return x @ self.weight[:, :6] @ self.weight[:6]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Twice(), "'layer.weight' is used again after 'other.weight'"),
        (nn.RNN(12, 12), "recurrent layer's inputs are its own outputs"),
        (nn.Sequential(nn.Unflatten(1, (12, 1)), nn.ConvTranspose1d(12, 3, 2)), "'1.weight'.*transposed convolution"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(12, 4)), "the layer computes its weight from it"),
        (nn.utils.spectral_norm(nn.Linear(12, 4)), "the layer computes its weight from it"),
        (nn.Bilinear(12, 12, 4), "reach no product of 'weight'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_reconstructed_is_refused_by_name_and_nothing_changes(model, words):
    before = everything(model)
    batches = [((X, X), None)] if isinstance(model, nn.Bilinear) else [X]
    with pytest.raises(ValueError, match=words):
        gp.reconstruct_(model, batches, sparsity=0.5)
    assert same(before, everything(model))


@pytest.mark.filterwarnings("ignore:taken as")
def test_a_part_of_a_matrix_along_its_inputs_is_refused():
    with pytest.raises(ValueError, match="how 'weight' of a Across multiplies its inputs is not known"):
        gp.reconstruct_(Across(), [X], sparsity=0.5)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "give one of sparsity and masks; got neither"),
        ({"sparsity": 0.5, "masks": True}, "masks say what is pruned; they do not go with sparsity="),
        ({"masks": True, "scope": "row"}, "do not go with scope="),
        ({"sparsity": 0.5, "scope": "global"}, "scope='global' cannot be chosen layer by layer: say by which score"),
        ({"sparsity": 0.5, "granularity": "channel"}, "channels and blocks cannot be chosen layer by layer"),
        ({"granularity": "2:4", "scope": "row"}, "leaves nothing to allocate"),
        ({"granularity": "2:4", "sparsity": 0.7}, "is itself a sparsity of 0.5"),
        ({"sparsity": 1.5}, r"sparsity must be in \[0, 1\]"),
        ({"sparsity": 0.5, "damp": -1}, "damp must be"),
        ({"masks": {}}, "masks are empty"),
        (
            {"masks": {"0.bias": torch.ones(16, dtype=torch.bool)}},
            "'0.bias' cannot be reconstructed: it has 1 dimension",
        ),
        ({"sparsity": 0.5, "include": "nothing"}, "include pattern 'nothing' matches none"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(how, words):
    model = two_layers()
    before = everything(model)
    how = how | ({"masks": random_masks(model)} if how.get("masks") is True else {})
    with pytest.raises(ValueError, match=words):
        gp.reconstruct_(model, [X], **how)
    assert same(before, everything(model))


def test_what_other_libraries_call_the_damping_is_explained():
    with pytest.raises(TypeError, match="reconstruct_ has no argument 'percdamp': damp= is what it is called here"):
        gp.reconstruct_(two_layers(), [X], sparsity=0.5, percdamp=0.01)


def test_masks_that_were_applied_already_are_refused():
    model = two_layers()
    masks = gp.prune(model, sparsity=0.5)
    with pytest.raises(ValueError, match="what the masks prune is zero already, so nothing is left to make good"):
        gp.reconstruct_(model, [X], masks=masks)


def test_a_layer_that_no_batch_reaches_is_named():
    model = Named()
    model.third = nn.Linear(12, 8)
    with pytest.raises(ValueError, match=r"reach no product of 'third.weight' with anything: exclude it"):
        gp.reconstruct_(model, [{"a": X, "b": X}], sparsity=0.5)


def test_the_masks_are_held_by_an_optimizer_as_those_of_prune_are():
    model = two_layers()
    optimizer = torch.optim.AdamW(model.parameters())
    masks = gp.reconstruct_(model, [X], sparsity=0.5)
    with masks.hold(optimizer):
        model(X).sum().backward()
        optimizer.step()
        assert masks.holds(model)


class Sliding(nn.Module):
    """Blocks of two kinds, which get different masks where a batch has one, as in models of sliding attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Scaled() for _ in range(4))

    def forward(self, x, mask=None):
        masks = (None, None) if mask is None else (mask, 1 - mask)
        for i, block in enumerate(self.blocks):
            x = block(x, masks[i % 2])
        return x


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 12)

    def forward(self, x, mask):
        hidden = torch.relu(self.layer(x))
        return x + (hidden if mask is None else hidden * mask)


def test_blocks_are_no_chain_where_one_batch_gives_them_different_things(monkeypatch):
    model, mask = Sliding(), (torch.arange(12) % 2).float()
    whole, batches = copy.deepcopy(model), [{"x": X}, {"x": X.flip(0), "mask": mask}]
    with torch.no_grad():
        layers = reconstruct.Request.of(model).layers
        assert replay.look(model, batches[:1], layers)[1] is not None
        groups, chain = replay.look(model, batches, layers)
    assert chain is None
    masks = gp.reconstruct_(model, batches, sparsity=0.5)
    monkeypatch.setattr(reconstruct, "look", lambda *_, **__: (groups, None))
    assert gp.reconstruct_(whole, batches, sparsity=0.5) == masks


def test_weights_that_lie_in_one_memory_are_told_apart():
    model, plain = two_layers(), two_layers()
    flat = torch.cat([model[0].weight.detach().flatten(), model[2].weight.detach().flatten()])
    for layer, at in ((model[0], 0), (model[2], model[0].weight.numel())):
        layer.weight = nn.Parameter(flat[at : at + layer.weight.numel()].view(layer.weight.shape))
    assert gp.reconstruct_(model, [X], sparsity=0.5) == gp.reconstruct_(plain, [X], sparsity=0.5)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


class Sharing(nn.Module):
    """A block that writes into what all blocks are given."""

    def __init__(self, write):
        super().__init__()
        self.layer, self.write = nn.Linear(12, 12), write

    def forward(self, x, shared):
        return x + self.layer(self.write(shared, torch.relu(x)))


class Shared(nn.Module):
    def __init__(self, make, write):
        super().__init__()
        torch.manual_seed(0)
        self.make, self.blocks = make, nn.ModuleList(Sharing(write) for _ in range(4))

    def forward(self, x):
        shared = self.make(x)
        for block in self.blocks:
            x = block(x, shared)
        return x


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda x: [], lambda shared, x: shared.append(x) or sum(shared)),
        (lambda x: {}, lambda shared, x: shared.update({len(shared): x}) or sum(shared.values())),
        (torch.zeros_like, lambda shared, x: shared.add_(x).clone()),
        (lambda x: (torch.zeros_like(x),), lambda shared, x: shared[0].add_(x).clone()),
    ],
    ids=["list", "dict", "tensor", "tensor in a tuple"],
)
def test_blocks_that_leave_something_to_the_next_beside_what_they_return_are_no_chain(make, write):
    model = Shared(make, write)
    dense, masks = copy.deepcopy(model), random_masks(model)
    gp.reconstruct_(model, [X], masks=masks)
    given = []
    model.blocks[3].layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    answer(model, X)
    name = "blocks.3.layer.weight"
    assert close(model.state_dict()[name], solved(given[0], dense.state_dict()[name], masks[name]))


@pytest.mark.parametrize("inner", [False, True], ids=["plain", "chains within"])
def test_a_look_keeps_no_more_of_what_blocks_hand_on_however_many_they_are(inner):
    def block():
        return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)) if inner else nn.Linear(12, 12)

    model, alive, handed = nn.Sequential(*(block() for _ in range(20))), [], []
    for module in model.modules():
        if module is not model:
            module.register_forward_pre_hook(lambda _, args: handed.append(weakref.ref(args[0])))
    model[-1].register_forward_hook(lambda *_: alive.append(sum(ref() is not None for ref in handed)))
    with torch.no_grad():
        assert replay.look(model, [X], reconstruct.Request.of(model).layers)[1] is not None
    assert alive[0] <= 8

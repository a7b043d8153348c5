"""What may be pruned, by default and at the caller's word; what cannot be is refused before anything is written."""

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import gradprune as gp
from examples import two_layers
from gradprune.weights.eligible import eligible


def tied():
    model = nn.ModuleDict({"emb": nn.Embedding(9, 8), "body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 9, bias=False)})
    model["lm_head"].weight = model["emb"].weight
    return model


def refused(model, kind, words, **how):
    """The call fails with these words and leaves every parameter as it was."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.layout == torch.strided and not p.is_meta}
    with pytest.raises(kind, match=words):
        gp.prune(model, **{"sparsity": 0.5} | how)
    after = dict(model.named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name], value)


# ---------------------------------------------------------------------------------------------- vectors, tied weights


def test_vectors_in_the_shape_of_matrices_are_not_pruned():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    gp.prune(model, sparsity=0.5, scope="layer")
    assert not bool((model[0].weight.abs().sum(1) == 0).any())
    shapes = {"layer_scale": (8, 1, 1), "cls_token": (1, 1, 8), "pos_embed": (1, 5, 8), "w": (8, 8)}
    model = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})
    assert list(gp.prune(model, sparsity=0.5)) == ["w"]
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert list(gp.prune(attention, sparsity=0.5)) == ["in_proj_weight", "out_proj.weight"]


def test_include_takes_what_only_its_name_or_shape_rules_out():
    model = nn.ParameterDict({"cls_token": torch.randn(1, 1, 8), "w": torch.randn(8, 8)})
    assert list(gp.prune(model, sparsity=0.5, include="cls_token")) == ["cls_token"]
    assert list(gp.prune(model, sparsity=0.5, include=["cls_token", "w"])) == ["cls_token", "w"]
    assert list(gp.prune(model, sparsity=0.5, include="*")) == ["w"]
    assert list(gp.prune(model, sparsity=0.5, axes={"cls_token": (1, 2)})) == ["cls_token", "w"]


def test_a_model_of_vectors_alone_is_pruned_with_a_warning_that_says_so():
    model = nn.ParameterDict({"angles": torch.randn(1, 8)})
    with pytest.warns(UserWarning, match="what looks like none is pruned .*'angles' is a vector"):
        assert gp.prune(model, sparsity=0.5)["angles"].sum() == 4
    trainable_prompt = nn.ModuleDict({"body": nn.Linear(8, 8).requires_grad_(False), "raw": nn.ParameterDict()})
    trainable_prompt["raw"]["prompt"] = nn.Parameter(torch.randn(1, 4, 8))
    refused(trainable_prompt, ValueError, "nothing to prune.*'body.weight'.* frozen: name them by include=")


def test_patterns_match_every_name_of_a_tied_weight():
    assert list(gp.prune(tied(), sparsity=0.5, exclude="lm_head.weight")) == ["body.weight"]
    refused(
        tied(), ValueError, "'lm_head.weight' is tied to 'emb.weight', which is an embedding's", include="lm_head.*"
    )
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    for how in ({"include": "2.*"}, {"exclude": "1.*"}, {"scope": {"2.weight": 0.5, "1.weight": 0.0}}):
        model[0].weight.data.normal_()
        masks = gp.prune(model, **{"sparsity": 0.5} | how)
        assert int((~masks["0.weight"]).sum()) == 32
    assert list(gp.prune(model, sparsity=0.9, exclude="2.*")) == ["1.weight"]


# ------------------------------------------------------------------------------------------------------------ frozen


def test_a_frozen_model_is_pruned_where_include_names_it():
    model = two_layers().requires_grad_(False)
    refused(model, ValueError, r"nothing to prune.*\['0.weight', '1.weight'\] are frozen: name them by include=")
    assert list(gp.prune(model, sparsity=0.5, include="*")) == ["0.weight", "1.weight"]
    assert int((model[0].weight == 0).sum() + (model[1].weight == 0).sum()) == 64


def test_a_pattern_looks_among_trainable_weights_first():
    model = two_layers()
    model[0].requires_grad_(False)
    assert list(gp.prune(model, sparsity=0.5)) == ["1.weight"]
    assert list(gp.prune(model, sparsity=0.6, include="*")) == ["1.weight"]
    assert list(gp.prune(model, sparsity=0.7, include=["0.*", "1.*"])) == ["0.weight", "1.weight"]


# ---------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("include", "meant"),
    [("0", "'0.*'"), (["0", "1"], "'0.*'"), ("weight", r"'\*weight\*'"), ("1.wei", r"'\*1.wei\*'")],
)
def test_a_pattern_that_matches_nothing_offers_the_one_that_was_meant(include, meant):
    refused(two_layers(), ValueError, f"include pattern .* matches none of .*did you mean {meant}", include=include)
    refused(two_layers(), ValueError, f"exclude pattern .* matches none of .*did you mean {meant}", exclude=include)


@pytest.mark.parametrize("wrong", [0, [0], [None], b"0.*", 1.5])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_is_no_text_is_a_type_error(argument, wrong):
    refused(two_layers(), TypeError, f"{argument} must be a glob pattern or a list of them", **{argument: wrong})


@pytest.mark.parametrize("patterns", [("0.*",), {"0.*"}, iter(["0.*"])])
def test_patterns_come_in_any_iterable(patterns):
    assert list(gp.prune(two_layers(), sparsity=0.5, include=patterns)) == ["0.weight"]


def test_a_long_list_of_names_is_shortened():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    refused(model, ValueError, r"matches none of .*60 more\]", include="fc")


# ------------------------------------------------------------------------------------- memory, and what has no values


def test_parameters_on_one_memory_are_refused_by_both_names():
    w = nn.Parameter(torch.randn(8, 8))
    for other in (w.data.T, w.data, w.data[2:4], w.data.view(4, 16)):
        refused(nn.ParameterList([w, nn.Parameter(other)]), ValueError, "'0' and '1' share memory")
    frozen = nn.ParameterList([w, nn.Parameter(w.data[0], requires_grad=False)])
    refused(frozen, ValueError, "'0' and '1' share memory")  # though the second is not eligible


def test_views_of_one_memory_that_share_no_entry_are_taken():
    flat = torch.randn(8, 16)
    for parts in ([flat[:4], flat[4:]], [flat[:, :8], flat[:, 8:]], [flat[:, ::2], flat[:, 1::2]]):
        model = nn.ParameterList(nn.Parameter(part) for part in parts)
        flat.normal_()
        assert gp.prune(model, sparsity=0.5).sparsity == 0.5
        assert int((flat == 0).sum()) == 64


def expanded():
    return torch.randn(1, 8).expand(8, 8)


def of_inference():
    with torch.inference_mode():
        return nn.Parameter(torch.randn(8, 8))


UNWRITABLE = {
    "expanded": (expanded, ValueError, "it was expanded"),
    "overlapping": (lambda: torch.randn(15).as_strided((8, 8), (1, 1)), ValueError, "share memory with each other"),
    "inference": (of_inference, ValueError, "inference mode"),
    "negative bit": (lambda: torch.randn(8, 8, dtype=torch.complex64).conj().imag, ValueError, "negative bit"),
    "sparse": (lambda: torch.randn(8, 8).to_sparse(), TypeError, "is sparse"),
    "compressed": (lambda: torch.randn(8, 8).to_sparse_csr(), TypeError, "is sparse"),
    "eight bits": (lambda: torch.randn(8, 8).to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn"),
    "meta": (lambda: torch.randn(8, 8, device="meta"), TypeError, "meta device"),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize(
    "how", [{}, {"granularity": "2:4", "sparsity": None}, {"granularity": "channel"}, {"scope": "row"}]
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_cannot_be_written_is_refused_by_name_before_the_first_write(kind, how):
    make, error, words = UNWRITABLE[kind]
    model = two_layers()
    value = make()
    model[1].weight = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
    refused(model, error, f"'1.weight'.*{words}", **how)
    assert list(gp.prune(model, sparsity=0.5, exclude="1.*")) == ["0.weight"]


def test_a_lazy_layer_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(TypeError, match=r"'1.weight' is lazy, without a shape yet: run the model on one batch"):
        gp.prune(model, sparsity=0.5)
    model(torch.randn(2, 8))
    assert gp.prune(model, sparsity=0.5).sparsity == 0.5


def test_a_distributed_tensor_is_refused_by_name(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    if not dist.is_available() or dist.is_initialized() or os.name != "posix":
        pytest.skip("needs a process group of its own")
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = two_layers()
        model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Shard(0)]))
        before = model[0].weight.clone()
        with pytest.raises(TypeError, match=r"'1\.weight' is a DTensor"):
            eligible(model)  # gp.prune takes one: see tests/scale
        assert torch.equal(model[0].weight, before)
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------- parametrizations, kinds that are lost


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("normed", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("how", [{"granularity": "channel"}, {"sparsity": 0.98}, {"scope": "row", "sparsity": 0.95}])
def test_a_row_of_a_weight_norm_s_direction_is_never_emptied(normed, how):
    model = nn.Sequential(normed(nn.Linear(8, 8)))
    refused(model, ValueError, "weight_norm.* rows would be empty.*NaN: remove the parametrization first", **how)
    assert bool(model(torch.randn(2, 8)).isfinite().all())


@pytest.mark.parametrize("dim", [0, 1, None])
def test_what_does_not_empty_a_row_of_a_weight_norm_is_pruned(dim):
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8), dim=dim))
    gp.prune(model, sparsity=0.5)
    assert int((model[0].weight == 0).sum()) == 32
    assert bool(model(torch.randn(2, 8)).isfinite().all())


def smallest(model):
    return {name: -p.detach().abs() for name, p in model.named_parameters()}


def test_a_row_whose_last_nonzero_weight_would_go_keeps_it_in_place_of_another():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2)))
    model[0].parametrizations.weight.original1.data = torch.tensor([[0.0, 0, 0, 1], [1, 2, 3, 4]])
    (mask,) = gp.prune(model, smallest, sparsity=0.5).values()
    assert mask.sum() == 4
    assert mask[0, 3]  # else it keeps three zeros
    assert mask[1].tolist() == [True, False, False, False]


@pytest.mark.parametrize("row", [[0.0] * 4, [1.0] * 4], ids=["zero as a whole", "kept by no mask"])
def test_a_row_that_nothing_can_fill_is_refused(row):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2)))
    model[0].parametrizations.weight.original1.data = torch.tensor([row, [1.0, 2, 3, 4]])
    within = {"0.parametrizations.weight.original1": torch.tensor([[not any(row)] * 4, [True] * 4])}
    with pytest.raises(ValueError, match="1 of its 2 rows would be empty"):
        gp.prune(model, sparsity=0.75, within=within)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), dim=st.sampled_from([0, 1, None, -1]), sparsity=st.floats(0, 0.87), by=st.booleans())
def test_each_row_of_a_weight_norm_keeps_its_best_weight_and_the_count_is_exact(seed, dim, sparsity, by):
    torch.manual_seed(seed)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8), dim=dim), nn.Linear(8, 8))
    direction = model[0].parametrizations.weight.original1
    with torch.no_grad():
        direction.copy_(torch.randn(8, 1).exp().pow(3) * torch.randn(8, 8))
    before = direction.detach().abs()
    masks = gp.prune(model, gp.magnitude if by else lambda m: gp.magnitude(m), sparsity=sparsity, min_keep=8)
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * 128)
    mask = masks["0.parametrizations.weight.original1"]
    rest = {0: (1,), 1: (0,), None: (0, 1), -1: (0, 1)}[dim]
    assert (mask.sum(rest) >= 1).all()
    assert mask[before == before.amax(rest, keepdim=True)].all()
    lone = (mask.sum(rest, keepdim=True) == 1) & mask
    others, gone = before[mask & ~lone], before[~mask]
    assert not others.numel() or not gone.numel() or others.min() >= gone.max()
    assert bool(model(torch.randn(2, 8)).isfinite().all())


def test_a_threshold_leaves_each_row_of_a_weight_norm_one_and_all_that_are_above():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    before = model[0].parametrizations.weight.original1.detach().abs()
    for threshold in (0.33, 9.0):
        (mask,) = gp.prune(copy.deepcopy(model), threshold=threshold).values()
        assert torch.equal(mask, (before >= threshold) | (before == before.amax(1, keepdim=True)))


@pytest.mark.parametrize("regrow", [None, gp.Regrow(gp.random, 0.5, every=2)])
@pytest.mark.parametrize("scope", ["global", "layer", "lamp"])
def test_a_pruner_never_empties_a_row_of_a_weight_norm(scope, regrow):
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].parametrizations.weight.original1.mul_(torch.linspace(0.01, 1, 32).unsqueeze(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = gp.Pruner(model, optimizer, gp.Cubic(0.9, 0, 10), scope=scope, regrow=regrow, min_keep=1)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
        assert (pruner.masks["0.parametrizations.weight.original1"].sum(1) > 0).all()
    assert pruner.masks.sparsity == round(0.9 * 640) / 640
    assert bool(model(torch.randn(2, 16)).isfinite().all())


def test_a_parametrization_whose_zeros_are_not_the_layer_s_is_refused_unless_excluded():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 8))
    refused(model, ValueError, "parametrization Orthogonal.*remove_parametrizations")
    assert list(gp.prune(model, sparsity=0.5, exclude="0.*")) == ["1.weight"]
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert len(gp.prune(model, sparsity=0.5)) == 2


def test_spectral_norm_is_pruned_and_its_zeros_are_the_layer_s():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)))
    masks = gp.prune(model, sparsity=0.75)
    assert list(masks) == ["0.parametrizations.weight.original"]
    assert int((model[0].weight == 0).sum()) == 48


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_exported_and_sharded_models_are_refused_and_compiled_ones_taken():
    model = two_layers()
    refused(torch.jit.script(model), TypeError, "prune the model before you script")
    refused(torch.export.export(model, (torch.randn(1, 8),)).module(), TypeError, "prune the model before you export")
    wrapper = type("FullyShardedDataParallel", (nn.Sequential,), {})
    refused(wrapper(model), TypeError, "FSDP1")
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    assert list(gp.prune(compiled, sparsity=0.5)) == ["_orig_mod.0.weight", "_orig_mod.1.weight"]
    assert eligible(compiled, include="_orig_mod.0.*")


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (nn.Linear, "Linear is the class: make one"),
        (two_layers().state_dict(), "this looks like a state dict"),
        (torch.optim.SGD(two_layers().parameters(), 0.1), "the optimizer is another argument"),
        (None, "got None"),
    ],
)
def test_what_is_no_model_is_a_type_error_that_says_what_it_is(given, hint):
    with pytest.raises(TypeError, match=f"model must be a torch.nn.Module.*{hint}"):
        gp.prune(given, sparsity=0.5)


def test_of_many_names_twenty_are_told_and_how_many_more_there_are():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(23)))
    with pytest.raises(ValueError, match=r"matches none of \['0.weight', .*'19.weight', ... 3 more\]$"):
        gp.prune(model, sparsity=0.5, include="layer")
    with pytest.raises(ValueError, match=r"none of \['0.weight', .*'19.weight'\]$"):
        gp.prune(model[:20], sparsity=0.5, include="layer")
    with pytest.raises(ValueError, match=r"none of its 2 parameters .* nor a normalisation's$"):
        gp.prune(nn.LayerNorm(2), sparsity=0.5)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of its 23 parameters .*; \['0.weight', .*, ... 3 more\] are frozen"):
        gp.prune(model, sparsity=0.5)


def test_what_a_pattern_nearly_matched_is_told():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    for pattern, told in [
        ("encoder", r"none of \[.*\]; did you mean 'encoder\.\*'\?$"),
        ("code", r"none of \[.*\]; did you mean '\*code\*'\?$"),
        ("", r"pattern '' matches none of \[.*\]$"),
        ("norm.*", r"only \['norm.weight', 'norm.bias'\], not eligible: 'norm.weight' has 1 dimension"),
    ]:
        with pytest.raises(ValueError, match=told):
            gp.prune(model, sparsity=0.5, include=pattern)

"""The activation score sees what a weight multiplies, whatever holds it and however it is called."""

import math

import pytest
import torch
from torch import nn

import gradprune as gp

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def norms(x, dim=0):
    return x.norm(dim=dim)


def assert_scored(scores, name, weight, input_norms):
    torch.testing.assert_close(scores[name], (weight.abs() * input_norms).detach())


def test_batches_may_be_inputs_alone_but_not_one_pair_instead_of_a_list():
    layer = nn.Linear(4, 3)
    wanted = gp.activation(layer, [(X, None)])["weight"]
    for batches in ([X], [X[:2], X[2:]], [[X]], [{"input": X}], iter([(X, None)])):
        torch.testing.assert_close(gp.activation(layer, batches)["weight"], wanted)
    with pytest.raises(TypeError, match=r"one pair of tensors: give \[\(inputs, targets\)\]"):
        gp.activation(layer, (X, X))
    for batches in (X, None, "abc", {"input": X}, [(X, X, X)], [3]):
        with pytest.raises(TypeError, match="batch"):
            gp.activation(layer, batches)
    with pytest.raises(ValueError, match="used up before"):
        gp.activation(layer, iter([]))
    with pytest.raises(ValueError, match="batches held no sample"):
        gp.activation(layer, [X[:0]])


def test_a_layer_called_with_keywords_is_seen():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(input=x)

    model = Keywords()
    assert_scored(gp.activation(model, [X]), "layer.weight", model.layer.weight, norms(X))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_that_ran_before_is_seen(in_place):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
        compiled = model
    compiled(X)
    (score,) = gp.activation(compiled, [X]).values()
    torch.testing.assert_close(score, (model[0].weight.abs() * norms(X)).detach())


def test_scripted_and_exported_models_are_seen():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    wanted = gp.activation(model, [X])
    for other in (torch.jit.trace(model, X), torch.export.export(model, (X,)).module()):
        found = gp.activation(other, [X])
        assert list(found) == list(wanted)
        for name, score in found.items():
            torch.testing.assert_close(score, wanted[name])


def test_a_padding_mask_changes_only_what_it_must():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    x, padded = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool)
    padded[1, 3:] = True
    scores = gp.activation(model, [({"src": x, "src_key_padding_mask": padded}, None)])
    assert list(scores) == [name for name, p in model.named_parameters() if p.dim() == 2]
    joint = model.layers[0].self_attn.in_proj_weight
    assert_scored(scores, "layers.0.self_attn.in_proj_weight", joint, norms(x.flatten(0, 1)))
    assert torch.backends.mha.get_fastpath_enabled()


def test_any_part_of_a_weight_in_any_order_of_its_axes_gets_what_it_multiplies():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            w, stacked = self.weight, x.view(3, 2, 4)
            left = torch.einsum("bi,io->bo", x, w[4:])
            return x @ w[:4, :3], x[:, :2] @ w.T[1:3, :2].T, left, torch.bmm(stacked, w[:4].expand(3, 4, 6))

    model, squares = Parts(), X.square().sum(0)
    wanted = torch.zeros(8, 6)
    wanted[:4, :3] += squares[:, None]
    wanted[:2, 1:3] += squares[:2, None]
    wanted[4:] += squares[:, None]
    wanted[:4] += squares[:, None]
    assert_scored(gp.activation(model, [X]), "weight", model.weight, wanted.sqrt())


def test_transposed_convolutions_and_recurrent_layers_are_seen():
    conv, x = nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(2, 4, 9)
    channels = norms(x.transpose(0, 1).flatten(1), dim=1)
    assert_scored(gp.activation(conv, [x]), "weight", conv.weight, channels[:, None, None])
    lstm, x = nn.LSTM(4, 3), torch.randn(7, 5, 4)
    scores = gp.activation(lstm, [x])
    assert_scored(scores, "weight_ih_l0", lstm.weight_ih_l0, norms(x.flatten(0, 1)))
    assert list(scores) == ["weight_ih_l0", "weight_hh_l0"]
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:4, 1]])
    assert_scored(gp.activation(lstm, [(packed, None)]), "weight_ih_l0", lstm.weight_ih_l0, norms(packed.data))


def test_a_complex_convolution_counts_real_and_imaginary_parts_together():
    conv, x = nn.Conv1d(4, 6, 2, groups=2, dtype=torch.complex64), torch.randn(2, 4, 9, dtype=torch.complex64)
    channels = norms(x.transpose(0, 1).flatten(1).abs(), dim=1)
    seen = torch.stack([channels[:2]] * 3 + [channels[2:]] * 3)[:, :, None]
    assert_scored(gp.activation(conv, [x]), "weight", conv.weight, seen)


def test_casts_under_autocast_are_followed_to_the_weight():
    layer = nn.Linear(4, 3)
    with torch.autocast("cpu"):
        score = gp.activation(layer, [X])["weight"]
    torch.testing.assert_close(score, (layer.weight.abs() * norms(X.bfloat16().float())).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e20, 1e30])
def test_inputs_of_any_size_leave_the_order_as_it_is(dtype, size):
    torch.manual_seed(1)
    layer, x = nn.Linear(4, 3).to(dtype), X.double()
    plain = (layer.weight.double().abs() * norms(x)).flatten().argsort()
    score = gp.activation(layer, [(x * size).to(dtype)])["weight"]
    assert bool((score > 0).all() & score.isfinite().all())
    seen = (layer.weight.double().abs() * norms((x * size).to(dtype).double())).detach()
    torch.testing.assert_close(score.double(), seen, rtol=1e-5, atol=0)
    if dtype == torch.float64:
        assert torch.equal(score.flatten().argsort(), plain)


def test_inputs_without_an_order_are_refused():
    layer = nn.Sequential(nn.Linear(4, 3))
    for x, told in (
        (X * math.nan, "'0' multiplies contains NaN"),
        (X * math.inf, "'0' multiplies contains NaN or infinities"),
        (X.double() * 1e-200, "'0' multiplies is too small to be squared"),
        (X.double() * 1e200, "'0' multiplies is too large to be squared"),
    ):
        with pytest.raises(ValueError, match=told):
            gp.activation(layer.to(x.dtype), [x])
    with pytest.raises(ValueError, match="the batches reach no weight"):
        gp.activation(nn.ReLU(), [X])
    with pytest.raises(ValueError, match=r"does not run on batch 1, a tensor of shape \(2, 9\)"):
        gp.activation(layer.float(), [X, torch.zeros(2, 9)])


def test_inputs_of_zero_score_zero():
    x = X.clone()
    x[:, 1] = 0
    score = gp.activation(nn.Linear(4, 3), [x])["weight"]
    assert score.dtype == torch.float32
    assert (score == 0).any(dim=0).tolist() == [False, True, False, False]


def test_a_weight_may_stand_on_either_side_of_a_product():
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return self.weight @ x.T

    model = Left()
    assert_scored(gp.activation(model, [X]), "weight", model.weight, norms(X))


class Experts(nn.Module):
    """Rows go to experts in groups, each up to its offset; those after the last to none."""

    def __init__(self, of_weight, dtype=torch.float32):
        super().__init__()
        self.of_weight = of_weight
        self.weight = nn.Parameter(torch.randn(2, 4, 8, dtype=dtype))
        self.offsets = torch.tensor([2, 5], dtype=torch.int32)

    def forward(self, x):
        return self.of_weight(self.weight, x, self.offsets)


GROUPED = {
    "rows": lambda w, x, offsets: torch._grouped_mm(x, w, offs=offsets),
    "rows, by position": lambda w, x, offsets: torch._grouped_mm(x, w, offsets),
    "columns": lambda w, x, offsets: torch._grouped_mm(w.transpose(1, 2).contiguous(), x.T, offs=offsets),
    "one after the other": lambda w, x, offsets: torch.cat([x[:2] @ w[0], x[2:5] @ w[1]]),
}


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no product in groups")
@pytest.mark.parametrize("of_weight", GROUPED.values(), ids=GROUPED)
def test_each_expert_is_scored_by_the_rows_that_go_to_it(of_weight):
    model = Experts(of_weight)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    seen = torch.stack([norms(x[:2]), norms(x[2:5])]).unsqueeze(-1)
    assert_scored(gp.activation(model, [x]), "weight", model.weight, seen)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no product in groups")
def test_experts_that_all_get_the_same_number_of_rows_are_scored():
    model = Experts(lambda w, x, _: torch._grouped_mm(x, w))
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    assert_scored(gp.activation(model, [x]), "weight", model.weight, norms(x, dim=1).unsqueeze(-1))


PICKED = {
    "by an index": lambda w: w[torch.tensor([2, 0, 2])],
    "by an index of the second axis": lambda w: w.T[:, torch.tensor([2, 0, 2])].T,
    "by an index of all entries": lambda w: (
        w.view(-1).index_select(-1, torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 8, 9, 10, 11])).view(3, 4)
    ),
    "by index_select": lambda w: w.index_select(0, torch.tensor([2, 0, 2])),
    "by index_select of the last axis": lambda w: w.T.index_select(-1, torch.tensor([2, 0, 2])).T,
}


@pytest.mark.parametrize("pick", PICKED.values(), ids=PICKED)
def test_rows_that_are_picked_get_what_they_multiply_as_often_as_they_are_picked(pick):
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x @ pick(self.weight).T

    model = Picks()
    times = torch.tensor([1.0, 0.0, 2.0])[:, None]
    assert_scored(gp.activation(model, [X]), "weight", model.weight, norms(X) * times.sqrt())


def test_a_weight_written_into_a_part_of_a_table_is_not_taken_for_the_table():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            table = torch.zeros(6, 4)
            table[:3].copy_(self.weight)
            return self.layer(x), x @ table.T

    assert list(gp.activation(Table(), [X])) == ["layer.weight"]


def test_what_a_model_does_in_inference_mode_is_seen():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            with torch.inference_mode():
                return self.layer(x.clone())

    model = Inner()
    assert_scored(gp.activation(model, [X]), "layer.weight", model.layer.weight, norms(X))


def test_a_sparse_input_counts_as_the_dense_one_that_it_stands_for():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x @ self.weight

    model, x = Product(), X.where(X > 0, 0.0)
    assert_scored(gp.activation(model, [x.to_sparse()]), "weight", model.weight, norms(x)[:, None])


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_torchs_defaults_do_not_leak_in(default):
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.rows = nn.Parameter(torch.randn(3, 4)), torch.tensor([2, 0, 2])

        def forward(self, x):
            return x @ self.weight.T, x @ self.weight[self.rows].T

    model = Picks()
    wanted = gp.activation(model, [X])["weight"]
    torch.set_default_dtype(default)
    torch.set_default_device("meta")
    try:
        found = gp.activation(model, [X])["weight"]
        assert torch.equal(found, wanted)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------- Wanda


@pytest.mark.parametrize("sparsity", [0.5, 0.3])
def test_wanda_on_a_language_model_is_one_line_and_the_formula_of_its_paper(sparsity):
    """|W| times the norm of the input, compared within each output, on what the layers' hooks record."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = {"vocab_size": 50, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, **words)).eval()
    batches = [{"input_ids": torch.randint(50, (4, 16))} for _ in range(3)]
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    squares, dense, hooks = {}, {n: m.weight.detach().clone() for n, m in layers.items()}, []
    for name, layer in layers.items():

        def record(_, args, name=name):
            squares[name] = squares.get(name, 0) + args[0].detach().reshape(-1, args[0].shape[-1]).square().sum(0)

        hooks.append(layer.register_forward_pre_hook(record))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    masks = gp.prune(model, sparsity=sparsity, scope="row", score=lambda dense: gp.activation(dense, batches))
    assert set(masks) == {f"{name}.weight" for name in layers}
    for name, weight in dense.items():
        metric = (weight.abs() * squares[name].sqrt()[:, None]).T  # Conv1D has its outputs last
        goes = metric.argsort(dim=1, stable=True)[:, : round(sparsity * metric.shape[1])]
        wanted = torch.ones_like(metric, dtype=torch.bool).scatter_(1, goes, False)
        assert torch.equal(masks[f"{name}.weight"].T, wanted)
        assert not bool(layers[name].weight.T[~wanted].any())

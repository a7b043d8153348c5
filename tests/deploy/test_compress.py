"""Another storage gives the same outputs and is taken only where it was faster; times are scripted here."""

import copy
import warnings

import numpy as np
import pytest
import torch
from networks import digits, gpt2, llama
from torch import nn

import gradprune as gp
from gradprune.deploy import compress as compressing
from gradprune.deploy.sparse import SparseLinear, blocks_of, two_of_four, why_not_two_of_four
from gradprune.lab import models

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(20).view(2, 10)


@pytest.fixture
def scripted(monkeypatch):
    """Says what each way takes, so that a test does not depend on the machine."""

    def by(seconds):
        def in_turn(ways, rounds, device):
            for run in ways.values():
                run()
            return {name: [seconds(name) * (1 + i / 1000) for i in range(rounds)] for name in ways}

        monkeypatch.setattr(compressing, "in_turn", in_turn)

    return by


def sparse_faster(name):
    return 1.0 if name == "dense" else 0.25 if name == "CSR, rows" else 0.5


def apart(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


# -------------------------------------------------------------------------------------------------------- the product


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (2, 3, 32), (0, 32)])
def test_each_way_to_multiply_gives_the_layer_s_outputs(block, columns, dtype, bias, shape):
    torch.manual_seed(0)
    layer = nn.Linear(32, 48, bias=bias, dtype=dtype)
    tiles = (torch.rand(48 // block, 32 // block) > 0.8).repeat_interleave(block, 0).repeat_interleave(block, 1)
    layer.weight.data.mul_(tiles)
    x = torch.randn(shape, dtype=dtype)
    sparse = SparseLinear(layer.weight, layer.bias, block=block, columns=columns).eval()
    wanted, found = layer(x), sparse(x)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    assert torch.allclose(found, wanted, atol=1e-12 if dtype == torch.float64 else 1e-5)
    assert not found.requires_grad


def test_a_sparse_layer_is_copied_moved_and_kept_in_a_state_dict():
    layer = SparseLinear(torch.eye(8), torch.ones(8)).eval()
    layer(torch.ones(1, 8))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(torch.ones(2, 8)), torch.full((2, 8), 2.0))
    assert twin.double()(torch.ones(2, 8, dtype=torch.float64)).dtype == torch.float64
    twin.values.mul_(3)
    assert torch.equal(twin(torch.ones(1, 8).double()), torch.full((1, 8), 4.0).double())
    assert layer.nbytes == 9 * 4 + 8 * 4 + 8 * 4
    assert repr(layer) == "SparseLinear(in_features=8, out_features=8, CSR, 12.5% of the weights stored)"


def test_a_sparse_layer_refuses_to_be_trained():
    layer = SparseLinear(torch.eye(8), None)
    with pytest.raises(RuntimeError, match=r"cannot be trained: call eval\(\)"):
        layer.train()(torch.ones(1, 8))
    found = layer.eval()(torch.ones(1, 8, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"no gradient passes through a layer that gp\.compress stored sparse"):
        found.sum().backward()


# ------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(("build", "example"), [(digits, X), (gpt2, {"input_ids": IDS}), (llama, IDS)])
def test_with_sparse_layers_the_network_is_the_same_function(build, example, scripted):
    scripted(sparse_faster)
    model = build()
    masks = gp.prune(model, sparsity=0.8, scope="layer")
    before = copy.deepcopy(model.state_dict())
    fast = gp.compress(model, example)
    kinds = [type(m) for m in fast.modules()].count(SparseLinear)
    assert kinds == sum(layer.stored == "CSR" for layer in fast.compressed.layers) == len(masks)
    run = (lambda m: m(X)) if build is digits else lambda m: m(IDS).logits
    assert apart(run(fast), run(model)) < 1e-5
    assert fast.compressed.taken
    assert fast.compressed.difference < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"stored as it was fastest here, by gp\.compress: save the network"):
        gp.save(fast, "fast.safetensors")


def test_what_is_not_faster_stays_dense(scripted):
    model = digits()
    gp.prune(model, sparsity=0.9, scope="layer")
    for other in (0.95, 1.0, 3.0):  # the margin is a tenth
        scripted(lambda name, other=other: 1.0 if name == "dense" else other)
        fast = gp.compress(model, X)
        assert [layer.stored for layer in fast.compressed.layers] == ["dense", "dense"]
        assert not fast.compressed.taken
        assert [type(m) for m in fast.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(fast(X), model(X))
    scripted(lambda name: 1.0 if name == "dense" else 0.95)
    assert gp.compress(model, X, margin=0.01).compressed.taken


def test_where_the_whole_is_not_faster_all_is_as_it_was(scripted):
    model = digits()
    gp.prune(model, sparsity=0.9, scope="layer")
    for mixed in (1.1, 1.0, 0.97):  # half of the margin is asked for
        scripted(lambda name, mixed=mixed: {"dense": 1.0, "mixed": mixed}.get(name, 0.5))
        fast = gp.compress(model, X)
        assert not fast.compressed.taken
    assert [layer.stored for layer in fast.compressed.layers] == ["CSR", "CSR"]
    assert fast.compressed.whole.stored == "dense"
    assert torch.equal(fast(X), model(X))
    assert not any(isinstance(m, SparseLinear) for m in fast.modules())
    assert str(fast.compressed).endswith("nothing was faster than dense: all is as it was")


def test_noise_does_not_pick_a_storage_that_is_no_faster():
    judge = compressing._Compressing(digits(), X, 15, 0.1)
    generator = np.random.default_rng(0)
    picked = 0
    for _ in range(2000):
        dense, other = np.exp(generator.normal(0, 0.1, (2, 15)))
        other[generator.random(15) < 0.2] *= 5
        dense[generator.random(15) < 0.2] *= 5
        picked += judge._faster(list(dense), list(other), 0.1)
    assert picked == 0
    assert judge._faster([1.0] * 9 + [9.0] * 6, [0.5] * 9 + [9.0] * 6, 0.1)  # a machine that others use too


def test_blocks_are_found_and_taken_where_they_are_fastest(scripted):
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    assert blocks_of(weight) == 32  # dense is one block
    tiles = (torch.rand(8, 8) > 0.7).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert blocks_of(weight * tiles) == 8
    assert blocks_of(weight * (torch.rand(64, 64) > 0.9)) == 1
    assert blocks_of(torch.randn(6, 6)) == 1
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data.mul_(tiles)
    scripted(lambda name: 0.2 if name.startswith("BSR 8 x 8") else 1.0)
    fast = gp.compress(model, X)
    assert fast.compressed.layers[0].stored == "BSR 8 x 8"
    assert apart(fast(X), model(X)) < 1e-5


def test_the_table_says_why_a_layer_was_not_timed(scripted):
    scripted(sparse_faster)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.full, self.idle = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.full(self.used(x))

    model = Model()
    gp.prune(model, sparsity=0.9, include="used.*")
    told = gp.compress(model, X, masks=None).compressed
    reasons = {layer.layer: layer.reason for layer in told.layers}
    assert reasons == {
        "used.weight": "",
        "full.weight": "has too few zeros",
        "idle.weight": "does not run on the example",
    }
    assert (told.batch, told.threads) == (16, torch.get_num_threads())
    assert "used.weight" in str(told)
    assert "the network is 2.00 times as fast" in str(told)


def test_masks_are_applied_to_the_copy(scripted):
    scripted(sparse_faster)
    model = digits()
    masks = gp.Masks({"0.weight": torch.rand(48, 64) > 0.9})
    fast = gp.compress(model, X, masks=masks)
    assert fast[0].values.numel() == int(masks["0.weight"].sum())
    assert model[0].weight.count_nonzero() == 48 * 64


def test_a_single_layer_and_one_that_runs_twice_are_compressed(scripted):
    scripted(sparse_faster)
    layer = nn.Linear(64, 64)
    gp.prune(layer, sparsity=0.9)
    alone = gp.compress(layer, X)
    assert isinstance(alone, SparseLinear)
    assert [each.layer for each in alone.compressed.layers] == ["weight"]
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    fast = gp.compress(twice, X)
    assert fast[0] is fast[2]
    assert apart(fast(X), twice(X)) < 1e-5


def test_a_module_that_reads_the_weight_itself_stays_dense_with_a_warning(scripted):
    scripted(sparse_faster)

    class Reads(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x) + x @ self.layer.weight.view(64, 64)

    model = Model()
    gp.prune(model, sparsity=0.9)
    with pytest.warns(UserWarning, match="all stays dense: with layers that are stored sparse the forward pass fails"):
        fast = gp.compress(model, X)
    assert torch.equal(fast(X), model(X))


def test_a_transformer_of_torch_is_the_same_function_or_dense(scripted):
    scripted(sparse_faster)
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    gp.prune(model, sparsity=0.8, scope="layer")
    x = torch.randn(2, 5, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = gp.compress(model, x)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            assert apart(fast(x), model(x)) < 1e-4


def test_a_measured_network_is_never_another_function():
    """With the clock of this machine, whatever it says."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)).eval()
    gp.prune(model, sparsity=0.95)
    x = torch.randn(2, 256)
    fast = gp.compress(model, x, rounds=3)
    assert apart(fast(x), model(x)) < 1e-5
    layer = fast.compressed.layers[0]
    assert layer.dense_ms > 0
    assert layer.csr_ms > 0


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"no linear layer \(a convolution is made narrower by gp\.shrink\)"):
        gp.compress(nn.Conv1d(3, 3, 1), torch.ones(1, 3, 4))
    model = models.residual(8)
    assert gp.compress(model, torch.randn(2, 40)).compressed.layers[0].reason == "has too few zeros"


# ------------------------------------------------------------------------------------------------------------------ 2:4


def test_which_weights_can_be_stored_two_of_four(on_accelerator):
    model = nn.Linear(64, 32)
    assert not two_of_four(model.weight)
    gp.prune(model, granularity="2:4")
    assert two_of_four(model.weight)
    assert not two_of_four(torch.zeros(4, 6))
    assert why_not_two_of_four(model.weight) == "2:4 needs a CUDA device"
    for weight, why in (
        (torch.zeros(32, 64), "2:4 needs float16 or bfloat16, not torch.float32|2:4 needs a CUDA device"),
        (torch.zeros(30, 64, dtype=torch.float16), "multiples of 32 x 64, not 30 x 64|needs a CUDA device"),
        (torch.ones(32, 64, dtype=torch.float16), "more than two of four weights|needs a CUDA device"),
    ):
        found = why_not_two_of_four(on_accelerator(weight))
        assert found
        assert any(part in found for part in why.split("|"))

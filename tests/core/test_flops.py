"""Every product is counted, for the layer whose weight it is, and what cannot be counted is named."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradprune as gp

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def pruned_layer():
    layer = nn.Linear(16, 32, bias=False)
    gp.prune(layer, sparsity=0.75)
    return layer


class Changed(nn.Module):
    """A layer whose weight takes part in the product as something else made of it."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = pruned_layer(), change

    def forward(self, x):
        return functional.linear(x, self.change(self.layer.weight))


def total(model, example=X):
    found = gp.report(model, example).total
    return found.flops, found.effective_flops


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.double().float(),
        lambda w: w.bfloat16().float(),
        lambda w: w.clone(),
        lambda w: w.T.contiguous().T,
        lambda w: torch.empty_like(w).copy_(w),
        lambda w: torch.stack(list(w.chunk(2))).flatten(0, 1),
        lambda w: torch.cat([w[:8], w[8:]]),
        lambda w: w[torch.arange(32)],
        lambda w: w.index_select(0, torch.arange(32)),
    ],
)
def test_copies_and_casts_of_a_weight_keep_its_zeros_out_of_the_effective_flops(change):
    row = gp.report(Changed(change), X).rows[0]
    assert (row.name, row.flops, row.effective_flops) == ("layer", 4096, 1024)


def test_a_weight_computed_from_parameters_is_effective_as_it_is():
    assert total(Changed(lambda w: w * 2)) == (4096, 4096)


def test_autocast_changes_no_flops_also_where_the_model_ran_before():
    layer = pruned_layer()
    with torch.autocast("cpu"):
        layer(X)
        assert total(layer) == (4096, 1024)
        layer(X).sum().backward()  # no cast that was made without gradients is left in autocast's cache
    assert layer.weight.grad is not None


def test_one_sample_without_a_batch_counts():
    assert total(pruned_layer(), X[0]) == (1024, 256)
    assert total(nn.Linear(16, 32), X[0]) == (1024, 1024)
    assert total(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4))) == (320, 320)


@pytest.mark.skipif(not hasattr(functional, "grouped_mm"), reason="torch has no product in groups")
def test_a_product_in_groups_counts_each_matrix_as_often_as_it_is_used():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 16, 8))

        def forward(self, x, ends):
            return functional.grouped_mm(x, self.weight, offs=ends)

    model, ends = Experts(), torch.tensor([1, 6, 8], dtype=torch.int32)  # 1, 5 and 2 rows
    with torch.no_grad():
        model.weight[1].zero_()
    assert total(model, (torch.randn(8, 16), ends)) == (2 * 8 * 16 * 8, 2 * 3 * 16 * 8)


def test_what_has_no_formula_is_named_with_how_often_it_ran():
    class Others(nn.Module):
        def forward(self, x):
            return torch.cdist(x, x) + torch.linalg.inv(x @ x.T) + torch.fft.fft(x).real.sum() + torch.cdist(x, x)

    report = gp.report(Others(), X)
    assert report.total.flops == 2 * 4 * 4 * 16
    assert report.uncounted["aten._cdist_forward"] == 2
    assert len(report.uncounted) == 3
    assert "FLOPs lack those of operators without a formula: aten._cdist_forward (2x)" in str(report)
    assert gp.report(pruned_layer(), X).uncounted == {}


def test_an_operator_of_another_library_that_gets_a_weight_is_named():
    library = torch.library.Library("gradprune_test", "DEF")
    library.define("times(Tensor x, Tensor w) -> Tensor")
    library.impl("times", lambda x, w: x @ w.T, "CPU")

    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x):
            return torch.ops.gradprune_test.times(x, self.layer.weight)

    assert gp.report(Foreign(), X).uncounted == {"gradprune_test.times": 1}


def test_compiled_scripted_and_exported_models_count_like_the_original():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    gp.prune(model, sparsity=0.5)
    wanted = total(model)
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    assert total(compiled) == wanted
    assert total(torch.jit.trace(model, X)) == wanted
    assert total(torch.export.export(model, (X,)).module()) == wanted


def test_inference_mode_changes_nothing():
    layer = pruned_layer()
    with torch.inference_mode():
        assert total(layer) == (4096, 1024)
        made_there = nn.Linear(16, 3)
    assert total(made_there) == (384, 384)


def test_a_module_that_fails_and_is_caught_does_not_shift_the_others():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = nn.Linear(3, 3), nn.Linear(16, 16)

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x) @ x.T

    assert [(row.name, row.flops) for row in gp.report(Tries(), X).rows] == [
        ("wrong", 0), ("right", 2048), ("(other)", 512),
    ]  # fmt: skip

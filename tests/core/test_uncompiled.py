"""What works on NumPy arrays runs inside a compiled function as it does outside, and import waits for no compiler."""

import subprocess
import sys

import torch
from torch import nn

import gradprune as gp
from gradprune.core.select import keep_n_of_m
from gradprune.core.uncompiled import uncompiled


def test_choosing_and_pruning_run_inside_a_compiled_function():
    values = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))

    def choose(x):
        mask = gp.keep_largest(x * 2, 100)[0]
        return (x * mask).sum() + gp.kth_smallest(x * 2, 9) + keep_n_of_m(x, 2, 4).sum()

    assert torch.compile(choose, backend="eager")(values) == choose(values)
    model = nn.Linear(8, 8)
    torch.compile(lambda: gp.prune(model, sparsity=0.5), backend="eager")()
    assert int((model.weight == 0).sum()) == 32


def test_a_compiled_step_prunes():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = gp.Pruner(model, optimizer, gp.Linear(0.75, 0, 3))
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        model(torch.randn(4, 8)).sum().backward()
        step()
    assert pruner.masks.sparsity == 0.75
    assert int((model.weight == 0).sum()) == 48


def test_the_import_does_not_import_the_compiler():
    code = "import torch, sys, gradprune; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_the_compiler_was_never_imported_the_function_itself_runs(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)

    def called_with(*args, **kwargs):
        return args, kwargs

    assert uncompiled(called_with)(1, b=2) == ((1,), {"b": 2})
    assert "torch._dynamo" not in sys.modules

"""Is a gradient that cannot be written found, by name, before any other is changed?"""

from __future__ import annotations

import copy
import doctest
import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import gradprune as gp

CLIPS = {
    "by value": lambda p: gp.clip_by_value_(p, 0.01),
    "by norm": lambda p: gp.clip_by_norm_(p, 0.01),
    "by the largest": lambda p: gp.clip_by_norm_(p, 0.01, norm_type=float("inf")),
    "by the sum": lambda p: gp.clip_by_norm_(p, 0.01, norm_type=1),
    "adaptive": lambda p: gp.clip_adaptive_(p),
    "auto": lambda p: gp.AutoClip(0.0)(p),
}
THRESHOLDS = {
    "threshold": lambda p: gp.threshold_gradients_(p, 0.1),
    "ratio": lambda p: gp.threshold_gradients_(p, ratio=2.0),
    "top": lambda p: gp.keep_top_gradients_(p, 0.1),
    "top of each": lambda p: gp.keep_top_gradients_(p, 0.1, scope="layer"),
    "feedback": lambda p: gp.ErrorFeedback(p, 0.1).step(),
    "feedback over a threshold": lambda p: gp.ErrorFeedback(p, threshold=0.1).step(),
}
CALLS = CLIPS | THRESHOLDS
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def model_with(grad):
    """Two layers whose last weight has this gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model(torch.randn(8, 4)).square().sum().backward()
    if grad.is_meta:
        model[1] = nn.Linear(4, 4, bias=False, device="meta")
    if grad.layout != torch.strided:
        model[1].weight = nn.Parameter(grad.clone())
    model[1].weight.grad = grad
    return model


def made_in_inference_mode():
    with torch.inference_mode():
        return torch.ones(4, 4)


def csr():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(4).to_sparse_csr()


UNWRITABLE = {
    "expanded": (lambda: torch.ones(1, 4).expand(4, 4), ValueError, r"entries of the gradient of '1\.weight' share"),
    "inference": (made_in_inference_mode, ValueError, r"gradient of '1\.weight' was made in inference mode"),
    "negative bit": (
        lambda: torch.imag(torch.ones(4, 4, dtype=torch.complex64).conj()),
        ValueError,
        r"gradient of '1\.weight' is a view with the negative bit",
    ),
    "meta": (lambda: torch.ones(4, 4, device="meta"), TypeError, r"gradient of '1\.weight' is on the meta device"),
    "csr": (csr, (TypeError, ValueError), r"the gradient of '1\.weight' is (of layout|sparse)"),
}


@every_call
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_gradient_that_cannot_be_written_is_named_before_any_is_changed(call, kind):
    make, error, message = UNWRITABLE[kind]
    model = model_with(make())
    before = [p.grad.clone() for p in model[0].parameters()]
    with pytest.raises(error, match=message):
        call(model)
    with pytest.raises(error, match=message):
        call(list(model.named_parameters()))
    with pytest.raises(error, match=message.replace(r"1\.weight", "parameter 2")):
        call(model.parameters())
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model[0].parameters(), strict=True))


@every_call
def test_two_gradients_on_one_memory_are_an_error_that_names_both(call):
    model = model_with(torch.ones(4, 4))
    for shared in (model[0].weight.grad, model[0].weight.grad.t()):
        model[1].weight.grad = shared
        before = copy.deepcopy(shared)
        with pytest.raises(ValueError, match=r"the gradients of '0\.weight' and '1\.weight' are on one memory"):
            call(model)
        assert torch.equal(shared, before)


@every_call
def test_gradients_in_parts_of_one_memory_and_empty_ones_are_fine(call):
    model = model_with(torch.ones(4, 4))
    flat = torch.randn(36)
    for p, part in zip(model.parameters(), flat.split([16, 4, 16]), strict=True):
        p.grad = part.view(p.shape)
    empty = [nn.Parameter(torch.zeros(0, 3)) for _ in range(2)]
    for p in empty:
        p.grad = torch.zeros(0, 3)
    call([*model.parameters(), *empty])


@every_call
def test_inside_inference_mode_its_own_gradients_are_written(call):
    with torch.inference_mode():
        parameter = nn.Parameter(torch.ones(4), requires_grad=False)
        parameter.grad = torch.tensor([1.0, 5.0, 3.0, 0.01])
        call(parameter)
        assert (float(parameter.grad.sum()) == pytest.approx(9.01)) is (
            call is CALLS["auto"]
        )  # its first norm is usual


@every_call
def test_a_gradient_of_integers_is_an_error(call):
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    parameter.grad = torch.ones(3, dtype=torch.int64)
    with pytest.raises((TypeError, ValueError), match=r"the gradient of 'parameter 0' is torch\.int64"):
        call([parameter])


def test_what_takes_no_sharded_gradients_refuses_them_by_name_whatever_stands_beside_them():
    code = """
import torch, torch.distributed as dist
from torch import nn
import gradprune as gp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh = init_device_mesh("cpu", (1,))
d = lambda t: distribute_tensor(t, mesh, [Shard(0)])
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain, self.sharded = nn.Parameter(torch.ones(4)), nn.Parameter(d(torch.ones(8, 4)))
m = M(); m.plain.grad = torch.full((4,), 3.0); m.sharded.grad = d(torch.full((8, 4), 3.0))
for call in (lambda: gp.Recorder(m, torch.optim.SGD(m.parameters(), 0.1)),):
    try:
        call()
        print("accepted")
    except TypeError as error:
        assert "'sharded' is a DTensor" in str(error), error
dist.destroy_process_group()
print("done")
"""
    source = str(Path(gp.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}
    )
    assert done.stdout.split() == ["done"], done.stdout + done.stderr


@pytest.mark.parametrize("module", sorted(p.stem for p in Path(gp.__file__).with_name("gradients").glob("[a-z]*.py")))
def test_the_examples_of_the_docstrings_run(module):
    found = importlib.import_module(f"gradprune.gradients.{module}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = doctest.testmod(found, extraglobs={"gp": gp, "torch": torch})
    assert done.failed == 0
    public = [name for name in gp.__all__ if getattr(gp, name).__module__ == found.__name__]
    assert done.attempted >= 2 * len(public)

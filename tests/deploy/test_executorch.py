"""What is exported is the same function in ExecuTorch, or there is no file."""

import subprocess
import sys

import pytest
import torch
from executorch.runtime import Runtime
from networks import IDS, X, digits, gpt2, residual
from torch import nn

import gradprune as gp
from gradprune.lab import models


def by_executorch(path, *tensors):
    """What ExecuTorch itself says, asked without the package."""
    return Runtime.get().load_program(path).load_method("forward").execute(list(tensors))


@pytest.mark.parametrize(
    ("build", "example"),
    [(digits, X), (residual, torch.randn(4, 40)), (gpt2, {"input_ids": IDS})],
)
def test_the_file_gives_the_outputs_of_the_network_for_its_batch(build, example, tmp_path):
    model = build().train()
    done = gp.export(model, example, tmp_path / "model.pte", runtime="executorch")
    assert model.training
    assert done.bytes == (tmp_path / "model.pte").stat().st_size
    assert done.runtime == "ExecuTorch"
    assert done.difference < 1e-5
    assert "by ExecuTorch the outputs differ" in str(done)
    tensor = example["input_ids"] if isinstance(example, dict) else example
    assert done.batch == len(tensor)
    other = tensor.flip(0)
    wanted = model.eval()(other)
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.logits
    torch.testing.assert_close(by_executorch(tmp_path / "model.pte", other)[0], wanted, rtol=0, atol=1e-4)


def test_a_shrunk_network_is_exported_as_narrow_as_it_is_and_zeros_take_as_much_room(tmp_path):
    x = torch.randn(2, 40)
    torch.manual_seed(0)
    model = models.residual(32).eval()
    dense = gp.export(model, x, tmp_path / "dense.pte", runtime="executorch").bytes
    gp.prune(model, sparsity=0.7, granularity="group", scope="layer", example=x)
    masked = gp.export(model, x, tmp_path / "masked.pte", runtime="executorch").bytes
    small = gp.export(gp.shrink(model, x), x, tmp_path / "small.pte", runtime="executorch").bytes
    assert abs(masked - dense) < 0.01 * dense
    assert small < 0.6 * dense


def test_masks_that_are_not_applied_yet_are_in_the_file_and_the_network_stays(tmp_path):
    model = digits().eval()
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = gp.Masks({"0.weight": torch.rand(model[0].weight.shape) > 0.5})
    gp.export(model, X, tmp_path / "model.pte", runtime="executorch", masks=masks)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    masks.apply_(model)
    torch.testing.assert_close(by_executorch(tmp_path / "model.pte", X)[0], model(X), rtol=0, atol=1e-4)


def test_integers_of_eight_bits_are_exported(tmp_path):
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    dense = gp.export(model, X, tmp_path / "dense.pte", runtime="executorch").bytes
    gp.quantize(model)
    done = gp.export(gp.quantize(model), X, tmp_path / "model.pte", runtime="executorch")
    assert done.difference < 1e-4
    assert done.bytes < 0.5 * dense


def test_where_the_outputs_differ_there_is_no_file_and_the_old_one_stays(tmp_path):
    class Drawn(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    target = tmp_path / "model.pte"
    target.write_text("old")
    with pytest.raises(ValueError, match=r"by ExecuTorch 'output' differs|cannot be exported|cannot run"):
        gp.export(Drawn(), X, target, runtime="executorch")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pte"]


def test_what_cannot_be_exported_is_refused_in_words(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"runtime must be one of 'onnx', 'executorch'"):
        gp.export(digits(), X, tmp_path / "model.pte", runtime="tensorrt")
    with pytest.raises(ValueError, match="whose rounding of the inputs ExecuTorch does not have"):
        gp.export(gp.quantize(digits(), "int8_dynamic"), X, tmp_path / "model.pte", runtime="executorch")
    for name in [n for n in sys.modules if n.partition(".")[0] == "executorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"executorch: pip install 'gradprune\[executorch\]'"):
        gp.export(digits(), X, tmp_path / "model.pte", runtime="executorch")
    assert list(tmp_path.iterdir()) == []


def test_the_libraries_print_nothing(tmp_path):
    code = "import torch; from torch import nn; import gradprune as gp; model = nn.Sequential(nn.Linear(8, 8)); "
    code += "gp.export(model, torch.randn(4, 8), 'model.pte', runtime='executorch')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""

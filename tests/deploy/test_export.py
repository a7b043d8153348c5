"""What is exported is the same function in the other runtime, or there is no file."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from networks import IDS, X, digits, gpt2, llama, residual
from torch import nn

import gradprune as gp
from gradprune.deploy import export as exporting


def by_onnx(path, *tensors):
    """What ONNX Runtime itself says, asked without the package."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return session.run(None, {name: t.numpy() for name, t in zip(names, tensors, strict=True)})


@pytest.mark.parametrize(
    ("build", "example"),
    [
        (digits, X),
        (residual, torch.randn(4, 40)),
        (residual, torch.randn(1, 40)),  # a size that torch.export would take for a constant
        (gpt2, {"input_ids": IDS}),
        (llama, (IDS,)),
    ],
)
def test_the_file_gives_the_outputs_of_the_network_for_any_batch(build, example, tmp_path):
    model = build().train()
    done = gp.export(model, example, tmp_path / "model.onnx")
    assert model.training
    assert done.bytes == (tmp_path / "model.onnx").stat().st_size
    assert done.batch == "any"
    assert done.difference < 1e-5
    assert not list(tmp_path.glob(".grad*"))
    tensor = (
        example["input_ids"] if isinstance(example, dict) else example[0] if isinstance(example, tuple) else example
    )
    assert done.inputs == (("input_ids",) if tensor is IDS else ("input",))
    assert done.outputs == (("logits",) if tensor is IDS else ("output",))
    other = tensor[torch.arange(7) % len(tensor)]
    wanted = model.eval()(other)
    wanted = (wanted if isinstance(wanted, torch.Tensor) else wanted.logits).detach().numpy()
    np.testing.assert_allclose(by_onnx(tmp_path / "model.onnx", other)[0], wanted, atol=1e-5 * abs(wanted).max())


def test_masked_zeros_are_in_the_file(tmp_path):
    model = digits()
    masks = gp.Masks({"0.weight": torch.rand(48, 64) > 0.9})
    gp.export(model, X, tmp_path / "model.onnx", masks=masks)
    assert model[0].weight.count_nonzero() == 48 * 64
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    (weight,) = (t for t in tensors.values() if t.shape in ((48, 64), (64, 48)))
    assert np.count_nonzero(weight) == int(masks["0.weight"].sum())
    masks.apply_(model)
    assert abs(by_onnx(tmp_path / "model.onnx", X)[0] - model(X).detach().numpy()).max() < 1e-5


def test_a_shrunk_network_is_exported_as_narrow_as_it_is(tmp_path):
    model = digits()
    gp.prune(model, sparsity=0.75, granularity="channel", include="0.*")
    dense, small = (gp.export(m, X, tmp_path / "m") for m in (model, gp.shrink(model, X)))
    assert small.bytes < 0.4 * dense.bytes


@pytest.mark.parametrize("build", [digits, gpt2])
def test_integers_of_eight_bits_stay_so_in_the_file(build, tmp_path):
    model, example = build(), X if build is digits else IDS
    small = gp.quantize(model)
    done = gp.export(small, example, tmp_path / "small.onnx")
    kinds = [t.data_type for t in onnx.load(tmp_path / "small.onnx").graph.initializer if len(t.dims) == 2]
    assert kinds.count(onnx.TensorProto.INT8) == sum(layer.scheme == "int8" for layer in small.quantized.layers)
    assert done.difference < 1e-5
    assert done.bytes < 0.6 * gp.export(model, example, tmp_path / "dense.onnx").bytes
    with pytest.raises(ValueError, match=r"quantized by 'int8_dynamic'.*gp\.quantize\(model, 'int8'\)"):
        gp.export(gp.quantize(model, "int8_dynamic"), example, tmp_path / "dynamic.onnx")


def test_the_file_does_not_say_where_the_sources_are(tmp_path):
    gp.export(residual(), torch.randn(4, 40), tmp_path / "model.onnx")
    raw = (tmp_path / "model.onnx").read_bytes()
    assert b"site-packages" not in raw
    assert b".py" not in raw


class Fixed(nn.Module):
    """Only for the batch that it was made for."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return x + self.table


def test_a_network_for_one_batch_size_is_exported_for_it_and_a_warning_says_so(tmp_path):
    with pytest.warns(UserWarning, match="the file is for batches of 4 alone, since with an open batch size"):
        done = gp.export(Fixed(), torch.randn(4, 8), tmp_path / "model.onnx")
    assert done.batch == 4
    assert str(done).endswith("of the largest")
    assert "a batch of 4" in str(done)


def test_several_inputs_and_outputs_keep_their_names_and_order(tmp_path):
    class Two(nn.Module):
        def forward(self, left, right):
            return {"sum": left + right, "product": left * right}

    left, right = torch.randn(3, 5), torch.randn(3, 5)
    done = gp.export(Two(), {"right": right, "left": left}, tmp_path / "model.onnx")
    assert set(done.inputs) == {"left", "right"}
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    total, product = session.run(["sum", "product"], {"left": left.numpy(), "right": right.numpy()})
    np.testing.assert_allclose(total, (left + right).numpy(), rtol=1e-6)
    np.testing.assert_allclose(product, (left * right).numpy(), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_where_the_outputs_differ_there_is_no_file_and_the_old_one_stays(tmp_path, monkeypatch):
    target = tmp_path / "model.onnx"
    target.write_text("old")
    ran = onnxruntime.InferenceSession.run
    with monkeypatch.context() as patched:
        patched.setattr(onnxruntime.InferenceSession, "run", lambda *a: [1.01 * out for out in ran(*a)])
        with pytest.raises(ValueError, match=r"by ONNX Runtime 'output' differs by .*allowed is 0\.0001"):
            gp.export(digits(), X, target)
        allowed = gp.export(digits(), X, tmp_path / "other.onnx", tolerance=0.02)
    assert allowed.difference == pytest.approx(0.01, rel=0.1)
    assert target.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "other.onnx"]


def test_what_cannot_be_exported_is_refused_in_words(tmp_path, monkeypatch):
    class Counts(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x @ x.T).real.sum() + x

    with pytest.raises(ValueError, match=r"the network cannot be exported: |ONNX Runtime cannot run"):
        gp.export(Counts(), torch.randn(4, 4), tmp_path / "model.onnx")
    with pytest.raises(TypeError, match="the example must hold tensors alone"):
        gp.export(digits(), (), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="folder that does not exist"):
        gp.export(digits(), X, tmp_path / "nowhere" / "model.onnx")
    monkeypatch.setitem(exporting.RUNTIMES, "onnx", exporting.RUNTIMES["onnx"]._replace(largest=1000))
    with pytest.raises(ValueError, match=r"the network has 14\.\d kB, and an ONNX file holds at most 2 GB"):
        gp.export(digits(), X, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime: pip install 'gradprune\[deploy\]'"):
        gp.export(digits(), X, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_libraries_print_nothing(tmp_path):
    code = "import torch; from torch import nn; import gradprune as gp; model = nn.Sequential(nn.Linear(8, 8)); "
    code += "gp.quantize(model); gp.export(model, torch.randn(4, 8), 'model.onnx')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_a_quantized_layer_that_stands_in_two_places_is_in_the_file_once(tmp_path):
    layer = nn.Linear(64, 64)
    twice = gp.quantize(nn.Sequential(layer, nn.ReLU(), layer))
    once = gp.quantize(nn.Sequential(layer, nn.ReLU()))
    found, alone = (gp.export(model, torch.randn(3, 64), tmp_path / "model.onnx").bytes for model in (twice, once))
    assert found - alone < layer.weight.numel()


@pytest.mark.parametrize("call", [lambda m, x, path: gp.export(m, x, path), lambda m, x, _: gp.compress(m, x)])
def test_an_example_that_the_network_does_not_take_is_shown(tmp_path, call):
    with pytest.raises(ValueError, match=r"does not run on the example, a tensor of shape \(3, 5\)"):
        call(nn.Sequential(nn.Linear(64, 8)), torch.randn(3, 5), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())

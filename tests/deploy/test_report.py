"""The report's numbers are those counted by hand, and making it changes nothing."""

import builtins
import copy
import io

import pytest
import torch
from torch import nn

import gradprune as gp
from gradprune.deploy.sparse import SparseLinear


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 10, bias=False))


EXAMPLE = torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def test_counts_and_bytes_are_those_counted_by_hand():
    model = small_model()
    gp.prune(model, scope={"0.weight": 0.5, "4.weight": 0.9})
    conv, linear = gp.report(model).rows
    assert (conv.name, conv.kind, conv.parameters, conv.nonzeros) == ("0", "Conv2d", 76, 40)
    assert (linear.parameters, linear.nonzeros, linear.sparsity) == (640, 64, 0.9)
    assert linear.bytes_dense == 640 * 4
    assert linear.bytes_bitmask == 80 + 64 * 4
    assert linear.bytes_csr == 64 * 8 + 11 * 4
    assert conv.bytes_bitmask == 9 + 36 * 4 + 4 * 4  # the bias as it is
    assert 0 < linear.bytes_compressed < linear.bytes_dense
    assert linear.flops is None
    total = gp.report(model).total
    assert (total.parameters, total.nonzeros, total.flops) == (716, 104, None)
    assert total.bytes_dense == 716 * 4


def test_flops_are_two_a_multiplication_and_effective_ones_leave_zeros_out():
    model = small_model()
    gp.prune(model, scope={"4.weight": 0.75})
    report = gp.report(model, EXAMPLE)
    conv, linear = report.rows
    assert conv.flops == conv.effective_flops == 2 * 5 * (4 * 4) * 4 * (2 * 9)
    assert linear.flops == 2 * 5 * 640
    assert linear.effective_flops == linear.flops // 4
    assert report.total.flops == conv.flops + linear.flops


def test_what_no_layer_accounts_for_is_listed_as_other():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(8, 8)
            self.inner = nn.Sequential(nn.Linear(8, 8))

        def forward(self, x, scale=1.0):
            y = self.inner(self.project(x))
            return y @ y.T * scale

    report = gp.report(Attention(), {"x": torch.randn(3, 8), "scale": 2.0})
    assert [(row.name, row.flops) for row in report.rows] == [("project", 384), ("inner.0", 384), ("(other)", 144)]


def test_a_tied_tensor_counts_once_and_a_bare_layer_has_a_row():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert [row.parameters for row in gp.report(model, torch.randn(1, 4)).rows] == [16, 0]
    assert gp.report(model).total.bytes_dense == 64
    bare = gp.report(nn.Linear(3, 2), torch.randn(1, 3))
    assert [(row.name, row.parameters, row.flops) for row in bare.rows] == [("(model)", 8, 12)]


def test_half_precision_counts_two_bytes():
    assert gp.report(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)).total.bytes_dense == 128


def test_a_model_without_parameters_is_all_zero():
    report = gp.report(nn.ReLU(), torch.randn(3))
    assert report.rows == ()
    assert report.total.parameters == 0
    assert report.total.sparsity == 0.0
    assert "total" in str(report)


def test_latency_is_measured_on_request():
    assert gp.report(small_model(), EXAMPLE).latency is None
    report = gp.report(small_model(), EXAMPLE, latency=True)
    assert 0 < report.latency < 10
    assert "One forward pass took" in str(report)
    with pytest.raises(ValueError, match="latency needs an example"):
        gp.report(small_model(), latency=True)


def test_the_model_is_left_as_it_was():
    model = small_model().train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gp.report(model, EXAMPLE)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(ValueError, match=r"does not run on the example, a tensor of shape \(1, 3, 6, 6\)"):
        gp.report(model, torch.randn(1, 3, 6, 6))
    assert model.training


def test_it_renders_as_text_html_rich_and_frame_and_says_that_zeros_save_no_time():
    from rich.console import Console

    report = gp.report(small_model(), EXAMPLE)
    text, html = str(report), report._repr_html_()
    lines = text.splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert [line.split()[0] for line in lines[2:-3]] == [row.name for row in report.rows]
    assert "Conv2d" in lines[2]
    assert "716" in lines[-2]
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    for rendered in (text, html, console.file.getvalue().replace("\n", " ")):
        assert "Zeros alone save no time" in rendered
        assert "2.86 kB" in rendered
    assert html.count("<tr>") == 4
    frame = report.to_frame()
    assert frame.loc["total", "parameters"] == 716
    assert list(frame.index) == ["0", "4", "total"]


def test_names_are_escaped_in_html():
    model = nn.ModuleDict({"<b>": nn.Linear(2, 2)})
    assert "&lt;b&gt;" in gp.report(model)._repr_html_()


def test_without_pandas_the_frame_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(ImportError, match="pip install pandas"):
        gp.report(nn.Linear(2, 2)).to_frame()


@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr"])
def test_a_weight_stored_sparse_is_reported_as_if_stored_dense(layout):
    model, x = nn.Sequential(nn.Linear(8, 4, bias=False)), torch.randn(3, 8)
    gp.prune(model, sparsity=0.75)
    dense = gp.report(model, x)
    weight = model[0].weight.detach()
    stored = {"csr": weight.to_sparse_csr, "csc": weight.to_sparse_csc, "coo": weight.to_sparse}.get(layout)
    model[0].weight = nn.Parameter(stored() if stored else weight.to_sparse_bsr((2, 2)), requires_grad=False)
    assert gp.report(model, x).rows == dense.rows
    assert gp.report(model).total.nonzeros == 8


def test_what_holds_no_readable_weights_is_refused_by_name():
    for model, told in (
        (nn.Sequential(nn.Linear(2, 2, device="meta")), r"'0\.weight' is on the meta device"),
        (nn.Sequential(nn.LazyLinear(2)), r"'0\.weight' is lazy"),
        (nn.Linear, "got the class Linear"),
        (nn.Linear(2, 2).state_dict(), "looks like a state dict"),
        (None, r"model must be a torch\.nn\.Module, got None"),
    ):
        with pytest.raises(TypeError, match=told):
            gp.report(model)


def test_a_quantized_model_is_refused_rather_than_reported_as_empty():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self._packed_params = nn.Identity()  # as torch's quantized layers keep their weights

    with pytest.raises(TypeError, match="'0' is quantized"):
        gp.report(nn.Sequential(Packed()))


def test_a_dtensor_is_refused_by_name():
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.ParameterList([nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))])
        with pytest.raises(TypeError, match="'0' is a DTensor"):
            gp.report(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.complex64, torch.int8])
def test_zeros_are_counted_in_any_dtype(dtype):
    weight = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to(dtype)
    row = gp.report(nn.ParameterList([nn.Parameter(weight, requires_grad=False)])).total
    assert (row.parameters, row.nonzeros) == (4, 2)


def test_an_interrupt_leaves_no_hook_no_mode_and_no_buffer_changed(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).train()
    register, registered = nn.Module.register_forward_hook, []

    def interrupt(self, *args, **kwargs):
        registered.append(self)
        if len(registered) == 3:
            raise KeyboardInterrupt
        return register(self, *args, **kwargs)

    for look in (lambda: gp.report(model, torch.randn(4, 3)), lambda: gp.activation(model, [torch.randn(4, 3)])):
        registered.clear()
        monkeypatch.setattr(nn.Module, "register_forward_hook", interrupt)
        with pytest.raises(KeyboardInterrupt):
            look()
        monkeypatch.undo()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(m.training for m in model.modules())
        assert torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mkldnn.enabled


def test_buffers_that_the_model_changes_or_replaces_are_as_before():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x):
            self.calls += 1
            self.last = self.last + 1
            return self.layer(x)

    model = Counting()
    last = model.last
    gp.report(model, torch.randn(1, 2), latency=True)
    gp.activation(model, [torch.randn(1, 2)])
    assert model.last is last
    assert not model.calls.any()
    assert not last.any()


def test_torchs_defaults_do_not_matter():
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    gp.prune(model, sparsity=0.5)
    wanted = gp.report(model, x)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = gp.report(model, x)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found.rows == wanted.rows


def test_the_latency_of_a_compiled_model_is_that_of_the_compiled_one():
    eager = []

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            if not torch.compiler.is_compiling():
                eager.append(1)
            return self.layer(x)

    x = torch.randn(2, 4)
    model = torch.compile(Noted().eval(), backend="eager")
    model(x)
    report = gp.report(model, x, latency=True)
    assert report.total.flops == 64
    assert report.latency > 0
    assert len(eager) == 1  # where the operators are counted


def test_a_compressed_model_is_reported_as_the_dense_one():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    gp.prune(model, sparsity=0.9, scope="layer")
    example = torch.randn(4, 64)
    dense = gp.report(model, example)
    for columns in (False, True):
        fast = copy.deepcopy(model)
        fast[0] = SparseLinear(model[0].weight, model[0].bias, columns=columns).eval()
        found = gp.report(fast, example)
        assert [row[2:] for row in found.rows] == [row[2:] for row in dense.rows]


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic"])
def test_of_a_quantized_model_integers_and_scales_are_reported(scheme):
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    masks = gp.prune(model, sparsity=0.9, scope="layer")
    example = torch.randn(4, 64)
    found, dense = gp.report(gp.quantize(model, scheme), example), gp.report(model, example)
    for row, before, linear, mask in zip(found.rows, dense.rows, (model[0], model[2]), masks.values(), strict=True):
        units, weights = linear.weight.shape[0], linear.weight.numel()
        assert row.parameters == before.parameters + units
        assert row.bytes_dense == weights + 4 * units + 4 * units  # integers, scales and bias
        assert row.nonzeros == int(mask.sum()) + 2 * units
        assert (row.flops, row.effective_flops) == (before.flops, before.effective_flops)

"""Tensors, zeros and bytes of a checkpoint are counted right, and differences are found to the bit."""

import pytest
import torch
from safetensors.torch import save_file

import gradprune as gp
from gradprune.deploy import compared
from gradprune.deploy.compared import Difference, contents, differences


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(compared, "STEP", 8)


TENSORS = {
    "a.weight": torch.tensor([[0.0, -0.0, float("nan")], [1.0, float("inf"), 0.0]]).repeat(5, 1),
    "half": torch.tensor([0.0, -0.0, 1e-7, 2.0], dtype=torch.float16),
    "brain": torch.tensor([0.0, -0.0, 1e-30, 2.0], dtype=torch.bfloat16),
    "eight": torch.tensor([0.0, -0.0, 1.0]).to(torch.float8_e4m3fn),
    "double": torch.tensor([0.0, 5e-324], dtype=torch.float64),
    "complex": torch.tensor([0j, 1j, 1 + 0j]),
    "whole": torch.arange(10),
    "on": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
}


def test_zeros_of_every_dtype_are_counted(tmp_path):
    save_file(TENSORS, tmp_path / "m", metadata={"format": "pt"})
    found = contents(tmp_path / "m")
    for row in found.rows:
        tensor = TENSORS[row.name]
        wide = tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor
        assert row.zeros == int((wide == 0).sum()), row.name
        assert (row.entries, row.shape) == (tensor.numel(), tuple(tensor.shape))
        assert row.bytes == tensor.numel() * tensor.element_size()
        assert row.bytes_packed <= row.bytes
    assert found.metadata == {"format": "pt"}
    assert found.bytes == (tmp_path / "m").stat().st_size
    assert {row.name for row in found.rows if not row.reason} == {"a.weight"}


def test_what_is_said_of_packing_is_what_packing_brings(tmp_path):
    weight = torch.randn(100, 100)
    weight[:90] = 0
    save_file({"a.weight": weight, "b.bias": torch.ones(100)}, tmp_path / "m")
    said = contents(tmp_path / "m").bytes_packed
    assert said == 100 * 100 // 8 + 1000 * 4 + 400
    assert 0 < gp.pack(tmp_path / "m", tmp_path / "p").bytes_after - said < 1000  # headers


def test_the_same_is_the_same_also_where_values_are_nan(tmp_path):
    for name in "ab":
        save_file(TENSORS, tmp_path / name)
    assert {row.what for row in differences(tmp_path / "a", tmp_path / "b")} == {"same"}


def test_differences_are_counted(tmp_path):
    a = {
        "1": torch.arange(20.0),
        "2": torch.ones(3),
        "3": torch.ones(4),
        "4": torch.ones(2, 2),
        "5": torch.zeros(1),
        "10": torch.zeros(2),
        "n": torch.zeros(2),
    }
    b = {
        "1": torch.arange(20.0),
        "2": torch.ones(3).half(),
        "4": torch.ones(4),
        "5": -torch.zeros(1),
        "9": torch.ones(2),
        "10": torch.zeros(2),
        "n": torch.tensor([float("nan"), 0.0]),
    }
    b["1"][3], b["1"][4], b["1"][0] = 0.0, 6.5, 1.0
    save_file(a, tmp_path / "a")
    save_file(b, tmp_path / "b")
    assert differences(tmp_path / "a", tmp_path / "b") == (
        Difference("1", "values", 20, 3, became_zero=1, came_back=1, largest=3.0),
        Difference("2", "dtype", 3),
        Difference("3", "only in the first", 4),
        Difference("4", "shape", 4),
        Difference("5", "values", 1, 1, 0, 0, 0.0),  # the sign of zero
        Difference("9", "only in the second", 2),
        Difference("10", "same", 2),
        Difference("n", "values", 2, 1, 0, 1, float("inf")),
    )

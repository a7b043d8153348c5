"""A header is believed only where it fits its file to the byte; what is written is what the library reads."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gradprune.core import header


def written(path, told, data, *, length=None):
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_what_the_library_wrote_is_read(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.tensor(1, dtype=torch.int64), "c": torch.empty(0, 5)}
    save_file(tensors, tmp_path / "f", metadata={"x": "ü"})
    found = header.read(tmp_path / "f")
    assert found.metadata == {"x": "ü"}
    assert {name: (e.dtype, e.shape) for name, e in found.entries.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I64", ()),
        "c": ("F32", (0, 5)),
    }
    assert found.size == (tmp_path / "f").stat().st_size
    assert (tmp_path / "f").read_bytes().startswith(found.opening)


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1).filter(lambda name: name != "__metadata__"),
            st.sampled_from(["F32", "BF16", "U8", "I64"]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        unique_by=lambda t: t[0],
    ),
    st.none() | st.dictionaries(st.text(), st.text(), max_size=2),
)
def test_what_is_laid_out_is_read_by_the_library(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("laid") / "f"

    def size(dtype, shape):
        return header.DTYPES[dtype].itemsize * int(torch.tensor(shape).prod())

    laid = header.laid_out([(n, d, tuple(s), size(d, s)) for n, d, s in tensors], metadata)
    path.write_bytes(laid.opening + bytes(laid.size - laid.start))
    assert header.read(path) == laid
    assert all(entry.start % (entry.itemsize or 1) == 0 for entry in laid.entries.values())
    with safe_open(path, framework="pt") as file:
        assert {n: list(file.get_tensor(n).shape) for n, _, _ in tensors} == {n: s for n, _, s in tensors}
        assert (file.metadata() or {}) == (metadata or {})


LIES = {
    "a hole": ({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20), "'b' leaves a hole before it"),
    "an overlap": ({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12), "'b' overlaps the one before it"),
    "a shape": ({"a": tensor(shape=(3,))}, bytes(8), r"'a', F32 of shape \[3\], takes 12 bytes, and has 8"),
    "a negative shape": ({"a": tensor(shape=(-2,))}, bytes(8), "'a' has a dtype, shape or place that cannot be"),
    "a bool shape": ({"a": tensor(shape=(True,), offsets=(0, 4))}, bytes(4), "that cannot be"),
    "a place": ({"a": tensor(offsets=(8, 0))}, bytes(8), "that cannot be"),
    "no place": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "'a' lacks its dtype, shape or place"),
    "a number": ({"a": 3}, b"", "'a' lacks its dtype, shape or place"),
    "metadata": ({"__metadata__": {"a": 3}}, b"", "metadata is no mapping from text to text"),
    "twice": (b'{"a": 1, "a": 2}', b"", "'a' stands in it twice"),
    "no json": (b"{not json}", b"", "the header of 'f' is damaged"),
    "nested": (b"{" + b'"a":{' * 100_000, b"", "the header of 'f' is damaged"),
    "too short": ({"a": tensor()}, bytes(5), "'f' is cut off: by its header it has .* bytes, the file has"),
    "too long": ({"a": tensor()}, bytes(9), "'f' is longer than it says"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_by_how(tmp_path, lie):
    told, data, says = LIES[lie]
    with pytest.raises(ValueError, match=says):
        header.read(written(tmp_path / "f", told, data))


@pytest.mark.parametrize("length", [10**6, 2**63, 200_000_000])
def test_a_header_longer_than_the_file_is_refused_and_not_read(tmp_path, length):
    with pytest.raises(ValueError, match="'f' is cut off or damaged: its header should take"):
        header.read(written(tmp_path / "f", {"a": tensor()}, bytes(8), length=length))


@pytest.mark.parametrize("cut", [0, 3, 8, 9, 30, -1])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, cut):
    save_file({"a": torch.ones(4, 4)}, tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"'f' is (no safetensors file|cut off)"):
        header.read(tmp_path / "f")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04 and so on", "a pickle or an archive"),
        (b"\x80\x02}q\x00. and so on", "a pickle or an archive"),
        (b"GGUF\x03 and so on", "it is a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull fetches the file"),
        (b"a text of some length", "it does not begin as one does"),
    ],
)
def test_another_kind_of_file_is_refused_by_what_it_is(tmp_path, data, says):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ValueError, match=f"'f' is no safetensors file: .*{says}"):
        header.read(tmp_path / "f")


def test_a_dtype_that_torch_does_not_know_is_taken_as_bytes(tmp_path):
    found = header.read(written(tmp_path / "f", {"a": tensor(dtype="F4", offsets=(0, 1))}, bytes(1)))
    assert found.entries["a"].itemsize is None
    assert found.entries["a"].nbytes == 1

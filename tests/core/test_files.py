"""A file is whole or not there, nothing beside it is touched, and what is no file of ours is refused by what it is."""

import io
import itertools
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradprune.core import files

KIND = files.Kind("gradprune.test", "file of tests", "what a test wrote")


def tensors(value=1.0):
    return {"a": torch.full((3, 2), value), "b": torch.arange(4, dtype=torch.uint8)}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_read(tmp_path):
    files.write(tmp_path / "f", KIND, {"shape": [3, 2], "nan": [1.5]}, tensors())
    told, found = files.read(tmp_path / "f", KIND)
    assert told == {"shape": [3, 2], "nan": [1.5]}
    assert all(torch.equal(found[name], value) for name, value in tensors().items())
    assert names(tmp_path) == ["f"]


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    files.write(tmp_path / "f", KIND, None, tensors())
    _, found = files.read(tmp_path / "f", KIND)
    data = (tmp_path / "f").read_bytes()
    with open(tmp_path / "f", "r+b") as file:
        file.write(bytes(len(data)))
    assert torch.equal(found["a"], tensors()["a"])


def test_defaults_of_torch_do_not_reach_the_file(tmp_path):
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        files.require_storable({"a": torch.ones(2, dtype=torch.float64, device="cpu")})
        files.write(tmp_path / "f", KIND, 1, {"a": torch.ones(2, dtype=torch.float64, device="cpu")})
        _, found = files.read(tmp_path / "f", KIND)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found["a"].device.type == "cpu"
    assert found["a"].dtype == torch.float64


@pytest.mark.parametrize("before", [None, 1.0])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), MemoryError()])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, error, before):
    import safetensors.torch

    if before is not None:
        files.write(tmp_path / "f", KIND, None, tensors(before))

    def half_written(_, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    def no_rename(*_):
        raise error

    for module, name, failing in ((safetensors.torch, "save_file", half_written), (os, "replace", no_rename)):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, failing)
            with pytest.raises(type(error)):
                files.write(tmp_path / "f", KIND, None, tensors(2.0))
    assert names(tmp_path) == ([] if before is None else ["f"])
    if before is not None:
        assert torch.equal(files.read(tmp_path / "f", KIND)[1]["a"], tensors(before)["a"])


def test_files_of_others_with_likely_names_are_left_alone(tmp_path, monkeypatch):
    others = ["f.part", "f.tmp", ".f.part", ".gradprune-.part"]
    for name in others:
        (tmp_path / name).write_text(f"mine: {name}")
    files.write(tmp_path / "f", KIND, None, tensors())
    import safetensors.torch

    def broken(*_, **__):
        raise safetensors.SafetensorError("I/O error")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError, match=r"'.*f' could not be written: I/O error"):
        files.write(tmp_path / "f", KIND, None, tensors())
    assert names(tmp_path) == sorted(["f", *others])
    assert all((tmp_path / name).read_text() == f"mine: {name}" for name in others)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_new_file_has_the_mode_of_a_new_file_and_an_old_one_keeps_its_own(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        old = os.umask(mask)
        try:
            files.write(tmp_path / f"new{mask}", KIND, None, tensors())
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / f"new{mask}").stat().st_mode) == mode
    os.chmod(tmp_path / "new18", 0o640)
    files.write(tmp_path / "new18", KIND, None, tensors(2.0))
    assert stat.S_IMODE((tmp_path / "new18").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name != "posix", reason="links are POSIX's")
def test_a_link_stays_one_and_its_target_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "f")
    files.write(tmp_path / "link", KIND, 7, tensors())
    assert (tmp_path / "link").is_symlink()
    assert files.read(tmp_path / "f", KIND)[0] == 7


def pickled(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


WHOLE = "whole"
NOT_OURS = {
    "empty": (lambda whole: b"", "it is empty"),
    "cut in the tensors": (lambda whole: whole[:-3], "cut off or damaged"),
    "cut in the header": (lambda whole: whole[:30], "cut off or damaged"),
    "longer": (lambda whole: whole + b"more", "cut off or damaged"),
    "text": (lambda whole: b"a text, not tensors", "no safetensors file"),
    "short": (lambda whole: b"abc", "no safetensors file"),
    "torch.save": (lambda whole: pickled({"a": torch.ones(2)}), "a pickle, as torch.save writes"),
    "pickle": (lambda whole: pickle.dumps({"a": 1}), "a pickle, as torch.save writes"),
    "zeros": (lambda whole: bytes(100), "no safetensors file"),
}


@pytest.mark.parametrize("kind", NOT_OURS)
def test_a_file_of_something_else_is_refused_by_what_it_is(tmp_path, kind):
    files.write(tmp_path / WHOLE, KIND, None, tensors())
    make, says = NOT_OURS[kind]
    (tmp_path / "f").write_bytes(make((tmp_path / WHOLE).read_bytes()))
    with pytest.raises(ValueError, match=f"'f' is no file of tests: it is {says}|'f' is no file of tests: .*{says}"):
        files.read(tmp_path / "f", KIND)


def test_tensors_without_our_word_are_refused(tmp_path):
    save_file(tensors(), tmp_path / "f", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'f' is no file of tests: it is a safetensors file without what a test wrote"):
        files.read(tmp_path / "f", KIND)
    save_file(tensors(), tmp_path / "f", metadata={"gradprune.test": "{no json"})
    with pytest.raises(ValueError, match="'f' is no file of tests: its metadata is damaged"):
        files.read(tmp_path / "f", KIND)


def test_a_folder_is_no_file_and_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(ValueError, match="is no file of tests: it is a folder"):
        files.read(tmp_path, KIND)
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*nope'"):
        files.read(tmp_path / "nope", KIND)


@pytest.mark.parametrize("value", [None, 3, 0, 1.5, b"bytes", ["f"], torch.ones(2), open])
def test_what_is_no_path_is_a_type_error(value):
    for check in (files.checked_path, files.place):
        with pytest.raises(TypeError, match="checkpoint must be a path"):
            check("checkpoint", value)


@pytest.mark.parametrize("value", ["", "a\0b"])
def test_a_name_of_no_file_is_a_value_error(value):
    with pytest.raises(ValueError, match="checkpoint must name a file"):
        files.place("checkpoint", value)


def test_a_place_where_no_file_can_be_is_refused_and_one_where_it_can_stays_empty(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="checkpoint is a folder"):
        files.place("checkpoint", tmp_path)
    with pytest.raises(ValueError, match=r"folder that does not exist: '.*no'"):
        files.place("checkpoint", tmp_path / "no" / "f")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder that does not exist"):
        files.place("checkpoint", tmp_path / "file" / "f")
    with pytest.raises(ValueError, match="no ordinary file"):
        files.place("checkpoint", os.devnull)
    assert files.place("checkpoint", str(tmp_path / "f")) == tmp_path / "f"
    assert names(tmp_path) == ["file"]

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ValueError, match=r"cannot be written to: .*Permission denied"):
        files.place("checkpoint", tmp_path / "f")


@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_what_the_format_cannot_hold_is_named(kind):
    with pytest.raises(ValueError, match="'x' is sparse or quantized, which a safetensors file cannot hold"):
        files.require_storable({"fine": torch.ones(2), "x": getattr(torch.eye(2), kind)()})


def test_a_dtype_that_the_format_does_not_know_is_named(monkeypatch):
    import safetensors.torch

    def unknown(tensors):
        raise KeyError(next(iter(tensors.values())).dtype)

    monkeypatch.setattr(safetensors.torch, "save", unknown)
    with pytest.raises(ValueError, match=r"'x' is torch\.float16, which a safetensors file cannot hold"):
        files.require_storable({"x": torch.ones(2, dtype=torch.float16)})


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int64, torch.bool, torch.uint8]
)
def test_what_networks_are_made_of_can_be_held(dtype):
    files.require_storable({"x": torch.ones(2, dtype=dtype)})


def test_without_the_library_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (files.safetensors, lambda: files.write(tmp_path / "f", KIND, None, tensors())):
        with pytest.raises(ImportError, match="pip install safetensors"):
            call()
    assert names(tmp_path) == []


SCRIPT = """
import sys, torch
from pathlib import Path
from gradprune.core import files
kind = files.Kind("gradprune.test", "file of tests", "what a test wrote")
for number in range(10**9):
    files.write(Path(sys.argv[1]), kind, number, {"a": torch.full((2**18,), float(number))})
"""


def test_a_process_killed_while_it_writes_leaves_a_whole_file(tmp_path):
    path, source = tmp_path / "f", Path(files.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], env=environment)
    while process.poll() is None and not (path.exists() and files.read(path, KIND)[0] >= 3):
        number, found = files.read(path, KIND) if path.exists() else (0, {})  # one and the same at any moment
        assert all(bool((value == number).all()) for value in found.values())
    assert process.poll() is None
    process.kill()
    process.wait()
    number, found = files.read(path, KIND)
    assert bool((found["a"] == number).all())
    assert all(name == "f" or name.startswith((".gradprune-", ".tmp")) for name in names(tmp_path))


def test_a_file_that_never_stays_the_same_is_given_up_on_by_name(tmp_path, monkeypatch):
    path = tmp_path / "f"
    files.write(path, KIND, None, tensors())
    versions = itertools.count()
    monkeypatch.setattr(files, "_version", lambda _: (next(versions), 0, 0))
    with pytest.raises(OSError, match=r"f' is written again and again while it is read"):
        files.read(path, KIND)

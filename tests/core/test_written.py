"""Whoever looks finds the old checkpoint or the new one: after kill -9, an error, a full disk."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradprune.core import checkpoint, written
from gradprune.core.checkpoint import opened
from gradprune.deploy.pruned import prune_file

SOURCE = Path(__file__).parents[2] / "src"


def saved(path, value=1.0, shape=(64, 64)):
    save_file({"a.weight": torch.full(shape, value), "b.weight": torch.full(shape, value)}, path)
    return path


def is_pruned(path):
    """Whether half of what `saved` wrote is zero."""
    found = load_file(path)
    return sum(int((t == 0).sum()) for t in found.values()) * 2 == sum(t.numel() for t in found.values())


def half(source, target):
    return prune_file(source, target, sparsity=0.5, scope="layer")


def shards(folder):
    folder.mkdir()
    saved(folder / "model-1.safetensors")
    save_file({"c.weight": torch.ones(8, 8)}, folder / "model-2.safetensors")
    index = '{"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-1.safetensors", '
    (folder / "model.safetensors.index.json").write_text(index + '"c.weight": "model-2.safetensors"}}')
    return folder


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------ kill -9

STOPS = """
import os, sys
from gradprune.core import written
from gradprune.deploy.pruned import prune_file

def stop():
    print("here", flush=True)
    sys.stdin.read()

def before(module, name, times):
    own, left = getattr(module, name), [times]
    def stopping(*arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            stop()
        return own(*arguments, **named)
    setattr(module, name, stopping)

source, target, name, times = sys.argv[1:]
before({"write": os, "replace": os, "rename": os, "fsync": os}[name], name, int(times))
prune_file(source, target, sparsity=0.5, scope="layer")
stop()
"""


def killed_at(source, target, name, times):
    """Start a pruning and kill it before a call to the system; return whether that call was reached."""
    command = [sys.executable, "-c", STOPS, str(source), str(target), name, str(times)]
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
@pytest.mark.parametrize(("name", "times"), [("write", 1), ("write", 2), ("fsync", 1), ("replace", 1)])
def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path, name, times):
    saved(tmp_path / "in.safetensors")
    saved(tmp_path / "out.safetensors", 7.0)
    before = (tmp_path / "out.safetensors").read_bytes()
    killed_at(tmp_path / "in.safetensors", tmp_path / "out.safetensors", name, times)
    assert (tmp_path / "out.safetensors").read_bytes() == before
    left = [p.name for p in tmp_path.iterdir() if p.name not in ("in.safetensors", "out.safetensors")]
    assert all(n.startswith(".gradprune-") and n.endswith(".part") for n in left)
    half(tmp_path / "in.safetensors", tmp_path / "out.safetensors")  # what is left is not in the way
    assert is_pruned(tmp_path / "out.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
def test_a_process_killed_after_the_rename_leaves_the_new_file(tmp_path):
    saved(tmp_path / "in.safetensors")
    saved(tmp_path / "out.safetensors", 7.0)
    killed_at(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "fsync", 3)  # of the folder: the last
    assert is_pruned(tmp_path / "out.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
@pytest.mark.parametrize(("name", "times"), [("write", 4), ("rename", 1)])
def test_a_folder_is_there_with_all_its_files_or_not_at_all(tmp_path, name, times):
    shards(tmp_path / "in")
    killed_at(tmp_path / "in", tmp_path / "out", name, times)
    assert not (tmp_path / "out").exists()
    half(tmp_path / "in", tmp_path / "out")
    assert files_of(tmp_path / "out").keys() == files_of(tmp_path / "in").keys()


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
def test_a_process_killed_at_any_time_leaves_a_whole_file(tmp_path):
    """In place, again and again, after ever longer: what is found is the one or the other, to the byte."""
    source = saved(tmp_path / "in.safetensors", shape=(2048, 1024))
    old = source.read_bytes()
    half(source, tmp_path / "new.safetensors")
    new = (tmp_path / "new.safetensors").read_bytes()
    code = "import sys; from gradprune.deploy.pruned import prune_file; print(flush=True); prune_file(*sys.argv[1:], "
    command = [sys.executable, "-c", code + "sparsity=0.5, scope='layer')", str(source), str(source)]
    for wait in (0.0, 0.01, 0.02, 0.04, 0.08):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(SOURCE)}) as process:
            process.stdout.readline()
            time.sleep(wait)
            process.kill()
        assert source.read_bytes() in (old, new)


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [OSError(errno.EIO, "a broken disk"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("folder", [False, True])
def test_an_error_on_the_way_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, error, folder):
    source = shards(tmp_path / "in") if folder else saved(tmp_path / "in.safetensors")
    before, calls = files_of(tmp_path), []

    def failing(*_):
        calls.append(1)
        if len(calls) > 2:
            raise error
        return own(*_)

    own = os.write
    monkeypatch.setattr(os, "write", failing)
    with pytest.raises(type(error)):
        half(source, tmp_path / ("out" if folder else "in.safetensors"))
    assert files_of(tmp_path) == before


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    saved(tmp_path / "in.safetensors")
    usage = written.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(written.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    before = files_of(tmp_path)
    with pytest.raises(OSError, match=r"no room for 32\.\d kB in .*, where 10.0 kB are free; what stood there is"):
        half(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert files_of(tmp_path) == before


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
def test_a_disk_that_becomes_full_on_the_way_is_told_and_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for the full disk: the system refuses to write on, in the middle."""
    saved(tmp_path / "in.safetensors")
    saved(tmp_path / "out.safetensors", 7.0)
    before = files_of(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"no room for .* in .*, where .* are free \(and files may not be as large\); what"
        ):
            half(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("full", "the output is a folder that holds files"),
        ("file", "the output must be a folder, as the checkpoint is one"),
        ("none/out", r"the output is in a folder that does not exist: '.*none'"),
    ],
)
def test_a_folder_is_written_only_where_none_is(tmp_path, target, says):
    shards(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=says):
        half(tmp_path / "in", tmp_path / target)
    assert files_of(tmp_path) == before


def test_an_empty_folder_is_taken_and_further_files_come_along(tmp_path):
    shards(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "pytorch_model.bin").write_text("the same weights again")
    (tmp_path / "out").mkdir()
    half(tmp_path / "in", tmp_path / "out")
    assert set(files_of(tmp_path / "out")) == set(files_of(tmp_path / "in")) - {"pytorch_model.bin"}


def test_a_source_that_changes_meanwhile_is_an_error_and_nothing_is_written(tmp_path, monkeypatch):
    source = saved(tmp_path / "in.safetensors")
    own = checkpoint.File.read

    def read(self, entry, start, stop):
        os.utime(source, ns=(1, time.time_ns()))
        return own(self, entry, start, stop)

    monkeypatch.setattr(checkpoint.File, "read", read)
    with pytest.raises(OSError, match="was written while it was read"):
        half(source, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [source]


def test_an_output_is_complete_or_an_error(tmp_path):
    with opened(saved(tmp_path / "in.safetensors")) as source:
        header = source.parts[0].header
    with pytest.raises(ValueError, match="fewer bytes were written"), written.Output(tmp_path / "x", header) as output:
        output.write("a.weight", 0, b"1234")
    with written.Output(tmp_path / "y", header) as output:
        with pytest.raises(ValueError, match=r"'a.weight' has 16,384 bytes, 16,385 were to be written"):
            output.write("a.weight", 16_384, b"1")
        output.write("b.weight", 0, bytes(16_384))
        output.write("a.weight", 0, bytes(16_384))

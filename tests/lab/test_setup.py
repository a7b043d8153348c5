"""Does a chapter's first cell make it repeatable, and are the book's files found?"""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gradprune import lab
from gradprune.lab import setup


@pytest.fixture
def as_before():
    """What `start` sets for the whole process is put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


@pytest.mark.usefixtures("as_before")
def test_start_makes_every_generator_repeat_itself_and_another_seed_does_not():
    lab.start(3)
    first = draws()
    lab.start(3)
    assert draws() == first
    lab.start(4)
    assert not set(draws()) & set(first)


@pytest.mark.usefixtures("as_before")
def test_start_takes_one_thread_deterministic_algorithms_and_the_cpu_whatever_was_set():
    torch.set_default_device("meta")
    lab.start()
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.zeros(1).device.type == "cpu"
    assert torch.overrides._get_current_function_mode() is None  # nothing stands between a call and torch


def test_the_device_is_the_one_asked_for_else_the_gpu_that_is_there_else_the_cpu(monkeypatch):
    monkeypatch.delenv("GRADPRUNE_DEVICE", raising=False)
    for there, wanted in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert lab.device() == torch.device(wanted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("GRADPRUNE_DEVICE", "cpu")
    assert lab.device() == torch.device("cpu")


def test_a_start_under_test_turns_off_the_bars_of_others_too(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")
    setup.start(0)
    assert os.environ["TQDM_DISABLE"] == "1"


def test_progress_is_drawn_only_where_someone_watches(monkeypatch):
    assert not setup.progress_wanted()
    for name in ("PYTEST_CURRENT_TEST", "GRADPRUNE_QUIET", "CI"):
        monkeypatch.delenv(name, raising=False)
    assert setup.progress_wanted()
    for name in ("GRADPRUNE_QUIET", "CI"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not setup.progress_wanted()


def test_the_books_files_are_found_from_below_and_their_absence_is_said(monkeypatch, tmp_path):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root / "chapters")
    assert setup.repository() == root
    monkeypatch.chdir(tmp_path)
    assert setup.repository() == root  # above the package
    monkeypatch.setattr(setup, "__file__", str(tmp_path / "setup.py"))
    with pytest.raises(FileNotFoundError, match="neither here nor in the package"):
        setup.repository()
    for folder in (tmp_path / "shipped", tmp_path):  # within the package, and here
        (folder / "book").mkdir(parents=True)
        (folder / "chapters").mkdir()
        (folder / "book" / "claims.yml").touch()
        assert setup.repository() == folder

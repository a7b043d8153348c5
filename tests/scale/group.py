"""Runs cases one after the other in a group of processes that talk over loopback, bounded in time.

The processes are started once, since that takes longer than most cases, and make a new group for each call. They are
forks of one that has imported what takes long and done nothing else.
"""

import atexit
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

MOST = 4  # ranks
SECONDS = 240
PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "gradprune",
    "pytest",
]
Case = Callable[[int, int], None]
_STARTED: list = []


def run(cases: Sequence[Case], ranks: int, timeout: float = 60, *, killed: int = 0) -> dict[str, str]:
    """Call each case with the rank and the number of ranks, in each of so many processes; return what went wrong.

    The answer has every case's name, with "" where all was well. A case that fails ends the processes.
    `timeout` is the group's, in seconds; so many processes are to be `killed` in a case, which the others must outlive.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        busy = dict(_processes()[:ranks])
        for rank, channel in enumerate(busy.values()):
            channel.send((cases, rank, ranks, folder, timeout))
        end, answers = time.monotonic() + SECONDS, {}
        while len(answers) < ranks and time.monotonic() < end:
            for channel in wait([c for c in busy.values() if c not in answers], timeout=0.5):
                answers[channel] = _answer(channel)
            if list(answers.values()).count(False) > killed:
                end = min(end, time.monotonic() + 1)  # the others may be about to say why
        if len(answers) < ranks or not all(answers.values()):
            stop()
        return {case.__name__: _found(folder, case.__name__, ranks - killed) for case in cases}


def tested(cases: Sequence[Case]) -> tuple:
    """Return a fixture that runs the cases on 2 ranks and on 3, and a test of each case, for pytest to find by name:

    ``found, test_over_several_processes = group.tested(CASES)``
    """

    @pytest.fixture(scope="module", params=[2, 3])
    def found(request):
        return run(cases, request.param)

    @pytest.mark.parametrize("case", [case.__name__ for case in cases])
    def test(found, case):
        assert not found[case], found[case]

    return found, test


def stop() -> None:
    """End the processes; the next call starts others."""
    for process, _ in _STARTED:
        process.kill()
        process.join()
    _STARTED.clear()


def _processes() -> list:
    if not _STARTED:
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(PRELOADED)
        for _ in range(MOST):
            here, there = forking.Pipe()
            process = forking.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            _STARTED.append((process, here))
        atexit.register(stop)
    return _STARTED


def _answer(channel) -> bool:
    try:
        return channel.recv()
    except EOFError:
        return False


def _found(folder: Path, case: str, ranks: int) -> str:
    said = [path.read_text() for path in sorted(folder.glob(f"{case}.failed.*"))]
    done = len(list(folder.glob(f"{case}.done.*")))
    return "\n".join(said) or ("" if done == ranks else f"{case}: not done by {ranks - done} of {ranks} ranks in time")


def _serve(channel) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    while True:
        try:
            asked = channel.recv()
        except EOFError:
            return
        channel.send(_one(*asked))


def _one(cases: Sequence[Case], rank: int, ranks: int, folder: Path, timeout: float) -> bool:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))
    for case in cases:
        try:
            case(rank, ranks)
        except BaseException:
            (folder / f"{case.__name__}.failed.{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
            return False
        (folder / f"{case.__name__}.done.{rank}").touch()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return True

"""Runs cases one after the other in a group of processes that talk over loopback, bounded in time."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 150
Case = Callable[[int, int], None]


def run(cases: Sequence[Case], ranks: int) -> dict[str, str]:
    """Call each case with the rank and the number of ranks, in each of so many processes; return what went wrong.

    The answer has every case's name, with "" where all was well. A case that fails ends the group.
    """
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [spawning.Process(target=_one, args=(cases, r, ranks, folder), daemon=True) for r in range(ranks)]
        for process in processes:
            process.start()
        end = time.monotonic() + SECONDS
        while any(process.is_alive() for process in processes) and time.monotonic() < end:
            if any(process.exitcode for process in processes):
                time.sleep(1)  # the others may be about to say why
                break
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.join()
        return {case.__name__: _found(folder, case.__name__, ranks) for case in cases}


def _found(folder: Path, case: str, ranks: int) -> str:
    said = [path.read_text() for path in sorted(folder.glob(f"{case}.failed.*"))]
    done = len(list(folder.glob(f"{case}.done.*")))
    return "\n".join(said) or ("" if done == ranks else f"{case}: not done by {ranks - done} of {ranks} ranks in time")


def _one(cases: Sequence[Case], rank: int, ranks: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    for case in cases:
        try:
            case(rank, ranks)
        except BaseException:
            (folder / f"{case.__name__}.failed.{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
            os._exit(1)
        (folder / f"{case.__name__}.done.{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()

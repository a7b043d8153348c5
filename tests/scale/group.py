"""Runs cases in a group of processes that talk over loopback, bounded in time."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 150
Cases = Callable[[int, int], None]


def run(cases: Cases, ranks: int) -> None:
    """Call ``cases(rank, ranks)`` in each of so many processes; raise what the first raised, or that time was up."""
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        asked = [(cases, rank, ranks, Path(folder)) for rank in range(ranks)]
        processes = [spawning.Process(target=_one, args=arguments, daemon=True) for arguments in asked]
        for process in processes:
            process.start()
        end = time.monotonic() + SECONDS
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < end:
                if any(process.exitcode for process in processes):
                    time.sleep(1)  # the others may be about to say why
                    break
                time.sleep(0.05)
        finally:
            late = [process for process in processes if process.is_alive()]
            for process in late:
                process.kill()
            for process in processes:
                process.join()
        said = [path.read_text() for path in sorted(Path(folder).glob("rank*"))]
        assert not said, "\n".join(said)
        assert not late, f"{len(late)} of {ranks} ranks were still at it"
        assert [process.exitcode for process in processes] == [0] * ranks


def _one(cases: Cases, rank: int, ranks: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        cases(rank, ranks)
        dist.barrier()
    except BaseException:
        (folder / f"rank{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    dist.destroy_process_group()

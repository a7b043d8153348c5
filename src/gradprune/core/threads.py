"""How do threads share what NumPy does piece by piece?

NumPy lets go of the interpreter's lock while it computes, and these threads meet only once, at the end. Torch's own
meet after every operation: where another process wants a processor too, all wait each time for the one interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

P = TypeVar("P")
R = TypeVar("R")

MAX_THREADS = 8  # more only wait for the interpreter's lock
SHARES = 16  # a thread, so that none waits long for one that was interrupted, or whose memory came late


def in_shares(work: Callable[[Sequence[P]], R], pieces: Sequence[P], threads: int) -> list[R]:
    """Return what `work` makes of contiguous shares of the pieces, in order; a thread that is free takes the next."""
    size = max(1, -(-len(pieces) // (1 if threads == 1 else SHARES * threads)))
    shares = [pieces[i : i + size] for i in range(0, len(pieces), size)]
    if len(shares) <= 1:
        return [work(share) for share in shares]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, shares))


def threads_of_torch() -> int:
    """Return how many threads torch would use, or as many as are of use here."""
    return min(torch.get_num_threads(), MAX_THREADS)

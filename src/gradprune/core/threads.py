"""How do threads share what NumPy does piece by piece?

NumPy lets go of the interpreter's lock while it computes, and these threads meet only once, at the end. Torch's own
meet after every operation: where another process wants a processor too, all wait each time for the one interrupted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

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


def mapped(work: Callable[[P], R], items: Iterable[P], threads: int) -> Iterator[R]:
    """Yield what `work` makes of each item, in order, while other threads are at the next; one thread is this one."""
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:
                one.cancel()


@contextmanager
def behind(threads: int) -> Iterator[Callable[..., None]]:
    """Yield a function that has calls done in order by another thread, at most one waiting; one thread is this one.

    An exception of a call is raised by the next one, or where the block ends.
    """
    if threads == 1:
        yield lambda work, *arguments: work(*arguments)
        return
    waiting: deque[Future[Any]] = deque()

    def later(work: Callable[..., object], *arguments: Any) -> None:
        waiting.append(pool.submit(work, *arguments))
        if len(waiting) > 2:
            waiting.popleft().result()

    with ThreadPoolExecutor(1) as pool:
        yield later
        while waiting:
            waiting.popleft().result()


def threads_of_torch() -> int:
    """Return how many threads torch would use, or as many as are of use here."""
    return min(torch.get_num_threads(), MAX_THREADS)

"""Which random numbers does the page draw from a seed, and in which order does it read its examples?

Twin of random.js and of training.js, so that Python can say beforehand what the page will find.
"""

from __future__ import annotations

import numpy as np


def uniform(seed: int, count: int) -> np.ndarray:
    """Return `count` numbers in [0, 1) from `seed`, multiples of 2^-32: Mulberry32, Ettinger (2017)."""
    mask = np.uint64(2**32 - 1)
    state = (np.uint64(seed % 2**32) + np.uint64(0x6D2B79F5) * np.arange(1, count + 1, dtype=np.uint64)) & mask
    z = ((state ^ (state >> np.uint64(15))) * (state | np.uint64(1))) & mask
    z ^= (z + (((z ^ (z >> np.uint64(7))) * (z | np.uint64(61))) & mask)) & mask
    numbers: np.ndarray = (z ^ (z >> np.uint64(14))) / 2**32
    return numbers


def batches(seed: int, rows: int, batch: int, steps: int) -> list[list[int]]:
    """Return the rows of each of `steps` batches: shuffled anew each epoch, the last of an epoch may be shorter."""
    epochs = -(-steps // -(-rows // batch))
    draws = iter(uniform(seed, epochs * (rows - 1)))
    found: list[list[int]] = []
    for _ in range(epochs):
        order = list(range(rows))
        for i in range(rows - 1, 0, -1):
            j = int(next(draws) * (i + 1))
            order[i], order[j] = order[j], order[i]
        found += [order[at : at + batch] for at in range(0, rows, batch)]
    return found[:steps]

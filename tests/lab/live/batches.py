"""Which rows does the page put into its batches? Those of random.js's generator and shuffle, by other code."""

from live_reference import mulberry32


def page_batches(seed: int, rows: int, batch: int, steps: int) -> list[list[int]]:
    """Return the rows of each of `steps` batches: shuffled anew each epoch, the last of an epoch may be shorter."""
    draws = iter(mulberry32(seed, rows * (steps * batch // rows + 2)))
    found: list[list[int]] = []
    while len(found) < steps:
        order = list(range(rows))
        for i in range(rows - 1, 0, -1):
            j = int(next(draws) * (i + 1))
            order[i], order[j] = order[j], order[i]
        found += [order[at : at + batch] for at in range(0, rows, batch)]
    return found[:steps]

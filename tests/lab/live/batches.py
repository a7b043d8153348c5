"""Which rows does the page put into its batches? Those of random.js's generator and shuffle, by other code."""


def mulberry32(seed: int, count: int) -> list[float]:
    """Ettinger's C code, line by line, in arithmetic modulo 2^32."""
    x, found = seed % 2**32, []
    for _ in range(count):
        x = (x + 0x6D2B79F5) % 2**32
        z = (x ^ (x >> 15)) * (x | 1) % 2**32
        z ^= (z + (z ^ (z >> 7)) * (z | 61)) % 2**32
        found.append((z ^ (z >> 14)) / 2**32)
    return found


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

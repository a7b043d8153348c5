"""In how few bytes do the entries of a tensor stand that are not zero: where they are, and what they are?

Two streams. Places: one bit an entry, or the number of zeros before each value, in so many bits (the largest number
that they hold stands for that many zeros and no value). Values: as they are, or, where few are distinct, a list of them
and for each its number in that list. Each time the way that takes fewer bytes. With entropy coding both streams go
through Huffman's code, by the Deflate of Python's own zlib without its search for repetitions, of which weights have
none.

Han et al. (2016), sections 2, 3 and 4.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import numpy as np

from gradprune.core.checks import require

Array = np.ndarray[Any, np.dtype[Any]]

MOST_VALUES = 2**16  # that are numbered
WIDTHS = (2, 3, 4, 5, 6, 7, 8)  # bits of a gap
AT_A_TIME = 2**16  # numbers, a multiple of eight
LEVEL, WINDOW = 9, -15  # of zlib; the negative window leaves out header and checksum


class Told(NamedTuple):
    """What is told of a coded tensor, beside its bytes: places, values and list, one after the other."""

    values: int  # how many are not zero
    gap: int  # bits of a gap; 0 where places are one bit an entry
    number: int  # bits of a number in the list; 0 where values stand as they are
    huffman: int  # whether places and values are coded so
    of_places: int  # bytes
    of_values: int


def coded(units: Array, *, entropy: bool) -> tuple[Array, Told]:
    """Return a tensor's entries, given by their bits as unsigned integers, in the fewest bytes known here."""
    where = np.flatnonzero(units)
    ways = [_coded(units, where, huffman) for huffman in ((False, True) if entropy else (False,))]
    return min(ways, key=lambda way: way[0].nbytes)


def _coded(units: Array, where: Array, huffman: bool) -> tuple[Array, Told]:
    places, gap = _places(units, where, huffman)
    values, book, bits = _values(units[where], huffman)
    told = Told(int(where.size), gap, bits, int(huffman), places.nbytes, values.nbytes)
    return np.concatenate([places, values, book.view(np.uint8)]), told


def decoded(stream: Array, told: Told, entries: int, size: int) -> Array:
    """Return the entries' bits; ValueError where the bytes do not say what they are said to."""
    number, width, bits, huffman, *lengths = told
    require(0 <= number <= entries and width in (0, *WIDTHS) and 0 <= bits <= 16, "what is told of it cannot be")
    require(min(lengths) >= 0 and sum(lengths) <= stream.size, "what is told of it cannot be")
    places, values, book = np.split(stream, np.cumsum(lengths))
    fits = book.size % size == 0 and bits == (_bits_of(book.size // size) if book.size else 0)
    require(fits, "its list is not as long as it says")
    if huffman:
        places = _inflated(places, -(-entries // 8) if not width else 2 * entries + 1)
        values = _inflated(values, number * (2 if bits > 8 else 1) if bits else number * size)
    where = _where(places, width, number, entries, bool(huffman))
    found = np.zeros(entries, f"u{size}")
    found[where] = _found(values, np.ascontiguousarray(book), bits, number, size, bool(huffman))
    return found


# --------------------------------------------------------------------------------------------------------------- places


def _places(units: Array, where: Array, entropy: bool) -> tuple[Array, int]:
    mask = np.packbits(units != 0)
    gaps = np.diff(where, prepend=-1) - 1
    if entropy:
        two = [(_deflated(mask), 0), (_deflated(_with_fillers(gaps, 255).astype(np.uint8)), 8)]
        return min(two, key=lambda pair: pair[0].nbytes)
    sizes = {w: -(-int((gaps // (2**w - 1) + 1).sum()) * w // 8) for w in WIDTHS}
    width = min(sizes, key=lambda w: sizes[w])
    if sizes[width] >= mask.nbytes:
        return mask, 0
    return _packed(_with_fillers(gaps, 2**width - 1), width), width


def _with_fillers(gaps: Array, most: int) -> Array:
    """Each gap as its remainder by `most`, with a `most` before it for each time that it holds it."""
    times, rest = np.divmod(gaps, most)
    found = np.full(gaps.size + int(times.sum()), most)
    found[np.cumsum(times + 1) - 1] = rest
    return found


def _where(places: Array, width: int, number: int, entries: int, huffman: bool) -> Array:
    if not width:
        require(places.nbytes == -(-entries // 8), "its bits are not as many as its entries")
        where = np.flatnonzero(np.unpackbits(places, count=entries))
    else:
        gaps = places.astype(np.int64) if huffman else _unpacked(places, width)
        most = 2**width - 1
        ends = np.flatnonzero(gaps != most)[:number]  # what follows fills the last byte
        used = int(ends[-1]) + 1 if ends.size else 0
        require(places.nbytes == (used if huffman else -(-used * width // 8)), "it has not as many places as values")
        where = (np.cumsum(gaps)[ends] + np.arange(ends.size)).astype(np.int64)
        require(where.size == 0 or int(where[-1]) < entries, "it has more entries than its shape")
    require(where.size == number, "it has not as many places as values")
    return where


# --------------------------------------------------------------------------------------------------------------- values


def _values(alive: Array, entropy: bool) -> tuple[Array, Array, int]:
    book, numbers = np.unique(alive, return_inverse=True)
    bits = _bits_of(book.size)
    plain = alive.view(np.uint8) if not entropy else _deflated(_planes(alive))
    none = np.empty(0, alive.dtype)
    if book.size > MOST_VALUES or not alive.size:
        return plain, none, 0
    numbered = (
        _deflated(_planes(numbers.astype(np.uint8 if bits <= 8 else np.uint16))) if entropy else _packed(numbers, bits)
    )
    return (numbered, book, bits) if numbered.nbytes + book.nbytes < plain.nbytes else (plain, none, 0)


def _bits_of(number: int) -> int:
    """How many bits number so many things."""
    return max(1, math.ceil(math.log2(max(number, 2))))


def _found(values: Array, book: Array, bits: int, number: int, size: int, huffman: bool) -> Array:
    if not bits:
        require(values.nbytes == number * size, "it has not as many values as it says")
        return _interleaved(values, size) if huffman else np.ascontiguousarray(values).view(f"u{size}")
    if huffman:
        require(values.nbytes == number * (1 if bits <= 8 else 2), "it has not as many numbers as it says")
        numbers = _interleaved(values, 1 if bits <= 8 else 2).astype(np.int64)
    else:
        numbers = _unpacked(values, bits)[:number]
    known = book.view(f"u{size}")
    require(numbers.size == number, "it has not as many numbers as it says")
    require(not number or int(numbers.max()) < known.size, "a number is none of its list's")
    return known[numbers]


def _planes(values: Array) -> Array:
    """First bytes together, then second ones, for they differ in kind."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T).reshape(-1)


def _interleaved(planes: Array, size: int) -> Array:
    return np.ascontiguousarray(planes.reshape(size, -1).T).reshape(-1).view(f"u{size}")


# ---------------------------------------------------------------------------------------------------------- in few bits


def _packed(numbers: Array, width: int) -> Array:
    """Numbers of so many bits, one after the other, the highest bit first."""
    shifts = np.arange(width - 1, -1, -1)
    some = (numbers[start : start + AT_A_TIME, None] for start in range(0, numbers.size, AT_A_TIME))
    packed = [np.packbits(((each >> shifts) & 1).astype(np.uint8)) for each in some]
    return np.concatenate(packed) if packed else np.empty(0, np.uint8)


def _unpacked(raw: Array, width: int) -> Array:
    powers, step = 1 << np.arange(width - 1, -1, -1), AT_A_TIME * width // 8
    found = []
    for start in range(0, raw.size, step):
        bits = np.unpackbits(raw[start : start + step])
        found.append(bits[: bits.size // width * width].reshape(-1, width) @ powers)
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _deflated(raw: Array) -> Array:
    coder = zlib.compressobj(LEVEL, zlib.DEFLATED, WINDOW, 9, zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(coder.compress(raw.tobytes()) + coder.flush(), np.uint8)


def _inflated(raw: Array, most: int) -> Array:
    decoder = zlib.decompressobj(WINDOW)
    try:
        found = decoder.decompress(raw.tobytes(), most + 1)
    except zlib.error as error:
        raise ValueError(f"its code is damaged ({error})") from None
    require(len(found) <= most and decoder.eof and not decoder.unused_data, "its code holds more than it says, or less")
    return np.frombuffer(found, np.uint8)

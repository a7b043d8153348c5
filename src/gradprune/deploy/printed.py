"""How are the tensors of a deep network printed on a page? Layers that differ only in their number share a line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from gradprune.core.encoded import readable

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def folded(rows: Iterable[dict[str, Any]], bytes_of: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return rows that are alike but for the numbers in the name in their first column as one, with how many they are.

    Of a column in `bytes_of` the sum is shown, of other whole numbers and of shares, which end in a per cent sign, the
    least and the most, of floats the most. Texts must be equal.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        (_, name), *others = row.items()
        key = (_NUMBER.sub("*", name), *(value for _, value in others if not _varies(value)))
        groups.setdefault(key, []).append(row)
    found = []
    for (pattern, *_), group in groups.items():
        (first, name), *others = group[0].items()
        joined = {first: name if len(group) == 1 else pattern, "times": len(group)}
        for column, _ in others:
            values = [row[column] for row in group]
            joined[column] = readable(sum(values)) if column in bytes_of else _together(values)
        found.append(joined)
    return found


def _varies(value: Any) -> bool:
    return isinstance(value, int | float) or str(value).endswith("%")


def _together(values: list[Any]) -> Any:
    if len(set(values)) == 1:
        return values[0]
    if isinstance(values[0], float):
        return max(values)
    order = sorted(values, key=lambda value: float(str(value).rstrip("%")))
    return f"{order[0]:,} to {order[-1]:,}" if isinstance(order[0], int) else f"{order[0].rstrip('%')} to {order[-1]}"

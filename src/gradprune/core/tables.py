"""How is a small table printed, as text in a terminal and as HTML in a notebook?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def as_text(rows: Sequence[Row], notes: Iterable[str] = ()) -> str:
    """Return rows as aligned lines under their columns' names: words to the left, numbers to the right."""
    columns = list(rows[0])
    words = {column for column in columns if any(isinstance(row[column], str) for row in rows)}
    table = [columns, *([cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = [
        "  ".join(
            text.ljust(width) if column in words else text.rjust(width)
            for column, text, width in zip(columns, line, widths, strict=True)
        ).rstrip()
        for line in table
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *notes])


def as_html(rows: Sequence[Row], notes: Iterable[str] = ()) -> str:
    """Return the same as an HTML table."""
    import html  # slow to import, and only notebooks need it

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in cells) + "</tr>"

    body = "".join(line(map(cell, row.values()), "td") for row in rows)
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>{said}"


def as_frame(rows: Sequence[Row]) -> Any:
    """Return a pandas DataFrame, or raise ImportError that says how to get it."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError("a DataFrame needs pandas: pip install pandas") from error
    return pandas.DataFrame(list(rows))


def cell(value: Any) -> str:
    """One value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""How is a small table printed, as text in a terminal and as HTML in a notebook?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

Row = Mapping[str, Any]


class Table:
    """What is printed as a table, in a terminal and in a notebook: a result says what its rows are."""

    _named_by: ClassVar[str | None] = None  # the column that names a row

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row each."""
        raise NotImplementedError

    def _shown(self) -> list[dict[str, Any]]:
        """What of the rows is printed."""
        return self.rows()

    def _notes(self) -> list[str]:
        """What stands under the table."""
        return [repr(self)]

    def to_frame(self) -> Any:
        """Return the rows as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        frame = as_frame(self.rows())
        return frame if self._named_by is None else frame.set_index(self._named_by)

    def __str__(self) -> str:
        return as_text(self._shown(), self._notes())

    def _repr_html_(self) -> str:
        return as_html(self._shown(), self._notes())


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
    return html_table(rows[0], [map(cell, row.values()) for row in rows], notes=notes)


def html_table(
    header: Iterable[str], lines: Iterable[Iterable[str]], footer: Iterable[str] = (), notes: Iterable[str] = ()
) -> str:
    """Return lines of texts as an HTML table, with notes under it."""
    import html  # slow to import, and only notebooks need it

    def line(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in cells) + "</tr>"

    body = "".join(line(cells, "td") for cells in lines)
    foot = [*footer]
    last = f"<tfoot>{line(foot, 'th')}</tfoot>" if foot else ""
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody>{last}</table>{said}"


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

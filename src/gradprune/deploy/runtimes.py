"""What must be known of a runtime to export into it?"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from gradprune.core.quiet import quiet
from gradprune.deploy.function import Outputs


class Runtime(NamedTuple):
    """A runtime; what it does is called where `require` did not raise.

    Args:
        name: What it is called in messages.
        libraries: The modules that it takes.
        needs: What is said where one is not installed.
        largest: Bytes that its file may hold; None where there is no limit.
        opens: Whether the first dimension of inputs may stay open in its file.
        write: Writes a network, for these inputs, of which those marked may have any number of rows, to a path; the
            names are those of the inputs.
        run: Runs a file on inputs.
    """

    name: str
    libraries: Sequence[str]
    needs: str
    largest: int | None
    opens: bool
    write: Callable[[Outputs, Sequence[Tensor], Sequence[bool], Sequence[str], Path], None]
    run: Callable[[Path, Sequence[Tensor]], list[Tensor]]

    def require(self) -> None:
        """Raise ImportError where its libraries are not installed."""
        try:
            with quiet():
                for library in self.libraries:
                    importlib.import_module(library)
        except ImportError as error:
            raise ImportError(self.needs) from error


def shortened(error: BaseException) -> str:
    """Return the first lines of an error's first cause, without colours."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(causes[-1])).strip()
    first = " ".join(text.split())
    return f"{type(causes[-1]).__name__}: {first:.300}"

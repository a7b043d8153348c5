"""With `-p book.built_run` nbval looks at the run that the pages were built from: each chapter runs once.

`make test` asks for it; `pytest --nbval chapters` runs the chapters itself. The build shows tables and pictures as a
page does. Each carries its words too, and these are what a notebook stores and nbval compares.
"""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_cache import get_cache
from nbformat import NotebookNode
from nbval.plugin import IPyNbFile

CACHE = Path(__file__).parent / "_build" / ".jupyter_cache"
Message = dict[str, Any]


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, Any, Any]:
    """Give notebooks a run that has been."""
    found = yield
    for file in found:
        if isinstance(file, IPyNbFile):
            file.__class__ = OfBuild
    return found


class OfBuild(IPyNbFile):
    """A chapter, whose kernel is the one that the build had."""

    def setup(self) -> None:
        """Find the run; fail where the notebook has not run as it stands."""
        cache = get_cache(str(CACHE))
        try:
            run = cache.get_cache_bundle(cache.match_cache_notebook(self.nb).pk).nb
        except KeyError:
            pytest.fail(f"{self.path.name} has not run as it stands: run `make book` first (`make test` does)")
        self.kernel = Run(cell for cell in run.cells if cell.cell_type == "code")
        self.setup_sanitize_files()


class Run:
    """What nbval asks a kernel, answered from cells that have run."""

    def __init__(self, cells: Iterator[NotebookNode]) -> None:
        self.cells, self.messages = cells, iter(())

    def execute_cell_input(self, source: str, allow_stdin: bool) -> str:
        """Go on to this cell, of those that are left; return what stands for the message's number."""
        cell = next(cell for cell in self.cells if cell.source == source)
        self.messages = answers(cell)
        return cell.source

    def await_reply(self, source: str, timeout: float) -> None:
        """It has answered."""

    def get_message(self, stream: str, timeout: float) -> Message:
        """Return what it said next."""
        return next(self.messages)

    def is_alive(self) -> bool:
        """Whether it answers."""
        return True

    def stop(self) -> None:
        """There is nothing to stop."""


def answers(cell: NotebookNode) -> Iterator[Message]:
    """What the kernel said to this cell, as in a notebook, and that it is done."""
    outputs = [("status", {"execution_state": "idle"})]
    outputs[:0] = [as_in_a_notebook(output) for output in cell.outputs]
    for kind, content in outputs:
        yield {
            "parent_header": {"msg_id": cell.source},
            "msg_type": kind,
            "content": content,
        }


def as_in_a_notebook(output: NotebookNode) -> tuple[str, NotebookNode]:
    """Return the kind and the content: of what a page shows as a table its text, of pictures and figures the words."""
    shown = output.get("data", {})
    if shown.get("text/html", "").startswith('<table class="gp-numbers"'):
        return "stream", NotebookNode(name="stdout", text=shown["text/plain"] + "\n")
    if "text/html" in shown:
        output = output | {"data": {"image/png": "", "text/plain": shown["text/plain"]}}
    return output["output_type"], output

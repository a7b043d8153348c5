"""Run one notebook from its first cell to its last, in the folder it stands in."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

CELL_TIMEOUT = 300  # seconds
# Sockets in the file system rather than TCP ports: nobody else on the machine can talk to the kernel.
CONFIG = Config({"KernelManager": {"transport": "ipc"}})


def execute(notebook: nbformat.NotebookNode, folder: Path, *, widget_state: bool) -> None:
    """Run `notebook` in `folder`, in place; keep the state of its widgets if asked, for a page without a kernel.

    Raises nbclient's CellExecutionError, which shows the cell, where one raises, and CellTimeoutError.
    """
    NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        store_widget_state=widget_state,
        resources={"metadata": {"path": str(folder)}},
        config=CONFIG,
    ).execute()

"""Run one notebook from its first cell to its last, in the folder it stands in."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

CELL_TIMEOUT = 300  # seconds


def execute(notebook: nbformat.NotebookNode, folder: Path, *, widget_state: bool) -> None:
    """Run `notebook` in `folder`, in place; keep the state of its widgets if asked, for a page without a kernel.

    Raises nbclient's CellExecutionError, which shows the cell, where one raises, and CellTimeoutError.
    """
    # Sockets in a folder of our own rather than TCP ports: nobody else on the machine can talk to the kernel. The path
    # is absolute because kernel and client work in different folders.
    with tempfile.TemporaryDirectory(prefix="gradprune-") as private:
        NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT,
            store_widget_state=widget_state,
            coalesce_streams=True,  # what one cell prints is one block, however it was buffered
            record_timing=False,  # times in the cells would make the cache take the notebook for another one
            resources={"metadata": {"path": str(folder)}},
            config=Config({"KernelManager": {"transport": "ipc", "ip": str(Path(private) / "kernel")}}),
        ).execute()

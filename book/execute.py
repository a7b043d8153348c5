"""Run one notebook from its first cell to its last, in the folder it stands in."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

CELL_TIMEOUT = 300  # seconds
STATE, VIEW = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("state", "view"))


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
            record_timing=False,  # times in the cells would make the cache take the notebook for another one
            resources={"metadata": {"path": str(folder)}},
            config=Config({"KernelManager": {"transport": "ipc", "ip": str(Path(private) / "kernel")}}),
        ).execute()
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = in_one_piece(cell.outputs)
    leave_out_unseen(notebook)


def in_one_piece(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Join what is printed on end, however it was buffered; what stands between two pictures stays there."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        before = joined[-1] if joined else {}
        if output.output_type == "stream" and before.get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def leave_out_unseen(notebook: nbformat.NotebookNode) -> None:
    """Drop the state of live figures that the notebook made and did not show: a page would carry it for nothing."""
    models = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    shown = {output.data[VIEW]["model_id"] for output in outputs if VIEW in output.get("data", {})}
    for name in [name for name, model in models.items() if model["model_module"] == "anywidget"]:
        if name not in shown:
            del models[name]

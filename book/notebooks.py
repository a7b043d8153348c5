"""Run the chapters in place and keep of their outputs what is committed: text and PNG, no widget state.

`python book/notebooks.py [NAME ...]` runs those whose file name starts with a NAME, or all. A notebook that raises is
left as it was.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from execute import execute
from nbclient.exceptions import CellControlSignal

CHAPTERS = Path(__file__).resolve().parent.parent / "chapters"
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def main(names: list[str]) -> int:
    """Run and clean; return the exit status."""
    os.environ |= {"GRADPRUNE_QUIET": "1"}
    paths = sorted(p for p in CHAPTERS.glob("*.ipynb") if not names or p.name.startswith(tuple(names)))
    if not paths:
        print(f"no notebook in chapters/ starts with {' or '.join(names)}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"running {path.name}", end=" ... ", flush=True)
        began = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        try:
            execute(notebook, CHAPTERS, widget_state=False)
        except (CellControlSignal, RuntimeError) as error:  # the second where the kernel dies
            print(f"failed, and left as it was\n{error}", file=sys.stderr)
            return 1
        clean(notebook)
        part = path.with_suffix(".part")
        nbformat.write(notebook, part)
        os.replace(part, path)
        print(f"{time.perf_counter() - began:.0f} s")
    return 0


def clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from run to run: times, versions, widget models."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    } | {key: notebook.metadata[key] for key in ("mystnb", "gradprune") if key in notebook.metadata}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET_VIEW, None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Build the book: vendor the pages' JavaScript, run the chapters, write the pages.

Each step is skipped where nothing it reads has changed. `make book` calls it with the Python of `.venv`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
import yaml
from execute import execute
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from nbclient.exceptions import CellControlSignal
from vendor import vendor

BOOK = Path(__file__).resolve().parent
ROOT = BOOK.parent
BUILD = BOOK / "_build"
CACHE = BUILD / ".jupyter_cache"
HTML = BUILD / "html"
AT_ONCE = min(4, os.cpu_count() or 1)  # kernels; each computes on one core, and more than four would want memory


class StepFailed(Exception):
    """A step that failed: which, why, and what to do."""

    def __init__(self, step: str, why: str, remedy: str) -> None:
        super().__init__(f"{step} failed: {why}\nWhat to do: {remedy}.")


def main() -> int:
    """Build what is stale; return the exit status."""
    os.environ |= {"GRADPRUNE_FIGURES": "svg", "GRADPRUNE_QUIET": "1", "PYTHONHASHSEED": "0"}
    began = time.perf_counter()
    try:
        bring_assets()
        run_chapters()
        built = write_pages()
    except StepFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    took = time.perf_counter() - began
    print(f"book: {'built' if built else 'nothing has changed'} ({took:.0f} s). Open {(HTML / 'index.html').as_uri()}")
    return 0


def bring_assets() -> None:
    """Step 1: the JavaScript of the pages."""
    print("book 1/3: assets", end=" ", flush=True)
    try:
        print("fetched" if vendor() else "are there")
    except RuntimeError as error:
        raise StepFailed(
            "fetching and bundling the pages' JavaScript", str(error), "mend what it names, then run `make book`"
        ) from error


def run_chapters() -> None:
    """Step 2: every notebook of the table of contents that has changed, or what it reads, since it last ran."""
    read = (
        "src/**/*.py",
        "src/**/*.js",
        "src/**/*.css",
        "chapters/experiments/*.py",
        "chapters/results/*.json",
        "chapters/results/*.safetensors",
        "constraints.txt",
    )
    package = digest([path for pattern in read for path in ROOT.glob(pattern)])
    stamp = CACHE / "package.sha256"
    if not stamp.exists() or stamp.read_text() != package:
        shutil.rmtree(CACHE, ignore_errors=True)
        CACHE.mkdir(parents=True)
        stamp.write_text(package)
    cache = get_cache(str(CACHE))
    chapters = notebooks()
    stale = [path for path in chapters if not is_cached(cache, path)]
    print(f"book 2/3: chapters, {len(chapters) - len(stale)} of {len(chapters)} unchanged", flush=True)
    failed: dict[Path, Exception] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = {pool.submit(run_chapter, path): path for path in stale}
        for number, run in enumerate(as_completed(runs), 1):
            path = runs[run]
            print(f"book 2/3: chapter {number} of {len(stale)}, {path.name}", end=" ... ", flush=True)
            try:
                notebook, took = run.result()
            except (CellControlSignal, RuntimeError) as error:  # the second where the kernel dies
                failed[path] = error
                print("failed", flush=True)
            else:  # written here and not where it ran: the cache is for one thread
                bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": took})  # the page prints it
                cache.cache_notebook_bundle(bundle, overwrite=True, check_validity=False)
                print(f"{took:.0f} s", flush=True)
    if failed:
        names = [f"chapters/{path.name}" for path in sorted(failed)]
        raise StepFailed(
            f"running {' and '.join(names)}",
            "\n".join(map(str, failed.values())),
            f"run `jupyter lab {names[0]}`, mend the cell that raised, then run `make book`",
        )


def is_cached(cache: JupyterCacheAbstract, path: Path) -> bool:
    """Whether the notebook has run as it stands."""
    try:
        cache.match_cache_notebook(nbformat.read(path, as_version=4))
    except KeyError:
        return False
    return True


def run_chapter(path: Path) -> tuple[nbformat.NotebookNode, float]:
    """Run one notebook; return it with its outputs, and the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    began = time.perf_counter()
    execute(notebook, path.parent, widget_state=True)
    return notebook, time.perf_counter() - began


def write_pages() -> bool:
    """Step 3: the HTML, from nothing, so that every warning is seen every time; return whether it was stale."""
    sources = [path for folder in ("book", "chapters", "src") for path in (ROOT / folder).rglob("*") if is_source(path)]
    wanted = digest([*sources, ROOT / "constraints.txt"])
    stamp = BUILD / "pages.sha256"
    if stamp.exists() and stamp.read_text() == wanted and (HTML / "index.html").exists():
        print("book 3/3: pages are up to date")
        return False
    print("book 3/3: pages", flush=True)
    stamp.unlink(missing_ok=True)
    for folder in (HTML, BUILD / ".doctrees"):
        shutil.rmtree(folder, ignore_errors=True)
    command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "--path-output", "book"]
    command += ["--config", "book/_config.yml", "--toc", "book/_toc.yml", "-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode or not (HTML / "index.html").exists():
        raise StepFailed(
            "writing the pages", f"Sphinx warned or stopped:\n{done.stdout}{done.stderr}", "mend what it names"
        )
    stamp.write_text(wanted)
    return True


def notebooks() -> list[Path]:
    """Return the notebooks of the table of contents, in its order."""
    contents = yaml.safe_load((BOOK / "_toc.yml").read_text())
    chapters = [chapter for part in contents["parts"] for chapter in part["chapters"]]
    entries = [entry for chapter in chapters for entry in (chapter, *chapter.get("sections", []))]
    files = [entry["file"] for entry in entries if "file" in entry]
    return [path for path in (ROOT / f"{file}.ipynb" for file in files) if path.exists()]


def is_source(path: Path) -> bool:
    """Whether the pages are made from this file."""
    made = {"_build", "_vendor", "node_modules", "__pycache__", ".ipynb_checkpoints"}
    return path.is_file() and not made & set(path.parts) and not any(part.endswith(".egg-info") for part in path.parts)


def digest(paths: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

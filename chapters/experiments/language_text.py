"""The text of the language model: what Python's standard library and six packages say of themselves.

Documents are, in order of their names:

- of Python's standard library, for each module, its docstrings and its comments of three lines or more (tests, idlelib
  and lib2to3 left out), and each topic of `pydoc_data.topics`, the language reference that ships with Python;
- of numpy, scipy, scikit-learn, pandas, matplotlib and torch, for each module, its docstrings (tests left out).

A SHA-256 of a document's name says where it goes: of ten documents of Python, one tests and one validates; all others
are trained on, those of the packages too. Paragraphs of 80 letters or more that occurred before are left out, test text
coming first, then validation, then training: no such paragraph is in two parts. `manifest()` says how much it is and
gives the SHA-256 of the whole; with the pinned versions and Python 3.11.7 it is MANIFEST.
"""

from __future__ import annotations

import ast
import hashlib
import io
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

PACKAGES = ["matplotlib", "numpy", "pandas", "scipy", "sklearn", "torch"]
LEFT_OUT = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "_vendor", "__pycache__", "pydoc_data"}
PARTS = ["test", "validation", "train"]
LEAST = 200  # characters of a document
REPEATED = 80  # characters of a paragraph that may occur once only


def docstrings(source: str) -> str:
    """Return the docstrings of a module, of its classes and of its functions, in order, of 60 characters or more."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = [ast.get_docstring(node) or "" for node in nodes]
    return "\n\n".join(text for text in found if len(text) >= 60)


def comments(source: str) -> str:
    """Return the comments of three lines or more, each a paragraph."""
    blocks: list[list[str]] = [[]]
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            if token.start[0] != last + 1:
                blocks.append([])
            blocks[-1].append(token.string.lstrip("#").removeprefix(" ").rstrip())
            last = token.start[0]
    return "\n\n".join("\n".join(block).strip() for block in blocks if len(block) >= 3)


def documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, in order of the names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name, path in _modules(library, library):
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            yield f"python/{name}", f"{docstrings(source)}\n\n{comments(source)}".strip()
        except (SyntaxError, tokenize.TokenError):
            continue
    for name, text in sorted(topics.topics.items()):
        yield f"python/topics/{name}", text.strip()
    packages = Path(sysconfig.get_paths()["purelib"])
    for package in PACKAGES:
        for name, path in _modules(packages / package, packages):
            try:
                yield f"packages/{name}", docstrings(path.read_text(encoding="utf-8", errors="replace"))
            except SyntaxError:
                continue


def part_of(name: str) -> str:
    """Return "test", "validation" or "train"."""
    tenth = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return PARTS[min(tenth, 2)] if name.startswith("python/") else "train"


@cache
def parts() -> dict[str, list[tuple[str, str]]]:
    """Return the documents of each part, without what occurred before."""
    every = [(name, _plain(text)) for name, text in documents()]
    seen: set[str] = set()
    found: dict[str, list[tuple[str, str]]] = {}
    for part in PARTS:
        found[part] = []
        for name, text in every:
            if part_of(name) == part:
                rest = _without_repeats(text, seen)
                if len(rest) >= LEAST:
                    found[part].append((name, rest))
    return found


def manifest() -> dict[str, Any]:
    """Return the documents and bytes of each part, and the SHA-256 of all names and texts."""
    told: dict[str, Any] = {}
    whole = hashlib.sha256()
    for part, every in parts().items():
        told[part] = {"documents": len(every), "bytes": sum(len(text.encode()) for _, text in every)}
        for name, text in every:
            whole.update(f"{part}\0{name}\0{text}\0".encode())
    return told | {"sha256": whole.hexdigest()}


def _modules(folder: Path, root: Path) -> list[tuple[str, Path]]:
    every = ((path.relative_to(root), path) for path in folder.rglob("*.py"))
    return sorted((name.as_posix(), path) for name, path in every if not LEFT_OUT & set(name.parts))


def _plain(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\f", "").expandtabs(4).split("\n")]
    return "\n".join(lines)


def _without_repeats(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) >= REPEATED:
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept).strip()


if __name__ == "__main__":
    print(manifest())

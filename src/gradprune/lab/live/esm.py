"""How do the modules of a live figure become the one text that a widget carries?

Nothing is fetched from a page that is opened from disk, so a figure's module and all that it imports are joined into
one. The modules keep to one form, which makes that a matter of lines: named imports of files beside them, exports in
front of what they export, and no name at the top level that another file has too.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
_IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w-]+\.js)";\n', re.MULTILINE)
_TOP_LEVEL = re.compile(r"^(?:export )?(?:async )?(?:const|let|var|class|function\*?) (\w+)", re.MULTILINE)
_EXPORTED = re.compile(r"^export (?:async )?(?:const|class|function\*?) (\w+)", re.MULTILINE)
_FORBIDDEN = re.compile(r"^(?:import|export default|export [*{]).*", re.MULTILINE)


def joined(figure: str, folder: Path = HERE) -> str:
    """Return the module `figure` of `folder` with all that it imports, as one whose default export is anywidget's.

    Raises ValueError, naming the files, where two have a name at the top level in common, where an import is in a form
    that cannot be joined, or is of something that its file does not export.
    """
    texts: dict[str, str] = {}
    _read(figure, folder, texts)
    owner: dict[str, str] = {}
    for name, text in texts.items():
        for defined in _TOP_LEVEL.findall(text):
            if defined in owner:
                raise ValueError(
                    f"{owner[defined]} and {name} both define {defined!r}: joined, one would hide the other"
                )
            owner[defined] = name
    return "\n\n".join([*(_body(name, text) for name, text in texts.items()), "export default { render };\n"])


def _read(name: str, folder: Path, texts: dict[str, str]) -> None:
    """Add the file `name` to `texts`, after what it imports."""
    text = (folder / name).read_text(encoding="utf-8")
    for names, source in _IMPORT.findall(text):
        if source not in texts:
            _read(source, folder, texts)
        wanted = {part.strip() for part in names.split(",") if part.strip()}
        if missing := wanted - set(_EXPORTED.findall(texts[source])):
            raise ValueError(f"{name} imports {', '.join(sorted(missing))}, which {source} does not export")
    texts[name] = text


def _body(name: str, text: str) -> str:
    """What is left of a file when it needs no imports and nobody imports it."""
    body = _IMPORT.sub("", text)
    if wrong := _FORBIDDEN.search(body):
        raise ValueError(f"{name} has a line that cannot be joined: {wrong[0]!r}")
    return re.sub(r"^export ", "", body, flags=re.MULTILINE).strip()

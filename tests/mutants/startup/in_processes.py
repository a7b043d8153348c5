"""How does a mutant reach a process that a test starts, and how is known which tests start one that passes through it?

The folder of this file stands in such a process's PYTHONPATH, and what the process is to do in its environment.
"""

import importlib.machinery
import importlib.util
import inspect
import os
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1]
PACKAGE = TESTS.parent / "src" / "gradprune"
MUTANT, NOTES, TEST = "GRADPRUNE_MUTANT", "GRADPRUNE_NOTES", "GRADPRUNE_TEST"


class Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from a text instead of its file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> object:
        """Compile the text under the file's name."""
        return compile(self.source, self.path, "exec", dont_inherit=True)


class InPlaceOf:
    """A finder that gives one module, told by its path within the package, from a text."""

    def __init__(self, module: str, source: str) -> None:
        self.name = ".".join(["gradprune", *Path(module).with_suffix("").parts])
        self.path, self.source = str(PACKAGE / module), source

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Return the changed module's specification under its name, and nothing for another."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=Changed(name, self.path, self.source))


class Notes:
    """A trace function that writes which functions of the package are entered, once for each test.

    The test is that which started the process; in one that serves many, the file whose code was last entered.
    Every line is one write to the end of the file, which all processes can do at once and which outlives their end.
    """

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.test = os.environ.get(TEST, "")
        self.seen: set[tuple[str, CodeType]] = set()

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        """Note a call; its lines are not looked at, which would take long."""
        code = frame.f_code
        if code.co_filename.startswith(f"{PACKAGE}{os.sep}"):
            # What runs while a module is imported is passed through whatever is tested.
            if code.co_flags & inspect.CO_OPTIMIZED and (self.test, code) not in self.seen:
                self.seen.add((self.test, code))
                last = max(line for _, _, line in code.co_lines() if line)
                noted = "\t".join([self.test, code.co_filename, str(code.co_firstlineno), str(last)])
                os.write(self.file, f"{noted}\n".encode())
        elif code.co_filename.startswith(f"{TESTS}{os.sep}"):
            path = Path(code.co_filename)
            if path.name.startswith("test_"):
                self.test = path.relative_to(TESTS.parent).as_posix()


def begin() -> None:
    """Do what the environment says."""
    if NOTES in os.environ:
        notes = Notes(os.environ[NOTES])
        threading.settrace(notes)
        sys.settrace(notes)
    if MUTANT in os.environ:
        module, source = Path(os.environ[MUTANT]).read_text(encoding="utf-8").split("\n", 1)
        sys.meta_path.insert(0, InPlaceOf(module, source))


def reach(**told: str) -> None:
    """Let the processes that this one starts do what `told` says."""
    os.environ |= told
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *(p for p in paths if p and p != str(HERE))])

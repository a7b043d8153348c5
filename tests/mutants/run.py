"""Do the tests notice when the code is changed a little? (`make mutants`)

mutmut makes the mutants: an operator, a number, a text, an argument or a call is another one. A sample of them, drawn
by a seed, is tried: each in a process of its own that imports the changed module in place of the file and runs the
tests of its room until one fails. Nothing is written into the sources. What was tried is kept in mutants/, so that a
run that was stopped goes on where it was, and one after a change tries again what the change can reach. Survivors that
no test can notice are listed in equivalent.toml, with the reason.
"""

import argparse
import difflib
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "GRADPRUNE_QUIET": "1", "TQDM_DISABLE": "1"}

import libcst
import tomllib
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import get_ignored_lines

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "gradprune"
RESULTS = ROOT / "mutants" / "results.jsonl"
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
# The tests that are run for a room; where they are several, in this order.
TESTS = {
    "core": ["core", "weights", "gradients"],
    "gradients": ["gradients"],
    "weights": ["weights"],
    "recovery": ["recovery"],
}
MEMORY = 12 * 2**30  # bytes that one process may take: a mutant may ask for any amount
PATIENCE, GRACE = 3.0, 20.0  # a mutant may take this many times as long as the tests, and some seconds


@dataclass(frozen=True)
class Mutant:
    """One changed module, and what says whether it was tried before."""

    module: str  # its path within the package
    line: int
    was: str
    becomes: str
    source: str
    key: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}\n    - {self.was}\n    + {self.becomes}"


class InEveryFunction(MutationVisitor):
    """mutmut's own passes over decorated functions, which its way to switch mutants cannot handle; ours can."""

    def _skip_node_and_children(self, node: libcst.CSTNode) -> bool:
        if isinstance(node, libcst.FunctionDef) and node.decorators:
            return any("overload" in libcst.Module([]).code_for_node(decorator) for decorator in node.decorators)
        return super()._skip_node_and_children(node)


class Mutations:
    """The mutations of one module: known by number at once, written out one by one, which takes most of the time."""

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, path.read_text(encoding="utf-8")
        wrapper = MetadataWrapper(libcst.parse_module(self.source))
        visitor = InEveryFunction(mutation_operators, get_ignored_lines(str(path), self.source, wrapper))
        self.tree = wrapper.visit(visitor)
        inside = [found for found in visitor.mutations if found.contained_by_top_level_function is not None]
        self.found = [mutation for mutation in inside if not is_for_people(mutation.original_node)]

    def written(self, number: int, tests: str) -> Mutant | None:
        """Write out one mutant; None where the code is the same. `tests` is a hash of what it is tried by."""
        mutation = self.found[number]
        changed = deep_replace(self.tree, mutation.original_node, mutation.mutated_node).code
        removed, added, line = difference(self.source, changed)
        key = hashlib.sha256(f"{self.path.name}\0{changed}\0{tests}".encode()).hexdigest()[:16]
        module = str(self.path.relative_to(PACKAGE))
        return None if removed == added else Mutant(module, line, removed, added, changed, key)


def is_for_people(node: libcst.CSTNode) -> bool:
    """Whether this is a text with a space, such as an error's: of these, tests assert the part that helps."""
    text = libcst.Module([]).code_for_node(node) if isinstance(node, libcst.BaseString) else ""
    return " " in text


def difference(source: str, changed: str) -> tuple[str, str, int]:
    """Return the lines that went and the lines that came, each as one, and where."""
    before, after = source.splitlines(), changed.splitlines()
    codes = [c for c in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes() if c[0] != "equal"]
    removed = [line.strip() for _, start, stop, _, _ in codes for line in before[start:stop]]
    added = [line.strip() for _, _, _, start, stop in codes for line in after[start:stop]]
    return " ".join(removed), " ".join(added), codes[0][1] + 1 if codes else 0


class Changed(importlib.machinery.SourceFileLoader):
    """Loads a module from a text instead of its file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> object:
        """Compile the text under the file's name."""
        return compile(self.source, self.path, "exec", dont_inherit=True)


class InPlaceOf:
    """A finder that gives one module from a text."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = ".".join(["gradprune", *Path(mutant.module).with_suffix("").parts])
        self.path, self.source = str(PACKAGE / mutant.module), mutant.source

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Return the changed module's specification under its name, and nothing for another."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=Changed(name, self.path, self.source))


def tests_for(module: str) -> list[list[str]]:
    """The tests of a module in stages, one after the other as long as they pass: those of its own name come first."""
    room = Path(module).parts[0]
    own = Path("tests") / room / f"test_{Path(module).stem}.py"
    stages = [[f"tests/{folder}"] for folder in TESTS[room]]
    return [[str(own)], *stages] if (ROOT / own).exists() else stages


def run_tests(stages: list[list[str]], mutant: Mutant | None, log: Path) -> int:
    """Fork, run the tests in the child, stage by stage until one fails, and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(ROOT)
        if mutant is not None:
            sys.meta_path.insert(0, InPlaceOf(mutant))
        import pytest

        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-profile=quick"]
        status = next((failed for tests in stages if (failed := int(pytest.main([*options, *tests])))), 0)
    except BaseException:  # a mutant may raise anything, also while it is imported
        status = 3
    finally:
        os._exit(status)


def wait(children: dict[int, tuple[Mutant | None, float]]) -> tuple[int, int | None]:
    """Wait for a child to end, or kill one whose time is up; return it and its status, None for the latter."""
    while True:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            return child, os.waitstatus_to_exitcode(status)
        for child, (_, end) in children.items():
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return child, None
        time.sleep(0.05)


def baselines(rooms: set[str], folder: Path) -> dict[str, float]:
    """Run the tests of each room on the code as it is; return how long they took. Exits where one fails."""
    took = {}
    for room in sorted(rooms):
        began, log = time.monotonic(), folder / "baseline"
        child = run_tests([[f"tests/{name}" for name in TESTS[room]]], None, log)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"the tests of {room} fail on the code as it is:\n{log.read_text()[-2000:]}")
        took[room] = time.monotonic() - began
        print(f"{room}: its tests take {took[room]:.0f} s", flush=True)
    return took


def digest(folders: list[str]) -> str:
    """A hash of the tests in some folders."""
    total = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / "tests" / folder).rglob("*.py")):
            total.update(path.read_bytes())
    return total.hexdigest()


def tried() -> dict[str, str]:
    """What is known by the mutants' keys: "killed", "too slow" or "survived"."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {found["key"]: found["outcome"] for found in map(json.loads, lines)}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="such as weights/mask.py, or a room; all four rooms unless given")
    parser.add_argument("--sample", type=int, default=300, help="how many mutants to try; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--minutes", type=float, default=55, help="when to stop; the next run goes on from there")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def chosen(wanted: argparse.Namespace) -> list[Mutant]:
    """The mutants to try, in the order of the sample."""
    modules = [
        path
        for room in TESTS
        for path in sorted((PACKAGE / room).glob("*.py"))
        if not wanted.modules or {room, str(path.relative_to(PACKAGE))} & set(wanted.modules)
    ]
    if not modules:
        sys.exit(f"no module of {', '.join(TESTS)} is called {' or '.join(wanted.modules)}")
    tests = {room: digest(folders) for room, folders in TESTS.items()}
    mutations = [Mutations(path) for path in modules]
    made = [(of, number) for of in mutations for number in range(len(of.found))]
    order = random.Random(wanted.seed).sample(made, len(made))
    written = (of.written(number, tests[of.path.parent.name]) for of, number in order)
    sample = list(islice(filter(None, written), wanted.sample or None))
    print(f"{len(made)} mutants of {len(modules)} modules; {len(sample)} in the sample", flush=True)
    return sample


def try_all(waiting: list[Mutant], wanted: argparse.Namespace, known: dict[str, str]) -> None:
    """Try the mutants, some at a time, and note each outcome in the file as it comes."""
    if not waiting:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, RESULTS.open("a", encoding="utf-8") as results:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        took = baselines({Path(mutant.module).parts[0] for mutant in waiting}, Path(folder))
        children: dict[int, tuple[Mutant | None, float]] = {}
        began, left = time.monotonic(), list(reversed(waiting))
        try:
            while left or children:
                while left and len(children) < wanted.workers and time.monotonic() < began + 60 * wanted.minutes:
                    mutant = left.pop()
                    child = run_tests(tests_for(mutant.module), mutant, Path(folder) / mutant.key)
                    limit = PATIENCE * wanted.workers * took[Path(mutant.module).parts[0]] + GRACE
                    children[child] = mutant, time.monotonic() + limit
                if not children:
                    print(f"time is up: {len(left)} are left; run it again to go on")
                    break
                child, status = wait(children)
                mutant, _ = children.pop(child)
                outcome = "too slow" if status is None else "killed" if status else "survived"
                known[mutant.key] = outcome
                results.write(json.dumps({"key": mutant.key, "outcome": outcome, "mutant": str(mutant)}) + "\n")
                results.flush()
                (Path(folder) / mutant.key).unlink(missing_ok=True)
                done = len(waiting) - len(left) - len(children)
                minutes = (time.monotonic() - began) / 60
                print(f"{done} of {len(waiting)}, {done / minutes:.0f} a minute: {outcome}, {mutant}", flush=True)
        finally:
            for child in children:
                os.killpg(child, signal.SIGKILL)


def report(sample: list[Mutant], known: dict[str, str]) -> int:
    """Print the count of each outcome and the survivors that nobody has explained; return how many those are."""
    explained = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("equivalent", [])
    reasons = {(entry["module"], entry["was"], entry["becomes"]): entry["because"] for entry in explained}
    outcomes: dict[str, Counter[str]] = {}
    survivors = []
    for mutant in sample:
        outcome = known.get(mutant.key, "not tried")
        if outcome == "survived" and (mutant.module, mutant.was, mutant.becomes) in reasons:
            outcome = "equivalent"
        if outcome == "survived":
            survivors.append(mutant)
        outcomes.setdefault(mutant.module, Counter())[outcome] += 1
    heads = ["killed", "too slow", "survived", "equivalent", "not tried"]
    print(f"\n{'module':28}" + "".join(f"{head:>12}" for head in heads))
    total = sum(outcomes.values(), Counter())
    for module, counts in [*sorted(outcomes.items()), ("in all", total)]:
        print(f"{module:28}" + "".join(f"{counts[head]:>12}" for head in heads))
    caught, decided = total["killed"] + total["too slow"], total.total() - total["not tried"] - total["equivalent"]
    print(f"\n{caught} of {decided} were noticed" + (f" ({caught / decided:.1%})" if decided else ""))
    for mutant in survivors:
        print(f"survived: {mutant}")
    return len(survivors)


def main() -> int:
    """Try a sample of mutants; return 1 where one survived without a reason, else 0."""
    wanted = arguments()
    sample, known = chosen(wanted), tried()
    # Imported once, before the processes fork: most of what each of them would wait for.
    for module in ("numpy", "torch", "pytest", "hypothesis"):
        __import__(module)
    sys.path.insert(0, str(ROOT / "src"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no test goes on when this is stopped
    waiting = [mutant for mutant in sample if mutant.key not in known]
    try:
        try_all(waiting, wanted, known)
    except KeyboardInterrupt:
        print("stopped; run it again to go on")
    return int(report(sample, known) > 0)


if __name__ == "__main__":
    sys.exit(main())

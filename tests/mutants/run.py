"""Do the tests notice when the code is changed a little? (`make mutants`)

mutmut makes the mutants: an operator, a number, a text, an argument or a call is another one. A sample of them, drawn
by a seed, is tried: each in a process of its own that imports the changed module in place of the file and runs tests
until one fails: those that pass through the changed lines, which coverage tells, the module's own first; then those
that start processes which enter the changed function, such as the ranks of tests/scale. These processes import the
changed module too (startup/). What passes them all is shown to mypy, as `make test` does. Nothing is written into the
sources. What was tried is kept in mutants/, so that a run that was stopped goes on where it was, and one after a change
tries again what the change can reach.

What is not behaviour is not changed, by rule (`no_behaviour`): texts with a space, of which tests assert the part that
helps; zip's `strict` and cast's type, which say to readers what holds anyway; the device that `to` moves a tensor to,
which takes two devices to tell; and how a picture looks, which is the numbers, texts and named arguments where
matplotlib's Figure or Axes is in the signature. What only an accelerator can tell beside that has the comment
`# pragma: no mutate` and the reason. Other survivors that no test can notice are listed in equivalent.toml, each with
the reason.
"""

import argparse
import ast
import difflib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "GRADPRUNE_QUIET": "1", "TQDM_DISABLE": "1"}

import coverage
import hypothesis
import libcst
import libcst.matchers as m
import pytest
import tomllib
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import get_ignored_lines
from startup.in_processes import MUTANT, NOTES, TEST, InPlaceOf, reach

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "gradprune"
KEPT = ROOT / "mutants"
RESULTS = KEPT / "results.jsonl"
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
ROOMS = ["core", "gradients", "weights", "recovery", "deploy", "scale"]
TESTS = [*(f"tests/{room}" for room in ROOMS), "tests/test_bad_calls.py", "tests/test_docstrings.py"]
MEMORY = 12 * 2**30  # bytes that one process may take: a mutant may ask for any amount
IMPORTED = ["numpy", "torch", *(f"torch.distributed.{part}" for part in ("fsdp", "tensor", "checkpoint"))]
CONTEXTS = multiprocessing.get_context
PATIENCE, GRACE = 5.0, 30.0  # a test may take this many times as long as on the code as it is, and some seconds
START = 180  # seconds until the first begins, on a machine that does other things too
# By the status of the process that tried a mutant; else it was killed.
OUTCOMES = {0: "survived", 4: "by mypy", 5: "too slow"}

Stage = dict[str, float]  # tests in an order, and the seconds that each took on the code as it is


@dataclass(frozen=True)
class Mutant:
    """One changed module, and what says whether it was tried before."""

    module: str  # its path within the package
    line: int
    was: str
    becomes: str
    source: str
    key: str
    stages: list["Stage"] = field(repr=False)  # the tests that try it, one after the other as long as they pass

    def __str__(self) -> str:
        return f"{self.module}:{self.line}\n    - {self.was}\n    + {self.becomes}"


class Behaviour(MutationVisitor):
    """mutmut's own passes over decorated functions, which its way to switch mutants cannot handle; ours can.

    It leaves out what is not behaviour, as the opening words of this file say.
    """

    def __init__(self, path: Path, source: str, wrapper: MetadataWrapper) -> None:
        super().__init__(mutation_operators, get_ignored_lines(str(path), source, wrapper))
        self.left_out: set[libcst.CSTNode] = set()

    def _skip_node_and_children(self, node: libcst.CSTNode) -> bool:
        self.left_out.update(no_behaviour(node))
        if node in self.left_out:
            return True
        if isinstance(node, libcst.FunctionDef) and node.decorators:
            return any("overload" in code(decorator) for decorator in node.decorators)
        return super()._skip_node_and_children(node)

    def _create_mutations(self, node: libcst.CSTNode) -> None:
        before = len(self.mutations)
        super()._create_mutations(node)
        if isinstance(node, libcst.Float):  # 1e30 and one more is 1e30
            value = node.evaluated_value
            self.mutations[before:] = [m for m in self.mutations[before:] if m.mutated_node.evaluated_value != value]
        if isinstance(node, libcst.Call):
            kept = self.left_out.intersection(node.args)
            made = [mutation for mutation in self.mutations[before:] if kept <= set(mutation.mutated_node.children)]
            self.mutations[before:] = made


def code(node: libcst.CSTNode) -> str:
    """The code of a node."""
    return libcst.Module([]).code_for_node(node)


def no_behaviour(node: libcst.CSTNode) -> Iterator[libcst.CSTNode]:
    """What in a node is not behaviour, by the rules in the opening words of this file."""
    if isinstance(node, libcst.SimpleString) and " " in node.value:
        yield node
    elif isinstance(node, libcst.Call):
        called = code(node.func).split(".")[-1]
        for at, arg in enumerate(node.args):
            name, value = arg.keyword.value if arg.keyword else at, code(arg.value)
            moves = called == "to" and (name == "non_blocking" or value == "home" or value.endswith("device"))
            if moves or (called, name) in (("zip", "strict"), ("cast", 0)):
                yield arg
    elif isinstance(node, libcst.FunctionDef) and draws(node):
        number = m.Integer() | m.Float()
        yield from m.findall(node.body, number | m.SimpleString() | m.Arg(keyword=m.Name()))
        yield from m.findall(node.body, m.Arg(value=number | m.SimpleString()))


def draws(function: libcst.FunctionDef) -> bool:
    """Whether a function takes or returns matplotlib's Figure or Axes."""
    annotations = [function.returns, *(parameter.annotation for parameter in function.params.params)]
    return any(code(found.annotation).split(".")[-1] in ("Figure", "Axes") for found in annotations if found)


class Mutations:
    """The mutations of one module: known by number at once, written out one by one, which takes most of the time."""

    def __init__(self, path: Path, covering: "Covering") -> None:
        self.path, self.source, self.covering = path, path.read_text(encoding="utf-8"), covering
        wrapper = MetadataWrapper(libcst.parse_module(self.source))
        visitor = Behaviour(path, self.source, wrapper)
        self.tree = wrapper.visit(visitor)
        self.found = [found for found in visitor.mutations if found.contained_by_top_level_function is not None]

    def written(self, number: int) -> Mutant | None:
        """Write out one mutant; None where the code is the same."""
        mutation = self.found[number]
        changed = deep_replace(self.tree, mutation.original_node, mutation.mutated_node).code
        removed, added, line = difference(self.source, changed)
        if removed == added:
            return None
        module = str(self.path.relative_to(PACKAGE))
        stages = self.covering.stages(self.path, self.source, line)
        key = hashlib.sha256(f"{module}\0{changed}\0{self.covering.digest(stages)}".encode()).hexdigest()[:16]
        return Mutant(module, line, removed, added, changed, key, stages)


def difference(source: str, changed: str) -> tuple[str, str, int]:
    """Return the lines that went and the lines that came, each as one, and where."""
    before, after = source.splitlines(), changed.splitlines()
    codes = [c for c in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes() if c[0] != "equal"]
    removed = [line.strip() for _, start, stop, _, _ in codes for line in before[start:stop]]
    added = [line.strip() for _, _, _, start, stop in codes for line in after[start:stop]]
    return " ".join(removed), " ".join(added), codes[0][1] + 1 if codes else 0


@dataclass
class Covering:
    """Which tests pass through which lines, and the seconds that each takes, in the order in which they run."""

    took: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    started: dict[str, dict[int, list[str]]] = field(default_factory=dict)  # in processes that the tests start

    def stages(self, path: Path, source: str, line: int) -> list[Stage]:
        """The tests of a line, in the order in which a mutant of it meets them."""
        file, through, started = str(path.relative_to(ROOT)), set[str](), set[str]()
        for span in spans(source, line):
            if not (through or started):
                through.update(test for number in span for test in self.lines.get(file, {}).get(number, []))
                started.update(test for number in span for test in self.started.get(file, {}).get(number, []))
        own = {test for test in through if test.startswith(f"tests/{path.parent.name}/test_{path.stem}.py::")}
        alone = [sorted(group, key=lambda test: (self.took[test], test)) for group in (own, through - own)]
        staged = [*({test: self.took[test] for test in group} for group in alone), self.by_file(started - through)]
        return [stage for stage in staged if stage]

    def by_file(self, tests: set[str]) -> Stage:
        """Tests that start processes: the shortest file first, each in its order; the first may start them for all."""
        order, files = {test: at for at, test in enumerate(self.took)}, dict[str, list[str]]()
        for test in sorted(tests, key=order.__getitem__):
            files.setdefault(test.split("::")[0], []).append(test)
        most = {file: max(self.took[t] for t in self.took if t.split("::")[0] == file) for file in files}
        return {test: most[file] for file in sorted(files, key=most.__getitem__) for test in files[file]}

    def digest(self, stages: list[Stage]) -> str:
        """A hash of the files that hold some tests."""
        files = sorted({test.split("::")[0] for stage in stages for test in stage})
        return hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in files)).hexdigest()

    def join(self, noted: dict[str, object]) -> None:
        """Add what was noted of other tests."""
        tests = list(noted["took"])
        self.took |= noted["took"]
        for name in ("lines", "started"):
            for file, of in noted[name].items():
                here = getattr(self, name).setdefault(file, {})
                for number, ats in of.items():
                    here.setdefault(int(number), []).extend(tests[at] for at in ats)


def spans(source: str, line: int) -> Iterator[range]:
    """The lines of the statement that holds a line, without those inside it; of its function, its class, its module.

    A default is not passed through when a function is called, nor is a class's field.
    """
    module = ast.parse(source)
    holding = [n for n in ast.walk(module) if isinstance(n, ast.stmt) and n.lineno <= line <= n.end_lineno]
    holding.sort(key=lambda node: (node.lineno, -node.end_lineno))
    outer = [node for node in holding if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    if holding[-1] not in outer:
        body = getattr(holding[-1], "body", None)
        yield range(holding[-1].lineno, body[0].lineno if body else holding[-1].end_lineno + 1)
    for node in [*reversed(outer), module]:
        yield range(node.body[0].lineno, node.body[-1].end_lineno + 1)


class Watch:
    """A plugin of pytest: runs tests in an order, ends the process where one takes too long, notes what is covered."""

    def __init__(self, took: dict[str, float], order: list[str] | None = None, cover: coverage.Coverage | None = None):
        self.took, self.order, self.cover = took, order, cover

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that are wanted, in their order."""
        if self.order is not None:
            rank = {test: at for at, test in enumerate(self.order)}
            items[:] = sorted((item for item in items if item.nodeid in rank), key=lambda item: rank[item.nodeid])

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run one test, with an alarm that ends the process."""
        began = time.monotonic()
        if self.cover is not None:
            self.cover.switch_context(item.nodeid)
            os.environ[TEST] = item.nodeid
            yield
            self.took[item.nodeid] = time.monotonic() - began
        else:
            signal.alarm(int(GRACE + PATIENCE * self.took[item.nodeid]))
            yield
            signal.alarm(int(GRACE))


def run_pytest(tests: list[str], watch: Watch) -> int:
    """Run tests until one fails; return pytest's status."""
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    return int(pytest.main([*options, *tests], plugins=[watch]))


def forked(work: Callable[[], int], log: Path, *, lead: bool = True) -> int:
    """Fork, let the child do the work and end with the status that it returns, and return its process id.

    It leads a group of processes, which can be ended at once, unless it is to stay in its parent's.
    """
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if lead:
            os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(ROOT)
        status = work()
    except BaseException:  # a mutant may raise anything, also while it is imported
        status = 3
    finally:
        os._exit(status)


def try_one(mutant: Mutant) -> int:
    """Run the tests of a mutant, stage by stage until one fails, then mypy; return 0 where nothing noticed."""
    with tempfile.NamedTemporaryFile("w", suffix=".mutant", encoding="utf-8") as changed:
        changed.write(f"{mutant.module}\n{mutant.source}")
        changed.flush()
        reach(**{MUTANT: changed.name})
        for stage in mutant.stages:
            _, status = os.waitpid(forked(partial(try_stage, mutant, stage), KEPT / "last.log", lead=False), 0)
            if os.waitstatus_to_exitcode(status) == -signal.SIGALRM:
                return 5
            if status:
                return 1
    return 4 if refused(mutant) else 0


def try_stage(mutant: Mutant, stage: Stage) -> int:
    """Run some tests of a mutant in a process that has done nothing yet; return 0 where they passed."""
    signal.alarm(START)
    sys.meta_path.insert(0, InPlaceOf(mutant.module, mutant.source))
    # Ranks that fork from this process, which has imported what takes long, are there much sooner.
    multiprocessing.get_context = lambda method=None: CONTEXTS("fork" if method == "forkserver" else method)
    status = run_pytest(sorted({test.split("::")[0] for test in stage}), Watch(stage, list(stage)))
    return int(status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED))


def refused(mutant: Mutant) -> bool:
    """Whether mypy refuses a mutant."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8") as changed:
        changed.write(mutant.source)
        changed.flush()
        shadow = ["--shadow-file", str((PACKAGE / mutant.module).relative_to(ROOT)), changed.name]
        cache = ["--cache-dir", str(KEPT / "mypy")]
        return subprocess.run([sys.executable, "-m", "mypy", *cache, *shadow], cwd=ROOT, check=False).returncode == 1


def covering(tests_of: list[str], workers: int) -> Covering:
    """Run the tests on the code as it is and see where they pass; kept by room for as long as no file changes."""
    shared = [*Path(__file__).parent.rglob("*.py"), *PACKAGE.rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    wanted, children = {t: kept_for(t, "covering", ".json") for t in tests_of}, dict[int, tuple[str, Path]]()
    files = {tests: sorted({*shared, *found(ROOT / tests)}) for tests in tests_of}
    keys = {t: hashlib.sha256(b"".join(path.read_bytes() for path in files[t])).hexdigest() for t in tests_of}
    new = [t for t, kept in wanted.items() if not kept.exists() or json.loads(kept.read_text())["key"] != keys[t]]
    if new:
        print(f"{', '.join(new)}: run on the code as it is, to see which pass through what", flush=True)
    try:
        while new or children:
            while new and len(children) < workers:
                tests = new.pop()
                log = kept_for(tests, "baseline", ".log")
                children[forked(partial(note_covering, tests, wanted[tests], keys[tests]), log)] = tests, log
            child, status = os.waitpid(-1, 0)
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            tests, log = children.pop(child)
            if status:
                sys.exit(f"{tests}: the tests fail on the code as it is:\n{log.read_text()[-2000:]}")
    except KeyboardInterrupt:
        sys.exit("stopped")
    finally:
        for child in children:
            os.killpg(child, signal.SIGKILL)
    covering = Covering()
    for kept in wanted.values():
        covering.join(json.loads(kept.read_text()))
    return covering


def kept_for(tests: str, what: str, suffix: str) -> Path:
    """Where something is kept of some tests."""
    return KEPT / f"{what}_{'_'.join(Path(tests).with_suffix('').parts[1:])}{suffix}"


def note_covering(tests: str, path: Path, key: str) -> int:
    """Run tests and write where they, and the processes that they start, pass."""
    cover = coverage.Coverage(data_file=None, source=[str(PACKAGE)], config_file=False)
    watch = Watch({}, cover=cover)
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        notes.touch()
        reach(**{NOTES: str(notes)})
        cover.start()
        status = run_pytest([tests], watch)
        cover.stop()
        started = entered(notes.read_text(encoding="utf-8"), watch.took)
    data, at = cover.get_data(), {test: number for number, test in enumerate(watch.took)}
    lines = {
        str(Path(file).relative_to(ROOT)): {
            line: [at[test] for test in tests if test in at] for line, tests in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    if not status:
        path.write_text(json.dumps({"key": key, "took": watch.took, "lines": lines, "started": started}))
    return status


def entered(notes: str, took: dict[str, float]) -> dict[str, dict[int, list[int]]]:
    """The numbers of the tests whose processes entered the function of a line; of a file, all its tests."""
    found: dict[str, dict[int, set[int]]] = {}
    for note in set(notes.splitlines()):
        by, path, first, last = note.split("\t")
        tests = {at for at, test in enumerate(took) if by in (test, test.split("::")[0])}
        lines = found.setdefault(str(Path(path).relative_to(ROOT)), {})
        for line in range(int(first), int(last) + 1):
            lines.setdefault(line, set()).update(tests)
    return {path: {line: sorted(tests) for line, tests in lines.items()} for path, lines in found.items()}


def found(path: Path) -> list[Path]:
    """The Python files in a folder, or the one that this is."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def ended(children: dict[int, Mutant]) -> tuple[Mutant, str]:
    """Wait for a child to end, end what it has started, and return its mutant and the outcome."""
    child, status = os.waitpid(-1, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    return children.pop(child), OUTCOMES.get(code, "killed")


def tried() -> dict[str, str]:
    """What is known by the mutants' keys: one of the outcomes."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {found["key"]: found["outcome"] for found in map(json.loads, lines)}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="such as weights/mask.py, or a room; all rooms unless given")
    parser.add_argument(
        "--tests", nargs="*", default=TESTS, help="which may notice them, files or folders; all unless given"
    )
    parser.add_argument("--sample", type=int, default=300, help="how many mutants to try; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--minutes", type=float, default=55, help="when to stop; the next run goes on from there")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def chosen(wanted: argparse.Namespace, tests: Covering) -> Iterator[Mutant]:
    """The mutants to try, in the order of the sample, each written out when its turn comes."""
    modules = [
        path
        for room in ROOMS
        for path in sorted((PACKAGE / room).glob("*.py"))
        if not wanted.modules or {room, str(path.relative_to(PACKAGE))} & set(wanted.modules)
    ]
    if not modules:
        sys.exit(f"no module of {', '.join(ROOMS)} is called {' or '.join(wanted.modules)}")
    mutations = [Mutations(path, tests) for path in modules]
    made = [(of, number) for of in mutations for number in range(len(of.found))]
    order = random.Random(wanted.seed).sample(made, len(made))
    print(f"{len(made)} mutants of {len(modules)} modules", flush=True)
    return islice(filter(None, (of.written(number) for of, number in order)), wanted.sample or None)


def try_all(sample: Iterator[Mutant], wanted: argparse.Namespace, known: dict[str, str]) -> None:
    """Try the mutants, some at a time, until the time is up, and note each outcome in the file as it comes."""
    children: dict[int, Mutant] = {}
    began, done, ahead = time.monotonic(), 0, next(sample, None)
    with RESULTS.open("a", encoding="utf-8") as results:
        try:
            while ahead or children:
                while ahead and len(children) < wanted.workers:
                    children[forked(partial(try_one, ahead), KEPT / "last.log")] = ahead
                    ahead = next(sample, None) if time.monotonic() < began + 60 * wanted.minutes else None
                mutant, outcome = ended(children)
                known[mutant.key] = outcome
                results.write(json.dumps({"key": mutant.key, "outcome": outcome, "mutant": str(mutant)}) + "\n")
                results.flush()
                done += 1
                minutes = (time.monotonic() - began) / 60
                print(f"{done} after {minutes:.0f} minutes: {outcome}, {mutant}", flush=True)
        finally:
            for child in children:
                os.killpg(child, signal.SIGKILL)


def untried(sample: Iterator[Mutant], known: dict[str, str], met: list[Mutant]) -> Iterator[Mutant]:
    """Those of the sample of which nothing is known; all that come by are added to `met`."""
    for mutant in sample:
        met.append(mutant)
        if mutant.key not in known:
            yield mutant


def report(sample: list[Mutant], known: dict[str, str]) -> int:
    """Print the count of each outcome and the survivors that nobody has explained; return how many those are."""
    explained = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("equivalent", [])
    reasons = {(entry["module"], entry["was"], entry["becomes"]): entry["because"] for entry in explained}
    outcomes: dict[str, Counter[str]] = {}
    survivors = []
    for mutant in sample:
        outcome = known[mutant.key]
        if outcome == "survived" and (mutant.module, mutant.was, mutant.becomes) in reasons:
            outcome = "equivalent"
        if outcome == "survived":
            survivors.append(mutant)
        for name in (mutant.module, mutant.module.split("/")[0] + ", in all", "in all"):
            outcomes.setdefault(name, Counter())[outcome] += 1
    heads = ["killed", "too slow", "by mypy", "survived", "equivalent"]
    print(f"\n{'module':28}" + "".join(f"{head:>12}" for head in heads))
    for name, counts in sorted(outcomes.items(), key=lambda row: (row[0] == "in all", ", in all" in row[0], row[0])):
        print(f"{name:28}" + "".join(f"{counts[head]:>12}" for head in heads))
    total = outcomes["in all"]
    tests, decided = total["killed"] + total["too slow"], sum(total[head] for head in heads[:4])
    if decided:
        both = tests + total["by mypy"]
        print(f"\n{tests} of {decided} were noticed by tests ({tests / decided:.1%}), ", end="")
        print(f"{both} by tests or mypy ({both / decided:.1%})")
    for mutant in survivors:
        print(f"survived: {mutant}")
    return len(survivors)


def main() -> int:
    """Try a sample of mutants; return 1 where one survived without a reason, else 0."""
    wanted = arguments()
    KEPT.mkdir(exist_ok=True)
    # Imported once, before the processes fork: most of what each of them would wait for.
    for module in IMPORTED:
        __import__(module)
    searches = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate")]  # no smaller example
    hypothesis.settings.register_profile("mutants", deadline=None, max_examples=30, database=None, phases=searches)
    sys.path.insert(0, str(ROOT / "src"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no test goes on when this is stopped
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        tests = covering(wanted.tests, wanted.workers)
        known, met = tried(), list[Mutant]()
        try:
            try_all(untried(chosen(wanted, tests), known, met), wanted, known)
        except KeyboardInterrupt:
            print("stopped; run it again to go on")
    return int(report([mutant for mutant in met if mutant.key in known], known) > 0)


if __name__ == "__main__":
    sys.exit(main())

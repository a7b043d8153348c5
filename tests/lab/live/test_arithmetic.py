"""Does the live figures' arithmetic in JavaScript answer as torch and gradprune do?

The tests themselves are JavaScript, for node's own runner; here each is one test of pytest, by its name. What they
compare with is computed by ``live_reference``.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from live_reference import reference
from vendor import node

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LIVE = Path("src/gradprune/lab/live")
TESTS = Path("tests/lab/live")
FILES = sorted(path.name for path in HERE.glob("*.test.js"))
NAMES = [
    (file, name)
    for file in FILES
    for name in re.findall(r'^test\("([^"]+)"', (HERE / file).read_text(encoding="utf-8"), re.MULTILINE)
]
ARITHMETIC = (
    "random",
    "network",
    "losses",
    "optimizer",
    "rank",
    "gradients",
    "training",
    "sparse",
    "crew",
    "layered",
    "adam",
    "examples",
    "chart",
    "trace",
    "stage",
)

Outcomes = tuple[dict[str, bool], str]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.json"
    text = json.dumps(reference()).replace("Infinity", "1e999")  # which JSON has no word for
    path.write_text(text, encoding="utf-8")
    return path


def outcomes(file: Path, answers: Path) -> Outcomes:
    """Run one file of tests: by name whether it passed, and all that node said."""
    command = [node(), "--test-reporter=tap", str(file)]
    environment = {**os.environ, "GRADPRUNE_REFERENCE": str(answers)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300
    )
    found = re.findall(r"^\s*(ok|not ok) \d+ - (.+?)\s*$", done.stdout, re.MULTILINE)
    return {name: passed == "ok" for passed, name in found}, done.stdout + done.stderr


@pytest.fixture(scope="module")
def ran(answers: Path) -> Callable[[str], Outcomes]:
    known: dict[str, Outcomes] = {}

    def run(file: str) -> Outcomes:
        if file not in known:
            known[file] = outcomes(HERE / file, answers)
        return known[file]

    return run


@pytest.mark.parametrize(("file", "name"), NAMES, ids=[f"{file.split('.')[0]}: {name}" for file, name in NAMES])
def test_in_node(file: str, name: str, ran: Callable[[str], Outcomes]) -> None:
    passed, said = ran(file)
    assert name in passed, f"node did not run it:\n{said}"
    assert passed[name], said


def test_every_module_of_arithmetic_has_tests_that_node_runs() -> None:
    assert {file.removesuffix(".test.js") for file in FILES} == set(ARITHMETIC)
    for file in FILES:
        text = (HERE / file).read_text(encoding="utf-8")
        written = re.findall(r"\btest\w*(?:\.\w+)?\(", text)
        assert len(written) == sum(file == of for of, _ in NAMES) > 1


# Where in the arithmetic, what is there, and what a slip would make of it; the tests of `file` must notice.
MUTANTS = [
    ("random.test.js", "random.js", "z >>> 7", "z >>> 8"),
    ("random.test.js", "random.js", "uniform() * (i + 1)", "uniform() * i"),
    ("network.test.js", "matrix.js", "s11 += x1 * y1", "s11 += x1 * y0"),
    ("network.test.js", "matrix.js", "j += 2", "j += 3"),
    ("network.test.js", "activation.js", "1 - y * y", "1 + y * y"),
    ("network.test.js", "activation.js", "y * (1 - y)", "y * (1 + y)"),
    ("network.test.js", "activation.js", "1.421413741", "1.421433741"),
    ("network.test.js", "activation.js", "(x > 0 ? 1 : 0)", "(x > 0 ? 1 : 0.01)"),
    ("network.test.js", "network.js", "below[i] *= slope", "below[i] *= -slope"),
    ("network.test.js", "network.js", "slope(before[i], given[i])", "slope(before[i], before[i])"),
    ("network.test.js", "network.js", "work.after[layer - 1]", "work.before[layer - 1]"),
    ("network.test.js", "network.js", "to[at].set(array)", "to[0].set(to[0])"),
    ("network.test.js", "dense.js", "transpose(delta, rows, to, turned[0])", "turned[0].set(delta)"),
    ("layered.test.js", "dense.js", "columnSums(delta, rows, to, gradient[1])", ""),
    ("layered.test.js", "elementwise.js", "columnSums(delta, rows, size, gradient)", ""),
    (
        "layered.test.js",
        "elementwise.js",
        "delta[row * width + (i % width)] / places",
        "delta[row * width + (i % width)]",
    ),
    ("layered.test.js", "elementwise.js", "out.fill(0, 0, rows * width);", ""),
    ("layered.test.js", "convolution.js", "(Math.floor(i / kernel) % kernel)", "Math.floor(i / kernel)"),
    ("layered.test.js", "convolution.js", "(place % across) * stride", "(place % across)"),
    ("layered.test.js", "convolution.js", "* stride - padding;\n    const left", "* stride;\n    const left"),
    ("layered.test.js", "convolution.js", "below.fill(0, 0, rows * from);", ""),
    ("layered.test.js", "convolution.js", "toPixels(delta, rows, pixels)", "pixels.set(delta)"),
    ("layered.test.js", "recurrent.js", "(1 - h * h)", "(1 + h * h)"),
    ("layered.test.js", "recurrent.js", "states[(t + 1) * size + i]", "states[t * size + i]"),
    ("layered.test.js", "recurrent.js", "states.fill(0, 0, size)", ""),
    ("layered.test.js", "recurrent.js", "transpose(state, width, width, turnedState)", "turnedState.set(state)"),
    ("layered.test.js", "recurrent.js", "turn(seen, rows, false, below)", "below.set(seen)"),
    ("layered.test.js", "normalise.js", "squares / width + EPSILON", "squares / width"),
    ("layered.test.js", "normalise.js", "d - mean - plain[start + i] * along", "d - plain[start + i] * along"),
    ("layered.test.js", "normalise.js", "for (const array of gradients) array.fill(0);", ""),
    ("layered.test.js", "attention.js", "(ofShare[j] - mean)", "ofShare[j]"),
    ("layered.test.js", "attention.js", "deltaAsked.fill(0)", ""),
    ("layered.test.js", "attention.js", "1 / Math.sqrt(d)", "1 / Math.sqrt(width)"),
    ("layered.test.js", "attention.js", "out[i] += inputs[i]", "out[i] += normed[i]"),
    ("layered.test.js", "attention.js", "into.set(delta.subarray(0, rows * size))", "into.fill(0)"),
    ("layered.test.js", "layered.js", "l === 0 ? inputs : rooms[l - 1].out", "l === 0 ? inputs : rooms[l].out"),
    ("adam.test.js", "adam.js", "Math.sqrt(squares[i] / ofSquare) + EPSILON_ADAM", "Math.sqrt(squares[i] / ofSquare)"),
    ("examples.test.js", "examples.js", "fraction / 2 ** 24", "fraction / 2 ** 25"),
    ("examples.test.js", "examples.js", "exponent - 15", "exponent - 16"),
    ("examples.test.js", "examples.js", "0x8000 ? -1 : 1", "0x8000 ? 1 : 1"),
    ("adam.test.js", "adam.js", "rate / ofMean", "rate"),
    ("adam.test.js", "adam.js", "squares[i] / ofSquare", "squares[i]"),
    ("adam.test.js", "adam.js", "if (masks) applyMasks(net.weights, masks)", ""),
    ("losses.test.js", "losses.js", "logits[start + c] - largest) / sum", "logits[start + c] - largest)"),
    ("losses.test.js", "losses.js", "Math.max(largest, logits", "Math.min(largest, logits"),
    ("losses.test.js", "losses.js", "(2 * difference)", "(1 * difference)"),
    ("optimizer.test.js", "optimizer.js", "momentum * velocities[i] +", "momentum * velocities[i] -"),
    ("optimizer.test.js", "optimizer.js", "+ decay * parameters[i]", ""),
    ("optimizer.test.js", "optimizer.js", "applyMasks(state.velocities.weights, masks)", ""),
    ("optimizer.test.js", "optimizer.js", "applyMasks(net.weights, masks)", ""),
    ("rank.test.js", "rank.js", "let i = scores[a].length - 1; i >= 0; i--", "let i = 0; i < scores[a].length; i++"),
    ("rank.test.js", "rank.js", "let a = scores.length - 1; a >= 0; a--", "let a = 0; a < scores.length; a++"),
    ("rank.test.js", "rank.js", "below % 2 === 0 ? below :", "below % 2 === 1 ? below :"),
    ("rank.test.js", "rank.js", "Math.min(size, 1)", "Math.min(size, 0)"),
    ("rank.test.js", "rank.js", "joined.length - k + 1", "joined.length - k"),
    ("rank.test.js", "share.js", "remainder(j) - remainder(i)", "remainder(i) - remainder(j)"),
    ("rank.test.js", "share.js", "return sum + lost", "return sum"),
    ("gradients.test.js", "gradients.js", "before > maxNorm", "before < maxNorm"),
    ("gradients.test.js", "gradients.js", "if (before > maxNorm)", "if (before >= maxNorm)"),
    ("gradients.test.js", "gradients.js", "before + 1e-6", "before + 1e-2"),
    ("gradients.test.js", "gradients.js", "nearest[0] > limit", "nearest[0] < limit"),
    ("gradients.test.js", "gradients.js", ">= threshold) kept", "> threshold) kept"),
    ("gradients.test.js", "gradients.js", "sum / array.length", "sum"),
    ("gradients.test.js", "gradients.js", "g + residuals[a][i]", "g - residuals[a][i]"),
    ("gradients.test.js", "gradients.js", "mask[i] === 1 ? 0 : sum", "sum"),
    ("training.test.js", "training.js", "picked.labels[at] = labels[row]", "picked.labels[at] = labels[at]"),
    ("training.test.js", "training.js", "training.position === training.order.length", "training.order.length === 0"),
    ("training.test.js", "training.js", "position === training.order.length", "position >= training.order.length - 1"),
    ("trace.test.js", "trace.js", "> nearby", "< nearby"),
    ("trace.test.js", "trace.js", "([a], [b]) => a - b", "([a], [b]) => b - a"),
    ("chart.test.js", "chart.js", "log ? Math.log10(Math.max(value", "log ? Math.log(Math.max(value"),
    ("chart.test.js", "chart.js", "- a) / (b - a)", "- a) / (b + a)"),
    ("stage.test.js", "stage.js", "if (asked) return;\n    asked = true;\n    queue", "queue"),
    ("stage.test.js", "stage.js", "if (standing) follow()", "follow()"),
    ("training.test.js", "training.js", "sum += rows * trainStep", "sum += trainStep"),
    ("training.test.js", "training.js", "if (training.change) training.change(gradients)", ""),
    ("training.test.js", "training.js", "training.state, training.masks", "training.state, null"),
    ("training.test.js", "training.js", "generator(options.seed)", "generator(0)"),
    ("training.test.js", "training.js", "Math.min(part, rows.length % count)", "0"),
    ("crew.test.js", "crew.js", "optimizer.rate / WORKERS", "optimizer.rate"),
    ("crew.test.js", "crew.js", "crew.past[0] ?? worker.net", "worker.net"),
    ("crew.test.js", "crew.js", "crew.past[p] ?? net", "net"),
    ("crew.test.js", "crew.js", "sum / several.length", "sum"),
    ("crew.test.js", "crew.js", "w - worker.known[a][i]", "w"),
    ("crew.test.js", "crew.js", "crew.steps % crew.period === 0", "crew.steps % crew.period === 1"),
    ("crew.test.js", "crew.js", 'decides === "one"', 'decides === "each"'),
    ("crew.test.js", "crew.js", "if (worker.masks) applyMasks(gradients.weights, worker.masks)", ""),
    ("crew.test.js", "crew.js", "held.push(weightsOf(residuals))", ""),
    ("crew.test.js", "crew.js", ", weightsOf(worker.known)]", "]"),
    ("crew.test.js", "crew.js", "[i] !== 0) marks", "[i] === 0) marks"),
    ("sparse.test.js", "sparse.js", "starts[i + 1] = at", "starts[i] = at"),
    ("sparse.test.js", "sparse.js", "s1 += a[a1 + place]", "s1 += a[a0 + place]"),
    ("sparse.test.js", "sparse.js", "at % size === unit", "at % size !== unit"),
    ("sparse.test.js", "sparse.js", "array[to * from + unit] * constant", "constant"),
    ("sparse.test.js", "sparse.js", "/ from - 0.5)", "/ from)"),
]


def copied(folder: Path) -> Path:
    """The arithmetic and its tests in a folder, beside each other as in the repository."""
    for part in (LIVE, TESTS):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def test_a_copy_of_the_arithmetic_passes_its_tests(tmp_path: Path, answers: Path) -> None:
    folder = copied(tmp_path)
    for file in FILES:
        passed, said = outcomes(folder / TESTS / file, answers)
        assert passed, said
        assert all(passed.values()), said


@pytest.mark.parametrize(("file", "module", "before", "after"), MUTANTS, ids=[f"{m[1]}: {m[2]}" for m in MUTANTS])
def test_a_slip_in_the_arithmetic_is_noticed(
    file: str, module: str, before: str, after: str, tmp_path: Path, answers: Path
) -> None:
    folder = copied(tmp_path)
    path = folder / LIVE / module
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{before!r} is {text.count(before)} times in {module}"
    path.write_text(text.replace(before, after), encoding="utf-8")
    passed, said = outcomes(folder / TESTS / file, answers)
    assert set(passed) == {name for of, name in NAMES if of == file}, f"the copy did not run:\n{said}"
    assert not all(passed.values()), f"no test of {file} noticed"

"""Does the package carry what it promises and nothing of the notebook world?"""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import gradprune

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "gradprune"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "lab" not in path.relative_to(PACKAGE).parts)
TEXTS = sorted(
    path
    for folder in ("src", "tests", "book", "chapters")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".yml", ".json", ".ipynb", ".css", ".js", ".toml"}
    and not {"_build", "_vendor", "node_modules", ".ipynb_checkpoints", "__pycache__"} & set(path.parts)
    and path.name != "package-lock.json"
)


# What a function may ask for when it is called: files of masks, prettier tables, a bar, a picture, intervals, a search,
# what a network couples, integers, another runtime, a file's codes.
OPTIONAL = {"safetensors", "transformers", "rich", "pandas", "tqdm", "matplotlib", "scipy", "optuna", "torch_pruning"}
OPTIONAL |= {"torchao", "onnxruntime", "onnxscript", "executorch"}


def imported(path, *, wherever=True):
    """The full names of all that a file imports: wherever in it, or by being imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if wherever else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["gradprune", *path.relative_to(PACKAGE).parent.parts] if path.is_relative_to(PACKAGE) else []
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (start, node.module)))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_importing_the_package_brings_in_nothing_of_the_notebook_world():
    world = ["matplotlib", "ipywidgets", "IPython", "pandas", "sklearn", "scipy", "yaml", "tqdm", "mnist1d"]
    code = (
        "import sys, torch; before = set(sys.modules); import gradprune; "
        f"print(sorted(set({world}) & (set(sys.modules) - before)), 'gradprune.lab' in sys.modules, "
        "len(gradprune.__all__))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT / "src")}
    )
    assert done.stdout.split("\n")[0] == f"[] False {len(gradprune.__all__)}"


def test_the_package_is_typed():  # that the wheel has each file, test_downloaded.py shows
    assert resources.files("gradprune").joinpath("py.typed").is_file()


def test_the_public_names_exist_are_sorted_and_documented():
    assert set(gradprune.__all__) >= {"gradient_norms", "jacobian_singular_values", "Recorder", "Trace"}
    assert len(set(gradprune.__all__)) == len(gradprune.__all__)
    for name in gradprune.__all__:
        assert getattr(gradprune, name).__doc__, name
    defined = {name for name in vars(gradprune) if not name.startswith("_")}
    modules = {name for name in defined if type(getattr(gradprune, name)).__name__ == "module"}
    assert defined - modules == set(gradprune.__all__)


def test_the_version_is_the_one_of_the_metadata():
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert written[1] == gradprune.__version__


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_outside_the_lab_imports_more_than_torch_and_numpy(path):
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "gradprune", "__future__"}
    for name in imported(path, wherever=False):
        assert name.split(".")[0] in allowed, name
    for name in imported(path):
        assert name.split(".")[0] in allowed | OPTIONAL, name


def point_one_way(package: Path) -> subprocess.CompletedProcess[str]:
    """Ask import-linter, with the contract of pyproject.toml, about a package in some folder."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    command += ["--config", ROOT / "pyproject.toml"]
    environment = os.environ | {"PYTHONPATH": str(package.parent)}
    return subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, check=False)


def test_imports_point_one_way():
    done = point_one_way(PACKAGE)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("importer", "imported_one"),
    [
        ("core/select.py", "weights.mask"),
        ("gradients/clip.py", "weights.score"),
        ("deploy/report.py", "lab.data"),
        ("weights/hold.py", "scale.topk"),
    ],
)
def test_an_import_that_points_the_other_way_is_found(tmp_path, importer, imported_one):
    copy = tmp_path / "gradprune"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / importer).open("a") as file:
        file.write(f"\n\ndef later():\n    import gradprune.{imported_one}\n")
    done = point_one_way(copy)
    assert done.returncode != 0
    assert f"gradprune.{imported_one}" in done.stdout


@pytest.mark.parametrize("path", MODULES + sorted((PACKAGE / "lab").glob("*.py")), ids=lambda path: path.stem)
def test_a_file_starts_with_one_sentence_that_says_what_it_is_about(path):
    words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert words
    assert words.splitlines()[0].rstrip(")")[-1] in ".?"


def test_no_file_names_a_folder_of_the_machine_it_was_written_on():
    private = re.compile(r"/(?:home|Users|root|work)/[\w.-]+|[A-Z]:\\Users\\")
    assert private.search("/home/" + "somebody/x")
    assert len(TEXTS) > 20
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in TEXTS
        for match in private.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found

"""Do a downloaded notebook and the command line run where nothing but the package is installed?"""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file, save_file

from conftest import CHAPTERS, ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built anew."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder with the wheel's contents, as pip would unpack it."""
    zipfile.ZipFile(wheel).extractall(wheel.parent / "site")
    return wheel.parent / "site"


def test_the_wheel_passes_the_check_of_the_index(wheel):
    """That its description can be rendered on its page, and its metadata is whole."""
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout


def test_a_chapter_runs_in_an_empty_folder_with_the_wheel_alone(installed, tmp_path):
    # This one reads a result, runs a part of an experiment again and gives verdicts.
    name = "01c_through_time.ipynb"
    shutil.copy(ROOT / "chapters" / name, tmp_path)
    notebook = nbformat.read(tmp_path / name, as_version=4)
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    probe = "import gradprune.lab as lab; print(lab.__file__); print(lab.setup.repository())"
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute(env=environment)
    for line in notebook.cells[-1].outputs[0].text.splitlines():
        assert line.startswith(str(installed))


def test_the_command_line_works_with_the_wheel_alone(installed, tmp_path):
    save_file({"one.weight": torch.arange(1.0, 9.0).view(2, 4)}, tmp_path / "model.safetensors")
    prune = ["prune", "model.safetensors", "half.safetensors", "--sparsity", "0.5", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "gradprune", *prune],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert json.loads(done.stdout)["command"] == "prune"
    assert load_file(tmp_path / "half.safetensors")["one.weight"].tolist() == [[0, 0, 0, 0], [5, 6, 7, 8]]
    (scripts,) = installed.glob("*.dist-info/entry_points.txt")
    assert "gradprune = gradprune.deploy.command:main" in scripts.read_text()


def test_the_wheel_holds_each_result_experiment_and_figure_once_and_nothing_else_of_the_book(installed):
    def files(folder):
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    shipped = files(installed / "gradprune" / "lab" / "shipped")
    kinds = (".json", ".safetensors", ".tokenizer")
    kept = {f"chapters/{name}" for name in files(ROOT / "chapters") if name.endswith(kinds)}
    kept |= {f"chapters/experiments/{path.name}" for path in (ROOT / "chapters" / "experiments").glob("*.py")}
    assert shipped - {"chapters/experiments/ruff.toml"} == kept | {"book/claims.yml"}
    package = {name for name in files(ROOT / "src" / "gradprune") if not name.endswith(".pyc")}
    assert package <= files(installed / "gradprune")


def test_no_chapter_changes_where_python_looks_for_modules():
    for path in CHAPTERS:
        assert "sys.path" not in path.read_text(encoding="utf-8"), path.name

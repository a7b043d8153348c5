"""Is what is committed of each chapter whole, honest, and compared with what its code gives today?

nbval runs the chapters and compares text; it passes a cell that was never run and does not look at pictures. What it
leaves open is checked here, by functions that return what is wrong. Each function, and nbval itself, is then tried on a
small notebook that is spoiled on purpose: a check that cannot fail checks nothing.
"""

import ast
import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from execute import execute
from nbformat import NotebookNode
from notebooks import WIDGET_VIEW, clean

from conftest import CHAPTERS, ROOT, is_deeper
from gradprune.lab import claims

# Cells whose output differs from run to run and machine to machine: (notebook, a part of the cell's code).
OUTPUT_MAY_DIFFER: set[tuple[str, str]] = set()
IGNORED_AT_MOST = 0.05  # of a notebook's code cells
DRAWERS = {"matplotlib", "pylab", "seaborn", "plotly", "bokeh", "altair", "PIL"}
FIRST, DOCUMENTS = ["Predict first", "The failure"], ["What the documents say"]
MIDDLE = ["What goes wrong in practice", "Exercises", "Summary"]
LAST = MIDDLE + DOCUMENTS
TABLE_ROW = re.compile(r"^.*\S  +\S*\d\S*.*$", re.MULTILINE)
EXERCISE = re.compile(r"^\*\*(\d+) \((easy|code|open)\)", re.MULTILINE)


def not_run_in_order(notebook: NotebookNode) -> list[str]:
    counts = [cell.execution_count for cell in code(notebook)]
    wanted = list(range(1, len(counts) + 1))
    return [] if counts == wanted else [f"execution counts are {counts}: run `make notebooks`"]


def errors_and_warnings(notebook: NotebookNode) -> list[str]:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    errors = [f"stored error: {output.ename}" for output in outputs if output.output_type == "error"]
    return errors + [f"stored warning: {output.text[:80]}" for output in outputs if output.get("name") == "stderr"]


def widget_remains(notebook: NotebookNode) -> list[str]:
    state = ["widget state in the notebook's metadata"] if "widgets" in notebook.metadata else []
    views = [cell.source for cell in code(notebook) for output in cell.outputs if WIDGET_VIEW in output.get("data", {})]
    return state + [f"a widget's view is stored under {source[-60:]!r}" for source in views]


def unchecked_cells(notebook: NotebookNode, name: str = "") -> list[str]:
    """Marks that tell nbval to look away: one is allowed on listed cells, and on few; the others nowhere."""
    faults, ignored = [], 0
    for cell in code(notebook):
        marks = re.findall(r"#\s*(NBVAL_\w+|PYTEST_VALIDATE_\w+)", cell.source, re.IGNORECASE)
        marks += [tag for tag in cell.metadata.get("tags", []) if tag.startswith(("nbval-", "raises-exception"))]
        for mark in {mark.upper().replace("-", "_") for mark in marks}:
            if mark != "NBVAL_IGNORE_OUTPUT":
                faults.append(f"{mark} on {cell.source[:60]!r}: a chapter's cells are all run and compared")
            elif not any(stem == name and part in cell.source for stem, part in OUTPUT_MAY_DIFFER):
                faults.append(f"{mark} on {cell.source[:60]!r}, which is not in OUTPUT_MAY_DIFFER")
            else:
                ignored += 1
    if ignored > IGNORED_AT_MOST * len(code(notebook)):
        faults.append(f"{ignored} of {len(code(notebook))} cells are not compared")
    return faults


def pictures_without_words_or_numbers(notebook: NotebookNode) -> list[str]:
    """A reader who cannot see a picture gets a sentence and its numbers; the numbers are also what nbval compares."""
    faults = []
    for cell in code(notebook):
        printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for output in cell.outputs:
            if "image/png" not in output.get("data", {}):
                continue
            where = f"the picture under {cell.source[-60:]!r}"
            alt = output.metadata.get("image/png", {}).get("alt", "")
            words = output.data.get("text/plain", "")
            if len(alt.split()) < 3 or re.search(r"\.(png|svg)$", alt):
                faults.append(f"{where} has no alternative text")
            if words.startswith("<") or alt not in words:
                faults.append(f"{where} has no words of its own")
            slider = re.findall(r"^[^=\n]+ = .+: .*\d.*$", words, re.MULTILINE)
            if len(slider) < 2 and len(TABLE_ROW.findall(printed + words)) < 2:
                faults.append(f"{where} has no table of its numbers beside it: print one with lab.figures.table")
    return faults


def repeated_imports(notebook: NotebookNode) -> list[str]:
    seen: set[str] = set()
    faults = []
    for cell in code(notebook):
        statements = [node for node in ast.walk(tree(cell)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [f"{getattr(node, 'module', '')} {alias.name}" for node in statements for alias in node.names]
        faults += [f"imported again: {name.strip()}" for name in names if name in seen]
        seen |= set(names)
    return faults


def figures_of_other_kinds(notebook: NotebookNode) -> list[str]:
    """Every picture comes from lab.figures, lab.sliders or lab.live, which ask for its words."""
    faults = []
    for cell in code(notebook):
        for node in ast.walk(tree(cell)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            faults += [f"imports {name}: draw with lab.figures" for name in names if name.split(".")[0] in DRAWERS]
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        if pictures and not calls(cell, "show") + calls(cell, "explore") + live_figures(cell):
            faults.append(f"a picture made by neither lab.figures, lab.sliders nor lab.live: {cell.source[-60:]!r}")
    return faults


def anatomy(notebook: NotebookNode) -> list[str]:
    """What every chapter has, in order, as far as headings and cells tell it."""
    headings = [match for cell in prose(notebook) for match in re.findall(r"^## (.+)$", cell.source, re.MULTILINE)]
    faults = []
    if headings[: len(FIRST)] != FIRST:
        faults.append(f"the first headings are {headings[:2]}, not {FIRST}")
    if headings[-len(LAST) :] != LAST:
        faults.append(f"the last headings are {headings[-len(LAST) :]}, not {LAST}")
    if "From scratch" not in headings:
        faults.append("no heading 'From scratch'")
    opening, _, rest = "\n".join(cell.source for cell in prose(notebook)).partition("## Predict first")
    predict = rest.partition("\n## ")[0]
    if not opening.startswith("# "):
        faults.append("the first cell does not give a title")
    if "You should know" not in opening + predict:
        faults.append("before the second heading nothing says what you should know")
    if not folded(predict):
        faults.append("the answer under 'Predict first' is not folded away in <details>")
    if not any(calls(cell, "explore") + live_figures(cell) for cell in code(notebook)):
        faults.append("no slider: neither lab.sliders.explore nor a figure of lab.live is called")
    if not any("$$" in cell.source for cell in prose(notebook)):
        faults.append("no derivation: no displayed formula")
    if not any("interval" in cell.source for cell in notebook.cells):
        faults.append("no experiment with intervals over seeds")
    if not any("**Further reading" in cell.source for cell in section(notebook, "Summary")):
        faults.append("the summary does not say what to read further")
    return faults


def exercises(notebook: NotebookNode, kinds: frozenset[str] = frozenset({"easy", "code", "open"})) -> list[str]:
    """An exercise begins with **n (easy)**, **n (code)** or **n (open)**; one in code is followed by its solution.

    The solution is an ordinary cell with the tag "hide-cell": folded away on the page, run and compared by nbval.
    """
    found: list[tuple[str, str, str, list[NotebookNode]]] = []  # number, kind, text, code
    for cell in section(notebook, "Exercises"):
        if cell.cell_type == "markdown":
            parts = EXERCISE.split(cell.source)
            found += [(n, kind, text, []) for n, kind, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)]
        elif found:
            found[-1][3].append(cell)
    faults = []
    if [number for number, *_ in found] != [str(number) for number in range(1, len(found) + 1)]:
        faults.append(f"the exercises are numbered {[number for number, *_ in found]}")
    missing = kinds - {kind for _, kind, *_ in found}
    faults += [f"no exercise marked ({kind})" for kind in sorted(missing)]
    for number, kind, text, cells in found:
        if kind == "easy" and not folded(text):
            faults.append(f"exercise {number} has no solution folded away in <details>")
        if kind == "code" and not any(cell.outputs for cell in cells):
            faults.append(f"exercise {number} has no solution that prints what nbval can compare")
        if any("hide-cell" not in cell.metadata.get("tags", []) for cell in cells):
            faults.append(f"the solution of exercise {number} is not folded away: give its cell the tag hide-cell")
    return faults


def verdicts(pages: list[NotebookNode], chapter: int) -> list[str]:
    """What is missing or said twice on the pages of a chapter, its main page and its deeper ones."""
    cells = [cell for notebook in pages for cell in code(notebook)]
    texts = [output.text for cell in cells for output in cell.outputs if output.get("name") == "stdout"]
    found = sorted(verdict.id for text in texts for verdict in claims.found_in(text))
    wanted = sorted(claim.id for claim in claims.all_claims().values() if claim.chapter == chapter)
    return [] if found == wanted else [f"verdicts on {found}; chapter {chapter} has to settle {wanted}, once each"]


def verdicts_not_computed(notebook: NotebookNode) -> list[str]:
    """The conditions of a verdict, and the reason of one that has none, are made from what the page computed."""
    faults = []
    for cell in code(notebook):
        for name, needed in {"verdict": "holds", "as_defined": "because", "no_meaning": "because"}.items():
            for call in calls(cell, name):
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                wanted = {needed} | ({"fails"} & set(given))
                bare = [
                    argument for argument in sorted(wanted) if argument not in given or not computed(given[argument])
                ]
                faults += [f"line {call.lineno} of {cell.source[:60]!r}: {part}= is not computed" for part in bare]
    return faults


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "markdown"]


def section(notebook: NotebookNode, heading: str) -> list[NotebookNode]:
    """Return the cells from the one that begins with a level-2 heading to the next such one."""
    inside, cells = False, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            inside = cell.source.startswith(f"## {heading}")
        cells += [cell] if inside else []
    return cells


def tree(cell: NotebookNode) -> ast.Module:
    return ast.parse(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.MULTILINE))


def calls(cell: NotebookNode, name: str) -> list[ast.Call]:
    """Return the calls of a function or method of this name in a cell."""
    nodes = [node for node in ast.walk(tree(cell)) if isinstance(node, ast.Call)]
    return [node for node in nodes if name in (getattr(node.func, "attr", None), getattr(node.func, "id", None))]


def live_figures(cell: NotebookNode) -> list[ast.Call]:
    """Return the live figures that a cell makes: ``lab.live.Prune()``."""
    nodes = [node for node in ast.walk(tree(cell)) if isinstance(node, ast.Call)]
    return [node for node in nodes if ast.unparse(node.func).startswith("lab.live.")]


def computed(expression: ast.expr) -> bool:
    return any(isinstance(node, ast.Name) for node in ast.walk(expression))


def folded(text: str) -> bool:
    return bool(re.search(r"<details>\s*<summary>.+?</summary>.+?</details>", text, re.DOTALL))


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
every_main_page = pytest.mark.parametrize(
    "path", [path for path in CHAPTERS if not is_deeper(path)], ids=lambda path: path.stem
)


@every_chapter
def test_a_chapter_is_valid_and_its_cells_were_run_in_order_from_the_first(path: Path) -> None:
    nbformat.validate(read(path))
    assert not_run_in_order(read(path)) == []


@every_chapter
def test_a_chapter_stores_no_error_no_warning_and_no_widget(path: Path) -> None:
    assert errors_and_warnings(read(path)) + widget_remains(read(path)) == []


@every_chapter
def test_every_cell_is_compared_but_the_few_that_are_listed(path: Path) -> None:
    assert unchecked_cells(read(path), path.stem) == []


@every_chapter
def test_every_picture_has_words_and_numbers(path: Path) -> None:
    assert pictures_without_words_or_numbers(read(path)) == []


@every_chapter
def test_every_picture_is_drawn_by_the_book_and_nothing_is_imported_twice(path: Path) -> None:
    assert figures_of_other_kinds(read(path)) + repeated_imports(read(path)) == []


@every_main_page
def test_a_chapter_has_all_its_parts_in_order(path: Path) -> None:
    assert anatomy(read(path)) == []


@every_chapter
def test_every_exercise_has_its_solution_folded_away(path: Path) -> None:
    kinds = {} if is_deeper(path) else {"easy", "code", "open"}
    assert exercises(read(path), frozenset(kinds)) == []


@every_chapter
def test_every_verdict_is_computed(path: Path) -> None:
    assert verdicts_not_computed(read(path)) == []


@pytest.mark.parametrize("chapter", sorted({int(path.name[:2]) for path in CHAPTERS}))
def test_every_claim_of_a_chapter_has_one_verdict_on_its_pages(chapter: int) -> None:
    pages = [read(path) for path in CHAPTERS if int(path.name[:2]) == chapter]
    assert verdicts(pages, chapter) == []


def test_the_list_of_cells_that_may_differ_names_only_cells_that_are_there() -> None:
    sources = {path.stem: "\n".join(cell.source for cell in code(read(path))) for path in CHAPTERS}
    assert [(stem, part) for stem, part in OUTPUT_MAY_DIFFER if part not in sources.get(stem, "")] == []


# --- the checks themselves: a small notebook made the way chapters are, whole, and spoiled in every way ---

CELLS = [
    "# A small chapter\n\nYou should know nothing.",
    "## Predict first\n\n<details>\n<summary>The answer</summary>\n\nNo.\n\n</details>",
    "## The failure",
    "from gradprune import lab\n\nlab.start(0)\nrates = [0.5, 0.7, 0.9]\nprint('smallest', min(rates))",
    "## From scratch\n\n$$ r^l $$ with an interval.",
    "figure, axes = lab.figures.new()\naxes.plot([rate**2 for rate in rates])\n"
    "lab.figures.show(figure, alt='The square grows with the rate')\n"
    "lab.figures.table(['rate', 'square'], [(rate, rate**2) for rate in rates])",
    "def draw(depth):\n    figure, axes = lab.figures.new()\n    axes.plot([rate**depth for rate in rates])\n"
    "    return figure, f'the largest is {max(rates)**depth:.2f}'\n\n\nlab.sliders.explore(draw, depth=[1, 2, 3])",
    "## What goes wrong in practice",
    "## Exercises\n\n**1 (easy).** Why?\n\n<details>\n<summary>Solution</summary>\n\nSo.\n\n</details>\n\n"
    "**2 (code).** How?",
    "print(sum(rates))",
    "**3 (open).** What else?",
    "## Summary\n\n**Further reading.** None.",
    "## What the documents say",
    "shrinks = max(rates) ** 2 < max(rates)\n"
    "lab.claims.verdict('D1-3', holds=shrinks, because=f'{max(rates) ** 2:.2f} is less than {max(rates)}')",
]
SOLUTION, TABLE, SLIDER, VERDICT = 9, 5, 6, 13


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    make = nbformat.v4
    is_prose = re.compile(r"#|\*\*")
    cells = [make.new_markdown_cell(text) if is_prose.match(text) else make.new_code_cell(text) for text in CELLS]
    notebook = make.new_notebook(cells=cells)
    notebook.cells[SOLUTION].metadata["tags"] = ["hide-cell"]
    execute(notebook, tmp_path_factory.mktemp("small"), widget_state=False)
    clean(notebook)
    return notebook


CHECKS: list[Callable[[NotebookNode], list[str]]] = [
    not_run_in_order,
    errors_and_warnings,
    widget_remains,
    unchecked_cells,
    pictures_without_words_or_numbers,
    repeated_imports,
    figures_of_other_kinds,
    anatomy,
    exercises,
    verdicts_not_computed,
]


def test_a_notebook_made_as_chapters_are_passes_every_check(small: NotebookNode) -> None:
    assert {check.__name__: check(small) for check in CHECKS} == {check.__name__: [] for check in CHECKS}


def clear(notebook: NotebookNode) -> None:
    notebook.cells[VERDICT].update(outputs=[], execution_count=None)


def run_twice(notebook: NotebookNode) -> None:
    notebook.cells[VERDICT].execution_count += 1


def store_an_error(notebook: NotebookNode) -> None:
    notebook.cells[VERDICT].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])]


def store_a_warning(notebook: NotebookNode) -> None:
    notebook.cells[VERDICT].outputs = [nbformat.v4.new_output("stream", name="stderr", text="UserWarning: old")]


def keep_widget_state(notebook: NotebookNode) -> None:
    notebook.metadata["widgets"] = {}


def keep_widget_view(notebook: NotebookNode) -> None:
    notebook.cells[SLIDER].outputs[0].data[WIDGET_VIEW] = {"model_id": "0"}


def look_away(notebook: NotebookNode) -> None:
    notebook.cells[TABLE].source += "\n# NBVAL_IGNORE_OUTPUT"


def skip_by_tag(notebook: NotebookNode) -> None:
    notebook.cells[TABLE].metadata["tags"] = ["nbval-skip"]


def drop_alt(notebook: NotebookNode) -> None:
    notebook.cells[TABLE].outputs[0].metadata = {}


def name_the_file(notebook: NotebookNode) -> None:
    output = notebook.cells[TABLE].outputs[0]
    output.metadata["image/png"]["alt"] = output.data["text/plain"] = "../_images/picture of this.png"


def drop_words(notebook: NotebookNode) -> None:
    notebook.cells[TABLE].outputs[0].data["text/plain"] = "<Figure size 640x480 with 1 Axes>"


def drop_table(notebook: NotebookNode) -> None:
    del notebook.cells[TABLE].outputs[1:]


def drop_slider_numbers(notebook: NotebookNode) -> None:
    data = notebook.cells[SLIDER].outputs[0].data
    data["text/plain"] = data["text/plain"].replace("=", "is")


def import_again(notebook: NotebookNode) -> None:
    notebook.cells[TABLE].source = "from gradprune import lab\n" + notebook.cells[TABLE].source


def draw_by_hand(notebook: NotebookNode) -> None:
    notebook.cells[TABLE].source = "import matplotlib.pyplot as plt\n" + notebook.cells[TABLE].source


def show_by_hand(notebook: NotebookNode) -> None:
    notebook.cells[TABLE].source = "figure"


def swap_sections(notebook: NotebookNode) -> None:
    notebook.cells[1], notebook.cells[2] = notebook.cells[2], notebook.cells[1]


def drop_section(notebook: NotebookNode) -> None:
    del notebook.cells[7]


def unfold_the_answer(notebook: NotebookNode) -> None:
    notebook.cells[1].source = "## Predict first\n\nNo."


def drop_slider(notebook: NotebookNode) -> None:
    notebook.cells[SLIDER].source = ""


def drop_solution(notebook: NotebookNode) -> None:
    del notebook.cells[SOLUTION]


def unfold_solution(notebook: NotebookNode) -> None:
    notebook.cells[SOLUTION].metadata["tags"] = []


def drop_easy_solution(notebook: NotebookNode) -> None:
    notebook.cells[8].source = "## Exercises\n\n**1 (easy).** Why?\n\n**2 (code).** How?"


def drop_open_exercise(notebook: NotebookNode) -> None:
    del notebook.cells[10]


def fail_by_hand(notebook: NotebookNode) -> None:
    notebook.cells[VERDICT].source = notebook.cells[VERDICT].source.replace(
        "holds=shrinks", "holds=shrinks, fails=False"
    )


def define_by_hand(notebook: NotebookNode) -> None:
    notebook.cells[VERDICT].source = "lab.claims.as_defined('D0-4', because='3 stays 3')"


def decide_by_hand(notebook: NotebookNode) -> None:
    notebook.cells[VERDICT].source = notebook.cells[VERDICT].source.replace("holds=shrinks", "holds=1 < 2")


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (clear, not_run_in_order),
        (run_twice, not_run_in_order),
        (store_an_error, errors_and_warnings),
        (store_a_warning, errors_and_warnings),
        (keep_widget_state, widget_remains),
        (keep_widget_view, widget_remains),
        (look_away, unchecked_cells),
        (skip_by_tag, unchecked_cells),
        (drop_alt, pictures_without_words_or_numbers),
        (name_the_file, pictures_without_words_or_numbers),
        (drop_words, pictures_without_words_or_numbers),
        (drop_table, pictures_without_words_or_numbers),
        (drop_slider_numbers, pictures_without_words_or_numbers),
        (import_again, repeated_imports),
        (draw_by_hand, figures_of_other_kinds),
        (show_by_hand, figures_of_other_kinds),
        (swap_sections, anatomy),
        (drop_section, anatomy),
        (unfold_the_answer, anatomy),
        (drop_slider, anatomy),
        (drop_solution, exercises),
        (unfold_solution, exercises),
        (drop_easy_solution, exercises),
        (drop_open_exercise, exercises),
        (decide_by_hand, verdicts_not_computed),
        (fail_by_hand, verdicts_not_computed),
        (define_by_hand, verdicts_not_computed),
    ],
    ids=lambda function: function.__name__,
)
def test_a_check_sees_what_it_is_for(
    small: NotebookNode, spoil: Callable[[NotebookNode], None], check: Callable[[NotebookNode], list[str]]
) -> None:
    spoiled = copy.deepcopy(small)
    spoil(spoiled)
    assert len(check(spoiled)) == 1


def test_a_missing_and_a_second_verdict_are_seen(small: NotebookNode) -> None:
    assert "D1-1" in verdicts([small], 1)[0]
    path = CHAPTERS[0]
    notebook, number = read(path), int(path.name[:2])
    notebook.cells += [notebook.cells[-1], *(cell for cell in code(notebook) if calls(cell, "verdict"))]
    assert len(verdicts([notebook], number)) == 1


def alter_output(notebook: NotebookNode) -> int:
    output = notebook.cells[3].outputs[0]
    output.text = output.text.replace("0.5", "0.6")
    return 3


def alter_plotted_number(notebook: NotebookNode) -> int:
    table = notebook.cells[TABLE].outputs[1]
    table.text = table.text.replace("0.49", "0.48")
    return TABLE


def alter_slider_number(notebook: NotebookNode) -> int:
    data = notebook.cells[SLIDER].outputs[0].data
    data["text/plain"] = data["text/plain"].replace("0.81", "0.82")
    return SLIDER


def flip_verdict(notebook: NotebookNode) -> int:
    cell = notebook.cells[VERDICT]
    cell.source = cell.source.replace("<", ">", 1)
    return VERDICT


def strict_nbval(*paths: Path, built: bool = False) -> subprocess.CompletedProcess[str]:
    """Run nbval with the flags that `make test` gives it, on runs of its own or on those of the build."""
    flags = re.search(r"pytest (.*--nbval .*) tests chapters", (ROOT / "Makefile").read_text())
    assert flags, "the Makefile no longer runs nbval"
    assert "--nbval-lax" not in flags[1]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *(flags[1] if built else flags[1].replace("-p book.built_run", "")).split(),
        *("-c", "pyproject.toml", "-p", "no:cacheprovider", "--color=no", "-n0"),
        *map(str, paths),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_nbval_passes_what_is_as_it_was_run_and_fails_each_altered_output_number_and_verdict(
    small: NotebookNode, tmp_path: Path
) -> None:
    spoiled, wanted = copy.deepcopy(small), []
    for spoil in (alter_output, alter_plotted_number, alter_slider_number, flip_verdict):
        before = copy.deepcopy(spoiled)
        altered = spoil(spoiled)
        assert spoiled != before, f"{spoil.__name__} alters nothing"
        wanted.append(("spoiled", sum(cell.cell_type == "code" for cell in spoiled.cells[:altered])))
    for name, notebook in {"small": small, "spoiled": spoiled}.items():
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    done = strict_nbval(tmp_path)
    failed = re.findall(r"^FAILED .*?(\w+)\.ipynb::Cell (\d+)", done.stdout, re.MULTILINE)
    assert [(name, int(number)) for name, number in failed] == wanted, done.stdout
    assert f"{len(wanted)} failed, {2 * len(code(small)) - len(wanted)} passed" in done.stdout


def test_nbval_compares_a_chapter_with_the_run_that_its_page_was_built_from(tmp_path: Path) -> None:
    """As `make test` does: what is stored is another number, or the code has not run."""
    chapter = min(CHAPTERS, key=lambda path: path.stat().st_size)
    as_it_is, altered, edited = (nbformat.read(chapter, as_version=4) for _ in range(3))
    cells = code(altered)
    at = next(n for n, cell in enumerate(cells) if any(re.search(r"\d", o.get("text", "")) for o in cell.outputs))
    for output in cells[at].outputs:
        output.text = re.sub(r"\d", lambda digit: str(9 - int(digit[0])), output.get("text", ""))
    code(edited)[-1].source += "\nprint()"
    for name, notebook in {"as_it_is": as_it_is, "altered": altered, "edited": edited}.items():
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    done = strict_nbval(tmp_path, built=True)
    assert re.findall(r"^FAILED .*?(\w+)\.ipynb::Cell (\d+)", done.stdout, re.MULTILINE) == [("altered", str(at))]
    assert "edited.ipynb has not run as it stands: run `make book` first" in done.stdout
    assert f"1 failed, {2 * len(cells) - 1} passed, {len(cells)} errors" in done.stdout

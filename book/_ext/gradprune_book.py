"""What this book adds to Sphinx.

Tables of results, what the names of types stand for, live figures on pages that are no notebooks, a still picture where
no scripts run, paper that is always light, and the repository's address on the pages. Tables of claims are made by
claims_pages.py.
"""

import ast
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from ipywidgets.embed import dependency_state, embed_data, escape_script
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from gradprune.lab import experiment, live

STATE, WIDGET = (f"application/vnd.jupyter.widget-{kind}+json" for kind in ("state", "view"))


class LiveFigure(SphinxDirective):
    """A live figure on a page that is no notebook: the widget's state and view, and its still where no script runs."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the figure; the widget manager is loaded by pages that have one, and by those of notebooks."""
        os.environ["GRADPRUNE_FIGURES"] = "svg"
        try:
            figure = live.figure(self.arguments[0])
        except ValueError as error:
            raise self.error(str(error)) from error
        for number, (path, attributes) in enumerate(self.config.nb_ipywidgets_js.items()):
            NbMetadataCollector.add_js_file(self.env, self.env.docname, f"ipywidgets_{number}", path, attributes)
        # The state of this widget and of what it refers to: by default it would be that of all widgets of the build.
        data = embed_data(views=[figure], state=dependency_state([figure], drop_defaults=False))
        scripts = {STATE: data["manager_state"], WIDGET: data["view_specs"][0]}
        written = (
            f'<script type="{kind}">{escape_script(json.dumps(content))}</script>' for kind, content in scripts.items()
        )
        bundle, _ = figure._repr_mimebundle_()
        return [nodes.raw("", "".join(written), format="html"), where_no_script_runs(bundle["text/html"])]


def where_no_script_runs(still: str) -> nodes.raw:
    """Return what stands there: a live figure's still, which is a box of its own, or an explorer's frame in its box."""
    boxed = still if still.lstrip().startswith('<div class="gp-live') else f'<div class="gp-explore">{still}</div>'
    return nodes.raw("", f"<noscript>{boxed}</noscript>", format="html")


class ResultsTable(SphinxDirective):
    """Rows of one file of chapters/results, with the command, the machine and the day they were measured.

    The argument is the file's name. ``columns`` lists what is shown, separated by ``|``: a key, or ``key: heading``; a
    key of a nested value is written ``outer/inner``. Rows that lack one of the columns are left out.
    """

    required_arguments = 1
    option_spec: ClassVar[dict[str, Callable[[str], str]]] = {"columns": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Return the table and the line under it."""
        name = self.arguments[0]
        path = Path(self.env.srcdir) / "chapters" / "results" / f"{name}.json"
        self.env.note_dependency(str(path))
        result = experiment.load(name)
        columns = [part.strip().split(": ", 1) for part in self.options["columns"].split("|")]
        picked = [[_inner(row, column[0]) for column in columns] for row in result["rows"]]
        rows = [[_shown(value) for value in row] for row in picked if None not in row]
        if not rows:
            raise self.error(f"{path.name} has no row with all of {[column[0] for column in columns]}")
        versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
        under = nodes.paragraph("", f"Measured on {result['date']} ({result['machine']}; {versions}) by ")
        under += nodes.literal(text=result["command"])
        return [plain_table([column[-1] for column in columns], rows), under]


def _inner(row: dict[str, Any], key: str) -> Any:
    if key in row or "/" not in key:
        return row.get(key)
    outer, inner = key.rsplit("/", 1)
    nested = row.get(outer)
    return nested.get(inner) if isinstance(nested, dict) else None


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> nodes.table:
    """Return a table of text."""
    table = nodes.table()
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    head, body = nodes.thead(), nodes.tbody()
    for part, lines in ((head, [header]), (body, rows)):
        for line in lines:
            row = nodes.row()
            row += [nodes.entry("", nodes.paragraph(text=text)) for text in line]
            part += row
    group += [head, body]
    table += group
    return table


class TypeNames(SphinxDirective):
    """What the names of types in the signatures stand for, as the package's sources define them."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return a definition for each name, which the signatures link to."""
        meanings: dict[str, set[str]] = {}
        package = Path(self.env.srcdir) / "src" / "gradprune"
        for path in sorted(path for path in package.glob("*/*.py") if path.parent.name != "lab"):
            self.env.note_dependency(str(path))
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    meanings.setdefault(node.targets[0].id, set()).add(ast.unparse(node.value))
        lines = []
        for name in self.arguments[0].split():
            if len(meanings.get(name, ())) != 1:
                raise self.error(f"the sources define the type {name} {len(meanings.get(name, ()))} times, not once")
            lines += [f".. py:type:: {name}", f"   :canonical: {meanings[name].pop()}", "   :no-index-entry:", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def keep_still_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Put the picture of one setting where no scripts run, which otherwise would show nothing there."""
    for bundle in doctree.findall(lambda node: isinstance(node, nodes.container) and "mime_type" not in node):
        shown = {
            child["mime_type"]: child for child in bundle.children if "mime_type" in getattr(child, "attributes", ())
        }
        if {WIDGET, "text/html"} <= set(shown):
            still = "".join(part.astext() for part in shown["text/html"].children)
            shown[WIDGET] += where_no_script_runs(still)


class OutputFirst(SphinxPostTransform):
    """Put a cell's output above its folded code where the cell has the tag ``output-first``."""

    default_priority = 200  # after MyST-NB has folded the code
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Move what stands first in the cell, its code, behind its output."""
        for cell in self.document.findall(nodes.container):
            if "tag_output-first" in cell["classes"]:
                cell.append(cell.pop(0))


def leave_out_blank_lines(app: Sphinx, doctree: nodes.document) -> None:
    """Take out printed blocks of blank lines: they part tables of text, which on a page are boxes."""
    for block in list(doctree.findall(nodes.literal_block)):
        if "stream" in block["classes"] and not block.astext().strip():
            block.parent.remove(block)


def keep_dark_to_screens(app: Sphinx, failure: Exception | None) -> None:
    """Make a page light on paper, though it is dark on the screen, and light where no script sets its theme."""
    if failure is None and app.builder.name == "html":
        for path in (Path(app.outdir) / "_static").rglob("*.css"):
            text = path.read_text(encoding="utf-8")
            if "data-theme" in text:
                path.write_text(dark_on_screens_only(text), encoding="utf-8")


def dark_on_screens_only(sheet: str) -> str:
    """Return a style sheet whose rules for dark hold on screens only, and those for light also elsewhere.

    The theme is an attribute that a script sets; where none runs it stays "auto".
    """

    def rewrite(rule: re.Match[str]) -> str:
        selectors, style = (
            re.split(r",(?![^(]*\))", rule[1].strip()),
            rule[2],
        )  # a comma inside :is(...) divides nothing
        dark = [part for part in selectors if re.search(r'data-theme="?dark', part)]
        kept = [part for part in selectors if part not in dark]
        light = [part for part in kept if re.search(r'data-theme="?light', part)]
        kept += [re.sub(r'(data-theme="?)light', r"\1auto", part) for part in light]
        paper = [re.sub(r'(data-theme="?)light', r"\1dark", part) for part in light]
        rules = [f"{','.join(kept)}{{{style}}}"] if kept else []
        rules += [f"@media screen{{{','.join(dark)}{{{style}}}}}"] if dark else []
        rules += [f"@media print{{{','.join(paper)}{{{style}}}}}"] if paper else []
        return "\n".join(rules)

    without_comments = re.sub(r"/\*.*?\*/", "", sheet, flags=re.DOTALL)
    return re.sub(r"([^{};]*data-theme[^{};]*)\{([^{}]*)\}", rewrite, without_comments)


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Write the repository's address, which _config.yml alone holds, and links to the chapters where a page asks."""
    source[0] = source[0].replace("{{ repository }}", app.config.html_theme_options["repository_url"])
    chapters = written_chapters(Path(app.srcdir))
    source[0] = re.sub(
        r"{{ chapter (\d+) }}",
        lambda match: f"{{doc}}`{match[1]} </{chapters[match[1]]}>`" if match[1] in chapters else match[1],
        source[0],
    )


def link_chapters(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Link the chapters that a docstring names, those that are written."""
    chapters = written_chapters(Path(app.srcdir))

    def link(match: re.Match[str]) -> str:
        return re.sub(
            r"\d+", lambda at: f":doc:`{at[0]} </{chapters[at[0]]}>`" if at[0] in chapters else at[0], match[0]
        )

    lines[:] = re.sub(r"\b[Cc]hapters? \d+(?:(?:, | and )\d+)*", link, "\n".join(lines)).split("\n")


def keep_results_whole(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Say that a result has no type of its own: napoleon would take all before a colon for one."""
    for number, line in enumerate(lines[:-1], 1):
        if line == "Returns:":
            lines[number] = re.sub(r"(?=\S)", ": ", lines[number], count=1)


def leave_out_aliases(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out the fields of a named tuple, which its docstring describes: Sphinx knows only their numbers."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def shorten_defaults(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write a default that a dataclass makes anew, or that is a function, as what Sphinx can read."""
    return (signature and re.sub(r"<function (\w+)[^>]*>", r"\1", signature.replace("<factory>", "...")), returns)


def written_chapters(root: Path) -> dict[str, str]:
    """Return by number, without leading zeros, the documents of the chapters that exist."""
    return {str(int(path.name[:2])): f"chapters/{path.stem}" for path in (root / "chapters").glob("[0-9][0-9]_*.ipynb")}


def link_type(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: nodes.Element
) -> nodes.Element | None:
    """Link the name of a type in a signature to what it stands for: Sphinx looks only for classes there."""
    name = node.get("reftarget", "").rpartition(".")[2]
    found = env.get_domain("py").objects.get(name)
    if node.get("reftype") != "class" or found is None or found.objtype != "type":
        return None
    return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, shown, name)


def flatten_module_list(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Make the list of the package's sources one list: Sphinx puts that of a subpackage between two items."""
    if page == "_modules/index":
        heading, _, items = context["body"].partition("<ul>")
        context["body"] = f"{heading}<ul>{re.sub('</?ul>', '', items)}</ul>"


def hide_lists_of_parameters(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Let a signature be read as one line: Sphinx lays its parameters out as a list of definitions without terms."""
    opening = r'(<span class="sig-paren">\(</span>\s*<dl)>'
    if "body" in context:
        context["body"] = re.sub(opening, r'\1 role="presentation">', context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("results-table", ResultsTable)
    app.add_directive("type-names", TypeNames)
    app.add_directive("live", LiveFigure)
    app.add_post_transform(OutputFirst)
    app.connect("source-read", fill_in)
    app.connect("doctree-read", keep_still_pictures)
    app.connect("doctree-read", leave_out_blank_lines)
    app.connect("autodoc-process-docstring", link_chapters)
    app.connect("autodoc-process-docstring", keep_results_whole, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", shorten_defaults)
    app.connect("autodoc-skip-member", leave_out_aliases)
    app.connect("missing-reference", link_type)
    app.connect("html-page-context", flatten_module_list)
    app.connect("html-page-context", hide_lists_of_parameters)
    app.connect("build-finished", keep_dark_to_screens, priority=900)  # after the theme has written its colours of code
    return {"parallel_read_safe": True, "parallel_write_safe": True}

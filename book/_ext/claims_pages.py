"""Which statements of the documents hold? The tables and the picture of it, made from the verdicts of the chapters."""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

import nbformat
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from gradprune.lab import claims

DOCUMENTS = (
    "pruning by “gradient clipping”",
    "vanishing gradients and gradient pruning",
    "compressing a trained network by a threshold",
    "bounding gradients",
    "pruning in general",
)
KINDS = ("formula", "procedure", "snippet", "effect", "scope", "next")
OUTCOMES = {  # words and sign of each, so that no colour is needed to tell them apart
    "holds": ("holds", "✓"),
    "when": ("holds when", "◐"),
    "fails": ("fails", "✗"),
    "shown": ("not shown", "?"),
    "defined": ("as defined", "="),
    "none": ("has no meaning", "∅"),
    "open": ("open", "·"),
}

Found = dict[str, tuple[str, str, claims.Verdict]]  # by claim: its page, the anchor of its cell, what that cell says


class ClaimTables(SphinxDirective):
    """What the tables of claims share: the verdicts, and the cells that show a claim and its verdict."""

    def found(self) -> Found:
        """Return all verdicts; the page depends on the notebooks that have them."""
        found = verdicts(Path(self.env.srcdir))
        for page in {page for page, _, _ in found.values()}:
            self.env.note_dependency(str(Path(self.env.srcdir) / f"{page}.ipynb"))
        return found

    def quoted(self, claim: claims.Claim) -> nodes.paragraph:
        """Return the document's words and their translation."""
        words = nodes.raw("", f'<q lang="zh-Hans">{escape(claim.zh)}</q>', format="html")
        return nodes.paragraph("", "", words, nodes.Text(f" {claim.en}"), classes=["gp-quoted"])

    def linked(self, claim: claims.Claim, found: Found) -> list[nodes.Node]:
        """Return the sign and the words of a verdict, which lead to its cell."""
        key = outcome(claim, found)
        sign = nodes.raw("", signed(key), format="html")
        if claim.id not in found:
            return [sign, nodes.Text(f" open, chapter {claim.chapter}")]
        page, anchor, verdict = found[claim.id]
        target = self.env.app.builder.get_relative_uri(self.env.docname, page) + anchor
        link = nodes.reference("", verdict.outcome, refuri=target)
        return [sign, nodes.Text(" "), nodes.strong("", "", link)]


class VerdictsTable(ClaimTables):
    """What one chapter found: the document's words with their translation, the verdict, and a line with its number.

    The argument is the chapter's number. The verdicts are those of its main page and of its deeper ones.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table, folded under a line that counts its verdicts: who has not read the documents goes past."""
        rows = [claim for claim in claims.all_claims().values() if str(claim.chapter) == self.arguments[0].lstrip("0")]
        if not rows:
            raise self.error(f"no statement belongs to chapter {self.arguments[0]!r}")
        found = self.found()
        lines = []
        for claim in rows:
            said = nodes.entry("", nodes.paragraph("", "", nodes.strong(text=claim.id)), self.quoted(claim))
            line = first_number(found[claim.id][2].because) if claim.id in found else ""
            verdict = nodes.paragraph("", "", *self.linked(claim, found))
            cells = [said, nodes.entry("", verdict), nodes.entry("", nodes.paragraph(text=line))]
            lines.append(nodes.row("", *cells))
        header = ["the document says", "verdict", "by what was measured"]
        fold = f'<details class="gp-fold"><summary>{counted([outcome(claim, found) for claim in rows])}</summary>'
        opening, end = (nodes.raw("", tag, format="html") for tag in (fold, "</details>"))
        return [opening, table(header, (34, 22, 44), lines, "gp-verdicts"), end]


class ClaimsPicture(ClaimTables):
    """All claims: a square each, coloured by its verdict."""

    def run(self) -> list[nodes.Node]:
        """Return the picture."""
        return [nodes.raw("", squares(list(claims.all_claims().values()), self.found()), format="html")]


class ClaimsTable(ClaimTables):
    """All claims: one table for each document, with a filter."""

    def run(self) -> list[nodes.Node]:
        """Return the filter and the tables."""
        found = self.found()
        rows = list(claims.all_claims().values())
        out: list[nodes.Node] = [nodes.raw("", filter_form(len(rows)), format="html")]
        for number, title in enumerate(DOCUMENTS):
            section = nodes.section(ids=[f"document-{number}"])
            section += nodes.title(text=f"Document {number}: {title}")
            lines = [self.row(claim, found) for claim in rows if claim.document == number]
            section += table(["", "statement", "verdict"], (8, 46, 46), lines, "gp-claims")
            out.append(section)
        return out

    def row(self, claim: claims.Claim, found: Found) -> nodes.row:
        """Return the row of one claim: its number, what it says, its verdict and the reason."""
        classes = [f"gp-{what}-{value}" for what, value in facets(claim, found).items()]
        reason = f". {found[claim.id][2].because}" if claim.id in found else ""
        verdict = nodes.paragraph("", "", *self.linked(claim, found), nodes.Text(reason))
        says = nodes.paragraph(text=f"{claim.says} ({claim.kind})")
        cells = [[nodes.paragraph(text=claim.id)], [says, self.quoted(claim)], [verdict]]
        return nodes.row("", *(nodes.entry("", *cell) for cell in cells), ids=[claim.id.lower()], classes=classes)


def table(header: list[str], widths: tuple[int, ...], rows: list[nodes.row], name: str) -> nodes.table:
    """Return a table whose rows become cards where the page is narrow."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in widths), cols=len(widths))
    head = nodes.row("", *(nodes.entry("", nodes.paragraph(text=text)) for text in header))
    group += [nodes.thead("", head), nodes.tbody("", *rows)]
    return nodes.table("", group, classes=[name, "gp-cards"])


def counted(outcomes: list[str]) -> str:
    """Return how many verdicts of each kind there are, in words."""
    counts = ", ".join(f"{outcomes.count(key)} {words}" for key, (words, _) in OUTCOMES.items() if key in outcomes)
    return f"{len(outcomes)} statement{'s' if len(outcomes) > 1 else ''}: {counts}"


def first_number(because: str) -> str:
    """Return a reason up to the end of the first sentence that has a number."""
    sentences = re.split(r"(?<=[.])\s+(?=[A-Z(])", because)
    last = next(at for at, sentence in enumerate(sentences, 1) if re.search(r"\d", sentence))
    return " ".join(sentences[:last])


def signed(key: str) -> str:
    """Return the small square of an outcome; its words stand beside it."""
    return f'<span class="gp-square gp-is-{key}" aria-hidden="true">{OUTCOMES[key][1]}</span>'


def squares(rows: list[claims.Claim], found: Found) -> str:
    """Return the picture of all claims: a line of squares for each document, each a link to its claim, and a legend."""
    lines = []
    for number, title in enumerate(DOCUMENTS):
        links = []
        for claim in (claim for claim in rows if claim.document == number):
            key = outcome(claim, found)
            said = found[claim.id][2].outcome if claim.id in found else f"open, chapter {claim.chapter}"
            name = escape(f"{claim.id}, {said}: {claim.says}", quote=True)
            square = f'<a class="gp-square gp-is-{key}" href="#{claim.id.lower()}" title="{name}" aria-label="{name}">'
            links.append(f"{square}{OUTCOMES[key][1]}</a>")
        heading = f'<a href="#document-{number}">Document {number}</a>: {title}'
        lines.append(f'<div class="gp-line"><p>{heading}</p><div>{"".join(links)}</div></div>')
    came_out = [outcome(claim, found) for claim in rows]
    parts = [f"{signed(key)} {words} ({came_out.count(key)})" for key, (words, _) in OUTCOMES.items()]
    legend = "".join(f"<span>{part}</span>" for part in parts)
    return f'<figure class="gp-squares">{"".join(lines)}<figcaption>{legend}</figcaption></figure>'


def outcome(claim: claims.Claim, found: Found) -> str:
    """Return the key of OUTCOMES that a claim came out with."""
    if claim.id not in found:
        return "open"
    said = found[claim.id][2].outcome
    return next((key for key, (words, _) in OUTCOMES.items() if said == words), "when")


def facets(claim: claims.Claim, found: Found) -> dict[str, str]:
    """Return what a claim can be filtered by."""
    return {"document": str(claim.document), "kind": claim.kind, "verdict": outcome(claim, found)}


def filter_form(total: int) -> str:
    """Return the form that narrows the tables down; gradprune.js shows it and does the narrowing."""
    choices = {
        "document": {str(number): f"{number}: {title}" for number, title in enumerate(DOCUMENTS)},
        "kind": {kind: kind for kind in KINDS},
        "verdict": {key: words for key, (words, _) in OUTCOMES.items()},
    }
    fields = []
    for name, options in choices.items():
        listed = "".join(f'<option value="{value}">{text}</option>' for value, text in options.items())
        fields.append(f'<label>{name} <select name="{name}"><option value="">any</option>{listed}</select></label>')
    return f'<form class="gp-filter" hidden>{" ".join(fields)} <output>{total} shown</output></form>'


def verdicts(root: Path) -> Found:
    """Return by claim: the page, the anchor of the cell, and the verdict in the cell's output."""
    found: Found = {}
    for path in sorted((root / "chapters").glob("[0-9]*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                for verdict in claims.found_in(output.get("text", "")):
                    found[verdict.id] = (f"chapters/{path.stem}", "#" + anchor_of(verdict.id), verdict)
    return found


def anchor_of(claim: str) -> str:
    """Return the anchor of the cell that settles a claim."""
    return f"verdict-{claim.lower()}"


def mark_verdicts(app: Sphinx, doctree: nodes.document) -> None:
    """Give each output that holds a verdict the anchor that the tables link to."""
    for cell in doctree.findall(lambda node: isinstance(node, nodes.container) and "cell_output" in node["classes"]):
        for verdict in claims.found_in(cell.astext()):
            cell["ids"].append(anchor_of(verdict.id))


def fold_verdicts(app: Sphinx, doctree: nodes.document) -> None:
    """Fold the cells that compute a section's verdicts together, each run of cells that nothing stands between."""
    for section in list(doctree.findall(nodes.section)):
        for run in _runs_of_cells(section):
            if claims.found_in("\n".join(cell.astext() for cell in run)):
                for cell in run:
                    cell.attributes.pop("hide_mode", None)  # once folded is enough
                opening = '<details class="gp-computed"><summary>How the verdicts were computed</summary>'
                section.insert(section.index(run[0]), nodes.raw("", opening, format="html"))
                section.insert(section.index(run[-1]) + 1, nodes.raw("", "</details>", format="html"))


def _runs_of_cells(section: nodes.section) -> Iterator[list[nodes.Element]]:
    run: list[nodes.Element] = []
    for child in [*section.children, nodes.paragraph()]:
        if isinstance(child, nodes.container) and child.get("nb_element") == "cell_code":
            run.append(child)
        elif run:
            yield run
            run = []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("claims-picture", ClaimsPicture)
    app.add_directive("claims-table", ClaimsTable)
    app.add_directive("verdicts", VerdictsTable)
    app.connect("doctree-read", mark_verdicts)
    app.connect("doctree-read", fold_verdicts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""What this book adds to Sphinx: the table of claims, and the repository's address on the pages."""

import re
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


class ClaimsTable(SphinxDirective):
    """All claims, one table for each document; a settled one with its verdict, linked to the cell that computed it."""

    def run(self) -> list[nodes.Node]:
        """Return the tables."""
        found = verdicts(Path(self.env.srcdir))
        for chapter in {chapter for chapter, _, _ in found.values()}:
            self.env.note_dependency(str(Path(self.env.srcdir) / f"{chapter}.ipynb"))
        rows = list(claims.all_claims().values())
        settled = sum(claim.id in found for claim in rows)
        out: list[nodes.Node] = [nodes.paragraph(text=f"{settled} of {len(rows)} statements are settled so far.")]
        for number, title in enumerate(DOCUMENTS):
            section = nodes.section(ids=[f"document-{number}"])
            section += nodes.title(text=f"Document {number}: {title}")
            section += self.table([claim for claim in rows if claim.document == number], found)
            out.append(section)
        return out

    def table(self, rows: list[claims.Claim], found: dict[str, tuple[str, str, claims.Verdict]]) -> nodes.table:
        """Return one document's claims: id, statement, verdict."""
        table = nodes.table(classes=["gp-claims"])
        group = nodes.tgroup(cols=3)
        group += [nodes.colspec(colwidth=width) for width in (8, 46, 46)]
        head = nodes.row()
        head += [nodes.entry("", nodes.paragraph(text=text)) for text in ("id", "statement", "verdict")]
        group += nodes.thead("", head)
        body = nodes.tbody()
        for claim in rows:
            row = nodes.row(ids=[claim.id.lower()])
            row += nodes.entry("", nodes.paragraph(text=claim.id))
            row += nodes.entry("", nodes.paragraph(text=claim.says))
            row += nodes.entry("", self.verdict(claim, found))
            body += row
        group += body
        table += group
        return table

    def verdict(self, claim: claims.Claim, found: dict[str, tuple[str, str, claims.Verdict]]) -> nodes.paragraph:
        """Return the verdict on one claim, or that it is open."""
        if claim.id not in found:
            return nodes.paragraph(text=f"open, chapter {claim.chapter}")
        chapter, anchor, verdict = found[claim.id]
        target = self.env.app.builder.get_relative_uri(self.env.docname, chapter) + anchor
        link = nodes.reference("", verdict.outcome, refuri=target)
        return nodes.paragraph("", "", nodes.strong("", "", link), nodes.Text(f". {verdict.because}"))


def verdicts(root: Path) -> dict[str, tuple[str, str, claims.Verdict]]:
    """Return by claim: the chapter, the anchor of the heading above the cell, and the verdict in the cell's output."""
    found: dict[str, tuple[str, str, claims.Verdict]] = {}
    for path in sorted((root / "chapters").glob("[0-9]*.ipynb")):
        anchor = ""
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                for heading in re.findall(r"^#{2,3} (.+)$", cell.source, re.MULTILINE):
                    anchor = "#" + nodes.make_id(heading)
            for output in cell.get("outputs", []):
                for verdict in claims.found_in(output.get("text", "")):
                    found[verdict.id] = (f"chapters/{path.stem}", anchor, verdict)
    return found


def name_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Write the repository's address, which _config.yml alone holds, where a page says {repository}."""
    source[0] = source[0].replace("{{ repository }}", app.config.html_theme_options["repository_url"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_directive("claims-table", ClaimsTable)
    app.connect("source-read", name_repository)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

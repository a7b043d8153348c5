"""What does a term mean? Its definition is at hand where the text uses it: gradprune.js shows it on hover and focus."""

import html
import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

GLOSSARY = "book/glossary"
LINK = re.compile(r'<a class="reference internal" href="[^"#]*glossary\.html#([^"]+)"')


def definitions(app: Sphinx) -> dict[str, str]:
    """Return the first paragraph of each term's definition as HTML without links, by the term's anchor."""
    if not hasattr(app.env, "gradprune_definitions"):
        found: dict[str, str] = {}
        for item in app.env.get_doctree(GLOSSARY).findall(nodes.definition_list_item):
            paragraph = next(item.findall(nodes.paragraph)).deepcopy()
            for link in list(paragraph.findall(addnodes.pending_xref)):
                cited = link.get("refdomain") == "cite"
                link.parent.replace(link, [] if cited else [nodes.Text(link.astext())])
            shown = app.builder.render_partial(paragraph)["fragment"].strip()
            shown = re.sub(r"\s+([.,;:])", r"\1", shown)  # where a source was named
            found |= {anchor: shown for term in item.findall(nodes.term) for anchor in term["ids"]}
        app.env.gradprune_definitions = found  # type: ignore[attr-defined]
    return app.env.gradprune_definitions  # type: ignore[attr-defined, no-any-return]


def add_definitions(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Put each term's definition on the links to it."""
    if doctree is None or page == GLOSSARY or GLOSSARY not in app.env.all_docs:
        return
    known = definitions(app)

    def with_definition(link: re.Match[str]) -> str:
        found = known.get(link[1])
        return f'{link[0]} data-definition="{html.escape(found)}"' if found else link[0]

    context["body"] = LINK.sub(with_definition, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("html-page-context", add_definitions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

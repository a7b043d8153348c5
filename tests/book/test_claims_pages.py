"""Do the tables of verdicts say what the chapters printed, in few words, with the cells that computed it folded?"""

import re

import pytest
from bs4 import BeautifulSoup
from claims_pages import OUTCOMES, first_number, fold_verdicts, outcome, squares
from docutils import nodes
from docutils.frontend import get_default_settings
from docutils.utils import new_document

from gradprune.lab import claims

SAID = {"holds": "holds", "when": "holds when n is large", "fails": "fails", "shown": "not shown"}
SAID |= {"defined": "as defined", "none": "has no meaning"}


@pytest.mark.parametrize(
    ("because", "line"),
    [
        ("It fell to 0.3. Then it rose.", "It fell to 0.3."),
        ("Wider gaps are meant. There are 0 of 18. So it is not 1.", "Wider gaps are meant. There are 0 of 18."),
        ("By (7.6) it is 0.83, at 80 % 0.9", "By (7.6) it is 0.83, at 80 % 0.9"),
        ("RNN: by size 80 %; GRU: by size 80 %.", "RNN: by size 80 %; GRU: by size 80 %."),
    ],
)
def test_a_line_of_the_table_ends_with_the_first_sentence_that_has_a_number(because: str, line: str) -> None:
    assert first_number(because) == line


def test_every_verdict_that_can_be_said_has_its_own_sign_and_words() -> None:
    claim = next(iter(claims.all_claims().values()))
    for key, said in SAID.items():
        assert outcome(claim, {claim.id: ("page", "#cell", claims.Verdict(claim.id, said, "1"))}) == key
    assert outcome(claim, {}) == "open"
    assert set(OUTCOMES) == {*SAID, "open"}
    assert len({sign for _, sign in OUTCOMES.values()}) == len(OUTCOMES)
    assert [words for words, _ in OUTCOMES.values()][:-1] == [said.replace(" ...", "") for said in claims.OUTCOMES]


def test_the_picture_has_a_square_for_each_claim_and_its_legend_counts_them() -> None:
    rows = list(claims.all_claims().values())
    found = {
        claim.id: ("page", "#cell", claims.Verdict(claim.id, said, "1"))
        for claim, said in zip(rows, SAID.values(), strict=False)
    }
    picture = BeautifulSoup(squares(rows, found), "html.parser")
    assert len(picture.select("a.gp-square")) == len(rows)
    assert picture.select_one("a.gp-square")["aria-label"] == f"{rows[0].id}, holds: {rows[0].says}"
    counts = re.findall(r"\((\d+)\)", picture.figcaption.get_text())
    assert [int(count) for count in counts] == [1] * len(SAID) + [len(rows) - len(SAID)]


def cell(text: str, **attributes: str) -> nodes.container:
    return nodes.container("", nodes.literal_block(text=text), nb_element="cell_code", **attributes)


def test_cells_of_verdicts_are_folded_together_with_those_between_them_and_no_others() -> None:
    document = new_document("page", get_default_settings())
    text, verdict = nodes.paragraph(text="words"), "Verdict on D1-3: holds. 1 of 1"
    others = nodes.section("", cell("1"), nodes.paragraph(text="words"), cell("2"))
    judged = nodes.section("", text, cell("3", hide_mode="all"), cell(verdict, hide_mode="all"), cell(verdict))
    document += [others, judged]
    fold_verdicts(None, document)
    assert not list(others.findall(nodes.raw))
    kinds = [type(child).__name__ for child in judged.children]
    assert kinds == ["paragraph", "raw", "container", "container", "container", "raw"]
    assert judged[1].astext().startswith("<details")
    assert judged[-1].astext() == "</details>"
    assert not any("hide_mode" in child.attributes for child in judged.findall(nodes.container))

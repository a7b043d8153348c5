"""Do the verdicts that a chapter prints come back as they were meant?"""

import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from gradprune.lab import claims

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
one_line = text.map(lambda words: " ".join(words.split()))


def test_there_are_86_claims_each_with_its_own_id_a_kind_a_chapter_and_words_of_its_document():
    rows = claims.all_claims()
    assert len(rows) == 86
    written = (claims.repository() / "book" / "claims.yml").read_text(encoding="utf-8")
    assert re.findall(r"\{id: (D\d+-\d+),", written) == list(rows)  # so no id stands there twice
    for claim in rows.values():
        assert 1 <= claim.chapter <= 10
        assert claim.kind in {"formula", "procedure", "snippet", "effect", "scope", "next"}
        assert claim.says.strip()
        assert 0 <= claim.document <= 4
        assert claim.id.startswith(f"D{claim.document}-")
        assert re.search(r"[\u4e00-\u9fff]", claim.zh), f"{claim.id} quotes no Chinese"
        assert len(claim.zh) <= 32, f"{claim.id} quotes more than a phrase"
        assert re.fullmatch(r"[^\u4e00-\u9fff]+", claim.en), f"{claim.id} is not translated"


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    claim=st.sampled_from(sorted(claims.all_claims())),
    said=st.sampled_from(claims.OUTCOMES),
    when=text.filter(lambda words: words.strip() and ". " not in " ".join(words.split())),
    reason=st.tuples(text, st.integers(-99, 99), text).map(lambda parts: f"{parts[0]}{parts[1]}{parts[2]}"),
)
def test_what_is_printed_comes_back_whatever_the_words(claim, said, when, reason):
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", printed.append)
        say(claim, said, when, reason)
    outcome = said.replace("...", " ".join(when.split()))
    (line,) = printed
    assert all(len(part) <= 80 or " " not in part.strip() for part in line.split("\n"))
    expected = claims.Verdict(claim, outcome, " ".join(reason.split()))
    assert claims.found_in(f"before\n{line}\nafter\n") == [expected]


def say(claim, said, when, because):
    """Bring each outcome about as a chapter would."""
    if said == "as defined":
        claims.as_defined(claim, because=because)
    elif said == "has no meaning":
        claims.no_meaning(claim, because=because)
    else:
        condition = when if said == "holds when ..." else None
        holds, fails = said.startswith("holds"), said == "fails"
        claims.verdict(claim, holds=holds, fails=fails, because=because, when=condition)


def test_a_claim_fails_only_where_it_is_contradicted(capsys):
    for low, high in ((0.01, 0.03), (-0.02, 0.02), (-0.03, -0.01)):
        claims.verdict("D1-3", holds=low > 0, fails=high < 0, because=f"{low} to {high}")
    outcomes = [found.outcome for found in claims.found_in(capsys.readouterr().out)]
    assert outcomes == ["holds", "not shown", "fails"]
    with pytest.raises(ValueError, match="D1-3 cannot both hold and fail"):
        claims.verdict("D1-3", holds=True, fails=True, because="1")


def test_a_reason_with_sentences_and_line_breaks_comes_back_as_one_line(capsys):
    claims.verdict("D1-3", holds=True, when="sigma_w < 1.5", because="It fell to 1e-9. That is\n little.\n")
    claims.verdict("D1-2", holds=False, fails=True, because="0.3 against 0.1.")
    claims.no_meaning("D0-6", because="0 of 3 terms are defined")
    assert claims.found_in(capsys.readouterr().out) == [
        claims.Verdict("D1-3", "holds when sigma_w < 1.5", "It fell to 1e-9. That is little."),
        claims.Verdict("D1-2", "fails", "0.3 against 0.1."),
        claims.Verdict("D0-6", "has no meaning", "0 of 3 terms are defined"),
    ]


def test_a_verdict_without_a_known_claim_a_number_or_a_sound_condition_is_refused(capsys):
    with pytest.raises(ValueError, match=r"unknown claim 'D9-99'; book/claims\.yml has D0-1, D0-2"):
        claims.verdict("D9-99", holds=True, because="1")
    with pytest.raises(ValueError, match="the verdict on D1-3 needs a number that supports it"):
        claims.verdict("D1-3", holds=True, because="it is so")
    for say_so in (claims.as_defined, claims.no_meaning):
        with pytest.raises(ValueError, match="the verdict on D1-3 needs a number that supports it"):
            say_so("D1-3", because="it is so")
    for when in ("", "  \n", "this. And that"):
        with pytest.raises(ValueError, match="one phrase that follows 'holds when'"):
            claims.verdict("D1-3", holds=True, because="1", when=when)
    for fails in (False, True):
        with pytest.raises(ValueError, match="D1-3 is not that it holds"):
            claims.verdict("D1-3", holds=False, fails=fails, because="1", when="n is large")
    assert capsys.readouterr().out == ""


def test_text_without_a_verdict_has_none():
    assert claims.found_in("") == []
    assert claims.found_in("Verdict on D1-3: perhaps. 1\n  Verdict on D1-3: holds. 1\nVerdict on D1: fails. 2") == []

"""What do the documents state, and does it hold?"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from functools import cache

import yaml

from gradprune.lab.setup import repository

_INDENT = "    "  # of the lines after a verdict's first
OUTCOMES = ("holds", "holds when ...", "fails", "not shown", "as defined", "has no meaning")
_SAID = "|".join(re.escape(outcome).replace(re.escape("..."), ".+?") for outcome in OUTCOMES)
_LINE = re.compile(rf"^Verdict on (D\d+-\d+): ({_SAID})\. (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Claim:
    """One statement of one document that can be shown true, false or meaningless.

    `says` has it in our words; `zh` quotes a few words of the document, which `en` translates.
    """

    id: str
    kind: str
    chapter: int
    says: str
    zh: str
    en: str

    @property
    def document(self) -> int:
        """The number of the document, 0 to 4."""
        return int(self.id[1 : self.id.index("-")])


@dataclass(frozen=True)
class Verdict:
    """What a chapter found about one claim: `outcome` is one of OUTCOMES, with its condition after "holds when"."""

    id: str
    outcome: str
    because: str


@cache
def all_claims() -> dict[str, Claim]:
    """Return the statements of `book/claims.yml` by id, in the file's order."""
    rows = yaml.safe_load((repository() / "book" / "claims.yml").read_text(encoding="utf-8"))
    return {row["id"]: Claim(**row) for row in rows}


def verdict(claim: str, *, holds: bool, because: str, fails: bool = False, when: str | None = None) -> None:
    """Print the verdict on `claim` as one sentence and its reason, which the book collects.

    "holds" where `holds` is true, "fails" where `fails` is, "not shown" where neither is. Both are conditions on what
    the page computed, such as ``holds=low > 0, fails=high < 0`` with the interval of a paired difference: that a claim
    was not seen to hold does not contradict it.

    Args:
        claim: The claim's id in `book/claims.yml`.
        holds: Whether the numbers show it.
        because: The numbers, in a sentence or more; line breaks become spaces.
        fails: Whether the numbers contradict it, beyond their interval.
        when: Under which circumstances it holds, where it holds only under some: "holds when ...".

    Raises:
        ValueError: For an unknown id; where both `holds` and `fails` are true; for a reason without a number in it; for
            a `when` that is empty, more than one sentence, or beside a verdict other than that the claim holds.
    """
    if holds and fails:
        raise ValueError(f"{claim} cannot both hold and fail: the two conditions contradict each other")
    if when is not None:
        when = " ".join(when.split())
        if not when or ". " in when:
            raise ValueError(f"`when` is one phrase that follows 'holds when', not {when!r}")
        if not holds:
            raise ValueError(f"the verdict on {claim} is not that it holds, so there is no `when` of it")
    shown = f"holds when {when}" if when else "holds"
    _print(claim, shown if holds else "fails" if fails else "not shown", because)


def as_defined(claim: str, *, because: str) -> None:
    """Print that `claim` defines something, so that nothing was there to be shown, and what the definition gives.

    Args:
        claim: The claim's id in `book/claims.yml`.
        because: What the definition gives, with a number that the page computed.

    Raises:
        ValueError: For an unknown id, and for a reason without a number in it.
    """
    _print(claim, "as defined", because)


def no_meaning(claim: str, *, because: str) -> None:
    """Print that `claim` says nothing that a measurement could show or contradict, and why.

    Args:
        claim: The claim's id in `book/claims.yml`.
        because: What there is instead, with a number that the page computed.

    Raises:
        ValueError: For an unknown id, and for a reason without a number in it.
    """
    _print(claim, "has no meaning", because)


def _print(claim: str, outcome: str, because: str) -> None:
    if claim not in all_claims():
        raise ValueError(f"unknown claim {claim!r}; book/claims.yml has {', '.join(list(all_claims())[:3])} and so on")
    if not re.search(r"\d", because):
        raise ValueError(f"the verdict on {claim} needs a number that supports it, computed on the page")
    line = f"Verdict on {claim}: {outcome}. {' '.join(because.split())}"
    print(textwrap.fill(line, 80, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False))


def found_in(text: str) -> list[Verdict]:
    """Return the verdicts in the output of a cell."""
    return [Verdict(*match) for match in _LINE.findall(text.replace("\n" + _INDENT, " "))]

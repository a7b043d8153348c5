"""What do the documents state, and does it hold?"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from functools import cache

import yaml

from gradprune.lab.setup import repository

_INDENT = "    "  # of the lines after a verdict's first
_LINE = re.compile(r"^Verdict on (D\d+-\d+): (holds when .+?|holds|fails|has no meaning)\. (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Claim:
    """One statement of one document that can be shown true, false or meaningless."""

    id: str
    kind: str
    chapter: int
    says: str

    @property
    def document(self) -> int:
        """The number of the document, 0 to 4."""
        return int(self.id[1 : self.id.index("-")])


@dataclass(frozen=True)
class Verdict:
    """What a chapter found about one claim: `outcome` is "holds", "holds when ...", "fails" or "has no meaning"."""

    id: str
    outcome: str
    because: str


@cache
def all_claims() -> dict[str, Claim]:
    """Return the statements of `book/claims.yml` by id, in the file's order."""
    rows = yaml.safe_load((repository() / "book" / "claims.yml").read_text(encoding="utf-8"))
    return {row["id"]: Claim(row["id"], row["kind"], row["chapter"], row["says"]) for row in rows}


def verdict(claim: str, *, holds: bool | None, because: str, when: str | None = None) -> None:
    """Print the verdict on `claim` as one sentence and its reason, which the claims page collects.

    `holds` is a condition computed on the page, or None for a statement without a meaning that could be tested; `when`
    says under which circumstances it holds, where it holds only under some; `because` gives the numbers it follows
    from. Line breaks in either become spaces.

    Raises ValueError for an id that is not in `book/claims.yml`, for a reason without a number in it, for a `when` that
    is empty or more than one sentence, and for a `when` beside a verdict other than "holds".
    """
    if claim not in all_claims():
        raise ValueError(f"unknown claim {claim!r}; book/claims.yml has {', '.join(list(all_claims())[:3])} and so on")
    if not re.search(r"\d", because):
        raise ValueError(f"the verdict on {claim} needs a number that supports it, computed on the page")
    because = " ".join(because.split())
    if when is not None:
        when = " ".join(when.split())
        if not when or ". " in when:
            raise ValueError(f"`when` is one phrase that follows 'holds when', not {when!r}")
        if not holds:
            raise ValueError(f"the verdict on {claim} is not that it holds, so there is no `when` of it")
    if holds is None:
        outcome = "has no meaning"
    elif holds:
        outcome = f"holds when {when}" if when else "holds"
    else:
        outcome = "fails"
    line = f"Verdict on {claim}: {outcome}. {because}"
    print(textwrap.fill(line, 80, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False))


def found_in(text: str) -> list[Verdict]:
    """Return the verdicts in the output of a cell."""
    return [Verdict(*match) for match in _LINE.findall(text.replace("\n" + _INDENT, " "))]

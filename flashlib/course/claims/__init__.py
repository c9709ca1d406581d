"""Claims and their verdicts: of the documents that this course started from, and the figures in our own README and chapters.

    from flashlib.course.claims import documents
    documents.CLAIMS[10].check()

A verdict is not written beside a claim and left there: :meth:`Claim.check` gathers the evidence anew, by running, counting or reading a record,
and derives the verdict from it. A figure in prose is a :class:`Statement`: its text is made from the record, and has to be what stands there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flashlib.measure.records.record import load_record
from flashlib.measure.records.tables import Table, table

__all__ = [
    "PARTLY",
    "RIGHT",
    "VERDICTS",
    "WRONG",
    "Checked",
    "Claim",
    "Evidence",
    "Statement",
    "missing",
    "plain",
    "uncovered",
]

REPOSITORY = Path(__file__).resolve().parents[3]
RIGHT, PARTLY, WRONG = VERDICTS = ("right", "partly right", "wrong")


@dataclass(frozen=True)
class Evidence:
    """What was found.

    Attributes:
        verdict: of :data:`VERDICTS`, as it follows from the figures.
        figures: by name.
        records: that were read, by name; none if all of it was run or counted.
        runs: what was run or counted, in words.
    """

    verdict: str
    figures: Mapping[str, float | int | str]
    records: tuple[str, ...] = ()
    runs: str = ""

    @property
    def origin(self) -> str:
        """Where the figures come from, with the digest of the code that a record measured."""
        told = [self.runs] * bool(self.runs)
        for name in self.records:
            record = load_record(name)
            told.append(f"{name}: {record.label}, code {record.sources_hash[:12]}")
        return "; ".join(told)


@dataclass(frozen=True)
class Claim:
    """A claim of somebody's.

    Attributes:
        number: in the list. document: where it stands. says: the claim, in our words.
        verdict: ours. corrected: what holds, with the evidence's figures by name. refuted: what would overturn the verdict.
        gather: finds the evidence.
    """

    number: int
    document: str
    says: str
    verdict: str
    corrected: str
    refuted: str
    gather: Callable[[], Evidence]

    def check(self) -> Checked:
        """Gather the evidence now."""
        return Checked(self, self.gather())


@dataclass(frozen=True)
class Checked:
    """A claim and its evidence. Print it, or end a notebook cell with it."""

    claim: Claim
    evidence: Evidence

    @property
    def stands(self) -> bool:
        """Whether the verdict that we state follows from the evidence."""
        return self.evidence.verdict == self.claim.verdict

    @property
    def corrected(self) -> str:
        return self.claim.corrected.format(**self.evidence.figures)

    def table(self) -> Table:
        verdict = (
            self.claim.verdict
            if self.stands
            else f"{self.claim.verdict}, but the evidence says {self.evidence.verdict}"
        )
        rows = [
            ("claim", f"{self.claim.says} ({self.claim.document})"),
            ("verdict", verdict),
            ("what holds", self.corrected),
            ("evidence", self.evidence.origin),
            ("would be refuted by", self.claim.refuted),
        ]
        return table(rows, [f"claim {self.claim.number}", ""])

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@dataclass(frozen=True)
class Statement:
    """A stretch of prose that holds figures.

    Attributes:
        where: the document, from the root of the repository.
        text: of the prose, with figures by name as :meth:`str.format` takes them.
        gather: the figures, from records, constants or counting.
        origin: where they come from. refuted: what would make the statement wrong.
    """

    where: str
    text: str
    gather: Callable[[], Mapping[str, float | int | str]]
    origin: str
    refuted: str = "a new record of the same cells"

    def rendered(self) -> str:
        """The prose as the figures have it."""
        return " ".join(self.text.format(**self.gather()).split())


def plain(text: str) -> str:
    """A document with its line breaks as blanks."""
    return " ".join(text.split())


def missing(statements: Iterable[Statement], text: str) -> list[str]:
    """What should stand in a document by the records, and does not."""
    text = plain(text)
    return [rendered for rendered in (statement.rendered() for statement in statements) if rendered not in text]


# A number with a unit that somebody must have measured or counted.
_UNITS = r"TFLOP/s|GFLOP/s|GFLOP|GB/s|ms|µs|us|MB|GB|KiB|MiB|GiB|TiB|%|percent|times as fast|trillion"
_FIGURE = re.compile(rf"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?:\s*(?:{_UNITS})(?!\w))")
_NUMBER = re.compile(r"(?<![\w.,§-])\d[\d,]*(?:\.\d+)?k?(?![\w-])")


def uncovered(statements: Iterable[Statement], text: str, *, every_number: bool = False) -> list[str]:
    """Figures of a document that no statement covers, with some of what stands around them.

    Args:
        every_number: all numbers, and not only those with a unit.
    """
    text, spans = plain(text), []
    for rendered in (statement.rendered() for statement in statements):
        spans += [found.span() for found in re.finditer(re.escape(rendered), text)]
    found = (_NUMBER if every_number else _FIGURE).finditer(text)
    alone = [m for m in found if not any(start <= m.start() and m.end() <= stop for start, stop in spans)]
    return [text[max(0, m.start() - 40) : m.end() + 20] for m in alone]

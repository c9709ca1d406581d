"""Each cell of the tables in docs/everyday.md: what they say is what happens."""

import pytest
from everyday.table import BEGIN, END, PAGE, record, tables, tried

from flashlib.backends import BACKENDS


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [*tried(interpreted=False), *tried(interpreted=True)]


def test_every_way_works_or_is_refused_in_our_words(rows):
    failed = [f"{row['subject']}, {row['way']}: {row['message']}" for row in rows if row["outcome"] == "FAILS"]
    assert not failed, "\n".join(failed)
    assert {row["outcome"] for row in rows} == {"works", "refuses"}


def test_what_was_recorded_on_a_gpu_did_not_fail():
    recorded = record()
    assert recorded is not None
    assert not [row for row in recorded.rows if row["outcome"] == "FAILS"]


def test_the_page_says_what_happens(rows):
    """`python tests/everyday/table.py --write` writes it anew; a record that is no longer of this code says so in its caption."""
    for backend in ("cpu", "triton"):
        if backend not in {row["subject"] for row in rows}:
            pytest.skip(
                f"the page has a column for {backend}, which this machine cannot run: {BACKENDS[backend].missing()}"
            )
    written = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()
    assert written == tables(rows, record())

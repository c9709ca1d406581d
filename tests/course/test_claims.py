"""Verdicts follow from evidence that is gathered anew, and no measured figure stands in prose without where it comes from."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flashlib.course import claims
from flashlib.course.claims import (
    VERDICTS,
    Evidence,
    Statement,
    chapters,
    documents,
    losses,
    missing,
    plain,
    readme,
    uncovered,
)
from flashlib.course.weights import GGUF_BYTES, fetch_weights
from flashlib.measure.records import record as records

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", list(documents.CLAIMS))
def test_a_verdict_follows_from_its_evidence(number: int) -> None:
    checked = documents.CLAIMS[number].check()
    assert checked.stands, checked
    assert checked.evidence.records or checked.evidence.runs
    # What holds is told with figures of the evidence, all of them found and none left open.
    assert "{" not in checked.corrected and re.search(r"\d|rtx", checked.corrected)
    assert set(re.findall(r"\{(\w+)", checked.claim.corrected)) <= set(checked.evidence.figures)
    told = str(checked)
    assert "would be refuted by" in told and checked.claim.refuted
    for name in checked.evidence.records:
        assert records.load_record(name).sources_hash[:12] in told


def test_all_sixteen_claims_have_a_verdict() -> None:
    assert list(documents.CLAIMS) == list(range(1, 17))
    assert {claim.verdict for claim in documents.CLAIMS.values()} <= set(VERDICTS)
    assert {claim.document for claim in documents.CLAIMS.values()} == {"000", "001", "002", "003", "004"}


def _turned(name: str, change, folder: Path, monkeypatch) -> None:
    """The same records but for one, of which some figures are others."""
    for path in records.BENCHMARKS.rglob("*.json"):
        target = folder / path.relative_to(records.BENCHMARKS)
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(path.read_bytes())
    path = folder / f"{name}.json"
    told = json.loads(path.read_text())
    for row in told["rows"]:
        change(row)
    path.write_text(json.dumps(told))
    for module in (claims, documents, readme, chapters, losses):
        monkeypatch.setattr(module, "load_record", lambda wanted: records.load_record(wanted, folder))


@pytest.mark.parametrize(
    ("number", "name", "change"),
    [
        (3, "cpu/protocol", lambda row: row.update(processors=1.0, tokens_per_s=1e3)),
        (4, "cpu/cpu_forward_avx2", lambda row: row.update(ms=9 * row["ms"] if row["ms"] else None)),
        (
            5,
            "h200/attention_traffic",
            lambda row: row.update(ms=row["ms"] * (20 if row["method"] == "standard" else 1)),
        ),
        (12, "h200/decode_determinism", lambda row: row.update(differ=[7])),
        (13, "h200/chunked_injection", lambda row: row.update(peak_bytes=1e9)),
        (14, "h200/training_backward", lambda row: row.update(ms=0.001 if row["peer"] == "triton" else row["ms"])),
        (15, "h200/attention_traffic", lambda row: row.update(l2_read=row["dram_read"])),
    ],
)
def test_other_records_give_other_verdicts(number, name, change, tmp_path, monkeypatch) -> None:
    _turned(name, change, tmp_path, monkeypatch)
    assert not documents.CLAIMS[number].check().stands


def test_a_verdict_that_does_not_follow_says_so() -> None:
    claim = documents.CLAIMS[7]
    other = replace(claim, gather=lambda: Evidence("right", claim.gather().figures, runs="counted")).check()
    assert not other.stands and "but the evidence says right" in str(other)


# Prose


def test_readme_says_what_the_records_say() -> None:
    assert missing(readme.STATEMENTS, README) == []
    paragraphs = readme.measured_paragraphs(README)
    assert len(paragraphs) == len(readme.MEASURED)
    for paragraph in paragraphs:
        assert uncovered(readme.STATEMENTS, paragraph, every_number=True) == []
    assert uncovered(readme.STATEMENTS, README) == []


@pytest.mark.parametrize("name", chapters.NOTEBOOKS)
def test_chapters_say_what_records_and_cells_say(name: str) -> None:
    inside = [statement for statement in chapters.STATEMENTS if statement.where == f"notebooks/{name}"]
    assert missing(inside, chapters.prose(name)) == []
    assert uncovered(inside, chapters.prose(name)) == []


@pytest.mark.parametrize("name", chapters.NOTEBOOKS)
def test_no_number_in_a_chapter_stands_bare(name: str) -> None:
    """It comes from a statement, is a setting of the chapter's own code, or is excused with a reason."""
    assert chapters.bare(name) == []


def test_a_bare_number_is_noticed_and_no_excuse_is_left_over() -> None:
    for added in ("We found 777 of them.", "It took 3,141 tries.", "The factor was 2.718281."):
        assert (
            len(
                chapters.bare(
                    "03_tiling.ipynb", chapters.prose("03_tiling.ipynb").split("## Sources")[0] + f"\n\n{added}"
                )
            )
            == 1
        )
    for name in chapters.NOTEBOOKS:
        text = plain(chapters.prose(name))
        for words, reason in chapters.EXCUSED.get(name[:2], {}).items():
            assert words in text and reason.strip(), words


def _prose_of(where: str) -> str:
    return README if where == "README.md" else chapters.prose(where.removeprefix("notebooks/"))


@pytest.mark.parametrize(
    "statement", [*readme.STATEMENTS, *chapters.STATEMENTS], ids=lambda statement: statement.text[:40]
)
def test_another_number_is_noticed(statement: Statement, rng: random.Random) -> None:
    """Each digit that a figure of a statement puts into prose, and another one in its place."""
    text, rendered = plain(_prose_of(statement.where)), statement.rendered()
    assert rendered in text and statement.origin and statement.refuted
    figures = [found.span() for found in re.finditer(r"\d", rendered)]
    for at, _ in rng.sample(figures, min(6, len(figures))):
        other = rng.choice([digit for digit in "0123456789" if digit != rendered[at]])
        changed = text.replace(rendered, rendered[:at] + other + rendered[at + 1 :])
        assert missing([statement], changed) == [rendered]


def test_a_new_figure_without_a_record_is_noticed() -> None:
    for added in ("Our kernel reaches 700 TFLOP/s.", "It saves 42% of the memory.", "A step takes 3.1 ms."):
        for where in ("README.md", "notebooks/03_tiling.ipynb"):
            inside = [one for one in (*readme.STATEMENTS, *chapters.STATEMENTS) if one.where == where]
            assert len(uncovered(inside, f"{_prose_of(where)}\n\n{added}")) == 1
    paragraph = readme.measured_paragraphs(README)[0] + " On another day it was 1.3."
    assert len(uncovered(readme.STATEMENTS, paragraph, every_number=True)) == 1


def test_a_new_record_changes_what_readme_should_say(tmp_path, monkeypatch) -> None:
    """Of a record that is taken again, README must follow: as it stands it would be missing the new figures."""
    _turned("h200/training_forward", lambda row: row.update(ms=1.2 * row["ms"] if row["peer"] == "triton" else row["ms"]), tmp_path, monkeypatch)  # fmt: skip
    gone = missing(readme.STATEMENTS, README)
    assert len(gone) == 2 and all("cuDNN" in text for text in gone)


def test_the_weights_have_the_size_that_is_told() -> None:
    weights = fetch_weights()
    assert weights.is_dir() or weights.stat().st_size == GGUF_BYTES  # a folder from the hub has other files


# Losses


def test_every_lost_cell_is_told(rng) -> None:
    for name, ours in losses.RACES.items():
        rows = [row for row in records.load_record(name).rows if row["ms"]]
        lost = {label for label, _, _ in losses.lost_cells(name)}
        for row in rows:
            if row["peer"] in ours or row["peer"].startswith("flashlib"):
                continue
            label = losses.case_of(row).label
            best = min(one["ms"] for one in rows if one["peer"] in ours and losses.case_of(one).label == label)
            if row["ms"] < best:
                assert label in lost, (name, label)
    told = str(losses.losses())
    assert "20 of 20" in told and "torch_sdpa_cudnn" in told
    assert "injection in chunks" in str(losses.prices())

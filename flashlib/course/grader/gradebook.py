"""What an instructor gets of a class: a table, and for each student a page of feedback and a results.json."""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flashlib.course.grader.classroom import Graded
from flashlib.course.grader.engine import GRADER_ERROR, UNUSABLE
from flashlib.course.grader.exercise import Exercise
from flashlib.course.grader.policy import Mark, Policy
from flashlib.course.grader.report import Report, as_gradescope, as_page, template
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.course.grader.scan import suspicious
from flashlib.course.grader.similarity import alike
from flashlib.course.grader.text import cell, shown_path

NAME_BYTES = 120  # of a folder of feedback; file systems allow 255
# Nothing of these is a verdict on the student's code: somebody has to look.
TO_BE_LOOKED_AT = {
    GRADER_ERROR: "the grader failed",
    UNUSABLE: "a check met an answer that it was not made for",
    "tampered": "it wrote on the grader's channel",
    "several-files": "which file counts?",
    "not-a-file": "cannot be read",
}


def status_of(report: Report) -> str:
    """`"full marks"`, `"partial"`, `"nothing right"`, `"not handed in"`, `"not begun"` or `"to be looked at"`."""
    if any(diagnosis in TO_BE_LOOKED_AT for diagnosis in report.diagnoses):
        return "to be looked at"
    if report.diagnoses == ("missing-file",):
        return "not handed in"
    if set(report.diagnoses) == {"not-implemented"} and not report.earned:
        return "not begun"
    return "full marks" if report.passed else "partial" if report.earned else "nothing right"


def write_results(
    graded: Sequence[Graded],
    exercises: Sequence[Exercise],
    table: Path,
    feedback: Path,
    policy: Policy | None = None,
) -> list[str]:
    """A CSV with a row for each student, a report on the class; and for each a folder with `feedback.html` and `results.json`.

    Args:
        policy: weights, deadlines and overrides; none by default.

    Returns:
        What could not be written, and why: a page that fails takes no other with it.
    """
    policy = policy or Policy()
    folders = folder_names([one.student for one in graded])
    write_table(graded, exercises, table, folders, policy)
    failed = []
    try:
        table.with_name(f"{table.stem}_report.html").write_text(
            class_report(graded, exercises, policy), encoding="utf-8"
        )
    except Exception as error:  # of whatever kind: the pages are still to be written
        failed.append(f"the report on the class: {type(error).__name__}: {error}")
    for one, name in zip(graded, folders, strict=True):
        try:
            folder = feedback / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "feedback.html").write_text(as_page(one.student, one.reports), encoding="utf-8")
            (folder / "results.json").write_text(json.dumps(as_gradescope(one.reports), indent=2), encoding="utf-8")
        except Exception as error:  # of whatever kind: the others are still to be written
            failed.append(f"the feedback for {one.student}: {type(error).__name__}: {error}")
    return failed


def marks_of(one: Graded, policy: Policy) -> list[Mark]:
    """What each exercise counts for a student, in the order of the exercises."""
    return [policy.mark(one.student, one.who.submissions[report.exercise], report) for report in one.reports]


def write_table(
    graded: Sequence[Graded], exercises: Sequence[Exercise], table: Path, folders: Sequence[str], policy: Policy
) -> None:
    """The table of grades, with a byte order mark, by which spreadsheets know UTF-8, and every text made harmless to them."""
    checks = [(at, prop) for at, exercise in enumerate(exercises) for prop in exercise.properties]
    listed = list(dict.fromkeys(heading for one in graded for heading in one.who.listed))
    headings = ["number", "student", *(exercise.name for exercise in exercises), "total", "points", "diagnoses"]
    headings += ["percent", "unverified points"]
    headings += [f"{exercise.name} {what}" for exercise in exercises for what in ("counts", "status", "seconds")]
    headings += [f"{exercises[at].name}: {prop.name} ({prop.points})" for at, prop in checks]
    headings += ["late", "notes", "handed in as", "feedback", *(f"roster: {heading}" for heading in listed)]
    partial = table.with_name(f"{table.name}.partial")
    with partial.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow([cell(heading) for heading in headings])
        for number, (one, folder) in enumerate(zip(graded, folders, strict=True), start=1):
            row = [number, one.student, *(report.earned for report in one.reports), one.earned, one.points]
            row.append(" ".join(one.diagnoses))
            marks = marks_of(one, policy)
            row += [round(policy.percent(marks, one.reports), 2), sum(report.unverified for report in one.reports)]
            for mark, report in zip(marks, one.reports, strict=True):
                row += [round(mark.points, 2), status_of(report), round(report.seconds, 2)]
            earned = [{result.name: result.earned for result in report.results} for report in one.reports]
            row += [earned[at].get(prop.name, "") for at, prop in checks]
            late = [name for name, submission in one.who.submissions.items() if submission.late]
            row += [" ".join(late), "; ".join(notes_on(one, policy)), shown_path(one.who.key.lstrip("\0")), folder]
            row += [one.who.listed.get(heading, "") for heading in listed]
            writer.writerow([cell(value) for value in row])
    partial.replace(table)  # so that the table is never half written


def notes_on(one: Graded, policy: Policy) -> list[str]:
    """What the instructor should know of a student's submissions, and what he should look at himself."""
    notes = list(one.who.notes)
    for mark, report in zip(marks_of(one, policy), one.reports, strict=True):
        notes += [f"{report.exercise}: {mark.note}"] if mark.note else []
        found = suspicious(one.who.submissions[report.exercise].source or b"") if report.unverified else []
        if found:
            what = f"{report.unverified} points rest on its own word, and its source has {', '.join(found[:6])}"
            notes.append(f"{report.exercise}: {what}{' and more' if len(found) > 6 else ''}")
        if report.note:
            notes.append(f"{report.exercise}: {report.note}")
        notes += [
            f"{report.exercise}: look at it: {TO_BE_LOOKED_AT[diagnosis]}"
            for diagnosis in report.diagnoses
            if diagnosis in TO_BE_LOOKED_AT
        ]
    return list(dict.fromkeys(notes))


def class_report(graded: Sequence[Graded], exercises: Sequence[Exercise], policy: Policy) -> str:
    """A page on the class, which loads nothing and runs nothing: scores, which checks fail, which mistakes, who is alike."""
    percents = [policy.percent(marks_of(one, policy), one.reports) for one in graded]
    bins = [sum(low <= p < low + 10 or (low == 90 and p >= 100) for p in percents) for low in range(0, 100, 10)]
    parts = []
    for at, exercise in enumerate(exercises):
        reports = [one.reports[at] for one in graded]
        handed_in = [report for report in reports if status_of(report) not in ("not handed in", "not begun")]
        failures = Counter(result.name for report in handed_in for result in report.results if not result.passed)
        mistakes = Counter(diagnosis for report in handed_in for diagnosis in report.diagnoses)
        sources = {one.student: one.who.submissions[exercise.name].source or b"" for one in graded}
        stub = REPOSITORY / "exercises" / exercise.file
        parts.append(
            {
                "exercise": exercise,
                "statuses": Counter(map(status_of, reports)).most_common(),
                "count": len(handed_in),
                "checks": [(prop.title, failures[prop.name]) for prop in exercise.properties],
                "mistakes": mistakes.most_common(15),
                "alike": alike(sources, stub.read_bytes() if stub.exists() else b"")[:30],
            }
        )
    looked_at = [(one.student, notes) for one in graded if (notes := notes_on(one, policy))]
    mean = sum(percents) / len(percents) if percents else 0.0
    median = statistics.median(percents) if percents else 0.0
    return template("class.html").render(
        bins=bins, most=max([*bins, 1]), students=len(graded), mean=mean, median=median, parts=parts, notes=looked_at
    )


def folder_names(students: Sequence[str]) -> list[str]:
    """A name for each one's folder, on whatever file system: no two the same, not even where case does not count."""
    taken: set[str] = set()
    names = []
    for student in students:
        plain = re.sub(r"[^\w-]+", "_", student).encode()[:NAME_BYTES].decode(errors="ignore") or "_"
        name, number = plain, 1
        while name.casefold() in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names

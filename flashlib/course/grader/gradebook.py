"""What an instructor gets of a class: a table, and for each student a page of feedback and a results.json."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path

from flashlib.course.grader.classroom import Graded
from flashlib.course.grader.engine import GRADER_ERROR, UNUSABLE
from flashlib.course.grader.exercise import Exercise
from flashlib.course.grader.render import as_gradescope, as_page
from flashlib.course.grader.report import Report
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


def write_results(graded: Sequence[Graded], exercises: Sequence[Exercise], table: Path, feedback: Path) -> list[str]:
    """A CSV with a row for each student; and for each a folder with `feedback.html` and `results.json`.

    Returns:
        What could not be written, and why: a page that fails takes no other with it.
    """
    folders = folder_names([one.student for one in graded])
    write_table(graded, exercises, table, folders)
    failed = []
    for one, name in zip(graded, folders, strict=True):
        try:
            folder = feedback / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "feedback.html").write_text(as_page(one.student, one.reports), encoding="utf-8")
            (folder / "results.json").write_text(json.dumps(as_gradescope(one.reports), indent=2), encoding="utf-8")
        except Exception as error:  # of whatever kind: the others are still to be written
            failed.append(f"the feedback for {one.student}: {type(error).__name__}: {error}")
    return failed


def write_table(graded: Sequence[Graded], exercises: Sequence[Exercise], table: Path, folders: Sequence[str]) -> None:
    """The table of grades, with a byte order mark, by which spreadsheets know UTF-8, and every text made harmless to them."""
    checks = [(at, prop) for at, exercise in enumerate(exercises) for prop in exercise.properties]
    listed = list(dict.fromkeys(heading for one in graded for heading in one.who.listed))
    headings = ["number", "student", *(exercise.name for exercise in exercises), "total", "points", "diagnoses"]
    headings += [f"{exercise.name} {what}" for exercise in exercises for what in ("status", "seconds")]
    headings += [f"{exercises[at].name}: {prop.name} ({prop.points})" for at, prop in checks]
    headings += ["late", "notes", "handed in as", "feedback", *(f"roster: {heading}" for heading in listed)]
    partial = table.with_name(f"{table.name}.partial")
    with partial.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow([cell(heading) for heading in headings])
        for number, (one, folder) in enumerate(zip(graded, folders, strict=True), start=1):
            row = [number, one.student, *(report.earned for report in one.reports), one.earned, one.points]
            row.append(" ".join(one.diagnoses))
            for report in one.reports:
                row += [status_of(report), round(report.seconds, 2)]
            earned = [{result.name: result.earned for result in report.results} for report in one.reports]
            row += [earned[at].get(prop.name, "") for at, prop in checks]
            late = [name for name, submission in one.who.submissions.items() if submission.late]
            row += [" ".join(late), "; ".join(notes_on(one)), shown_path(one.who.key.lstrip("\0")), folder]
            row += [one.who.listed.get(heading, "") for heading in listed]
            writer.writerow([cell(value) for value in row])
    partial.replace(table)  # so that the table is never half written


def notes_on(one: Graded) -> list[str]:
    """What the instructor should know of a student's submissions, and what he should look at himself."""
    notes = list(one.who.notes)
    for report in one.reports:
        if report.note:
            notes.append(f"{report.exercise}: {report.note}")
        notes += [
            f"{report.exercise}: look at it: {TO_BE_LOOKED_AT[diagnosis]}"
            for diagnosis in report.diagnoses
            if diagnosis in TO_BE_LOOKED_AT
        ]
    return list(dict.fromkeys(notes))


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

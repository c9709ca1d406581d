"""Find and read what students handed in, before any of their code runs."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flashlib.course.grader.engine import SOURCE_LIMIT, Submission
from flashlib.course.grader.exercise import Exercise
from flashlib.course.grader.report import Finding
from flashlib.course.grader.sandbox.session import clean

DEPTH = 3  # folders below a student's own that are searched


@dataclass(frozen=True)
class Student:
    """All that one student handed in: a submission for each exercise, missing ones included."""

    name: str
    submissions: dict[str, Submission]


def read_submission(student: str, file: Path) -> Submission:
    """Read one file: regular, no link, UTF-8, not larger than `SOURCE_LIMIT`; else the submission says what is wrong.

    Raises:
        ValueError: there is no such file.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {file}") from error
    except OSError as error:
        what = "is a symbolic link, which is not followed" if file.is_symlink() else f"cannot be read: {error.strerror}"
        return _unreadable(student, "not-a-file", f"{clean(file.name)} {what}.")
    with os.fdopen(fd, "rb") as stream:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return _unreadable(student, "not-a-file", f"{clean(file.name)} is not a regular file.")
        source = stream.read(SOURCE_LIMIT + 1)
    if len(source) > SOURCE_LIMIT:
        return _unreadable(student, "file-too-large", f"{clean(file.name)} has more than {SOURCE_LIMIT // 1024} KiB.")
    try:
        source.decode("utf-8")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        return _unreadable(
            student, "not-utf8", f"{clean(file.name)} is not UTF-8 text (line {line}). Save it as UTF-8."
        )
    return Submission(student, source)


def read_folder(directory: Path, exercises: Sequence[Exercise]) -> list[Student]:
    """All submissions under `directory`, sorted by student.

    One folder for each student, named after him, with his files in it; or files next to each other whose names begin
    with the student's, as in `ada_ex01_softmax.py`; or both.

    Raises:
        ValueError: `directory` is no directory, or holds no submission.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    files: dict[str, list[Path]] = {}
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not entry.name.endswith(".py"):
            files[entry.name] = [entry]
        elif entry.is_dir():
            files.setdefault(entry.name, []).extend(_python_files(entry, DEPTH))
        elif found := re.fullmatch(r"(.*?)[_\-. ]*(ex\d\d\b|ex\d\d_).*\.py", entry.name):
            files.setdefault(found[1] or directory.resolve().name, []).append(entry)
    if not files:
        raise ValueError(f"{directory} holds no folder and no file of an exercise")
    return [
        Student(clean(name), {exercise.name: _pick(clean(name), found, exercise) for exercise in exercises})
        for name, found in sorted(files.items())
    ]


def _python_files(directory: Path, depth: int) -> Iterator[Path]:
    for entry in sorted(directory.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if depth and not entry.name.startswith((".", "__")):
                yield from _python_files(entry, depth - 1)
        elif entry.name.endswith(".py") or entry.is_symlink():
            yield entry


def _pick(student: str, files: list[Path], exercise: Exercise) -> Submission:
    if len(files) == 1 and files[0].is_symlink() and files[0].suffix != ".py":
        return _unreadable(student, "not-a-file", "The folder is a symbolic link, which is not followed.")
    matching = [file for file in files if re.search(rf"(^|[_\-. ]){exercise.name}(_|\b)", file.name)]
    exact = [file for file in matching if file.name == exercise.file]
    matching = exact or matching
    if not matching:
        return _unreadable(student, "missing-file", f"There is no {exercise.file} in what you handed in.")
    if len(matching) > 1:
        names = ", ".join(clean(file.name) for file in matching[:4])
        return _unreadable(
            student, "several-files", f"There are several files for {exercise.name} ({names}). Keep one."
        )
    return read_submission(student, matching[0])


def _unreadable(student: str, diagnosis: str, says: str) -> Submission:
    return Submission(student, None, Finding(diagnosis, says))

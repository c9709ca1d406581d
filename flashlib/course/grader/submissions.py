"""Find and read what students handed in, before any of their code runs: folders, loose files, zip and tar archives.

Who handed in what is settled here, once. What somebody handed in is known by its exact path, never by a name made fit for
people: two names may look alike and belong to two students. Whatever is not taken is said, with the reason.
"""

from __future__ import annotations

import ast
import io
import os
import re
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from flashlib.course.grader.engine import SOURCE_LIMIT, Submission
from flashlib.course.grader.exercise import Exercise
from flashlib.course.grader.findings import Finding
from flashlib.course.grader.roster import Roster
from flashlib.course.grader.text import shown_path

DEPTH = 12  # folders below a student's own that are searched
ENTRIES = 2_000  # files and folders of one student that are looked at
ARCHIVE_BYTES = 64 << 20  # of an archive, packed as unpacked
ARCHIVES_WITHIN = 2  # archives within each other that are opened
SAME_TIME = 2.0  # seconds; a zip archive knows times no better
SHOWN = 6  # names of found files in a message
BESIDE_LIMIT = 20  # modules of his own that a student's file may import

ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
UNKNOWN_ARCHIVE_ENDINGS = (".rar", ".7z", ".gz", ".bz2", ".xz", ".zst")
LITTER = {"__macosx", "__pycache__", "thumbs.db", "desktop.ini", "node_modules", "venv", "site-packages"}

# How learning platforms name what an instructor downloads. `order`: of two submissions of a student the later has the larger.
PLATFORMS = {
    "moodle": re.compile(
        r"(?P<student>.+?)_(?P<id>\d+)_assignsubmission_(file|onlinetext)(_(?P<file>.*))?", re.IGNORECASE
    ),
    "canvas": re.compile(
        r"(?P<student>[^_]+)(?P<late>_LATE)?_(?P<id>\d{2,})_(?P<order>\d{2,})_(?P<file>.+\.\w+)", re.IGNORECASE
    ),
    # What Otter's `export` writes is named after the notebook and the time; whose it is stands before it, if anywhere.
    "otter": re.compile(
        r"(?P<student>.+?)[_\-. ]+(?P<file>ex\d\d\w*?)_(?P<order>\d{4}_\d\d_\d\dT\d\d_\d\d_\d\d(_\d+)?)\.zip",
        re.IGNORECASE,
    ),
    "blackboard": re.compile(r".+_(?P<student>[^_]+)_attempt_(?P<order>[\d-]+)(_(?P<file>.+\.\w+))?", re.IGNORECASE),
}
# A late mark stands apart from the name; "Ann Late" is a name.
LATE = re.compile(
    r"[_\-. ]*[(\[](?i:late|overdue)[)\]]|[_\-](?i:late|overdue)(?![^\W_])|(?<![^\W_])LATE[_\-. ]+|[_\-. ]+LATE(?![^\W_])"
)
# A student who hands in again gets a number behind the name of his file from a browser or a platform, or writes one.
AGAIN = re.compile(
    r"[_ ]*\((\d{1,3})\)$|-(\d{1,2})$|[-_ ](?:v|version|attempt|try|resubmission)[-_ ]?(\d{1,3})$", re.IGNORECASE
)
EXERCISE_FILE = re.compile(
    r"(?P<student>.*?)[_\-. ]*(?P<file>(?<![^\W_])ex\d\d(?![^\W_]).*)", re.IGNORECASE | re.DOTALL
)


@dataclass(frozen=True)
class Student:
    """All that one student handed in: a submission for each exercise, missing ones included.

    Attributes:
        key: the exact path of what he handed in (of the first of several), from the folder of the class. No two students have
            the same; bytes that are no UTF-8 are lone surrogates in it, as Python reads them.
        name: for people, fit to be shown anywhere. No two students have the same.
        submissions: by the name of the exercise.
        notes: what the instructor should know of how it was found.
        listed: as in the roster, such as his id and email; empty without one.
    """

    key: str
    name: str
    submissions: dict[str, Submission]
    notes: tuple[str, ...] = ()
    listed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HandedIn:
    """What a folder of submissions holds: its students, sorted by name, and the entries that belong to nobody, with the reason."""

    students: tuple[Student, ...]
    ignored: tuple[str, ...]


def read_submission(student: str, file: Path) -> Submission:
    """Read one file: regular, no link, UTF-8, not larger than `SOURCE_LIMIT`; else the submission says what is wrong.

    Modules beside it that it imports are read with it.

    Raises:
        ValueError: there is no such file.
    """
    node = _on_disk(file, file.name)
    if node is None:
        raise ValueError(f"there is no file {file}")
    beside = [each for each in _listed(file.parent, "") if each.name.endswith(".py")] if node.kind == "file" else []
    return _read(student, node, beside)


def read_student(folder: Path, name: str, exercises: Sequence[Exercise]) -> Student:
    """All that one student handed in, if `folder` is his alone, as an autograder has it; or one file."""
    node = _on_disk(folder, folder.name) or _Node(folder.name, "folder")
    claim = _Claim(node, name, file=folder.name if node.kind == "file" else "")
    return _student("name", name, [claim], exercises, None)


def read_folder(directory: Path, exercises: Sequence[Exercise], roster: Roster | None = None) -> list[Student]:
    """The students of `find_students`."""
    return list(find_students(directory, exercises, roster).students)


def find_students(directory: Path, exercises: Sequence[Exercise], roster: Roster | None = None) -> HandedIn:
    """All submissions under `directory`, which may also be a zip or tar archive.

    One folder or archive for each student, named after him, with his files in it; or files next to each other whose names
    begin with the student's, as in `ada_ex01_softmax.py`; or both; or what Canvas, Moodle or Blackboard let one download, and
    what Otter exports.
    Late marks and the platforms' ids do not make another student. Of several files for one exercise, the newest is taken.

    Args:
        roster: settles who is who: what matches a line of it is that student's, and who handed in nothing is listed too.

    Raises:
        ValueError: `directory` is neither a directory nor an archive, or holds no submission.
    """
    ignored: list[str] = []
    claims: dict[tuple[str, object], list[_Claim]] = {}
    for node in _top_level(directory):
        claim = _claim(node, directory)
        if claim is None:
            if not _is_litter(node.name):
                ignored.append(f"{shown_path(node.path)}: neither a folder, an archive nor a file of an exercise")
            continue
        line = roster.find(claim.student, claim.number, claim.node.name) if roster else None
        owner = (
            ("roster", line) if line is not None else ("id", claim.number) if claim.number else ("name", claim.student)
        )
        claims.setdefault(owner, []).append(claim)
    if not claims:
        raise ValueError(f"{directory} holds no folder, no archive and no file of an exercise")
    students = [_student(kind, who, found, exercises, roster) for (kind, who), found in claims.items()]
    for line in range(len(roster.names) if roster else 0):
        if ("roster", line) not in claims:
            students.append(_absent(roster, line, exercises))
    return HandedIn(tuple(_named_apart(students)), tuple(ignored))


# ----------------------------------------------------------------------------------------------- what lies in a folder


@dataclass(frozen=True)
class _Node:
    """A file or a folder, on disk or in an archive.

    Attributes:
        path: exact, from the folder of the class.
        kind: `"file"`, `"folder"`, `"link"`, `"special"` or `"unreadable"`.
        time: of its last change, in seconds since 1970; 0 if unknown.
        read: at most so many bytes of a file.
        inside: what is in a folder.
        problem: why it cannot be read.
    """

    path: str
    kind: str
    time: float = 0.0
    read: Callable[[int], bytes] = lambda limit: b""
    inside: Callable[[], Iterable[_Node]] = tuple
    problem: str = ""

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]


def _on_disk(file: Path, path: str) -> _Node | None:
    try:
        found = os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return _Node(path, "unreadable", problem=getattr(error, "strerror", None) or str(error))
    if stat.S_ISLNK(found.st_mode):
        return _Node(path, "link")
    if stat.S_ISDIR(found.st_mode):
        return _Node(path, "folder", found.st_mtime, inside=lambda: _listed(file, path))
    if stat.S_ISREG(found.st_mode):
        return _Node(path, "file", found.st_mtime, read=lambda limit: _read_disk(file, limit))
    return _Node(path, "special")


def _listed(directory: Path, path: str) -> Iterator[_Node]:
    for name in sorted(os.listdir(directory), key=os.fsencode):
        node = _on_disk(directory / name, f"{path}/{name}" if path else name)
        if node is not None:
            yield node


def _read_disk(file: Path, limit: int) -> bytes:
    fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as stream:
        return stream.read(limit)


def _top_level(directory: Path) -> list[_Node]:
    if directory.is_dir():
        return list(_listed(directory, ""))
    if not (directory.is_file() and _is_archive(directory.name)):
        raise ValueError(f"{directory} is neither a directory nor a zip or tar archive")
    try:
        return list(_unpacked(_on_disk(directory, ""), ""))
    except _BadArchive as error:
        raise ValueError(f"{directory} {error}") from error


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _all_files(node: _Node, seen: _Budget, depth: int = DEPTH, archives: int = ARCHIVES_WITHIN) -> Iterator[_Node]:
    """Every file of a student, archives opened; links and what cannot be read as they are. `seen` notes what is left out."""
    if not seen.take():
        return
    try:
        if node.kind == "folder":
            if depth < 0:
                seen.note(
                    f"folders within {shown_path(node.folder)} were not searched: more than {DEPTH} within each other"
                )
                return
            for each in node.inside():
                if not _is_litter(each.name):
                    yield from _all_files(each, seen, depth - 1, archives)
        elif node.kind == "file" and _is_archive(node.name) and archives:
            for each in _unpacked(node, node.path):
                if not _is_litter(each.name):
                    yield from _all_files(each, seen, depth, archives - 1)
        else:
            yield node
    except (OSError, _BadArchive) as error:
        problem = getattr(error, "strerror", None) or str(error)
        yield replace(node, kind="unreadable", problem=problem)


class _Budget:
    """How many files and folders of one student are looked at, and what was left out."""

    def __init__(self) -> None:
        self.left, self.notes = ENTRIES, []

    def take(self) -> bool:
        self.left -= 1
        if self.left == -1:
            self.note(f"more than {ENTRIES:,} files and folders: the rest was not looked at")
        return self.left >= 0

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


# -------------------------------------------------------------------------------------------------------- archives


class _BadArchive(Exception):
    """An archive that cannot be opened, or is too large; says why."""


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_ENDINGS)


def _stem(name: str) -> str:
    """A name without the ending of an archive."""
    lower = name.lower()
    endings = [each for each in (*ARCHIVE_ENDINGS, *UNKNOWN_ARCHIVE_ENDINGS) if lower.endswith(each)]
    return name[: -max(map(len, endings))] if endings else name


def _unpacked(node: _Node, path: str) -> list[_Node]:
    """The top level of an archive, as nodes. Nothing is written to disk, no link followed, and no path in it is trusted."""
    data = node.read(ARCHIVE_BYTES + 1)
    if len(data) > ARCHIVE_BYTES:
        raise _BadArchive(f"has more than {ARCHIVE_BYTES >> 20} MiB")
    members = _zip_members if node.name.lower().endswith(".zip") or data[:2] == b"PK" else _tar_members
    try:
        found = list(members(data))
    except _BadArchive:
        raise
    except Exception as error:  # of whatever kind: the file is a stranger's, and the libraries raise many
        raise _BadArchive(f"is no archive that can be read ({type(error).__name__}: {error})"[:200]) from error
    return _as_tree(found, path)


def _zip_members(data: bytes) -> Iterator[tuple[str, _Node]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    infos = archive.infolist()
    if len(infos) > ENTRIES:
        raise _BadArchive(f"holds more than {ENTRIES:,} files")
    for info in infos:
        if info.is_dir():
            continue
        kind = "link" if stat.S_ISLNK(info.external_attr >> 16) else "file"
        if info.flag_bits & 1:
            yield info.filename, _Node("", "unreadable", problem="it is encrypted")
            continue
        try:
            changed = time.mktime((*info.date_time, 0, 0, -1))
        except (ValueError, OverflowError):
            changed = 0.0
        yield info.filename, _Node("", kind, changed, read=lambda limit, info=info: archive.open(info).read(limit))


def _tar_members(data: bytes) -> Iterator[tuple[str, _Node]]:
    total = 0
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
        for count, info in enumerate(archive):
            total += info.size
            if total > ARCHIVE_BYTES or count > ENTRIES:
                raise _BadArchive(f"holds more than {ARCHIVE_BYTES >> 20} MiB or {ENTRIES:,} files")
            if info.isdir():
                continue
            if not info.isreg():
                yield info.name, _Node("", "link" if info.issym() or info.islnk() else "special")
                continue
            content = archive.extractfile(info).read(ARCHIVE_BYTES)
            yield info.name, _Node("", "file", float(info.mtime), read=lambda limit, content=content: content[:limit])


def _as_tree(members: Iterable[tuple[str, _Node]], path: str) -> list[_Node]:
    folders: dict[str, object] = {}
    for name, node in members:
        parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
        here = folders
        for part in parts[:-1]:
            inner = here.setdefault(part, {})
            here = inner if isinstance(inner, dict) else here
        if parts:
            here[parts[-1]] = node

    def nodes(entries: dict[str, object], path: str) -> list[_Node]:
        made = []
        for name, entry in sorted(entries.items()):
            inside = f"{path}/{name}" if path else name
            if isinstance(entry, dict):
                made.append(_Node(inside, "folder", inside=lambda entry=entry, inside=inside: nodes(entry, inside)))
            else:
                made.append(replace(entry, path=inside))
        return made

    return nodes(folders, path)


# ------------------------------------------------------------------------------------------------------- whose it is


@dataclass(frozen=True)
class _Claim:
    """An entry of the class's folder, and whose it says it is.

    Attributes:
        student: the name as written, without late marks.
        number: the platform's id of the student, or "".
        late: marked so.
        order: the platform's count of submissions: the later the larger; () if unknown.
        file: the name that a loose file had when it was handed in; "" for folders and archives.
    """

    node: _Node
    student: str
    number: str = ""
    late: bool = False
    order: tuple[int, ...] = ()
    file: str = ""


def _claim(node: _Node, directory: Path) -> _Claim | None:
    """None for what is nobody's."""
    name = node.name
    if _is_litter(name):
        return None
    a_file = node.kind != "folder" and not _is_archive(name) and not name.lower().endswith(UNKNOWN_ARCHIVE_ENDINGS)
    for platform, pattern in PLATFORMS.items():
        found = pattern.fullmatch(_stem(name) if platform == "moodle" and not a_file else name)
        if found and (platform == "moodle" or node.kind != "folder") and (not a_file or found["file"]):
            groups = {"id": "", "late": None, "order": "", "file": "", **found.groupdict()}
            order = tuple(int(part) for part in re.findall(r"\d{1,18}", groups["order"] or ""))
            number = f"{platform}:{groups['id']}" if groups["id"] else ""
            student, late = _without_late_mark(groups["student"])
            return _Claim(node, student, number, late or bool(groups["late"]), order, groups["file"] if a_file else "")
    if not a_file or (node.kind == "link" and not name.lower().endswith((".py", ".ipynb"))):
        student, late = _without_late_mark(_stem(name))
        return _Claim(node, student, late=late)
    if found := EXERCISE_FILE.fullmatch(name):
        student, late = _without_late_mark(found["student"])
        return _Claim(node, student or directory.resolve().name, late=late, file=found["file"])
    return None


def _without_late_mark(name: str) -> tuple[str, bool]:
    without = LATE.sub("", name)
    return (without, without != name) if without else (name, False)


def _student(
    kind: str, who: object, claims: list[_Claim], exercises: Sequence[Exercise], roster: Roster | None
) -> Student:
    budget = _Budget()
    files = [
        _File(node, claim.file if node is claim.node and claim.file else node.name, claim)
        for claim in claims
        for node in _all_files(claim.node, budget)
    ]
    notes = list(budget.notes)
    if len(claims) > 1:
        notes.append(f"handed in as {', '.join(shown_path(claim.node.path) for claim in claims[:SHOWN])}")
    if roster and kind != "roster":
        notes.append("not on the roster, or not only one line of it")
    name = roster.names[who] if kind == "roster" else shown_path(claims[0].student)
    listed = roster.lines[who] if kind == "roster" else {}
    submissions = {exercise.name: _pick(name, files, exercise) for exercise in exercises}
    return Student(claims[0].node.path, name, submissions, tuple(notes), listed)


def _absent(roster: Roster, line: int, exercises: Sequence[Exercise]) -> Student:
    name = roster.names[line]
    nothing = _unreadable(name, "missing-file", "Nothing was handed in.")
    notes = ("on the roster, handed in nothing",)
    return Student(f"\0roster/{line}", name, {each.name: nothing for each in exercises}, notes, roster.lines[line])


def _named_apart(students: Iterable[Student]) -> Iterator[Student]:
    """Sorted by name, and no name twice: a second `ada` is `ada (2)`."""
    taken: set[str] = set()
    for student in sorted(students, key=lambda each: (each.name.casefold(), each.name, os.fsencode(each.key))):
        name, number = student.name, 1
        while name in taken:
            number += 1
            name = f"{student.name} ({number})"
        taken.add(name)
        if name != student.name:
            submissions = {each: replace(one, student=name) for each, one in student.submissions.items()}
            student = replace(student, name=name, submissions=submissions)
        yield student


# ----------------------------------------------------------------------------------------------- which file is graded


@dataclass(frozen=True)
class _File:
    """A file of a student, under the name it had when it was handed in."""

    node: _Node
    name: str
    claim: _Claim

    @property
    def stem(self) -> str:
        return self.name[:-3] if self.name.lower().endswith(".py") else self.name

    @property
    def again(self) -> int:
        found = AGAIN.search(self.stem)
        return int(next(filter(None, found.groups()))) if found else 0


def _pick(student: str, files: list[_File], exercise: Exercise) -> Submission:
    if len(files) == 1 and files[0].node.path == files[0].claim.node.path and not files[0].claim.file:
        return _whole_entry_unreadable(student, files[0].node, exercise)
    of_exercise = re.compile(rf"(?<![^\W_]){exercise.name}(?![^\W_])", re.IGNORECASE)
    matching = [
        each
        for each in files
        if each.node.kind != "folder" and each.name.lower().endswith(".py") and of_exercise.search(each.stem)
    ]
    wanted = exercise.file[:-3].lower()
    exact = [each for each in matching if AGAIN.sub("", each.stem).lower() == wanted]
    matching = exact or matching
    if not matching:
        return _unreadable(
            student, "missing-file", f"There is no {exercise.file} in what you handed in. {_found(files)}"
        )
    newest = _newest(matching)
    if newest is None:
        names = ", ".join(shown_path(each.node.path) for each in matching[:SHOWN])
        return _unreadable(
            student,
            "several-files",
            f"There are several files for {exercise.name} ({names}), and which is the newest cannot be told. Keep one.",
        )
    beside = [each.node for each in files if each.node.folder == newest.node.folder and newest.node.folder]
    submission = _read(student, newest.node, [each for each in beside if each.kind == "file"])
    notes = []
    if newest.name != exercise.file:
        notes.append(f"graded {shown_path(newest.node.path)}, in place of {exercise.file}")
    if len(matching) > 1:
        others = ", ".join(shown_path(each.node.path) for each in matching if each is not newest)
        notes.append(f"graded the newest, {shown_path(newest.node.path)}, and not {others[:300]}")
    return replace(submission, note="; ".join(notes), late=newest.claim.late)


def _whole_entry_unreadable(student: str, node: _Node, exercise: Exercise) -> Submission:
    """What a student handed in is one thing that is neither a folder nor an archive that opens."""
    name = shown_path(node.name)
    if node.kind == "link":
        return _unreadable(student, "not-a-file", f"{name} is a symbolic link, which is not followed.")
    if node.kind == "unreadable":
        return _unreadable(student, "not-a-file", f"{name} cannot be opened: {node.problem}.")
    return _unreadable(
        student,
        "missing-file",
        f"There is no {exercise.file} in what you handed in: {name} is an archive of a kind that is not opened. "
        "Hand in a zip or tar archive, or the file itself.",
    )


def _found(files: list[_File]) -> str:
    if not files:
        return "Nothing was found in it."
    told = []
    for each in files[:SHOWN]:
        lower = each.name.lower()
        what = (
            " (a notebook: export it as a Python file)"
            if lower.endswith(".ipynb")
            else " (an archive of a kind that is not opened)"
            if lower.endswith(UNKNOWN_ARCHIVE_ENDINGS)
            else f" (cannot be read: {each.node.problem})"
            if each.node.kind == "unreadable"
            else ""
        )
        told.append(f"{shown_path(each.node.path)}{what}")
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"Found: {', '.join(told)}{more}."


def _newest(files: list[_File]) -> _File | None:
    """The one handed in last: by the platform's count, else by time, else by the number behind its name. None if none tells."""
    orders = {each.claim.order for each in files}
    if () not in orders and len(orders) > 1:
        latest = max(orders)
        files = [each for each in files if each.claim.order == latest]
    last = max(each.node.time for each in files)
    files = [each for each in files if each.node.time > last - SAME_TIME]
    most = max(each.again for each in files)
    files = [each for each in files if each.again == most]
    return files[0] if len(files) == 1 else None


def _bytes_of(node: _Node) -> bytes | str:
    try:
        return node.read(SOURCE_LIMIT + 1) if node.kind == "file" else node.path
    except Exception:  # an archive's
        return node.path


def _read(student: str, node: _Node, beside: Sequence[_Node]) -> Submission:
    name = shown_path(node.name)
    if node.kind == "link":
        return _unreadable(student, "not-a-file", f"{name} is a symbolic link, which is not followed.")
    if node.kind != "file":
        what = f"cannot be read: {node.problem}" if node.kind == "unreadable" else "is not a regular file"
        return _unreadable(student, "not-a-file", f"{name} {what}.")
    try:
        source = node.read(SOURCE_LIMIT + 1)
    except Exception as error:  # a broken archive raises errors of many kinds
        return _unreadable(student, "not-a-file", f"{name} cannot be read: {type(error).__name__}: {error}"[:300])
    if len(source) > SOURCE_LIMIT:
        return _unreadable(student, "file-too-large", f"{name} has more than {SOURCE_LIMIT // 1024} KiB.")
    try:
        source.decode("utf-8")
    except UnicodeDecodeError as error:
        line = source.count(b"\n", 0, error.start) + 1
        return _unreadable(student, "not-utf8", f"{name} is not UTF-8 text (line {line}). Save it as UTF-8.")
    return Submission(student, source, beside=_imported(source, beside), path=node.path, time=node.time)


def _imported(source: bytes, beside: Sequence[_Node]) -> dict[str, bytes]:
    """The modules beside a file that it imports, and those that they import."""
    known = {node.name[:-3]: node for node in beside if node.name.endswith(".py")}
    taken: dict[str, bytes] = {}
    waiting = [source]
    while waiting and len(taken) < BESIDE_LIMIT:
        for name in _names_imported(waiting.pop()):
            if name not in known or f"{name}.py" in taken:
                continue
            module = _bytes_of(known[name])
            if isinstance(module, bytes) and len(module) <= SOURCE_LIMIT:
                taken[f"{name}.py"] = module
                waiting.append(module)
    return taken


def _names_imported(source: bytes) -> set[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update([node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names])
    return names


def _unreadable(student: str, diagnosis: str, says: str) -> Submission:
    return Submission(student, None, Finding(diagnosis, says))

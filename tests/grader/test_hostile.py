"""Hostile submissions: each ends as a failed check with a clear message, in bounded time, and harms nobody else."""

import csv
import ctypes
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from flashlib.course.grader import classroom
from flashlib.course.grader.classroom import grade_class
from flashlib.course.grader.engine import Submission, grade, sandbox_for
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.gradebook import write_results
from flashlib.course.grader.matrix import expected_diagnoses
from flashlib.course.grader.sandbox.confine import MIB, landlock_abi
from flashlib.course.grader.sandbox.leftovers import leftovers
from flashlib.course.grader.sandbox.outcome import Limits
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.course.grader.submissions import Student, read_folder

HOSTILE = sorted((Path(__file__).parent / "hostile").glob("*.*"))  # .txt: what no formatter could read
LIMITS = Limits(seconds=3.0, total_seconds=60.0, memory=128 * MIB)
GOOD = (REPOSITORY / "solutions/ex01_softmax.py").read_bytes()
UNREADABLE = {
    "a_link": "not-a-file",
    "a_linked_folder": "not-a-file",
    "a_pipe": "not-a-file",
    "a_folder_as_file": "missing-file",
    "not_utf8": "not-utf8",
    "huge": "file-too-large",
    "missing": "missing-file",
    "twice": "several-files",
}
pytestmark = pytest.mark.skipif(
    not landlock_abi(), reason="needs a Linux kernel with Landlock: some of these files do harm"
)


def hand_in(folder: Path, results: Path) -> None:
    """A class of hostile students, and one good one."""
    for file in HOSTILE:
        (folder / file.stem).mkdir()
        text = file.read_text().replace("@SUBMISSIONS@", str(folder)).replace("@RESULTS@", str(results))
        (folder / file.stem / "ex01_softmax.py").write_text(text)
    for name in [*UNREADABLE, "zz_good"]:
        (folder / name).mkdir()
    (folder / "zz_good/ex01_softmax.py").write_bytes(GOOD)
    (folder / "a_link/ex01_softmax.py").symlink_to(REPOSITORY / "solutions/ex01_softmax.py")
    (folder / "a_linked_folder").rmdir()
    (folder / "a_linked_folder").symlink_to(folder / "zz_good")
    os.mkfifo(folder / "a_pipe/ex01_softmax.py")
    (folder / "a_folder_as_file/ex01_softmax.py").mkdir()
    (folder / "not_utf8/ex01_softmax.py").write_bytes(b"# caf\xe9\n" + GOOD)
    (folder / "huge/ex01_softmax.py").write_bytes(GOOD + b"#" * (1 << 20))
    (folder / "twice/ex01_softmax_a.py").write_bytes(GOOD)
    (folder / "twice/ex01_softmax_b.py").write_bytes(GOOD)
    (folder / "=cmd()<script>.py").mkdir()


def zygotes() -> set[psutil.Process]:
    """The processes of sandboxes that this one has started."""
    return {p for p in psutil.Process().children(recursive=True) if "zygote.py" in " ".join(p.cmdline())}


@pytest.fixture(scope="module")
def zygotes_of_others():
    """Those of tests before these: `check` keeps one as long as its Python runs."""
    return zygotes()


def traces() -> dict[str, object]:
    """What a submission could leave behind in the system, and in this process."""
    process = psutil.Process()
    return {"left behind": leftovers(), "descriptors": process.num_fds(), "children": process.children(recursive=True)}


@pytest.fixture(scope="module")
def graded_class(zygotes_of_others, tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("submissions"), tmp_path_factory.mktemp("results")
    hand_in(folder, results)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.py")}
    exercise = replace(load_exercise("ex01"), limits=LIMITS)
    students = read_folder(folder, [exercise])
    traces_before = traces()
    after_each: dict[str, frozenset[str]] = {}

    def note_what_is_left(exercise, submission, sandbox, grade=classroom.grade, **options):
        report = grade(exercise, submission, sandbox, **options)
        after_each[submission.student] = leftovers() - traces_before["left behind"]
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classroom, "grade", note_what_is_left)
        graded = grade_class(students, [exercise], jobs=3, hidden=(folder, results))  # most of it is waiting
    assert set(after_each) == {student.name for student in students}
    assert {name: left for name, left in after_each.items() if left} == {}
    assert traces() == traces_before
    write_results(graded, [exercise], results / "grades.csv", results / "feedback")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.py")} == before
    return {one.student: one.reports[0] for one in graded}, results


@pytest.mark.parametrize("file", HOSTILE, ids=lambda file: file.stem)
def test_hostile_submission_fails_with_a_clear_message(graded_class, file):
    report = graded_class[0][file.stem]
    failed = [result for result in report.results if not result.passed]
    allowed = {*expected_diagnoses(file), "not-run", "missing"}
    assert any(result.finding.diagnosis in expected_diagnoses(file) for result in failed), report
    assert {result.finding.diagnosis for result in failed} <= allowed, report
    assert report.earned == 0, report
    assert all(result.finding.says for result in failed)
    assert len(report.results) == len(load_exercise("ex01").properties)
    assert report.seconds < LIMITS.total_seconds + LIMITS.seconds


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_submission_fails_with_a_clear_message(graded_class, name):
    report = graded_class[0][name]
    assert report.earned == 0
    assert report.diagnoses == (UNREADABLE[name],)


def test_good_submission_among_them_gets_full_marks(graded_class):
    assert graded_class[0]["zz_good"].passed, graded_class[0]["zz_good"]


def test_nothing_is_left_behind(graded_class, zygotes_of_others):
    assert zygotes() <= zygotes_of_others


def test_table_and_pages_hold_hostile_text_harmlessly(graded_class):
    _, results = graded_class
    with (results / "grades.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(graded_class[0])
    assert not any(row["student"].startswith("=") for row in rows)
    pages = list((results / "feedback").rglob("feedback.html"))
    assert len(pages) == len(rows)
    for page in pages:
        text = page.read_text()
        assert "<script" not in text and "onerror=alert(1)>" not in text and "\x1b" not in text and "\u202e" not in text
    hostile = (results / "feedback/html_and_escapes/results.json").read_text()
    assert json.loads(hostile)["score"] == 0 and "\\u001b" not in hostile


def test_gradescope_json_counts_every_check(graded_class):
    reports, results = graded_class
    answer = json.loads((results / "feedback/zz_good/results.json").read_text())
    assert answer["score"] == sum(test["max_score"] for test in answer["tests"]) == reports["zz_good"].points
    assert {test["status"] for test in answer["tests"]} == {"passed"}


LEAVES = {
    "shared memory of System V": "libc.shmget(0x5EC2E8, 4096, 0o1600)",
    "message queue of System V": "libc.msgget(0x5EC2E8, 0o1600)",
    "semaphores of System V": "libc.semget(0x5EC2E8, 1, 0o1600)",
    "shared memory /dev/shm/": "open('/dev/shm/flashlib-test-left', 'w').close()",
}


@pytest.fixture
def swept():
    """Nothing that a test of leftovers made outlives it."""
    yield
    libc = ctypes.CDLL(None)
    libc.shmctl(libc.shmget(0x5EC2E8, 0, 0), 0, None)
    libc.msgctl(libc.msgget(0x5EC2E8, 0), 0, None)
    libc.semctl(libc.semget(0x5EC2E8, 0, 0), 0, 0)
    Path("/dev/shm/flashlib-test-left").unlink(missing_ok=True)


def test_what_is_left_behind_where_nothing_fences_it_in_is_seen_and_said(swept):
    """The same check finds nothing after every hostile submission; this shows that it finds what is there."""
    exercise = first_property_of_ex01(LIMITS)
    source = GOOD + b"\nimport ctypes\nlibc = ctypes.CDLL(None)\n"
    handed_in = [
        Student(name, name, {"ex01": Submission(name, source + code.encode())}) for name, code in LEAVES.items()
    ]
    before = leftovers()
    graded = grade_class(handed_in, [exercise], kernel_fences=False, allow_unfenced=True)
    for one, name in zip(graded, LEAVES, strict=True):
        assert name in one.reports[0].note, (name, one.reports[0].note)
    assert len(leftovers() - before) == len(LEAVES)


def first_property_of_ex01(limits):
    exercise = load_exercise("ex01")
    return replace(exercise, properties=exercise.properties[:1], limits=limits)


DETACHES = b"""
import os
import time


def softmax(x):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())
            os.close(1)
            os.close(2)
            time.sleep(600)
        os._exit(0)
    print("left behind:", os.read(reader, 20).decode(), flush=True)
    {then}
"""


@pytest.mark.parametrize(
    ("then", "diagnosis"),
    [("return x", "wrong-values"), ("os._exit(0)", "process-ended"), ("os.wait()\n    while True: pass", "timeout")],
)
def test_detached_child_is_found_and_killed_without_seccomp(then, diagnosis):
    """A system without seccomp lets it fork twice and leave its session; the reaper still finds it."""
    exercise = first_property_of_ex01(Limits(seconds=2.0, total_seconds=60.0, processes=True))
    source = DETACHES.replace(b"{then}", then.encode())
    with sandbox_for(exercise, kernel_fences=False) as sandbox:
        report = grade(exercise, Submission("me", source), sandbox)
        finding = report.results[0].finding
        assert finding.diagnosis == diagnosis
        stray = int(finding.printed.partition("left behind:")[2].split()[0])
        assert not psutil.pid_exists(stray)
    assert any("Landlock" in line for line in report.protections.missing)


def test_killing_the_forking_process_itself_harms_only_that_check():
    """Without Landlock and seccomp a submission can kill the process that children are forked from. The next gets a new one."""
    exercise = first_property_of_ex01(LIMITS)
    killer = b"import os\ndef softmax(x):\n    os.kill(os.getppid(), 9)\n    import time; time.sleep(60)\n"
    with sandbox_for(exercise, kernel_fences=False) as sandbox:
        began = time.monotonic()
        report = grade(exercise, Submission("me", killer), sandbox)
        assert report.earned == 0 and time.monotonic() - began < 40
        assert "grader-error" not in report.diagnoses
        assert grade(exercise, Submission("good", GOOD), sandbox).passed

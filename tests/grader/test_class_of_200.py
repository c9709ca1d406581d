"""A class of 200, as classes are: mixed, with what crashes and attacks, doubles, archives and odd names; stopped five times."""

import csv
import io
import json
import os
import random
import resource
import secrets
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from flashlib.course.grader.engine import Submission, grade, sandbox_for
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.results import Results
from flashlib.course.grader.rounds import FOLDER, record_of_class
from flashlib.course.grader.sandbox.confine import landlock_abi
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.course.grader.submissions import find_students
from flashlib.measure.records.record import save_record

TESTS = REPOSITORY / "tests/grader"
HOSTILE = ("crashes", "os_exit", "nests_directories", "endless_loop", "shared_memory", "thousands_of_threads", "floods_output",
           "html_and_escapes", "forges_garbage", "says_anything_is_forbidden", "fork_bomb", "sys_exit_at_import")  # fmt: skip
STUDENTS, STOPS, SECONDS = 200, 5, 3

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not landlock_abi(), reason="needs a Linux kernel with Landlock: some of these do harm"),
]


def packed(source: bytes, kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("__MACOSX/._ex01_softmax.py", b"\0")
            archive.writestr("homework/ex01_softmax.py", source)
    else:
        with tarfile.open(fileobj=stream, mode="w:gz") as archive:
            info = tarfile.TarInfo("a/b/EX01_softmax.py")
            info.size = len(source)
            archive.addfile(info, io.BytesIO(source))
    return stream.getvalue()


def hand_in(folder: bytes, rng: random.Random) -> None:
    """Each student's source, in one of the ways in which students hand in."""
    wrong = sorted((TESTS / "wrong/ex01").glob("*.py"))
    right = [REPOSITORY / "solutions/ex01_softmax.py", *sorted((TESTS / "right/ex01").glob("*.py"))]
    hostile = [TESTS / f"hostile/{name}.py" for name in HOSTILE]
    stub = REPOSITORY / "exercises/ex01_softmax.py"
    for number in range(STUDENTS):
        file = rng.choice(rng.choices([wrong, right, hostile, [stub]], [10, 6, 2, 2])[0])
        source = file.read_bytes() + b"# %d\n" % (number if rng.random() < 0.8 else 0)
        name = f"student{number}".encode() + rng.choice(
            [b"", b"", b"", b"\xff", "é".encode(), b" (x)", b"=1+1", b"\n", b"\x1b[2J"]
        )
        way = rng.randrange(7)
        if way == 0:
            write(folder + b"/" + name + b".zip", packed(source, "zip"))
        elif way == 1:
            write(folder + b"/" + name + b".tar.gz", packed(source, "tar"))
        elif way == 2:
            write(folder + b"/" + name + b"/deep/er/ex01_softmax (1).py", source)
        elif way == 3:
            write(folder + b"/" + name + b"/ex01_softmax.py", b"raise RuntimeError('the old one')\n", age=10_000)
            write(folder + b"/" + name + b"/new/ex01_softmax-1.py", source)
        elif way == 4 and number % 3 == 0:
            write(folder + b"/" + name + b"/ex01_softmax.ipynb", b"{}")
        else:
            write(folder + b"/" + name + b"/ex01_softmax.py", source)


def write(file: bytes, content: bytes, age: float = 0.0) -> None:
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as stream:
        stream.write(content)
    os.utime(file, (time.time() - age,) * 2)


def memory_of(process: psutil.Process) -> int:
    """Bytes of it and all below it; what several share counts once, in parts (proportional set size)."""
    total = 0
    try:
        for each in [process, *process.children(recursive=True)]:
            total += each.memory_full_info().pss
    except psutil.Error:
        pass
    return total


def test_a_class_of_200_stopped_five_times_loses_and_swaps_nothing(tmp_path, capsys, rounds):
    seed = secrets.randbits(32)
    rng, folder, table = random.Random(seed), tmp_path / "class", tmp_path / "out/grades.csv"
    hand_in(os.fsencode(folder), rng)
    exercise = load_exercise("ex01")
    students = find_students(folder, [exercise]).students
    assert len(students) == STUDENTS
    # A shell starts what runs in the background deaf to SIGINT; Ctrl-C is meant here.
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from flashlib.cli import app; app()"
    )
    command = [sys.executable, "-c", start, "grade", "--submissions", folder]
    command += ["--exercise", "ex01", "--out", table, "--jobs", "2", "--seconds", str(SECONDS)]
    began, cpu, peak, stops, done = time.monotonic(), cpu_of_children(), 0, 0, False
    while not done:
        process = subprocess.Popen(
            [*map(str, command), *(["--resume"] if (tmp_path / "out/grades_run.jsonl").exists() else [])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        before = graded(tmp_path)
        share = rng.randint(5, STUDENTS // (STOPS + 1)) if stops < STOPS else 10 * STUDENTS
        while process.poll() is None:
            peak = max(peak, memory_of(psutil.Process(process.pid)))
            if graded(tmp_path) >= before + share:
                stops += 1
                process.send_signal(rng.choice([signal.SIGINT, signal.SIGKILL]))
                process.wait(timeout=60)
            time.sleep(0.3)
        done = process.returncode in (0, 3)
        assert done or process.returncode in (130, -signal.SIGKILL, -signal.SIGINT), process.stderr.read().decode()
    took, cpu = time.monotonic() - began, cpu_of_children() - cpu
    assert process.returncode == 0 and stops == STOPS, (process.stderr.read().decode(), seed)

    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == STUDENTS
    run_seed = json.loads((tmp_path / "out/grades_run.jsonl").read_text().splitlines()[0])["seed"]
    known, results = {}, Results()
    with sandbox_for(exercise) as sandbox:
        for student, row in zip(students, rows, strict=True):
            submission = student.submissions["ex01"]
            source = None if submission.source is None else submission.source.rpartition(b"# ")[0]
            if source not in known:
                alone = submission if source is None else Submission("alone", source)
                report = grade(exercise, alone, sandbox, seed=run_seed, results=results)
                known[source] = report.earned
            assert int(row["total"]) == known[source], (row["student"], row["diagnoses"], seed)
    pages = list((tmp_path / "out/grades_feedback").glob("*/feedback.html"))
    assert len(pages) == STUDENTS and (tmp_path / "out/grades_report.html").exists()
    with capsys.disabled():
        print(
            f"\n{STUDENTS} students, ex01, 2 jobs, {STOPS} stops: {took:.0f} s ({cpu:.0f} s of processor time), "
            f"{peak / 1e6:.0f} MB at most (seed {seed})"
        )
    if rounds > 1:
        row = {"students": STUDENTS, "jobs": 2, "stops": STOPS, "seconds": round(took), "cpu_seconds": round(cpu)}
        row |= {"mb": round(peak / 1e6), "load": round(os.getloadavg()[1]), "cores": os.cpu_count()}
        save_record(record_of_class(row), FOLDER)


def cpu_of_children() -> float:
    """Seconds of processor time of all that has ended below this process, but for what was killed before it could be waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def graded(folder: Path) -> int:
    try:
        return max(0, (folder / "out/grades_run.jsonl").read_bytes().count(b"\n") - 1)
    except FileNotFoundError:
        return 0

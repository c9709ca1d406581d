"""A class run loses nothing: whatever one submission does, holds or is called, every other one gets its own marks."""

import csv
import errno
import json
import os
import random
import secrets
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from flashlib.course.grader import classroom, journal
from flashlib.course.grader.classroom import Unfenced, grade_class
from flashlib.course.grader.cli import grade as grade_command
from flashlib.course.grader.engine import GRADER_ERROR, Submission
from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.findings import Finding, Result
from flashlib.course.grader.gradebook import folder_names, write_results
from flashlib.course.grader.report import Report, as_gradescope, as_page, as_text
from flashlib.course.grader.sandbox import scratch
from flashlib.course.grader.sandbox.confine import MIB, Protections, landlock_abi
from flashlib.course.grader.sandbox.conversation import Child
from flashlib.course.grader.sandbox.outcome import Limits, SandboxError
from flashlib.course.grader.sandbox.session import REPOSITORY, Sandbox
from flashlib.course.grader.submissions import Student, find_students
from flashlib.course.grader.text import cell, clean, clean_tree, shown_path

GOOD = (REPOSITORY / "solutions/ex01_softmax.py").read_bytes()
WRONG = (REPOSITORY / "tests/grader/wrong/ex01/no_max_subtraction.py").read_bytes()
STUB = (REPOSITORY / "exercises/ex01_softmax.py").read_bytes()

fenced = pytest.mark.skipif(not landlock_abi(), reason="needs a Linux kernel with Landlock")


def small(properties: int = 2, **limits):
    exercise = load_exercise("ex01")
    return replace(exercise, properties=exercise.properties[:properties], limits=replace(LIMITS, **limits))


LIMITS = Limits(seconds=5.0, total_seconds=30.0, memory=256 * MIB)


def students(*sources: bytes) -> list[Student]:
    return [
        Student(f"folder{at}", f"student {at}", {"ex01": Submission(f"student {at}", source)})
        for at, source in enumerate(sources)
    ]


def in_softmax(code: str) -> bytes:
    """A submission that runs `code` before it computes its softmax, which is right."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    return GOOD + f"\n\n_right = softmax\n\n\ndef softmax(x):\n{body}    return _right(x)\n".encode()


@pytest.fixture(scope="module")
def kept():
    """Sandboxes by what they must do; to start one takes seconds."""
    made: dict[bool, Sandbox] = {}
    yield made
    for sandbox in made.values():
        sandbox.close()


class _Kept:
    """A sandbox that the end of a run does not end. It forks one child at a time: one job at a time, too."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def __getattr__(self, name):
        return getattr(self._sandbox, name)

    def close(self) -> None:
        pass


@pytest.fixture
def shared(kept, monkeypatch):
    """Runs of one job take the same sandbox."""
    real = classroom.sandbox_for

    def sandbox_for(exercise, *, must_fence, **options):
        if must_fence not in kept:
            kept[must_fence] = real(exercise, must_fence=must_fence, **options)
        return _Kept(kept[must_fence])

    monkeypatch.setattr(classroom, "sandbox_for", sandbox_for)


# ------------------------------------------------------------------------------------------- what is left in a directory

MESSES = {
    "nested": "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')",
    "nested beyond a path": "import os\nfor _ in range(40):\n    os.mkdir('d' * 250)\n    os.chdir('d' * 250)",
    "nested and shut": "import os\nfor _ in range(50):\n    os.mkdir('d', 0o700)\n    os.chdir('d')\nos.mkdir('e', 0)",
    "nested wide": "import os\nfor n in range(60):\n    os.makedirs(f'{n}/' + '/'.join('abcdefgh' * 3))",
    "links in a circle": "import os\nos.mkdir('a')\nos.symlink('..', 'a/b')\nos.symlink('c', 'c')\nos.symlink('/', 'root')",
    "odd names": r"import os\nfor n in (b'\xff', b'\n', b'-rf', b' ', b'a' * 255):\n    open(n, 'w').close()".replace(
        "\\n", "\n", 2
    ),
    "a pipe": "import os\nos.mkfifo('p')\nos.mkdir('q')\nos.mkfifo('q/p')",
    "many files": "for n in range(1500):\n    open(str(n), 'w').close()",
}


@fenced
def test_whatever_is_left_in_a_directory_everybody_gets_his_marks_and_it_is_removed(monkeypatch, shared):
    made = []
    monkeypatch.setattr(scratch, "make", lambda make=scratch.make: made.append(make()) or made[-1])
    handed_in = students(*(in_softmax(code) for code in MESSES.values()), GOOD, WRONG)
    graded = grade_class(handed_in, [small()])
    by_mess = dict(zip([*MESSES, "good", "wrong"], graded, strict=True))
    assert by_mess["good"].earned == by_mess["good"].points and by_mess["wrong"].earned < by_mess["wrong"].points
    for name, one in by_mess.items():
        assert GRADER_ERROR not in one.diagnoses, (name, one.reports)
    assert made and not any(directory.exists() for directory in made)


def test_removing_stays_within_the_directory(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    inside = tmp_path / "inside"
    (inside / "a/b").mkdir(parents=True)
    (inside / "a/link").symlink_to(outside)
    (inside / "hard").hardlink_to(outside / "precious")
    (tmp_path / "shut").mkdir()
    assert scratch.remove(inside) and not inside.exists()
    assert (outside / "precious").read_text() == "x"
    assert scratch.remove(inside)
    assert not scratch.remove(outside / "precious") and (outside / "precious").exists()


def test_usage_counts_bytes_entries_and_depth_and_stops(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").write_bytes(b"x" * 1000)
    (tmp_path / "a/link").symlink_to(tmp_path)
    assert scratch.usage(tmp_path).bytes >= 1000
    assert (scratch.usage(tmp_path).entries, scratch.usage(tmp_path).depth) == (4, 2)
    descriptors = psutil.Process().num_fds()
    deep = tmp_path
    for _ in range(scratch.DEPTH_LIMIT + 10):
        deep = deep / "d"
        deep.mkdir()
    assert scratch.usage(tmp_path).depth == scratch.DEPTH_LIMIT
    assert scratch.usage(tmp_path / "nothing").entries == 0
    assert psutil.Process().num_fds() == descriptors


@fenced
@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
        "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()",
        "import os\nkept = []\nwhile True:\n    kept.append(open('f', 'wb'))\n    os.unlink('f')\n    kept[-1].write(bytes(1 << 22)); kept[-1].flush()",
    ],
    ids=["endless nesting", "endless files", "files without a name"],
)
def test_files_of_any_kind_count_against_the_disk(shared, code):
    (one,) = grade_class(students(in_softmax(code)), [small(1)])
    assert one.diagnoses == ("disk-flood",), one.reports


# -------------------------------------------------------------------------------------------------- failures of any kind

FAILURES = [
    RecursionError("too deep"),
    MemoryError(),
    OSError(errno.EMFILE, "Too many open files"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    BrokenPipeError(),
    KeyError("x"),
    AssertionError(),
    psutil.NoSuchProcess(1),
    SandboxError("the sandbox could not be set up"),
    json.JSONDecodeError("x", "y", 0),
]


def report_for(exercise, submission, earned: bool = True, note: str = "") -> Report:
    results = tuple(
        Result(each.name, each.title, each.points, None if earned else Finding("x", "y"))
        for each in exercise.properties
    )
    return Report(exercise.name, exercise.title, submission.student, results, 1, 0.5, note=note)


def test_no_failure_of_one_submission_reaches_another(monkeypatch):
    calls = []

    def failing(exercise, submission, sandbox, **options):
        calls.append(submission.student)
        at = int(submission.student.split()[1])
        if at < len(FAILURES):
            raise FAILURES[at]
        return report_for(exercise, submission)

    monkeypatch.setattr(classroom, "grade", failing)
    handed_in = students(*[GOOD] * (len(FAILURES) + 3))
    graded = grade_class(handed_in, [small()], jobs=3, allow_unfenced=True)
    assert [one.who for one in graded] == handed_in
    for one, failure in zip(graded, FAILURES, strict=False):
        assert one.diagnoses == (GRADER_ERROR,) and one.earned == 0
        assert type(failure).__name__ in one.reports[0].results[0].finding.says
    assert all(one.earned == one.points for one in graded[len(FAILURES) :])
    assert all(calls.count(f"student {at}") == (2 if at < len(FAILURES) else 1) for at in range(len(handed_in)))


def test_a_broken_sandbox_is_one_submissions_own(monkeypatch):
    """Whatever is broken on the grader's side while one submission is graded, the next gets a sandbox that works."""
    real = classroom.grade
    ways = {
        "student 0": lambda sandbox: sandbox._control.close(),
        "student 2": lambda sandbox: sandbox._process.kill(),
        "student 4": lambda sandbox: sandbox.close(),
        "student 6": lambda sandbox: os.close(sandbox._control.detach()),
    }

    def breaking(exercise, submission, sandbox, **options):
        report = real(exercise, submission, sandbox, **options)
        ways.pop(submission.student, lambda sandbox: None)(sandbox)
        return report

    monkeypatch.setattr(classroom, "grade", breaking)
    graded = grade_class(students(*[GOOD, WRONG] * 4), [small(2)], allow_unfenced=not landlock_abi())
    assert not ways
    assert [one.earned == one.points for one in graded] == [True, False] * 4, graded
    assert all(GRADER_ERROR not in one.diagnoses for one in graded)


def test_a_page_that_cannot_be_written_takes_no_other_with_it(tmp_path, monkeypatch):
    from flashlib.course.grader import gradebook

    exercise = small()
    graded = [
        classroom.Graded(one, (report_for(exercise, one.submissions["ex01"]),)) for one in students(GOOD, GOOD, GOOD)
    ]
    page = gradebook.as_page

    def failing(student, reports):
        if student == "student 1":
            raise OSError(errno.ENAMETOOLONG, "File name too long")
        return page(student, reports)

    monkeypatch.setattr(gradebook, "as_page", failing)
    failed = write_results(graded, [exercise], tmp_path / "grades.csv", tmp_path / "feedback")
    assert len(failed) == 1 and "student 1" in failed[0]
    assert len(list((tmp_path / "feedback").glob("*/feedback.html"))) == 2
    assert len((tmp_path / "grades.csv").read_text(encoding="utf-8-sig").splitlines()) == 4


# ------------------------------------------------------------------------------------------------------ whose marks they are


@fenced
def test_names_that_look_alike_get_their_own_marks(tmp_path, shared):
    sources = {
        b"ada\xff": GOOD, b"ada\xfe": STUB, b"ada\x01": WRONG, b"ada\x02": GOOD, b"caf\xc3\xa9": STUB, b"cafe\xcc\x81": GOOD,
        b"x" * 200 + b"1": GOOD, b"x" * 200 + b"2": STUB, b"a/b"[:1] + b"?b": GOOD, b"a*b": STUB,
    }  # fmt: skip
    for name, source in sources.items():
        folder = os.path.join(os.fsencode(tmp_path / "class"), name)
        os.makedirs(folder)
        with open(os.path.join(folder, b"ex01_softmax.py"), "wb") as file:
            file.write(source)
    exercise = small()
    found = find_students(tmp_path / "class", [exercise]).students
    graded = grade_class(found, [exercise])
    for one in graded:
        source = sources[os.fsencode(one.who.key)]
        expected = {GOOD: one.points, STUB: 0}.get(source)
        assert one.earned == expected if expected is not None else 0 < one.earned < one.points, one.student
    write_results(graded, [exercise], tmp_path / "grades.csv", tmp_path / "feedback")
    with (tmp_path / "grades.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["student"].lstrip("'"), int(row["total"])) for row in rows] == [(o.student, o.earned) for o in graded]
    for row, one in zip(rows, graded, strict=True):
        answer = json.loads((tmp_path / "feedback" / row["feedback"] / "results.json").read_text())
        assert answer["score"] == one.earned


def test_folders_of_feedback_are_apart_on_any_file_system():
    names = [
        "ada",
        "Ada",
        "ADA",
        "a/b",
        "a b",
        "a:b",
        "..",
        "",
        "\N{CUNEIFORM SIGN A}" * 100,
        "日" * 100,
        "日" * 101,
        "con",
    ]
    folders = folder_names(names)
    assert len({name.casefold() for name in folders}) == len(names)
    assert all(0 < len(name.encode()) < 200 and "/" not in name and name not in (".", "..") for name in folders)


# ------------------------------------------------------------------------------------------------------- strangers' text

NASTY = [
    "\x1b[2J\x1b]0;title\x07",
    "\ud800",
    "\u202egrade",
    "=HYPERLINK(1)",
    "a\rb",
    "\x00",
    "\u2066x",
    "\x9b31m",
    "\ufeff",
]


def harmless(text: str) -> bool:
    return text.encode("utf-8") is not None and all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize("text", NASTY)
def test_text_is_cleaned_wherever_it_goes(text):
    assert harmless(clean(text)) and harmless(shown_path(text)) and harmless(cell(text))
    assert clean_tree({text: [text, {"a": text}]}) == {clean(text): [clean(text), {"a": clean(text)}]}
    finding = Finding(text, text, text, text, text, (), text, text)
    exercise = load_exercise("ex01")
    results = tuple(Result(each.name, each.title, each.points, finding) for each in exercise.properties)
    report = Report("ex01", "title", clean(text), results, 1, 1.0)
    for shown in (as_text(report), as_page(clean(text), [report])):
        assert harmless(shown)
    assert json.loads(json.dumps(as_gradescope([report])))["score"] == 0


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", " =1", "|x", "\uff1d1", "%x"])
def test_no_cell_is_a_formula(text):
    assert cell(text).startswith("'") and cell("plain") == "plain" and cell(-1) == -1 and cell(None) == ""


WAYS = {
    "returned": "return {text!r}",
    "returned in a tuple": "return (x, [{text!r}], {{{text!r}: {text!r}}})",
    "raised": "raise ValueError({text!r})",
    "raised by an odd class": "raise type('E' + {text!r}.replace(chr(0), ''), (Exception,), {{}})({text!r})",
    "printed": "print({text!r}.encode('utf-8', 'surrogatepass'))\nimport sys\nsys.stdout.buffer.write({text!r}.encode('utf-8', 'surrogatepass'))\nraise KeyError",
    "raised as a message that raises": "raise type('E', (Exception,), {{'__str__': lambda self: 1 / 0}})()",
    "raised as a message that exits": "raise type('E', (Exception,), {{'__str__': lambda self: exit()}})()",
}


@fenced
def test_strings_of_a_child_come_clean_into_every_report(tmp_path, shared):
    handed_in = students(*(in_softmax(way.format(text="".join(NASTY))) for way in WAYS.values()), GOOD)
    exercise = small(1)
    graded = grade_class(handed_in, [exercise])
    assert graded[-1].earned == graded[-1].points
    assert not write_results(graded, [exercise], tmp_path / "grades.csv", tmp_path / "feedback")
    for way, one in zip(WAYS, graded, strict=False):
        (report,) = one.reports
        assert report.earned == 0 and GRADER_ERROR not in report.diagnoses, (way, report)
        assert harmless(as_text(report)), way
        assert "child.py" not in as_text(report) and "flashlib/" not in as_text(report), (way, as_text(report))
    for page in (tmp_path / "feedback").rglob("*.*"):
        assert harmless(page.read_text(encoding="utf-8"))
    assert harmless((tmp_path / "grades.csv").read_text(encoding="utf-8-sig"))


# --------------------------------------------------------------------------------------------------------- going on later

app = typer.Typer()
app.command()(grade_command)


def in_shell(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def table_of(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.reader(stream))
    timed = {at for at, heading in enumerate(rows[0]) if "seconds" in heading}
    return [[value for at, value in enumerate(row) if at not in timed] for row in rows]


@pytest.fixture
def quick(monkeypatch):
    """Grading that takes no time: what a submission gets follows from its text, the seed and the exercise."""
    calls = []

    def graded(exercise, submission, sandbox, *, seed, hints, results):
        calls.append((submission.student, exercise.name))
        points = random.Random(f"{submission.digest}{exercise.name}{seed}").random() < 0.5
        return report_for(exercise, submission, points)

    monkeypatch.setattr(classroom, "grade", graded)
    monkeypatch.setattr(classroom, "_insist_on_fences", lambda *args: None)
    return calls


def a_class(folder: Path, count: int = 12) -> Path:
    for at in range(count):
        (folder / f"student{at}").mkdir(parents=True)
        (folder / f"student{at}/ex01_softmax.py").write_bytes(GOOD + b"#" * at)
        (folder / f"student{at}/ex02_online_softmax.py").write_bytes(STUB + b"#" * at)
    return folder


def test_a_run_interrupted_anywhere_any_number_of_times_gives_the_same_table(tmp_path, quick, monkeypatch):
    folder, seed = a_class(tmp_path / "class"), secrets.randbits(30)
    arguments = ("--submissions", folder, "--exercise", "ex01", "--exercise", "ex02", "--seed", seed)
    whole = in_shell(*arguments, "--out", tmp_path / "whole.csv")
    assert whole.exit_code == 0, whole.output
    expected, calls = table_of(tmp_path / "whole.csv"), len(quick)
    quick.clear()
    graded, rng = classroom.grade, random.Random(seed)

    def interrupted(*args, **kwargs):
        report = graded(*args, **kwargs)
        if rng.random() < 0.15:
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(classroom, "grade", interrupted)
    out, stopped = tmp_path / "parts.csv", 0
    outcome = in_shell(*arguments, "--out", out)
    while outcome.exit_code == 130:
        stopped += 1
        run = tmp_path / "parts_run.jsonl"
        if rng.random() < 0.5 and run.read_bytes().count(b"\n") > 1:  # killed in the middle of a line behind the first
            run.write_bytes(run.read_bytes()[: -rng.randrange(1, 30)])
        outcome = in_shell(*arguments, "--out", out, "--resume")
        assert stopped < 100
    assert outcome.exit_code == 0 and stopped > 0, (outcome.output, seed)
    assert table_of(out) == expected, seed
    assert (
        len(quick) <= calls + 2 * stopped
    )  # at each stop, at most one is lost with its line and one with the interruption


def test_what_has_changed_is_graded_again_and_nothing_else_is(tmp_path, quick):
    folder = a_class(tmp_path / "class", 4)
    arguments = ("--submissions", folder, "--exercise", "ex01", "--out", tmp_path / "grades.csv")
    assert in_shell(*arguments).exit_code == 0
    quick.clear()
    (folder / "student2/ex01_softmax.py").write_bytes(WRONG)
    (folder / "newcomer").mkdir()
    (folder / "newcomer/ex01_softmax.py").write_bytes(WRONG)
    assert in_shell(*arguments, "--resume").exit_code == 0
    assert sorted(quick) == [("newcomer", "ex01"), ("student2", "ex01")]


def test_a_run_is_not_gone_on_with_on_other_terms(tmp_path, quick, monkeypatch):
    folder = a_class(tmp_path / "class", 2)
    arguments = ("--submissions", folder, "--out", tmp_path / "grades.csv", "--exercise", "ex01")
    nothing = in_shell(*arguments, "--resume")
    assert nothing.exit_code == 2 and "no run to go on with" in nothing.output.replace("\n", " ")
    assert in_shell(*arguments, "--seed", 5).exit_code == 0
    for change in (("--seed", 6), ("--hints", 3), ("--exercise", "ex02"), ("--seconds", 7)):
        outcome = in_shell(*arguments, "--resume", *change)
        assert outcome.exit_code == 2 and "Begin anew" in outcome.output.replace("\n", " "), outcome.output
    monkeypatch.setattr(journal, "_digest_of_checks", lambda: "other")
    assert in_shell(*arguments, "--resume").exit_code == 2
    for text in (b"", b"no json\n", b"[1]\n", b'{"journal": 99}\n', b"\xff\xfe\n"):
        (tmp_path / "grades_run.jsonl").write_bytes(text)
        assert in_shell(*arguments, "--resume").exit_code == 2


def test_an_interrupted_run_is_not_thrown_away_by_accident(tmp_path, quick, monkeypatch):
    folder = a_class(tmp_path / "class", 3)
    arguments = ("--submissions", folder, "--out", tmp_path / "grades.csv", "--exercise", "ex01")
    graded = classroom.grade

    def interrupted(exercise, submission, sandbox, **options):
        if submission.student == "student1":
            raise KeyboardInterrupt
        return graded(exercise, submission, sandbox, **options)

    monkeypatch.setattr(classroom, "grade", interrupted)
    assert in_shell(*arguments).exit_code == 130
    refused = in_shell(*arguments)
    assert refused.exit_code == 2 and "--resume" in refused.output
    monkeypatch.setattr(classroom, "grade", graded)
    assert in_shell(*arguments, "--fresh").exit_code == 0
    assert (tmp_path / "grades_run.jsonl.old").exists()


def test_a_journal_holds_reports_whole(tmp_path):
    exercise = small()
    finding = Finding("diagnosis", "says", "tried", "got", "expected", ("a", "b"), "traceback", "printed")
    terms = journal.Terms.of([exercise], seed=1, hints=2)
    submission = Submission("ada\ufffd", GOOD)
    report = replace(report_for(exercise, submission, note="n"), hints=3)
    report = replace(report, results=(replace(report.results[0], finding=finding), *report.results[1:]))
    with journal.begin(tmp_path / "run.jsonl", terms) as opened:
        opened.add("ada\udcff", submission, report)
    with journal.go_on(tmp_path / "run.jsonl", terms) as opened:
        found = opened.find("ada\udcff", exercise, submission)
        assert (found.results, found.note, found.seed, found.hints) == (report.results, "n", 1, 3)
        assert opened.find("ada\udcfe", exercise, submission) is None
        assert opened.find("ada\udcff", exercise, replace(submission, source=STUB)) is None


@fenced
def test_a_real_run_is_stopped_at_once_and_gone_on_with(tmp_path, monkeypatch):
    """Ctrl-C while two submissions run that would never end."""
    made = []
    monkeypatch.setattr(scratch, "make", lambda make=scratch.make: made.append(make()) or made[-1])
    exercise = small(1, seconds=60.0, total_seconds=60.0)
    endless = in_softmax("while True: pass")
    handed_in = students(GOOD, WRONG, endless, endless)
    terms = journal.Terms.of([exercise], seed=3, hints=1)
    before = psutil.Process().num_fds()
    with journal.begin(tmp_path / "run.jsonl", terms) as opened:

        def interrupt():
            while len(opened.known) < 2:
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            grade_class(handed_in, [exercise], jobs=2, journal=opened)
    assert psutil.Process().num_fds() <= before
    assert made and not any(directory.exists() for directory in made)
    handed_in[2:] = [replace(one, submissions={"ex01": Submission(one.name, GOOD)}) for one in handed_in[2:]]
    with journal.go_on(tmp_path / "run.jsonl", terms) as opened:
        assert len(opened.known) == 2
        graded = grade_class(handed_in, [exercise], jobs=2, journal=opened)
    assert [one.earned for one in graded] == [graded[0].points, graded[1].earned, graded[0].points, graded[0].points]


# ------------------------------------------------------------------------------------------------------------ without fences


def test_without_fences_nobodys_code_runs(tmp_path):
    proof = tmp_path / "it ran"
    source = f"open({str(proof)!r}, 'w').close()\n".encode() + GOOD
    with pytest.raises(Unfenced, match="allow-unfenced"):
        grade_class(students(source), [small(1)], kernel_fences=False)
    assert not proof.exists()
    graded = grade_class(students(source), [small(1)], kernel_fences=False, allow_unfenced=True)
    assert proof.exists() and graded[0].reports[0].protections.missing


@pytest.mark.parametrize("lacks", ["Landlock", "seccomp", "both"])
def test_one_fence_that_is_missing_is_enough_to_refuse(monkeypatch, tmp_path, lacks):
    missing = ["Landlock (x)", "seccomp (y)"] if lacks == "both" else [f"{lacks} (x)"]
    monkeypatch.setattr(Sandbox, "fences", lambda self: Protections(["something"], missing))
    outcome = in_shell(
        "--submissions", a_class(tmp_path / "class", 1), "--exercise", "ex01", "--out", tmp_path / "g.csv"
    )
    assert outcome.exit_code == 2 and missing[0] in outcome.output.replace("\n", " ")


@fenced
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_fence_that_fails_later_stops_that_submission_before_its_code(monkeypatch, tmp_path, shared, at):
    """The fences of each child are looked at, not only those of the first."""
    fence_in, proofs = Child.fence_in, [tmp_path / str(number) for number in range(3)]

    def failing(self):
        protections = fence_in(self)
        if any(str(proofs[at]).encode() in file.read_bytes() for file in self.directory.iterdir()):
            protections.missing.append("something")
        return protections

    monkeypatch.setattr(Child, "fence_in", failing)
    handed_in = students(*(GOOD + f"# {proof}\n".encode() for proof in proofs))
    graded = grade_class(handed_in, [small(1)])
    assert [GRADER_ERROR in one.diagnoses for one in graded] == [number == at for number in range(3)]
    assert "for want of a fence" in str(graded[at].reports[0])

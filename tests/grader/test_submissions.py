"""Who handed in what: folders, loose files, archives and platforms' names. None of it runs any student's code."""

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from flashlib.course.grader.exercise import load_exercise
from flashlib.course.grader.roster import read_roster
from flashlib.course.grader.submissions import ARCHIVE_BYTES, find_students, read_submission

SOURCE = b"import math\nx = 1\n"


@pytest.fixture(scope="module")
def exercises():
    return [load_exercise("ex01"), load_exercise("ex02")]


def put(file: Path, content: bytes = SOURCE, age: float = 0.0) -> Path:
    """A file that was last changed `age` seconds before the first day of 2024."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    os.utime(file, (1704067200 - age,) * 2)
    return file


def zipped(members: dict[str, bytes], when=(2024, 1, 1, 12, 0, 0)) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name, when), content, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def tarred(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1704067200
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def of(found, name: str):
    (student,) = [each for each in found.students if each.name == name]
    return student.submissions["ex01"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("ada.zip", zipped({"ex01_softmax.py": SOURCE})),
        ("ada.ZIP", zipped({"homework/deep/er/ex01_softmax.py": SOURCE, "__MACOSX/._ex01_softmax.py": b"\0\5"})),
        ("ada.tar", tarred({"./ex01_softmax.py": SOURCE}, "w")),
        ("ada.tar.gz", tarred({"homework/ex01_softmax.py": SOURCE})),
        ("ada.tgz", tarred({"a/b/c/d/e/f/ex01_softmax.py": SOURCE})),
        ("ada.tar.xz", tarred({"ex01_softmax.py": SOURCE}, "w:xz")),
        ("ada/handed in.zip", zipped({"ex01_softmax.py": SOURCE})),
        ("ada/outer.zip", zipped({"inner.tar.gz": tarred({"ex01_softmax.py": SOURCE})})),
        ("ada.zip", zipped({"..\\..\\windows\\ex01_softmax.py": SOURCE})),
        ("ada.zip", zipped({"../../../etc/ex01_softmax.py": SOURCE})),
    ],
)
def test_archives_are_opened_and_nothing_is_written(tmp_path, exercises, file, content):
    put(tmp_path / file, content)
    before = sorted(tmp_path.rglob("*"))
    found = find_students(tmp_path, exercises)
    assert of(found, "ada").source == SOURCE and not found.ignored
    assert sorted(tmp_path.rglob("*")) == before


def bomb() -> bytes:
    return zipped({"ex01_softmax.py": b"#" * (80 << 20)})


def lying_zip() -> bytes:
    """An archive whose directory says that the file has ten bytes."""
    data = bytearray(zipped({"ex01_softmax.py": b"#" * (1 << 20)}))
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 10)
    return bytes(data)


def encrypted() -> bytes:
    data = bytearray(zipped({"ex01_softmax.py": SOURCE}))
    for mark, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        data[data.index(mark) + offset] |= 1
    return bytes(data)


def linking_tar(kind: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("ex01_softmax.py")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    return stream.getvalue()


def many_files() -> bytes:
    return zipped({f"{number}.txt": b"" for number in range(3000)})


@pytest.mark.parametrize(
    ("file", "content", "diagnosis"),
    [
        ("ada.zip", b"this is no archive", "not-a-file"),
        ("ada.tar.gz", b"\x1f\x8b" + os.urandom(50), "not-a-file"),
        ("ada.zip", zipped({"ex01_softmax.py": SOURCE})[:-30], "not-a-file"),
        ("ada.tar", b"", "not-a-file"),
        ("ada.zip", encrypted(), "not-a-file"),
        ("ada.zip", bomb(), "file-too-large"),
        ("ada.zip", lying_zip(), None),  # cut short or refused, by Python's version; never 1 MiB
        ("ada.zip", many_files(), "not-a-file"),
        ("ada.tar", linking_tar(tarfile.SYMTYPE), "not-a-file"),
        ("ada.tar", linking_tar(tarfile.LNKTYPE), "not-a-file"),
        ("ada.tar", linking_tar(tarfile.CHRTYPE), "not-a-file"),
        ("ada.rar", b"Rar!", "missing-file"),
        ("ada.7z", b"7z", "missing-file"),
        ("ada.zip", zipped({"a/": b""}), "missing-file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_archives_that_are_no_use_are_that_students_own_problem(tmp_path, exercises, file, content, diagnosis):
    put(tmp_path / file, content)
    put(tmp_path / "zoe/ex01_softmax.py")
    found = find_students(tmp_path, exercises)
    submission = of(found, "ada")
    assert of(found, "zoe").source == SOURCE
    if diagnosis is None:
        assert submission.source is None or len(submission.source) < 1000
    else:
        assert submission.source is None and submission.problem.diagnosis == diagnosis, submission
        assert len(submission.problem.says) < 500


def test_an_archive_larger_than_the_limit_is_not_unpacked(tmp_path, exercises):
    with (tmp_path / "ada.tar").open("wb") as file:
        file.truncate(ARCHIVE_BYTES + 10)
    assert of(find_students(tmp_path, exercises), "ada").problem.diagnosis == "not-a-file"


def test_a_whole_class_in_one_archive(tmp_path, exercises):
    names = {"ada/ex01_softmax.py": SOURCE, "bob/x/EX01_softmax.py": SOURCE, "__MACOSX/ada/._ex01_softmax.py": b"\0"}
    put(tmp_path / "class.zip", zipped({**names, "carl_12345_99999_ex01_softmax.py": SOURCE}))
    found = find_students(tmp_path / "class.zip", exercises)
    assert [student.name for student in found.students] == ["ada", "bob", "carl"]
    assert all(student.submissions["ex01"].source == SOURCE for student in found.students)


@pytest.mark.parametrize(
    "litter",
    ["__MACOSX/ada/._ex01_softmax.py", ".DS_Store", "Thumbs.db", "desktop.ini", ".git/config", "__pycache__/x.pyc"],
)
def test_litter_of_systems_is_nobody(tmp_path, exercises, litter):
    put(tmp_path / "ada/ex01_softmax.py")
    put(tmp_path / litter, b"litter")
    put(tmp_path / "ada" / litter, b"litter")
    found = find_students(tmp_path, exercises)
    assert [student.name for student in found.students] == ["ada"] and not found.ignored
    assert of(found, "ada").source == SOURCE


@pytest.mark.parametrize(
    "name", ["EX01_softmax.py", "ex01_Softmax.PY", "Ex01_SOFTMAX.Py", "ex01_softmax (3).py", "ex01.py"]
)
def test_a_file_named_otherwise_is_taken_and_named(tmp_path, exercises, name):
    put(tmp_path / "ada" / name)
    submission = of(find_students(tmp_path, exercises), "ada")
    assert submission.source == SOURCE and name in submission.note


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("ex01_softmax.ipynb", "ex01_softmax.ipynb (a notebook"),
        ("EX01_Softmax.IPYNB", "(a notebook"),
        ("softmax.py", "ada/softmax.py"),
        ("exercise1.py", "ada/exercise1.py"),
        ("ex01_softmax.py.txt", "ex01_softmax.py.txt"),
        ("work/ex01_softmax.rar", "ex01_softmax.rar (an archive of a kind"),
        ("/".join("abcdefghijklmnop") + "/ex01_softmax.py", None),
    ],
)
def test_where_the_file_is_missing_it_is_said_what_was_found(tmp_path, exercises, file, said):
    put(tmp_path / "ada" / file)
    (student,) = find_students(tmp_path, exercises).students
    problem = student.submissions["ex01"].problem
    assert problem.diagnosis == "missing-file"
    assert (said in problem.says) if said else any("were not searched" in note for note in student.notes)


def test_what_belongs_to_nobody_is_said(tmp_path, exercises):
    put(tmp_path / "ada/ex01_softmax.py")
    for name in ("README.txt", "grades.csv", "notes.py"):
        put(tmp_path / name)
    found = find_students(tmp_path, exercises)
    assert [line.partition(":")[0] for line in found.ignored] == ["README.txt", "grades.csv", "notes.py"]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("ex01_softmax.py", "ex01_softmax-1.py"),
        ("ex01_softmax-1.py", "ex01_softmax-2.py"),
        ("ex01_softmax (1).py", "ex01_softmax (2).py"),
        ("first/ex01_softmax.py", "second/ex01_softmax.py"),
        ("second/ex01_softmax.py", "first/ex01_softmax.py"),
        ("ex01_mine.py", "ex01_other.py"),
        ("EX01_softmax.py", "sub/ex01_softmax.py"),
    ],
)
def test_the_newest_wins_by_time(tmp_path, exercises, older, newer):
    put(tmp_path / "ada" / older, b"# old", age=3600)
    put(tmp_path / "ada" / newer, b"# new")
    submission = of(find_students(tmp_path, exercises), "ada")
    assert submission.source == b"# new" and older.rpartition("/")[2] in submission.note


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("ex01_softmax.py", "ex01_softmax-1.py"),
        ("ex01_softmax-2.py", "ex01_softmax-10.py"),
        ("ex01_a_v1.py", "ex01_a_v2.py"),
    ],
)
def test_the_newest_wins_by_its_number_where_times_are_the_same(tmp_path, exercises, older, newer):
    put(tmp_path / "ada" / newer, b"# new")
    put(tmp_path / "ada" / older, b"# old")
    assert of(find_students(tmp_path, exercises), "ada").source == b"# new"


def test_the_newest_of_a_folder_and_an_archive_and_a_late_folder(tmp_path, exercises):
    put(tmp_path / "ada/ex01_softmax.py", b"# first", age=10**6)
    put(tmp_path / "ada.zip", zipped({"ex01_softmax.py": b"# second"}, when=(2023, 12, 30, 0, 0, 0)))
    assert of(find_students(tmp_path, exercises), "ada").source == b"# second"
    put(tmp_path / "ada_LATE/ex01_softmax.py", b"# third", age=-(10**6))
    submission = of(find_students(tmp_path, exercises), "ada")
    assert submission.source == b"# third" and submission.late


@pytest.mark.parametrize(
    "names",
    [
        ["adalovelace_12345_67890_ex01_softmax.py", "adalovelace_LATE_12345_67999_ex02_online_softmax.py"],
        [
            "Ada Lovelace_4711_assignsubmission_file_ex01_softmax.py",
            "Ada Lovelace_4711_assignsubmission_file_/ex02_online_softmax.py",
        ],
        ["ada_ex01_softmax.py", "ada_LATE_ex02_online_softmax.py"],
        ["ada (late)/ex02_online_softmax.py", "ada/ex01_softmax.py"],
        ["ada-late.zip", "ada/ex02_online_softmax.py"],
        [
            "hw1_ada77_attempt_2024-01-02-10-00-00_ex01_softmax.py",
            "hw1_ada77_attempt_2024-01-03-10-00-00_ex02_online_softmax.py",
        ],
    ],
)
def test_late_marks_and_ids_do_not_make_another_student(tmp_path, exercises, names):
    for name in names:
        put(tmp_path / name, zipped({"ex01_softmax.py": SOURCE}) if name.endswith(".zip") else SOURCE)
    (student,) = find_students(tmp_path, exercises).students
    assert [one.source for one in student.submissions.values()] == [SOURCE, SOURCE]


@pytest.mark.parametrize(
    "names",
    [
        ["ada_12345", "ada_12346"],
        ["Ann Late", "Ann"],
        ["Ada", "ada"],
        ["ada (1)", "ada (2)"],
        ["team_1_2_x", "team_1_3_x"],
        ["kate", "kate_lat"],
    ],
)
def test_two_students_are_never_taken_for_one(tmp_path, exercises, names):
    for name in names:
        put(tmp_path / name / "ex01_softmax.py", name.encode())
    found = find_students(tmp_path, exercises)
    assert {student.submissions["ex01"].source for student in found.students} == {name.encode() for name in names}


ODD_NAMES = [
    b"ada\xff",
    b"ada\xfe",
    b"ada\x01",
    b"ada\x02",
    b"ad\xe2\x80\xaea",
    b"=1+1",
    b"caf\xc3\xa9",
    b"cafe\xcc\x81",
    b"a\nb",
    b"a b",
    b" ",
    b"'",
]


def test_every_name_however_odd_is_a_student_of_its_own(tmp_path, exercises):
    for name in ODD_NAMES:
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        with open(os.path.join(folder, b"ex01_softmax.py"), "wb") as file:
            file.write(b"#" + repr(name).encode())
    students = find_students(tmp_path, exercises).students
    assert {os.fsencode(student.key): student.submissions["ex01"].source for student in students} == {
        name: b"#" + repr(name).encode() for name in ODD_NAMES
    }
    assert len({student.name for student in students}) == len(ODD_NAMES)
    for student in students:
        assert student.name.encode("utf-8") and student.name.isprintable()
        assert all(one.student == student.name for one in student.submissions.values())


def test_a_folder_that_cannot_be_listed_is_that_students_own_problem(tmp_path, exercises, monkeypatch):
    put(tmp_path / "ada/ex01_softmax.py")
    put(tmp_path / "zoe/ex01_softmax.py")
    listdir = os.listdir

    def refusing(path):
        if str(path).endswith("ada"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    found = find_students(tmp_path, exercises)
    assert "Permission denied" in of(found, "ada").problem.says and of(found, "zoe").source == SOURCE


ROSTER = "Last name,First name,ID number,Email address\nLovelace,Ada,4711,ada.l@uni.edu\nHopper,Grace,4712,hopper@uni.edu\nNoether,Emmy,4713,en@uni.edu\n"


@pytest.mark.parametrize(
    ("name", "student"),
    [
        ("Ada Lovelace", "Ada Lovelace"),
        ("lovelaceada_98_12345_ex01_softmax.py", "Ada Lovelace"),
        ("LOVELACE_Ada/ex01_softmax.py", "Ada Lovelace"),
        ("4712", "Grace Hopper"),
        ("homework_4712_final/ex01_softmax.py", "Grace Hopper"),
        ("hopper_ex01_softmax.py", "Grace Hopper"),
        ("ada.l@uni.edu/ex01_softmax.py", "Ada Lovelace"),
        ("47123", None),
        ("Ada Lovelace and Grace Hopper", None),
        ("somebody", None),
    ],
)
def test_a_roster_settles_names(tmp_path, exercises, name, student):
    (tmp_path / "roster.csv").write_text("\ufeff" + ROSTER)
    roster = read_roster(tmp_path / "roster.csv")
    file = name if name.endswith(".py") else f"{name}/ex01_softmax.py"
    put(tmp_path / "class" / file)
    found = find_students(tmp_path / "class", exercises, roster)
    graded = {each.name for each in found.students if each.submissions["ex01"].source}
    absent = {each.name for each in found.students if not each.submissions["ex01"].source}
    if student:
        assert graded == {student} and len(absent) == 2 and found.students[0].listed
    else:
        assert len(absent) == 3 and not graded & absent
        assert any("not on the roster" in note for each in found.students for note in each.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a column"),
        ("a,b\n1,2\n", "needs a column"),
        ("name\nx\nx\n", "twice"),
        ("name\n\n", "nobody|needs a column"),
    ],
)
def test_a_roster_that_says_nothing_is_refused(tmp_path, text, message):
    (tmp_path / "roster.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_roster(tmp_path / "roster.csv")


def test_modules_beside_a_file_come_with_it(tmp_path, exercises):
    put(tmp_path / "ada/ex01_softmax.py", b"from helpers import f\nimport torch, more\n")
    put(tmp_path / "ada/helpers.py", b"import deeper\n")
    put(tmp_path / "ada/deeper.py", b"x = 1\n")
    put(tmp_path / "ada/unused.py")
    put(tmp_path / "ada/else/more.py")
    put(tmp_path / "bob/helpers.py")
    submission = of(find_students(tmp_path, exercises), "ada")
    assert submission.beside == {"helpers.py": b"import deeper\n", "deeper.py": b"x = 1\n"}
    assert read_submission("me", tmp_path / "ada/ex01_softmax.py").beside == submission.beside
    assert of(find_students(tmp_path, exercises), "ada").digest == submission.digest
    put(tmp_path / "ada/deeper.py", b"x = 2\n")
    assert of(find_students(tmp_path, exercises), "ada").digest != submission.digest


@pytest.mark.parametrize("what", ["nothing", "a file", "an empty folder"])
def test_a_folder_without_submissions_is_refused(tmp_path, exercises, what):
    place = tmp_path / "class"
    if what == "a file":
        place.write_bytes(SOURCE)
    elif what == "an empty folder":
        place.mkdir()
    with pytest.raises(ValueError, match="neither|holds no"):
        find_students(place, exercises)


def exported(stem: str, source: bytes, day: int) -> tuple[str, bytes]:
    """What Otter's `export` writes from a notebook `stem`, with the file of the exercise among what goes with it."""
    name = f"{stem}_2026_11_{day:02}T10_11_12_345678.zip"
    inside = {f"{stem}.ipynb": b"{}", ".OTTER_LOG": b"\x80\4", "__zip_filename__": name.encode()}
    return name, zipped({**inside, "ex01_softmax.py": source}, (2026, 11, 1, 0, 0, 0))


@pytest.mark.parametrize("order", [(3, 7), (7, 3)])
def test_what_otter_exports_is_taken_and_the_later_of_two_exports_wins(tmp_path, exercises, order):
    for day in order:
        name, content = exported("ex01_softmax", SOURCE + b"# %d" % day, day)
        put(tmp_path / f"ada_{name}", content)
        put(tmp_path / f"lovelace_4711_{1000 + day}_{name}", content)  # downloaded from Canvas
    name, content = exported("ex01", SOURCE, 5)
    put(tmp_path / "ann lee" / name, content)
    put(tmp_path / f"bo_LATE_{name}", content)
    found = find_students(tmp_path, exercises)
    assert [each.name for each in found.students] == ["ada", "ann lee", "bo", "lovelace"] and not found.ignored
    assert of(found, "ada").source == of(found, "lovelace").source == SOURCE + b"# 7"
    assert of(found, "ann lee").source == of(found, "bo").source == SOURCE
    assert of(found, "bo").late and not of(found, "ada").late

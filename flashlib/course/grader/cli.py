"""`flashlib grade`: one exercise of your own, or the submissions of a class."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

FULL_MARKS, NOT_FULL_MARKS, USAGE, GRADER_FAILED = 0, 1, 2, 3


def grade(
    name: Annotated[str | None, typer.Argument(metavar="[EXERCISE]", help="Your own exercise, such as ex01.")] = None,
    file: Annotated[Path | None, typer.Option(help="Your solution, if not the one in exercises/.")] = None,
    hints: Annotated[int, typer.Option(min=0, help="Hints to show for each check that fails.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Repeat a run with the inputs it had.")] = None,
    submissions: Annotated[
        Path | None, typer.Option(help="Grade a class: a folder with one folder per student.")
    ] = None,
    exercise: Annotated[
        list[str] | None, typer.Option(help="With --submissions: which exercises (default: all).")
    ] = None,
    out: Annotated[Path, typer.Option(help="With --submissions: the table of grades.")] = Path("grades.csv"),
    feedback: Annotated[
        Path | None, typer.Option(help="With --submissions: folder for feedback.html and results.json per student.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="With --submissions: how many to grade at a time.")] = 1,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Time limit for one call, on a slow machine.")] = None,
) -> None:
    """Grade an exercise, yours or a whole class's.

    `flashlib grade ex01` checks your exercises/ex01_*.py. `flashlib grade --submissions DIR --out grades.csv --jobs 4`
    grades a class. Exit status: 0 full marks (a class: everything was graded), 1 not full marks, 2 wrong usage,
    3 the grader itself failed.
    """
    from flashlib.course.grader.sandbox.session import SandboxError

    if (name is None) == (submissions is None):
        raise typer.BadParameter("give either an exercise (flashlib grade ex01) or --submissions DIR")
    try:
        if submissions is None:
            status = _grade_own(name, file, hints, seed, seconds)
        else:
            table, pages = out, feedback or out.with_name(f"{out.stem}_feedback")
            status = _grade_class(submissions, exercise, table, pages, jobs, hints, seed, seconds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except SandboxError as error:
        typer.echo(f"flashlib grade: {error}", err=True)
        status = GRADER_FAILED
    raise typer.Exit(status)


def _grade_own(name: str, file: Path | None, hints: int, seed: int | None, seconds: float | None) -> int:
    from flashlib.course.grader.engine import GRADER_ERROR
    from flashlib.course.grader.front_door import check

    report = check(name, file=file, hints=hints, seed=seed, seconds=seconds)
    typer.echo(str(report))
    if GRADER_ERROR in report.diagnoses:
        return GRADER_FAILED
    return FULL_MARKS if report.passed else NOT_FULL_MARKS


def _grade_class(
    directory: Path,
    names: list[str] | None,
    table: Path,
    feedback: Path,
    jobs: int,
    hints: int,
    seed: int | None,
    seconds: float | None,
) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from flashlib.course.grader.classroom import grade_class, write_results
    from flashlib.course.grader.engine import GRADER_ERROR
    from flashlib.course.grader.exercise import exercise_names, load_exercise
    from flashlib.course.grader.submissions import read_folder

    exercises = [load_exercise(name) for name in names or exercise_names()]
    students = read_folder(directory, exercises)
    if seconds is not None:
        exercises = [replace(each, limits=replace(each.limits, seconds=seconds)) for each in exercises]
    table.parent.mkdir(parents=True, exist_ok=True)
    feedback.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(TextColumn("grading"), *columns[1:], console=console) as progress:
        task = progress.add_task("grading", total=len(students) * len(exercises))
        graded = grade_class(
            students,
            exercises,
            jobs=jobs,
            hidden=(directory, table, feedback),
            seed=seed,
            hints=hints,
            done=lambda: progress.advance(task),
        )
    write_results(graded, exercises, table, feedback)
    _print_summary(graded, exercises, table, feedback)
    failed = any(GRADER_ERROR in one.diagnoses for one in graded)
    return GRADER_FAILED if failed else FULL_MARKS


def _print_summary(graded, exercises, table: Path, feedback: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if os.isatty(1) else 160)
    summary = Table("student", *(exercise.name for exercise in exercises), "total", "diagnoses")
    for one in graded:
        cells = [str(report.earned) for report in one.reports]
        summary.add_row(Text(one.student), *cells, f"{one.earned}/{one.points}", Text(", ".join(one.diagnoses)))
    console.print(summary)
    protections = next(
        (report.protections for one in graded for report in one.reports if report.protections.active), None
    )
    for line in protections.active if protections else []:
        console.print(Text(f"fence: {line}"))
    for line in protections.missing if protections else []:
        console.print(Text(f"NO fence: {line}"))
    console.print(Text(f"{table} · a page and a results.json for each student under {feedback}/"))

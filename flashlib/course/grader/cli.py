"""`flashlib grade`: one exercise of your own, or the submissions of a class."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

FULL_MARKS, NOT_FULL_MARKS, USAGE, GRADER_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True)
class ClassOptions:
    """What `flashlib grade --submissions` was asked for; the options say what each means."""

    directory: Path
    exercises: list[str]
    table: Path
    feedback: Path
    jobs: int
    hints: int
    seed: int | None
    seconds: float | None
    roster: Path | None
    policy: Path | None
    regrade: tuple[str, ...]
    resume: bool
    fresh: bool
    allow_unfenced: bool

    @property
    def journal(self) -> Path:
        return self.table.with_name(f"{self.table.stem}_run.jsonl")


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
    roster: Annotated[
        Path | None, typer.Option(help="With --submissions: a CSV of the class, which settles who is who.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="With --submissions: YAML with weights, deadlines, penalties, marks by hand.")
    ] = None,
    regrade: Annotated[
        list[str] | None,
        typer.Option(help="With --submissions: grade this student of the last run anew, keep the rest."),
    ] = None,
    gradescope: Annotated[
        Path | None,
        typer.Option(help="Write an autograder for Gradescope, of the exercises of --exercise, to this zip."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --submissions: go on with a run that was interrupted.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="With --submissions: begin anew, though an interrupted run is there.")
    ] = False,
    allow_unfenced: Annotated[
        bool,
        typer.Option(
            "--allow-unfenced", help="With --submissions: grade even if this system cannot fence in their code."
        ),
    ] = False,
) -> None:
    """Grade an exercise, yours or a whole class's.

    `flashlib grade ex01` checks your exercises/ex01_*.py. `flashlib grade --submissions DIR --out grades.csv --jobs 4`
    grades a class, and writes down each result at once: after an interruption, the same with `--resume` goes on. Exit
    status: 0 full marks (a class: everything was graded), 1 not full marks, 2 wrong usage, 3 the grader itself failed,
    130 interrupted.
    """
    from flashlib.course.grader.classroom import Unfenced
    from flashlib.course.grader.sandbox.outcome import SandboxError

    if sum(each is not None for each in (name, submissions, gradescope)) != 1:
        raise typer.BadParameter(
            "give either an exercise (flashlib grade ex01), or --submissions DIR, or --gradescope ZIP"
        )
    try:
        if gradescope is not None:
            status = _build_for_gradescope(gradescope, exercise or [])
        elif submissions is None:
            status = _grade_own(name, file, hints, seed, seconds)
        else:
            pages = feedback or out.with_name(f"{out.stem}_feedback")
            status = _grade_class(
                ClassOptions(
                    submissions,
                    exercise or [],
                    out,
                    pages,
                    jobs,
                    hints,
                    seed,
                    seconds,
                    roster,
                    policy,
                    tuple(regrade or ()),
                    resume,
                    fresh,
                    allow_unfenced,
                )
            )
    except Unfenced as error:
        typer.echo(f"flashlib grade: {error}", err=True)
        status = USAGE
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except KeyboardInterrupt:
        status = INTERRUPTED
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


def _grade_class(options: ClassOptions) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from flashlib.course.grader.classroom import grade_class
    from flashlib.course.grader.engine import GRADER_ERROR
    from flashlib.course.grader.exercise import exercise_names, load_exercise
    from flashlib.course.grader.gradebook import write_results
    from flashlib.course.grader.policy import read_policy
    from flashlib.course.grader.roster import read_roster
    from flashlib.course.grader.submissions import find_students

    exercises = [load_exercise(name) for name in options.exercises or exercise_names()]
    roster = read_roster(options.roster) if options.roster else None
    policy = read_policy(options.policy) if options.policy else None
    handed_in = find_students(options.directory, exercises, roster)
    if options.seconds is not None:
        exercises = [replace(each, limits=replace(each.limits, seconds=options.seconds)) for each in exercises]
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.feedback.mkdir(parents=True, exist_ok=True)
    journal = _journal(options, exercises)
    _forget(journal, handed_in.students, options.regrade)
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(handed_in.students) * len(exercises)
    with journal, Progress(TextColumn("grading"), *columns[1:], console=console) as progress:
        task = progress.add_task("grading", total=total)
        try:
            graded = grade_class(
                handed_in.students,
                exercises,
                jobs=options.jobs,
                hidden=(options.directory, options.table, options.feedback, options.journal),
                hints=options.hints,
                allow_unfenced=options.allow_unfenced,
                journal=journal,
                done=lambda: progress.advance(task),
            )
        except KeyboardInterrupt:
            typer.echo(f"Interrupted. {len(journal.known)} of {total} are graded; go on with --resume.", err=True)
            raise
        failed = write_results(graded, exercises, options.table, options.feedback, policy)
        errors = any(GRADER_ERROR in one.diagnoses for one in graded)
        if not errors:
            journal.finish()
    _print_summary(graded, exercises, options)
    for line in [*(f"not taken: {each}" for each in handed_in.ignored), *(f"NOT written: {each}" for each in failed)]:
        typer.echo(line)
    return GRADER_FAILED if errors or failed else FULL_MARKS


def _journal(options: ClassOptions, exercises):
    from flashlib.course.grader.classroom import fresh_seed
    from flashlib.course.grader.journal import Terms, begin, go_on, read_terms

    if options.resume or options.regrade:
        seed = read_terms(options.journal).seed if options.seed is None else options.seed
        return go_on(options.journal, Terms.of(exercises, seed=seed, hints=options.hints))
    seed = fresh_seed() if options.seed is None else options.seed
    return begin(options.journal, Terms.of(exercises, seed=seed, hints=options.hints), fresh=options.fresh)


def _forget(journal, students, names: tuple[str, ...]) -> None:
    for name in names:
        keys = {student.key for student in students if student.name == name}
        if not keys:
            raise ValueError(f"--regrade: there is no student {name!r}; names are those of the table")
        for entry in [entry for entry in journal.known if entry[0] in keys]:
            del journal.known[entry]


def _build_for_gradescope(file: Path, names: list[str]) -> int:
    from flashlib.course.grader.autograder import build

    if not names:
        raise ValueError("say with --exercise which exercises the assignment asks for")
    build(file, names)
    typer.echo(f"{file}: upload it as the autograder of an assignment that asks for {', '.join(names)}")
    return FULL_MARKS


def _print_summary(graded, exercises, options: ClassOptions) -> None:
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
    console.print(Text(f"{options.table} · a page and a results.json for each student under {options.feedback}/"))

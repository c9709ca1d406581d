"""No answer, however odd, makes a check fail in a way that its author did not think of."""

import random
import secrets

import pytest
from grader.odd_answers import with_odd_answers

from flashlib.course.grader.engine import GRADER_ERROR, UNUSABLE, Submission, grade
from flashlib.course.grader.exercise import exercise_names, load_exercise
from flashlib.course.grader.report import as_page, as_text
from flashlib.course.grader.results import Results
from flashlib.course.grader.sandbox.session import REPOSITORY


@pytest.mark.parametrize("name", exercise_names())
def test_no_check_breaks_on_odd_answers(sandbox_of, rounds, name):
    """Any call of a right solution may answer with any odd thing: the checks are met at whatever depth they have by then."""
    exercise, inputs, results = load_exercise(name), secrets.randbits(32), Results()
    solution = (REPOSITORY / "solutions" / exercise.file).read_bytes()
    for _ in range(rounds):
        seed = secrets.randbits(32)
        rate = random.Random(seed).choice([0.1, 0.3, 0.6, 1.0])
        submission = Submission("odd", with_odd_answers(solution, seed, rate))
        report = grade(exercise, submission, sandbox_of(exercise), seed=inputs, results=results)
        broken = [
            each for each in report.results if each.finding and each.finding.diagnosis in (GRADER_ERROR, UNUSABLE)
        ]
        assert not broken, f"inputs {inputs}, oddities {seed} at {rate}: {[(r.name, r.finding) for r in broken]}"
        as_text(report).encode()
        as_page("odd", [report]).encode()


def test_an_answer_that_a_check_cannot_use_is_shown_and_is_not_called_the_checks_fault(sandbox_of):
    from dataclasses import replace

    exercise = replace(load_exercise("ex01"), properties=[])

    @exercise.property(points=1)
    def careless(t):
        """takes the answer for a list of numbers"""
        sum(t.call("answer"))

    for answer, shown in (("['a']", "('a')"), ("None", "None"), ("{'x': 1}", "x")):
        source = f"def answer():\n    return {answer}\n".encode()
        report = grade(exercise, Submission("me", source), sandbox_of(exercise))
        finding = report.results[0].finding
        assert finding.diagnosis == UNUSABLE and shown in finding.got and "TypeError" in finding.says, finding
    assert grade(exercise, Submission("me", b"def answer():\n    return [1]\n"), sandbox_of(exercise)).passed

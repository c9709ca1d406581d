"""A child that writes on the grader's channel what no honest one does: some verdict, never an error of the grader."""

import importlib.util
import json
import random
import re
import secrets
from collections import Counter
from dataclasses import asdict

import pytest
from grader.forged_replies import Forger, answering, forge

from flashlib.course.grader.engine import GRADER_ERROR, UNUSABLE, Submission, _Run
from flashlib.course.grader.exercise import exercise_names, load_exercise
from flashlib.course.grader.findings import Finding, Result
from flashlib.course.grader.journal import report_from
from flashlib.course.grader.report import Report, as_gradescope, as_page, as_text
from flashlib.course.grader.results import Results
from flashlib.course.grader.sandbox.outcome import StudentError
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.course.grader.trial import show

READ = 5_000  # forged replies that are read, in all; each exercise has its share
JUDGED = 900  # forged replies that a check goes on with
IN_PROCESS = [name for name in exercise_names() if "triton" not in load_exercise(name).preload]


def solution_of(exercise):
    spec = importlib.util.spec_from_file_location(exercise.file[:-3], REPOSITORY / "solutions" / exercise.file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def quick(exercise):
    """The checks but those on inputs so large that an answer takes long: what is forged is the same there."""
    return [
        each for each in exercise.properties if not any(word in each.name for word in ("tiled", "memory", "copied"))
    ]


def judge(exercise, prop, process, inputs, results):
    run = _Run(exercise, Submission("forger", b""), None, inputs, results)
    run.process = process
    return run.result(prop)


def can_be_written(name: str, result: Result) -> None:
    report = Report(name, "title", "forger", (result,), 1, 1.0)
    as_text(report).encode()
    as_page("forger", [report]).encode()
    json.dumps(as_gradescope([report])).encode()
    assert report_from(json.loads(json.dumps(asdict(report)))) == report


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_forged_reply_is_never_an_error_of_the_grader(name, rounds):
    exercise, seed, results = load_exercise(name), secrets.randbits(32), Results()
    module, inputs = solution_of(exercise), secrets.randbits(32)
    rng, seen, groups = random.Random(seed), Counter(), tuple(exercise.forbidden)
    honest = Forger(module, -1, rng, groups)
    for prop in quick(exercise):
        assert judge(exercise, prop, honest, inputs, results).passed
    where = f"{name}, seed {seed}, inputs {inputs}"

    for number in range(rounds * READ // len(IN_PROCESS)):
        frame = forge(rng.choice(honest.honest), rng)

        def answer(request, fd, frame=frame):
            nonce = json.loads(request[8:])["id"]
            return re.sub(rb'"id": "[0-9a-f]{16}"', f'"id": "{nonce}"'.encode(), frame, count=1)

        with answering(answer, frozenset(groups)) as child:
            try:
                seen["read"] += show(child.call("f").value).encode() is not None
            except StudentError as error:
                assert error.kind != "timeout", where
                seen[error.kind] += 1
                if number % 20 == 0:
                    finding = Finding(error.kind, error.message, traceback=error.traceback)
                    can_be_written(name, Result("f", "title", 1, finding))
    assert min(seen["read"], seen["tampered"]) > 10 and len(seen) > 3, (where, seen)

    for _ in range(rounds * JUDGED // len(IN_PROCESS)):
        prop, at = rng.choice(quick(exercise)), rng.choice([1, 1, 1, 2, 3, 5])
        result = judge(exercise, prop, Forger(module, at, rng, groups), inputs, results)
        if result.finding:
            assert result.finding.diagnosis not in (GRADER_ERROR, UNUSABLE), (where, prop.name, result.finding)
            can_be_written(name, result)

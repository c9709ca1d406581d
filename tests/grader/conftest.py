"""What the tests of the grader share."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from flashlib.course.grader.engine import sandbox_for
from flashlib.course.grader.exercise import Exercise
from flashlib.course.grader.sandbox.session import Sandbox


@pytest.fixture(scope="session")
def rounds() -> int:
    """How many fresh draws a test makes that gets surer with more: one; `make test-long` says how many."""
    return int(os.environ.get("FLASHLIB_ROUNDS", "1"))


@pytest.fixture(scope="session")
def sandbox_of() -> Iterator[Callable[[Exercise], Sandbox]]:
    """The sandbox for an exercise. Those that need the same loaded share one: to load PyTorch takes longer than to grade a file."""
    with ExitStack() as opened:
        sandboxes: dict[tuple, Sandbox] = {}

        def sandbox(exercise: Exercise) -> Sandbox:
            needed = exercise.preload, tuple(exercise.environment.items())
            if needed not in sandboxes:
                sandboxes[needed] = opened.enter_context(sandbox_for(exercise))
            return sandboxes[needed]

        yield sandbox

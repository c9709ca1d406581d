"""What chapter 17 runs: the network that is played, its deadlocks, steps of a ring, processes that end, and the figure."""

import os

import pytest
import torch

from flashlib import masks
from flashlib.course import figures, widgets
from flashlib.course.chapters import many_gpus
from flashlib.course.chapters.many_gpus import BadRequest, Deadlock, Network, play, ring_steps, run_on_ranks
from flashlib.course.display import Figure
from flashlib.course.grader.sandbox.session import REPOSITORY
from flashlib.parallel import LAYOUTS

SOLUTION = REPOSITORY / "solutions/ex18_ring_attention.py"


def test_what_is_sent_arrives_whoever_comes_first():
    def first():
        came = yield ("exchange", 1, torch.tensor([1.0]), 2)
        return float(came)

    def second():
        yield ("send", 2, torch.tensor([2.0]))
        came = yield ("receive", 0)
        return float(came)

    def third():
        came = yield ("receive", 1)
        yield ("send", 0, came + 1)
        return float(came)

    results, network = play([first(), second(), third()])
    assert results == [3.0, 1.0, 2.0]
    assert network.sent == {(0, 1): 4, (1, 2): 4, (2, 0): 4}


def test_ranks_that_wait_for_one_another_are_seen():
    def waits(rank):
        yield ("send", (rank + 1) % 3, torch.zeros(1))
        yield ("receive", (rank - 1) % 3)

    with pytest.raises(Deadlock, match="rank 0 waits for rank 1 to receive; rank 1 waits for rank 2 to receive"):
        play([waits(rank) for rank in range(3)])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("send", "yielded str"),
        (("swap", 1), "'swap' with 1 more"),
        (("send", 0, torch.zeros(1)), "names rank 0"),
        (("receive", 2), "names rank 2"),
        (("exchange", 1, torch.zeros(1), None), "names rank None"),
        (("send", 1, 3), "sends int"),
    ],
)
def test_what_is_no_request(request_, message):
    with pytest.raises(BadRequest, match=message):
        Network(2).ask(0, request_)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_hold_all_pairs(layout):
    for rule in (masks.Causal(), masks.Window(5, 0), masks.Unmasked()):
        steps = ring_steps(41, 4, layout, rule)
        assert sum(step.pairs for step in steps) == rule.intervals(1, 41, 41).visible_pairs()
        assert all(step.received == 0 for step in steps if step.source == step.rank)


def test_processes_answer_and_none_is_left():
    assert run_on_ranks(_number, 3, 5) == [5, 6, 7]
    with pytest.raises(RuntimeError, match="rank 1 raised ValueError: not here"):
        run_on_ranks(_raises_on_one, 2)
    with pytest.raises(RuntimeError, match="rank 0 ended with exit code 3"):
        run_on_ranks(_leaves, 2)


def _number(mesh, start):
    return start + mesh.get_local_rank()


def _raises_on_one(mesh):
    if mesh.get_local_rank() == 1:
        raise ValueError("not here")


def _leaves(mesh):
    if mesh.get_local_rank() == 0:
        os._exit(3)


def test_the_solution_runs_on_processes():
    assert many_gpus.exercise_on_processes(str(SOLUTION)).startswith("4 processes: within the error budget")
    stub = REPOSITORY / "exercises" / SOLUTION.name
    assert many_gpus.exercise_on_processes(str(stub)).endswith(
        "is not written yet: this cell runs it on 4 processes once it is."
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_figure_tells_the_steps(layout):
    figure = figures.ring_sweep(layout, 1, length=16)
    assert isinstance(figure, Figure) and "rank 3 has the keys of rank 2" in figure.alt
    with pytest.raises(ValueError, match="step must lie between 0 and 3"):
        figures.ring_sweep(layout, 4)


def test_the_explorer_without_widgets_is_its_figure(monkeypatch):
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    assert isinstance(widgets.ring_explorer(), Figure)

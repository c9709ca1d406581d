"""The server's memory, its figure and its stepper: what is counted, and what is drawn."""

import random

import pytest

from flashlib.course import figures, widgets
from flashlib.course.chapters.serving import SCRIPT, Request, replay, serve_contiguous, serve_paged


def test_contiguous_rooms_by_hand():
    """Two rooms of 8: a and b run for two and three steps, c takes a's room."""
    served = serve_contiguous([Request(3, 2), Request(1, 3), Request(6, 1)], memory=16, capacity=8)
    assert [(m.running, m.held, m.reserved) for m in served.moments] == [(2, 6, 16), (2, 8, 16), (2, 11, 16)]
    assert served.mean_running == 2 and served.in_use == 25 / 48 and served.preempted == 0


def test_pages_by_hand():
    """Four pages of 2. a and b want a third page each in the same step; b, which came last, has to begin again."""
    served = serve_paged([Request(3, 2), Request(3, 2)], memory=8, page_size=2)
    assert [(m.running, m.held, m.reserved) for m in served.moments] == [(2, 8, 8), (1, 5, 6), (1, 4, 4), (1, 5, 6)]
    assert served.preempted == 1


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_every_answer_is_written_whatever_the_memory(page_size):
    seed = random.randrange(2**32)
    print(f"seed = {seed}")
    rng = random.Random(seed)
    requests = [Request(rng.randint(0, 40), rng.randint(1, 30)) for _ in range(30)]
    wanted = sum(request.answer for request in requests)
    served = serve_contiguous(requests, memory=160, capacity=80)
    assert sum(m.running for m in served.moments) == wanted
    served = serve_paged(requests, memory=160, page_size=page_size)
    # What is written before a request is preempted is written again.
    assert sum(m.running for m in served.moments) >= wanted
    assert all(m.held <= m.reserved <= 160 for m in served.moments)
    assert all(m.reserved - m.held < page_size * m.running for m in served.moments if m.running)
    roomy = serve_paged(requests, memory=10_000, page_size=page_size)
    assert roomy.preempted == 0 and sum(m.running for m in roomy.moments) == wanted


@pytest.mark.parametrize("serve", [lambda r: serve_contiguous(r, 100, 10), lambda r: serve_paged(r, 10, 4)])
def test_a_request_that_never_fits_is_refused(serve):
    with pytest.raises(ValueError, match="the longest request, 11 tokens, must fit"):
        serve([Request(1, 1), Request(6, 5)])


def test_the_script_shows_what_the_chapter_says():
    said = [replay(step).said for step in range(len(SCRIPT) + 1)]
    assert said[0] == "nothing has happened"
    assert said[9] == "b is done: 3 pages become free"
    assert said[11] == "d continues a: no page is taken"
    assert said[12] == "d brings 1 token: 1 page taken"  # the copy of the shared page
    assert said[13] == "a brings 2 tokens: no page taken"
    assert said[15] == "e brings 14 tokens: out of pages, nothing is written"
    assert said[17] == "e brings 14 tokens: 4 pages taken"
    for step in range(len(SCRIPT) + 1):
        for page_size in (1, 2, 8, 16):
            replay(step, page_size=page_size)
    with pytest.raises(ValueError, match="steps must be from 0 to 17"):
        replay(18)


def test_page_map_tells_where_everything_is():
    now = replay(14)
    figure = figures.page_map(now.cache, now.names, title="Now")
    table = now.cache.block_table(list(now.names.values()))
    pages = {
        name: ", ".join(str(page) for page in row.tolist() if page >= 0)
        for name, row in zip(now.names, table, strict=True)
    }
    assert figure.alt == (
        f"Now. a: 15 tokens on {pages['a']}; c: 9 tokens on {pages['c']}; d: 20 tokens on {pages['d']}; "
        "3 shared, 3 of 12 pages free."
    )
    assert figure.size[0] <= 900
    with pytest.raises(ValueError, match="names must name all requests"):
        figures.page_map(now.cache, {"a": 0}, title="Now")


def test_page_map_of_nothing():
    now = replay(0, page_size=16)
    assert figures.page_map(now.cache, {}, title="Empty").alt == "Empty. 0 shared, 3 of 3 pages free."


def test_stepper_without_widgets_is_the_figure(monkeypatch):
    monkeypatch.setenv("FLASHLIB_NONINTERACTIVE", "1")
    assert widgets.page_stepper(step=11).alt.startswith("Step 11: d continues a: no page is taken.")

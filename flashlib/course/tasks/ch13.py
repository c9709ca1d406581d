"""Chapter 13: where a token lies, and how many pages are needed."""

from __future__ import annotations

from flashlib.course.tasks.task import Task, Wrong


def place_of(table: list[int], token: int, page_size: int) -> tuple[int, int]:
    return table[token // page_size], token % page_size


def pages_to_take(length: int, new: int, page_size: int) -> int:
    return -(-(length + new) // page_size) - -(-length // page_size)


TASKS = (
    Task(
        "13-place",
        "place_of",
        place_of,
        (
            Wrong("the table is not asked", "token // page_size says which of the request's pages; the table says where that lies.", lambda table, t, size: (t // size, t % size)),
            Wrong("page and slot are swapped", "The page is the whole part of the division, the slot its remainder.", lambda table, t, size: (t % size, table[t // size])),
            Wrong("the slot is counted from the beginning of the request", "Each page begins again with slot 0.", lambda table, t, size: (table[t // size], t)),
        ),
        lambda g: [([5, 2, 7], t, 4) for t in (0, 3, 4, 11)] + [([9], 0, 1)],
        lines=1,
    ),
    Task(
        "13-pages-to-take",
        "pages_to_take",
        pages_to_take,
        (
            Wrong("the room in the last page is not used", "The last page may have free slots.", lambda length, new, size: -(-new // size)),
            Wrong("rounded down", "One token more than a page holds needs a page more.", lambda length, new, size: (length + new) // size - length // size),
            Wrong("the pages that it has are counted too", "How many more does it need?", lambda length, new, size: -(-(length + new) // size)),
        ),
        lambda g: [(0, 5, 4), (5, 3, 4), (5, 4, 4), (8, 1, 4), (8, 0, 4), (3, 10, 16)],
        lines=1,
    ),
)  # fmt: skip

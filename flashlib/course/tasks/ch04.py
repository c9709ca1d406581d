"""Chapter 04: intervals, and the kind of a tile."""

from __future__ import annotations

from flashlib.course.tasks.task import Task, Wrong


def causal_interval(row: int, q_len: int, kv_len: int) -> tuple[int, int]:
    return 0, max(0, row + kv_len - q_len + 1)


def intersect(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return max(a[0], b[0]), min(a[1], b[1])


def tile_kind(starts: list[int], stops: list[int], first: int, last: int) -> str:
    seen = [max(0, min(stop, last) - max(start, first)) for start, stop in zip(starts, stops, strict=True)]
    return "full" if min(seen) == last - first else "partial" if max(seen) else "skip"


def _kind(of_tile):
    def wrong(starts, stops, first, last):
        seen = [max(0, min(stop, last) - max(start, first)) for start, stop in zip(starts, stops, strict=True)]
        return of_tile(seen, last - first)

    return wrong


def _touching(starts, stops, first, last):
    seen = [min(stop, last) >= max(start, first) for start, stop in zip(starts, stops, strict=True)]
    whole = all(start <= first and stop >= last for start, stop in zip(starts, stops, strict=True))
    return "full" if whole else "partial" if any(seen) else "skip"


TASKS = (
    Task(
        "04-causal",
        "causal_interval",
        causal_interval,
        (
            Wrong("aligned top-left", "The last query sits at the last key. Where does row 0 sit then?", lambda i, q, k: (0, i + 1)),
            Wrong("a token does not see itself", "The end is not included, so it lies one behind the token's own key.", lambda i, q, k: (0, max(0, i + k - q))),
            Wrong("the end can be negative", "With more queries than keys the first rows see nothing: 0 to 0.", lambda i, q, k: (0, i + k - q + 1)),
            Wrong("every row sees all keys", "Only keys up to the row's own position.", lambda i, q, k: (0, k)),
        ),
        lambda g: [(0, 4, 4), (3, 4, 4), (0, 1, 512), (1, 4, 12), (0, 6, 3), (5, 6, 3)],
        lines=1,
    ),
    Task(
        "04-both",
        "intersect",
        intersect,
        (
            Wrong("the union was taken", "A pair counts if both allow it: which start, and which stop?", lambda a, b: (min(a[0], b[0]), max(a[1], b[1]))),
            Wrong("the earlier start was taken", "A key before either start is hidden.", lambda a, b: (min(a[0], b[0]), min(a[1], b[1]))),
            Wrong("the later stop was taken", "A key behind either stop is hidden.", lambda a, b: (max(a[0], b[0]), max(a[1], b[1]))),
        ),
        lambda g: [((0, 7), (5, 9)), ((3, 8), (0, 12)), ((5, 9), (0, 6))],
        lines=1,
    ),
    Task(
        "04-kind",
        "tile_kind",
        tile_kind,
        (
            Wrong("only the first row is asked", "A tile has many rows. It is full if all of them see all of it.", _kind(lambda seen, n: "full" if seen[0] == n else "partial" if seen[0] else "skip")),
            Wrong("full as soon as one row sees all of it", "Without a mask inside, the other rows would see too much.", _kind(lambda seen, n: "full" if max(seen) == n else "partial" if max(seen) else "skip")),
            Wrong("skipped as soon as one row sees nothing", "The other rows still need it.", _kind(lambda seen, n: "full" if min(seen) == n else "partial" if min(seen) else "skip")),
            Wrong("intervals that only touch the tile count as seen", "The end is not included: [0, 4) and [4, 8) have nothing in common.", _touching),
        ),
        lambda g: [
            ([0, 0], [8, 9], 0, 4), ([0, 0], [4, 5], 4, 8), ([0, 0], [3, 4], 4, 8), ([0, 0], [8, 5], 4, 8), ([0, 5], [2, 8], 0, 4),
            ([0, 0], [5, 8], 4, 8), ([8, 8], [12, 12], 4, 8),
        ],
    ),
)  # fmt: skip

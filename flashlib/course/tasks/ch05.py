"""Chapter 05: shared heads, rotations, and the size of a cache."""

from __future__ import annotations

import math

from flashlib.course.tasks.task import Task, Wrong


def kv_head_of(head: int, q_heads: int, kv_heads: int) -> int:
    return head // (q_heads // kv_heads)


def turn_pair(first: float, second: float, position: int, theta: float) -> tuple[float, float]:
    cos, sin = math.cos(position * theta), math.sin(position * theta)
    return first * cos - second * sin, first * sin + second * cos


def _turn(angle=lambda m, t: m * t, swap=False):
    def wrong(first, second, position, theta):
        cos, sin = math.cos(angle(position, theta)), math.sin(angle(position, theta))
        turned = first * cos - second * sin, first * sin + second * cos
        return turned[::-1] if swap else turned

    return wrong


def tokens_read(prompt: int, written: int, cached: bool) -> int:
    return prompt + written - 1 if cached else sum(prompt + step for step in range(written))


def cache_bytes(layers: int, kv_heads: int, head_dim: int, tokens: int, itemsize: int) -> int:
    return 2 * layers * kv_heads * head_dim * tokens * itemsize


TASKS = (
    Task(
        "05-kv-head",
        "kv_head_of",
        kv_head_of,
        (
            Wrong("the remainder was taken", "Neighbors share: 0, 0, 0, 1, 1, 1, ...", lambda h, q, k: h % k),
            Wrong("divided by the number of KV heads", "By how many queries is a KV head shared?", lambda h, q, k: h // k),
            Wrong("the remainder of the group was taken", "All heads of a group use the same KV head.", lambda h, q, k: h % (q // k)),
        ),
        lambda g: [(h, q, k) for q, k in ((9, 3), (8, 2), (4, 4), (6, 1)) for h in range(q)],
        lines=1,
    ),
    Task(
        "05-turn",
        "turn_pair",
        turn_pair,
        (
            Wrong("turned the other way", "Look at the sign before the sine in the first row.", _turn(lambda m, t: -m * t)),
            Wrong("the position does not count", "Position m turns by m times theta.", _turn(lambda m, t: t)),
            Wrong("position and angle are added", "Position m turns by m times theta.", _turn(lambda m, t: m + t)),
            Wrong("the two channels are swapped", "The first row of the matrix makes the first channel.", _turn(swap=True)),
        ),
        lambda g: [(1.0, 0.0, 1, 0.5), (0.3, -2.0, 7, 0.1), (1.0, 1.0, 0, 1.0), (-1.0, 0.25, 1000, 0.01)],
    ),
    Task(
        "05-tokens-read",
        "tokens_read",
        tokens_read,
        (
            Wrong("the last token written is read too", "Nothing follows it, so nobody reads it.", lambda p, w, c: p + w if c else sum(p + s for s in range(w))),
            Wrong("without a cache only the prompt is read again", "The tokens written so far are read again, too.", lambda p, w, c: p + w - 1 if c else p * w),
            Wrong("the cache makes no difference", "With it, no token goes through the model twice.", lambda p, w, c: sum(p + s for s in range(w))),
            Wrong("a step without a cache reads its own token already", "The first step reads the prompt and writes one token.", lambda p, w, c: p + w - 1 if c else sum(p + s + 1 for s in range(w))),
        ),
        lambda g: [(p, w, c) for p, w in ((36, 8), (1, 1), (100, 3)) for c in (True, False)],
        lines=3,
    ),
    Task(
        "05-cache-bytes",
        "cache_bytes",
        cache_bytes,
        (
            Wrong("keys without values", "The values are kept, too.", lambda a, h, d, n, b: a * h * d * n * b),
            Wrong("one layer alone", "Every layer has keys and values of its own.", lambda a, h, d, n, b: 2 * h * d * n * b),
            Wrong("numbers are counted, not bytes", "How many bytes does a number take?", lambda a, h, d, n, b: 2 * a * h * d * n),
            Wrong("the square of the tokens", "Nothing here is a matrix of scores: a token keeps its own key and value.", lambda a, h, d, n, b: 2 * a * h * d * n * n * b),
        ),
        lambda g: [(30, 3, 64, 1, 4), (32, 8, 128, 131072, 2), (2, 5, 7, 11, 2)],
        lines=1,
    ),
)  # fmt: skip

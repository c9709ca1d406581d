# Exercise 13: Shared prefixes
# difficulty 4/5 · importance 4/5 · about 60 minutes
# Chapter: notebooks/14_injection_and_prefixes.ipynb
#
# Check your work with `flashlib grade ex13`, or in a notebook with `check("ex13")`.

"""Shared prefixes: requests that begin alike read their common keys once.

A system prompt is the same for everyone; below it, several requests ask about the same document. Kept as one cache for each
request, these keys are held and read as often as there are requests.
"""

import torch  # noqa: F401
from torch import Tensor


def shared_prefix_attention(
    q: Tensor,
    levels: list[tuple[Tensor, Tensor, list[int]]],
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """Causal attention of B requests, each over its prefixes followed by its own keys.

    A level is ``(k_prefix, v_prefix, members)``: ``k_prefix [G, Hkv, P, D]`` and ``v_prefix [G, Hkv, P, Dv]`` hold the keys and
    values of G prefixes of P tokens, and request b begins with prefix ``members[b]`` of them. Several requests may share one,
    and some prefix may have no request. G and P differ from level to level. All prefixes lie in the past of all queries.

    Behind its prefixes, request b has ``lengths[b]`` own tokens, of which the last Sq are the queries.

    With ``R = Hq / Hkv`` query heads in a group, the query heads 0 .. R - 1 look at KV head 0, the next R at KV head 1, and so
    on.

    Args:
        q: ``[B, Hq, Sq, D]``.
        levels: one or more.
        k: ``[B, Hkv, S, D]``. v: ``[B, Hkv, S, Dv]``. What lies behind the first ``lengths[b]`` tokens may be anything, NaN too,
            and does not count. Everything is float32; any strides; do not change it.
        lengths: int64 ``[B]``, from Sq to S.

    Returns:
        ``(out, lse)``: float32 ``[B, Hq, Sq, Dv]``, and the natural logarithm of the sum of the exponentials of each row's scores,
        over all the keys that it sees, float32 ``[B, Hq, Sq]``. Scores are scaled by ``1 / sqrt(D)``.

    Each prefix is read once per call, however many requests share it, and never copied.
    """
    raise NotImplementedError("write shared_prefix_attention here")

# Exercise 12: Chunked KV injection with bounded memory
# difficulty 4/5 · importance 4/5 · about 75 minutes
# Chapter: notebooks/14_injection_and_prefixes.ipynb
#
# Check your work with `flashlib grade ex12`, or in a notebook with `check("ex12")`.

"""KV injection: attention to a memory that is too large to have in memory, and that nobody has put into the prompt.

A memory is keys and values of another text, stored in 16 bits and shared by all requests. It is looked at chunk by chunk, and
the result is that of one softmax over all of it and the request's own keys.
"""

import torch  # noqa: F401
from torch import Tensor


def inject_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_memory: Tensor,
    v_memory: Tensor,
    chunk_size: int,
    alpha: float = 1.0,
    mode: str = "blend",
) -> Tensor:
    """Attention of each request over its own keys, and over a memory that counts alpha times.

    Every query sees all of the memory. Of its own keys it sees those up to its own position: the queries are the last Sq of S
    positions.

    alpha = 0 is attention over the own keys alone, and the memory is then not read (it may hold NaN). alpha = 1 is attention
    over ``cat([k_memory, k])`` and ``cat([v_memory, v])``, in both modes. Between them,

    * ``"blend"`` mixes the outputs of the two: ``(1 - alpha) * (that of alpha = 0) + alpha * (that of alpha = 1)``;
    * ``"gate"`` multiplies ``exp(score)`` of each key of the memory by alpha, in the sum that the softmax divides by, too.

    Args:
        q: ``[B, H, Sq, D]``.
        k: ``[B, H, S, D]``, S at least Sq. v: ``[B, H, S, Dv]``. All three float32; any strides; do not change them.
        k_memory: float16 ``[H, M, D]``, one for all requests. v_memory: float16 ``[H, M, Dv]``. M may be 0.
        chunk_size: how many keys of the memory may be held in float32 at a time. It need not divide M.
        alpha: 0 to 1.
        mode: ``"blend"`` or ``"gate"``.

    Returns:
        float32 ``[B, H, Sq, Dv]``. Scores are scaled by ``1 / sqrt(D)``.

    The memory is read once per call, whatever B is. What is made on the way does not grow with M: one chunk in float32, its
    scores, and results.
    """
    raise NotImplementedError("write inject_chunked here")

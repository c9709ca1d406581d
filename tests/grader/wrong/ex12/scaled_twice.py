# diagnosis: scaled-twice
"""KV injection: attention to a memory that is too large to have in memory, and that nobody has put into the prompt.

A memory is keys and values of another text, stored in 16 bits and shared by all requests. It is looked at chunk by chunk, and
the result is that of one softmax over all of it and the request's own keys.
"""

import math

import torch
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
    batch, _, q_len, head_dim = q.shape
    scale, kv_len = 1 / math.sqrt(head_dim), k.shape[2]
    future = torch.ones(q_len, kv_len, dtype=torch.bool).triu(kv_len - q_len + 1)
    scores = (q @ k.mT * scale * scale).masked_fill(future, -torch.inf)
    own_lse = scores.logsumexp(-1)
    own = torch.exp(scores - own_lse[..., None]) @ v
    if alpha == 0:
        return own

    # The queries of all requests are the rows of one matrix for each head: a chunk is read, and held, once for all of them.
    scale, q = scale, q * scale
    rows = q.transpose(0, 1).flatten(1, 2)  # [H, B * Sq, D]
    out, lse = rows.new_zeros(*rows.shape[:2], v.shape[3]), rows.new_full(rows.shape[:2], -torch.inf)
    for first in range(0, k_memory.shape[1], chunk_size):
        keys = slice(first, first + chunk_size)
        scores = rows @ k_memory[:, keys].float().mT * scale
        both = torch.logaddexp(lse, scores.logsumexp(-1))
        weights = torch.exp(scores - both[..., None])
        out = out * torch.exp(lse - both)[..., None] + weights @ v_memory[:, keys].float()
        lse = both
    out, lse = (x.unflatten(1, (batch, q_len)).transpose(0, 1) for x in (out, lse))

    # The memory's share of the softmax is exp(lse) / (exp(lse) + exp(own_lse)), which is a sigmoid.
    if mode == "gate":
        share = torch.sigmoid(lse + math.log(alpha) - own_lse)
    else:
        share = alpha * torch.sigmoid(lse - own_lse)
    return torch.lerp(own, out, share[..., None])

# diagnosis: scaled-twice
"""Shared prefixes: requests that begin alike read their common keys once.

A system prompt is the same for everyone; below it, several requests ask about the same document. Kept as one cache for each
request, these keys are held and read as often as there are requests.
"""

import torch
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
    q_len, head_dim = q.shape[2:]
    kv_heads, kv_len = k.shape[1:3]

    def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = q @ k.mT / head_dim
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        lse = scores.logsumexp(-1)
        return torch.exp(scores - lse[..., None]) @ v, lse

    grouped = q.unflatten(1, (kv_heads, -1))  # [B, Hkv, R, Sq, D]

    position = lengths[:, None] - q_len + torch.arange(q_len)  # [B, Sq], counted from the first own token
    hidden = torch.arange(kv_len) > position[..., None]  # [B, Sq, S]
    behind = (torch.arange(kv_len) >= lengths[:, None])[:, None, :, None]  # NaN * 0 is NaN: blank before any product
    rows_hidden = hidden[:, None].repeat(1, 1, grouped.shape[2], 1)
    out, lse = attend(grouped.flatten(2, 3), k.masked_fill(behind, 0.0), v.masked_fill(behind, 0.0), rows_hidden)
    out, lse = (x.unflatten(2, (-1, q_len)) for x in (out, lse))  # [B, Hkv, R, Sq, ...]

    for k_prefix, v_prefix, members in levels:
        members = torch.tensor(members)
        for prefix in members.unique().tolist():
            requests = (members == prefix).nonzero().flatten()
            # The queries of these requests, and of all heads of a group, are the rows of one matrix for each KV head.
            rows = grouped[requests].transpose(0, 1)  # [Hkv, n, R, Sq, D]
            piece = attend(rows.flatten(1, 3), k_prefix[prefix], v_prefix[prefix])
            piece_out, piece_lse = (x.unflatten(1, rows.shape[1:4]).transpose(0, 1) for x in piece)
            both = torch.logaddexp(lse[requests], piece_lse)
            own_weight, piece_weight = (torch.exp(x - both)[..., None] for x in (lse[requests], piece_lse))
            out[requests] = own_weight * out[requests] + piece_weight * piece_out
            lse[requests] = both
    return out.flatten(1, 2), lse.flatten(1, 2)

# diagnosis: alpha-outside-the-sum
import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse[..., None]) @ v, lse


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(a[1], b[1])
    out = torch.exp(a[1] - lse)[..., None] * a[0] + torch.exp(b[1] - lse)[..., None] * b[0]
    return out, lse


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
    batch, heads, q_len, _ = q.shape
    kv_len = k.shape[2]
    future = torch.ones(q_len, kv_len, dtype=torch.bool).triu(kv_len - q_len + 1)
    own = attend(q, k, v, future)
    if alpha == 0 or k_memory.shape[1] == 0:
        return own[0]
    rows = q.transpose(0, 1).reshape(heads, batch * q_len, -1)
    memory = None
    for first in range(0, k_memory.shape[1], chunk_size):
        keys = slice(first, first + chunk_size)
        piece = attend(rows, k_memory[:, keys].float(), v_memory[:, keys].float())
        memory = piece if memory is None else merge(memory, piece)
    out, lse = (x.reshape(heads, batch, q_len, *x.shape[2:]).transpose(0, 1) for x in memory)
    if mode == "gate":
        share = torch.sigmoid(lse - own[1])[..., None]
        return (1 - share) * own[0] + alpha * share * out
    return (1 - alpha) * own[0] + alpha * merge(own, (out, lse))[0]

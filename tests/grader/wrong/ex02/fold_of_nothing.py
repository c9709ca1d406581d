# diagnosis: no-pieces
import torch
from torch import Tensor


def update(m: Tensor, l: Tensor, acc: Tensor, scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m_new = torch.maximum(m, scores.amax(-1))
    pivot = m_new.masked_fill(m_new == -torch.inf, 0.0)
    rescale = torch.exp(m - pivot)
    p = torch.exp(scores - pivot[:, None])
    l = l * rescale + p.sum(-1)
    acc = acc * rescale[:, None] + p @ v
    return m_new, l, acc


def online_attention(scores: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    rows, n = scores.shape
    m = torch.full((rows,), -torch.inf)
    l = torch.zeros(rows)
    acc = torch.zeros(rows, v.shape[1])
    for start in range(0, n, block):
        m, l, acc = update(m, l, acc, scores[:, start : start + block], v[start : start + block])
    out = acc / l.masked_fill(l == 0, 1.0)[:, None]
    return out, m + l.log()


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    pivot = torch.maximum(lse_a, lse_b)
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    w_a, w_b = torch.exp(lse_a - pivot)[..., None], torch.exp(lse_b - pivot)[..., None]
    total = w_a + w_b
    out_a = torch.where(w_a == 0, 0.0, out_a)
    out_b = torch.where(w_b == 0, 0.0, out_b)
    out = (w_a * out_a + w_b * out_b) / torch.where(total == 0, 1.0, total)
    return out, pivot + total[..., 0].log()


def fold(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = outs[0], lses[0]
    for i in range(1, len(outs)):
        out, lse = merge(out, lse, outs[i], lses[i])
    return out, lse

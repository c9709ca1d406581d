# diagnosis: keys-read-too-often
import torch


def tiled_attention(q, k, v, block_q, block_k, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = k.float().clone(), v.float().clone()
    out, lse = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype), torch.empty(q.shape[:3])
    some = max(1, block_q // 4)
    for first in range(0, q.shape[2], some):
        rows = q[:, :, first : first + some].float() * scale
        m = torch.full(rows.shape[:3], -torch.inf)
        l, acc = torch.zeros_like(m), torch.zeros(*m.shape, v.shape[-1])
        for start in range(0, k.shape[2], block_k):
            scores = rows @ keys[:, :, start : start + block_k].mT
            m_new = torch.maximum(m, scores.amax(-1))
            rescale, weights = torch.exp(m - m_new), torch.exp(scores - m_new[..., None])
            l = l * rescale + weights.sum(-1)
            acc = acc * rescale[..., None] + weights @ values[:, :, start : start + block_k]
            m = m_new
        out[:, :, first : first + some] = (acc / l[..., None]).to(q.dtype)
        lse[:, :, first : first + some] = m + l.log()
    return out, lse

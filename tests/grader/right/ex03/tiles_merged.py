import torch


def tiled_attention(q, k, v, block_q, block_k, scale=None):
    """Head by head; each tile by itself, with torch.softmax, then merged by its log-sum-exp."""
    if scale is None:
        scale = 1 / q.size(-1) ** 0.5
    out = torch.empty(*q.shape[:3], v.size(-1), dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            for i in range(0, q.size(2), block_q):
                rows = q[b, h, i : i + block_q].float()
                total, mixed = None, None
                for j in range(0, k.size(2), block_k):
                    scores = torch.addmm(torch.zeros(()), rows, k[b, h, j : j + block_k].float().t(), alpha=scale)
                    piece = torch.softmax(scores, dim=1) @ v[b, h, j : j + block_k].float()
                    piece_lse = torch.logsumexp(scores, dim=1)
                    if total is None:
                        total, mixed = piece_lse, piece
                    else:
                        share = torch.sigmoid(piece_lse - total)[:, None]
                        mixed = mixed + share * (piece - mixed)
                        total = torch.logaddexp(total, piece_lse)
                out[b, h, i : i + block_q] = mixed.to(q.dtype)
                lse[b, h, i : i + block_q] = total
    return out, lse

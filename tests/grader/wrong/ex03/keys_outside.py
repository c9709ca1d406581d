# diagnosis: out-rewritten
import torch


def tiled_attention(q, k, v, block_q, block_k, scale=None):
    """FlashAttention-1: each tile of K and V is loaded once, and every block of queries passes by it."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, queries = q.shape[:3]
    running_out = torch.zeros(batch, heads, queries, v.shape[-1])
    running_max = torch.full((batch, heads, queries), float("-inf"))
    running_sum = torch.zeros(batch, heads, queries)
    for keys, values in zip(k.split(block_k, dim=2), v.split(block_k, dim=2), strict=True):
        keys, values = keys.to(torch.float32), values.to(torch.float32)
        for first in range(0, queries, block_q):
            rows = slice(first, first + block_q)
            scores = scale * torch.einsum("bhid,bhjd->bhij", q[:, :, rows].to(torch.float32), keys)
            block_max = scores.max(dim=-1).values
            weights = torch.exp(scores - block_max.unsqueeze(-1))
            old_max, old_sum = running_max[:, :, rows], running_sum[:, :, rows]
            new_max = torch.where(block_max > old_max, block_max, old_max)
            old_part = old_sum * torch.exp(old_max - new_max)
            new_part = torch.exp(block_max - new_max)
            new_sum = old_part + new_part * weights.sum(dim=-1)
            mixed = old_part.unsqueeze(-1) * running_out[:, :, rows] + new_part.unsqueeze(-1) * (weights @ values)
            running_out[:, :, rows] = mixed / new_sum.unsqueeze(-1)
            running_max[:, :, rows], running_sum[:, :, rows] = new_max, new_sum
    return running_out.to(q.dtype), running_max + torch.log(running_sum)

import torch


def tiled_attention(q, k, v, block_q, block_k, scale=None):
    """l is the output of one more value channel that is always 1: one matrix product makes both."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, lses = [], []
    for rows in q.split(block_q, dim=2):
        peak = torch.full(rows.shape[:-1], torch.finfo(torch.float32).min)
        acc = torch.zeros(*rows.shape[:-1], v.shape[-1] + 1)
        for keys, values in zip(k.split(block_k, dim=2), v.split(block_k, dim=2), strict=True):
            with_ones = torch.cat([values.float(), torch.ones(*values.shape[:-1], 1)], dim=-1)
            scores = torch.matmul(rows.float(), keys.float().transpose(2, 3)).mul_(scale)
            higher = torch.maximum(peak, scores.amax(dim=3))
            acc.mul_((peak - higher).exp_().unsqueeze(3)).add_((scores - higher.unsqueeze(3)).exp_() @ with_ones)
            peak = higher
        outs.append((acc[..., :-1] / acc[..., -1:]).to(q.dtype))
        lses.append(peak + acc[..., -1].log())
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

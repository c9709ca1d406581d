import torch


def combine(outs, lses):
    """One after the other, by logaddexp and sigmoid-like shares."""
    out, lse = torch.zeros(outs.shape[1:]), torch.full(lses.shape[1:], -torch.inf)
    for piece, piece_lse in zip(outs, lses, strict=True):
        both = torch.logaddexp(lse, piece_lse)
        lost = (lse == torch.inf) & (piece_lse == torch.inf)
        old, new = _share(lse, both).unsqueeze(-1), _share(piece_lse, both).unsqueeze(-1)
        mixed = old * out + new * torch.where(new > 0, piece, 0.0)
        out = torch.where(lost.unsqueeze(-1), torch.nan, mixed)
        lse = both
    return out, lse


def _share(lse, both):
    share = torch.exp(lse - both)
    share = torch.where(both == torch.inf, (lse == torch.inf).float(), share)
    return torch.where(both == -torch.inf, 0.0, share)


def split_ranges(length, num_splits, block):
    """The first `blocks % num_splits` ranges get one block more."""
    whole, more = divmod((length + block - 1) // block, num_splits)
    ranges, start = [], 0
    for split in range(num_splits):
        stop = min(start + (whole + (split < more)) * block, length)
        ranges.append([start, stop])
        start = stop
    return ranges


def choose_num_splits(length, block, programs, sm_count):
    blocks = (length + block - 1) // block
    times = [
        ((programs * n + sm_count - 1) // sm_count * ((blocks + n - 1) // n + 1), n)
        for n in range(1, max(blocks, 1) + 1)
    ]
    return sorted(times)[0][1]


def split_decode(q, k, v, lengths, num_splits, block, scale=None):
    if scale is None:
        scale = 1 / q.size(2) ** 0.5
    batch, q_heads, _ = q.shape
    kv_heads, v_dim = k.size(1), v.size(3)
    group = q_heads // kv_heads
    out, lse = torch.empty(batch, q_heads, v_dim), torch.empty(batch, q_heads)
    for b in range(batch):
        ranges = split_ranges(lengths[b].item(), num_splits, block)
        for head in range(kv_heads):
            heads = slice(head * group, (head + 1) * group)
            parts = [_one(q[b, heads] * scale, k[b, head, x:y], v[b, head, x:y]) for x, y in ranges]
            out[b, heads], lse[b, heads] = combine(*(torch.stack(part) for part in zip(*parts, strict=True)))
    return out, lse


def _one(rows, keys, values):
    scores = torch.einsum("gd,nd->gn", rows, keys)
    return torch.softmax(scores, 1) @ values, torch.logsumexp(scores, 1)

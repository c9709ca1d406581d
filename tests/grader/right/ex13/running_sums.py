import torch


def shared_prefix_attention(q, levels, k, v, lengths):
    """Maximum, sum and weighted values of each row; requests are sorted by prefix, and each run of them is a slice."""
    batch, q_heads, q_len, dim = q.shape
    kv_heads, _kv_len = k.shape[1:3]
    rows = (q / dim**0.5).reshape(batch, kv_heads, q_heads // kv_heads * q_len, dim)
    m = torch.full(rows.shape[:3], -torch.inf)
    l, acc = torch.zeros(rows.shape[:3]), torch.zeros(*rows.shape[:3], v.shape[-1])
    for k_prefix, v_prefix, members in levels:
        order = sorted(range(batch), key=members.__getitem__)
        first = 0
        while first < batch:
            prefix = members[order[first]]
            stop = first
            while stop < batch and members[order[stop]] == prefix:
                stop += 1
            mine, first = torch.tensor(order[first:stop]), stop
            packed = torch.cat(list(rows[mine]), dim=1)
            scores = torch.bmm(packed, k_prefix[prefix].transpose(1, 2))
            highest = torch.maximum(scores.amax(-1), torch.cat(list(m[mine]), dim=1))
            p = torch.exp(scores - highest[..., None])
            gained = torch.bmm(p, v_prefix[prefix])
            highest, added, gained = (torch.stack(x.chunk(len(mine), 1)) for x in (highest, p.sum(-1), gained))
            fade = torch.exp(m[mine] - highest)
            m[mine], l[mine] = highest, l[mine] * fade + added
            acc[mine] = acc[mine] * fade[..., None] + gained
    for b, length in enumerate(lengths.tolist()):
        scores = rows[b] @ k[b, :, :length].transpose(1, 2)
        position = (torch.arange(scores.shape[1]) % q_len + length - q_len)[:, None]
        scores = scores.masked_fill(torch.arange(length) > position, -torch.inf)
        highest = torch.maximum(scores.amax(-1), m[b])
        p, fade = torch.exp(scores - highest[..., None]), torch.exp(m[b] - highest)
        m[b], l[b] = highest, l[b] * fade + p.sum(-1)
        acc[b] = acc[b] * fade[..., None] + p @ v[b, :, :length]
    out = (acc / l[..., None]).reshape(batch, q_heads, q_len, -1)
    return out, (m + l.log()).reshape(batch, q_heads, q_len)

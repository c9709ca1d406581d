import torch


def inject_chunked(q, k, v, k_memory, v_memory, chunk_size, alpha=1.0, mode="blend"):
    """One online softmax: first over the memory, then on over the own keys. All in the layout [H, B, Sq, ...]."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    scaled = q / q.shape[-1] ** 0.5
    rows, steps = scaled.shape[2], k.shape[2]
    seen = torch.arange(steps) <= torch.arange(rows)[:, None] + steps - rows

    def own_keys(state):
        scores = torch.einsum("hbid,hbjd->hbij", scaled, k).masked_fill(~seen, -torch.inf)
        return step(state, scores, lambda p: torch.einsum("hbij,hbje->hbie", p, v))

    start = q.new_full(q.shape[:3], -torch.inf), q.new_zeros(q.shape[:3]), q.new_zeros(*q.shape[:3], v.shape[-1])
    alone = finish(own_keys(start)).transpose(0, 1)
    if alpha == 0:
        return alone
    state = start
    for k_chunk, v_chunk in zip(k_memory.split(chunk_size, dim=1), v_memory.split(chunk_size, dim=1), strict=True):
        k_chunk, v_chunk = k_chunk.to(q.dtype), v_chunk.to(q.dtype)
        flat = torch.bmm(scaled.flatten(1, 2), k_chunk.transpose(1, 2))
        scores = flat.view(*q.shape[:3], -1)
        state = step(state, scores, lambda p, x=v_chunk: torch.bmm(p.flatten(1, 2), x).view(*p.shape[:3], -1))
    if mode == "gate":
        m, l, acc = state
        state = m, alpha * l, alpha * acc
    together = finish(own_keys(state)).transpose(0, 1)
    return together if mode == "gate" else alone + alpha * (together - alone)


def step(state, scores, weigh):
    m, l, acc = state
    if not scores.shape[-1]:
        return state
    highest = torch.maximum(m, scores.amax(-1))
    p, fade = torch.exp(scores - highest[..., None]), torch.exp(m - highest)
    return highest, l * fade + p.sum(-1), acc * fade[..., None] + weigh(p)


def finish(state):
    _, l, acc = state
    return acc / l[..., None]

import torch


def update(m, l, acc, scores, v):
    both = torch.cat([m[:, None], scores], dim=1)
    new = both.max(dim=1).values
    weights = (both - torch.where(new.isneginf(), 0.0, new)[:, None]).exp()
    old, weights = weights[:, 0], weights[:, 1:]
    return new, old * l + weights.sum(1), torch.einsum("i,id->id", old, acc) + torch.einsum("ij,jd->id", weights, v)


def softmax_of(scores, v):
    """One block, by itself: a piece like any other."""
    peak = scores.max(dim=1).values.nan_to_num(neginf=0.0)
    weights = (scores - peak[:, None]).exp()
    total = weights.sum(1)
    return weights @ v / total.clamp(min=1e-30)[:, None], total.log() + peak


def online_attention(scores, v, block):
    result = None
    for s, values in zip(scores.split(block, dim=1), v.split(block), strict=True):
        piece = softmax_of(s, values)
        result = piece if result is None else merge(*result, *piece)
    return result


def merge(out_a, lse_a, out_b, lse_b):
    lse = torch.logaddexp(lse_a, lse_b)
    share_a = torch.where(lse_a.isneginf(), 0.0, torch.exp(lse_a - lse))
    share_b = torch.where(lse_b.isneginf(), 0.0, torch.exp(lse_b - lse))
    a = torch.where(lse_a.isneginf()[..., None], 0.0, share_a[..., None] * out_a)
    b = torch.where(lse_b.isneginf()[..., None], 0.0, share_b[..., None] * out_b)
    return a + b, lse


def fold(outs, lses):
    if len(outs) == 0:
        return outs.new_zeros(outs.shape[1:]), lses.new_full(lses.shape[1:], -torch.inf)
    if len(outs) == 1:
        empty = lses[0].isneginf()
        return outs[0].masked_fill(empty[..., None], 0.0), lses[0]
    half = len(outs) // 2
    return merge(*fold(outs[:half], lses[:half]), *fold(outs[half:], lses[half:]))

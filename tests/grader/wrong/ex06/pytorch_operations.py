# diagnosis: no-kernel
import torch


def ragged_softmax(x, lengths):
    beyond = torch.arange(x.shape[1]) >= lengths[:, None]
    scores = x.float().masked_fill(beyond, -torch.inf)
    maximum = torch.zeros(len(x), 1)
    if x.shape[1]:
        maximum = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - maximum)
    total = weights.sum(-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)).to(x.dtype)


def packed_softmax(values, cu_seqlens, max_seqlen):
    out = torch.empty_like(values)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        out[start:stop] = ragged_softmax(values[None, start:stop], torch.tensor([stop - start]))[0]
    return out

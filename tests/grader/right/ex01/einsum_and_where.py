import torch
from torch import Tensor


def softmax(x: Tensor) -> Tensor:
    wide = x.double()
    peak = torch.where(wide.isneginf().all(-1, keepdim=True), 0.0, wide.max(-1, keepdim=True).values)
    exponentials = (wide - peak).exp()
    total = exponentials.sum(-1, keepdim=True)
    return torch.where(total > 0, exponentials / total, 0.0).to(x.dtype)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    if scale is None:
        scale = q.size(-1) ** -0.5
    scores = torch.einsum("bhid,bhjd->bhij", q.float() * scale, k.float())
    if causal:
        rows = torch.arange(q.size(2)).flip(0)  # how many queries come after
        columns = torch.arange(k.size(2)).flip(0)  # how many keys come after
        scores = torch.where(columns[None, :] >= rows[:, None], scores, torch.tensor(float("-inf")))
    return torch.einsum("bhij,bhjd->bhid", softmax(scores), v.float()).to(v.dtype)

"""Mistakes that people really make, kept runnable so that a chapter can show what they cost."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["one_pass_attention"]


def one_pass_attention(
    scores: Tensor, values: Tensor, block: int, *, start: float = float("-inf"), rescale_acc: bool = True
) -> Tensor:
    """Attention output of one row by online softmax; with the defaults the right one.

    Args:
        scores: one row, ``[N]``.
        values: ``[N, Dv]``.
        block: scores per step.
        start: where the running maximum starts. The mistake is 0.
        rescale_acc: whether the output accumulated so far is rescaled when the maximum rises. The mistake is False.

    Returns:
        ``[Dv]``.
    """
    m, l, acc = torch.tensor(start), torch.tensor(0.0), torch.zeros(values.shape[1])
    for s, v in zip(scores.split(block), values.split(block), strict=True):
        m_new = torch.maximum(m, s.max())
        rescale = torch.exp(m - m_new)
        p = torch.exp(s - m_new)
        l = l * rescale + p.sum()
        acc = acc * (rescale if rescale_acc else 1.0) + p @ v
        m = m_new
    return acc / l

# diagnosis: untiled, no-kernel
import math

import torch
from torch import Tensor


def product(a, b):
    return (a[..., :, None, :] * b[..., None, :, :]).sum(-1)


def gradients(q, k, v, lse, delta, grad_out, causal, scale):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    q32, k32, v32, do = (
        q.float(),
        k.float().repeat_interleave(group, 1),
        v.float().repeat_interleave(group, 1),
        grad_out.float(),
    )
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    if causal:
        seen = seen.tril(k.shape[2] - q.shape[2])
    p = torch.where(seen, torch.exp(product(q32, k32) * scale - lse[..., None]), 0.0)
    ds = p * (product(do, v32) - delta[..., None]) * scale
    dq, dk, dv = product(ds, k32.mT), product(ds.mT, q32.mT), product(p.mT, do.mT)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def row_delta(out: Tensor, grad_out: Tensor) -> Tensor:
    return (out.float() * grad_out.float()).sum(-1)


def key_value_gradients(q, k, v, lse, delta, grad_out, causal=False, scale=None, block_q=32, block_k=32):
    return gradients(q, k, v, lse, delta, grad_out, causal, scale)[1:]


def query_gradient(q, k, v, lse, delta, grad_out, causal=False, scale=None, block_q=32, block_k=32):
    return gradients(q, k, v, lse, delta, grad_out, causal, scale)[0]


def attention_backward(q, k, v, out, lse, grad_out, causal=False, scale=None, block_q=32, block_k=32):
    return gradients(q, k, v, lse, row_delta(out, grad_out), grad_out, causal, scale)

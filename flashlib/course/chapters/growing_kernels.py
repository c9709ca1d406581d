"""Chapter 07's forward kernel as it grows: five stages, each a kernel that runs, each one idea larger than the one before.

1. :func:`one_tile`: one program, one tile of scores, and nothing else.
2. :func:`over_keys`: the keys pass by in tiles, and the softmax of chapter 02 runs along.
3. :func:`over_rows`: a grid of programs, one for each block of queries, and lengths that no tile divides.
4. :func:`over_heads`: batch entries, heads that share KV heads, any strides, and the log-sum-exp.
5. :func:`in_base_2`: exp2 in place of exp, and one multiplication less for each score.

The next stage is :mod:`flashlib.kernels.forward`. Names are its names: ``i_`` an index of a program, ``o_`` offsets, ``m_`` boolean
masks and, as ``b_m``, the running maximum, ``p_`` pointers, ``b_`` tiles in registers. Shapes stand beside the tiles.

Without a GPU they run in Triton's interpreter: ``TRITON_INTERPRET=1`` before the first import of triton.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def one_tile_kernel(p_q, p_k, p_v, p_out, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    o_m, o_n, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + o_m[:, None] * BLOCK_D + o_d[None, :])  # [BLOCK_M, BLOCK_D]
    b_k = tl.load(p_k + o_n[:, None] * BLOCK_D + o_d[None, :])  # [BLOCK_N, BLOCK_D]
    b_v = tl.load(p_v + o_n[:, None] * BLOCK_D + o_d[None, :])
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
    b_p = tl.exp(b_s - tl.max(b_s, 1)[:, None])
    b_acc = tl.dot(b_p, b_v, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
    tl.store(p_out + o_m[:, None] * BLOCK_D + o_d[None, :], b_acc / tl.sum(b_p, 1)[:, None])


def one_tile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head, q ``[Sq, D]``, k and v ``[Sk, D]``: contiguous, float32, all sizes powers of two from 16 on."""
    out = torch.empty_like(q)
    sizes = {"BLOCK_M": q.shape[0], "BLOCK_N": k.shape[0], "BLOCK_D": q.shape[1]}
    one_tile_kernel[(1,)](q, k, v, out, q.shape[1] ** -0.5, **sizes)
    return out


@triton.jit
def over_keys_kernel(
    p_q, p_k, p_v, p_out, kv_len, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    b_q = tl.load(p_q + o_m[:, None] * BLOCK_D + o_d[None, :])
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, kv_len, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        b_k = tl.load(p_k + o_n[:, None] * BLOCK_D + o_d[None, :])
        b_v = tl.load(p_v + o_n[:, None] * BLOCK_D + o_d[None, :])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        rescale = tl.exp(b_m - m_new)
        b_p = tl.exp(b_s - m_new[:, None])
        b_l = b_l * rescale + tl.sum(b_p, 1)
        b_acc = b_acc * rescale[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        b_m = m_new
    tl.store(p_out + o_m[:, None] * BLOCK_D + o_d[None, :], b_acc / b_l[:, None])


def over_keys(q: Tensor, k: Tensor, v: Tensor, block_n: int = 32) -> Tensor:
    """As :func:`one_tile`, but the number of keys need only be a multiple of `block_n`."""
    out = torch.empty_like(q)
    sizes = {"BLOCK_M": q.shape[0], "BLOCK_N": block_n, "BLOCK_D": q.shape[1]}
    over_keys_kernel[(1,)](q, k, v, out, k.shape[0], q.shape[1] ** -0.5, **sizes)
    return out


@triton.jit
def over_rows_kernel(
    p_q, p_k, p_v, p_out, q_len, kv_len, head_dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0)
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_q = (o_m < q_len)[:, None] & (o_d < head_dim)[None, :]
    b_q = tl.load(p_q + o_m[:, None] * head_dim + o_d[None, :], mask=m_q, other=0.0)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n in range(0, kv_len, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_k = (o_n < kv_len)[:, None] & (o_d < head_dim)[None, :]
        b_k = tl.load(p_k + o_n[:, None] * head_dim + o_d[None, :], mask=m_k, other=0.0)
        b_v = tl.load(p_v + o_n[:, None] * head_dim + o_d[None, :], mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where((o_n < kv_len)[None, :], b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        rescale = tl.exp(b_m - m_new)
        b_p = tl.exp(b_s - m_new[:, None])
        b_l = b_l * rescale + tl.sum(b_p, 1)
        b_acc = b_acc * rescale[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        b_m = m_new
    tl.store(p_out + o_m[:, None] * head_dim + o_d[None, :], b_acc / b_l[:, None], mask=m_q)


def over_rows(q: Tensor, k: Tensor, v: Tensor, block_m: int = 64, block_n: int = 32) -> Tensor:
    """Attention of one head, q ``[Sq, D]``, k and v ``[Sk, D]``: contiguous, float32, any sizes."""
    out = torch.empty_like(q)
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": triton.next_power_of_2(q.shape[1])}
    grid = (triton.cdiv(q.shape[0], block_m),)
    over_rows_kernel[grid](q, k, v, out, q.shape[0], k.shape[0], q.shape[1], q.shape[1] ** -0.5, **sizes)
    return out


@triton.jit
def over_heads_kernel(
    p_q, p_k, p_v, p_out, p_lse, stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, q_heads, group_size, q_len, kv_len, head_dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    i_m, i_head = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_head // q_heads, i_head % q_heads
    i_kv = i_h // group_size
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_q = (o_m < q_len)[:, None] & (o_d < head_dim)[None, :]
    b_q = tl.load(p_q + o_m[:, None] * stride_qs + o_d[None, :] * stride_qd, mask=m_q, other=0.0)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], ACCUMULATE)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], ACCUMULATE)
    for n in range(0, kv_len, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_k = (o_n < kv_len)[:, None] & (o_d < head_dim)[None, :]
        b_k = tl.load(p_k + o_n[:, None] * stride_ks + o_d[None, :] * stride_kd, mask=m_k, other=0.0)
        b_v = tl.load(p_v + o_n[:, None] * stride_vs + o_d[None, :] * stride_vd, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where((o_n < kv_len)[None, :], b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        rescale = tl.exp(b_m - m_new)
        b_p = tl.exp(b_s - m_new[:, None])
        b_l = (b_l * rescale + tl.sum(b_p, 1)).to(ACCUMULATE)
        b_pv = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
        b_acc = (b_acc * rescale[:, None] + b_pv).to(ACCUMULATE)
        b_m = m_new
    o_out = (i_head * q_len + o_m)[:, None] * head_dim + o_d[None, :]
    tl.store(p_out + o_out, (b_acc / b_l[:, None]).to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + i_head * q_len + o_m, b_m + tl.log(b_l.to(tl.float32)), mask=o_m < q_len)


def over_heads(
    q: Tensor, k: Tensor, v: Tensor, block_m: int = 64, block_n: int = 32, accumulate: tl.dtype = tl.float32
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of q ``[B, Hq, Sq, D]`` with k and v ``[B, Hkv, Sk, D]``: float16 or float32, any strides.

    Args:
        accumulate: the dtype of l and of the accumulator. Anything but float32 is a mistake, which the chapter makes.
    """
    out, lse, grid, arguments = _problem(q, k, v, block_m, block_n)
    over_heads_kernel[grid](**arguments, ACCUMULATE=accumulate)
    return out, lse


@triton.jit
def in_base_2_kernel(
    p_q, p_k, p_v, p_out, p_lse, stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, q_heads, group_size, q_len, kv_len, head_dim, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_m, i_head = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_head // q_heads, i_head % q_heads
    i_kv = i_h // group_size
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_kv * stride_kh
    p_v += i_b * stride_vb + i_kv * stride_vh
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    m_q = (o_m < q_len)[:, None] & (o_d < head_dim)[None, :]
    b_q = tl.load(p_q + o_m[:, None] * stride_qs + o_d[None, :] * stride_qd, mask=m_q, other=0.0)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    unit = scale * LOG2_E
    for n in range(0, kv_len, BLOCK_N):
        o_n = n + tl.arange(0, BLOCK_N)
        m_k = (o_n < kv_len)[:, None] & (o_d < head_dim)[None, :]
        b_k = tl.load(p_k + o_n[:, None] * stride_ks + o_d[None, :] * stride_kd, mask=m_k, other=0.0)
        b_v = tl.load(p_v + o_n[:, None] * stride_vs + o_d[None, :] * stride_vd, mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_s = tl.where((o_n < kv_len)[None, :], b_s, float("-inf"))
        m_new = tl.maximum(b_m, tl.max(b_s, 1))
        rescale = tl.exp2((b_m - m_new) * unit)
        b_p = tl.exp2(b_s * unit - (m_new * unit)[:, None])
        b_l = b_l * rescale + tl.sum(b_p, 1)
        b_acc = b_acc * rescale[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
        b_m = m_new
    o_out = (i_head * q_len + o_m)[:, None] * head_dim + o_d[None, :]
    tl.store(p_out + o_out, (b_acc / b_l[:, None]).to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + i_head * q_len + o_m, b_m * scale + tl.log2(b_l) * LN_2, mask=o_m < q_len)


def in_base_2(q: Tensor, k: Tensor, v: Tensor, block_m: int = 64, block_n: int = 32) -> tuple[Tensor, Tensor]:
    """As :func:`over_heads`."""
    out, lse, grid, arguments = _problem(q, k, v, block_m, block_n)
    in_base_2_kernel[grid](**arguments)
    return out, lse


def _problem(q: Tensor, k: Tensor, v: Tensor, block_m: int, block_n: int) -> tuple[Tensor, Tensor, tuple, dict]:
    """Out and LSE to be written, the grid, and the arguments by name, of the two last stages."""
    batch, q_heads, q_len, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments = {"p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse}
    for name, x in (("q", q), ("k", k), ("v", v)):
        arguments |= {f"stride_{name}{axis}": stride for axis, stride in zip("bhsd", x.stride(), strict=True)}
    arguments |= {"q_heads": q_heads, "group_size": q_heads // k.shape[1], "q_len": q_len, "kv_len": k.shape[2]}
    arguments |= {"head_dim": head_dim, "scale": head_dim**-0.5, "BLOCK_M": block_m, "BLOCK_N": block_n}
    arguments |= {"BLOCK_D": triton.next_power_of_2(head_dim)}
    return out, lse, (triton.cdiv(q_len, block_m), batch * q_heads), arguments


def instructions(arch: str = "sm_90") -> dict[str, Counter[str]]:
    """Float32 instructions in the machine code (SASS) of the two last stages, compiled for a GPU that need not be there.

    PTX would not do: the assembler makes several instructions of one of its own.

    Compiled in a process of its own, since in this one Triton may be interpreting.

    Returns:
        by stage: how often ``FMUL``, ``FADD``, ``FFMA``, ``FSETP`` and ``MUFU.EX2`` occur.

    Raises:
        RuntimeError: the compiler failed; says what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "flashlib.course.chapters.growing_kernels", arch]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"compiling for {arch} failed: {answer.stderr[-2000:]}")
    return {stage: Counter(counted) for stage, counted in json.loads(answer.stdout).items()}


def _count_instructions(arch: str) -> dict[str, Counter[str]]:
    from flashlib.launch.inspect import compile_launch
    from flashlib.launch.start import Launch

    q, k, v = (torch.empty(1, 8, 4096, 64, dtype=torch.float16, device="meta") for _ in range(3))
    _, _, grid, arguments = _problem(q, k, v, 64, 64)
    stages = {
        "over_heads": Launch(over_heads_kernel, grid, {**arguments, "ACCUMULATE": tl.float32}),
        "in_base_2": Launch(in_base_2_kernel, grid, arguments),
    }
    operations = r"\b(FMUL|FADD|FFMA|FSETP|MUFU\.EX2)\b"
    return {
        stage: Counter(re.findall(operations, compile_launch(launch, arch).sass)) for stage, launch in stages.items()
    }


if __name__ == "__main__":
    print(json.dumps(_count_instructions(sys.argv[1])))

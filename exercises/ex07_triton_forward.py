# Exercise 07: FlashAttention forward in Triton
# difficulty 4/5 · importance 5/5 · about 90 minutes
# Chapter: notebooks/07_flash_attention_in_triton.ipynb
#
# Check your work with `flashlib grade ex07`, or in a notebook with `check("ex07")`.

"""FlashAttention, forward, as one Triton kernel.

The loops of exercise 3 become a kernel: the outer one, over blocks of queries, disappears into the grid, and each program runs the
inner one, over the keys. Tiles live in registers, and memory is addressed by pointers, strides and masks.

It runs without a GPU, in Triton's interpreter. Set `TRITON_INTERPRET=1` in the environment before Python starts; the grader does.
The grader also compiles it for GPUs (sm_80 and sm_90), which need not be there: the interpreter lets pass what no GPU can run.
"""

import torch  # noqa: F401
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    q_heads,
    group_size,
    q_len,
    kv_len,
    head_dim,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, against all the keys.

    A suggestion: the arguments are yours to change, since only your `attention_forward` calls this. Strides are in elements, group_size is
    Hq / Hkv, and BLOCK_D is the power of two that holds head_dim.
    """
    raise NotImplementedError("write forward_kernel here")


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, block_m: int = 64, block_n: int = 32
) -> tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V and its log-sum-exp, by a Triton kernel.

    Args:
        q: ``[B, Hq, Sq, D]``.
        k, v: ``[B, Hkv, Sk, D]``, where Hq is a multiple of Hkv: query head h looks at KV head h // (Hq / Hkv). All three float16
            or float32, with any strides. D is 16 to 128 and need not be a power of two; all other sizes are at least 1.
        scale: factor on the scores, greater than 0; ``1 / sqrt(D)`` if None.
        block_m, block_n: queries and keys of a tile, powers of two from 16 on. They need not divide Sq and Sk, and may be larger.

    Returns:
        out ``[B, Hq, Sq, D]`` in the inputs' dtype, and lse ``[B, Hq, Sq]`` in float32: the natural logarithm of the sum of
        exp(scaled score) over each query's row.

    Precision: float16 tiles are multiplied as they are; the arithmetic of the softmax and all sums are float32. float32 inputs are
    multiplied in float32 (`input_precision="ieee"`: on a GPU, `tl.dot` would round them to TF32).

    Memory: a program holds one tile of scores at a time. PyTorch only allocates: q, k and v are not changed, copied or padded, and
    nothing outside them is read.
    """
    raise NotImplementedError("write attention_forward here")

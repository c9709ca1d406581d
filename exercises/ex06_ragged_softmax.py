# Exercise 06: A ragged fused softmax in Triton
# difficulty 3/5 · importance 5/5 · about 60 minutes
# Chapter: notebooks/06_first_kernels.ipynb
#
# Check your work with `flashlib grade ex06`, or in a notebook with `check("ex06")`.

"""A ragged softmax in Triton: every row has its own length, and crosses memory once in each direction.

Rows come in two forms. Padded: a matrix whose rows are all as wide as the longest one, and a list of their true lengths.
Packed: one row after the other without gaps, and a list of where they begin (FlashAttention's `cu_seqlens`).

The grader runs your kernels in Triton's interpreter, and compiles them for GPUs (sm_80 and sm_90), which need not be there.

PyTorch's own softmax, log_softmax, logsumexp and their kin, and Triton's, are not there while you are graded: they are what you
write.
"""

import torch  # noqa: F401
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def block_softmax(b_x, m_row):
    """Softmax over the lanes of a block that belong to a row.

    Args:
        b_x: ``[BLOCK]``, float16 or float32: the entries of the row. Lanes outside of it hold anything.
        m_row: ``[BLOCK]`` bool, which lanes belong to the row.

    Returns:
        ``[BLOCK]`` float32, 0 in lanes outside of the row. An entry of -inf gets 0. A row without lanes, or of nothing but
        -inf, gets 0 everywhere.
    """
    raise NotImplementedError("write block_softmax here")


@triton.jit
def padded_kernel(p_x, p_lengths, p_out, stride_row, stride_col, cols, BLOCK: tl.constexpr):
    """Program i writes row i of the answer, all `cols` entries of it.

    Args:
        p_x: address of x[0, 0]; ``x[i, j]`` lies ``i * stride_row + j * stride_col`` elements further.
        p_lengths: address of lengths[0], contiguous.
        p_out: address of out[0, 0]; out is contiguous.
        cols: columns of x and out.
        BLOCK: lanes, a power of two, at least `cols`.
    """
    raise NotImplementedError("write padded_kernel here")


@triton.jit
def packed_kernel(p_values, p_cu_seqlens, p_out, BLOCK: tl.constexpr):
    """Program i writes row i of the answer, and nothing of its neighbors.

    Args:
        p_values: address of values[0], contiguous.
        p_cu_seqlens: address of cu_seqlens[0], contiguous.
        p_out: address of out[0], contiguous.
        BLOCK: lanes, a power of two, at least as many as the longest row has entries.
    """
    raise NotImplementedError("write packed_kernel here")


def ragged_softmax(x: Tensor, lengths: Tensor) -> Tensor:
    """Softmax of each row over its own first entries.

    Args:
        x: ``[rows, cols]``, float16 or float32, any strides (rows apart, columns apart, transposed), up to 16,384 columns,
            a power of two or not. Do not change it. Entries ``x[i, lengths[i]:]`` are padding and may be NaN.
        lengths: ``[rows]``, int32 or int64, contiguous, each from 0 to cols.

    Returns:
        ``[rows, cols]`` in x's dtype, contiguous: the softmax of ``x[i, :lengths[i]]``, and 0 where there is padding. An
        entry of -inf gets 0; a row of length 0, or of nothing but -inf, gets 0 everywhere.

    Precision: the arithmetic is float32, rounded once to x's dtype.

    Traffic: a kernel of yours loads each entry of x that is no padding once, and nothing else of x. No intermediate result
    goes through memory, and x is not copied first.
    """
    raise NotImplementedError("write ragged_softmax here")


def packed_softmax(values: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Softmax of each of the rows that lie one after the other in `values`.

    Args:
        values: ``[total]``, float16 or float32, contiguous. Do not change it.
        cu_seqlens: ``[rows + 1]``, int32, contiguous: row i is ``values[cu_seqlens[i] : cu_seqlens[i + 1]]``, and may be
            empty. ("cu" for cumulative: the lengths of all rows before, summed up.)
        max_seqlen: at least the length of the longest row, at most 16,384. The caller knows it; to find it out here, the
            CPU would have to wait for the GPU.

    Returns:
        ``[total]`` in the dtype of values: the softmax of each row. -inf is treated as in `ragged_softmax`.

    Precision and traffic: as in `ragged_softmax`.
    """
    raise NotImplementedError("write packed_softmax here")

"""From tensors to calls of the CPU kernels; decoding as a PyTorch operator, ``torch.ops.flashlib.cpu_decode``.

It is defined through ``torch.library.Library``, whose calls cost half of what those of a ``custom_op`` do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.launch.checks import check_decoding
from flashlib.launch.cpu.library import Library, Problem, Strides, library
from flashlib.launch.options import KernelOptions, batch_stride, empty_results

__all__ = ["decode", "run_backward", "run_decode", "run_forward"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in kernels/cpu/simd.h
SPLIT = 1024  # keys, where rows are so few that the keys are shared among threads. Fixed, so that no result depends on how many
SPLIT_BELOW = 16  # rows of a head
# Units of work that share a backward: enough for many threads, and no more parts of a head's keys than that takes, because each part
# has a dQ of its own. The problem alone decides, so that gradients are the same bits on any number of threads.
BACKWARD_UNITS = 16
LEAST_PART = 256  # keys

_library = torch.library.Library("flashlib", "FRAGMENT")
_library.define(
    "cpu_decode(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? block_table, int? left, int? right, float scale, "
    "float softcap, int split_size) -> (Tensor, Tensor)"
)
decode = torch.ops.flashlib.cpu_decode


def _decode(q, k, v, lengths, block_table, left, right, scale, softcap, split_size):
    check_decoding(q, k, lengths, block_table, left)  # what is read next lies there
    return run_decode(q, k, v, lengths, block_table, left, right, scale, softcap, split_size, library())


def _fake_decode(q, k, v, *options):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


_library.impl("cpu_decode", _decode, "CPU")
torch.library.register_fake("flashlib::cpu_decode", _fake_decode, lib=_library)


def run_forward(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions, lib: Library) -> tuple[Tensor, Tensor]:
    """``(out, lse)``, ``[B, Hq, Sq, Dv]`` in the dtype of q and fp32 ``[B, Hq, Sq]``, by one variant of the library."""
    q, k, v = (_readable(x) for x in (q, k, v))
    out, lse = empty_results(q, v)
    problem = _problem(q, k, v, options)
    _run_split(problem, out, lse, SPLIT if q.shape[2] < SPLIT_BELOW else 0, lib)
    return out, lse


def run_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, block_table: Tensor | None, left: int | None, right: int | None,
    scale: float, softcap: float, split_size: int, lib: Library,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One decoding step, as :func:`flashlib.inference.decode_attention` has it: ``(out, lse)``.

    Args:
        split_size: keys of a split; 0 for :data:`SPLIT`.

    Raises:
        ValueError: ``block_table`` names a page that does not exist, for a key that some row sees.
    """
    q = _readable(q)
    out, lse = _fake_decode(q, k, v)
    if 0 in (*lse.shape, k.shape[0], k.shape[2]) or (block_table is not None and block_table.shape[1] == 0):
        return out.zero_(), lse.fill_(float("-inf"))
    problem = _problem(q, k, v, KernelOptions(None, None, left, right, None, None, scale, softcap))
    if lengths is not None:
        lengths = lengths.to(torch.int32).contiguous()
        problem.lengths = lengths.data_ptr()
    if block_table is not None:
        problem.pages, problem.page_step = block_table.data_ptr(), block_table.stride(0)
        problem.page_count, problem.page_size = k.shape[0], k.shape[2]
        problem.kv_len = block_table.shape[1] * k.shape[2]
    _run_split(problem, out, lse, split_size or SPLIT, lib)
    if problem.bad_page and block_table is not None:
        request = problem.bad_page - 1
        pages = sorted(set(block_table[request].tolist()))
        raise ValueError(f"block_table names a page outside of 0 to {k.shape[0] - 1} for request {request}: {pages}")
    return out, lse


def _run_split(problem: Problem, out: Tensor, lse: Tensor, split: int, lib: Library) -> None:
    """Fill ``out`` and ``lse``, with the keys cut into splits of so many, 0 for none. They meet in fp32 in memory of this call."""
    problem.out, problem.out_at, problem.lse = out.data_ptr(), _strides(out), lse.data_ptr()
    if split and problem.kv_len > split:
        problem.split, splits = split, -(-problem.kv_len // split)
        partial = [
            torch.empty(splits, *shape, dtype=torch.float32, device=out.device) for shape in (out.shape, lse.shape)
        ]
        problem.partial_out, problem.partial_lse = (x.data_ptr() for x in partial)
    lib.forward(problem)


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, options: KernelOptions,
    lib: Library,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dq, dk, dv)``, shaped and typed like q, k, v, by one variant of the library."""
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q, k, v, out, grad_out = (_readable(x) for x in (q, k, v, out, grad_out))
    lse = lse.contiguous()
    problem = _problem(q, k, v, options)
    problem.out, problem.out_at, problem.lse = out.data_ptr(), _strides(out), lse.data_ptr()
    problem.grad_out, problem.grad_out_at = grad_out.data_ptr(), _strides(grad_out)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
        problem.grad_lse = grad_lse.data_ptr()
    problem.dq, problem.dk, problem.dv = (x.data_ptr() for x in gradients)
    pairs, kv_len = k.shape[0] * k.shape[1], k.shape[2]
    problem.parts = max(1, min(-(-BACKWARD_UNITS // pairs), kv_len // LEAST_PART))
    sums = 0 if problem.parts == 1 and q.dtype == torch.float32 else problem.parts * q.numel()
    workspace = torch.empty(-(-lse.numel() // 16) * 16 + sums, dtype=torch.float32, device=q.device)
    problem.workspace = workspace.data_ptr()
    lib.backward(problem)
    dq, dk, dv = gradients
    return dq, dk, dv


def _problem(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> Problem:
    problem = Problem()
    problem.q, problem.k, problem.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    problem.type, problem.threads = TYPES[q.dtype], torch.get_num_threads()
    problem.batch, problem.q_heads, problem.q_len, problem.head_dim = q.shape
    problem.kv_heads, problem.kv_len, problem.v_head_dim = v.shape[1:]
    problem.q_at, problem.k_at, problem.v_at = _strides(q), _strides(k), _strides(v)
    problem.left = -1 if options.left is None else options.left
    problem.right = -1 if options.right is None else options.right
    if options.start is not None and options.stop is not None:
        problem.first, problem.behind = options.start.data_ptr(), options.stop.data_ptr()
        problem.interval_step = batch_stride(options.start)
    slopes = options.alibi_slopes
    if slopes is not None:
        problem.slopes, problem.slope_batch = slopes.data_ptr(), batch_stride(slopes)
        problem.slope_head, problem.slope_row = slopes.stride(1), slopes.stride(2) if slopes.dim() == 3 else 0
    if options.row_offsets is not None:
        problem.offsets, problem.offset_step = options.row_offsets.data_ptr(), batch_stride(options.row_offsets)
    problem.scale, problem.softcap = options.scale, options.softcap
    return problem


def _strides(x: Tensor) -> Strides:
    return Strides(*x.stride()[:3])


def _readable(x: Tensor) -> Tensor:
    """``x`` with its channels next to each other: a copy if they are not."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()

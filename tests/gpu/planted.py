"""Two kernels with a mistake in each, to show that compute-sanitizer sees what a Triton kernel does wrong."""

import torch
import triton
import triton.language as tl

THREADS = 128  # four warps, one number each thread


def planted_read_behind_the_end() -> None:
    x, out = (torch.empty(numbers, device="cuda") for numbers in (THREADS - 1, THREADS))
    planted_read_behind_the_end_kernel[(1,)](x, out, N=THREADS, num_warps=4)


def planted_race() -> None:
    planted_race_kernel[(1,)](torch.empty(THREADS, dtype=torch.int32, device="cuda"), N=THREADS, num_warps=4)


@triton.jit
def planted_read_behind_the_end_kernel(p_x, p_out, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_out + o, tl.load(p_x + o))


@triton.jit
def planted_race_kernel(p_out, N: tl.constexpr):
    """All threads write a different number to one word of shared memory, and read it back without a barrier."""
    o = tl.arange(0, N)
    total = tl.sum(o, 0)  # across warps, which takes shared memory
    read = tl.inline_asm_elementwise(
        "{ .reg .u32 at; mov.u32 at, global_smem; st.shared.b32 [at], $1; ld.shared.b32 $0, [at]; }",
        "=r,r",
        [o],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(p_out + o, read + total)

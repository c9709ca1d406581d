"""Kernels with a planted mistake, to show that compute-sanitizer sees what a kernel of Triton or Gluon does wrong, and right ones,
the controls: what the tool says against a right one, it may say against any.

Racecheck follows barriers of a block, of a warp and, since its version 2021.2, mbarriers, whose number it takes from the compiler
(NVIDIA, Compute Sanitizer manual, "Racecheck support for cuda::barrier"). It has been mistaken about the latter: the release notes
say that 2025.4 "fixed multiple false-positives in racecheck involving mbarrier usage", and 2026.1 "false positives in racecheck when
using warpgroup-level synchronizations on Hopper". So each way in which our warp-specialised kernels order two accesses has a control
that does nothing else, with partitions like theirs: two of four warps and one of one.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashlib.launch.start import Launch

THREADS = 128  # four warps, one number each thread
ROUNDS = gl.constexpr(4)  # that one word of shared memory is written and read
# What the controls write, the first numbers.
RESULTS = {"control_handover": [6, 6], "control_dispatch": [1, 2, 3], "control_written_before": [5, 5, 1]}


def launch(name: str, device: str) -> Launch:
    """What starts ``<name>_kernel``: all of them write to one tensor, and only one of them reads another."""
    arguments = {"p_out": torch.zeros(THREADS, dtype=torch.int32).to(device)}
    if name == "planted_read_behind_the_end":
        arguments["p_x"] = torch.zeros(THREADS - 1, dtype=torch.int32).to(device)
    return Launch(globals()[f"{name}_kernel"], (1,), arguments)


@triton.jit
def planted_read_behind_the_end_kernel(p_x, p_out):
    o = tl.arange(0, 128)
    tl.store(p_out + o, tl.load(p_x + o))


@triton.jit
def planted_race_kernel(p_out):
    """Each warp writes one word of shared memory and reads the one of the next warp, without a barrier between.

    "volatile", since the assembler would otherwise take a number just stored from its register and drop the load.
    """
    o = tl.arange(0, 128)
    total = tl.sum(o, 0)  # across warps, which takes four words of shared memory
    tl.debug_barrier()
    read = tl.inline_asm_elementwise(
        """{ .reg .u32 first, at; mov.u32 first, global_smem;
        add.u32 at, first, $1; st.volatile.shared.b32 [at], $1;
        add.u32 at, first, $2; ld.volatile.shared.b32 $0, [at]; }""",
        "=&r,r,r",
        [o // 32 * 4, (o // 32 + 1) % 4 * 4],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(p_out + o, read + total)


@gluon.jit
def planted_race_of_partitions_kernel(p_out):
    """One partition writes a word, two read it, and nothing orders them."""
    smem = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize([(take, (smem, p_out)), (take, (smem, p_out + 1)), (give, (smem,))], [4, 1], [96, 24])


@gluon.jit
def give(smem):
    smem.store(gl.full([1], 5, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def take(smem, p_out):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.store(p_out + gl.arange(0, 1, layout=layout), smem.load(layout))


@gluon.jit
def control_handover_kernel(p_out):
    """One warp writes a word, two groups of four read it, again and again; they meet at mbarriers "ready" and "empty", as a producer
    and its consumers do."""
    smem = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.init(empty, count=2)
    gl.warp_specialize(
        [
            (hear, (smem, ready, empty, p_out)),
            (hear, (smem, ready, empty, p_out + 1)),
            (tell, (smem, ready, empty)),
        ],
        [4, 1],
        [96, 24],
    )


@gluon.jit
def tell(smem, ready, empty):
    for i in range(ROUNDS):
        mbarrier.wait(empty, (i & 1) ^ 1)
        smem.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + i)
        mbarrier.arrive(ready, count=1)


@gluon.jit
def hear(smem, ready, empty, p_out):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = gl.full([1], 0, gl.int32, layout)
    for i in range(ROUNDS):
        mbarrier.wait(ready, i & 1)
        total += smem.load(layout)
        mbarrier.arrive(empty, count=1)
    gl.store(p_out + gl.arange(0, 1, layout=layout), total)


@gluon.jit
def control_dispatch_kernel(p_out):
    """Partitions that share nothing; what they are told, Triton hands them through shared memory by barriers of the block."""
    number = gl.load(p_out) + 1
    gl.warp_specialize(
        [(put, (p_out, number)), (put, (p_out + 1, number + 1)), (put, (p_out + 2, number + 2))], [4, 1], [96, 24]
    )


@gluon.jit
def put(p_out, number):
    gl.store(p_out, number)


@gluon.jit
def control_written_before_kernel(p_out):
    """All warps write a word, and only then does the kernel split into partitions, which read it."""
    smem = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem.store(gl.full([1], 5, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    gl.warp_specialize([(take, (smem, p_out)), (take, (smem, p_out + 1)), (put, (p_out + 2, 1))], [4, 1], [96, 24])

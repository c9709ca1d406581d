"""What the compiler makes of a kernel, without the GPU it is made for: registers, spills, shared memory, PTX and SASS.

    report = inspect("forward", arch="sm_90", head_dim=128, causal=True)
    print(report[0])

``flashlib inspect`` is the same from a shell.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from flashlib.launch.hopper import hopper_dkdv_launches, hopper_dq_launches, hopper_launches
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches, forward_launch
from flashlib.launch.start import Launch, interpreting
from flashlib.launch.tiles import HopperBackwardTiles, HopperTiles, TileConfig, tile_config
from flashlib.masks import Window
from flashlib.spec import AttentionSpec

__all__ = ["ARCHITECTURES", "KernelReport", "compile_launch", "inspect"]

# Shared memory one program may use, in bytes: CUDA C++ Programming Guide, table of technical specifications per compute capability.
KERNELS = ("forward", "hopper", "backward", "hopper-backward")
ARCHITECTURES = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448}


@dataclass(frozen=True)
class KernelReport:
    """What one compiled kernel needs and holds.

    Attributes:
        name: of the kernel. arch: such as "sm_90".
        tiles: its tile sizes; None for a kernel that has none to choose.
        registers: per thread. spills: bytes stored to and loaded from local memory for want of registers.
        shared_memory: bytes per program; ``shared_memory_limit`` is what the GPU has.
        ttgir, ptx, sass: the stages of the compilation, as text.
        warnings: what the assembler said.
    """

    name: str
    arch: str
    tiles: TileConfig | HopperTiles | HopperBackwardTiles | None
    num_warps: int
    registers: int
    spills: int
    shared_memory: int
    ttgir: str = field(repr=False)
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    warnings: str = ""

    @property
    def shared_memory_limit(self) -> int:
        return ARCHITECTURES[self.arch]

    @cached_property
    def sass(self) -> str:
        """The machine code, by the nvdisasm that comes with triton."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.cubin)
            return _run([_tool("nvdisasm"), "-c", file.name]).stdout

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each machine instruction occurs, by its name without modifiers."""
        return Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", self.sass, re.MULTILINE))

    @property
    def tensor_core_instructions(self) -> dict[str, int]:
        """HGMMA (Hopper, a whole warpgroup), HMMA (one warp) and their like."""
        return {name: n for name, n in sorted(self.instructions.items()) if name.endswith("MMA") and name != "FMMA"}

    def rows(self) -> list[tuple[str, object]]:
        """The figures, as rows of a table."""
        tiles = (
            "" if self.tiles is None else f"{self.tiles.block_m} x {self.tiles.block_n}, {self.tiles.num_stages} stages"
        )
        return [
            ("kernel", self.name),
            ("architecture", self.arch),
            ("tile, stages", tiles),
            ("warps", self.num_warps),
            ("registers per thread", self.registers),
            ("spilled bytes", self.spills),
            ("shared memory", f"{self.shared_memory:,} of {self.shared_memory_limit:,} bytes"),
            ("tensor cores", ", ".join(f"{n} {name}" for name, n in self.tensor_core_instructions.items()) or "none"),
            ("instructions", f"{sum(self.instructions.values()):,}"),
        ]

    def __str__(self):
        from tabulate import tabulate

        return tabulate(self.rows(), tablefmt="plain")

    def _repr_html_(self):
        from tabulate import tabulate

        return tabulate(self.rows(), tablefmt="html")


def inspect(
    kernel: str = "forward",
    *,
    arch: str = "sm_90",
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    v_head_dim: int | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    intervals: bool = False,
    softcap: float = 0.0,
    alibi: bool = False,
    alibi_by_row: bool = False,
    dropout: bool = False,
    in_parts: bool = False,
    tiles: TileConfig | HopperTiles | dict[str, Any] | None = None,
    only: str | None = None,
) -> list[KernelReport]:
    """Compile the kernels of one pass for a GPU that need not be there.

    Args:
        kernel: "forward"; "hopper", the forward that Hopper GPUs run (sm_90, 16-bit, head_dim up to 128), under row intervals two
            kernels; "backward", which is three or four kernels; or "hopper-backward", those that Hopper GPUs run, three or six, and
            one more ``in_parts``.
        arch: one of :data:`ARCHITECTURES`.
        dtype: fp16, bf16 or fp32. head_dim, v_head_dim: at most 256.
        causal, window, softcap, alibi: features, as in :func:`flashlib.attention`.
        alibi_by_row: compile for ALiBi whose slope and offset are each row's own, as in packed sequences of unequal lengths.
        dropout: compile with dropout, which "hopper" and "hopper-backward" do not have.
        intervals: compile for a mask given as row intervals, as all but causal masks and windows are.
        in_parts: compile "hopper-backward" for query heads of a KV head that several programs share in dK and dV.
        tiles: tile sizes instead of the table's: one for "forward" or "hopper", or by kernel, "forward", "dkdv" and "dq".
        only: the name of the one kernel to compile, such as "backward_dq"; None for all of the pass.

    Raises:
        ValueError: no such kernel or architecture, or one without dropout where there is some.
        RuntimeError: Triton's interpreter is on, so nothing would be compiled.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}; got {arch!r}")
    if dropout and kernel.startswith("hopper"):
        raise ValueError(f"kernel {kernel!r} has no dropout: a Hopper GPU runs 'forward' and 'backward' then")
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted in this process, not compiled; unset it")
    q = torch.empty(2, 4, 1024, head_dim, dtype=dtype, device="meta")
    kv_heads = 2 if in_parts else 4
    k = torch.empty(2, kv_heads, 1024, head_dim, dtype=dtype, device="meta")
    v = torch.empty(2, kv_heads, 1024, v_head_dim or head_dim, dtype=dtype, device="meta")
    spec = AttentionSpec.from_tensors(q, k, v, mask=Window(*window) if window else None, causal=causal, softcap=softcap)
    options = KernelOptions.from_spec(spec)
    rows = torch.empty(2, 1024, dtype=torch.int32, device="meta") if intervals else None
    slopes, offsets = (torch.empty(1, 4, device="meta") if alibi else None), None
    if alibi_by_row:
        slopes, offsets = torch.empty(2, 4, 1024, device="meta"), torch.empty(2, 1024, dtype=torch.int32, device="meta")
    dropped = (0.1, torch.empty(1, dtype=torch.int64, device="meta")) if dropout else ()
    options = KernelOptions(rows, rows, options.left, options.right, slopes, offsets, options.scale, softcap, *dropped)
    widest, capability = max(head_dim, v.shape[3]), int(arch.removeprefix("sm_")) // 10
    table = {
        name: tile_config(name, dtype, widest, capability, demands=options.demands(q, k, v))
        for name in ("forward", "dkdv", "dq")
    }
    chosen: dict[str, Any] = table | ({kernel: tiles} if isinstance(tiles, TileConfig | HopperTiles) else tiles or {})
    launch, out, lse = forward_launch(q, k, v, options, tiles=chosen["forward"])
    launches = [launch]
    if kernel == "hopper":
        launches, _, _ = hopper_launches(q, k, v, options, tiles=chosen.get("hopper"))
    if kernel in ("backward", "hopper-backward"):
        asked = tiles if isinstance(tiles, dict) else {}
        hopper = {
            "dkdv": lambda tensors, options, _: hopper_dkdv_launches(
                tensors, options, asked.get("dkdv"), parts=2 if in_parts else 1
            ),
            "dq": lambda tensors, options, _: hopper_dq_launches(tensors, options, asked.get("dq")),
        }
        own: dict[str, Any] = hopper if kernel == "hopper-backward" else {}
        launches, _ = backward_launches(q, k, v, out, lse, torch.empty_like(out), None, options, tiles=chosen, **own)
    names = [launch.name for launch in launches]
    if only is not None and only not in names:
        raise ValueError(f"only must be one of {', '.join(names)}; got {only!r}")
    return [compile_launch(launch, arch) for launch in launches if only in (None, launch.name)]


def compile_launch(launch: Launch, arch: str) -> KernelReport:
    """Compile exactly what :meth:`Launch.start` would, for any GPU."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    kernel = launch.kernel
    options = {**launch.compile_options, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(**launch.triton_arguments, **options)
    compile_options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    source_type = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_type(kernel, signature, constants, attributes)
    with knobs.nvidia.scope(), redirect_stdout(StringIO()) as printed:
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=target, options=compile_options.__dict__)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    # Triton's cache keeps the machine code, but not what the assembler said of it.
    registers, spills, warnings = _read_assembler(printed.getvalue() or _assemble(ptx, arch))
    return KernelReport(
        name=launch.name,
        arch=arch,
        tiles=launch.tiles,
        num_warps=compiled.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared_memory=compiled.metadata.shared,
        ttgir=compiled.asm["ttgir"],
        ptx=ptx,
        cubin=cubin,
        warnings=warnings,
    )


def _assemble(ptx: str, arch: str) -> str:
    """What ptxas says of a kernel, called as Triton calls it."""
    target = arch + "a" if arch == "sm_90" else arch
    with tempfile.TemporaryDirectory() as folder:
        file, cubin = Path(folder, "kernel.ptx"), os.fspath(Path(folder, "kernel.cubin"))
        file.write_text(ptx)
        options = ["-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={target}"]
        return _run([_tool("ptxas"), *options, os.fspath(file), "-o", cubin]).stderr


def _read_assembler(said: str) -> tuple[int, int, str]:
    """Registers, spilled bytes and warnings."""
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    warnings = "\n".join(line for line in said.splitlines() if "warning" in line.lower() or "serialized" in line)
    return registers, spills, warnings


def _tool(name: str) -> str:
    """ptxas or nvdisasm, from the triton package."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    if not path.exists():
        raise RuntimeError(f"triton {triton.__version__} does not bring {name}: looked for {path}")
    return os.fspath(path)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stderr}")
    return done

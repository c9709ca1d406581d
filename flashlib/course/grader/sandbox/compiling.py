"""In place of launching a Triton kernel, compile it for GPUs that are not there, and tell what the compiler made of it.

Triton's interpreter runs what no GPU could: any Python is Python to it. In a process whose zygote was started without
`TRITON_INTERPRET`, each launch that a student's code makes ends in Triton's own compiler, for each target, down to PTX. The
assembler is not called: it is a process of its own. Loaded in the zygote, before flashlib is shut away.
"""

from __future__ import annotations

import re
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = (80, 90)  # compute capabilities
PTX_VERSION = 86  # 8.6, said so that Triton need not ask the assembler which one it knows
LAST_STAGE = "ptx"


class Compiled:
    """The kernels that were compiled in place of launched, while this is entered.

    Attributes:
        kernels: by name, the products of tiles in it: how they multiply their inputs (`"ieee"`, `"tf32"`, ...) and of which type.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, list[list[str]]] = {}

    def __enter__(self) -> Compiled:
        self._run = JITFunction.run
        JITFunction.run = lambda kernel, *args, grid, warmup=False, **kwargs: self._compile(kernel, args, kwargs)
        return self

    def __exit__(self, *exc) -> None:
        JITFunction.run = self._run

    def _compile(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for capability in TARGETS:
            dots = compile_for(kernel, args, kwargs, GPUTarget("cuda", capability, 32))
            self.kernels[kernel.fn.__name__] = [list(each) for each in sorted(dots)]


def compile_for(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], target: GPUTarget
) -> set[tuple[str, str]]:
    """Compile down to PTX; answers with which precision which types are multiplied.

    Raises:
        triton.compiler.errors.CompilationError: at the line of the kernel that no GPU can run.
    """
    backend, kwargs = make_backend(target), {**kwargs, "debug": False, "ptx_version": PTX_VERSION}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, codegen, modules, context)
    dots = set(_dots(str(module)))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    metadata = {"target": target, **options.__dict__}
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == LAST_STAGE:
            break
    return dots


def _dots(text: str) -> list[tuple[str, str]]:
    """Of each product in the IR: how it multiplies its inputs, and their type. Without a word, IEEE is meant."""
    found = []
    for line in text.splitlines():
        if "tt.dot " in line:
            precision = re.search(r"inputPrecision = (\w+)", line)
            kind = re.search(r": tensor<(?:\d+x)+(\w+)>", line)
            found.append((precision[1] if precision else "ieee", kind[1] if kind else "?"))
    return found

"""Read a submission for what reaches into its own process: what an instructor looks at beside points that rest on its own word.

No verdict: a student may have good reasons, and one with bad ones may hide them. What is found is shown with its line.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

# Modules that no exercise needs, and by which code can change what counts it.
_MODULES = {
    *(
        "gc",
        "ctypes",
        "inspect",
        "importlib",
        "builtins",
        "sys",
        "os",
        "mmap",
        "socket",
        "signal",
        "subprocess",
        "multiprocessing",
    ),
    *(
        "threading",
        "_thread",
        "concurrent",
        "asyncio",
        "cffi",
        "numba",
        "cython",
        "marshal",
        "pickle",
        "code",
        "dis",
        "atexit",
        "weakref",
        "traceback",
    ),
    *("numpy", "scipy", "jax", "tensorflow", "unittest", "types", "runpy", "pkgutil"),
}
_NAMES = {
    *("eval", "exec", "compile", "__import__", "globals", "vars", "locals", "setattr", "delattr", "open", "breakpoint"),
    *("TrafficMeter", "KernelWatch", "_Leaving", "TorchDispatchMode", "TorchFunctionMode"),
}
_ATTRIBUTES = {
    *(
        "_getframe",
        "_current_frames",
        "f_back",
        "f_globals",
        "f_locals",
        "tb_frame",
        "gi_frame",
        "cr_frame",
        "__code__",
        "__closure__",
    ),
    *(
        "__globals__",
        "__subclasses__",
        "__bases__",
        "__mro__",
        "__dict__",
        "__builtins__",
        "__wrapped__",
        "modules",
        "meta_path",
    ),
    *(
        "_destroy",
        "_C",
        "library",
        "_dispatch",
        "redispatch",
        "decompose",
        "_op_dk",
        "_refs",
        "_decomp",
        "_prims",
        "ops",
    ),
    *(
        "get_objects",
        "get_referrers",
        "get_referents",
        "data_ptr",
        "numpy",
        "untyped_storage",
        "from_address",
    ),
    *(
        "interpreter",
        "knobs",
        "patch",
        "__torch_dispatch__",
        "__torch_function__",
        "from_blob",
        "to_dlpack",
        "from_dlpack",
        "apply_",
        "map_",
        "frombuffer",
        "load_inline",
        "fork",
        "_disable_current_modes",
    ),
}
LONGEST = 40  # findings told


def suspicious(source: bytes) -> list[str]:
    """Lines such as `"line 12: gc.get_objects"`, in order. Empty for what is no Python: it cannot run either."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found = dict.fromkeys(sorted(_found(tree)))
    lines = [f"line {line}: {what}" for line, what in found]
    return lines if len(lines) <= LONGEST else [*lines[:LONGEST], f"and {len(lines) - LONGEST} more"]


def _found(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in _MODULES or _dotted_is_odd(alias.name):
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] in _MODULES or _dotted_is_odd(module):
                yield node.lineno, f"from {module} import"
            for alias in node.names:
                if alias.name in _ATTRIBUTES | _NAMES:
                    yield node.lineno, f"from {module} import {alias.name}"
        elif isinstance(node, ast.Attribute) and node.attr in _ATTRIBUTES:
            yield node.lineno, f"{_text(node)}"
        elif isinstance(node, ast.Name) and node.id in _NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            name = node.args[1] if len(node.args) > 1 else None
            if not (isinstance(name, ast.Constant) and name.value not in _ATTRIBUTES):
                yield node.lineno, _text(node)
        elif isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Attribute) and _root(target) in ("torch", "triton", "tl", "F"):
                    yield node.lineno, f"{_text(target)} = ..."


def _dotted_is_odd(name: str) -> bool:
    return any(part.startswith("_") or part in _ATTRIBUTES for part in name.split(".") if part != "__future__")


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _text(node: ast.AST) -> str:
    return ast.unparse(node)[:60]

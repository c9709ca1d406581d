"""The compiled library, loaded: which variant this processor runs, and one call of it."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache

from flashlib.launch.cpu.build import BuildError, built
from flashlib.values import constant_when_traced

__all__ = ["VARIANTS", "Library", "Problem", "Variant", "features", "library", "load", "why_missing"]

FEATURES = {"avx2": 1, "avx512": 2, "avx512_bf16": 4, "amx_bf16": 8}  # as in kernels/cpu/probe.cpp
FORCED = "FLASHLIB_CPU"  # environment variable: the variant to run, whatever the processor would do best


@dataclass(frozen=True)
class Variant:
    """One set of instructions for which the library is compiled.

    Attributes:
        name: as in ``FLASHLIB_CPU`` and in `flashlib doctor`.
        flags: of the compiler. needs: what the processor must have, a name of :data:`FEATURES`.
    """

    name: str
    flags: tuple[str, ...]
    needs: str


VARIANTS = {
    variant.name: variant
    for variant in (  # the best first
        Variant("avx512_bf16", ("-march=x86-64-v4", "-mavx512bf16"), "avx512_bf16"),
        Variant("avx512", ("-march=x86-64-v4",), "avx512"),
        Variant("avx2", ("-march=x86-64-v3",), "avx2"),
    )
}


class Strides(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


_POINTERS, _INTEGER, _STRIDES, _NUMBER = ctypes.c_void_p, ctypes.c_int64, Strides, ctypes.c_double


class Problem(ctypes.Structure):
    """One call; the fields of ``struct Problem`` in kernels/cpu/problem.h."""

    _fields_ = [
        *((name, _POINTERS) for name in ("q", "k", "v", "out", "lse", "first", "behind", "slopes", "offsets")),
        *((name, _POINTERS) for name in ("lengths", "pages")),
        *((name, _INTEGER) for name in ("type", "batch", "q_heads", "kv_heads", "q_len", "kv_len")),
        *((name, _INTEGER) for name in ("head_dim", "v_head_dim")),
        *((name, _STRIDES) for name in ("q_at", "k_at", "v_at", "out_at")),
        *((name, _INTEGER) for name in ("left", "right", "interval_step", "offset_step")),
        *((name, _INTEGER) for name in ("slope_batch", "slope_head", "slope_row")),
        *((name, _INTEGER) for name in ("page_size", "page_step", "page_count", "split")),
        *((name, _POINTERS) for name in ("partial_out", "partial_lse")),
        ("threads", _INTEGER),
        *((name, _NUMBER) for name in ("scale", "softcap")),
        ("out_of_memory", _INTEGER),
        ("bad_page", _INTEGER),
        *((name, _POINTERS) for name in ("grad_out", "grad_lse")),
        ("grad_out_at", _STRIDES),
        *((name, _POINTERS) for name in ("dq", "dk", "dv", "workspace")),
        ("parts", _INTEGER),
    ]


class Library:
    """One variant, loaded.

    Attributes:
        variant: which. Its functions release the GIL.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        loaded = _open("library.cpp", variant.flags)
        loaded.flashlib_problem_size.restype = ctypes.c_int64
        size = loaded.flashlib_problem_size()
        if size != ctypes.sizeof(Problem):
            raise BuildError(f"problem.h and library.py disagree on a call: {size} bytes and {ctypes.sizeof(Problem)}")
        self._forward, self._backward = _function(loaded.flashlib_forward), _function(loaded.flashlib_backward)

    def forward(self, problem: Problem) -> None:
        """Fill ``out`` and ``lse``. MemoryError if threads cannot get their scratch memory."""
        self._forward(ctypes.byref(problem))
        _check(problem)

    def backward(self, problem: Problem) -> None:
        """Fill ``dq``, ``dk`` and ``dv``. MemoryError as in :meth:`forward`."""
        self._backward(ctypes.byref(problem))
        _check(problem)


def _check(problem: Problem) -> None:
    if problem.out_of_memory:
        raise MemoryError("the CPU kernels could not get scratch memory for a tile")


def _function(function):
    function.argtypes, function.restype = [ctypes.POINTER(Problem)], None
    return function


def _open(source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    path = built(source, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the compiled {source} cannot be loaded: {error}") from None


@cache
def features() -> tuple[str, ...]:
    """What the processor and the operating system offer, of :data:`FEATURES`.

    Raises:
        BuildError: no compiler to build the few lines that ask.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or platform.system() not in ("Linux", "Darwin"):
        return ()
    probe = _open("probe.cpp").flashlib_cpu_features
    probe.restype = ctypes.c_int64
    found = probe()
    return tuple(name for name, bit in FEATURES.items() if found & bit)


@cache
def load(name: str) -> Library:
    """A variant by name.

    Raises:
        BuildError: the processor cannot run it, or it cannot be built.
    """
    if name not in VARIANTS:
        raise BuildError(f"there is no variant {name!r} (in {FORCED}); variants are {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    if variant.needs not in features():
        raise BuildError(f"this processor does not have {variant.needs}, which the variant {name} needs")
    return Library(variant)


@cache
def library() -> Library:
    """The variant that ``FLASHLIB_CPU`` names, else the best that this processor runs.

    Raises:
        BuildError: there is none.
    """
    if os.environ.get(FORCED):
        return load(os.environ[FORCED])
    for variant in VARIANTS.values():
        if variant.needs in features():
            return load(variant.name)
    raise BuildError("needs an x86-64 processor with AVX2, FMA and F16C, under Linux or macOS")


@constant_when_traced  # torch.compile cannot trace a compiler being started
def why_missing() -> str | None:
    """Why nothing can run here, or None. Builds the library if it is not there: an answer before that would be a guess."""
    return _why_missing()


@cache
def _why_missing() -> str | None:
    try:
        library()
    except BuildError as error:
        return str(error)
    return None

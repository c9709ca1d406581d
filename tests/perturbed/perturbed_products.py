"""Matrix products with the last bits of another machine, in PyTorch and in Triton's interpreter.

    PYTHONPATH=tests/perturbed FLASHLIB_PERTURB=7 python -m pytest tests/core

Two BLAS libraries, or one on two processors, add the terms of a product in different orders. No verdict may hang on that. With
``FLASHLIB_PERTURB`` set, each product is formed in one of the ways that some library might choose:

- a number: the terms in another order, one for the upper rows and one for the lower. The order is drawn from the number and the
  operands, so that equal calls give equal bits, as they do on one machine, and the same row in another block does not.
- ``alike``: computed in float64 and rounded once, so that a row gets the same bits wherever in a block it stands, and however the
  block is cut. (Products in float64 stay as they are.)

What is exact stays exact in both, as it would on any machine: sums of small integers, of one term, of zeros.

It reaches what Python starts (``sitecustomize``), and the grader's sandbox, which does not look at PYTHONPATH. Not reached: products
inside of an operation such as PyTorch's own attention, and those written into a tensor that exists (``out=``).
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
import warnings
import zlib

HOW = os.environ.get("FLASHLIB_PERTURB", "")
KEPT = []  # PyTorch forgets what a library registered when the library is gone


def _orders(terms: int, rows: int, *contents: bytes):
    """Where the rows are cut in two, and an order of the terms for each part."""
    import numpy

    seed = int(HOW)
    for content in contents:
        seed = zlib.crc32(content, seed)
    draw = numpy.random.default_rng(seed)
    return int(draw.integers(rows + 1)), draw.permutation(terms), draw.permutation(terms)


# ------------------------------------------------------------------------------------------- NumPy, for the interpreter


def numpy_product(a, b, dtype=None):
    """``numpy.matmul`` of ``[..., M, K]`` and ``[..., K, N]``."""
    import numpy

    if HOW == "alike":
        return numpy.matmul(a.astype(numpy.float64), b.astype(numpy.float64)).astype(dtype or numpy.result_type(a, b))
    cut, upper, lower = _orders(a.shape[-1], a.shape[-2], a.tobytes(), b.tobytes())
    parts = ((a[..., :cut, :], upper), (a[..., cut:, :], lower))
    return numpy.concatenate(
        [numpy.matmul(part[..., order], b[..., order, :], dtype=dtype) for part, order in parts], axis=-2
    )


class _NumPy:
    """The module numpy, but for its product."""

    matmul = staticmethod(numpy_product)

    def __getattr__(self, name):
        import numpy

        return getattr(numpy, name)


def perturb_interpreter(module) -> None:
    module.np = _NumPy()


# ------------------------------------------------------------------------------------------------------------- PyTorch


def _bytes_of(tensor) -> bytes:
    import torch

    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy().tobytes()


def torch_product(kernel, a, b):
    """``a @ b`` for ``[M, K] [K, N]``, ``[B, M, K] [B, K, N]`` or ``[M, K] [K]``, by the operator ``kernel(a, b, out=)``."""
    import torch

    def product(a, b):
        rows, columns = a.shape[:-1], b.shape[a.dim() - 1 :]
        return kernel(a, b, out=torch.empty(*rows, *columns, dtype=a.dtype))

    if not a.is_floating_point() or not a.numel() or not b.numel():
        return product(a, b)
    if HOW == "alike":
        return product(a.double(), b.double()).to(a.dtype)
    cut, upper, lower = _orders(a.shape[-1], a.shape[-2], _bytes_of(a), _bytes_of(b))
    contraction = a.dim() - 2  # which dimension of b holds the terms
    parts = ((a[..., :cut, :], upper), (a[..., cut:, :], lower))
    orders = [torch.from_numpy(order) for _, order in parts]
    return torch.cat(
        [
            product(part[..., order], b.index_select(contraction, order))
            for (part, _), order in zip(parts, orders, strict=True)
        ],
        dim=-1 if b.dim() < a.dim() else -2,
    )


def perturb_torch(torch) -> None:
    """Replace the products of PyTorch's dispatcher on CPUs. What they compute is left to their ``out=`` forms."""
    aten = torch.ops.aten
    mm, bmm, mv = aten.mm.out, aten.bmm.out, aten.mv.out

    def added(kernel):
        def replaced(bias, a, b, *, beta=1, alpha=1):
            product = alpha * torch_product(kernel, a, b)
            return product if beta == 0 else beta * bias + product

        return replaced

    replacements = {
        "mm": lambda a, b: torch_product(mm, a, b),
        "bmm": lambda a, b: torch_product(bmm, a, b),
        "mv": lambda a, b: torch_product(mv, a, b),
        "addmm": added(mm),
        "baddbmm": added(bmm),
    }
    library = torch.library.Library("aten", "IMPL")
    KEPT.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was another kernel before is the point
        for name, replacement in replacements.items():
            library.impl(name, replacement, "CPU")


# ------------------------------------------------------------------------------------------------- in every process


def perturb_sandbox(module) -> None:
    """The grader's processes are started without the user's environment. Let them load this file, too."""
    start = module.Sandbox.__init__

    def started(self, *, preload=(), environment=None, **options):
        environment = {**(environment or {}), "FLASHLIB_PERTURB": HOW}
        start(self, preload=(*preload, __name__), environment=environment, **options)

    module.Sandbox.__init__ = started


PERTURB = {
    "torch": perturb_torch,
    "triton.runtime.interpreter": perturb_interpreter,
    "flashlib.course.grader.sandbox.session": perturb_sandbox,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, perturb):
        self.loader, self.perturb = loader, perturb

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.perturb(module)

    def __getattr__(self, name):  # what else the loader of a file can do: its source, its resources
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets a module pass by its entry of PERTURB when it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name not in PERTURB:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None:
            spec.loader = _Loader(spec.loader, PERTURB[name])
        return spec


if HOW:
    if HOW != "alike":
        int(HOW)  # another word is an error, at once
    sys.meta_path.insert(0, _Finder())
    for name, perturb in PERTURB.items():
        if name in sys.modules:
            perturb(sys.modules[name])

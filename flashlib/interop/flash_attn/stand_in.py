"""``import flash_attn`` gives these functions: for programs that import the package themselves, and for transformers.

flashlib.interop.flash_attn.install()
model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="flash_attention_2")
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

import torch

from flashlib.interop.flash_attn import bert_padding, flash_attn_interface

__all__ = ["install", "installed", "uninstall"]

VERSION = "2.8.3"  # of the interface: programs look here to see which arguments there are
MODULES = {
    "flash_attn": flash_attn_interface,
    "flash_attn.flash_attn_interface": flash_attn_interface,
    "flash_attn.bert_padding": bert_padding,
}


def install() -> None:
    """Stand in for the package ``flash_attn`` in this process. Twice is as once.

    Then there are ``import flash_attn``, ``flash_attn.flash_attn_interface`` and ``flash_attn.bert_padding``, a distribution ``flash-attn`` in
    :mod:`importlib.metadata`, and transformers has ``attn_implementation="flash_attention_2"``. transformers asks for a CUDA GPU before it looks
    for the package. Where there is none, it is told that this one runs on a CPU: ``is_flash_attn_2_available`` is replaced, and the CPU is added
    to the devices in its table. If transformers is installed, this imports it.

    Raises:
        RuntimeError: another flash_attn is installed, which would be hidden.
    """
    if _FINDER in sys.meta_path:
        return
    if importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError("flash_attn is installed, and install() would hide it; uninstall it first")
    sys.meta_path.insert(0, _FINDER)
    if importlib.util.find_spec("transformers") is not None:
        _forget_in_transformers()
        if not torch.cuda.is_available():
            _admit_cpus()


def uninstall() -> None:
    """Undo :func:`install`. Models that already run on the functions keep them."""
    if _FINDER not in sys.meta_path:
        return
    sys.meta_path.remove(_FINDER)
    for name in MODULES:
        sys.modules.pop(name, None)
    while _undo:
        where, name, value = _undo.pop()
        where[name] = value
    if "transformers" in sys.modules:
        _forget_in_transformers()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """:func:`install` for a block."""
    install()
    try:
        yield
    finally:
        uninstall()


class _Loader(Loader):
    stands_in = True  # by which flashlib's own backends know that this is no other package

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        ours = MODULES[module.__name__]
        vars(module).update({name: getattr(ours, name) for name in ours.__all__})
        module.__doc__ = f"flashlib, standing in for {module.__name__}."
        vars(module)["__version__"] = VERSION


_METADATA = {
    "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\nSummary: flashlib, standing in\n",
    "top_level.txt": "flash_attn\n",
}


class _Distribution(Distribution):
    def read_text(self, filename: str) -> str | None:
        return _METADATA.get(str(filename))

    def locate_file(self, path: str | os.PathLike[str]) -> Path:
        return Path(path)


_EVERYTHING = DistributionFinder.Context()


class _Finder(DistributionFinder):
    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Loader(), is_package=name == "flash_attn") if name in MODULES else None

    def find_distributions(self, context: DistributionFinder.Context = _EVERYTHING) -> Iterator[Distribution]:
        if context.name is None or context.name.lower().replace("_", "-") == "flash-attn":
            yield _Distribution()


_FINDER = _Finder()
_undo: list[tuple[dict, str, object]] = []  # what was replaced: where, the name, and the old value


def _replace(where: dict, name: str, value: object) -> None:
    _undo.append((where, name, where[name]))
    where[name] = value


def _forget_in_transformers() -> None:
    """It asks once what there is, and keeps the answers."""
    from transformers import modeling_flash_attention_utils
    from transformers.utils import import_utils

    for name, function in vars(import_utils).items():
        if ("flash_attn" in name or name == "_package_distribution_mapping") and hasattr(function, "cache_clear"):
            function.cache_clear()
    modeling_flash_attention_utils._loaded_implementation = None


def _admit_cpus() -> None:
    from transformers import modeling_flash_attention_utils
    from transformers.utils import import_utils

    def is_flash_attn_2_available(kernels_fallback_ok: bool = False) -> bool:
        return True

    asked = import_utils.is_flash_attn_2_available
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").partition(".")[0] == "transformers":
            for name in [name for name, value in vars(module).items() if value is asked]:
                _replace(vars(module), name, is_flash_attn_2_available)
    table = modeling_flash_attention_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    _replace(table, "general_availability_check", is_flash_attn_2_available)
    _replace(table, "supported_devices", (*table["supported_devices"], (is_flash_attn_2_available, "cpu")))

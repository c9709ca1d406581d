"""From a :class:`flashlib.launch.start.Launch` of forms to a packet: a launch whose parameters are ready but for the addresses.

Triton binds and converts every argument anew each time a kernel is launched, which takes 57 us for one of ours. What it arrives at depends on forms
alone. So it is kept: a packet holds the kernel and an image of its parameters, and ``packets.c``, compiled at first use by Triton's own build of C
modules, writes the addresses of the call into a copy and hands it to the driver: 4 to 5 us, nearly all of them the driver's.

What lies where in the image is Triton's convention: parameters in order, without those fixed at compile time; a tile descriptor is a tensor map,
its sizes in 32 bits and its strides in 64; at the end two pointers for scratch memory, of which our kernels use none. The driver is asked
whether the kernel agrees, parameter by parameter. If not, as under a Triton that does it otherwise, launches go Triton's own way.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from flashlib.launch.forms import Form, NotPlannable
from flashlib.launch.recipes import computed, is_wide, number_type, plain, recording
from flashlib.launch.start import Launch, TileMap

__all__ = ["Places", "library", "packet", "why_missing"]

MAP_BYTES = 128
SPECIALIZED, PLAIN, CONSTANT = 0, 1, 2  # parameters


def _hash_triton() -> None:
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # a Triton that does it elsewhere does it later
        return
    triton_key()


# Before its first kernel, Triton reads and hashes all of its own installation, for a third of a second; meanwhile ours are imported.
_hashed = threading.Thread(target=_hash_triton, name="flashlib-hash-triton", daemon=True)


@cache
def _library() -> tuple[ModuleType | None, str | None]:
    """The compiled ``packets.c``, or why there is none."""
    try:
        import triton
        from triton.runtime.build import compile_module_from_src

        source = Path(__file__).with_suffix(".c").read_text()
        headers = Path(triton.__file__).parent / "backends/nvidia/include", Path(torch.__file__).parent / "include"
        compiled = compile_module_from_src(
            source, "flashlib_packets", include_dirs=[*map(str, headers)], libraries=["dl"]
        )
        compiled.use_torch(torch.Tensor.__dlpack_c_exchange_api__, torch.empty_strided)
        _hashed.start()
        return compiled, None
    except (
        Exception
    ) as error:  # no compiler, no headers, a cache that cannot be written: whatever it is, Triton's launcher remains
        return None, f"launches go through Triton's own launcher, which takes longer: {type(error).__name__}: {error}"


def library() -> ModuleType | None:
    """``packets.c`` as a Python module: ``Packet``, ``run``, ``describe``, ``encode`` and others. None where it cannot be had."""
    return _library()[0]


def needed() -> ModuleType:
    """:func:`library`, which is there.

    Raises:
        NotPlannable: it is not.
    """
    found, why = _library()
    if found is None:
        raise NotPlannable(str(why))
    return found


def why_missing() -> str | None:
    """Why there is no :func:`library`; None if there is."""
    return _library()[1]


class Places(dict):
    """Which address, of those that a call gives, each place of a :class:`flashlib.launch.forms.Memory` has: ``{source: (index, bytes behind it)}``."""


def packet(launch: Launch, places: Places) -> Any:
    """``launch``, whose tensors are forms, as a packet for ``library().run``.

    Raises:
        NotPlannable: the kernel does not take its parameters as this module lays them out.
    """
    code = _compiled(launch)
    arguments = launch.arguments
    values: list[Any] = []
    slots: list[tuple] = []
    maps: list[tuple] = []
    at, behind_maps = 0, MAP_BYTES * len(code.maps)
    for name, kind in code.parameters:
        x = arguments[name]
        if kind == "map":
            index, offset = places[x.base.source]
            slots.append((index, at, offset + x.base.offset, True))
            maps.append((x.shape, x.strides))
            values += x.shape
            values += x.strides
            at += MAP_BYTES
        elif kind == "pointer":
            index, offset = places[x.source]
            slots.append((index, behind_maps + 8 * len(values), offset + x.offset, False))
            values.append(0)
        else:
            values.append(x)
    grid = launch.grid if len(launch.grid) == 3 else (*launch.grid, 1, 1)[:3]
    return computed(_packed, code, grid, maps, values, tuple(slots))


def _packed(code: Code, grid: tuple, maps: list[tuple], values: list, slots: tuple) -> Any:
    """A packet, from shapes and strides of tensor maps and what follows behind them in the image."""
    compiled = needed()
    image = code.values.pack(*values, 0, 0)
    if maps:
        encode = compiled.encode
        encoded = [
            encode(element_type, element_bytes, swizzle, shape, strides, block)
            for (element_type, element_bytes, swizzle, block), (shape, strides) in zip(code.maps, maps, strict=True)
        ]
        image = b"".join([*encoded, image])
    return compiled.Packet(code.function, grid, code.threads, code.shared, image, code.offsets, slots)


@dataclass(frozen=True)
class Code:
    """A kernel compiled for one kind of arguments.

    Attributes:
        kernel: Triton's, which must live as long as its machine code is used. function: the driver's handle.
        threads, shared: of a program; bytes.
        parameters: ``(name, "map" | "pointer" | "number")`` of each argument that is given at run time.
        maps: of each map its element type, element bytes, swizzle and block. values: how numbers and pointers lie behind them.
        offsets: of every parameter in the image.
    """

    kernel: Any
    function: int
    threads: int
    shared: int
    parameters: tuple[tuple[str, str], ...]
    maps: tuple[tuple, ...]
    values: struct.Struct
    offsets: tuple[int, ...]


_codes: dict[tuple, Code | NotPlannable] = {}


def _compiled(launch: Launch) -> Code:
    # From the tiles alone follow the options that it is compiled with.
    key = (launch.kernel, launch.device.index, launch.tiles, *kinds(launch))
    code = _codes.get(key)
    if code is None:
        if recording():
            raise NotPlannable(f"{launch.name} is not compiled for such sizes", is_final=False)
        try:
            code = compile_code(launch)
        except NotPlannable as why_not:
            code = why_not
        _codes[key] = code
    if isinstance(code, NotPlannable):
        raise code
    return code


def kinds(launch: Launch) -> list:
    """What of the arguments Triton compiles a kernel for: constants, types, and whether numbers and addresses are multiples of 16 or the number 1."""
    found, arguments = [], launch.arguments
    for name, role in _roles(launch.kernel):
        x = arguments[name]
        kind = number_type(x)
        if role == CONSTANT or x is None:
            found.append(plain(x))
        elif kind is int:
            wide = is_wide(x)
            found.append(wide if role == PLAIN else (wide, bool(x % 16 == 0), bool(x == 1)))
        elif kind is Form:
            found.append((x.dtype, bool(x.offset % 16 == 0)))
        elif kind is TileMap:
            found.append((x.base.dtype, x.block, x.swizzle))
        else:
            found.append(kind)
    return found


@cache
def _roles(kernel: Any) -> tuple[tuple[str, int], ...]:
    return tuple(
        (p.name, CONSTANT if p.is_constexpr else PLAIN if p.do_not_specialize else SPECIALIZED) for p in kernel.params
    )


def compile_code(launch: Launch) -> Code:
    """Compile, or fetch from Triton's cache, what Triton would launch for such arguments, and see whether its parameters are as expected."""
    if _hashed.is_alive():
        _hashed.join()
    with torch.cuda.device(launch.device):
        kernel = launch.kernel.run(grid=(1, 1, 1), warmup=True, **launch.triton_arguments, **launch.compile_options)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        kernel._init_handles()
    metadata = kernel.metadata
    for name, expected in {
        "num_ctas": 1,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }.items():
        if getattr(metadata, name, expected) != expected:
            raise NotPlannable(f"{launch.name} is launched with {name} = {getattr(metadata, name)}")
    maps = tuple(
        (_HOST_TYPE.get(meta["elem_type"], meta["elem_type"]), meta["elem_size"], meta["swizzle"], tuple(meta["block_size"]))
        for meta in getattr(metadata, "tensordesc_meta", None) or ()
    )  # fmt: skip
    code = lay_out(
        kernel, kernel.function, 32 * metadata.num_warps, metadata.shared, kernel.src.signature, maps, launch
    )
    sizes = needed().parameter_sizes(kernel.function)
    if sizes != _sizes(code, kernel.src.signature, launch):
        raise NotPlannable(f"{launch.name} takes parameters of {sizes} bytes, which is not how they are laid out here")
    return code


# Of the types of CUtensorMapDataType as Triton's kernels number them, those that the driver numbers otherwise.
_HOST_TYPE = {8: 10, 9: 8, 10: 9}
_FORMAT = {"i1": "b7x", "i8": "b7x", "i16": "h6x", "i32": "i4x", "i64": "q", "u1": "B7x", "fp32": "f4x", "pointer": "q"}
_SIZE = {"i1": 1, "u1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "pointer": 8}


def _runtime_types(signature: dict[str, str]) -> list[tuple[str, str]]:
    """Name and type of each parameter given at run time; pointers and tile descriptors by these words."""
    found = []
    for name, kind in signature.items():
        if kind != "constexpr":
            kind = "pointer" if kind[0] == "*" else "map" if kind.startswith("tensordesc") else kind
            found.append((name, kind))
    return found


def lay_out(
    kernel: Any, function: int, threads: int, shared: int, signature: dict, maps: tuple, launch: Launch
) -> Code:
    """The :class:`Code` of a compiled kernel: maps first in the image, since they must be aligned, then everything else 8 bytes apart."""
    types, offsets, formats, map_at, at = _runtime_types(signature), [], [], 0, MAP_BYTES * len(maps)
    for name, kind in types:
        if kind == "map":
            rank = len(launch.arguments[name].shape)
            offsets.append(map_at)
            map_at += MAP_BYTES
            inside = [*["i32"] * rank, *["i64"] * rank]
        elif kind in _FORMAT:
            inside = [kind]
        else:
            raise NotPlannable(f"{launch.name} takes {name} as {kind}")
        for each in inside:
            offsets.append(at)
            formats.append(_FORMAT[each])
            at += 8
    if map_at != MAP_BYTES * len(maps):
        raise NotPlannable(f"{launch.name} takes {map_at // MAP_BYTES} tile descriptors and describes {len(maps)}")
    parameters = tuple((name, kind if kind in ("map", "pointer") else "number") for name, kind in types)
    layout = struct.Struct("<" + "".join(formats) + "qq")
    return Code(kernel, function, threads, shared, parameters, maps, layout, (*offsets, at, at + 8))


def _sizes(code: Code, signature: dict[str, str], launch: Launch) -> list[int]:
    """Bytes of each parameter, as :func:`lay_out` has them."""
    sizes = []
    for name, kind in _runtime_types(signature):
        if kind == "map":
            rank = len(launch.arguments[name].shape)
            sizes += [MAP_BYTES, *[4] * rank, *[8] * rank]
        else:
            sizes.append(_SIZE[kind])
    return [*sizes, 8, 8]

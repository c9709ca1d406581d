"""What kernels must know besides q, k and v, and how tensors become their arguments: strides, widths, what a mask becomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashlib.dropout import threshold
from flashlib.launch.recipes import settled
from flashlib.launch.start import interpreting
from flashlib.spec import AttentionSpec

__all__ = [
    "BAND",
    "INTERVALS",
    "UNMASKED",
    "KernelOptions",
    "aligned",
    "batch_stride",
    "begins_at_16_bytes",
    "blocks",
    "checked_channels",
    "dropout_arguments",
    "empty_results",
    "padded",
    "power_of_two",
    "readable",
    "strides",
]

UNMASKED, BAND, INTERVALS = 0, 1, 2  # as in flashlib.kernels.common
BY_HEAD, BY_ROW = 1, 2  # the same


@dataclass(frozen=True)
class KernelOptions:
    """What the kernels must know besides q, k and v.

    Attributes:
        start, stop: int32 ``[B or 1, Sq]``, the mask as row intervals; None if it is a band.
        left, right: the band, aligned bottom-right; None for no limit on that side.
        alibi_slopes: fp32 ``[B or 1, Hq]``, or None; with ``row_offsets`` ``[B or 1, Hq, Sq]``.
        row_offsets: int32 ``[B or 1, Sq]``: ALiBi's distance of row i and key j is ``|i + offset - j|``. None for Sk - Sq.
        scale, softcap, dropout_p: as in :func:`flashlib.attention`.
        dropout_seed: int64 ``[1]`` (:mod:`flashlib.dropout`); None without dropout.
        precision: how fp32 products are formed: ``"ieee"``, or ``"tf32"`` or ``"tf32x3"`` on tensor cores.
        autotune: when tile sizes are searched for (:mod:`flashlib.launch.autotune`).
    """

    start: Tensor | None
    stop: Tensor | None
    left: int | None
    right: int | None
    alibi_slopes: Tensor | None
    row_offsets: Tensor | None
    scale: float
    softcap: float
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    precision: str = "ieee"
    autotune: str = "never"

    @classmethod
    def from_spec(cls, spec: AttentionSpec, precision: str = "ieee", autotune: str = "never") -> KernelOptions:
        """:meth:`flashlib.AttentionSpec.numbers`, with integers as wide as the kernels read them."""
        return cls.from_numbers(*spec.numbers(), precision, autotune)

    @classmethod
    def from_numbers(cls, start, stop, left, right, slopes, offsets, *rest) -> KernelOptions:
        """From :meth:`flashlib.AttentionSpec.numbers`, precision and autotune."""
        start, stop, offsets = (None if x is None else x.to(torch.int32).contiguous() for x in (start, stop, offsets))
        return cls(start, stop, left, right, slopes, offsets, *rest)

    def tensors(self) -> list[Tensor]:
        """Those of its attributes that are tensors, in order."""
        return [
            x for x in (self.start, self.stop, self.alibi_slopes, self.row_offsets, self.dropout_seed) if x is not None
        ]

    def with_tensors(self, tensors: Iterable[Tensor]) -> KernelOptions:
        """The same with other :meth:`tensors`."""
        others = iter(tensors)
        names = ("start", "stop", "alibi_slopes", "row_offsets", "dropout_seed")
        changed: dict[str, Any] = {name: next(others) for name in names if getattr(self, name) is not None}
        return replace(self, **changed) if changed else self

    def numbers(self) -> tuple:
        """As :meth:`flashlib.AttentionSpec.numbers`."""
        return (
            self.start, self.stop, self.left, self.right, self.alibi_slopes, self.row_offsets, self.scale, self.softcap,
            self.dropout_p, self.dropout_seed,
        )  # fmt: skip

    def key(self) -> tuple:
        """Everything but the :meth:`tensors`, of which it says which there are."""
        return (
            self.start is None, self.left, self.right, self.alibi_slopes is None, self.row_offsets is None, self.scale, self.softcap,
            self.dropout_p, self.precision, self.autotune,
        )  # fmt: skip

    NUMBERS: ClassVar = ("left", "right", "scale", "softcap")  # of which launches follow as they follow from lengths

    def kind(self) -> tuple:
        """The :meth:`key` without the numbers, of which it says which there are."""
        return (
            self.start is None, self.left is None, self.right is None, self.alibi_slopes is None, self.row_offsets is None,
            self.dropout_p, self.precision, self.autotune,
        )  # fmt: skip

    def numbers_by_name(self) -> dict[str, float]:
        """Those of :attr:`NUMBERS` that there are."""
        return {name: number for name in self.NUMBERS if (number := getattr(self, name)) is not None}

    def with_numbers(self, numbers: Mapping[str, Any]) -> KernelOptions:
        """The same with others."""
        return replace(self, **numbers)

    @property
    def mask_kind(self) -> int:
        if self.start is not None:
            return INTERVALS
        return UNMASKED if self.left is None and self.right is None else BAND

    @property
    def alibi_kind(self) -> int:
        if self.alibi_slopes is None:
            return 0
        return BY_HEAD if self.row_offsets is None else BY_ROW

    def demands(self, q: Tensor, k: Tensor, v: Tensor) -> set[str]:
        """What the kernels hold in registers besides q, k, v and a band: keys of :data:`flashlib.launch.tiles.EXCEPTIONS`."""
        found = {
            "edges": checked_channels(q, k) > 0 or checked_channels(v) > 0,
            "crowded": self.mask_kind == INTERVALS or self.softcap > 0 or self.alibi_slopes is not None,
            "alibi_by_row": self.alibi_kind == BY_ROW,
            "dropout": self.dropout_p > 0,
        }
        return {name for name, holds in found.items() if holds}

    def arguments(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
        """The arguments that all attention kernels share, by name."""
        head_dim, v_head_dim = q.shape[3], v.shape[3]
        return {
            "p_start": self.start,
            "p_stop": self.stop,
            "stride_interval": batch_stride(self.start),
            "p_slopes": self.alibi_slopes,
            "stride_slope": batch_stride(self.alibi_slopes),
            "p_offsets": self.row_offsets,
            "stride_offset": batch_stride(self.row_offsets),
            "group_size": q.shape[1] // k.shape[1],
            "q_len": q.shape[2],
            "kv_len": k.shape[2],
            "offset": k.shape[2] - q.shape[2],
            "left": self.left or 0,
            "right": self.right or 0,
            "scale": self.scale,
            "softcap": self.softcap,
            **dropout_arguments(self.dropout_p, self.dropout_seed),
            "head_dim": head_dim,
            "v_head_dim": v_head_dim,
            "CHECK_D": checked_channels(q, k),
            "CHECK_DV": checked_channels(v),
            "BLOCK_D": padded(head_dim),
            "BLOCK_DV": padded(v_head_dim),
            "MASK": self.mask_kind,
            "HAS_LEFT": self.left is not None,
            "HAS_RIGHT": self.right is not None,
            "SOFTCAP": self.softcap > 0,
            "ALIBI": self.alibi_kind,
            "PRECISION": self.precision,
        }


def empty_results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` for a forward to write: ``[B, Hq, Sq, Dv]`` in the dtype of q, and fp32 ``[B, Hq, Sq]``.

    Where the heads of a token lie next to each other in q, as in flash_attn's ``[B, S, H, D]``, they do so in ``out``.
    """
    batch, q_heads, q_len, _ = q.shape
    if q.stride(1) < q.stride(2):
        out = q.new_empty(batch, q_len, q_heads, v.shape[3]).transpose(1, 2)
    else:
        out = q.new_empty(batch, q_heads, q_len, v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def strides(**tensors: Tensor) -> dict[str, int]:
    """``stride_qb``, ``stride_qh`` and ``stride_qs`` of a tensor called ``q``, and so on.

    A dimension of size 1 is never stepped over, so its stride counts as 0, whatever it is: a stride that is no multiple of 16
    would have the kernel compiled again, with narrower loads.
    """
    found = {}
    for name, x in tensors.items():
        found[f"stride_{name}b"], found[f"stride_{name}h"], found[f"stride_{name}s"] = steps(x)
    return found


def steps(x: Tensor) -> list[int]:
    """The first three strides of a tensor, as :func:`strides` counts them."""
    shape, stride = x.shape, x.stride()
    return [0 if shape[dim] == 1 else stride[dim] for dim in (0, 1, 2)]


def dropout_arguments(dropout_p: float, seed: Tensor | None) -> dict[str, Any]:
    """What the kernels must know of dropout, by name; without it None for all, so that they are compiled as if there were none."""
    if not dropout_p:
        return {"p_seed": None, "drop_below": None, "keep_factor": None, "DROPOUT": False}
    below = threshold(dropout_p)
    # Its 32 bits as a signed integer: an argument of more than 31 bits would be 64 bits wide, and the kernel compiled again.
    return {
        **{"p_seed": seed, "drop_below": below - (below >> 31 << 32), "keep_factor": 1.0 / (1.0 - dropout_p)},
        "DROPOUT": True,
    }


def batch_stride(x: Tensor | None) -> int:
    """From one batch entry to the next; 0 where all share one."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def padded(head_dim: int) -> int:
    """The tile width for a head_dim: the next power of two, at least 16, the least a tensor core takes."""
    return max(16, power_of_two(head_dim))


def power_of_two(number: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, number - 1).bit_length()


def checked_channels(*tensors: Tensor, width: int | None = None) -> int:
    """0 if no channel need be checked: tiles, of :func:`padded` width or of ``width``, are as wide as the tensors' head_dim, and strides are
    multiples of 16, so that Triton sees by itself where rows begin. Otherwise the rows of all of them begin, and end, at multiples of so many
    channels, at most 16 bytes: what a thread can move at once.
    """
    first = tensors[0]
    pointers = [x.data_ptr() for x in tensors]
    found = [step for x in tensors for step in steps(x)]
    if first.shape[3] == (width or padded(first.shape[3])) and not any(number % 16 for number in (*pointers, *found)):
        return 0
    begins = (pointer // first.element_size() for pointer in pointers)
    return settled(math.gcd, 16 // first.element_size(), first.shape[3], *begins, *found)


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def readable(x: Tensor) -> Tensor:
    """``x`` as every kernel takes it: channels next to each other (a copy if they are not), and no bf16 in the interpreter, whose bf16
    arithmetic is silently wrong (triton 3.6 to 3.9)."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and interpreting():
        x = x.float()
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """``x`` as the kernels of training take it: readable, and every row begins and ends at a multiple of 16 bytes. If not, a copy whose
    channels are padded with zeros, which changes no score and adds channels of zeros to the output.

    One copy costs less than it saves: keys are read again for each block of rows, number by number where 16 bytes cannot be moved at
    once, and through registers. Of such a loop the assembler (ptxas 12.8) has also made one that read the wrong shared memory.
    """
    x = readable(x)
    step = 16 // x.element_size()
    missing = -x.shape[3] % step
    if missing:
        return torch.nn.functional.pad(x, (0, missing)).contiguous()
    return x if begins_at_16_bytes(x) else x.clone(memory_format=torch.contiguous_format)


def begins_at_16_bytes(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, the step of a thread's widest load and of Hopper's copy engine."""
    if x.data_ptr() % 16:
        return False
    numbers_in_16_bytes = 16 // x.element_size()
    batch, head, row, _ = x.stride()
    if not (batch % numbers_in_16_bytes or head % numbers_in_16_bytes or row % numbers_in_16_bytes):
        return True
    return not any(step % numbers_in_16_bytes for step in steps(x))

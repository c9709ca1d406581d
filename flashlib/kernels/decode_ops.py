"""Decoding as a PyTorch operator, ``torch.ops.flashlib.decode``: what torch.compile sees of it."""

from __future__ import annotations

import torch
from torch import Tensor

from flashlib.kernels.decode_launch import DecodeOptions, launch_decode

__all__ = ["decode"]


@torch.library.custom_op("flashlib::decode", mutates_args=())
def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, block_table: Tensor | None, left: int | None, right: int | None,
    scale: float, softcap: float, num_splits: int, split_size: int | None, merge_in_kernel: bool, precision: str,
    fewest_splits: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``(out, lse)`` of one decoding step; arguments after v as in :class:`~flashlib.kernels.decode_launch.DecodeOptions`."""
    options = DecodeOptions(
        lengths,
        block_table,
        left,
        right,
        scale,
        softcap,
        num_splits,
        split_size,
        merge_in_kernel,
        precision,
        fewest_splits,
    )
    return launch_decode(q, k, v, options)


@decode.register_fake
def _(q, k, v, *options):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)

"""Which kernels run a problem: those that split the keys where rows are few, the warp-specialised ones where they can, the plain ones everywhere
else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flashlib.launch.decode import DecodeOptions, decode_launches
from flashlib.launch.hopper import (
    hopper_backward_runs,
    hopper_dkdv_launches,
    hopper_dq_launches,
    hopper_launches,
    hopper_runs,
)
from flashlib.launch.options import INTERVALS, KernelOptions, aligned, empty_results
from flashlib.launch.plain import BackwardTensors, backward_launches, dkdv_launches, dq_launches, forward_launch
from flashlib.launch.plans import kept_plan, plan_for
from flashlib.launch.start import Launch
from flashlib.launch.tiles import TileConfig

__all__ = ["launch_backward", "launch_forward", "splits_keys"]

FEW_ROWS = 64  # query rows of a KV head
MANY_KEYS, KEYS_PER_QUERY = 256, 4


def launch_forward(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> tuple[Tensor, Tensor]:
    """Start the forward kernels: ``(out, lse)``, ``[B, Hq, Sq, Dv]`` in the dtype of q and fp32 ``[B, Hq, Sq]``."""
    plan = kept_plan(best_forward_launches, (q, k, v), options)
    if plan is not None:
        out, lse = plan.run((q, k, v, *options.tensors()))
        return out, lse
    read = [aligned(x) for x in (q, k, v)]
    plan = plan_for(best_forward_launches, read, options)
    if plan is not None:
        out, lse = plan.run((*read, *options.tensors()))
    else:
        launches, (out, lse) = best_forward_launches(read[0], read[1], read[2], options)
        for launch in launches:
            launch.start()
    if read[0] is q and read[2] is v:
        return out, lse
    # Copies were read. What is returned has the width, the layout and the dtype that the originals ask for.
    asked, _ = empty_results(q, v)
    return asked.copy_(out[..., : v.shape[3]]), lse


def launch_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, options: KernelOptions
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Start the backward kernels: ``(dq, dk, dv)``, shaped and typed like q, k, v."""
    asked = (q, k, v, out, grad_out, lse) if grad_lse is None else (q, k, v, out, grad_out, lse, grad_lse)
    plan = kept_plan(best_backward_launches, asked, options)
    if plan is not None:
        dq, dk, dv = plan.run((*asked, *options.tensors()))
        return dq, dk, dv
    read = [aligned(x) for x in (q, k, v, out, grad_out)]
    read += [lse.contiguous(), *([] if grad_lse is None else [grad_lse.contiguous()])]
    plan = plan_for(best_backward_launches, read, options)
    if plan is not None:
        gradients = plan.run((*read, *options.tensors()))
    else:
        launches, gradients = best_backward_launches(*read, options)
        for launch in launches:
            launch.start()
    dq, dk, dv = (
        gradient[..., : x.shape[3]].to(x.dtype).contiguous() for gradient, x in zip(gradients, (q, k, v), strict=True)
    )
    return dq, dk, dv


def splits_keys(q_shape: Sequence[int], k_shape: Sequence[int], options: KernelOptions) -> bool:
    """Whether split-KV runs a problem: a few rows for each KV head, which see many keys under a band.

    The other kernels have a program for each block of rows: with one query of one request, for 32 of the 132 multiprocessors of an H200.
    """
    (_, q_heads, q_len, _), (_, kv_heads, kv_len, _) = q_shape, k_shape
    return (
        q_heads // kv_heads * q_len <= FEW_ROWS
        and kv_len >= max(MANY_KEYS, KEYS_PER_QUERY * q_len)
        and options.mask_kind != INTERVALS
        and options.alibi_slopes is None
        and not options.dropout_p
    )


def best_forward_launches(
    q: Tensor, k: Tensor, v: Tensor, options: KernelOptions
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launches of the forward, and ``(out, lse)``, of tensors that are :func:`flashlib.launch.options.aligned`, or of their forms."""
    # Its kernels write heads before rows: out must lie as :func:`flashlib.launch.options.empty_results` promises.
    if splits_keys(q.shape, k.shape, options) and (q.shape[2] == 1 or q.stride(1) >= q.stride(2)):
        chosen = DecodeOptions.chosen(
            q, k, v, left=options.left, right=options.right, scale=options.scale, softcap=options.softcap, precision=options.precision
        )  # fmt: skip
        launches, out, lse = decode_launches(q, k, v, chosen)
        return launches, (out, lse)
    if hopper_runs(q, k, v, options):
        launches, out, lse = hopper_launches(q, k, v, options)
        return launches, (out, lse)
    launch, out, lse = forward_launch(q, k, v, options)
    return [launch], (out, lse)


def best_backward_launches(*tensors_and_options) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches of the backward, and ``(dq, dk, dv)``: of ``q, k, v, out, grad_out, lse``, the gradient of the LSE if there is one, and options."""
    q, k, v, out, grad_out, lse, *grad_lse, options = tensors_and_options
    best: dict[str, Any] = {"dkdv": best_dkdv_launches, "dq": best_dq_launches}
    return backward_launches(q, k, v, out, lse, grad_out, grad_lse[0] if grad_lse else None, options, **best)


def best_dkdv_launches(tensors: BackwardTensors, options: KernelOptions, tiles: TileConfig) -> list[Launch]:
    """The launches of dK and dV; ``tiles`` are those of the plain kernel."""
    if hopper_backward_runs(tensors, options):
        return hopper_dkdv_launches(tensors, options)
    return dkdv_launches(tensors, options, tiles)


def best_dq_launches(tensors: BackwardTensors, options: KernelOptions, tiles: TileConfig) -> list[Launch]:
    """The launches of dQ; ``tiles`` are those of the plain kernel."""
    if hopper_backward_runs(tensors, options):
        return hopper_dq_launches(tensors, options)
    return dq_launches(tensors, options, tiles)

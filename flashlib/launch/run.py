"""Which kernels run a problem: the warp-specialised ones where they can, the plain ones everywhere else."""

from __future__ import annotations

from torch import Tensor

from flashlib.launch.hopper import (
    hopper_backward_runs,
    hopper_dkdv_launches,
    hopper_dq_launches,
    hopper_launches,
    hopper_runs,
)
from flashlib.launch.options import KernelOptions, aligned, empty_results
from flashlib.launch.plain import BackwardTensors, backward_launches, dkdv_launches, dq_launches, forward_launch
from flashlib.launch.start import Launch
from flashlib.launch.tiles import TileConfig

__all__ = ["launch_backward", "launch_forward"]


def launch_forward(q: Tensor, k: Tensor, v: Tensor, options: KernelOptions) -> tuple[Tensor, Tensor]:
    """Start the forward kernel: ``(out, lse)``, ``[B, Hq, Sq, Dv]`` in the dtype of q and fp32 ``[B, Hq, Sq]``."""
    read = [aligned(x) for x in (q, k, v)]
    if hopper_runs(*read, options):
        launches, out, lse = hopper_launches(*read, options)
    else:
        launch, out, lse = forward_launch(*read, options)
        launches = [launch]
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
    best = {"dkdv": best_dkdv_launches, "dq": best_dq_launches}
    launches, gradients = backward_launches(q, k, v, out, lse, grad_out, grad_lse, options, **best)
    for launch in launches:
        launch.start()
    return tuple(
        gradient[..., : x.shape[3]].to(x.dtype).contiguous() for gradient, x in zip(gradients, (q, k, v), strict=True)
    )


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

"""PyTorch's ``scaled_dot_product_attention``, one backend for each kernel behind it.

PyTorch chooses among its kernels by itself; here each is asked for by name. Three of its habits are corrected so that all
backends mean the same: its ``is_causal`` aligns top-left, a row with every key masked may come out as NaN, and masked NaN or
inf leaks into the result (``0 * NaN``).
"""

from __future__ import annotations

import threading
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashlib.backends.base import Backend
from flashlib.engines import refuse_second_derivative
from flashlib.reference import hide_unseen
from flashlib.spec import AttentionSpec
from flashlib.values import has_values

__all__ = ["SDPACudnn", "SDPAEfficient", "SDPAFlash", "SDPAMath", "needs_dense_mask"]


# Which of its kernels PyTorch may use is one set of switches for the whole process. Two threads that turn them at a time put back what they found, each
# the other's, and leave kernels switched off for everybody. So one at a time does.
_SWITCHES = threading.RLock()


class _SDPA(Backend):
    kernel: SDPBackend
    makes_dense_mask = True
    repeats_gradients = False  # the fused kernels may add up in another order each time
    shares_kv_heads = True  # whether the kernel takes fewer KV heads than query heads as they are
    forward_mode = False  # nor a second derivative: only the unfused formula has them

    def unsupported(self, spec: AttentionSpec, config) -> str | None:
        if spec.return_lse:
            return "PyTorch's SDPA does not return the LSE"
        if spec.softcap:
            return "PyTorch's SDPA has no softcap"
        if spec.alibi_slopes is not None:
            return "PyTorch's SDPA has no ALiBi; its bias would have to be an Sq x Sk matrix"
        if spec.dropout_p:
            return "PyTorch's SDPA drops other pairs than ours"
        if spec.device.type == "meta":
            return "PyTorch says of tensors with data alone which of its kernels take them; these are on meta"
        return self._kernel_limits(spec)

    def _kernel_limits(self, spec: AttentionSpec) -> str | None:
        return None

    def run(self, q, k, v, spec, config):
        q, k, v = (x if _is_readable(x) else _readable_copy(x) for x in hide_unseen(q, k, v, spec))
        if spec.needs_grad and not self.forward_mode:
            q, k, v = refuse_second_derivative(self.name, q, k, v)
        shared = spec.q_heads != spec.kv_heads and self.shares_kv_heads
        if spec.q_heads != spec.kv_heads and not shared:
            k, v = (x.repeat_interleave(spec.group_size, dim=1) for x in (k, v))
        attn_mask, is_causal, empty_rows = _sdpa_mask(spec)
        options = (
            {"enable_gqa": True} if shared else {}
        )  # plain, where torch.compile has symbols for the numbers of heads
        attend = partial(
            F.scaled_dot_product_attention,
            q,
            k,
            v,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=spec.scale,
            **options,
        )
        if torch.compiler.is_compiling():  # one thread at a time compiles, and a lock cannot be traced
            with sdpa_kernel(self.kernel):
                out = attend()
        else:
            with _SWITCHES, sdpa_kernel(self.kernel):
                out = attend()
        return (out if empty_rows is None else out.masked_fill(empty_rows, 0.0)), None


def _is_readable(x: Tensor) -> bool:
    """Whether the fused kernels can read a tensor where it lies. PyTorch asks only for unit stride in the last dimension;
    on CUDA its kernels also load 16 bytes at a time, and rows that start elsewhere are an illegal access.
    """
    if x.stride(-1) != 1 or x.device.type != "cuda":
        return x.stride(-1) == 1
    steps = 16 // x.element_size()
    if torch.compiler.is_compiling():
        begin = 0  # what the compiled code is given, it aligns itself
    elif has_values(x):
        begin = x.data_ptr()
    else:  # what has no address yet will begin where an allocation does, which is aligned
        begin = x.storage_offset() * x.element_size()
    return begin % 16 == 0 and all(stride % steps == 0 for stride in x.stride()[:-1])


def _readable_copy(x: Tensor) -> Tensor:
    # .contiguous() would return x itself where only a dimension of size 1 has an odd stride, and the kernels look at it.
    return x.clone(memory_format=torch.contiguous_format)


def _is_plain(spec: AttentionSpec) -> bool:
    """No mask at all, as far as SDPA need know: nothing is hidden."""
    left, right = spec.mask.band() or (0, 0)
    past_is_everything = right is None or (right == 0 and spec.q_len == 1)
    return left is None and past_is_everything


def _is_square_causal(spec: AttentionSpec) -> bool:
    """Causal with as many queries as keys: there top-left and bottom-right alignment are the same."""
    return spec.mask.band() == (None, 0) and spec.q_len == spec.kv_len


def needs_dense_mask(spec: AttentionSpec) -> bool:
    """Whether SDPA must be given the mask as a matrix of Sq x Sk booleans."""
    return not (_is_plain(spec) or _is_square_causal(spec))


def _sdpa_mask(spec: AttentionSpec) -> tuple[Tensor | None, bool, Tensor | None]:
    """``(attn_mask, is_causal, empty_rows)`` for SDPA; masks that it does not know are made dense (Sq x Sk booleans)."""
    if _is_plain(spec):
        return None, False, None
    if _is_square_causal(spec):
        return None, True, None
    visible, empty_rows = spec.intervals.dense(), spec.intervals.empty_rows()[..., None]
    # An empty row looks at every key instead, and its output is thrown away: no kernel has to divide by a sum of 0.
    visible = (visible | empty_rows)[:, None].expand(spec.batch, 1, spec.q_len, spec.kv_len)
    return visible, False, empty_rows[:, None]


class SDPAMath(_SDPA):
    """The unfused formula, in PyTorch operations. Makes the N x N matrix."""

    name = "torch_sdpa_math"
    forward_mode = True
    second_derivative = True
    kernel = SDPBackend.MATH
    makes_dense_mask = False  # its scores are a matrix of that size anyway
    repeats_gradients = True


class SDPAFlash(_SDPA):
    """FlashAttention-2 on CUDA; on a CPU, PyTorch's own fused kernel."""

    name = "torch_sdpa_flash"
    kernel = SDPBackend.FLASH_ATTENTION

    def _kernel_limits(self, spec):
        if spec.head_dim != spec.v_head_dim:
            return f"the kernel needs v's head_dim to equal q's; got {spec.v_head_dim} and {spec.head_dim}"
        if spec.device.type == "cpu":
            return None
        if needs_dense_mask(spec):
            return "the CUDA kernel takes no mask but causal with as many queries as keys"
        return _cuda_limits(self.kernel, spec)


class _CUDAOnly(_SDPA):
    def missing(self):
        return None if torch.cuda.is_available() else "needs a CUDA GPU"

    def _kernel_limits(self, spec):
        return _cuda_limits(self.kernel, spec)


class SDPAEfficient(_CUDAOnly):
    """The memory-efficient kernel of xFormers (Rabe and Staats 2021, arXiv 2112.05682). Repeats KV heads for GQA."""

    name = "torch_sdpa_efficient"
    kernel = SDPBackend.EFFICIENT_ATTENTION
    shares_kv_heads = False

    def _kernel_limits(self, spec):
        if spec.needs_grad and spec.head_dim != spec.v_head_dim:
            return f"its backward needs v's head_dim to equal q's; got {spec.v_head_dim} and {spec.head_dim}"
        return super()._kernel_limits(spec)


class SDPACudnn(_CUDAOnly):
    """cuDNN's fused attention; PyTorch's fastest on Hopper."""

    name = "torch_sdpa_cudnn"
    kernel = SDPBackend.CUDNN_ATTENTION

    def _kernel_limits(self, spec):
        if needs_dense_mask(spec):
            return "its gradient under a dense mask is not to be trusted: infinite dq seen on an H200 with torch 2.11"
        return super()._kernel_limits(spec)


_CAN_USE = {
    SDPBackend.FLASH_ATTENTION: "can_use_flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "can_use_efficient_attention",
    SDPBackend.CUDNN_ATTENTION: "can_use_cudnn_attention",
}


def _cuda_limits(kernel: SDPBackend, spec: AttentionSpec) -> str | None:
    """What PyTorch itself says against this kernel."""
    if spec.device.type != "cuda":
        return f"the kernel runs on CUDA; the tensors are on {spec.device}"
    if torch.compiler.is_compiling():
        return "PyTorch cannot be asked under torch.compile whether its kernel takes a problem"
    shares_kv_heads = kernel is not SDPBackend.EFFICIENT_ATTENTION
    return _ask_pytorch(
        kernel,
        spec.device,
        spec.dtype,
        spec.q_heads,
        spec.kv_heads if shares_kv_heads else spec.q_heads,
        min(spec.q_len, _STAND_IN_TOKENS),
        min(spec.kv_len, _STAND_IN_TOKENS),
        spec.head_dim,
        spec.v_head_dim,
        needs_dense_mask(spec),
        _is_square_causal(spec),
        spec.needs_grad,
    )


_STAND_IN_TOKENS = 64  # some kernels refuse a single query or key; beyond that the length does not matter to them


@lru_cache(maxsize=4096)
def _ask_pytorch(
    kernel, device, dtype, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, dense_mask, is_causal, needs_grad
):
    q, k, v = (
        torch.empty(1, heads, tokens, dim, dtype=dtype, device=device, requires_grad=needs_grad)
        for heads, tokens, dim in (
            (q_heads, q_len, head_dim),
            (kv_heads, kv_len, head_dim),
            (kv_heads, kv_len, v_head_dim),
        )
    )
    mask = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=device) if dense_mask else None
    params = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, is_causal, q_heads != kv_heads)
    with _SWITCHES, sdpa_kernel(kernel):
        takes = getattr(torch.backends.cuda, _CAN_USE[kernel])(params, debug=False)
    if takes:
        return None
    return "PyTorch's kernel does not take this combination of dtype, head_dim, heads and mask"

"""Every way to run an attention problem, the order in which they are tried, and the reasons.

``attention(..., backend="auto")`` takes the first backend of :func:`order_of_choice` that can run the problem;
``explain(spec)`` shows the whole list with each one's answer. A backend that cannot run a problem says why. A backend asked
for by name either runs or raises: nothing else runs in its place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from flashlib.backends.base import Backend, BackendUnavailableError
from flashlib.backends.cpu import CPUBackend
from flashlib.backends.explanation import Explanation
from flashlib.backends.flash_attn import FlashAttention2, FlashAttention3
from flashlib.backends.pytorch import ReferenceBackend, TiledBackend
from flashlib.backends.speeds import recorded_speeds
from flashlib.backends.torch_sdpa import SDPACudnn, SDPAEfficient, SDPAFlash, SDPAMath, needs_dense_mask
from flashlib.backends.triton import TritonBackend
from flashlib.config import FlashAttentionConfig, check_name, current_config
from flashlib.spec import AttentionSpec
from flashlib.values import constant_when_traced

__all__ = [
    "BACKENDS",
    "PREFERENCES",
    "Backend",
    "BackendUnavailableError",
    "Explanation",
    "Preference",
    "available",
    "choose",
    "explain",
    "order_of_choice",
]

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        ReferenceBackend(),
        TiledBackend(),
        SDPAMath(),
        SDPAEfficient(),
        SDPAFlash(),
        SDPACudnn(),
        CPUBackend(),
        TritonBackend(),
        FlashAttention2(),
        FlashAttention3(),
    )
}


@dataclass(frozen=True)
class Preference:
    """One step in the order of choice: a backend, and why it stands where it stands."""

    backend: str
    reason: str


# How fast the first ones were on one GPU, explain() tells from the record (flashlib.backends.speeds); a test holds the order against it.
PREFERENCES: tuple[Preference, ...] = (
    Preference("triton", "our own kernels: any mask, the LSE and its gradient, deterministic"),
    Preference("flash_attn_3", "written for Hopper; the published figures lead on that GPU"),
    Preference("torch_sdpa_cudnn", "cuDNN's kernels, which come with PyTorch"),
    Preference("flash_attn_2", "FlashAttention-2 with windows, softcap and LSE, which PyTorch's copy does not offer"),
    Preference("cpu", "our own kernels for processors: any mask, the LSE and its gradient, deterministic"),
    Preference("torch_sdpa_flash", "FlashAttention-2 inside PyTorch; the fused kernel on CPUs"),
    Preference("torch_sdpa_efficient", "takes any mask and fp32 on a GPU, without the N x N matrix of scores"),
    Preference("tiled", "runs everything everywhere in linear memory; a Python loop, so slow for its size"),
    Preference("torch_sdpa_math", "PyTorch's unfused formula: makes the N x N matrix, so only when asked for"),
    Preference("reference", "the formula itself, for comparison"),
)


# Multiply-adds of Q K^T. One call of the CPU kernels costs 31 us before they begin, one of PyTorch's own 10, on an AMD EPYC.
LEAST_CPU_PRODUCTS = 2**18


def available() -> dict[str, str | None]:
    """Every backend by name: None if this machine has what it needs, else what is missing."""
    return {name: backend.missing() for name, backend in BACKENDS.items()}


def choose(spec: AttentionSpec, backend: str = "auto", config: FlashAttentionConfig | None = None) -> Backend:
    """The backend that runs ``spec``.

    Args:
        backend: a name, or ``"auto"`` for the first in the configured order that can.
        config: settings; None for those in force.

    Raises:
        TypeError: ``spec`` is not an :class:`flashlib.AttentionSpec`.
        ValueError: there is no backend of that name.
        BackendUnavailableError: the named backend cannot run this problem, or none in the order can; says why.
    """
    _check_spec(spec)
    config = config or current_config()
    if backend == "auto":
        backend = config.backend
    if backend != "auto":
        chosen = BACKENDS[check_name("backend", backend)]
        reason = chosen.why_not(spec, config)
        if reason:
            raise BackendUnavailableError(f"backend {backend!r} cannot run this: {reason}")
        return chosen
    for name in order_of_choice(config, spec.device):
        if BACKENDS[name].why_not(spec, config) is None and _passed_over(name, spec, config) is None:
            return BACKENDS[name]
    raise BackendUnavailableError(f"no backend in the order of choice can run this:\n{explain(spec, config)}")


def explain(spec: AttentionSpec, config: FlashAttentionConfig | None = None) -> Explanation:
    """What each backend says of a problem, in the order in which ``"auto"`` asks them.

    Raises:
        TypeError: ``spec`` is not an :class:`flashlib.AttentionSpec`.
    """
    _check_spec(spec)
    config = config or current_config()
    reasons = _reasons(spec.device)
    rows, chosen = [], None
    for name in order_of_choice(config, spec.device):
        obstacle = BACKENDS[name].why_not(spec, config)
        passed_over = None if obstacle else _passed_over(name, spec, config)
        if obstacle is None and passed_over is None and chosen is None:
            chosen = name
        how = None if obstacle else BACKENDS[name].how(spec)
        reason = f"{reasons[name]}; {how}" if how else reasons[name]
        rows.append((name, obstacle is None, obstacle or passed_over or reason))
    return Explanation(tuple(rows), chosen)


def _reasons(device: torch.device) -> dict[str, str]:
    """Why each backend stands where it stands, with what was recorded on a GPU where the tensors are on one."""
    speeds = recorded_speeds() if device.type == "cuda" else {}
    return {
        one.backend: f"{one.reason}; {speeds[one.backend]}" if one.backend in speeds else one.reason
        for one in PREFERENCES
    }


def _passed_over(name: str, spec: AttentionSpec, config: FlashAttentionConfig) -> str | None:
    """Why ``"auto"`` goes on to the next backend although this one runs the problem; None where it does not. A configured order is kept."""
    if (
        name != "cpu" or config.order or torch.compiler.is_compiling()
    ):  # nor under a compiler, which would compile for each side of it
        return None
    products = spec.batch * spec.q_heads * spec.q_len * spec.kv_len * spec.head_dim
    if products >= LEAST_CPU_PRODUCTS or needs_dense_mask(spec):
        return None
    if BACKENDS["torch_sdpa_flash"].why_not(spec, config) is not None:
        return None
    return "runs it, but of problems this small PyTorch's own kernel makes quicker work: calling ours costs more"


def _check_spec(spec: AttentionSpec) -> None:
    if not isinstance(spec, AttentionSpec):
        hint = "AttentionSpec.from_tensors(q, k, v, ...) makes one"
        raise TypeError(f"spec must be an AttentionSpec; got {type(spec).__name__} ({hint})")


def order_of_choice(config: FlashAttentionConfig, device: torch.device) -> list[str]:
    """The backends that ``"auto"`` tries for tensors on ``device``: those of ``config.order``, or else of :data:`PREFERENCES`.

    On a CPU our Triton kernels, which run in Triton's interpreter if at all, come after everything that is compiled.
    """
    if config.order:
        return list(config.order)
    names = [preference.backend for preference in PREFERENCES]
    if device.type != "cuda":
        names.remove("triton")
        names.insert(names.index("tiled"), "triton")
    return names


@constant_when_traced
def config_for(device: str, *, packed: bool, repeatable: bool) -> FlashAttentionConfig:
    """The configuration in force, narrowed for a kind of call.

    Args:
        device: type of the device.
        packed: leave out what would make a matrix of all queries by all keys of a pack.
        repeatable: leave out what does not repeat its gradients bit by bit, and have the others do it.

    Raises:
        BackendUnavailableError: nothing is left, or the backend that is asked for by name does not repeat its gradients.
    """
    config = current_config()
    kept = _narrowed.get((id(config), device, packed, repeatable))
    if kept is not None and kept[0] is config:
        return kept[1]
    narrowed = _narrow(config, device, packed, repeatable)
    if len(_narrowed) >= MOST_NARROWED:
        _narrowed.clear()
    _narrowed[id(config), device, packed, repeatable] = (config, narrowed)
    return narrowed


# One and the same for one configuration, by whose identity calls are known again (flashlib.routes).
_narrowed: dict[tuple, tuple[FlashAttentionConfig, FlashAttentionConfig]] = {}
MOST_NARROWED = 64


def _narrow(config: FlashAttentionConfig, device: str, packed: bool, repeatable: bool) -> FlashAttentionConfig:
    if repeatable:
        fa2, fa3 = replace(config.fa2, deterministic=True), replace(config.fa3, deterministic=True)
        config = replace(config, fa2=fa2, fa3=fa3)
        if config.backend != "auto" and not BACKENDS[config.backend].repeats_gradients:
            raise BackendUnavailableError(
                f"deterministic=True: the gradients of {config.backend!r} may differ from run to run"
            )
    if config.backend == "auto" and (packed or repeatable):
        order = order_of_choice(config, torch.device(device))
        unfit = [
            name
            for name in order
            if (packed and BACKENDS[name].makes_dense_mask) or (repeatable and not BACKENDS[name].repeats_gradients)
        ]
        allowed = [name for name in order if name not in unfit]
        if not allowed:
            raise BackendUnavailableError(
                f"none of {', '.join(order)} runs packed sequences, or gives deterministic gradients"
            )
        config = replace(config, order=allowed)
    return config

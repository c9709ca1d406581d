"""Which backend runs attention, and how: nested dataclasses, from a dict, from YAML, and back.

    config = FlashAttentionConfig.from_yaml("attention.yaml")
    with use_config(config):
        out = attention(q, k, v)

Every setting is read by some backend; an unknown one is refused, so that a misspelled setting is not silently ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import dacite
import yaml
from torch.utils import checkpoint

from flashlib.packing import PACKINGS
from flashlib.tiled import Tiling
from flashlib.values import constant_when_traced

__all__ = [
    "FA2Config",
    "FA3Config",
    "FlashAttentionConfig",
    "InjectionConfig",
    "ProfilingConfig",
    "TritonConfig",
    "current_config",
    "use_config",
]

# Every backend there is; :data:`flashlib.backends.BACKENDS` has an object for each.
BACKEND_NAMES = (
    *("reference", "tiled", "torch_sdpa_math", "torch_sdpa_efficient", "torch_sdpa_flash", "torch_sdpa_cudnn"),
    *("cpu", "triton", "flash_attn_2", "flash_attn_3"),
)
INJECTION_MODES = ("blend", "gate")
FP32_PRECISIONS = ("ieee", "tf32", "tf32x3")
AUTOTUNE = ("unknown", "always", "never")


def check_name(argument: str, name: str) -> str:
    """Return ``name`` if there is such a backend; else ValueError naming ``argument`` and the backends there are."""
    if name not in BACKEND_NAMES:
        raise ValueError(f"{argument}: there is no backend {name!r}; backends are {', '.join(BACKEND_NAMES)}")
    return name


@dataclass(frozen=True)
class FA3Config:
    """FlashAttention-3 (Hopper). ``num_splits=0`` lets its heuristic choose how often to split the keys."""

    enabled: bool = True
    num_splits: int = 1
    deterministic: bool = False


@dataclass(frozen=True)
class FA2Config:
    """FlashAttention-2 (Ampere and newer). ``deterministic`` makes its backward pass repeatable, and slower."""

    enabled: bool = True
    deterministic: bool = False


@dataclass(frozen=True)
class TritonConfig:
    """Our own kernels.

    Attributes:
        fp32_precision: how fp32 products are formed. ``"ieee"`` is true fp32; ``"tf32"`` keeps 10 bits of each factor and runs on
            tensor cores; ``"tf32x3"`` makes up for the lost bits with three such products.
        autotune: when tile sizes are found by timing them, once per kind of problem, and kept on disk. ``"unknown"``: on GPUs for
            which there is no table; ``"always"``: on every GPU; ``"never"``: the table, or that of the nearest GPU.
    """

    fp32_precision: str = "ieee"
    autotune: str = "unknown"

    def __post_init__(self):
        for name, allowed in (("fp32_precision", FP32_PRECISIONS), ("autotune", AUTOTUNE)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")


@dataclass(frozen=True)
class InjectionConfig:
    """How :class:`flashlib.inference.injection.KVInjector` injects a memory, unless a call says otherwise.

    Attributes:
        mode: ``"blend"`` weighs the outputs with alpha, ``"gate"`` the memory's exponentials inside the softmax.
        alpha: how much the memory counts: 0 for not at all, 1 for as much as keys in the prompt.
        chunk_size: keys per chunk where a memory is looked at piece by piece.
    """

    mode: str = "blend"
    alpha: float = 1.0
    chunk_size: int = 1024

    def __post_init__(self):
        if self.mode not in INJECTION_MODES:
            raise ValueError(f"mode must be one of {', '.join(INJECTION_MODES)}; got {self.mode!r}")
        check_alpha(self.alpha, self.mode)
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {self.chunk_size}")


def check_alpha(alpha: float, mode: str) -> None:
    """TypeError or ValueError unless ``alpha`` is a number that the mode of injection can use."""
    if isinstance(alpha, bool) or not isinstance(alpha, Real):
        raise TypeError(f"alpha must be a number or a tensor; got {type(alpha).__name__}")
    largest = 1.0 if mode == "blend" else math.inf
    if not (0 <= alpha <= largest and math.isfinite(alpha)):
        allowed = "between 0 and 1" if mode == "blend" else "finite and at least 0"
        raise ValueError(f"alpha must be {allowed} in mode {mode!r}; got {alpha}")


@dataclass(frozen=True)
class ProfilingConfig:
    """How :class:`flashlib.measure.racing.profiler.AttentionProfiler` measures, unless it is told otherwise.

    Attributes:
        enabled: whether it measures at all.
        memory: whether the peak memory of regions is noted, on a GPU.
        trace_events: how many of the last regions are kept for a trace; 0 for none.
    """

    enabled: bool = True
    memory: bool = True
    trace_events: int = 0

    def __post_init__(self):
        if self.trace_events < 0:
            raise ValueError(f"trace_events must be at least 0; got {self.trace_events}")


@dataclass(frozen=True)
class FlashAttentionConfig:
    """How :func:`flashlib.attention` runs.

    Attributes:
        backend: name of a backend, or ``"auto"`` for the first in the order of choice that can run the problem.
        order: backends for ``"auto"`` to try, in this order; empty for :func:`flashlib.backends.order_of_choice`.
        packing: what is done with packed sequences (:class:`flashlib.masks.Varlen`). ``"dense"``: they are computed where they lie. ``"aligned"``: they are
            copied apart first, so that what a sequence gives is bitwise the same wherever in a pack it lies (:mod:`flashlib.packing`).
        fa3, fa2, triton, tiled: settings of single backends.
        injection: how memories are injected.
        profiling: how regions are measured.
    """

    backend: str = "auto"
    order: list[str] = field(default_factory=list)
    packing: str = "dense"
    fa3: FA3Config = field(default_factory=FA3Config)
    fa2: FA2Config = field(default_factory=FA2Config)
    triton: TritonConfig = field(default_factory=TritonConfig)
    tiled: Tiling = field(default_factory=Tiling)
    injection: InjectionConfig = field(default_factory=InjectionConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)

    def __post_init__(self):
        if self.packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}; got {self.packing!r}")
        if self.backend != "auto":
            check_name("backend", self.backend)
        for name in self.order:
            check_name("order", name)

    @classmethod
    def from_dict(cls, settings: Mapping) -> FlashAttentionConfig:
        """Build from nested dicts, e.g. ``{"backend": "auto", "tiled": {"block_q": 64}}``; what is left out keeps its default.

        Raises:
            ValueError: a setting does not exist or its value is not allowed.
            TypeError: a value has the wrong type; the message gives the setting's path.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"settings must be a mapping of names to values; got {type(settings).__name__}")
        try:
            return dacite.from_dict(cls, dict(settings), dacite.Config(strict=True))
        except dacite.UnexpectedDataError as error:
            known = ", ".join(f.name for f in dataclasses.fields(cls))
            unknown = ", ".join(sorted(map(str, error.keys)))
            raise ValueError(f"unknown setting: {unknown}; top-level settings are {known}") from None
        except dacite.WrongTypeError as error:
            raise TypeError(f"{error.field_path} must be {error.field_type}; got {error.value!r}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> FlashAttentionConfig:
        """Read a YAML file laid out like :meth:`from_dict`'s argument. An empty file gives the defaults."""
        return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})

    def to_dict(self) -> dict:
        """Plain nested dicts; ``from_dict(config.to_dict()) == config``."""
        return dataclasses.asdict(self)


_current: ContextVar[FlashAttentionConfig | None] = ContextVar("flashlib_config", default=None)
_entered: list[FlashAttentionConfig] = []  # by any thread, the newest last


@constant_when_traced
def current_config() -> FlashAttentionConfig:
    """The configuration in force: that of the innermost :func:`use_config`, or the defaults.

    A thread that has not entered a :func:`use_config` of its own sees the newest that any thread is inside of: worker threads, and those in which
    autograd runs a backward pass. Under ``torch.compile`` it is read once, when the call is traced.
    """
    return _current.get() or (_entered[-1] if _entered else _defaults())


@functools.cache
def _defaults() -> FlashAttentionConfig:
    """One and the same: who calls under the defaults is known by it again (:mod:`flashlib.routes`)."""
    return FlashAttentionConfig()


@contextlib.contextmanager
def use_config(config: FlashAttentionConfig) -> Iterator[FlashAttentionConfig]:
    """Let every :func:`flashlib.attention` call inside the block run under ``config``.

    What ``torch.utils.checkpoint`` records inside the block it also recomputes under ``config``, wherever the backward pass is run.
    """
    if not isinstance(config, FlashAttentionConfig):
        raise TypeError(f"config must be a FlashAttentionConfig; got {type(config).__name__}")
    token = _current.set(config)
    _entered.append(config)
    try:
        yield config
    finally:
        # By identity: of two equal configurations, either may go.
        del _entered[max(at for at, entered in enumerate(_entered) if entered is config)]
        _current.reset(token)


def _carry_through_checkpoints() -> None:
    """Have the functions that PyTorch keeps for recomputation remember the configuration they were first run under.

    A recomputation happens in the backward pass, mostly after the block of :func:`use_config` has ended. PyTorch restores autocast and the random state for
    it and knows nothing of ours. Both kinds of checkpoint go through one name each, and are handed the function there.
    """
    reentrant, generator = checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator

    class CheckpointFunction(reentrant):  # type: ignore[valid-type, misc]
        @staticmethod
        def forward(ctx, run_function, *arguments):
            return reentrant.forward(ctx, _carrying(run_function), *arguments)

    @functools.wraps(generator)
    def without_reentrant(function, *arguments, **options):
        return generator(_carrying(function), *arguments, **options)

    module: Any = checkpoint
    module.CheckpointFunction = CheckpointFunction
    module._checkpoint_without_reentrant_generator = without_reentrant


def _carrying(function: Callable) -> Callable:
    """``function``, run under the configuration of now whenever it is run."""
    config = current_config()

    @functools.wraps(function)
    def run(*arguments, **options):
        with use_config(config):
            return function(*arguments, **options)

    return run


_carry_through_checkpoints()  # here: a forward pass may be recorded under the defaults, and recomputed inside of a use_config

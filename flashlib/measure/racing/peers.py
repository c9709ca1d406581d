"""Who attention is measured against: every backend of flashlib by its name, and other people's implementations by theirs.

A peer gets a case and one set of inputs, and gives back a function of q, k and v. What can be done once for many calls is done
before that function is timed: checking, compiling, laying out a mask. A peer that cannot run a case says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flashlib.backends import BACKENDS
from flashlib.backends.base import Backend
from flashlib.config import current_config
from flashlib.spec import AttentionSpec

__all__ = ["Peer", "PeerUnavailableError", "default_peers", "find_peers"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
CPU_PEERS = ("cpu", "tiled", "torch_sdpa_flash", "torch_sdpa_math", "naive", "flex_attention")
NOT_RACED = (
    "reference",
    "tiled",
    "cpu",
    "triton_tutorial_ws",
)  # on a GPU: written to be read; for processors; slower than its twin
MAKE_THE_MATRIX = (
    "naive",
    "naive_compiled",
    "torch_sdpa_math",
)  # last, so that the memory they take is not missed by others
RECOMPILATIONS = 100_000  # more than any run needs: at PyTorch's own limit FlexAttention falls back to an unfused path


class PeerUnavailableError(RuntimeError):
    """A peer cannot run a case here. The message says why."""


class Peer:
    """One implementation of attention.

    Attributes:
        name: as in records.
        dtype: the type that it computes in whatever the case says, as named in :data:`flashlib.measure.racing.cases.DTYPES`; None for
            the case's own.
        rows_first: whether q, k and v lie in memory as ``[B, S, H, D]``, the layout of its own interface. Their shape is
            ``[B, H, S, D]`` either way.
        compiles: whether a first call compiles for long.
        captures: whether its calls can be captured in a CUDA graph.
    """

    name: str
    dtype: str | None = None
    rows_first = False
    compiles = False
    captures = True

    def arrange(self, case: Any, k: Tensor, v: Tensor) -> tuple[Any, Any]:
        """k and v ``[B, H, S, D]`` in the form in which the peer's function takes them, if that is another."""
        return k, v

    def prepare(self, case: Any, q: Tensor, k: Tensor, v: Tensor) -> Attend:
        """A function from q, k, v ``[B, H, S, D]`` to out, for this case and inputs shaped and typed like these.

        Raises:
            PeerUnavailableError: it cannot run the case here; says why.
        """
        raise NotImplementedError


class BackendPeer(Peer):
    """A backend of :func:`flashlib.attention`."""

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name = backend, backend.name
        self.rows_first = backend.name.startswith("flash_attn")
        self.compiles = backend.name == "triton"

    def prepare(self, case, q, k, v):
        config = current_config()
        spec = AttentionSpec.from_tensors(q, k, v, mask=case.mask_rule())
        obstacle = self.backend.why_not(spec, config)
        if obstacle:
            raise PeerUnavailableError(obstacle)
        return lambda q, k, v: self.backend.run(q, k, v, spec, config)[0]


class Naive(Peer):
    """``softmax(Q K^T) V`` in PyTorch operations, and nothing that the formula does not ask for."""

    name = "naive"

    def prepare(self, case, q, k, v):
        hidden = None
        if case.mask != "full":
            hidden = ~case.mask_rule().intervals(q.shape[0], q.shape[2], k.shape[2], q.device).dense()[:, None]
        scale, group = 1 / math.sqrt(case.head_dim), case.q_heads // case.kv_heads
        return lambda q, k, v: naive(q, k, v, hidden, scale, group)


def naive(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, group: int) -> Tensor:
    """The formula; ``hidden`` is the mask of what may not be seen, bool ``[B or 1, 1, Sq, Sk]``."""
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.mT) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


class NaiveCompiled(Naive):
    """The same under ``torch.compile``."""

    name = "naive_compiled"

    def prepare(self, case, q, k, v):
        return _compiled(super().prepare(case, q, k, v))


class FlexAttention(Peer):
    """PyTorch's FlexAttention, compiled for the case; its block mask is made beforehand."""

    name = "flex_attention"
    compiles = True

    def prepare(self, case, q, k, v):
        if q.device.type == "cpu" and case.needs_grad:
            raise PeerUnavailableError("FlexAttention has no backward on a CPU")
        from torch.nn.attention.flex_attention import flex_attention

        block_mask, grouped = _block_mask(case, q, k), case.q_heads != case.kv_heads
        return _compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask, enable_gqa=grouped))


def _block_mask(case: Any, q: Tensor, k: Tensor):
    from torch.nn.attention.flex_attention import create_block_mask

    if case.mask == "full":
        return None
    if case.mask == "lengths":
        lengths = torch.tensor(case.lengths, device=q.device)

        def filled(b, h, row, key):
            return key < lengths[b]

        return create_block_mask(filled, B=q.shape[0], H=None, Q_LEN=q.shape[2], KV_LEN=k.shape[2], device=q.device)
    window = case.length if case.window is None else case.window
    lengths = torch.tensor(case.sequences or (case.length,), device="cpu")
    document = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths).to(q.device)

    def causal(b, h, row, key):
        return row >= key

    def banded(b, h, row, key):
        return (row >= key) & (row - key <= window)

    def packed(b, h, row, key):
        return document[row] == document[key]

    def packed_causal(b, h, row, key):
        return (document[row] == document[key]) & (row >= key)

    if case.sequences is not None:
        rule = packed_causal if case.causal else packed
    else:
        rule = causal if case.window is None else banded
    return create_block_mask(rule, B=None, H=None, Q_LEN=q.shape[2], KV_LEN=k.shape[2], device=q.device)


def _compiled(function: Attend) -> Attend:
    """``torch.compile``, which must neither give up nor forbid a second backward."""
    import torch._dynamo
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILATIONS
    # A backward that may overwrite what it saved runs once only, and ours is timed many times.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False, fullgraph=True)


class TorchVarlen(Peer):
    """PyTorch's ``varlen_attn``: FlashAttention-2 on sequences packed in one row."""

    name = "torch_varlen"
    rows_first = True

    def prepare(self, case, q, k, v):
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            raise PeerUnavailableError(f"torch {torch.__version__} has no varlen_attn")
        if q.device.type != "cuda":
            raise PeerUnavailableError("needs a CUDA GPU")
        if case.sequences is None:
            raise PeerUnavailableError("takes packed sequences only")
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.tensor([0, *itertools.accumulate(case.sequences)], dtype=torch.int32, device=q.device)
        longest = max(case.sequences)
        if "window_size" in inspect.signature(varlen_attn).parameters:
            options = {"window_size": (-1, 0 if case.causal else -1)}
        else:
            options = {"is_causal": case.causal}  # its name before torch 2.11

        def attend(q, k, v):
            rows = (x[0].transpose(0, 1) for x in (q, k, v))  # [S, H, D]
            return varlen_attn(*rows, ends, ends, longest, longest, **options).transpose(0, 1)[None]

        return attend


class FlashAttention4(Peer):
    """FlashAttention-4 of the flash-attn-4 package, written in CuTe DSL."""

    name = "flash_attn_4"
    rows_first = True
    compiles = True

    def prepare(self, case, q, k, v):
        if q.device.type != "cuda":
            raise PeerUnavailableError("needs a CUDA GPU")
        try:
            function = importlib.import_module("flash_attn.cute.interface").flash_attn_func
        except ImportError as error:
            raise PeerUnavailableError(f"the package flash-attn-4 is not installed ({error})") from None
        if case.sequences is not None:
            raise PeerUnavailableError("packed sequences are not measured through this interface")
        options: dict = {"causal": case.causal and case.window is None}
        if case.window is not None:
            options["window_size"] = (case.window, 0)

        def attend(q, k, v):
            result = function(*(x.transpose(1, 2) for x in (q, k, v)), **options)
            out = result[0] if isinstance(result, tuple) else result
            return out.transpose(1, 2)

        return attend


class Tutorial(Peer):
    """The fused attention of Triton's own tutorial 06, from a file that the user names. It computes in fp16."""

    dtype = "fp16"
    compiles = True

    def __init__(self, path: Path, warp_specialize: bool | None) -> None:
        self.path, self.warp_specialize = path, warp_specialize
        self.name = "triton_tutorial_ws" if warp_specialize else "triton_tutorial"

    def prepare(self, case, q, k, v):
        if q.device.type != "cuda":
            raise PeerUnavailableError("needs a CUDA GPU")
        if case.mask not in ("full", "causal") or case.q_heads != case.kv_heads:
            raise PeerUnavailableError("takes no mask but causal, and as many KV heads as query heads")
        options = {"causal": case.causal, "sm_scale": 1 / math.sqrt(case.head_dim)}
        if self.warp_specialize is not None:
            options["warp_specialize"] = self.warp_specialize
        return tutorial_attention(self.path, options)


def tutorial_attention(path: Path, options: dict) -> Attend:
    """The tutorial's ``attention`` with its options by name; those not given keep their defaults.

    Raises:
        PeerUnavailableError: the file cannot be loaded, or its function takes something else.
    """
    function = _tutorial(path, options["causal"]).attention
    # It is the apply of an autograd function, which takes no names: they are those of its forward, behind ctx, q, k and v.
    parameters = list(inspect.signature(function.__self__.forward).parameters.values())[4:]
    values = [options.get(parameter.name, parameter.default) for parameter in parameters]
    missing = [p.name for p, value in zip(parameters, values, strict=True) if value is inspect.Parameter.empty]
    unknown = options.keys() - {parameter.name for parameter in parameters}
    if missing or unknown:
        raise PeerUnavailableError(f"attention in {path} takes {', '.join(p.name for p in parameters)}; had {options}")
    return lambda q, k, v: function(q, k, v, *values)


@cache
def _tutorial(path: Path, causal: bool):
    """The tutorial as a module. What it runs as a script, it does not run here, and its tests need no pytest.

    One for each mask: it tunes once for each length, whichever mask comes first, and what is best for one is wrong for the other.
    """
    spec = importlib.util.spec_from_file_location(f"triton_tutorial_06_{'causal' if causal else 'full'}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise PeerUnavailableError(f"{path} is not a Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    stands_in = "pytest" not in sys.modules and importlib.util.find_spec("pytest") is None
    if stands_in:
        sys.modules["pytest"] = mock.MagicMock(name="pytest")
    try:
        spec.loader.exec_module(module)
    except (ImportError, RuntimeError) as error:
        raise PeerUnavailableError(f"{path} cannot be loaded: {error}") from error
    finally:
        if stands_in:
            del sys.modules["pytest"]
    if not hasattr(getattr(module, "attention", None), "__self__"):
        raise PeerUnavailableError(f"{path} defines no attention that is the apply of an autograd function")
    return module


class AbsentTutorial(Peer):
    """Stands in the record for the tutorial where no file was named."""

    name = "triton_tutorial"

    def prepare(self, case, q, k, v):
        raise PeerUnavailableError("its source was not given (--tutorial PATH of 06-fused-attention.py)")


def _tutorials(path: Path | None) -> list[Peer]:
    """The tutorial without warp specialization, and with it in versions that have it."""
    if path is None:
        return [AbsentTutorial()]
    if not path.is_file():
        raise ValueError(f"tutorial must be a Python file; got {path}")
    if "warp_specialize" not in path.read_text(encoding="utf-8"):
        return [Tutorial(path, None)]
    return [Tutorial(path, False), Tutorial(path, True)]


def _all_peers(tutorial: Path | None) -> dict[str, Peer]:
    backends = [BackendPeer(backend) for backend in BACKENDS.values()]
    others = [Naive(), NaiveCompiled(), FlexAttention(), TorchVarlen(), FlashAttention4(), *_tutorials(tutorial)]
    return {peer.name: peer for peer in (*backends, *others)}


def default_peers(device: str, tutorial: Path | None = None) -> list[Peer]:
    """Those that are worth racing on a device: all but the slow and readable on a GPU, what runs at all on a CPU."""
    peers = _all_peers(tutorial)
    if device == "cpu":
        return [peers[name] for name in CPU_PEERS]
    first = [peer for name, peer in peers.items() if name not in (*NOT_RACED, *MAKE_THE_MATRIX)]
    return [*first, *(peers[name] for name in MAKE_THE_MATRIX)]


def find_peers(names: list[str], tutorial: Path | None = None) -> list[Peer]:
    """Peers by name.

    Raises:
        ValueError: there is no peer of a name; lists those there are.
    """
    peers = _all_peers(tutorial)
    for name in names:
        if name not in peers:
            raise ValueError(f"there is no peer {name!r}; peers are {', '.join(peers)}")
    return [peers[name] for name in names]

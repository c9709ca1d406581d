"""What is measured of inference: one step of decoding over caches, shared prefixes and memories, and who is raced at it.

A step reads every key and value once and computes next to nothing, so its figure is GB/s: bytes of K and V, each counted once
however often it is held or read, over the time.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashlib.masks import Causal, KeyLengths, Mask, Unmasked
from flashlib.measure.racing.cases import DTYPES
from flashlib.measure.racing.peers import FlexAttention, Naive, Peer, PeerUnavailableError

__all__ = ["DECODE_PRESETS", "DecodeCase", "decode_cases", "decode_peers"]

CACHES = ("full", "ragged", "prefix", "memory")
SHORTEST = 100  # keys, of the shortest request of a ragged batch
CPU_SHORTER, CPU_NARROWER = 64, 4  # by how much a processor's presets are smaller than a GPU's
# By name: the cases, as (batch, length) and further fields of DecodeCase, and the peers that are raced.
ONE_STEP = ("flashlib", "torch_sdpa_cudnn", "torch_sdpa_flash", "flex_attention", "naive")
SIZES = ((1, 4096), (1, 131072), (16, 8192), (64, 4096))
DECODE_PRESETS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "decode": (SIZES, {}, ONE_STEP),
    "paged-decode": (SIZES, {}, ("flashlib", "flashlib_page_16", "flashlib_page_64", "flashlib_page_256")),
    "ragged-decode": (
        ((16, 100_000),),
        {"cache": "ragged"},
        ("flashlib", "flashlib_page_16", "torch_sdpa_cudnn", "torch_sdpa_efficient", "torch_sdpa_math", "flex_attention"),
    ),
    "shared-prefix": (
        ((64, 32768),),
        {"cache": "prefix", "own": 128},
        ("flashlib_prefix", "flashlib", "torch_sdpa_cudnn", "torch_sdpa_flash"),
    ),
    "chunked-injection": (
        ((1, 131072),),
        {"cache": "memory", "own": 128, "queries": 128},
        ("inject_chunked_1024", "inject_chunked_4096", "inject_chunked_16384", "inject", "concatenated"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DecodeCase:
    """The newest tokens of some requests against all that they have in their caches.

    Attributes:
        batch, q_heads, kv_heads, head_dim: B, Hq, Hkv, D. queries: Sq, new tokens of each request.
        length: keys: of every request, if ``cache`` is ``"full"``; of the longest, if it is ``"ragged"``, and from there down to 100
            evenly by logarithm; that all requests share, if it is ``"prefix"``; of a memory in the host's RAM, if ``"memory"``.
        own: keys of each request behind those, the new ones included; in a prefix or a memory.
        dtype: a name of :data:`flashlib.measure.racing.cases.DTYPES`.

    Raises:
        ValueError: a value is not one of these.
    """

    batch: int
    q_heads: int
    kv_heads: int
    length: int
    head_dim: int
    queries: int = 1
    own: int = 0
    cache: str = "full"
    dtype: str = "bf16"

    direction = "decode"
    needs_grad = False

    def __post_init__(self) -> None:
        for name in ("batch", "q_heads", "kv_heads", "length", "head_dim", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads must be a multiple of kv_heads; got {self.q_heads} and {self.kv_heads}")
        if self.cache not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}; got {self.cache!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if (self.own >= self.queries) != self.about_memory:
            raise ValueError(f"own must be at least queries with a prefix or a memory, and else 0; got {self.own}")

    @property
    def lengths(self) -> list[int]:
        """Keys of each request, all told."""
        if self.cache != "ragged":
            return [self.length + self.own] * self.batch
        least, steps = min(SHORTEST, self.length), max(1, self.batch - 1)
        lengths = [round(least * (self.length / least) ** (n / steps)) for n in range(self.batch)]
        random.Random(self.length).shuffle(lengths)
        return lengths

    @property
    def mask(self) -> str:
        """What the new tokens may see of the keys that are there, in the words of :class:`flashlib.measure.racing.cases.Case`."""
        if self.cache == "ragged":
            return "lengths"
        return "full" if self.queries == 1 else "causal"

    def mask_rule(self, entries: Sequence[int] | None = None) -> Mask:
        """The mask as :func:`flashlib.attention` takes it, of all requests or of some."""
        if self.cache == "ragged":
            return KeyLengths([self.lengths[entry] for entry in entries or range(self.batch)])
        return Unmasked() if self.queries == 1 else Causal()

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of q, k and v: ``[B, H, S, D]``, every request with all its keys."""
        keys = (self.batch, self.kv_heads, self.length + self.own, self.head_dim)
        return (self.batch, self.q_heads, self.queries, self.head_dim), keys, keys

    @property
    def bytes(self) -> int:
        """Of K and V, each counted once: a prefix that requests share too."""
        shared = self.length if self.cache == "prefix" else 0
        tokens = shared + sum(self.lengths) - shared * self.batch
        return 2 * tokens * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def about_memory(self) -> bool:
        """Whether what a peer holds and needs is part of the question."""
        return self.cache in ("prefix", "memory")

    def share_prefix(self, x: Tensor) -> None:
        """Give all requests the first one's prefix, if there is one: in keys or values ``[B, H, S, D]``, in place."""
        if self.cache == "prefix":
            x[1:, :, : self.length] = x[:1, :, : self.length]

    def rates(self, ms: float) -> dict[str, float]:
        return {"gb_per_s": self.bytes / ms / 1e6}

    @property
    def label(self) -> str:
        return " ".join(self.words().values())

    def words(self) -> dict[str, str]:
        heads = f"{self.q_heads}/{self.kv_heads}"
        own = f"+{self.own}" if self.own else ""
        sizes = {"batch": f"B{self.batch}", "length": f"S{self.length}{own}", "heads": f"H{heads}", "head_dim": f"D{self.head_dim}"}  # fmt: skip
        return {"cache": self.cache, **sizes, "dtype": self.dtype}

    def columns(self) -> dict:
        """The case as columns of a record's row."""
        return asdict(self)

    @classmethod
    def from_columns(cls, row: dict) -> DecodeCase:
        """The case of a record's row."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


def decode_cases(preset: str, device: str) -> list[DecodeCase]:
    """The cases of a preset: 32 query and 8 KV heads of 128 channels in bf16; on a CPU, all of it smaller, in fp32."""
    sizes, options, _ = DECODE_PRESETS[preset]
    if device == "cuda":
        return [DecodeCase(batch, 32, 8, length, 128, **options) for batch, length in sizes]
    smaller = options | ({"own": 8} if "own" in options else {}) | ({"queries": 8} if "queries" in options else {})
    return [
        DecodeCase(
            min(batch, 8), 32 // CPU_NARROWER, 8 // CPU_NARROWER, length // CPU_SHORTER, 64, **smaller, dtype="fp32"
        )
        for batch, length in sizes
    ]


class Decode(Peer):
    """:func:`flashlib.inference.decode_attention` over one cache for each request, contiguous or paged."""

    compiles = True

    def __init__(self, page_size: int | None = None) -> None:
        self.page_size = page_size
        self.name = "flashlib" if page_size is None else f"flashlib_page_{page_size}"

    def arrange(self, case, k, v):
        return (k, v) if self.page_size is None else (_in_pages(x, self._table(case), self.page_size) for x in (k, v))

    def _table(self, case: DecodeCase) -> Tensor:
        """int32 ``[B, pages of the longest]``: pages in random order, the same in every set of inputs."""
        assert self.page_size is not None
        per_request = -(-case.shapes[1][2] // self.page_size)
        generator = torch.Generator("cpu").manual_seed(per_request)
        pages = torch.randperm(case.batch * per_request, generator=generator, dtype=torch.int32, device="cpu")
        return pages.view(case.batch, per_request)

    def prepare(self, case, q, k, v):
        from flashlib.inference.decode import decode_attention

        _one_query(case)
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device=q.device) if case.cache == "ragged" else None
        if self.page_size is None:
            return functools.partial(decode_attention, lengths=lengths)
        if lengths is None:
            lengths = torch.tensor(case.lengths, dtype=torch.int32, device=q.device)
        return functools.partial(decode_attention, lengths=lengths, block_table=self._table(case).to(q.device))


def _one_query(case: DecodeCase) -> None:
    if case.cache == "memory":
        raise PeerUnavailableError("its keys lie in the host's RAM")


def _in_pages(x: Tensor, table: Tensor, page_size: int) -> Tensor:
    """``[B, H, S, D]`` as pages ``[pages, H, page_size, D]``, where the table says."""
    pages = x.new_zeros(table.numel(), x.shape[1], page_size, x.shape[3])
    padded = F.pad(x, (0, 0, 0, table.shape[1] * page_size - x.shape[2]))
    pages[table.flatten().long()] = padded.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1)
    return pages


class SharedPrefixPeer(Peer):
    """:func:`flashlib.inference.shared_prefix_attention`: one prefix, and each request's own keys."""

    name = "flashlib_prefix"
    compiles = True

    def arrange(self, case, k, v):
        return tuple((x[:1, :, : case.length].clone(), x[:, :, case.length :].clone()) for x in (k, v))

    def prepare(self, case, q, k, v):
        from flashlib.inference.prefix import SharedPrefix, shared_prefix_attention

        if case.cache != "prefix":
            raise PeerUnavailableError("needs a prefix")
        return lambda q, k, v: shared_prefix_attention(q, SharedPrefix(k[0], v[0]), k[1], v[1])


class Injection(Peer):
    """:class:`flashlib.inference.KVInjector` with a memory in the host's RAM: brought whole, or a chunk at a time."""

    captures = False
    compiles = True

    def __init__(self, chunk_size: int | None) -> None:
        self.chunk_size = chunk_size
        self.name = "inject" if chunk_size is None else f"inject_chunked_{chunk_size}"

    def arrange(self, case, k, v):
        return _memory_and_own(case, k, v)

    def prepare(self, case, q, k, v):
        from flashlib.inference.injection import KVInjector, Memory

        _needs_memory(case)
        injector = KVInjector()
        if self.chunk_size is None:
            return lambda q, k, v: injector.inject(
                q, k[1], v[1], Memory(k[0], v[0]).to(q.device, q.dtype), alpha=1.0, causal=True
            )
        return lambda q, k, v: injector.inject_chunked(
            q, k[1], v[1], Memory(k[0], v[0]), chunk_size=self.chunk_size, alpha=1.0, causal=True
        )


class Concatenated(Peer):
    """Attention over the memory brought to the device and put in front of the own keys."""

    name = "concatenated"
    captures = False
    compiles = True

    def arrange(self, case, k, v):
        return _memory_and_own(case, k, v)

    def prepare(self, case, q, k, v):
        from flashlib.attention import attention

        _needs_memory(case)

        def attend(q, k, v):
            k, v = (torch.cat([memory.to(own.device), own], dim=2) for memory, own in (k, v))
            return attention(q, k, v, causal=True)

        return attend


def _needs_memory(case: DecodeCase) -> None:
    if case.cache != "memory":
        raise PeerUnavailableError("needs a memory in the host's RAM")


def _memory_and_own(case: DecodeCase, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((x[:, :, : case.length].cpu(), x[:, :, case.length :].clone()) for x in (k, v))


class DecodeSDPA(Peer):
    """PyTorch's SDPA over full caches; over ragged ones with padding, hidden by a mask where the kernel takes one."""

    def __init__(self, name: str, kernel: SDPBackend) -> None:
        self.name, self.kernel = name, kernel

    def prepare(self, case, q, k, v):
        _one_query(case)
        if q.device.type != "cuda" and self.name in ("torch_sdpa_cudnn", "torch_sdpa_efficient"):
            raise PeerUnavailableError("needs a CUDA GPU")
        visible = None
        if case.cache == "ragged":
            if self.name == "torch_sdpa_flash" and q.device.type == "cuda":
                raise PeerUnavailableError("the kernel takes no mask, so that padding cannot be hidden")
            visible = case.mask_rule().intervals(case.batch, 1, k.shape[2], q.device).dense()[:, None]
        if self.name == "torch_sdpa_efficient":
            # It takes no KV heads that are shared. The query heads of one are rows that see the same keys, and so one longer query.
            return lambda q, k, v: self._attend(q.unflatten(1, (k.shape[1], -1)).flatten(2, 3), k, v, visible).view(
                q.shape
            )
        return lambda q, k, v: self._attend(q, k, v, visible, enable_gqa=True)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, **options) -> Tensor:
        with sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, **options)


def _all_decode_peers() -> dict[str, Peer]:
    kernels = {
        "torch_sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch_sdpa_flash": SDPBackend.FLASH_ATTENTION,
        "torch_sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
        "torch_sdpa_math": SDPBackend.MATH,
    }
    pages = [Decode(page_size) for page_size in (1, 16, 64, 128, 256)]
    chunks = [Injection(size) for size in (None, 64, 1024, 4096, 16384, 65536)]
    sdpa = [DecodeSDPA(name, kernel) for name, kernel in kernels.items()]
    peers = [Decode(), *pages, SharedPrefixPeer(), *chunks, Concatenated(), *sdpa, FlexAttention(), Naive()]
    return {peer.name: peer for peer in peers}


def decode_peers(names: Sequence[str]) -> list[Peer]:
    """Peers of a decoding step by name.

    Raises:
        ValueError: there is no peer of a name; lists those there are.
    """
    peers = _all_decode_peers()
    for name in names:
        if name not in peers:
            raise ValueError(f"there is no peer {name!r} for decoding; peers are {', '.join(peers)}")
    return [peers[name] for name in names]


def nbytes(x: Any) -> int:
    """Of a tensor, or of all in a tuple."""
    return x.nbytes if isinstance(x, Tensor) else sum(map(nbytes, x))

"""Serving: the KV cache, contiguous and paged, decoding over it, shared prefixes, and injected memories."""

from flashlib.inference.cache import CacheFullError, KVCache
from flashlib.inference.decode import decode_attention
from flashlib.inference.injection import KVInjector, Memory
from flashlib.inference.paged import OutOfPagesError, PagedKVCache
from flashlib.inference.prefix import SharedPrefix, shared_prefix_attention

__all__ = [
    "CacheFullError",
    "KVCache",
    "KVInjector",
    "Memory",
    "OutOfPagesError",
    "PagedKVCache",
    "SharedPrefix",
    "decode_attention",
    "shared_prefix_attention",
]

"""Serving: the KV cache, contiguous and paged, and decoding over it."""

from flashlib.inference.cache import CacheFullError, KVCache
from flashlib.inference.decode import decode_attention
from flashlib.inference.paged import OutOfPagesError, PagedKVCache

__all__ = ["CacheFullError", "KVCache", "OutOfPagesError", "PagedKVCache", "decode_attention"]

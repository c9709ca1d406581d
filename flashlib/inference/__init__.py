"""Serving: the KV cache, contiguous and paged."""

from flashlib.inference.cache import CacheFullError, KVCache
from flashlib.inference.paged import OutOfPagesError, PagedKVCache

__all__ = ["CacheFullError", "KVCache", "OutOfPagesError", "PagedKVCache"]

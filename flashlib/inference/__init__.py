"""Serving: the KV cache."""

from flashlib.inference.cache import CacheFullError, KVCache

__all__ = ["CacheFullError", "KVCache"]

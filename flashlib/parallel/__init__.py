"""Attention over a sequence that is spread over several ranks, on ``torch.distributed``: training, and decoding from a spread cache.

    mesh = init_device_mesh("cuda", (8,))
    q, k, v = (shard(x, mesh, layout="zigzag") for x in (q, k, v))           # each rank keeps its tokens
    out = parallel_attention(q, k, v, mesh=mesh, layout="zigzag", causal=True)

Whatever the method, each rank attends to some of the keys at a time and merges what comes out: :class:`flashlib.Partial`'s algebra.
"""

from flashlib.parallel.attention import METHODS, parallel_attention
from flashlib.parallel.cache import ShardedKVCache, ShardedPagedKVCache
from flashlib.parallel.counting import count_sent
from flashlib.parallel.decode import merge_over_ranks, parallel_decode_attention
from flashlib.parallel.layout import LAYOUTS, positions, shard, unshard
from flashlib.parallel.link import ParallelError

__all__ = [
    "LAYOUTS",
    "METHODS",
    "ParallelError",
    "ShardedKVCache",
    "ShardedPagedKVCache",
    "count_sent",
    "merge_over_ranks",
    "parallel_attention",
    "parallel_decode_attention",
    "positions",
    "shard",
    "unshard",
]

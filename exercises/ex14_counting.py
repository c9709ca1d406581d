# Exercise 14: Counting FLOPs and bytes
# difficulty 2/5 · importance 4/5 · about 50 minutes
# Chapter: notebooks/15_counting.ipynb
#
# Check your work with `flashlib grade ex14`, or in a notebook with `check("ex14")`.

"""Counting: what attention multiplies, and what it moves, before it is run.

Whole numbers in, whole numbers out. Nothing is estimated, and no tensor is needed.
"""


def visible_pairs(q_len: int, kv_len: int, left: int | None, right: int | None) -> int:
    """How many (row, key) pairs a band shows.

    Row i sits at key ``i + kv_len - q_len``, so that the last row sits at the last key. It sees the keys from ``left`` before its own to
    ``right`` behind it, both included, as far as there are such keys; None is no limit on that side. A row may see nothing.

    Args:
        q_len, kv_len: rows and keys; either may be 0, and there may be more rows than keys.
    """
    raise NotImplementedError("write visible_pairs here")


def attention_flops(
    q_heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    v_head_dim: int,
    left: int | None,
    right: int | None,
) -> tuple[int, int]:
    """What one forward computes for the visible pairs alone: ``(FLOPs in the two matrix products, exponentials)``.

    A multiply-add is 2 FLOPs. The softmax takes one exponential for each visible pair, and is not counted among the products. Keys have
    ``head_dim`` channels, values ``v_head_dim``. Heads are ``q_heads`` query heads that share ``kv_heads`` KV heads; the band is that of
    :func:`visible_pairs`, the same for all.
    """
    raise NotImplementedError("write attention_flops here")


def tile_kinds(
    q_len: int, kv_len: int, block_q: int, block_k: int, left: int | None, right: int | None
) -> tuple[int, int, int]:
    """How many tiles of ``block_q`` rows x ``block_k`` keys are ``(skipped, partial, full)``.

    Of a skipped tile no pair is visible, of a full one every pair that it holds, of a partial one some. Tiles at the ends hold fewer rows
    or keys, and are tiles all the same.
    """
    raise NotImplementedError("write tile_kinds here")


def forward_bytes(
    q_heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,
    head_dim: int,
    block_q: int,
    block_k: int,
    itemsize: int,
    left: int | None,
    right: int | None,
) -> dict[str, int]:
    """The bytes that FlashAttention-2's loop asks for, by operand: ``{"q": ..., "k": ..., "v": ..., "out": ..., "lse": ...}``.

    For each query head, each block of ``block_q`` rows is worked on by itself: its rows of q are loaded once, then of k and v each tile of
    ``block_k`` keys that is not skipped, and in the end its rows of out and of the LSE are stored. Tiles at the ends count with what they
    hold. q, k, v and out have ``head_dim`` channels of ``itemsize`` bytes; the LSE is one float32 number a row. Whatever a cache might
    answer counts too.
    """
    raise NotImplementedError("write forward_bytes here")


def decode_bytes(lengths: list[int], q_heads: int, kv_heads: int, head_dim: int, itemsize: int, num_splits: int) -> int:
    """All bytes that one decoding step moves: one new token for each request.

    Request b has ``lengths[b]`` keys and as many values in its cache; no other slot is read. The query heads that share a KV head read its
    keys and values once, together. q and out are ``q_heads`` x ``head_dim`` numbers for each request. All these have ``itemsize`` bytes.

    With more than one split, every split of every request first writes its own result, ``head_dim`` numbers and an LSE in float32 for each query head, which
    the merge then reads. With one split the result is written at once, and no LSE is.
    """
    raise NotImplementedError("write decode_bytes here")

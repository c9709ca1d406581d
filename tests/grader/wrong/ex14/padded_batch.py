# diagnosis: padded-to-the-longest
def visible_pairs(q_len: int, kv_len: int, left: int | None, right: int | None) -> int:
    return sum(stop - start for start, stop in _seen(q_len, kv_len, left, right))


def _seen(q_len, kv_len, left, right):
    """The keys that each row sees, start and stop."""
    for i in range(q_len):
        at = i + kv_len - q_len
        start = 0 if left is None else max(0, at - left)
        stop = kv_len if right is None else min(kv_len, at + right + 1)
        yield (start, stop) if start < stop else (0, 0)


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
    pairs = q_heads * visible_pairs(q_len, kv_len, left, right)
    return 2 * (head_dim + v_head_dim) * pairs, pairs


def tile_kinds(
    q_len: int, kv_len: int, block_q: int, block_k: int, left: int | None, right: int | None
) -> tuple[int, int, int]:
    skipped = partial = full = 0
    rows = list(_seen(q_len, kv_len, left, right))
    for row in range(0, q_len, block_q):
        for key in range(0, kv_len, block_k):
            end = min(key + block_k, kv_len)
            seen = [max(0, min(stop, end) - max(start, key)) for start, stop in rows[row : row + block_q]]
            if max(seen) == 0:
                skipped += 1
            elif min(seen) == end - key:
                full += 1
            else:
                partial += 1
    return skipped, partial, full


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
    keys = 0
    rows = list(_seen(q_len, kv_len, left, right))
    for row in range(0, q_len, block_q):
        for key in range(0, kv_len, block_k):
            end = min(key + block_k, kv_len)
            if any(min(stop, end) > max(start, key) for start, stop in rows[row : row + block_q]):
                keys += end - key
    once, passing = (q_heads * tokens * head_dim * itemsize for tokens in (q_len, keys))
    return {"q": once, "k": passing, "v": passing, "out": once, "lse": q_heads * q_len * 4}


def decode_bytes(lengths: list[int], q_heads: int, kv_heads: int, head_dim: int, itemsize: int, num_splits: int) -> int:
    cache = 2 * len(lengths) * max(lengths) * kv_heads * head_dim * itemsize
    tokens = 2 * len(lengths) * q_heads * head_dim * itemsize
    partial = len(lengths) * num_splits * q_heads * (head_dim + 1) * 4 if num_splits > 1 else 0
    return cache + tokens + 2 * partial

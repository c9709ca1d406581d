def below(q_len, kv_len, shift):
    """The sum over rows of ``row + shift``, held between 0 and kv_len."""
    first = min(max(0, -shift), q_len)  # rows before are held at 0
    last = min(max(first, kv_len - shift), q_len)  # rows from here on at kv_len
    count = last - first
    return count * (first + shift) + count * (count - 1) // 2 + (q_len - last) * kv_len


def visible_pairs(q_len, kv_len, left, right):
    offset = kv_len - q_len
    stops = q_len * kv_len if right is None else below(q_len, kv_len, offset + right + 1)
    starts = 0 if left is None else below(q_len, kv_len, offset - left)
    return stops - starts


def attention_flops(q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, left, right):
    pairs = visible_pairs(q_len, kv_len, left, right) * q_heads
    return pairs * (2 * head_dim + 2 * v_head_dim), pairs


def pairs_in(rows, keys, offset, left, right):
    """Pairs of one tile, row by row."""
    total = 0
    for i in rows:
        start = keys.start if left is None else max(keys.start, i + offset - left)
        stop = keys.stop if right is None else min(keys.stop, i + offset + right + 1)
        total += max(0, stop - start)
    return total


def tiles(q_len, kv_len, block_q, block_k, left, right):
    for row in range(0, q_len, block_q):
        rows = range(row, min(row + block_q, q_len))
        for key in range(0, kv_len, block_k):
            keys = range(key, min(key + block_k, kv_len))
            yield keys, len(rows) * len(keys), pairs_in(rows, keys, kv_len - q_len, left, right)


def tile_kinds(q_len, kv_len, block_q, block_k, left, right):
    found = list(tiles(q_len, kv_len, block_q, block_k, left, right))
    skipped = len([1 for _, _, seen in found if seen == 0])
    full = len([1 for _, held, seen in found if seen == held])
    return skipped, len(found) - skipped - full, full


def forward_bytes(q_heads, kv_heads, q_len, kv_len, head_dim, block_q, block_k, itemsize, left, right):
    row = head_dim * itemsize
    keys = sum(len(keys) for keys, _, seen in tiles(q_len, kv_len, block_q, block_k, left, right) if seen)
    return {
        "lse": 4 * q_len * q_heads,
        "out": row * q_len * q_heads,
        "v": row * keys * q_heads,
        "k": row * keys * q_heads,
        "q": row * q_len * q_heads,
    }


def decode_bytes(lengths, q_heads, kv_heads, head_dim, itemsize, num_splits):
    merged = 0 if num_splits == 1 else 8 * num_splits * q_heads * (head_dim + 1)
    of_a_request = 2 * q_heads * head_dim * itemsize + merged
    return sum(2 * length * kv_heads * head_dim * itemsize + of_a_request for length in lengths)

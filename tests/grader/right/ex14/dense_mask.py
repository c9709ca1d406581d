import torch


def mask_of(q_len, kv_len, left, right):
    rows, keys = torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)[None]
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left is not None:
        seen &= keys >= rows - left
    if right is not None:
        seen &= keys <= rows + right
    return seen


def visible_pairs(q_len, kv_len, left, right):
    return int(mask_of(q_len, kv_len, left, right).sum())


def attention_flops(q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim, left, right):
    scores = 2 * head_dim * visible_pairs(q_len, kv_len, left, right)
    outputs = 2 * v_head_dim * visible_pairs(q_len, kv_len, left, right)
    return q_heads * (scores + outputs), q_heads * visible_pairs(q_len, kv_len, left, right)


def tiles_of(q_len, kv_len, block_q, block_k, left, right):
    for rows in mask_of(q_len, kv_len, left, right).split(block_q, 0):
        yield list(rows.split(block_k, 1))


def tile_kinds(q_len, kv_len, block_q, block_k, left, right):
    counts = [0, 0, 0]
    for tiles in tiles_of(q_len, kv_len, block_q, block_k, left, right):
        for tile in tiles:
            counts[0 if not tile.any() else 2 if tile.all() else 1] += 1
    return tuple(counts)


def forward_bytes(q_heads, kv_heads, q_len, kv_len, head_dim, block_q, block_k, itemsize, left, right):
    found = dict.fromkeys(("q", "k", "v", "out", "lse"), 0)
    for _ in range(q_heads):
        for tiles in tiles_of(q_len, kv_len, block_q, block_k, left, right):
            rows = len(tiles[0])
            found["q"] += rows * head_dim * itemsize
            for tile in tiles:
                if tile.any():
                    found["k"] += tile.shape[1] * head_dim * itemsize
                    found["v"] += tile.shape[1] * head_dim * itemsize
            found["out"] += rows * head_dim * itemsize
            found["lse"] += rows * 4
    return found


def decode_bytes(lengths, q_heads, kv_heads, head_dim, itemsize, num_splits):
    total = 0
    for length in lengths:
        total += q_heads * head_dim * itemsize  # q
        for _ in range(kv_heads):
            total += length * head_dim * itemsize * 2
        if num_splits > 1:
            for _ in range(num_splits):
                result = q_heads * head_dim * 4 + q_heads * 4
                total += result + result
        total += q_heads * head_dim * itemsize  # out
    return total

"""A batch that takes several launches gives what each request gives alone. A program for the interpreter."""

import random

import torch

from flashlib.inference import decode_attention
from flashlib.launch import decode as decode_launch


def main(rng: random.Random) -> None:
    decode_launch.MOST_REQUESTS = 2
    batch, capacity = 5, 40
    q, k, v = torch.randn(batch, 2, 1, 16), *(torch.randn(batch, 1, capacity, 16) for _ in range(2))
    pages = torch.randperm(batch * 3)[: batch * 3].view(batch, 3).int()
    paged = [torch.randn(batch * 3, 1, 16, 16) for _ in range(2)]
    lengths = torch.tensor([rng.randint(0, capacity) for _ in range(batch)])
    for options in ({"num_splits": 1}, {"num_splits": 3}, {"split_size": 16}):
        for keys, values, table in ((k, v, None), (*paged, pages)):
            options = {**options, "lengths": lengths, "block_table": table, "return_lse": True}
            out, lse = decode_attention(q, keys, values, **options, backend="triton")
            for one in range(batch):
                here = slice(one, one + 1)
                own = (keys[here], values[here]) if table is None else (keys, values)
                alone = {**options, "lengths": lengths[here], "block_table": None if table is None else table[here]}
                expected = decode_attention(q[here], *own, **alone, backend="torch")
                torch.testing.assert_close((out[here], lse[here]), expected)

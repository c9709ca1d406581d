"""Traffic behind a fast memory: small cases counted by hand, then attention as it is against the theory."""

import pytest
import torch

from flashlib.backends.pytorch import tiled_attention
from flashlib.measure.counting.meter import MADE_INSIDE, TrafficMeter
from flashlib.reference import naive_attention

f4 = 4


def metered(fast_memory, fn, **operands):
    with TrafficMeter(fast_memory=fast_memory, **operands) as meter:
        result = fn(**operands)
    del result
    return meter


def test_what_fits_is_read_once():
    x = torch.ones(100)
    meter = metered(1000, lambda x: [x.sum() for _ in range(5)], x=x)
    assert meter.bytes_read["x"] == 400
    meter = metered(399, lambda x: [x.sum() for _ in range(5)], x=x)
    assert meter.bytes_read["x"] == 5 * 400, "too large to stay"


def test_the_least_recently_used_leaves():
    a, b, c = (torch.ones(100) for _ in range(3))

    def use(a, b, c):
        for tensor in (a, b, a, c, a, b):  # room for two: c pushes out b, the last b pushes out c
            tensor.any()

    meter = metered(2 * 400 + 8, use, a=a, b=b, c=c)
    assert (meter.bytes_read["a"], meter.bytes_read["b"], meter.bytes_read["c"]) == (400, 800, 400)


def test_a_temporary_that_dies_early_is_never_written():
    x = torch.ones(100)
    meter = metered(4000, lambda x: (x + 1).sum(), x=x)
    assert meter.bytes_written == {MADE_INSIDE: f4}, "only the sum survives"
    meter = metered(0, lambda x: (x + 1).sum(), x=x)
    assert meter.bytes_written == {MADE_INSIDE: 400 + f4}


def test_changed_data_is_written_back_when_it_leaves_and_at_the_end():
    x, y = torch.ones(100), torch.ones(100)

    def change_twice(x, y):
        x.add_(1)
        x.add_(1)  # still there: no traffic
        y.sum()  # pushes x out: one write
        x.sum()  # loads it again, unchanged

    meter = metered(450, change_twice, x=x, y=y)
    assert (meter.bytes_read["x"], meter.bytes_written["x"]) == (800, 400)
    meter = metered(10_000, lambda x: x.zero_(), x=x)
    assert (meter.bytes_read["x"], meter.bytes_written["x"]) == (0, 400)


def test_a_tile_and_its_transpose_are_the_same_memory():
    k = torch.ones(2, 3, 64, 16)

    def use(k):
        tile = k[:, :, 8:16]
        tile.sum()
        tile.mT.sum()
        tile.permute(3, 2, 0, 1).sum()

    assert metered(10_000, use, k=k).bytes_read["k"] == 2 * 3 * 8 * 16 * f4


def test_part_of_what_is_resident_is_not_read_again():
    x = torch.ones(64, 16)

    def whole_then_part(x):
        x.sum()
        x[3:9].sum()

    assert metered(10_000, whole_then_part, x=x).bytes_read["x"] == 64 * 16 * f4


def test_freed_memory_leaves_no_ghost_behind():
    """A new tensor at a freed one's address must not be taken for it."""
    meter = TrafficMeter(fast_memory=10_000)
    for _ in range(20):
        unnamed = torch.ones(100)
        with meter:
            unnamed.sum()
        del unnamed
    assert meter.bytes_read["elsewhere"] == 20 * 400


def room_for(block_q, block_k, d):
    """Bytes that hold the working set of one step of the tiled loop, with its temporaries, but not all keys."""
    return 16 * max(block_q, block_k) * d * f4


@pytest.mark.parametrize("n, block_q, block_k", [(512, 32, 32), (640, 64, 16), (500, 48, 32)])
def test_flash_attention_2_reads_keys_once_per_row_block(n, block_q, block_k):
    d = 32
    q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
    fast_memory = room_for(block_q, block_k, d)
    meter = metered(
        fast_memory, lambda q, k, v: tiled_attention(q, k, v, block_q=block_q, block_k=block_k), q=q, k=k, v=v
    )
    row_blocks = -(-n // block_q)
    assert meter.times_read == {"q": 1, "k": row_blocks, "v": row_blocks}
    # The output leaves once, less the tiles still in fast memory when it is dropped here. A second time at most leaves the
    # finished tile that it was copied from: the loop's variable keeps it alive until the next one is there.
    assert n * d * f4 - fast_memory <= meter.bytes_written[MADE_INSIDE] <= 2 * n * (d + 1) * f4
    assert meter.bytes_read[MADE_INSIDE] < 0.1 * n * d * f4


def test_flash_attention_1_reads_keys_once_and_queries_once_per_key_block():
    n, d, block = 512, 32, 32
    q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
    order = {"block_q": block, "block_k": block, "loop_order": "kv_outer"}
    meter = metered(room_for(block, block, d), lambda q, k, v: tiled_attention(q, k, v, **order), q=q, k=k, v=v)
    assert meter.times_read == {"q": n // block, "k": 1, "v": 1}
    # Its running output goes back and forth between slow and fast memory once for each block of keys.
    assert meter.bytes_written[MADE_INSIDE] > 0.9 * (n // block) * n * d * f4
    assert meter.bytes_read[MADE_INSIDE] > 0.9 * (n // block) * n * d * f4


def test_traffic_follows_the_theory():
    """Dao et al. 2022, theorem 2: naive Theta(N d + N^2), tiled Theta(N^2 d^2 / M)."""
    d = 32

    def moved(n, fast_memory, fn):
        q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
        meter = metered(fast_memory, fn, q=q, k=k, v=v)
        return meter.bytes_read.total() + meter.bytes_written.total()

    def tiled(n, block):
        return moved(n, room_for(block, block, d), lambda q, k, v: tiled_attention(q, k, v, block_q=block, block_k=d))

    def naive(n):
        return moved(n, room_for(32, 32, d), naive_attention)

    assert naive(384) > 4 * 384 * 384 * f4
    assert naive(768) / naive(384) == pytest.approx(4, rel=0.1)
    assert tiled(384, 32) < naive(384) / 4
    # Q and O move once in any case; the rest is K and V.
    q_and_o = {n: 2 * n * d * f4 for n in (384, 768)}
    keys = {(n, block): tiled(n, block) - q_and_o[n] for n, block in [(384, 32), (768, 32), (768, 64)]}
    assert keys[768, 32] / keys[384, 32] == pytest.approx(4, rel=0.1), "twice N, four times the traffic"
    assert keys[768, 32] / keys[768, 64] == pytest.approx(2, rel=0.1), "twice M, half the traffic"


def test_the_report_says_so():
    assert "behind 100 KiB of fast memory" in str(metered(100 * 1024, lambda x: x.sum(), x=torch.ones(4)).report())
    assert "fast memory" not in str(metered(0, lambda x: x.sum(), x=torch.ones(4)).report())


def test_negative_size_is_refused():
    with pytest.raises(ValueError, match="fast_memory must be a number of bytes, at least 0; got -1"):
        TrafficMeter(fast_memory=-1)

"""TrafficMeter against numbers counted by hand. f4 below is the size of a float32."""

import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flashlib.measure.counting.meter import ELSEWHERE, MADE_INSIDE, TrafficMeter

f4 = 4
B, H, N, D = 2, 3, 32, 8


def qkv(dtype=torch.float32, requires_grad=False):
    return [torch.randn(B, H, N, D).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_naive_attention_counted_by_hand(dtype):
    q, k, v = qkv(dtype)
    with TrafficMeter(q=q, k=k, v=v) as meter:
        out = ((q @ k.mT) * 0.5).softmax(-1) @ v
    e, qkv_bytes, s_bytes = dtype.itemsize, B * H * N * D * dtype.itemsize, B * H * N * N * dtype.itemsize
    assert meter.bytes_read == {"q": qkv_bytes, "k": qkv_bytes, "v": qkv_bytes, MADE_INSIDE: 3 * s_bytes}
    assert meter.bytes_written == {MADE_INSIDE: 3 * s_bytes + qkv_bytes}
    assert meter.calls == {"aten.bmm": 2, "aten.mul": 1, "aten._softmax": 1}
    assert (meter.largest.elements, meter.largest.dtype) == (B * H * N * N, dtype)
    assert meter.largest.shape == (B * H, N, N) and meter.largest.op == "aten.bmm"
    assert meter.largest.bytes == B * H * N * N * e
    # S is freed once it is scaled, the scaled S once P is there: never more than two score matrices at once.
    assert meter.peak_bytes == 2 * s_bytes
    assert meter.live_bytes == out.numel() * e
    assert meter.times_read == {"q": 1, "k": 1, "v": 1}


def test_backward_is_counted_too():
    q, k, v = qkv(requires_grad=True)
    with TrafficMeter(q=q, k=k, v=v) as meter:
        out = (q @ k.mT).softmax(-1) @ v
        forward = dict(meter.bytes_read)
        out.backward(torch.ones_like(out))
    one, s = B * H * N * D * f4, B * H * N * N * f4
    assert (forward["q"], forward["k"], forward["v"]) == (one, one, one)
    # dP = dO V^T; dQ = dS K; dK = dS^T Q.
    assert (meter.bytes_read["q"], meter.bytes_read["k"], meter.bytes_read["v"]) == (2 * one, 2 * one, 2 * one)
    assert meter.calls["aten.bmm"] == 6
    # P is kept for the backward; dP and then dS live beside it.
    assert meter.peak_bytes >= 3 * s
    assert meter.largest.elements == B * H * N * N


def test_one_tile_at_a_time_reads_keys_once_per_query_block():
    q, k, v = qkv()
    block = 12  # 32 = 12 + 12 + 8: three query blocks
    with TrafficMeter(q=q, k=k, v=v) as meter:
        for start in range(0, N, block):
            tile = q[:, :, start : start + block]
            scores = torch.cat([tile @ k[:, :, at : at + block].mT for at in range(0, N, block)], dim=-1)
            del scores
    assert meter.times_read == {"q": 3, "k": 3, "v": 0}
    assert meter.largest.elements == B * H * block * N


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(-1),
        lambda x: x.transpose(1, 2),
        lambda x: x[:, :, 3:7],
        lambda x: x.expand(5, B, H, N, D),
        lambda x: x.detach(),
        lambda x: x.unbind(1),
        lambda x: x.contiguous(),
        lambda x: x.reshape(B * H, N, D),
        lambda x: x.unfold(2, 4, 2),
        lambda x: x.to(torch.float32),
        lambda x: (x.shape, x.stride(), x.is_contiguous(), x.numel()),
        lambda x: torch.empty_like(x).shape,
        lambda x: x.new_empty(4, 4).size(),
        lambda x: x.view(-1).unsqueeze_(0),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_views_metadata_and_allocation_cost_nothing(view, inference):
    x = torch.randn(B, H, N, D)
    with torch.inference_mode(inference), TrafficMeter(x=x) as meter:
        view(x)
    assert (meter.bytes_read.total(), meter.bytes_written.total(), meter.calls.total()) == (0, 0, 0)


def test_allocated_memory_counts_although_nothing_is_written():
    with TrafficMeter() as meter:
        buffer = torch.empty(10, 10)
        view = buffer[2:]
    assert meter.peak_bytes == 100 * f4 and meter.bytes_written.total() == 0
    assert meter.largest.elements == 100 and meter.largest.op == "aten.empty"
    del buffer
    gc.collect()
    assert meter.live_bytes == 100 * f4, "a view keeps the memory alive"
    del view
    gc.collect()
    assert meter.live_bytes == 0


def test_slices_and_expansions_count_the_bytes_they_address():
    x = torch.randn(8, 16)
    with TrafficMeter(x=x) as meter:
        x[2:5, ::2].sum()
    assert meter.bytes_read["x"] == 3 * 8 * f4
    with TrafficMeter(x=x) as meter:
        x[:, None].expand(8, 10, 16).sum()
    assert meter.bytes_read["x"] == 8 * 16 * f4
    with TrafficMeter(x=x) as meter:
        x[0].unfold(0, 4, 1).sum()  # 13 windows of 4 over 16 elements
    assert meter.bytes_read["x"] == 16 * f4
    with TrafficMeter(x=x) as meter:
        x * x
    assert meter.bytes_read["x"] == 8 * 16 * f4


def test_in_place_overwriting_and_out():
    x, y = torch.ones(10), torch.ones(10)
    with TrafficMeter(x=x, y=y) as meter:
        x += y
    assert (meter.bytes_read["x"], meter.bytes_read["y"], meter.bytes_written["x"]) == (40, 40, 40)
    with TrafficMeter(x=x, y=y) as meter:
        x.copy_(y)
        x.zero_()
        x[3:6] = 2.0
        torch.add(y, y, out=x)
    assert meter.bytes_read["x"] == 0 and meter.bytes_read["y"] == 80
    assert meter.bytes_written["x"] == 40 + 40 + 12 + 40
    with TrafficMeter(y=y) as meter:
        torch.add(y, y, out=torch.empty(0))
    assert meter.largest.elements == 10 and meter.peak_bytes == 40


def test_gathers_and_scatters_touch_what_the_index_names():
    table, rows = torch.randn(100, 8), torch.tensor([3, 5])
    with TrafficMeter(table=table, rows=rows) as meter:
        table[rows]
        table.index_select(0, rows)
        F.embedding(rows, table)
    assert meter.bytes_read == {"table": 3 * 2 * 8 * f4, "rows": 3 * 2 * 8}
    with TrafficMeter(table=table, rows=rows) as meter:
        table[rows] = torch.zeros(2, 8)
        table.index_copy_(0, rows, torch.ones(2, 8))
        table[:, rows] = 0.0
    assert meter.bytes_written["table"] == (16 + 16 + 200) * f4 and meter.bytes_read["table"] == 0
    with TrafficMeter(table=table, rows=rows) as meter:
        table.index_put_((rows,), torch.ones(8), accumulate=True)
        table.index_add_(0, rows, torch.ones(2, 8))
    assert meter.bytes_written["table"] == meter.bytes_read["table"] == 32 * f4
    keep = torch.zeros(100, dtype=torch.bool)
    keep[[1, 2, 9]] = True
    with TrafficMeter(table=table, keep=keep) as meter:
        table[keep] = 1.0
    assert meter.bytes_written["table"] == 3 * 8 * f4


def test_shape_only_factories_read_nothing():
    x = torch.randn(10)
    with TrafficMeter(x=x) as meter:
        torch.zeros_like(x)
        torch.rand_like(x)
        x.new_ones(5)
    assert meter.bytes_read.total() == 0 and meter.bytes_written.total() == 25 * f4


def test_reading_a_value_out_counts():
    x = torch.ones(10)
    with TrafficMeter(x=x) as meter:
        x[4].item()
        torch.equal(x, torch.ones(10))
    assert meter.bytes_read["x"] == 4 + 40


def test_fused_sdpa_is_one_operation():
    q, k, v = qkv()
    with TrafficMeter(q=q, k=k, v=v) as meter:
        F.scaled_dot_product_attention(q, k, v)
    one = B * H * N * D * f4
    assert meter.bytes_read == {"q": one, "k": one, "v": one}
    assert meter.bytes_written.total() == one + B * H * N * f4  # out and the log-sum-exp
    assert len(meter.calls) == 1 and "flash" in next(iter(meter.calls))


def test_inference_mode_counts_the_same():
    q, k, v = qkv()
    counts = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), TrafficMeter(q=q, k=k, v=v) as meter:
            (q @ k.mT).softmax(-1) @ v
        counts.append((meter.bytes_read, meter.bytes_written, meter.calls, meter.largest, meter.peak_bytes))
    assert counts[0] == counts[1]


def test_unnamed_tensors_and_a_detour_through_numpy_are_seen():
    q, weight = torch.randn(4, 8), torch.randn(8, 8)
    with TrafficMeter(q=q) as meter:
        q @ weight
    assert meter.bytes_read == {"q": 128, ELSEWHERE: 256}
    with TrafficMeter(q=q) as meter:
        scores = torch.from_numpy(np.zeros((50, 50), dtype=np.float32))
        scores.sum()
    assert meter.largest.elements == 2500 and meter.bytes_read[MADE_INSIDE] == 10_000


def test_writing_into_an_older_tensor_makes_nothing():
    cache, row = torch.zeros(50, 8), torch.ones(8)
    with TrafficMeter(row=row) as meter:
        cache[3] = row
    assert meter.bytes_written == {ELSEWHERE: 32} and meter.peak_bytes == 0 and meter.largest.elements == 0


def test_a_copy_is_another_tensor():
    k = torch.randn(16, 8)
    with TrafficMeter(k=k) as meter:
        copy = k.clone()
        copy.sum()
        copy.sum()
    assert meter.bytes_read == {"k": 16 * 8 * f4, MADE_INSIDE: 2 * 16 * 8 * f4}


def test_entering_again_adds_up():
    x = torch.ones(10)
    meter = TrafficMeter(x=x)
    for _ in range(3):
        with meter:
            x.sum()
    assert meter.bytes_read["x"] == 120


def test_report_reads_as_text_and_html():
    q, k, _ = qkv()
    with TrafficMeter(q=q, k=k) as meter:
        q @ k.mT
    text, page = str(meter.report()), meter.report()._repr_html_()
    assert "6,144" in text and "aten.bmm" in text and "times read" in text
    assert page.startswith("<table>") and "6,144" in page
    assert str(TrafficMeter(q=q).report()).count("none") == 1


def test_bad_operands_are_named():
    x = torch.ones(4)
    with pytest.raises(TypeError, match=r"operand 'q' must be a torch\.Tensor, got list"):
        TrafficMeter(q=[1.0])
    with pytest.raises(ValueError, match="'q' and 'k' share memory"):
        TrafficMeter(q=x, k=x[1:])
    with pytest.raises(ValueError, match="'elsewhere'"):
        TrafficMeter(elsewhere=x)

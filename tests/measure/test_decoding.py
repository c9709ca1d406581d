"""Races of decoding steps: what a case is, and that only right results are timed."""

import random

import pytest
import torch
from typer.testing import CliRunner

from flashlib.inference.decode import decode_attention
from flashlib.measure import load_record, sources_hash
from flashlib.measure.racing.bench import plan, race, run, summary
from flashlib.measure.racing.contender import draw_inputs
from flashlib.measure.racing.decoding import (
    DECODE_PRESETS,
    Decode,
    DecodeCase,
    SharedPrefixPeer,
    decode_cases,
    decode_peers,
)
from flashlib.measure.racing.peers import Peer
from flashlib.measure.records.record import PACKAGE
from flashlib.measure.records.sources import decode_sources, kernel_sources, launching_sources

CPU = torch.device("cpu")


def a_case(**fields) -> DecodeCase:
    return DecodeCase(
        **{"batch": 4, "q_heads": 4, "kv_heads": 2, "length": 40, "head_dim": 16, "dtype": "fp32", **fields}
    )


def drawn_for(case: DecodeCase):
    return draw_inputs(case, CPU, torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("preset", DECODE_PRESETS)
def test_presets_have_the_sizes_they_are_named_for_and_are_small_on_a_cpu(preset):
    for case in decode_cases(preset, "cuda"):
        assert (case.q_heads, case.kv_heads, case.head_dim, case.dtype) == (32, 8, 128, "bf16")
    assert all(case.length <= 2048 and case.dtype == "fp32" for case in decode_cases(preset, "cpu"))
    assert decode_peers(DECODE_PRESETS[preset][2])
    sizes = {(case.batch, case.length) for case in decode_cases("decode", "cuda")}
    assert sizes == {(1, 4096), (1, 131072), (16, 8192), (64, 4096)}


@pytest.mark.parametrize("preset", DECODE_PRESETS)
def test_every_peer_of_a_preset_is_right_or_says_why_it_cannot_run(preset, tmp_path):
    todo = plan(preset, device="cpu", seconds=0.0, seed=random.getrandbits(30), peers=_without_compilers(preset))
    todo.cases[1:] = []
    record = run(todo, tmp_path)
    assert load_record(todo.topic, tmp_path).rows == record.rows
    for row in record.rows:
        if row["why_not"] is None:
            assert row["gb_per_s"] == pytest.approx(todo.cases[0].bytes / row["ms"] / 1e6)
            assert ("cache_bytes" in row) == todo.cases[0].about_memory
            assert DecodeCase.from_columns(row) == todo.cases[0]
        else:
            assert row["why_not"] == "needs a CUDA GPU"
    assert "GB/s" in str(summary(record))


def _without_compilers(preset: str) -> list[str]:
    return [name for name in DECODE_PRESETS[preset][2] if name != "flex_attention"]


def test_keys_are_counted_once_however_often_they_are_held():
    token = 2 * 2 * 16 * 4  # K and V, heads, channels, bytes
    assert a_case().bytes == 4 * 40 * token
    assert a_case(cache="prefix", own=3).bytes == (40 + 4 * 3) * token
    assert a_case(batch=1, cache="memory", own=3, queries=2).bytes == 43 * token
    ragged = a_case(batch=6, length=3000, cache="ragged")
    assert min(ragged.lengths) == 100 and max(ragged.lengths) == 3000 and len(set(ragged.lengths)) == 6
    assert ragged.bytes == sum(ragged.lengths) * token


def test_sources_of_attention_and_of_decoding_are_all_that_there_are():
    rooms = {f"{room}/{path.name}" for room in ("kernels", "launch") for path in (PACKAGE / room).glob("*.py")}
    assert rooms - {"kernels/__init__.py", "launch/__init__.py", "launch/inspect.py", "launch/operators.py"} <= {
        *kernel_sources(),
        *decode_sources(),
        *launching_sources(),
    }
    assert not [name for name in kernel_sources() if "decode" in name]
    assert len(sources_hash(decode_sources())) == 64


def test_pages_hold_what_the_table_says():
    case, peer = a_case(length=37), Decode(16)
    drawn = drawn_for(case)
    k, _ = peer.arrange(case, drawn.k, drawn.v)
    table = peer._table(case)
    assert k.shape == (4 * 3, 2, 16, 16) and sorted(table.flatten().tolist()) == list(range(12))
    for request, key in ((0, 0), (3, 36), (1, 16)):
        assert torch.equal(k[table[request, key // 16].item(), :, key % 16], drawn.k[request, :, key])


def test_requests_share_a_prefix_and_nothing_else():
    case = a_case(cache="prefix", own=5)
    drawn = drawn_for(case)
    assert all(
        torch.equal(x[0, :, :40], x[3, :, :40]) and not torch.equal(x[0, :, 40:], x[3, :, 40:])
        for x in (drawn.k, drawn.v)
    )
    (prefix, own), _ = SharedPrefixPeer().arrange(case, drawn.k, drawn.v)
    assert prefix.shape == (1, 2, 40, 16) and own.shape == (4, 2, 5, 16)


class LastKeyForgotten(Peer):
    name = "last_key_forgotten"

    def prepare(self, case, q, k, v):
        return lambda q, k, v: decode_attention(q, k[:, :, :-1], v[:, :, :-1], causal=False)


class PaddingSeen(Peer):
    name = "padding_seen"

    def prepare(self, case, q, k, v):
        return decode_attention


@pytest.mark.parametrize(
    ("peer", "fields"), [(LastKeyForgotten(), {}), (PaddingSeen(), {"cache": "ragged", "length": 150})]
)
def test_a_wrong_step_is_not_timed(peer, fields):
    wrong, right = race(a_case(**fields), [peer, Decode()], device="cpu", seconds=0.0, rng=random.Random())
    assert wrong["ms"] is None and wrong["why_not"].startswith("wrong: OUTSIDE the error budget")
    assert right["ms"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache": "sparse"}, "cache must be one of full, ragged, prefix, memory; got 'sparse'"),
        ({"own": 3}, "own must be at least queries with a prefix or a memory, and else 0; got 3"),
        ({"cache": "prefix"}, "own must be at least queries .*; got 0"),
        ({"length": 0}, "length must be at least 1; got 0"),
        ({"kv_heads": 3}, "q_heads must be a multiple of kv_heads; got 4 and 3"),
        ({"dtype": "int8"}, "dtype must be one of bf16, fp16, fp32; got 'int8'"),
    ],
)
def test_what_is_no_case_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        a_case(**fields)


def test_peers_of_decoding_are_listed():
    with pytest.raises(ValueError, match="there is no peer 'cudnn' for decoding; peers are flashlib, flashlib_page_1,"):
        plan("decode", peers=["cudnn"], device="cpu")


def test_the_command_runs_a_preset_and_draws_nothing_it_cannot(tmp_path):
    from flashlib.cli import app

    arguments = ["bench", "shared-prefix", "--seconds", "0", "--device", "cpu", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "flashlib_prefix" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["shared_prefix.json"]

"""attention() with few query rows goes by split-KV: the same kernels as decode_attention, with a gradient, and explain says so."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.recorded_launches import recorded

from flashlib import AttentionSpec, attention, explain
from flashlib.inference import decode_attention
from flashlib.masks import Causal, KeyLengths, Window


def inputs(rows=1, keys=2048, heads=(8, 2), dtype=torch.bfloat16, rows_first=False):
    def drawn(count, length):
        x = torch.randn(2, length, count, 64) if rows_first else torch.randn(2, count, length, 64)
        return (x.transpose(1, 2) if rows_first else x).to(dtype)

    return drawn(heads[0], rows), drawn(heads[1], keys), drawn(heads[1], keys)


def kernels_of(*tensors, **options) -> list[str]:
    with recorded() as launches, torch.no_grad():
        attention(*tensors, backend="triton", **options)
        return list(launches.compiled)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {}, {"mask": Window(left=300, right=0)}, {"softcap": 20.0}], ids=str
)
def test_few_rows_split_the_keys(rows, options):
    assert kernels_of(*inputs(rows), **options)[0] == "decode_split"


@pytest.mark.parametrize(
    "tensors, options",
    [
        (inputs(17), {}),
        (inputs(keys=255), {}),
        (inputs(16, heads=(16, 2)), {}),
        (inputs(4, rows_first=True), {}),  # whose results are promised to lie as the queries do
        (inputs(), {"mask": KeyLengths(torch.tensor([5, 2048]))}),
        (inputs(), {"alibi_slopes": torch.rand(8)}),
    ],
    ids=["rows", "keys", "group", "layout", "lengths", "ALiBi"],
)
def test_what_else_there_is_does_not(tensors, options):
    assert "decode_split" not in kernels_of(*tensors, **options)


def test_both_doors_launch_the_same():
    """Grid and parameters, but for the addresses: so one costs a GPU what the other costs it."""
    q, k, v = inputs()
    with recorded() as launches, torch.no_grad():
        attention(q, k, v, causal=True, return_lse=True, backend="triton")
        decode_attention(q, k, v, return_lse=True, backend="triton")
        half = len(launches) // 2
        for a, b in zip(range(half), range(half, 2 * half), strict=True):
            assert launches[a].grid == launches[b].grid and len(launches[a].image) == len(launches[b].image)
        assert len(launches.compiled) == half, "the second door compiled a kernel of its own"


def test_few_rows_are_right_and_have_gradients():
    """In Triton's interpreter, against the oracle."""
    program = Path(__file__).parents[1] / "kernels" / "few_rows.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    seed = str(random.SystemRandom().getrandbits(40))
    command = [sys.executable, "-W", "ignore", str(program), "--seed", seed, "--problems", "4"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_explain_says_that_keys_are_split():
    few = AttentionSpec.from_tensors(*inputs(), causal=True)
    many = AttentionSpec.from_tensors(*inputs(128), mask=Causal())
    with recorded():
        said = [{name: reason for name, _, reason in explain(spec).rows}["triton"] for spec in (few, many)]
    assert "split-KV" in said[0] and "split-KV" not in said[1]

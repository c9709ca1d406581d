"""A race times only what is right, all of it in turns, and writes down why the others did not run."""

import importlib.util
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flashlib.measure import load_record
from flashlib.measure.racing.bench import plan, race, run, summary, told
from flashlib.measure.racing.cases import Case
from flashlib.measure.racing.contender import SampledRows, Witness, draw_inputs, inputs_for
from flashlib.measure.racing.peers import Naive, Peer, PeerUnavailableError, find_peers, naive, tutorial_attention
from flashlib.measure.racing.plan import Plan
from flashlib.measure.racing.timing import time_in_turns
from flashlib.measure.records.sources import cpu_sources


def a_case(mask="causal", direction="forward", **sizes) -> Case:
    return Case(**{"batch": 2, "q_heads": 4, "kv_heads": 2, "length": 48, "head_dim": 16, **sizes}, mask=mask,
                direction=direction, dtype="fp32")  # fmt: skip


class FirstRowSeesAll(Naive):
    """Forgets the mask of one row."""

    name = "first_row_sees_all"

    def prepare(self, case, q, k, v):
        right = super().prepare(case, q, k, v)

        def attend(q, k, v):
            out = right(q, k, v)
            whole = naive(q, k, v, None, case.head_dim**-0.5, case.q_heads // case.kv_heads)
            return torch.cat([whole[:, :, :1], out[:, :, 1:]], dim=2)

        return attend


class HalfGradient(Naive):
    """Right forward, but half of dv is lost."""

    name = "half_gradient"

    def prepare(self, case, q, k, v):
        right = super().prepare(case, q, k, v)
        return lambda q, k, v: right(q, k, (v + v.detach()) / 2)


class Absent(Peer):
    name = "absent"

    def prepare(self, case, q, k, v):
        raise PeerUnavailableError("it is not installed")


class Broken(Peer):
    name = "broken"

    def prepare(self, case, q, k, v):
        return lambda q, k, v: q @ v


@pytest.mark.parametrize("mask", ["full", "causal", "window-5", "packed", "packed-causal", "ragged-causal"])
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_right_peers_are_timed_whatever_the_mask(mask, direction):
    case, peers = a_case(mask, direction), find_peers(["naive", "tiled", "torch_sdpa_flash", "torch_sdpa_math"])
    rows = race(case, peers, device="cpu", seconds=0.0, rng=random.Random())
    assert [row["peer"] for row in rows] == [peer.name for peer in peers]
    for row in rows:
        assert row["why_not"] is None, row
        assert 0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["tflops"] == pytest.approx(case.flops / row["ms"] / 1e9)
        assert set(row["error"]) == ({"out"} if direction == "forward" else {"dq", "dk", "dv"})
        assert Case.from_columns(row) == case


@pytest.mark.parametrize(("peer", "direction"), [(FirstRowSeesAll(), "forward"), (HalfGradient(), "backward")])
def test_a_wrong_peer_is_not_timed(peer, direction):
    wrong, right = race(a_case(direction=direction), [peer, Naive()], device="cpu", seconds=0.0, rng=random.Random())
    assert wrong["ms"] is None and wrong["why_not"].startswith("wrong: OUTSIDE the error budget")
    assert right["ms"] > 0 and right["why_not"] is None


def test_who_cannot_run_is_named_with_the_reason():
    rows = race(
        a_case(), [Absent(), Broken(), *find_peers(["triton_tutorial"])], device="cpu", seconds=0, rng=random.Random()
    )
    absent, broken, tutorial = (row["why_not"] for row in rows)
    assert absent == "it is not installed"
    assert broken.startswith("RuntimeError: ") and "(test_race.py:" in broken
    assert "--tutorial PATH" in tutorial
    assert [row["ms"] for row in rows] == [None] * 3


TUTORIAL = """
import pytest
import torch

TUNED = []

class _attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, sm_scale, warp_specialize=True):
        TUNED.append((causal, warp_specialize))
        return q * sm_scale

@pytest.mark.parametrize("Z", [1])
def test_op(Z):
    raise AssertionError

attention = _attention.apply
"""


def test_a_tutorial_is_loaded_without_pytest_and_once_for_each_mask(tmp_path, monkeypatch):
    path = tmp_path / "06-fused-attention.py"
    path.write_text(TUTORIAL)
    monkeypatch.delitem(sys.modules, "pytest")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else find_spec(name))
    q = torch.ones(1, 1, 2, 2)
    for causal in (True, False):
        attend = tutorial_attention(path, {"causal": causal, "sm_scale": 3.0, "warp_specialize": False})
        assert torch.equal(attend(q, q, q), 3 * q)
    tuned = [sys.modules[f"triton_tutorial_06_{mask}"].TUNED for mask in ("causal", "full")]
    assert tuned == [[(True, False)], [(False, False)]]
    assert "pytest" not in sys.modules
    with pytest.raises(PeerUnavailableError, match="takes causal, sm_scale, warp_specialize; had"):
        tutorial_attention(path, {"causal": True, "scale": 3.0})


def test_sampled_rows_are_the_rows_of_the_mask():
    rule = a_case("ragged-causal").mask_rule()
    rows = torch.tensor([0, 3, 40, 95])
    sampled = SampledRows(rule, rows, 96).intervals(1, 4, 96)
    assert torch.equal(sampled.dense(), rule.intervals(1, 96, 96).dense()[:, rows])


def test_a_witness_looks_at_the_ends_of_a_long_sequence():
    witness = Witness(a_case(length=5000), random.Random())
    assert len(witness.rows) <= 258 and witness.rows[0] == 0 and witness.rows[-1] == 4999


def test_inputs_are_made_in_the_peers_own_type_and_layout():
    peer = Naive()
    peer.dtype, peer.rows_first = "fp16", True
    case = a_case(direction="backward")
    (drawn,) = draw_inputs(case, torch.device("cpu"), torch.Generator().manual_seed(0))
    made = inputs_for(peer, case, drawn)
    assert made.q.shape == drawn.q.shape and made.q.dtype == torch.float16 and made.q.requires_grad
    assert made.q.transpose(1, 2).is_contiguous() and not made.grad_out.requires_grad
    assert torch.equal(made.q, drawn.q.half())


def test_calls_take_turns_in_changing_order():
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    timings = time_in_turns(calls, budget_s=0.0, min_rounds=20, rng=random.Random(1))
    assert {timing.repeats for timing in timings.values()} == {20}
    turns = [name for name, _ in itertools.groupby(log)]
    assert set(turns[:3]) == set("abc")  # the trial runs
    assert len({"".join(turns[at : at + 3]) for at in range(3, len(turns) - 2)}) > 3
    assert len({log.count(name) for name in "abc"}) == 1
    assert time_in_turns({}) == {}


def test_a_record_is_written_after_every_case(tmp_path):
    cases = [a_case(), a_case("full")]
    todo = Plan("speed", cases, find_peers(["naive"]), "cpu", seconds=0.0, seed=3)

    def stop_after_the_first(case, rows):
        assert "naive" in told(rows)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(todo, tmp_path, stop_after_the_first)
    first = load_record("speed", tmp_path)
    assert len(first.rows) == 1 and first.extra["complete"] is False
    assert run(todo, tmp_path).extra["complete"] is True
    whole = load_record("speed", tmp_path)
    assert whole.extra["seed"] == 3 and whole.sources == cpu_sources() and whole.extra["matmul_flops_per_s"] > 0
    assert [case for case in cases if whole.select(mask=case.mask)] == cases


def test_a_limit_leaves_cases_out_and_says_so(tmp_path):
    todo = Plan("speed", [a_case()] * 3, find_peers(["naive"]), "cpu", seconds=0.0, limit_s=0.0)
    record = run(todo, tmp_path)
    assert record.extra["complete"] is False and len(record.rows) < 3


def test_memory_of_each_peer_as_lengths_grow(tmp_path):
    todo = plan("memory", peers=["naive", "tiled"], device="cpu")
    todo = Plan("memory", todo.cases[1:4], [*todo.peers, Absent()], "cpu", measures="memory")
    rows = run(todo, tmp_path).rows
    peak = {(row["peer"], row["length"]): row["peak_bytes"] for row in rows}
    lengths = sorted({row["length"] for row in rows})
    assert peak["naive", lengths[2]] > 3 * peak["naive", lengths[1]]
    assert peak["tiled", lengths[2]] < 2.5 * peak["tiled", lengths[1]]
    assert all(row["why_not"] == "it is not installed" for row in rows if row["peer"] == "absent")


def test_the_table_has_a_line_per_case_and_the_reasons_below(tmp_path):
    todo = Plan("speed", [a_case(), a_case("full")], [Naive(), Absent()], "cpu", seconds=0.0)
    shown = summary(run(todo, tmp_path))
    assert shown.headers == ("case", "naive")
    assert [row[0] for row in shown.rows] == ["causal", "full"]
    assert "absent: it is not installed" in shown.notes and shown.notes[0].startswith("GFLOP/s")


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("fastest", {}, "there is no preset 'fastest'; presets are training-forward"),
        ("quick", {"peers": ["cudnn"]}, "there is no peer 'cudnn'; peers are reference, "),
        ("quick", {"device": "tpu"}, "device must be cuda or cpu; got 'tpu'"),
        (
            "quick",
            {"peers": ["naive"], "tutorial": Path("nowhere.py")},
            "tutorial must be a Python file",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(what, options, message):
    with pytest.raises(ValueError, match=message):
        plan(what, **options)


def test_the_module_runs_without_the_command_line_tool(tmp_path):
    """Where only torch, dacite, yaml, numpy and tabulate are installed."""
    program = (
        "import sys\n"
        "for name in ('typer', 'rich', 'matplotlib', 'IPython', 'psutil', 'platformdirs'): sys.modules[name] = None\n"
        "from flashlib.measure.racing import bench\n"
        "bench.main()\n"
    )
    arguments = [
        "length=32 head_dim=16 width=32 tokens=64",
        "--peers",
        "naive",
        "--seconds",
        "0",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("forward causal S32 D16 B2 H2 fp32: naive ")
    assert json.loads((tmp_path / "bench.json").read_text())["extra"]["complete"] is True


def test_flashlib_bench_prints_a_table_and_draws(tmp_path):
    from flashlib.cli import app

    grid = "length=32,64 head_dim=16 width=32 tokens=64"
    arguments = ["bench", grid, "--peers", "naive,tiled", "--seconds", "0", "--topic", "tiny", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "S32" in result.output and "GFLOP/s" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.json", "tiny_speed.png", "tiny_roofline.png"}
    again = CliRunner().invoke(app, ["bench", str(tmp_path / "tiny.json"), "--no-figures"])
    assert again.exit_code == 0 and "S64" in again.output
    assert CliRunner().invoke(app, ["bench", "length=0"]).exit_code == 1

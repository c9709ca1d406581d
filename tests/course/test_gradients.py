"""What chapter 09 runs: steps and contributions are the gradient, orders are orders, and its figure tells what is owned."""

import random
from dataclasses import replace

import pytest
import torch

from flashlib.backends.pytorch import tiled_attention
from flashlib.course import figures, widgets
from flashlib.course.chapters import gradients
from flashlib.measure.records.record import new_record, save_record
from flashlib.reference import naive_attention, oracle_gradients


@pytest.fixture
def problem():
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    rows, keys = random.Random(seed).randint(5, 20), random.Random(seed + 1).randint(20, 40)
    shapes = ((rows, 8), (keys, 8), (keys, 5), (rows, 5))
    return tuple(torch.randn(2, 3, *shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("causal", [False, True])
def test_steps_and_contributions_make_the_gradients(problem, causal):
    q, k, v, grad_out = problem
    dq, dk, dv = oracle_gradients(q, k, v, grad_out, causal=causal)
    steps = gradients.dense_steps(q, k, v, grad_out, causal=causal)
    assert torch.allclose(steps["ds"] @ k.double() * 8**-0.5, dq, rtol=1e-10, atol=1e-12)
    assert torch.allclose(steps["ds"].mT @ q.double() * 8**-0.5, dk, rtol=1e-10, atol=1e-12)
    assert torch.allclose(steps["p"].mT @ grad_out.double(), dv, rtol=1e-10, atol=1e-12)
    assert torch.allclose((steps["p"] * steps["dp"]).sum(-1), steps["delta"], rtol=1e-10, atol=1e-12)
    parts = gradients.contributions_to_dq(q, k, v, grad_out, 7, causal=causal)
    assert parts.shape == (-(-k.shape[2] // 7), *q.shape) and parts.dtype == torch.float32
    assert torch.allclose(parts.double().sum(0), dq, rtol=1e-4, atol=1e-5)


def test_sums_follow_their_order():
    parts = torch.tensor([[1e8], [1.0], [-1e8]])
    assert gradients.sum_in_order(parts, [0, 2, 1]).item() == 1.0
    assert gradients.sum_in_order(parts, torch.tensor([0, 1, 2])).item() == 0.0
    with pytest.raises(ValueError, match=r"each of 0 .. 2 once; got \[0, 0, 1\]"):
        gradients.sum_in_order(parts, [0, 0, 1])


def test_finite_differences_lose_in_float32_what_they_keep_in_float64():
    assert gradients.finite_difference_error(1e-6, torch.float64) < 1e-7
    assert gradients.finite_difference_error(1e-6, torch.float32) > 1e-3
    assert gradients.finite_difference_error(1e-2, torch.float32) < 1e-2
    with pytest.raises(ValueError, match="step must be greater than 0; got 0"):
        gradients.finite_difference_error(0, torch.float32)


def test_the_model_learns_and_tiled_attention_teaches_it_the_same():
    losses = gradients.training_losses(naive_attention)
    assert losses[-1] < losses[0] - 0.3
    assert gradients.training_losses(naive_attention) == losses
    assert gradients.training_losses(tiled_attention) == pytest.approx(losses, abs=1e-4)


def test_records_of_the_backward_are_found_wherever_they_are(tmp_path, monkeypatch):
    case = {"direction": "backward", "length": 4096, "head_dim": 64, "mask": "causal"}
    rows = [{**case, "peer": name, "tflops": rate} for name, rate in (("triton", 300.0), ("a", 250.0), ("b", 200.0))]
    rows += [{**case, "direction": "forward", "peer": "triton", "tflops": 999.0}, {**case, "length": 1, "peer": "a"}]
    monkeypatch.setattr(gradients, "BENCHMARKS", tmp_path)
    assert "no speed of the backward is recorded yet" in str(gradients.recorded_backward())
    record = new_record("race", rows, ["tiled.py"])
    save_record(record, tmp_path / "gpu")
    monkeypatch.setattr(gradients, "load_record", lambda name: {"gpu/race": record}[name])
    told = str(gradients.recorded_backward())
    assert "4,096" in told and "300" in told and "250" in told and "999" not in told and record.label in told
    outdated = replace(record, rows=[{**row, "tflops": 111.0} for row in rows], sources_hash="of other files")
    save_record(replace(outdated, topic="older"), tmp_path / "gpu")
    both = {"gpu/race": record, "gpu/older": outdated}
    monkeypatch.setattr(gradients, "load_record", both.__getitem__)
    told = str(gradients.recorded_backward())
    assert "300" in told and "111" not in told and "as they are" in told
    both["gpu/race"] = replace(record, rows=[])
    told = str(gradients.recorded_backward())
    assert "111" in told and "STALE" in told


@pytest.mark.parametrize(
    ("kernel", "products", "owned"), [("dk_dv", 8, "dK2"), ("dq", 6, "dQ2"), ("one_kernel", 10, "dK2")]
)
def test_figure_tells_what_a_program_owns(kernel, products, owned):
    figure = figures.backward_sweep(kernel, 2, 2, row_tiles=4, key_tiles=4)
    assert f": {products}." in figure.alt and owned in figure.alt and "Step 2 of" in figure.alt
    assert figures.backward_sweep(kernel, 2, 99, row_tiles=4, key_tiles=4).alt.count("Step ") == 1


def test_figure_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="kernel must be one of dk_dv, dq, one_kernel; got 'dv'"):
        figures.backward_sweep("dv", 0, 1)
    with pytest.raises(ValueError, match="program must be 0 to 4; got 5"):
        figures.backward_sweep("dq", 5, 1)
    with pytest.raises(ValueError, match="row_tiles and key_tiles must be at least 1; got 0 and 5"):
        figures.backward_sweep("dq", 0, 1, row_tiles=0)


def test_explorer_redraws(monkeypatch):
    monkeypatch.setattr(widgets, "widgets_run", lambda: True)
    explorer = widgets.backward_explorer(3)
    explorer.controls["kernel"].value = "dq"
    assert "dQ kernel" in explorer.figure.alt

"""Races replayed on recorded times and on times that are made up; and choices for real problems, kept on disk."""

import json

import pytest
import torch

from flashlib import attention, masks
from flashlib.backends import BACKENDS, PREFERENCES
from flashlib.measure.racing import choosing as module
from flashlib.measure.racing.choosing import HOPELESS, ROUNDS, autoselect, class_of, race, recorded_order
from flashlib.measure.records.record import load_record
from flashlib.spec import AttentionSpec


def _runs(ms: dict[str, float], rng, *, spread=None):
    """Candidates whose runs take the recorded times, now and then disturbed as on a real machine."""

    def make(name):
        def run():
            low, high = spread[name] if spread else (ms[name], ms[name])
            disturbed = 3.0 if rng.random() < 0.01 else 1.0
            return disturbed * rng.uniform(low, high)

        return run

    return {name: make(name) for name in ms}


@pytest.mark.parametrize("topic", ["training_forward", "training_backward", "window", "varlen"])
def test_over_the_recorded_grids_the_choice_is_within_a_tenth_of_the_best(topic: str, rng) -> None:
    """Each cell of a record, its candidates' runs drawn between their recorded percentiles."""
    cells: dict[tuple, dict[str, dict]] = {}
    for row in load_record(f"h200/{topic}").rows:
        if row["ms"]:
            cell = tuple(row[name] for name in ("batch", "q_heads", "length", "head_dim", "mask", "direction"))
            cells.setdefault(cell, {})[row["peer"]] = row
    raced = 0
    for cell, rows in cells.items():
        if len(rows) < 2:
            continue
        raced += 1
        ms = {name: row["ms"] for name, row in rows.items()}
        spread = {name: (row["p20_ms"], row["p80_ms"]) for name, row in rows.items()}
        found = race(_runs(ms, rng, spread=spread), rng)
        assert ms[found.winner] <= 1.1 * min(ms.values()), (cell, found)
    assert raced >= 6


def test_calls_from_python_are_chosen_within_a_tenth_of_the_best(rng) -> None:
    """What autoselect chose on a GPU, against times taken apart from its race; and races replayed on those times."""
    record = load_record("h200/choices")
    assert len(record.rows) >= 15 and {row["backward"] for row in record.rows} == {True, False}
    for row in record.rows:
        best = min(row["ms"].values())
        assert row["ms"][row["chosen"]] == pytest.approx(row["regret"] * best) and row["regret"] <= 1.1, row
        replayed = race(_runs(row["ms"], rng), rng)
        assert row["ms"][replayed.winner] <= 1.1 * best, row
    # Of the small problems the device's time is a part, and the choice is made by the whole.
    small = [row for row in record.rows if row["length"] <= 128]
    assert small and all(min(row["ms"].values()) < 0.5 for row in small)


def test_a_search_costs_no_more_than_is_said(rng) -> None:
    for _ in range(200):
        ms = {f"candidate {n}": 10 ** rng.uniform(-1, 2) for n in range(rng.randint(1, 6))}
        best = min(ms.values())
        found = race({name: lambda ms=ms[name]: ms for name in ms}, rng)
        assert ms[found.winner] == best
        assert found.spent_ms == pytest.approx(sum((1 + found.runs[name]) * ms[name] for name in ms))
        for name, taken in ms.items():
            assert found.runs[name] <= (2 if taken > HOPELESS * best else ROUNDS), name


def test_host_time_counts(rng) -> None:
    """What is quicker on the device loses where Python takes longer than the device does."""
    device_ms, host_ms = {"ours": 0.02, "theirs": 0.03}, {"ours": 0.36, "theirs": 0.04}
    eager = {name: max(device_ms[name], host_ms[name]) for name in device_ms}
    assert race(_runs(eager, rng), rng).winner == "theirs"
    eager = {name: max(100 * device_ms[name], host_ms[name]) for name in device_ms}
    assert race(_runs(eager, rng), rng).winner == "ours"


def test_who_fails_is_left_out_and_told(rng) -> None:
    def fails():
        raise MemoryError("too large")

    found = race({"fails": fails, **_runs({"works": 2.0}, rng)}, rng)
    assert found.winner == "works" and found.failed == {"fails": "MemoryError: too large"}
    with pytest.raises(RuntimeError, match=r"every candidate failed: fails: MemoryError: too large"):
        race({"fails": fails})
    with pytest.raises(ValueError, match=r"runs must hold at least one candidate"):
        race({})


def _inputs(rng, length: int = 40, grad: bool = False):
    return [torch.randn(1, heads, length, 16, requires_grad=grad) for heads in (4, 2, 2)]


@pytest.fixture(autouse=True)
def forgotten():
    module._found.clear()


@pytest.mark.parametrize("grad", [False, True])
def test_a_choice_runs_is_kept_and_not_raced_again(rng, tmp_path, monkeypatch, grad) -> None:
    q, k, v = _inputs(rng, grad=grad)
    options = {"causal": True}
    name = autoselect(q, k, v, among=("tiled", "torch_sdpa_flash"), folder=tmp_path, **options)
    assert name in ("tiled", "torch_sdpa_flash")
    assert torch.allclose(
        attention(q, k, v, backend=name, **options), attention(q, k, v, backend="reference", **options), atol=1e-4
    )
    (kept,) = tmp_path.glob("*.json")
    told = json.loads(kept.read_text(encoding="utf-8"))
    assert (
        told["winner"] == name
        and told["class"]["backward"] is grad
        and set(told["race"]["ms"]) == {"tiled", "torch_sdpa_flash"}
    )
    monkeypatch.setattr(module, "race", lambda runs: pytest.fail("raced again"))
    # From memory, from the disk, and for another problem of the same class.
    assert autoselect(q, k, v, among=("torch_sdpa_flash", "tiled"), folder=tmp_path, **options) == name
    module._found.clear()
    assert autoselect(*_inputs(rng, 50, grad), among=("tiled", "torch_sdpa_flash"), folder=tmp_path, **options) == name


def test_a_file_that_says_nothing_is_reported_and_raced_again(rng, tmp_path) -> None:
    q, k, v = _inputs(rng)
    autoselect(q, k, v, among=("tiled",), folder=tmp_path)
    (kept,) = tmp_path.glob("*.json")
    kept.write_text("{")
    module._found.clear()
    with pytest.warns(RuntimeWarning, match=r"cannot use the backend in .* racing again"):
        assert autoselect(q, k, v, among=("tiled",), folder=tmp_path) == "tiled"


def test_classes_differ_where_the_best_backend_may(rng) -> None:
    def kind(length=100, heads=4, mask=None, grad=False, **options):
        q, k = torch.randn(1, heads, length, 16, requires_grad=grad), torch.randn(1, 2, length, 16)
        return class_of(AttentionSpec.from_tensors(q, k, k, mask=mask, **options), ["tiled"])

    assert kind(100) == kind(128) != kind(129)
    assert kind() != kind(grad=True) and kind() != kind(heads=8) and kind() != kind(softcap=5.0)
    assert kind(mask=masks.Causal()) == kind(causal=True) != kind()
    assert kind(mask=masks.Window(20, 0)) == kind(mask=masks.Window(30, 0)) != kind(mask=masks.Window(70, 0))
    assert kind(mask=masks.KeyLengths([3])) != kind(mask=masks.Window(20, 0))


def test_what_is_not_there_is_refused(rng, tmp_path) -> None:
    q, k, v = _inputs(rng)
    with pytest.raises(ValueError, match=r"among: there is no backend 'fastest'"):
        autoselect(q, k, v, among=("fastest",), folder=tmp_path)
    with pytest.raises(RuntimeError, match=r"none of the candidates can run this: torch_sdpa_cudnn"):
        autoselect(q, k, v, among=("torch_sdpa_cudnn",), folder=tmp_path)


def test_the_shipped_order_is_that_of_the_records() -> None:
    """Forward passes, from the fastest: the backends that the records have, in the order in which they are tried."""
    recorded = [name for name, _ in recorded_order("h200", "forward")]
    shipped = [preference.backend for preference in PREFERENCES if preference.backend in recorded]
    assert recorded == shipped and len(recorded) >= 3
    slower = dict(recorded_order("h200", "backward"))
    assert set(slower) <= set(BACKENDS) and min(slower.values()) >= 1.0

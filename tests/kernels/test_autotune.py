"""The search for tile sizes, with a clock that is made up: which take part, what is kept, and what happens to a spoiled answer."""

import dataclasses
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flashlib import AttentionSpec
from flashlib.config import TritonConfig
from flashlib.launch import autotune, plain, tiles
from flashlib.launch.autotune import CANDIDATES, Device, Problem, fits, registers, search, searches, shared_memory
from flashlib.launch.inspect import ARCHITECTURES, inspect
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches, forward_launch
from flashlib.launch.tiles import TileConfig

H200 = Device("NVIDIA H200", (9, 0), ARCHITECTURES["sm_90"])
CONSUMER = Device("NVIDIA GeForce RTX 3090", (8, 6), ARCHITECTURES["sm_86"])
DEFAULT = TileConfig(64, 64, 4, 1)
PROBLEM = Problem("forward", "bfloat16", 128, 128, 32, 4096, 4096, 1, ("MASK=0", "ieee"))


class Clock:
    """Milliseconds by a table, and a count of the questions."""

    def __init__(self, fastest: TileConfig):
        self.fastest, self.asked = fastest, []

    def __call__(self, tile: TileConfig) -> float:
        self.asked.append(tile)
        return 1.0 if tile == self.fastest else random.uniform(2.0, 9.0)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """What one test finds, the next does not remember."""
    monkeypatch.setattr(autotune, "_found", {})


def inputs(length=1000, head_dim=128, dtype=torch.bfloat16, **options):
    q, k, v = (torch.empty(2, 4, length, head_dim, dtype=dtype, device="meta") for _ in range(3))
    return (q, k, v), KernelOptions.from_spec(AttentionSpec.from_tensors(q, k, v, **options))


def test_the_fastest_is_found_once_and_kept(tmp_path, monkeypatch):
    fastest = random.choice([c for c in CANDIDATES["forward"] if fits(PROBLEM, c, H200)])
    clock = Clock(fastest)
    assert search(PROBLEM, H200, DEFAULT, clock, folder=tmp_path) == fastest
    assert clock.asked[0] == DEFAULT and len(clock.asked) == len(set(clock.asked)) > 5
    assert all(fits(PROBLEM, tile, H200) for tile in clock.asked)
    asked = len(clock.asked)
    assert search(PROBLEM, H200, DEFAULT, clock, folder=tmp_path) == fastest
    monkeypatch.setattr(autotune, "_found", {})  # as in another process
    assert search(PROBLEM, H200, DEFAULT, clock, folder=tmp_path) == fastest
    assert len(clock.asked) == asked
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["timings"][0]["ms"] == 1.0


def test_an_answer_serves_one_gpu_one_triton_one_text_of_the_kernels_and_one_kind_of_problem(tmp_path, monkeypatch):
    def asks(problem=PROBLEM, device=H200) -> bool:
        monkeypatch.setattr(autotune, "_found", {})
        clock = Clock(DEFAULT)
        search(problem, device, DEFAULT, clock, folder=tmp_path)
        return bool(clock.asked)

    assert asks() and not asks()
    assert asks(device=CONSUMER) and asks(problem=Problem(**{**vars(PROBLEM), "kv_len": 8192}))
    for changed in (
        {"triton": "0.0", "kernels": "a"},
        {"triton": "0.0", "kernels": "b"},
        {"triton": "0.1", "kernels": "b"},
    ):
        monkeypatch.setattr(autotune, "_versions", lambda changed=changed: changed)
        assert asks() and not asks()
    assert not asks(device=Device(*vars(H200).values()))


def test_a_kind_of_problem_is_known_by_what_changes_the_choice():
    def kind(**changes):
        (q, k, v), options = inputs(**changes)
        return Problem.of("forward", q, options.arguments(q, k, v))

    assert kind() == kind(length=1024) == kind(length=513) == kind(head_dim=128)
    others = [
        kind(length=1025), kind(head_dim=64), kind(dtype=torch.float16), kind(causal=True), kind(softcap=3.0),
        kind(alibi_slopes=torch.empty(4, device="meta")),
    ]  # fmt: skip
    assert len({kind(), *others}) == 7


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"key": 1}', "tiles", "negative", "\udcff"])
def test_a_spoiled_answer_is_reported_and_replaced(damage, tmp_path, monkeypatch):
    search(PROBLEM, H200, DEFAULT, Clock(DEFAULT), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    good = json.loads(file.read_text())
    if damage == "tiles":
        damage = json.dumps({**good, "tiles": {"block_m": 64}})
    if damage == "negative":
        damage = json.dumps({**good, "tiles": {**good["tiles"], "num_warps": -4}})
    file.write_bytes(damage.encode(errors="surrogateescape"))
    monkeypatch.setattr(autotune, "_found", {})
    clock = Clock(DEFAULT)
    with pytest.warns(RuntimeWarning, match=f"cannot use the tile sizes in .*{file.name}.*searching again"):
        assert search(PROBLEM, H200, DEFAULT, clock, folder=tmp_path) == DEFAULT
    assert clock.asked and json.loads(file.read_text())["tiles"] == good["tiles"]
    assert [file] == list(tmp_path.iterdir())


def test_where_nothing_can_be_kept_the_answer_still_counts(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(RuntimeWarning, match="could not be kept"):
        assert search(PROBLEM, H200, DEFAULT, Clock(DEFAULT), folder=blocked) == DEFAULT

    def full(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(autotune.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="could not be kept.*no space left"):
        search(PROBLEM, H200, DEFAULT, Clock(DEFAULT), folder=tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_two_searches_at_once_leave_one_whole_answer(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(autotune._search, PROBLEM, H200, DEFAULT, Clock(DEFAULT), tmp_path) for _ in range(8)]
        assert {job.result() for job in jobs} == {DEFAULT}
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["tiles"] == vars(DEFAULT)


def test_a_tile_that_does_not_run_is_passed_by(tmp_path):
    from triton.runtime.errors import OutOfResources

    def only_the_default(tile):
        if tile != DEFAULT:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 5.0

    def nothing(tile):
        raise OutOfResources(300_000, 232_448, "shared memory")

    assert search(PROBLEM, H200, DEFAULT, only_the_default, folder=tmp_path / "a") == DEFAULT
    with pytest.raises(RuntimeError, match="no tile size runs .*H200:\n.*out of resource"):
        search(PROBLEM, H200, DEFAULT, nothing, folder=tmp_path / "b")


@pytest.mark.parametrize("capability, device", [(9, H200), (8, CONSUMER)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_tables_tiles_pass_the_arithmetic_that_leaves_candidates_out(capability, device, head_dim):
    for table in (tiles.TABLE, *tiles.EXCEPTIONS.values()):
        for kernel, by_width in table.get(capability, {}).items():
            if head_dim in by_width:
                problem = Problem(kernel, "bfloat16", head_dim, head_dim, 32, 4096, 4096, 1, ())
                assert fits(problem, by_width[head_dim], device), (kernel, registers(problem, by_width[head_dim]))


def test_what_cannot_fit_is_left_out():
    wide = Problem("forward", "bfloat16", 256, 256, 32, 4096, 4096, 1, ())
    assert not fits(wide, TileConfig(128, 128, 8, 3), H200)  # 448 KiB of shared memory
    assert not fits(wide, TileConfig(128, 64, 4, 1), H200)  # 256 registers for the output alone
    assert not fits(PROBLEM, TileConfig(128, 128, 8, 3), CONSUMER)
    for kernel in CANDIDATES:
        for head_dim in (16, 64, 128, 256):
            problem = Problem(kernel, "bfloat16", head_dim, head_dim, 32, 4096, 4096, 1, ())
            assert any(fits(problem, tile, CONSUMER) for tile in CANDIDATES[kernel]), (kernel, head_dim)


def test_the_arithmetic_is_what_the_compiler_finds():
    for kernel, reports in (
        ("forward", inspect("forward", head_dim=64)),
        ("dkdv", inspect("backward", head_dim=64)[1:2]),
    ):
        (report,) = reports
        problem = Problem(kernel, "bfloat16", 64, 64, 32, 1024, 1024, 1, ())
        assert 0 <= report.shared_memory - shared_memory(problem, report.tiles) <= 2048
        assert registers(problem, report.tiles) <= report.registers


def test_when_a_search_takes_place(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for capability, unknown in (((9, 0), False), ((8, 6), False), ((12, 0), True), ((7, 5), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert searches("unknown", cuda) is unknown
        assert searches("always", cuda) and not searches("never", cuda)
    assert not searches("always", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not searches("always", cuda)


def test_the_launches_take_what_was_found(tmp_path, monkeypatch):
    """From the setting to the launch, for all three kernels; the GPU and the clock are made up."""
    monkeypatch.setenv("FLASHLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(plain, "searches", lambda mode, device: mode == "always")
    monkeypatch.setattr(Device, "of", classmethod(lambda cls, device: H200))
    wanted = {"attention_forward": TileConfig(64, 32, 4, 2), "backward_dkdv": TileConfig(16, 64, 8, 2), "backward_dq": TileConfig(64, 32, 4, 1)}  # fmt: skip
    monkeypatch.setattr(plain, "time_launches", lambda launches: float(launches[-1].tiles != wanted[launches[-1].name]))
    (q, k, v), options = inputs(causal=True)
    tuned = dataclasses.replace(options, autotune="always")
    forward, out, lse = forward_launch(q, k, v, tuned)
    _, dkdv, dq = backward_launches(q, k, v, out, lse, torch.empty_like(out), None, tuned)[0]
    assert {x.name: x.tiles for x in (forward, dkdv, dq)} == wanted
    assert forward_launch(q, k, v, options)[0].tiles == tiles.tile_config("forward", q.dtype, 128, 9)
    assert len(list((tmp_path / "tiles").iterdir())) == 3


def test_the_setting_is_checked():
    assert TritonConfig().autotune == "unknown"
    with pytest.raises(ValueError, match="autotune must be one of unknown, always, never; got 'sometimes'"):
        TritonConfig(autotune="sometimes")

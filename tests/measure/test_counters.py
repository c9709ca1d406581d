"""Hardware counters: what `ncu` prints is read right, and where it cannot run the message says so. Here a program stands in for it."""

import contextlib
import json
import random
import stat
import sys
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from flashlib.cli import app
from flashlib.measure.counting import counters as module
from flashlib.measure.counting.counters import (
    COUNTERS,
    STALL_SECTION,
    CountersUnavailableError,
    parse,
    read,
)
from flashlib.measure.racing import counted
from flashlib.measure.racing.bench import plan, summary
from flashlib.measure.racing.counted import run_counters

MARKS = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
STALLS = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def _table(kernels: list[dict], columns: list[str], units: dict[str, str]) -> str:
    """As `ncu --csv --page raw` prints it, with a line of its own before and behind."""
    header = ["ID", "Process ID", "Kernel Name", MARKS, *columns]
    lines = [header, ["", "", "", "", *(units.get(name, "") for name in columns)]]
    for number, kernel in enumerate(kernels):
        mark = "" if kernel["mark"] is None else f'140:""<default domain>"":""case:{kernel["mark"]}"":""none""'
        values = [kernel.get(name) for name in columns]
        shown = ["n/a" if value is None else f"{value:,}" for value in values]
        lines.append([str(number), "77", kernel["name"], mark, *shown])
    body = "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    return f"==PROF== Connected to process 77\nwhat the program prints\n{body}\n==PROF== Disconnected\n"


def _kernel(rng: random.Random, name: str, mark: int | None, **more) -> dict:
    figures = {metric: rng.randint(1, 10**9) for metric, _, _ in COUNTERS.values()}
    figures[COUNTERS["tensor_pipe"][0]] = rng.uniform(0, 100)
    figures[STALLS.format("barrier")] = rng.uniform(0, 3)
    return {"name": name, "mark": mark, **figures, **more}


UNITS = {"gpu__time_duration.sum": "nsecond", "dram__bytes_read.sum": "byte", "dram__bytes_write.sum": "byte"}
COLUMNS = [*(metric for metric, _, _ in COUNTERS.values()), STALLS.format("barrier")]


def test_kernels_of_a_call_are_summed_or_averaged_over_their_time(rng) -> None:
    first, second = _kernel(rng, "delta", 3), _kernel(rng, "dq", 3)
    printed = _table([_kernel(rng, "randn", None), first, second, _kernel(rng, "split", 12)], COLUMNS, UNITS)
    found = parse(printed)
    assert set(found) == {3, 12} and found[3].kernels == ["delta", "dq"] and found[12].kernels == ["split"]
    figures = found[3].figures
    times = [kernel["gpu__time_duration.sum"] for kernel in (first, second)]
    assert figures["seconds"] == pytest.approx(sum(times) / 1e9)
    assert figures["dram_read"] == first["dram__bytes_read.sum"] + second["dram__bytes_read.sum"]
    sectors, wavefronts = (COUNTERS[name][0] for name in ("l2_read", "shared_bytes"))
    assert figures["l2_read"] == 32 * (first[sectors] + second[sectors])
    assert figures["shared_bytes"] == 128 * (first[wavefronts] + second[wavefronts])
    for value, column, factor in (
        (figures["tensor_pipe"], COUNTERS["tensor_pipe"][0], 0.01),
        (found[3].stalls["barrier"], STALLS.format("barrier"), 1),
    ):
        mean = sum(kernel[column] * ns for kernel, ns in zip((first, second), times, strict=True)) / sum(times)
        assert value == pytest.approx(factor * mean)


def test_what_a_gpu_does_not_count_is_none_and_not_zero(rng) -> None:
    lacking = _kernel(rng, "split", 0) | {COUNTERS["exponential_unit"][0]: None}
    figures = parse(_table([lacking, _kernel(rng, "combine", 0)], COLUMNS, UNITS))[0].figures
    assert figures["exponential_unit"] is None and figures["tensor_pipe"] > 0
    assert parse("==PROF== no kernels were profiled\n") == {}


def test_units_are_read_and_unknown_ones_refused(rng) -> None:
    kernel = _kernel(rng, "split", 0)
    in_kilobytes = parse(_table([kernel], COLUMNS, UNITS | {"dram__bytes_read.sum": "Kbyte"}))[0]
    assert in_kilobytes.figures["dram_read"] == 1e3 * kernel["dram__bytes_read.sum"]
    with pytest.raises(ValueError, match=r"the unit of dram__bytes_read.sum must be one of .*; got 'furlong'"):
        parse(_table([kernel], COLUMNS, UNITS | {"dram__bytes_read.sum": "furlong"}))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program called ncu that notes how it was called and prints what it is told; and a GPU that is said to be there."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(printed: str, *, status: int = 0, metrics: tuple[str, ...] = (), writes: dict | None = None):
        (folder / "printed").write_text(printed)
        script = f"""#!{sys.executable}
import json, sys
if "--query-metrics" in sys.argv:
    print("Device GH100"); [print(name, "  what it is") for name in {metrics!r}]; sys.exit()
open({str(folder / "called")!r}, "w").write(json.dumps(sys.argv[1:]))
if {writes!r} is not None:
    open(sys.argv[-1], "w").write(json.dumps({writes!r}))
sys.stdout.write(open({str(folder / "printed")!r}).read()); sys.exit({status})
"""
        (folder / "ncu").write_text(script)
        (folder / "ncu").chmod(0o755 | stat.S_IEXEC)
        monkeypatch.setenv("PATH", str(folder), prepend=":")
        for part in (module, counted):
            monkeypatch.setattr(part, "why_not", lambda: None)
        return lambda: json.loads((folder / "called").read_text())

    return make


def test_what_is_asked_of_ncu(rng, stand_in) -> None:
    called = stand_in(_table([_kernel(rng, "split", 0)], COLUMNS, UNITS), metrics=("dram__bytes_read", "lts__t_bytes"))
    found = read(["python", "program.py"], ("dram_read", "dram_written"), stalls=False)
    given = called()
    assert given[-2:] == ["python", "program.py"] and STALL_SECTION not in given
    # What the GPU does not list is not asked for, as one unknown name would end the whole run.
    assert given[given.index("--metrics") + 1] == "dram__bytes_read.sum"
    assert set(found[0].figures) == {"dram_read", "dram_written"}
    with pytest.raises(ValueError, match=r"counters must be among seconds, .*; got 'speed'"):
        read(["python"], ("speed",))


def test_failures_are_told(rng, stand_in) -> None:
    stand_in("==ERROR== ERR_NVGPUCTRPERM - no permission", status=1)
    with pytest.raises(CountersUnavailableError, match=r"only administrators"):
        read(["python"])
    stand_in("==ERROR== the application died", status=9)
    with pytest.raises(RuntimeError, match=r"ncu failed \(9\): .*the application died"):
        read(["python"])
    stand_in(_table([_kernel(rng, "randn", None)], COLUMNS, UNITS))
    with pytest.raises(RuntimeError, match=r"ncu counted no kernel"):
        read(["python"])


def test_a_plan_becomes_a_record(rng, stand_in, tmp_path) -> None:
    """A row for each peer in each case, in the order in which the watched process numbers them; who could not run says why."""
    chosen = replace(plan("decode", peers=["flashlib", "naive"], device="cpu", seed=3), device="cuda")
    kernels = [_kernel(rng, f"kernel {n}", n) for n in range(2 * len(chosen.cases)) if n != 1]
    called = stand_in(_table(kernels, COLUMNS, UNITS), writes={"1": "out of memory"})
    record = run_counters(chosen, tmp_path)
    assert called()[-4:-1][:2] == ["-m", "flashlib.measure.racing.counted"]
    assert [row["peer"] for row in record.rows] == ["flashlib", "naive"] * len(chosen.cases)
    assert record.rows[1]["why_not"] == "out of memory" and record.rows[1]["kernels"] == []
    assert (
        record.rows[2]["kernels"] == ["kernel 2"] and record.rows[2]["dram_read"] == kernels[1]["dram__bytes_read.sum"]
    )
    assert (tmp_path / "decode_counters.json").is_file()
    told = str(summary(record))
    assert "out of memory" in told and "barrier" in told
    stand_in(_table(kernels[:-1], COLUMNS, UNITS), writes={"1": "out of memory"})
    with pytest.raises(RuntimeError, match=r"ncu counted no kernel of naive in"):
        run_counters(chosen, tmp_path)


@pytest.mark.parametrize(("what", "peers", "fails"), [("decode", ["flashlib", "flashlib_page_16"], {}), ("length=48 tokens=0 direction=forward,backward mask=causal", ["cpu", "torch_varlen"], {"1", "3"})])  # fmt: skip
def test_the_watched_program_runs_each_peer_in_each_case_once(what, peers, fails, tmp_path, monkeypatch) -> None:
    """On a CPU, where nobody watches: between the marks each call runs once, a backward's too, and who cannot run is told."""
    cases = plan(what, device="cpu").cases[:2]
    asked = {"cases": [asdict(case) for case in cases], "peers": peers, "tutorial": None, "seed": 5, "device": "cpu"}
    (tmp_path / "asked").write_text(json.dumps(asked))
    numbers = []
    monkeypatch.setattr(counted, "marked", lambda number: numbers.append(number) or contextlib.nullcontext())
    monkeypatch.setattr(sys, "argv", ["counters", str(tmp_path / "asked"), str(tmp_path / "told")])
    counted.main()
    told = json.loads((tmp_path / "told").read_text())
    assert set(told) == set(fails) and {str(number) for number in numbers} == {"0", "1", "2", "3"} - set(fails)
    assert all("needs a CUDA GPU" in why for why in told.values())


def test_without_a_gpu_or_ncu_it_is_said(monkeypatch, tmp_path) -> None:
    answer = CliRunner().invoke(app, ["bench", "decode", "--counters", "--device", "cpu", "--out", str(tmp_path)])
    assert answer.exit_code == 1 and "Traceback" not in answer.output
    assert "hardware counters are a GPU's, and the device is cpu" in answer.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CountersUnavailableError, match=r"PyTorch sees no CUDA GPU here"):
        read(["python"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(CountersUnavailableError, match=r"its command ncu is not on the PATH"):
        read(["python"])
    assert list(tmp_path.iterdir()) == []

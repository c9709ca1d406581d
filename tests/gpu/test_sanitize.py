"""What the run under compute-sanitizer rests on, checked without a GPU: the planted mistakes are in the machine code, the controls are
right, and reports are sorted by how the kernel orders the accesses they name."""

import inspect
import re

import pytest
from gpu import sanitize
from gpu.sanitize import CONTROLS, PLANTED, judged

pytest.importorskip("triton")

from gpu import planted

from flashlib.kernels.hopper import common, dkdv, dq, forward
from flashlib.launch.inspect import compile_launch

HEADER = "========= COMPUTE-SANITIZER\n"
RAN = "".join(f"{what} has run\n" for what in ["every case", *CONTROLS["racecheck"]])
SUMMARY = "========= RACECHECK SUMMARY: hazards displayed\n"


def machine_code(name: str) -> list[str]:
    """Its instructions on shared memory and its barriers, in the order of the code."""
    sass = compile_launch(planted.launch(name, "cpu"), "sm_90").sass
    return re.findall(r"\b(STS|LDS|BAR\.SYNC|SYNCS\.ARRIVE|SYNCS\.PHASECHK)\b", sass)


def test_planted_race_is_in_the_machine_code():
    """ptxas must neither drop the load nor put a barrier between."""
    assert machine_code("planted_race")[-3:] == ["BAR.SYNC", "STS", "LDS"]


def test_planted_race_of_partitions_meets_at_no_mbarrier():
    code = machine_code("planted_race_of_partitions")
    assert {"STS", "LDS"} <= set(code)
    assert not {"SYNCS.ARRIVE", "SYNCS.PHASECHK"} & set(code)


def test_control_of_the_handover_waits_at_mbarriers_on_both_sides():
    code = "\n".join(machine_code("control_handover"))
    assert re.search(r"SYNCS.PHASECHK\nSTS\nSYNCS.ARRIVE", code), code
    assert re.search(r"SYNCS.PHASECHK\nLDS\nBAR.SYNC\nSYNCS.ARRIVE", code), (
        code
    )  # all warps have read before one thread says so
    ptx = compile_launch(planted.launch("control_handover", "cpu"), "sm_90").ptx
    between = ptx[ptx.rindex("st.shared") : ptx.rindex("mbarrier.arrive")]
    assert "bar.warp.sync" in between  # all lanes have written before one of them says so


@pytest.mark.parametrize("name", ["control_dispatch", "control_written_before"])
def test_other_controls_hand_over_through_shared_memory_by_barriers_of_the_block(name):
    code = machine_code(name)
    assert {"STS", "LDS", "BAR.SYNC"} <= set(code)
    assert not {"SYNCS.ARRIVE", "SYNCS.PHASECHK"} & set(code)


def line_of(function, text: str) -> str:
    """Where a line of a jitted function is, as the tool writes it."""
    lines, first = inspect.getsourcelines(function.fn)
    file = inspect.getsourcefile(function.fn).rpartition("/")[2]
    return f"{file}:{first + next(n for n, line in enumerate(lines) if text in line)}"


def race(kernel: str, first: str, *others: str) -> str:
    """A report as racecheck prints it."""
    lines = [f"========= Error: Race reported between Read access at {kernel}+0xf0 in {first}"]
    lines += [f"=========     and Write access at {kernel}+0x4370 in {other} [38 hazards]" for other in others]
    return "\n".join([*lines, "========= ", ""])


PLANTED_RACES = race("planted_race_kernel", "planted.py:50", "planted.py:50") + race(
    "planted_race_of_partitions_kernel", line_of(planted.take, "smem.load"), line_of(planted.give, "smem.store")
)
HANDOVER = race("control_handover_kernel", line_of(planted.hear, "smem.load"), line_of(planted.tell, "smem.store"))
DISPATCH = race("control_dispatch_kernel", *2 * [line_of(planted.control_dispatch_kernel, "def ")])
NOTED = race("hopper_forward", line_of(common.noted, ".load("), line_of(common.note, ".store("))
OWN = {
    "handover": NOTED,
    "dispatch": race(
        "hopper_dkdv",
        line_of(dkdv.hopper_dkdv, "def "),
        line_of(dkdv.hopper_dkdv, "def "),
        line_of(dkdv.hopper_dkdv, "gl.warp_specialize"),
    ),
    "written before": race("hopper_dq", line_of(common.noted, ".load("), line_of(dq.hopper_dq, "smem_place.index(0)")),
}
NEVER_EXCUSED = {
    "ordinary kernel": race("attention_forward", "forward.py:90", "forward.py:80"),
    "one partition": race("hopper_forward", *2 * [line_of(forward.consume, "pass_turn")]),
    "no line": "========= Error: Race reported between Read access at hopper_forward+0xf0\n",
    "library's line": race("hopper_forward", line_of(common.noted, ".load("), "standard.py:293"),
    "some ordered, some not": race(
        "hopper_forward", line_of(common.noted, ".load("), line_of(common.note, ".store("), "standard.py:293"
    ),
}


def racecheck(*reports: str, ran: str = RAN) -> dict:
    return judged("racecheck", HEADER + "case one\n  launched hopper_forward\n" + "".join(reports) + ran + SUMMARY)


def test_silence_passes_only_if_what_is_planted_is_found():
    assert racecheck(PLANTED_RACES)["passed"]
    assert not racecheck()["passed"]
    wrong_reason = race(
        "planted_race_of_partitions_kernel", *2 * [line_of(planted.planted_race_of_partitions_kernel, "def ")]
    )
    row = racecheck(PLANTED_RACES.partition("========= \n")[0] + "\n", wrong_reason)
    assert row["planted_mistakes_found"] == {"planted_race": True, "planted_race_of_partitions": False}
    assert not row["passed"]


def test_a_report_is_excused_by_the_control_of_its_kind_only():
    on_controls = {"handover": HANDOVER, "dispatch": DISPATCH}
    for kind, report in OWN.items():
        assert not racecheck(PLANTED_RACES, report)["passed"], kind
        for other, on_control in on_controls.items():
            row = racecheck(PLANTED_RACES, on_control, report)
            assert row["passed"] == (kind == other), (kind, other, row)
            assert bool(row["not_judged"]) == (kind == other)
            assert row["controls"][f"control_{other}"] == [other]
    row = racecheck(PLANTED_RACES, DISPATCH, OWN["dispatch"])
    assert row["not_judged"] == [{"kernel": "hopper_dkdv", "kind": "dispatch", "reports": 1, "hazards": 76}]
    assert any("Nothing about" in line and "'dispatch'" in line for line in row["shown"])


def test_what_is_said_of_any_right_kernel_excuses_its_kind():
    """Racecheck may stay silent on a dispatch that is alone, and hold it against a kernel that also hands something over."""
    head, split = (line_of(planted.control_handover_kernel, text) for text in ("def ", "gl.warp_specialize"))
    row = racecheck(PLANTED_RACES, HANDOVER, race("control_handover_kernel", head, split), OWN["dispatch"])
    assert row["controls"]["control_handover"] == ["dispatch", "handover"]
    assert row["passed"]


def test_a_control_that_did_not_run_fails_and_shows_nothing():
    row = racecheck(PLANTED_RACES, ran=RAN.replace("control_handover has run\n", ""))
    assert not row["passed"]
    assert not row["shown"]


def test_reports_that_differ_in_numbers_only_are_recorded_once():
    row = racecheck(PLANTED_RACES, NOTED, NOTED.replace("+0xf0", "+0x1f0").replace("38 hazards", "2 hazards"))
    assert row["errors"] == 2
    assert [report[:20] for report in row["reports"]] == ["2 x Error: Race repo"]


@pytest.mark.parametrize("name", NEVER_EXCUSED)
def test_other_reports_fail_whatever_the_controls(name):
    row = racecheck(PLANTED_RACES, HANDOVER, DISPATCH, NEVER_EXCUSED[name])
    assert not row["passed"]
    assert row["errors"] == 1, row["reports"]


def test_a_lack_of_room_for_barriers_fails():
    warning = "========= Warning: Detected overflow of tracked cuda::barrier structures. Results might be incorrect.\n"
    assert not racecheck(PLANTED_RACES, warning)["passed"]


def test_every_planted_mistake_and_control_can_be_launched():
    for name in {name for group in (PLANTED, CONTROLS) for names in group.values() for name in names}:
        assert planted.launch(name, "cpu").name == f"{name}_kernel"
    assert set(CONTROLS["racecheck"]) == set(planted.RESULTS)


def test_the_tool_is_asked_for_all_reports(tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho '--print-limit --show-backtrace'\n")
    tool.chmod(0o755)
    assert sanitize.tool_options("racecheck", str(tool)) == ["--show-backtrace", "no", "--print-limit", "0"]

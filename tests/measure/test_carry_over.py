"""When a record of GPU times may be carried over a change of the kernels' sources."""

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from carry_over import changed_besides_kernels, fresh_at, read_at, sources_today
from machine_code import differences

from flashlib.measure.records.record import BENCHMARKS, new_record, sources_hash

LAUNCH = "from flashlib.kernels.hopper import hopper_forward\nimport math\n\n\ndef launch():\n    return math.pi\n"
MOVED = LAUNCH.replace("kernels.hopper ", "kernels.hopper.forward ")


def record_of(*sources: str):
    return dataclasses.replace(new_record("speed", [], ["masks.py"]), sources=list(sources))


def reader(**texts: str):
    """Reads files given by name, without folder and ending."""
    return lambda name: texts[name.rpartition("/")[2].partition(".")[0]]


def test_device_code_may_change_and_so_may_the_modules_that_names_come_from():
    record = record_of("kernels/forward.py", "launch/hopper.py")
    before, now = reader(forward="a = 1", hopper=LAUNCH), reader(forward="a = 2", hopper=MOVED)
    assert changed_besides_kernels(record, before, now) == []


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("math.pi", "math.e"),  # what is done
        ("import math", "import cmath as math\nimport os"),  # another name is bound
        ("import hopper_forward", "import hopper_forward as other"),
        ("def launch", "def start"),
    ],
)
def test_host_code_may_not(was, becomes):
    record = record_of("kernels/forward.py", "launch/hopper.py")
    assert was in MOVED
    before, now = reader(forward="a = 1", hopper=LAUNCH), reader(forward="a = 1", hopper=MOVED.replace(was, becomes))
    assert changed_besides_kernels(record, before, now) == ["launch/hopper.py"]


def test_host_code_that_is_gone_counts_as_changed():
    def gone(name: str) -> str:
        raise FileNotFoundError(name)

    assert changed_besides_kernels(record_of("launch/hopper.py"), reader(hopper=LAUNCH), gone) == ["launch/hopper.py"]


def test_device_code_is_followed_to_where_it_is_with_what_it_imports():
    texts = reader(
        hopper="import math",
        forward="from flashlib.kernels.bundles import Problem\nfrom flashlib.kernels.hopper.common import note",
        common="from flashlib.kernels.bundles import Problem",
        bundles="import triton",
    )
    record = record_of("kernels/hopper.py", "launch/hopper.py")
    assert sources_today(record, {"kernels/hopper.py": "kernels/hopper/forward.py"}, texts) == [
        "kernels/bundles.py", "kernels/hopper/common.py", "kernels/hopper/forward.py", "launch/hopper.py",
    ]  # fmt: skip


def test_a_record_is_fresh_where_its_hash_is_that_of_the_sources_then():
    record = new_record("speed", [], ["masks.py"])
    then = read_at("HEAD")
    assert fresh_at("HEAD", dataclasses.replace(record, sources_hash=sources_hash(["masks.py"], then)))
    assert not fresh_at("HEAD", dataclasses.replace(record, sources_hash="of other code"))
    assert not fresh_at("HEAD", dataclasses.replace(record, sources=["no_such_file.py"]))


def test_every_difference_of_machine_code_is_named():
    before, found = {"forward": "1", "backward": "2", "decode": "3"}, {"forward": "1", "backward": "4", "combine": "5"}
    assert differences(before, found, complete=True) == ["changed: backward", "new: combine", "gone: decode"]
    assert differences(before, found, complete=False) == ["changed: backward", "new: combine"]
    assert differences(before, before, complete=True) == []


def test_the_digests_of_all_versions_are_of_the_same_kernels():
    tables = sorted((BENCHMARKS / "machine_code").glob("triton-*.txt"))
    assert len(tables) == 2
    kernels = [[line.split("  ", 1)[1] for line in table.read_text().splitlines()] for table in tables]
    assert kernels[0] == kernels[1] and len(kernels[0]) == len(set(kernels[0])) > 100

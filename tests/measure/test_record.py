"""Records carry their origin, and notice when the code they measured has changed."""

import dataclasses
import json

import pytest

from flashlib.measure import load_record, save_record, sources_hash
from flashlib.measure.record import BENCHMARKS, _code_alone, new_record


def test_a_record_survives_the_disk(tmp_path):
    record = new_record(
        "speed", [{"tokens": 8, "ms": 0.5}, {"tokens": 16, "ms": 1.0}], ["masks.py"], "two runs", runs=2
    )
    path = save_record(record, tmp_path)
    assert load_record("speed", tmp_path) == record
    assert json.loads(path.read_text())["versions"]["torch"] in record.label
    assert record.select(tokens=16) == [{"tokens": 16, "ms": 1.0}]
    assert not record.stale


def test_changed_code_makes_a_record_stale_and_says_so():
    record = dataclasses.replace(new_record("speed", [], ["masks.py"]), sources_hash="of other code")
    assert record.stale
    assert record.label.endswith("STALE: the code has changed since")


def test_only_code_counts():
    code = 'def f(x):\n    """Doc."""\n    return x  # why\n'
    assert _code_alone(code) == _code_alone(
        "# head\n\n" + code.replace("Doc.", "Other words,\n    longer.").replace("why", "!")
    )
    assert _code_alone(code) != _code_alone(code.replace("return x", "return -x"))
    assert _code_alone('y = "# kept"\n') == 'y = "# kept"'


def test_the_hash_depends_on_each_file():
    assert sources_hash(["masks.py"]) != sources_hash(["masks.py", "spec.py"])


def test_an_unknown_record_lists_the_known():
    with pytest.raises(FileNotFoundError, match="there is no record 'h200/nothing'; there are: .*h200/memory_wall"):
        load_record("h200/nothing")


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.json")), ids=lambda path: path.stem)
def test_committed_records_say_where_they_come_from(path):
    record = load_record(str(path.relative_to(BENCHMARKS).with_suffix("")))
    assert record.topic == path.stem
    assert record.rows
    assert record.commit != "unknown"
    assert {"python", "torch", "triton"} <= record.versions.keys()
    assert len(record.sources_hash) == 64

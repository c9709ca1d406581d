"""Records carry their origin, and notice when the code they measured has changed."""

import dataclasses
import json

import pytest

from flashlib.measure import load_record, save_record, sources_hash
from flashlib.measure.records.record import BENCHMARKS, PACKAGE, _code_alone, _cpp_alone, new_record
from flashlib.measure.records.sources import cpu_sources


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


CODE = '''
class Scale:
    """Doc."""

    async def apply(self, x, *, by=1):
        """Doc."""
        return f"{x * by!r:>{by}}" + "# kept", (x,)  # why
'''


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ('"""Doc."""', '"""Other words,\n    longer."""'),
        ('"""Doc."""', '""""""'),
        ("  # why", ""),
        ("class", "# head\n\nclass"),
        ("(self, x, *, by=1)", "(\n        self,\n        x,\n        *,\n        by=1,\n    )"),
        ("(x,)  #", "(\n            x,\n        )  #"),
        ('"# kept"', "('# kept')"),
        ("    ", "  "),
    ],
)
def test_layout_and_words_do_not_count(was, becomes):
    assert CODE.replace(was, becomes) != CODE
    assert _code_alone(CODE.replace(was, becomes)) == _code_alone(CODE)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("x * by", "x - by"),
        ("by=1", "by=1.0"),
        ("by=1", "by=True"),
        ("(x,)", "(x)"),
        ("# kept", "# other"),
        (">{by}", "<{by}"),
        ("async ", ""),
        ("        return", "    return"),
        ("return", "return\n        return"),
        ("*, ", ""),
    ],
)
def test_code_counts(was, becomes):
    assert CODE.replace(was, becomes) != CODE
    assert _code_alone(CODE.replace(was, becomes)) != _code_alone(CODE)


def test_every_version_of_python_writes_code_down_alike():
    assert _code_alone('"""Doc."""\nf(a, *b)[0] = f"{x:{w}}é", None') == (
        "Module(body=[Assign(targets=[Subscript(value=Call(func=Name(id='f', ctx=Load()), args=[Name(id='a', ctx=Load()), "
        "Starred(value=Name(id='b', ctx=Load()), ctx=Load())]), slice=Constant(value=0), ctx=Store())], "
        "value=Tuple(elts=[JoinedStr(values=[FormattedValue(value=Name(id='x', ctx=Load()), conversion=-1, "
        "format_spec=JoinedStr(values=[FormattedValue(value=Name(id='w', ctx=Load()), conversion=-1)])), "
        "Constant(value='\\xe9')]), Constant()], ctx=Load()))])"
    )


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


CPP = "int f(int x) {  // why\n  return x + 1;\n}\n"


def test_comments_and_blanks_of_cpp_do_not_count_and_all_else_does():
    for was, becomes in (("  // why", ""), ("why", "other words"), ("  return", "\n  // head\n    return")):
        assert _cpp_alone(CPP.replace(was, becomes)) == _cpp_alone(CPP)
    assert _cpp_alone(CPP.replace("x + 1", "x + 2")) != _cpp_alone(CPP)


def test_a_record_of_a_processor_depends_on_all_that_its_library_is_made_from():
    files = {str(path.relative_to(PACKAGE)) for path in (PACKAGE / "kernels" / "cpu").iterdir() if path.is_file()}
    assert {"kernels/cpu/forward.h", "kernels/cpu/library.cpp"} <= files <= set(cpu_sources())
    assert "launch/cpu/operators.py" in cpu_sources() and "inference/decode.py" in cpu_sources(decoding=True)
    assert len(sources_hash(cpu_sources())) == 64

"""Chapter 07's kernel is right at each stage, and the last stage saves the instructions that the chapter says."""

import pytest

pytest.importorskip("triton")


def test_base_2_multiplies_less(monkeypatch):
    from flashlib.course.chapters.growing_kernels import instructions

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as in the notebook: the compiler runs all the same
    counted = instructions("sm_90")
    natural, base_2 = counted["over_heads"], counted["in_base_2"]

    assert natural["MUFU.EX2"] == base_2["MUFU.EX2"] == 34, "32 scores and 2 rows for each thread"
    arithmetic = [sum(counted[kind] for kind in ("FMUL", "FADD", "FFMA")) for counted in (natural, base_2)]
    assert arithmetic[1] < 0.8 * arithmetic[0]
    # tl.exp mends what ex2 makes of denormal results: a comparison and two multiplications around each.
    assert natural["FSETP"] - base_2["FSETP"] >= 34 and natural["FMUL"] - base_2["FMUL"] >= 2 * 34
    assert base_2["FFMA"] - natural["FFMA"] >= 32


def test_a_compiler_that_fails_is_told():
    from flashlib.course.chapters.growing_kernels import instructions

    with pytest.raises(RuntimeError, match="compiling for sm_1 failed"):
        instructions("sm_1")


def test_programs_of_the_figure():
    from flashlib.course import figures, widgets

    told = figures.attention_programs(4, 2, 3, 5, (1, 3), 5).alt
    assert "KV head 1" in told and "5 of the 5 tiles" in told and "has written" in told
    assert "not yet written" in figures.attention_programs(4, 2, 3, 5, (0, 0), 0).alt
    for wrong in ((3, 0), (0, 4)):
        with pytest.raises(ValueError, match="program must be"):
            figures.attention_programs(4, 2, 3, 5, wrong, 0)
    with pytest.raises(ValueError, match="tiles_seen"):
        figures.attention_programs(4, 2, 3, 5, (0, 0), 6)
    with pytest.raises(ValueError, match="divide"):
        figures.attention_programs(4, 3, 3, 5, (0, 0), 0)
    assert "program_id" not in widgets.attention_program_explorer().alt


def test_recorded_races_say_so_where_there_are_none(tmp_path, monkeypatch):
    from flashlib.course import recorded

    monkeypatch.setattr(recorded, "BENCHMARKS", tmp_path)
    (shown,) = recorded.recorded_races("training-forward")
    assert "flashlib bench training-forward" in str(shown)

"""What a grid means, and what its cases count."""

import pytest

from flashlib.measure.racing.cases import PRESETS, Case, parse_grid, short_labels


def test_a_grid_is_every_combination_of_its_values():
    cases = parse_grid("length=1024,4096 head_dim=64,128 mask=full,causal direction=forward,backward dtype=fp16")
    assert len(cases) == len(set(cases)) == 16
    assert {(case.batch, case.length) for case in cases} == {(16, 1024), (4, 4096)}  # 16k tokens
    assert {(case.q_heads, case.head_dim) for case in cases} == {(32, 64), (16, 128)}  # 2048 channels
    assert parse_grid("length=512 group=4 tokens=0") == [Case(1, 16, 4, 512, 128)]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_presets_exist_on_both_devices_and_are_small_on_a_cpu(name, device):
    cases = parse_grid(PRESETS[name], device=device, preset=True)
    assert cases
    tokens = {case.batch * case.length for case in cases}
    assert name == "memory" or tokens == {16384 if device == "cuda" else 1024}
    width = {case.q_heads * case.head_dim for case in cases}
    assert width == {2048 if device == "cuda" else 1024 if name == "grouped" else 256}
    assert {case.dtype for case in cases} == {"bf16" if device == "cuda" else "fp32"}


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("head_dim=64", "a grid needs a length"),
        ("length=64 depth=3", "names are length, head_dim, mask.*; got 'depth=3'"),
        ("length=64 mask=triangular", "mask must be one of full, causal.*; got 'triangular'"),
        ("length=64 direction=up", "direction must be one of forward, backward, both; got 'up'"),
        ("length=64 dtype=int8", "dtype must be one of bf16, fp16, fp32; got 'int8'"),
        ("length=many", "length must be a whole number; got 'many'"),
        ("length=1000 tokens=1024", "tokens must be a multiple of length; got 1024 and 1000"),
        ("length=64 width=100", "width must be a multiple of head_dim [*] group; got 100, 128 and 1"),
    ],
)
def test_what_is_not_a_grid_is_named(grid, message):
    with pytest.raises(ValueError, match=message):
        parse_grid(grid)


def test_work_is_counted_as_the_papers_count_it():
    base = {"batch": 2, "q_heads": 4, "kv_heads": 2, "length": 64, "head_dim": 16}
    full = 4 * 2 * 4 * 64 * 64 * 16
    assert Case(**base, mask="full").flops == full
    assert Case(**base, mask="causal").flops == full / 2
    assert Case(**base, mask="packed").flops == full
    assert Case(**base, mask="full", direction="backward").flops == 2.5 * full
    assert Case(**base, mask="full", direction="both").flops == 3.5 * full
    visible = sum(min(row, 10) + 1 for row in range(64))
    assert Case(**base, mask="window-10").flops == 4 * 2 * 4 * visible * 16
    q, k = 2 * 4 * 64 * 16 * 2, 2 * 2 * 64 * 16 * 2
    assert Case(**base).bytes == 2 * q + 2 * k
    assert Case(**base, direction="backward").bytes == 4 * q + 4 * k


def test_packed_sequences_are_the_batch_laid_end_to_end():
    packed, ragged = (Case(4, 2, 1, 32, 16, mask=mask) for mask in ("packed-causal", "ragged-causal"))
    assert packed.sequences == (32, 32, 32, 32)
    assert sum(ragged.sequences) == 128 and len(set(ragged.sequences)) > 1 and min(ragged.sequences) > 0
    assert packed.shapes == ((1, 2, 128, 16), (1, 1, 128, 16), (1, 1, 128, 16))
    for case in (packed, ragged):
        visible = case.mask_rule().intervals(1, 128, 128).visible_pairs()
        assert visible == sum(n * (n + 1) // 2 for n in case.sequences)
        assert case.flops == 4 * 2 * 16 * sum(n * n / 2 for n in case.sequences)


def test_labels_tell_cases_apart_and_share_the_rest():
    cases = parse_grid("length=1024,4096 mask=full,causal")
    labels, shared = short_labels(cases)
    assert list(labels.values()) == ["full S1024", "causal S1024", "full S4096", "causal S4096"]
    assert shared == "forward D128 H16 bf16"
    one = Case(1, 2, 2, 64, 16)
    other = Case(2, 2, 2, 64, 16)
    assert list(short_labels([one, other])[0].values()) == ["B1", "B2"]
    assert Case.from_columns({**one.columns(), "peer": "triton"}) == one

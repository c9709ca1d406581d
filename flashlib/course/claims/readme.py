"""Every measured figure in README, made from its record."""

from __future__ import annotations

from collections.abc import Mapping

from flashlib.course.claims import REPOSITORY, Statement
from flashlib.measure.records.record import load_record

__all__ = ["MEASURED", "STATEMENTS", "measured_paragraphs"]

README = "README.md"
MEASURED = ("On one H200,", "On a processor with AVX2")  # how the paragraphs of measured figures begin
WORDS = {12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen", 17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty"}  # fmt: skip


def measured_paragraphs(text: str) -> list[str]:
    """The paragraphs of README in which every number is a measured one, or says of what."""
    return [part for part in text.split("\n\n") if part.startswith(MEASURED)]


def _ratios(name: str, other: str, *, ours: str = "triton", columns: tuple[str, ...], **wanted) -> dict[tuple, float]:
    """How many times as fast as another peer ours is, by cell."""
    cells: dict[tuple, dict[str, float]] = {}
    for row in load_record(name).select(**wanted):
        if row["ms"]:
            cells.setdefault(tuple(row[column] for column in columns), {})[row["peer"]] = row["ms"]
    return {cell: times[other] / times[ours] for cell, times in cells.items() if {ours, other} <= times.keys()}


def _training(direction: str, other: str, **wanted) -> dict[tuple, float]:
    return _ratios(f"h200/training_{direction}", other, columns=("head_dim", "mask", "length"), **wanted)


def _longest() -> Mapping[str, float]:
    figures = {}
    for direction, short in (("forward", "f"), ("backward", "b")):
        for other, peer in (("cudnn", "torch_sdpa_cudnn"), ("flex", "flex_attention")):
            for mask in ("full", "causal"):
                figures[f"{short}_{other}_{mask}"] = _training(direction, peer)[128, mask, 16384]
    return figures


def _ranges() -> Mapping[str, float | str]:
    forward, backward = (_training(direction, "torch_sdpa_cudnn") for direction in ("forward", "backward"))
    lengths = sorted({length for _, _, length in forward})
    slower = [length for _, _, length in (cell for cell, ratio in forward.items() if ratio < 1)]
    never = next((f"{length // 1024}k" for length in lengths if length > max(slower, default=0)), "no length")
    return {
        "from": f"{lengths[0] // 1024}k", "to": f"{lengths[-1] // 1024}k", "never": never,
        "dims": " and ".join(map(str, sorted({dim for dim, _, _ in forward}))),
        "f_least": min(forward.values()), "f_most": max(forward.values()), "b_least": min(backward.values()), "b_most": max(backward.values()),
    }  # fmt: skip


def _packed() -> Mapping[str, float]:
    rates: dict[tuple, dict[str, float]] = {}
    for row in load_record("h200/varlen").select(peer="triton"):
        rates.setdefault((row["length"], row["head_dim"], row["direction"]), {})[row["mask"]] = row["tflops"]
    pairs = (("packed", "full"), ("packed-causal", "causal"), ("ragged-causal", "causal"))
    ratios = [cell[packed] / cell[dense] for cell in rates.values() for packed, dense in pairs]
    return {"least": min(ratios), "most": max(ratios)}


def _random_problems() -> Mapping[str, int | str]:
    training, caches = (load_record(f"h200/{name}").rows[0] for name in ("triton_specs", "decode_cases"))
    failed = [row for row in (training, caches) if row["failed"] or row["run"] != row["asked"]]
    return {"all": "Not all" if failed else "All", "training": training["run"], "caches": caches["run"]}


def _decoding() -> Mapping[str, str | int]:
    ratios = _ratios("h200/decode", "torch_sdpa_cudnn", ours="flashlib", columns=("batch", "length"))
    prefix = {row["peer"]: row for row in load_record("h200/shared_prefix").rows}
    ours = prefix["flashlib_prefix"]
    share = round(prefix["flashlib"]["ms"] / ours["ms"])
    words = "as fast as" if min(ratios.values()) >= 0.99 else "more slowly than"
    return {
        "as_fast": words,
        "batch": ours["batch"],
        "prefix": f"{ours['length'] // 1024}k",
        "share": f"{WORDS[share]}th",
    }


def _on_a_cpu() -> Mapping[str, float | str]:
    columns = ("batch", "q_heads", "kv_heads", "length", "head_dim")
    found: dict[str, float] = {}
    for dtype in ("fp32", "bf16"):
        for name, ours in (("forward", "cpu"), ("backward", "cpu"), ("decode", "flashlib")):
            extra = "cache" if name == "decode" else "mask"
            ratios = _ratios(f"cpu/cpu_{name}", "torch_sdpa_flash", ours=ours, columns=(*columns, extra), dtype=dtype)
            windowed = [ratio for cell, ratio in ratios.items() if cell[-1] == "window-512"]
            if name == "decode":
                kept = [ratio for cell, ratio in ratios.items() if cell[3] == 4096]
            else:
                kept = [ratio for cell, ratio in ratios.items() if cell[-1] != "window-512"]
            found |= {f"{name}_{dtype}_least": min(kept), f"{name}_{dtype}_most": max(kept)}
            if windowed:
                found[f"window_{dtype}"] = windowed[0]
    record = load_record("cpu/cpu_forward")
    cores = "On one core of an" if record.extra["threads"] == 1 else f"On {record.extra['threads']} threads of an"
    return {**found, "cores": cores, "cpu": record.extra["cpu"]}


def _sizes() -> Mapping[str, str]:
    chapters = len(list((REPOSITORY / "notebooks").glob("*.ipynb")))
    exercises = len(list((REPOSITORY / "exercises").glob("ex*.py")))
    return {"chapters": WORDS[chapters], "exercises": WORDS[exercises]}


def _weights() -> Mapping[str, int]:
    from flashlib.course.weights import GGUF_BYTES

    return {"mb": round(GGUF_BYTES / 1e6)}


GPU = "records in benchmarks/h200"
STATEMENTS = (
    Statement(
        README,
        "On one H200, in bf16 with head_dim 128 and 16k tokens, our forward ran at {f_cudnn_full:.2f} of cuDNN's speed without a mask and at {f_cudnn_causal:.2f} with a causal one, "
        "{f_flex_full:.1f} and {f_flex_causal:.1f} times as fast as FlexAttention; the backward at {b_cudnn_full:.2f} and {b_cudnn_causal:.2f} of cuDNN's, {b_flex_full:.2f} and "
        "{b_flex_causal:.2f} of FlexAttention's.",
        _longest, "h200/training_forward and h200/training_backward",
    ),
    Statement(
        README,
        "Over {from} to {to} tokens and head_dims {dims} the forward was between {f_least:.2f} and {f_most:.2f} times as fast as cuDNN (from {never} on never slower), the backward "
        "between {b_least:.2f} and {b_most:.2f}.",
        _ranges, "h200/training_forward and h200/training_backward",
    ),
    Statement(README, "Packed sequences ran at {least:.2f} to {most:.2f} of the speed of dense ones, counted by operations.", _packed, "h200/varlen"),
    Statement(
        README, "{all} of {training:,} random training problems and of {caches:,} random decoding caches were within the error budget.",
        _random_problems, "h200/triton_specs and h200/decode_cases", "a problem that leaves the budget; make test-gpu draws new ones",
    ),
    Statement(
        README, "Decoding read its cache {as_fast} cuDNN, and {batch} requests behind a shared prefix of {prefix} tokens took a {share} of the time",
        _decoding, "h200/decode and h200/shared_prefix",
    ),
    Statement(
        README,
        "{cores} {cpu} with AVX-512, against PyTorch's SDPA: the forward between {forward_fp32_least:.1f} and {forward_fp32_most:.1f} times as fast in fp32 and between "
        "{forward_bf16_least:.1f} and {forward_bf16_most:.1f} times in bf16, with a window of 512 among 4,096 tokens {window_fp32:.0f} and {window_bf16:.0f} times; the backward between "
        "{backward_fp32_least:.1f} and {backward_fp32_most:.1f} times in fp32 and between {backward_bf16_least:.2f} and {backward_bf16_most:.1f} times in bf16; a decoding step over 4,096 keys "
        "between {decode_fp32_least:.1f} and {decode_fp32_most:.1f} times in fp32 and between {decode_bf16_least:.0f} and {decode_bf16_most:.0f} times in bf16",
        _on_a_cpu, "cpu/cpu_forward, cpu/cpu_backward and cpu/cpu_decode",
    ),
    Statement(README, "{chapters} chapters, {exercises} exercises with a grader", _sizes, "the folders notebooks and exercises", "another number of files"),
    Statement(README, "brings the model's weights ({mb} MB)", _weights, "the size of the file, flashlib/course/weights.py", "a file of another size"),
)  # fmt: skip

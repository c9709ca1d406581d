"""Figures in the prose of the chapters: each from a record, a constant, a count, or what a cell of the chapter printed.

What a cell prints is compared with a fresh run by `make nbcheck`; prose around it is not, and so it is held against the cell here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache

from flashlib.course.claims import REPOSITORY, Statement, plain
from flashlib.measure.records.record import load_record

__all__ = ["EXCUSED", "NOTEBOOKS", "STATEMENTS", "bare", "printed", "prose"]

NOTEBOOKS = sorted(path.name for path in (REPOSITORY / "notebooks").glob("*.ipynb"))


@cache
def _notebook(name: str, folder: str = "notebooks") -> dict:
    return json.loads((REPOSITORY / folder / name).read_text(encoding="utf-8"))


def prose(name: str) -> str:
    """The text of a notebook. The table at its top says what is needed, not what was found, and is left out."""
    cells = [cell for cell in _notebook(name)["cells"] if cell["cell_type"] == "markdown"]
    lines = "\n\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join(line for line in lines if not line.startswith("|"))


def printed(name: str, pattern: str) -> tuple[str, ...]:
    """What the groups of a pattern match in the stored outputs of a notebook.

    Raises:
        ValueError: nothing there matches.
    """
    for cell in _notebook(name, "notebooks/answers")["cells"]:
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output.get("data", {}).get("text/plain", []))
            if found := re.search(pattern, text):
                return found.groups()
    raise ValueError(f"no output of {name} matches {pattern!r}")


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _moved() -> Mapping[str, float]:
    read, written = printed("01_naive_attention.ipynb", r"total +([\d,]+) +([\d,]+)")
    (wanted,) = printed("01_naive_attention.ipynb", r"Inputs and output hold ([\d.]+) MB")
    return {"gb": int((_number(read) + _number(written)) / 1e9), "mb": wanted}


def _tile_machines() -> Mapping[str, float]:
    from flashlib.course.chapters.io_model import tile_machine

    return {"whole": 1152 * 64 * 4 // 1024, "machine": tile_machine(64, 64, 64) // 1024}


def _traffic() -> Mapping[str, float | str]:
    record, off = load_record("h200/attention_traffic"), {}
    for row in record.select(method="flash"):
        operand = row["tokens"] * row["heads"] * row["head_dim"] * row["itemsize"]
        formula = operand * (1 + 2 * -(-row["tokens"] // 128))
        off[row["tokens"]] = 1 - row["l2_read"] / formula
    shares = {5: "a fifth", 6: "a sixth", 7: "a seventh"}
    return {
        "short": shares[round(1 / off[4096])], "long": off[16384], "cache": record.extra["l2_bytes"] / 2**20,
        "head": 2 * 16384 * 64 * 2 / 2**20, "scores": 16384**2 * 2 / 2**20,
    }  # fmt: skip


# Table in figure 2 of Dao et al. 2022 (arXiv 2205.14135): GPT-2 medium, sequence 1,024, head_dim 64, 16 heads, batch 64, on an A100.
QUOTED = {"gflop": 75.2, "gflop_standard": 66.6, "gb": 4.4, "gb_standard": 40.3, "ms": 7.3, "ms_standard": 41.7}


def _stages() -> Mapping[str, int]:
    (kib,) = printed("08_masks_in_a_kernel.ipynb", r"128 x 128, 3 stages, 8 warps +(\d+) KiB")
    used, most = printed("08_masks_in_a_kernel.ipynb", r"shared memory +([\d,]+) of ([\d,]+) bytes")
    stage = 2 * 128 * 128 * 2 // 1024  # K and V
    return {"used": round(_number(used) / 1024), "most": int(_number(most) / 1024), "more": int(kib) + stage}


def _by_peer(name: str) -> list[dict[str, float]]:
    """Milliseconds by peer, for each cell of a record of decoding."""
    cells: dict[tuple, dict[str, float]] = {}
    for row in load_record(name).rows:
        if row["ms"]:
            cells.setdefault((row["batch"], row["length"]), {})[row["peer"]] = row["ms"]
    return list(cells.values())


def _pages() -> Mapping[str, float]:
    found: dict[str, float] = {}
    for size in (16, 256):
        costs = [cell[f"flashlib_page_{size}"] / cell["flashlib"] - 1 for cell in _by_peer("h200/paged_decode")]
        found |= {f"least_{size}": min(costs), f"most_{size}": max(costs)}
    return found


def _ragged() -> Mapping[str, float]:
    (cell,) = _by_peer("h200/ragged_decode")
    return {"ours": cell["flashlib"], "pages": cell["flashlib_page_16"], "padded": cell["torch_sdpa_cudnn"]}


def _chunked() -> Mapping[str, float]:
    rows = {row["peer"]: row for row in load_record("h200/chunked_injection").rows}
    chunked = [row for name, row in rows.items() if name.startswith("inject_chunked")]
    more = [row["peak_bytes"] / 2**20 for row in chunked]
    times = [row["ms"] for row in chunked]
    return {
        "least": min(times), "most": max(times), "whole": rows["inject"]["ms"], "less": min(more), "much": max(more),
        "all": rows["inject"]["peak_bytes"] / 2**20,
    }  # fmt: skip


def _prefix() -> Mapping[str, float]:
    (cell,) = _by_peer("h200/shared_prefix")
    return {"shared": cell["flashlib_prefix"], "apart": cell["flashlib"]}


def _naive_times() -> Mapping[str, float]:
    *steps, _ = load_record("h200/attention_steps").select(tokens=16384)
    (whole,) = load_record("h200/memory_wall").select(backend="reference", tokens=16384)
    return {"steps": sum(row["ms"] for row in steps), "whole": whole["ms"]}


def _tokens(text: str) -> int:
    from flashlib.course.models import load_tokenizer

    return len(load_tokenizer()(text).input_ids)


def _alice() -> Mapping[str, int]:
    from flashlib.course.models import sample_text

    return {"tokens": _tokens(sample_text())}


def _paragraph() -> Mapping[str, int]:
    from flashlib.course.models import sample_text

    count = _tokens([line for line in sample_text().splitlines() if line][8])
    return {"tokens": count, "more": count - 32}


def _multiprocessors() -> Mapping[str, float]:
    from flashlib.cost import device

    return {"count": device("h200").units}


def _ranges_of_dtypes() -> Mapping[str, float]:
    import math

    import torch

    return {"most": torch.finfo(torch.float16).max, "limit": math.log(torch.finfo(torch.bfloat16).max)}


def _passes() -> Mapping[str, int]:
    rows, keys = printed("03_tiling.ipynb", r"all +([\d.]+) +([\d.]+)")
    return {"rows": round(float(rows)), "keys": round(float(keys))}


def _checks_of_ex01() -> Mapping[str, int]:
    (report,) = printed("01_naive_attention.ipynb", r"(?s)(ex01 · .*)")
    return {"lines": report.count("to do ")}


def _exponentials() -> Mapping[str, str]:
    return {"count": printed("07_flash_attention_in_triton.ipynb", r"exponential +(\d+) +\d+")[0]}


def _h200() -> Mapping[str, float]:
    from flashlib.cost import device

    h200 = device("h200")
    rate = h200.peak("bf16")
    return {
        "tflops": round(rate / 1e13) * 10,
        "trillion": h200.exponentials_per_s / 1e12,
        "flop": 2 * 2 * 128,
        "asked": rate / 512 / 1e12,
    }


STATEMENTS = (
    Statement("notebooks/01_naive_attention.ipynb", "The report shows more than {gb} GB moved, for {mb} MB that anybody wanted.", _moved, "cells of the chapter"),
    Statement("notebooks/01_naive_attention.ipynb", "a cache of {mib} MiB, in which tiles stay", lambda: {"mib": printed("01_naive_attention.ipynb", r"moved, with (\d+) MiB of cache")[0]}, "a cell of the chapter"),
    Statement("notebooks/01_naive_attention.ipynb", "The steps sum to {steps:.1f} ms, and the table before had {whole:.1f} ms for the same length.", _naive_times, "h200/attention_steps and h200/memory_wall"),
    Statement("notebooks/13_paged_caches.ipynb", "Pages of 16 tokens cost {least_16:.0%} to {most_16:.0%} of the time, pages of 256 tokens {least_256:.0%} to {most_256:.0%}.", _pages, "h200/paged_decode"),
    Statement("notebooks/13_paged_caches.ipynb", "Each request's own tokens were read in {ours:.3f} ms, in {pages:.3f} ms from pages of 16. cuDNN, which is given the padded batch, took {padded:.2f} ms.", _ragged, "h200/ragged_decode"),
    Statement("notebooks/14_injection_and_prefixes.ipynb", "In chunks it took {least:.0f} to {most:.0f} ms, at once {whole:.0f}. What a call needs beside the memory was {less:.0f} to {much:.0f} MiB in chunks, and {all:.0f} MiB at once.", _chunked, "h200/chunked_injection"),
    Statement("notebooks/14_injection_and_prefixes.ipynb", "One decode step of all 64 requests took {shared:.3f} ms with the prefix shared, and {apart:.2f} ms from a cache for each.", _prefix, "h200/shared_prefix"),
    Statement("notebooks/00_start_here.ipynb", "A report has a line for each property that was tried: {lines} for this exercise.", _checks_of_ex01, "a cell of chapter 01"),
    Statement("notebooks/01_naive_attention.ipynb", "five chapters of a children's book, {tokens:,} tokens.", _alice, "counted by the model's tokenizer"),
    Statement("notebooks/01_naive_attention.ipynb", "a product that does {times:.0f} times its arithmetic", lambda: {"times": 2 * 64 / 5}, "counted: 2 d operations a score against 5"),
    Statement("notebooks/01_naive_attention.ipynb", "two levels are divided among {count} cores", _multiprocessors, "flashlib/cost/devices.json"),
    Statement("notebooks/02_online_softmax.ipynb", "the largest number is {most:,.0f}. (bfloat16 has the exponents of fp32: there $e^{{s_j}}$ overflows from {limit:.1f} on, as in fp32.)", _ranges_of_dtypes, "torch.finfo"),
    Statement("notebooks/03_tiling.ipynb", "$2 + 2 \\cdot 16 = 34$ passes, and we count {rows}.", _passes, "a cell of the chapter"),
    Statement("notebooks/03_tiling.ipynb", "$2 + 3 \\cdot 16 = 50$, and we count {keys}.", _passes, "a cell of the chapter"),
    Statement("notebooks/03_tiling.ipynb", "not of all {count}: each works on rows of its own", _multiprocessors, "flashlib/cost/devices.json"),
    Statement("notebooks/06_first_kernels.ipynb", "On an H200 up to {count} groups of cores (SMs)", _multiprocessors, "flashlib/cost/devices.json"),
    Statement("notebooks/07_flash_attention_in_triton.ipynb", "we count what came out in the machine code, {count} exponentials each", _exponentials, "a cell of the chapter"),
    Statement("notebooks/12_split_kv_decoding.ipynb", "its {tiles} tiles, one after the other, while {idle} multiprocessors watch.", lambda: {"tiles": 8192 // 64, "idle": _multiprocessors()["count"] - 8}, "counted"),
    Statement("notebooks/13_paged_caches.ipynb", "{requests} requests, the longest of {longest:,} tokens", lambda: {"requests": load_record("h200/ragged_decode").rows[0]["batch"], "longest": load_record("h200/ragged_decode").rows[0]["length"]}, "h200/ragged_decode"),
    Statement("notebooks/13_paged_caches.ipynb", "Its {tokens} tokens fill two pages, and {more} slots of a third", _paragraph, "counted by the model's tokenizer"),
    Statement("notebooks/14_injection_and_prefixes.ipynb", "a memory of {keys:,} keys that lies in the host's RAM", lambda: {"keys": load_record("h200/chunked_injection").rows[0]["length"]}, "h200/chunked_injection"),
    Statement("notebooks/03_tiling.ipynb", "At the right end $M$ is nearly $Nd$ ({whole} KiB), where theorem 2 ends.", _tile_machines, "counted"),
    Statement("notebooks/03_tiling.ipynb", "Our machine has its {machine} KiB, which tiles of 64 x 64 fill.", _tile_machines, "counted"),
    Statement("notebooks/03_tiling.ipynb", "the formula holds: to {short} at 4,096 tokens, to {long:.0%} at 16,384.", _traffic, "h200/attention_traffic"),
    Statement("notebooks/03_tiling.ipynb", "it has {cache:.0f} MiB, while K and V of one head at 16,384 tokens have {head:.0f} MiB.", _traffic, "h200/attention_traffic"),
    Statement("notebooks/03_tiling.ipynb", "S alone is {scores:.0f} MiB per head.", _traffic, "counted"),
    Statement("notebooks/03_tiling.ipynb", "{gflop} GFLOP instead of {gflop_standard}, {gb} GB of traffic instead of {gb_standard}, and {ms} ms instead of {ms_standard} (figure 2)", lambda: QUOTED, "quoted, arXiv 2205.14135", "another figure in the paper"),
    Statement("notebooks/07_flash_attention_in_triton.ipynb", "do some {tflops} TFLOP/s in 16 bits (data sheet), its units for exponentials about {trillion:.0f} trillion a second", _h200, "flashlib/cost/devices.json"),
    Statement("notebooks/07_flash_attention_in_triton.ipynb", "With 128 channels a score costs {flop} FLOP in the tensor cores, so they ask for about {asked:.0f} trillion exponentials a second.", _h200, "flashlib/cost/devices.json"),
    Statement("notebooks/08_masks_in_a_kernel.ipynb", "{used} of {most} KiB. Three stages just fit.", _stages, "cells of the chapter"),
    Statement("notebooks/08_masks_in_a_kernel.ipynb", "A fourth stage in the first line would take it to {more} KiB.", _stages, "cells of the chapter"),
)  # fmt: skip

# Numbers that nobody measured or counted here, by chapter, with the words around them, and why they may stand.
EXCUSED: dict[str, dict[str, str]] = {
    "00": {
        "30 layers, 135 million parameters": "the shape of SmolLM2 (arXiv 2502.02737), compared in tests/models",
        "one of the 30 layers": "the shape of SmolLM2",
    },
    "01": {"at 1.98 GHz": "the highest clock of the board, from its data sheet; a constant of figures/hierarchy.py"},
    "03": {
        "up to 164 KB on an A100, and up to 228 KB on an H100 or H200": "CUDA C++ Programming Guide, technical specifications",
        "100 KB are 25,000 numbers in float32 and 50,000 in half precision": "arithmetic in the sentence itself",
        "which makes 17 to 20": "arithmetic in the sentence itself: twice 8 to 10",
    },
    "04": {"that is about 131,000 tokens": "arithmetic in the sentence itself, cited from Mistral 7B (section 2)"},
    "05": {"one head of 576": "arithmetic in the sentence itself: 9 heads of 64"},
    "06": {"Every version of Triton up to 3.9": "looked up in Triton's sources; tests/kernels notices when it changes"},
    "07": {
        "mantissa instead of 23": "the definition of float32",
        "a head dimension of 80 needs a block of 128": "an example",
        "next to 128 to 256 bytes": "arithmetic: 64 to 128 channels of 16 bits",
        "float16 ends at 65,504": "the definition of float16",
    },
    "08": {"have 65,536, and one thread at most 255": "CUDA C++ Programming Guide, technical specifications"},
    "09": {"in all 30 layers": "the shape of SmolLM2"},
    "12": {"the largest of 49,152 scores": "the size of SmolLM2's vocabulary"},
    "14": {"1 more is a factor of 2.7": "the number e"},
    "18": {"A decoding step over 4,096 keys": "quoted from README, where it is held against the record"},
}

# What holds numbers that are no figures: formulas, code, addresses, references to chapters and sections, names of models and dtypes, years.
_REFERENCE = re.compile(
    r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|https?://\S+"
    r"|\b(?:[Cc]hapters?|[Ss]ections?|[Ee]quations?|[Aa]lgorithms?|[Tt]heorem|[Pp]roposition|[Ff]igures?|[Aa]ppendix|[Tt]ables?|[Ee]xercise"
    r"|[Vv]ersions?|Bug|[Ss]tages?|[Ll]ayers?|[Hh]eads?|[Ss]teps?|[Rr]ows?|[Cc]laims?|document|[Rr]equests?|number|Program)"
    r" \d[\d.]*(?:(?:, | and | to |,? or )\d[\d.]*)*"
    r"|\((?:[^()]*\D)?(?:19|20)\d\d\)|\bin (?:19|20)\d\d\b|\b(?:Llama|Gemma|Mistral|GPT)[ -]\d[\w.]*(?: \d+B)?|\b\d+B\b"
    r"|\b\d+(?:\.\d+)? bits?\b|\b\d+-bit\b|\b\d+ (?:minutes|hours)\b"
)
_SMALL = 10  # what one counts on one's fingers: rows of an example, terms of a formula


def _settings(name: str) -> set[str]:
    """The numbers in a chapter's code and in its questions: what it was told to do, as against what came out."""
    from flashlib.course.questions import questions_of

    code = ["".join(cell["source"]) for cell in _notebook(name)["cells"] if cell["cell_type"] == "code"]
    asked = [f"{one.text} {one.choices or ''}" for one in questions_of(name[:2]).values()]
    return {
        found.rstrip(",").replace("_", "").replace(",", "")
        for found in re.findall(r"\d[\d_,]*(?:\.\d+)?", " ".join(code + asked))
    }


def bare(name: str, text: str | None = None) -> list[str]:
    """Numbers in a chapter's prose that come from no statement, are no setting of its own, and are not excused; with the words around them.

    Args:
        name: of the notebook. text: its prose, if another than :func:`prose` says.
    """
    text = prose(name) if text is None else text
    text = plain(re.sub(r"^#.*$", "", text.split("## Sources")[0], flags=re.MULTILINE))
    for told in (
        *(one.rendered() for one in STATEMENTS if one.where == f"notebooks/{name}"),
        *EXCUSED.get(name[:2], {}),
    ):
        text = text.replace(told, " ")
    text, settings = _REFERENCE.sub(" ", text), _settings(name)
    left = [
        found
        for found in re.finditer(r"(?<![\w.,§-])\d[\d,]*(?:\.\d+)?k?(?![\w-])", text)
        if (number := found[0].rstrip(",").replace(",", "")) not in settings
        and not (number.isdigit() and int(number) <= _SMALL)
    ]
    return [text[max(0, found.start() - 45) : found.end() + 25] for found in left]

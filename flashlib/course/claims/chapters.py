"""Figures in the prose of the chapters: each from a record, a constant, a count, or what a cell of the chapter printed.

What a cell prints is compared with a fresh run by `make nbcheck`; prose around it is not, and so it is held against the cell here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache

from flashlib.course.claims import REPOSITORY, Statement
from flashlib.measure.records.record import load_record

__all__ = ["NOTEBOOKS", "STATEMENTS", "printed", "prose"]

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

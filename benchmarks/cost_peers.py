"""What two public estimators say of the recorded cells of our kernels, where they can answer. Needs neither a GPU nor flashlib.

python -m venv /tmp/peers && /tmp/peers/bin/pip install genz-llm==0.0.16 aiconfigurator==0.12.0 && /tmp/peers/bin/python benchmarks/cost_peers.py --out benchmarks/h200

* GenZ (genz-llm): a roofline for each operator. It gets the H200's data sheet, and is asked for the two products of attention as its models
  ask for them. It knows no mask, no backward, no unequal lengths.
* AIConfigurator: interpolates in tables that NVIDIA measured on an H200 with TensorRT-LLM's kernels. It knows causal prefill and decoding.

`python -m flashlib.cost.verdict` puts their estimates beside ours.
"""

import argparse
import datetime
import importlib.metadata
import json
import logging
import platform
import subprocess
import warnings
from pathlib import Path

BENCHMARKS = Path(__file__).parent / "h200"
RECORDS = {
    "triton": ("training_forward", "training_backward", "window", "varlen"),
    "flashlib": ("decode", "paged_decode", "ragged_decode", "shared_prefix"),
}
H200 = {"Flops": 989, "Memory_size": 141, "Memory_BW": 4800, "ICN": 450, "real_values": True}
CASE = (
    "batch",
    "q_heads",
    "kv_heads",
    "length",
    "head_dim",
    "mask",
    "direction",
    "queries",
    "own",
    "cache",
    "dtype",
    "peer",
    "kind",
    "q_len",
    "kv_len",
)
TABLES = ("h200_sxm", "trtllm", "1.3.0rc20")
NOTES = (
    "Milliseconds that public estimators give for the recorded cells of our kernels; null where they cannot answer, and why. genz: genz-llm with "
    "the H200's data sheet, Logit and Attend as its prefill and decoding models ask for them, efficiency 1. aiconfigurator: its tables for "
    "h200_sxm with TensorRT-LLM 1.3.0rc20, bf16. For sequences packed without a mask between them other than their own, a batch is asked for."
)


def genz(row: dict) -> tuple[float | None, str]:
    """Milliseconds, or None and why."""
    from GenZ.analyse_model import analysis_model
    from GenZ.LLM_inference.utils import get_inference_system
    from GenZ.Models import OpType, ResidencyInfo

    decodes = "cache" in row
    if row.get("direction") == "backward":
        return None, "no backward"
    if row.get("mask", "").startswith(("window", "ragged")) or row.get("cache") in ("ragged", "prefix"):
        return None, "no windows, unequal lengths or shared prefixes"
    queries, keys = row.get("queries", row["length"]), row["length"]
    sizes = [row["batch"], row["q_heads"], queries, keys, row["head_dim"], row["kv_heads"]]
    kept = (
        (ResidencyInfo.AC_onchip, ResidencyInfo.AC_onchip)
        if decodes
        else (ResidencyInfo.C_onchip, ResidencyInfo.A_onchip)
    )
    operators = [["Logit", *sizes, kept[0], OpType.Logit], ["Attend", *sizes, kept[1], OpType.Attend]]
    system = get_inference_system(system_name=H200, bits="bf16")
    return float(analysis_model(operators, system=system, intermediate_on_chip=True)["Latency (msec)"].sum()), ""


def aiconfigurator(row: dict, database) -> tuple[float | None, str]:
    """The same."""
    from aiconfigurator_core.sdk.common import FMHAQuantMode, KVCacheQuantMode
    from aiconfigurator_core.sdk.operations.attention import ContextAttention, GenerationAttention

    heads, cache = (row["q_heads"], row["kv_heads"]), KVCacheQuantMode.bfloat16
    if "cache" in row:
        if row["cache"] != "full" or row["queries"] != 1:
            return None, "no unequal lengths, shared prefixes or several new tokens"
        operator = GenerationAttention("decode", 1, *heads, cache, head_size=row["head_dim"])
        asked = {"batch_size": row["batch"], "s": row["length"]}
    else:
        if row["direction"] == "backward":
            return None, "no backward"
        if row["mask"] not in ("causal", "packed-causal") or "queries" in row:
            return None, "causal prefill of whole prompts only"
        operator = ContextAttention("prefill", 1, *heads, cache, FMHAQuantMode.bfloat16, head_size=row["head_dim"])
        asked = {"batch_size": row["batch"], "s": row["length"]}
    try:
        return float(operator._engine_query(database, **asked)), ""
    except Exception as error:  # what its tables do not hold it says in many ways
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def as_raced(row: dict) -> dict:
    """A row of cost_points.json in the columns of the races. A chunk of a prompt has fewer queries than keys."""
    told = {**row, "length": row["kv_len"], "mask": "causal", "direction": row["kind"]}
    if row["kind"] == "decode":
        return {**told, "queries": row["q_len"], "cache": "full"}
    return told if row["q_len"] == row["kv_len"] else {**told, "queries": row["q_len"]}


def answers(row: dict, database) -> dict:
    said = {"genz": genz(row), "aiconfigurator": aiconfigurator(row, database)}
    reasons = {f"{name}_why_not": why for name, (_, why) in said.items() if why}
    return {**{f"{name}_ms": ms for name, (ms, _) in said.items()}, **reasons}


def rows() -> list[dict]:
    from aiconfigurator_core.sdk.perf_database import get_database

    database, found = get_database(*TABLES), []
    for peer, topics in RECORDS.items():
        for topic in topics:
            for row in json.loads((BENCHMARKS / f"{topic}.json").read_text(encoding="utf-8"))["rows"]:
                ours = row["peer"] == peer or (peer == "flashlib" and row["peer"].startswith("flashlib_"))
                if ours and row["ms"] and (topic, row["peer"]) != ("shared_prefix", "flashlib"):
                    found.append({**{name: row[name] for name in CASE if name in row}, **answers(row, database)})
    for row in json.loads((BENCHMARKS / "cost_points.json").read_text(encoding="utf-8"))["rows"]:
        found.append({**{name: row[name] for name in CASE if name in row}, **answers(as_raced(row), database)})
    return found


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    unused = {"python": platform.python_version(), "torch": "not used", "triton": "not used"}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True).stdout.strip()
    versions = {
        name: importlib.metadata.version(name) for name in ("genz-llm", "aiconfigurator", "aiconfigurator-core")
    }
    record = {
        "topic": "cost_peers", "rows": rows(), "device": "none: estimates for an NVIDIA H200", "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "versions": {**unused, **versions},
        "sources": [], "sources_hash": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "notes": NOTES, "extra": {},
    }  # fmt: skip
    path = options.out / "cost_peers.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(record['rows'])} cells")


if __name__ == "__main__":
    main()

"""Our own kernels on a GPU under compute-sanitizer: bytes outside of any tensor (memcheck), races in shared memory (racecheck),
barriers misused (synccheck).

python tests/gpu/sanitize.py --out results --compilers 14

Small problems with ragged edges, under every kind of mask, each tensor in an allocation of its own. No reference runs in the watched
processes, since the tools also report on PyTorch's kernels; a report that does not name a kernel of ours is kept apart. That the
tools see Triton's kernels at all is shown by some with planted mistakes. The record says what was run, and what was found.

Racecheck is judged as it judges: right kernels, the controls, run beside ours. What it says of a warp-specialised kernel of ours about
a way of ordering two accesses that it also holds against a control is no evidence, and is recorded as "not judged"; any other report
fails. See planted.py for what is known of the tool, and race_reports.py for how its reports are sorted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from race_reports import CONTROL_OF, accesses, kind_of
from torch import Tensor

from flashlib import AttentionSpec, masks
from flashlib.launch.options import KernelOptions
from flashlib.launch.plain import backward_launches, forward_launch
from flashlib.launch.run import launch_backward, launch_forward
from flashlib.launch.start import Launch, interpreting
from flashlib.measure.records.record import new_record, save_record
from flashlib.measure.records.sources import decode_sources, kernel_sources

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck")
OURS = ("attention_forward", "hopper_", "backward_", "decode_", "combine")
PLANTED = {
    "memcheck": ["planted_read_behind_the_end"],
    "racecheck": ["planted_race", "planted_race_of_partitions"],
    "synccheck": [],
}
CONTROLS = {"memcheck": [], "racecheck": list(CONTROL_OF.values()), "synccheck": []}
# What a report on one of these must be about, lest one about something else in it passes for it.
KIND_OF = {**{control: kind for kind, control in CONTROL_OF.items()}, "planted_race_of_partitions": "handover"}
NOT_PRINTED = ("reports", "reports_on_planted_and_controls", "elsewhere", "kernels", "shown")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Q_LEN, KV_LEN, MANY_KEYS = (150, 461, 3400) if DEVICE == "cuda" else (20, 45, 60)  # no multiples of any tile
Case = Callable[[], None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--compilers", type=int, default=1, help="processes that compile beforehand")
    parser.add_argument("--at-once", type=int, default=len(TOOLS), help="how many tools to run side by side")
    parser.add_argument("--limit", type=float, default=180, help="seconds after which a tool is stopped")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program")
    parser.add_argument("--watched", choices=["", *TOOLS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watched is not None:
        return run_watched(options.watched)
    compile_ahead(options.compilers)
    with ThreadPoolExecutor(options.at_once) as pool:
        rows = list(pool.map(lambda tool: sanitized(tool, options), options.tools))
    note = "Small problems with ragged edges, each tensor in an allocation of its own; reports that name a kernel of flashlib."
    version = subprocess.run([options.sanitizer, "--version"], check=False, capture_output=True, text=True).stdout
    extra = {"sanitizer": version.strip().splitlines()[-1:], "cases": [name for name, _ in cases()]}
    save_record(new_record("sanitizer", rows, {*kernel_sources(), *decode_sources()}, note, **extra), options.out)
    for row in rows:
        print({name: value for name, value in row.items() if name not in NOT_PRINTED}, flush=True)
        for line in [*row["shown"], *row["reports"][:5]]:
            print(line, flush=True)
    failed = [row["tool"] for row in rows if not row["passed"]]
    print(f"FAILED: {', '.join(failed)}" if failed else "all clean")
    return 1 if failed else 0


def sanitized(tool: str, options: argparse.Namespace) -> dict:
    """All cases under one tool, as a row of the record."""
    command = [options.sanitizer, "--tool", tool, *tool_options(tool, options.sanitizer)]
    watched = ["tests/gpu/sanitize.py", "--watched", tool]
    log, started = options.out / f"sanitizer_{tool}.log", time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        started_here = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen([*command, sys.executable, *watched], cwd=ROOT, env=environment, **started_here)
        try:
            code = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and the program that it watches
            process.wait()
            code = None
    return {
        "tool": tool,
        "command": " ".join([*command, "python", *watched]),
        "seconds": round(time.monotonic() - started, 1),
        "exit_code": code,
        **judged(tool, log.read_text(encoding="utf-8", errors="replace")),
    }


def judged(tool: str, said: str) -> dict:
    """What a tool said of all cases, as fields of the record."""
    reports = list(reports_in(said))
    beside = [report for report in reports if any(name in report for name in [*PLANTED[tool], *CONTROLS[tool]])]
    found = {name: is_reported(name, beside) for name in PLANTED[tool]}
    controls = {name: kinds_reported(name, beside) for name in CONTROLS[tool]}
    mistaken = {kind for kinds in controls.values() for kind in kinds}
    ours = [report for report in reports if any(name in report for name in OURS) and report not in beside]
    counted, unjudged = [], []
    for report in ours:
        kind = kind_of(report, warp_specialised()) if tool == "racecheck" else None
        (unjudged if kind in mistaken else counted).append(report)
    finished = all(f"{what} has run" in said for what in ["every case", *CONTROLS[tool]])
    overflow = "Detected overflow" in said  # of what the tool keeps of mbarriers
    return {
        "passed": finished and not counted and all(found.values()) and not overflow and "SUMMARY" in said,
        "errors": len(counted),
        "cases_run": len(re.findall(r"^case (.+)$", said, re.MULTILINE)),
        "finished": finished,
        "planted_mistakes_found": found,
        "controls": controls,
        "not_judged": summed(unjudged),
        "shown": shown(found, mistaken) if tool == "racecheck" and finished else [],
        "kernels": sorted(set(re.findall(r"^  launched (\w+)$", said, re.MULTILINE))),
        "reports": distinct(counted),
        "reports_on_planted_and_controls": distinct(beside),
        "elsewhere": sorted(
            {report.splitlines()[0] for report in reports if report not in ours and report not in beside}
        ),
    }


def distinct(reports: list[str]) -> list[str]:
    """The first of all reports that differ only in addresses and numbers of hazards, with how many there are."""
    alike = defaultdict(list)
    for report in reports:
        alike[re.sub(r"0x[0-9a-f]+|\d+ hazards|[Tt]hread \(.*?\)|[Bb]lock \(.*?\)", "", report)].append(report)
    return [f"{len(group)} x {group[0][:1000]}" for group in alike.values()]


def is_reported(name: str, reports: list[str]) -> bool:
    """Whether a planted mistake is reported, for what it is there for."""
    if name in KIND_OF:
        return KIND_OF[name] in kinds_reported(name, reports)
    return any(name in report for report in reports)


def kinds_reported(name: str, reports: list[str]) -> list[str]:
    """Of which kinds the reports on a kernel of planted.py are. One that hands over by mbarriers is split like any other, and what is
    said of its dispatch is said of a right one too."""
    kinds = {kind_of(report, warp_specialised()) for report in reports if name in report}
    return sorted(kinds - {None})


def summed(unjudged: list[str]) -> list[dict]:
    """Reports that are no evidence, counted by kernel and by how it orders the accesses."""
    total: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for report in unjudged:
        found = accesses(report)
        key = found[0].kernel, kind_of(report, warp_specialised())
        total[key] += Counter(reports=1, hazards=sum(access.hazards for access in found))
    return [{"kernel": kernel, "kind": kind, **n} for (kernel, kind), n in sorted(total.items())]


def shown(found: dict[str, bool], mistaken: set[str]) -> list[str]:
    """What the run of racecheck says about our kernels, and what it does not."""
    missed = [name for name, seen in found.items() if not seen]
    return [
        *(f"Nothing about races such as {name}, which was not found." for name in missed),
        *(f"Races such as {name} are found." for name in found if name not in missed),
        *(
            f"Nothing about accesses of the kind {kind!r}: right in a control, and reported all the same."
            for kind in sorted(mistaken)
        ),
        *(
            f"Accesses of the kind {kind!r} are understood: a report about such is taken as a fault."
            for kind in CONTROL_OF
            if kind not in mistaken
        ),
    ]


def warp_specialised() -> dict:
    """The warp-specialised kernels, ours and those beside them, by name."""
    import planted

    from flashlib.kernels.hopper.dkdv import hopper_dkdv
    from flashlib.kernels.hopper.dq import hopper_dq
    from flashlib.kernels.hopper.forward import hopper_forward

    others = (getattr(planted, f"{name}_kernel") for name in KIND_OF)
    return {kernel.__name__: kernel for kernel in (hopper_forward, hopper_dkdv, hopper_dq, *others)}


def tool_options(tool: str, sanitizer: str) -> list[str]:
    """Those that this version of compute-sanitizer knows."""
    wanted = {"--show-backtrace": "no", "--report-api-errors": "no"}
    wanted["--print-limit"] = "0"  # by itself it falls silent after 100 reports, and what is planted comes last
    if tool == "memcheck":
        wanted["--padding"] = "4096"  # bytes behind each tensor, so that what runs over its end hits no neighbor
    known = subprocess.run([sanitizer, "--help"], check=False, capture_output=True, text=True)
    return [word for name, value in wanted.items() if name in known.stdout + known.stderr for word in (name, value)]


def reports_in(said: str) -> Iterator[str]:
    """What compute-sanitizer reported: each begins with a line behind its ``=========`` mark, and goes on in indented ones."""
    report: list[str] = []
    for line in said.splitlines():
        if not line.startswith("========="):
            continue
        text = line.removeprefix("=========")
        if text.strip() and not text.startswith("  "):
            if report:
                yield "\n".join(report)
            report = [] if re.search(r"COMPUTE-SANITIZER|SUMMARY", text) else [text.strip()]
        elif report and text.strip():
            report.append(text.strip())
    if report:
        yield "\n".join(report)


def run_watched(tool: str) -> int:
    """What runs under the tool: every case, the controls, and then the planted mistakes, which may take the process along."""
    with _launches_named():
        for name, run in cases():
            print("case", name, flush=True)
            run()
            _wait()
    print("every case has run", flush=True)
    if tool:
        import planted

        for name in [*CONTROLS[tool], *PLANTED[tool]]:
            launch = planted.launch(name, DEVICE)
            launch.start()
            _wait()
            right = planted.RESULTS.get(name, [])
            wrote = launch.arguments["p_out"][: len(right)].tolist()
            assert wrote == right, f"{name} wrote {wrote} instead of {right}"
            print(name, "has run", flush=True)
    return 0


@contextmanager
def _launches_named():
    start = Launch.start

    def named(launch: Launch) -> None:
        print("  launched", launch.name, flush=True)
        start(launch)

    Launch.start = named
    try:
        yield
    finally:
        Launch.start = start


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compile_ahead(compilers: int) -> None:
    """Fill Triton's cache on disk, which the watched processes then find full."""
    if compilers > 1:
        with multiprocessing.get_context("spawn").Pool(compilers) as pool:
            pool.map(_run_share, [(n, compilers) for n in range(compilers)])


def _run_share(share: tuple[int, int]) -> None:
    first, step = share
    for name, run in cases()[first::step]:
        try:
            run()
            _wait()
        except Exception as error:
            print(name, type(error).__name__, str(error)[:300], flush=True)


def cases() -> list[tuple[str, Case]]:
    """Everything to be run, by name."""
    packed = masks.Varlen([0, Q_LEN // 2, Q_LEN // 2, Q_LEN - 3], [0, KV_LEN // 2, KV_LEN // 2 + 9, KV_LEN - 3])
    rules = {
        "no mask": None,
        "causal": masks.Causal(),
        "left": masks.Window(Q_LEN // 2, None),
        "window": masks.Window(Q_LEN // 2, 20),
        "lengths": masks.KeyLengths([0, KV_LEN // 2]),
        "packed causal": packed & masks.Causal(packed.offset(Q_LEN)),
    }
    found = {
        f"{rule} D{head_dim}": {"mask": mask, "head_dim": head_dim}
        for rule, mask in rules.items()
        for head_dim in (64, 128)
    }
    found |= {
        "softcap": {"softcap": 5.0, "mask": masks.Causal()},
        "ALiBi": {"alibi": True},
        "ALiBi, packed": {"alibi": True, "mask": rules["packed causal"]},
        "ALiBi, softcap, lengths": {"alibi": True, "softcap": 5.0, "mask": rules["lengths"]},
        "fp16": {"dtype": torch.float16, "mask": masks.Causal()},
        "rows first": {"rows_first": True, "mask": masks.Causal()},
        "one query": {"q_len": 1},
        "more queries than keys": {"q_len": KV_LEN, "kv_len": Q_LEN, "mask": masks.Causal()},
        "D40": {"head_dim": 40, "mask": rules["lengths"]},
        "D96": {"head_dim": 96, "mask": masks.Causal()},
    }
    only_portable = {
        "fp32": {"dtype": torch.float32, "mask": rules["lengths"]},
        "D59": {"head_dim": 59, "mask": rules["lengths"]},
        "D256": {"head_dim": 256, "mask": masks.Causal()},
    }
    # More work than there are multiprocessors; with a head_dim up to 64, keys enough for the kernel for Hopper.
    only_dispatched = {
        "many heads": {"heads": (96, 48), "mask": masks.Causal()},
        "many heads, packed causal": {"heads": (96, 48), "mask": rules["packed causal"]},
        "many keys": {"head_dim": 64, "kv_len": MANY_KEYS},
        "many keys, many heads, causal": {
            "head_dim": 64,
            "kv_len": MANY_KEYS,
            "heads": (96, 48),
            "mask": masks.Causal(),
        },
        "many keys, lengths": {"head_dim": 64, "kv_len": MANY_KEYS, "mask": masks.KeyLengths([MANY_KEYS - 30, 0])},
    }
    attending = [(f"portable {name}", portable, options) for name, options in (found | only_portable).items()]
    attending += [(f"dispatched {name}", dispatched, options) for name, options in (found | only_dispatched).items()]
    return [
        *((name, lambda how=how, options=options: attend(how, **options)) for name, how, options in attending),
        *decode_cases(),
    ]


def attend(
    kernels: Callable, *, head_dim: int = 128, mask: masks.Mask | None = None, dtype: torch.dtype = torch.bfloat16, q_len: int = Q_LEN,
    kv_len: int = KV_LEN, heads: tuple[int, int] = (4, 2), softcap: float = 0.0, alibi: bool = False, rows_first: bool = False,
) -> None:  # fmt: skip
    """Forward and backward of one problem."""
    q_heads, kv_heads = heads
    sizes = ((q_heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len), (q_heads, q_len))
    q, k, v, grad_out = (drawn((2, n, length, head_dim), dtype, rows_first) for n, length in sizes)
    slopes = drawn((q_heads,), torch.float32).abs() if alibi else None
    spec = AttentionSpec.from_tensors(q, k, v, mask=mask, softcap=softcap, alibi_slopes=slopes)
    kernels(q, k, v, grad_out, drawn((2, q_heads, q_len), torch.float32), KernelOptions.from_spec(spec))


def portable(q, k, v, grad_out, grad_lse, options: KernelOptions) -> None:
    """The kernels for every GPU."""
    launch, out, lse = forward_launch(q, k, v, options)
    launch.start()
    for launch in backward_launches(q, k, v, out, lse, grad_out, grad_lse, options)[0]:
        launch.start()


def dispatched(q, k, v, grad_out, grad_lse, options: KernelOptions) -> None:
    """The kernels that this GPU runs the problem with: on Hopper, its own."""
    out, lse = launch_forward(q, k, v, options)
    launch_backward(q, k, v, out, lse, grad_out, grad_lse, options)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, rows_first: bool = False) -> Tensor:
    """Made on the host, so that no kernel but ours runs."""
    x = torch.randn(shape).to(dtype)
    if rows_first:
        return x.transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2)
    return x.to(DEVICE)


def decode_cases() -> list[tuple[str, Case]]:
    """Contiguous and paged caches of unequal lengths, cut into more splits than there are keys for."""
    sizes = {
        "contiguous": {},
        "one split": {"num_splits": 1},
        "33 splits": {"num_splits": 33},
        "cut at multiples": {"num_splits": 0, "split_size": 128},
        "merged by a second kernel": {"merge_in_kernel": False},
        "pages of 1": {"page_size": 1},
        "pages of 16": {"page_size": 16},
        "pages of 256": {"page_size": 256},
        "pages of 16, cut at multiples": {"page_size": 16, "num_splits": 0, "split_size": 100},
        "window": {"left": 90, "q_len": 3},
        "softcap, 4 queries": {"softcap": 5.0, "q_len": 4},
        "one head each": {"q_heads": 2},
        "16 heads a group, 8 queries": {"q_heads": 32, "q_len": 8},
        "fp16 D64, pages of 64": {"dtype": torch.float16, "head_dim": 64, "page_size": 64},
        "fp32 D40": {"dtype": torch.float32, "head_dim": 40},
        "D256": {"head_dim": 256},
        "D59": {"head_dim": 59, "page_size": 16},
    }
    return [(f"decode {name}", lambda options=options: decode(**options)) for name, options in sizes.items()]


def decode(
    *, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, q_heads: int = 8, q_len: int = 1, num_splits: int = 7, left: int | None = None,
    split_size: int | None = None, page_size: int | None = None, softcap: float = 0.0, merge_in_kernel: bool = True,
) -> None:  # fmt: skip
    """One decoding step of four requests, one of them empty and one with room left."""
    from flashlib.launch.decode import DecodeOptions, launch_decode

    batch, kv_heads, lengths = 4, 2, [KV_LEN, 0, KV_LEN // 2, q_len]
    table, rows, room = None, batch, KV_LEN
    if page_size is not None:
        held = [-(-length // page_size) for length in lengths]
        rows, room = sum(held), page_size
        pages, table = torch.randperm(rows).tolist(), torch.full((batch, max(held)), 2**30, dtype=torch.int32)
        for request, count in enumerate(held):
            table[request, :count] = torch.tensor([pages.pop() for _ in range(count)], dtype=torch.int32)
        table = table.to(DEVICE)
    q = drawn((batch, q_heads, q_len, head_dim), dtype)
    k, v = (drawn((rows, kv_heads, room, head_dim), dtype) for _ in range(2))
    on_device = torch.tensor(lengths, dtype=torch.int32).to(DEVICE)
    splits = num_splits or -(-KV_LEN // split_size)
    options = DecodeOptions(on_device, table, left, 0, head_dim**-0.5, softcap, splits, split_size, merge_in_kernel)
    launch_decode(q, k, v, options)


if __name__ == "__main__":
    assert DEVICE == "cuda" or interpreting(), "needs a CUDA GPU, or TRITON_INTERPRET=1"
    sys.exit(main())

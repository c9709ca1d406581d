"""The sixteen claims of the documents that this course started from: each with what we found."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import torch

from flashlib.cost import Problem, StepCost, decode, decode_launches, device, formula, largest_tile, model
from flashlib.cost.conventions import corrected, exact
from flashlib.course.chapters.io_model import fit_exponent
from flashlib.course.claims import PARTLY, RIGHT, WRONG, Claim, Evidence
from flashlib.measure.records.record import load_record

__all__ = ["CLAIMS"]


def _seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _by_peer(name: str, *columns: str) -> dict[tuple, dict[str, float]]:
    """Milliseconds by cell and peer."""
    cells: dict[tuple, dict[str, float]] = {}
    for row in load_record(name).rows:
        if row["ms"]:
            cells.setdefault(tuple(row[column] for column in columns), {})[row["peer"]] = row["ms"]
    return cells


def peak_of_an_a100() -> Evidence:
    peak, claimed = device("a100").peak("bf16") / 1e12, 23
    ours = max(row["tflops"] for row in load_record("h200/training_forward").select(peer="triton"))
    h200 = device("h200").peak("bf16") / 1e12
    share = claimed / peak
    figures = {"peak": peak, "claimed": claimed, "share": share, "ours": ours, "h200": h200, "our_share": ours / h200}
    return Evidence(
        WRONG if share < 0.5 else RIGHT,
        figures,
        ("h200/training_forward",),
        "data sheets in flashlib/cost/devices.json",
    )


def fp8_needs_ampere() -> Evidence:
    with_fp8 = [name for name in ("a100", "rtx-4090", "h100", "h200") if "fp8" in device(name).flops_per_s]
    verdict = WRONG if "a100" not in with_fp8 and "rtx-4090" in with_fp8 else RIGHT
    return Evidence(verdict, {"with_fp8": ", ".join(with_fp8)}, runs="data sheets in flashlib/cost/devices.json")


def tiling_on_a_cpu() -> Evidence:
    from flashlib import attention
    from flashlib.measure.racing.memory import peak_bytes

    peaks = {}
    for tokens in (512, 1024):
        q, k, v = (_seeded(1, 2, tokens, 64) for _ in range(3))
        for backend in ("reference", "tiled"):
            peaks[backend, tokens] = peak_bytes(lambda q=q, k=k, v=v, name=backend: attention(q, k, v, backend=name))
    saved = {tokens: 1 - peaks["tiled", tokens] / peaks["reference", tokens] for tokens in (512, 1024)}
    cells = _by_peer("cpu/protocol", "batch", "length")
    gains = {cell: times["naive"] / times["cpu"] for cell, times in cells.items() if {"naive", "cpu"} <= times.keys()}
    long = [gain for (_, length), gain in gains.items() if length >= 1024]
    verdict = WRONG if min(long) > 1.3 and saved[1024] > max(0.7, saved[512]) else PARTLY
    figures = {"least": min(long), "most": max(long), "short": min(gain for (_, length), gain in gains.items() if length == 128), "saved": saved[1024], "saved_short": saved[512]}  # fmt: skip
    return Evidence(verdict, figures, ("cpu/protocol",), "peak memory run here")


def steps_on_a_cpu() -> Evidence:
    columns = ("length", "mask", "head_dim", "q_heads", "kv_heads", "dtype")
    wide, narrow = (_by_peer(f"cpu/{name}", *columns) for name in ("cpu_forward", "cpu_forward_avx2"))
    wider = [narrow[cell]["cpu"] / wide[cell]["cpu"] for cell in wide if cell[-1] == "fp32"]
    halves = [wide[(*cell[:-1], "fp32")]["cpu"] / wide[cell]["cpu"] for cell in wide if cell[-1] == "bf16"]
    verdict = PARTLY if statistics.median(wider) < 2 and 1.5 <= statistics.median(halves) <= 2 else WRONG
    figures = {"wider_least": min(wider), "wider_most": max(wider), "bf16_least": min(halves), "bf16_most": max(halves), "bf16": statistics.median(halves)}  # fmt: skip
    return Evidence(verdict, figures, ("cpu/cpu_forward", "cpu/cpu_forward_avx2"))


def speedup_by_length() -> Evidence:
    times = {(row["method"], row["tokens"]): row["ms"] for row in load_record("h200/attention_traffic").rows}
    wall = {(row["backend"], row["tokens"]): row["ms"] for row in load_record("h200/memory_wall").rows}
    best = {tokens: times["standard", tokens] / times["flash", tokens] for tokens in (2048, 16384)}
    worst = {tokens: wall["torch_sdpa_math", tokens] / wall["torch_sdpa_flash", tokens] for tokens in (2048, 16384)}
    verdict = PARTLY if best[16384] < 10 <= worst[16384] else WRONG
    figures = {"good_2k": best[2048], "good_16k": best[16384], "poor_2k": worst[2048], "poor_16k": worst[16384]}
    return Evidence(verdict, figures, ("h200/attention_traffic", "h200/memory_wall"))


def tile_of_512() -> Evidence:
    h200, a100 = device("h200"), device("a100")
    needed = 512 * 128 * 2 * (1 + 2 * 2)
    figures = {
        "needed": needed / 1024,
        "h200": h200.local_bytes / 1024,
        "a100": a100.local_bytes / 1024,
        "largest": largest_tile(128, h200),
        "largest_a100": largest_tile(128, a100),
    }
    verdict = WRONG if max(figures["largest"], figures["largest_a100"]) < 512 and needed > h200.local_bytes else RIGHT
    return Evidence(verdict, figures, runs="counted by flashlib.cost")


def softmax_triples() -> Evidence:
    work = formula(Problem.causal(1, 32, 8, 8192, 8192, 128))
    share = (work.exponentials + work.other) / work.products
    figures = {"per_thousand": 1000 * work.exponentials / work.products, "share": share}
    return Evidence(WRONG if share < 0.1 else PARTLY, figures, runs="counted by flashlib.cost")


def divided_by_devices() -> Evidence:
    problem = Problem(1, 32, 8, 8192, 8192, 128)
    right, theirs = exact(problem, 8), corrected(problem, 8)
    of_all, of_one = theirs.per_device / 3 / right.total, theirs.per_device / 3 / right.per_device
    verdict = PARTLY if of_all == 1 and of_one == 8 else WRONG
    return Evidence(verdict, {"of_one": of_one, "with_factor": 3 * of_one}, runs="counted by flashlib.cost")


def experts() -> Evidence:
    with_experts = model("gpt-oss-20b")
    layers = tuple(replace(layer, experts=False) for layer in with_experts.layers)
    dense = replace(with_experts, name="dense", experts=None, layers=layers)
    step = decode(batch=16, context=8192)
    parts = [StepCost.of(one, step, device("h200")).parts for one in (with_experts, dense)]
    same = parts[0]["attention"] == parts[1]["attention"]
    return Evidence(
        WRONG if same else RIGHT, {"ms": 1e3 * parts[0]["attention"].seconds}, runs="counted by flashlib.cost"
    )


def cost_of_splits() -> Evidence:
    step = Problem.causal(1, 32, 8, 1, 65536, 128)
    products = {
        n: sum(launch.work.products for launch in decode_launches(step, device("h200"), splits=n)) for n in (1, 4, 16)
    }
    more, once = (decode_launches(step, device("h200"), splits=n)[0].work.bytes for n in (16, 1))
    same = len(set(products.values())) == 1
    return Evidence(
        WRONG if same else RIGHT, {"gflop": products[1] / 1e9, "more": more / once - 1}, runs="counted by flashlib.cost"
    )


def summed_splits() -> Evidence:
    from flashlib import attention
    from flashlib.course.chapters.split_decoding import sum_of_splits
    from flashlib.partial import Partial, fold
    from flashlib.reference import oracle

    q, k, v = _seeded(1, 4, 1, 64), _seeded(1, 4, 4096, 64), _seeded(1, 4, 4096, 64)
    exact_out = oracle(q, k, v)[0]
    summed = sum_of_splits(q, k, v, 4).double()
    pieces = (slice(n, n + 1024) for n in range(0, 4096, 1024))
    merged = fold(Partial(*attention(q, k[:, :, piece], v[:, :, piece], return_lse=True)) for piece in pieces).out
    off = float((summed - exact_out).abs().max() / exact_out.abs().max())
    right = float((merged.double() - exact_out).abs().max() / exact_out.abs().max())
    verdict = WRONG if off > 0.5 and right < 1e-5 else RIGHT
    return Evidence(verdict, {"off": off, "times": float((summed / exact_out).median())}, runs="run here")


def determinism() -> Evidence:
    from flashlib.course.chapters.split_decoding import distinct
    from flashlib.inference import decode_attention

    rows = [row for name in ("h200/decode_determinism", "h200/triton_determinism") for row in load_record(name).rows]
    repeats, differing = sum(row["repeats"] for row in rows), sum(bool(row["differ"]) for row in rows)
    q, k, v = _seeded(2, 4, 1, 32), _seeded(2, 2, 300, 32), _seeded(2, 2, 300, 32)
    here = distinct(decode_attention(q, k, v, num_splits=4) for _ in range(20))
    verdict = WRONG if not differing and here == 1 else RIGHT
    return Evidence(verdict, {"repeats": repeats, "differing": differing, "here": here}, ("h200/decode_determinism", "h200/triton_determinism"), "20 steps run here")  # fmt: skip


def chunks_and_memory() -> Evidence:
    from flashlib.inference import KVInjector, Memory
    from flashlib.reference import check

    rows = {row["peer"]: row for row in load_record("h200/chunked_injection").rows}
    chunked, whole = rows["inject_chunked_4096"], rows["inject"]
    q, k, v = (_seeded(1, 2, 8, 32) for _ in range(3))
    k_memory, v_memory = _seeded(1, 2, 200, 32), _seeded(1, 2, 200, 32)
    out = KVInjector().inject_chunked(q, k, v, Memory(k_memory, v_memory), chunk_size=64, alpha=1.0)
    both = (torch.cat([k_memory, k], dim=2), torch.cat([v_memory, v], dim=2))
    exactly = check(out, None, q, *both).passed
    saved, slower = whole["peak_bytes"] / chunked["peak_bytes"], chunked["ms"] / whole["ms"]
    verdict = WRONG if exactly and saved > 2 else RIGHT
    return Evidence(
        verdict, {"saved": saved, "slower": slower, "chunk": 4096}, ("h200/chunked_injection",), "exactness run here"
    )


def order_of_backends() -> Evidence:
    columns = ("length", "head_dim", "mask")
    ours = {
        direction: [
            min(times, key=times.get) == "triton" for times in _by_peer(f"h200/training_{direction}", *columns).values()
        ]
        for direction in ("forward", "backward")
    }
    first = {direction: sum(won) for direction, won in ours.items()}
    called = load_record("h200/choices").rows
    verdict = WRONG if first["forward"] > 0 and first["backward"] < len(ours["backward"]) else PARTLY
    figures = {"forward": first["forward"], "forward_of": len(ours["forward"]), "backward": first["backward"], "backward_of": len(ours["backward"]), "called": sum(row["chosen"] == "triton" for row in called), "called_of": len(called)}  # fmt: skip
    return Evidence(verdict, figures, ("h200/training_forward", "h200/training_backward", "h200/choices"))


def bytes_of_a_fused_kernel() -> Evidence:
    rows = load_record("h200/attention_traffic").select(method="flash")
    long = [row for row in rows if row["tokens"] >= 2048]
    tokens = [row["tokens"] for row in long]
    dram, l2 = (fit_exponent(tokens, [row[name] for row in long]) for name in ("dram_read", "l2_read"))
    wall = [row for row in load_record("h200/memory_wall").select(backend="torch_sdpa_cudnn") if row["peak_bytes"]]
    memory = fit_exponent([row["tokens"] for row in wall], [row["peak_bytes"] for row in wall])
    verdict = PARTLY if l2 > 1.8 and dram < 1.2 and memory < 1.2 else WRONG
    return Evidence(verdict, {"l2": l2, "dram": dram, "memory": memory}, ("h200/attention_traffic", "h200/memory_wall"))


def guards_of_a_kernel() -> Evidence:
    """Both guards are in; the accumulators have 16 bits, and a slot behind the keys holds NaN."""
    keys, tile = 70_000, 500
    largest, total, acc = (
        torch.tensor(-math.inf),
        torch.zeros((), dtype=torch.float16),
        torch.zeros((), dtype=torch.float16),
    )
    for _ in range(0, keys, tile):
        scores = torch.ones(tile)
        found = torch.maximum(largest, scores.max())
        alpha = torch.where(largest == -math.inf, 0.0, torch.exp(largest - found)).half()
        weights = torch.exp(scores - found).half()
        total, acc, largest = total * alpha + weights.sum(), acc * alpha + weights.sum(), found
    mean = torch.where(total == 0, 0.0, acc / total)  # every value is 1, and so is their mean
    hidden = torch.tensor([1.0, 0.0]) @ torch.tensor([1.0, math.nan])  # weight 0 for a slot that nobody wrote
    verdict = WRONG if not torch.isfinite(mean) and not torch.isfinite(hidden) else RIGHT
    return Evidence(verdict, {"keys": keys, "total": str(float(total)), "mean": str(float(mean)), "hidden": str(float(hidden))}, runs="run here")  # fmt: skip


CLAIMS = {
    claim.number: claim
    for claim in (
        Claim(
            1, "001", "FlashAttention reaches 23 TFLOP/s on an A100, near its peak.", WRONG,
            "An A100's data sheet has {peak:.0f} TFLOP/s in 16 bits, of which {claimed} are {share:.0%}. A rate means something beside its own ceiling: on an H200, {ours:.0f} of {h200:.0f}, {our_share:.0%}.",
            "a data sheet with a peak near 23 TFLOP/s for 16-bit products", peak_of_an_a100,
        ),
        Claim(
            2, "001", "FP8 needs an Ampere GPU.", WRONG,
            "Ampere multiplies no FP8. Data sheets with a rate for it begin with Ada and Hopper; of those looked at: {with_fp8}. FP8 kernels of our own there are none, so nothing is measured.",
            "an FP8 rate in the A100's data sheet", fp8_needs_ampere,
        ),
        Claim(
            3, "001", "FlashAttention does not suit CPUs: tiling gains 20 to 30% of time and 50 to 70% of memory.", WRONG,
            "The tiled kernel was {least:.1f} to {most:.1f} times as fast as the unfused formula from 1,024 tokens on, and {short:.1f} times at 128. Memory saved is no constant: {saved_short:.0%} at 512 tokens, {saved:.0%} at 1,024, and more with each doubling.",
            "a record in which the unfused formula comes within 30% of the tiled kernel at 1,024 tokens or more", tiling_on_a_cpu,
        ),
        Claim(
            4, "001", "On a CPU, SIMD gives 2 to 4 times, threads 4 to 8, bf16 1.5 to 2, together 5 to 10.", PARTLY,
            "bf16 gave {bf16_least:.1f} to {bf16_most:.1f} times over fp32, {bf16:.1f} in the middle. AVX-512 in place of AVX2 gave {wider_least:.2f} to {wider_most:.2f} in fp32. Scalar code and more threads are not recorded. Factors of one machine are no property of the method.",
            "records with threads, or of scalar code, that put the steps into the claimed ranges", steps_on_a_cpu,
        ),
        Claim(
            5, "001", "FlashAttention is 2 to 3 times as fast at 512 tokens, 4 to 6 at 2,048, 10 to 20 at 16,384.", PARTLY,
            "It depends on what it is compared with. Against three well-made steps: {good_2k:.1f} times at 2,048 tokens and {good_16k:.1f} at 16,384. Against PyTorch's unfused formula: {poor_2k:.1f} and {poor_16k:.0f}.",
            "a well-made unfused baseline that is 10 times slower at 16,384 tokens", speedup_by_length,
        ),
        Claim(
            6, "001", "Long sequences want tiles of 512; a block has 16 to 48 KB of shared memory.", WRONG,
            "The length has no say in it. A tile of 512 at head_dim 128 needs {needed:.0f} KiB; a block has {a100:.0f} KiB on an A100 and {h200:.0f} on an H200, where {largest_a100} and {largest} rows fit.",
            "a kernel that runs tiles of 512 x 512 at head_dim 128 from one block's memory", tile_of_512,
        ),
        Claim(
            7, "002", "The softmax triples the FLOPs of both products.", WRONG,
            "At head_dim 128 there are {per_thousand:.2f} exponentials to a thousand FLOPs in products, and all operations of the softmax together are {share:.1%} of them. They run on other units, so they get a roof of their own and no factor.",
            "a count of a score's operations that comes near twice its 2 (D + Dv)", softmax_triples,
        ),
        Claim(
            8, "002", "FLOPs must not be divided by the degree of sequence parallelism.", PARTLY,
            "The count of all devices together is not divided. The count of one device is, and the correction charges each of 8 with {of_one:.0f} times its work, {with_factor:.0f} times with its factor of 3.",
            "a device that computes the whole square by itself", divided_by_devices,
        ),
        Claim(
            9, "002", "Models with experts need another cost of attention, so they are left out.", WRONG,
            "Experts stand where the MLP stands. With and without them a decoding step of gpt-oss-20b spends the same {ms:.2f} ms in attention, to the last digit of the estimate.",
            "an architecture in which the experts change shapes, masks or caches of attention", experts,
        ),
        Claim(
            10, "003", "Split-KV costs O(n^2 / k) for k splits.", WRONG,
            "The splits share the work and do not lessen it: {gflop:.2f} GFLOP with 1, 4 and 16 splits. What grows is a little traffic of partial results, {more:.1%} at 16. What falls is the time until the last program is done, as long as processors are idle.",
            "a split that computes fewer scores in total", cost_of_splits,
        ),
        Claim(
            11, "003", "Summing the outputs of the splits differs from attention by 1e-8 to 1e-6.", WRONG,
            "The sum of 4 normalised outputs is about {times:.1f} times the answer. Weighted by the LSE the pieces give the answer to rounding: then the claimed sizes are about right.",
            "any input with several splits on which the plain sum is right", summed_splits,
        ),
        Claim(
            12, "003", "Split-KV attention is inherently nondeterministic.", WRONG,
            "Only merging in the order of arrival is. With a fixed order {repeats:,} recorded repetitions on an H200 gave the same bits ({differing} of their cases differ), and 20 here gave {here} result.",
            "two runs of a fixed schedule that differ", determinism,
        ),
        Claim(
            13, "000", "Chunked injection that is exact cannot save memory.", WRONG,
            "Merged by their LSE, chunks give the exact result, and the peak is that of a chunk: {saved:.0f} times less with chunks of {chunk:,}. The price is time, {slower:.1f} times as much where the memory lies in the host's RAM.",
            "an input on which the chunked result leaves the error budget, or a peak that grows with the memory", chunks_and_memory,
        ),
        Claim(
            14, "000", "The right order of backends is FlashAttention-3, FlashAttention-2, standard.", WRONG,
            "No fixed order is. On one H200, by the device's time, our forward was the fastest in {forward} of {forward_of} recorded cells and our backward in {backward} of {backward_of}; called from Python, autoselect chose ours in {called} of {called_of} classes, where launching counts too. FlashAttention-3 itself is not recorded.",
            "one backend that is the fastest in every recorded cell, both ways", order_of_backends,
        ),
        Claim(
            15, "004", "FlashAttention lowers IO from O(N^2) to O(Nd).", PARTLY,
            "Memory held grows with N to the power {memory:.2f}. Bytes between multiprocessors and L2 cache grow with N to the power {l2:.2f}, as the theorem says, Theta(N^2 d^2 / M). From memory they grow with {dram:.2f} as long as K and V of a head fit into the L2 cache.",
            "counters on which the traffic at the L2 cache grows linearly", bytes_of_a_fused_kernel,
        ),
        Claim(
            16, "004", "`l == 0 -> 0` and the guard of `-inf - -inf` are all the stability that a kernel needs.", WRONG,
            "With both guards in, sums kept in 16 bits overflow: {keys:,} equal keys give l = {total} and a mean of {mean} in place of 1. And a weight of 0 times a slot that holds NaN is {hidden}. A kernel needs accumulators in float32, and never to touch what nobody wrote.",
            "a kernel with those guards alone that stays within the error budget on both inputs", guards_of_a_kernel,
        ),
    )
}  # fmt: skip

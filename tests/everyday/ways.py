"""Every way in which programs use attention, tried on every backend and every function of flash_attn: works, or refuses in our words.

    python tests/everyday/ways.py                               # what runs on this CPU
    TRITON_INTERPRET=1 python tests/everyday/ways.py            # our kernels, interpreted
    python tests/everyday/ways.py --record results              # on a GPU: the record for the table of docs/everyday.md

A way works if its results are within the error budget and its gradients are those of the plain call. It refuses if it raises an error of
ours that says so. Anything else fails.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

import flashlib
from flashlib import BackendUnavailableError, FlashAttentionConfig, attention, use_config
from flashlib.backends import BACKENDS, available
from flashlib.inference.decode import decode_attention
from flashlib.interop import flash_attn
from flashlib.launch.start import interpreting
from flashlib.reference import assert_within_budget

LENGTHS = [3, 5]  # of the packed sequences
FUSED = ("torch_sdpa_flash", "torch_sdpa_efficient", "torch_sdpa_cudnn")
PACKAGE = str(Path(flashlib.__file__).parent)


@dataclass(frozen=True)
class Subject:
    """Something to call.

    Attributes:
        name: of the row of the table.
        call: takes the inputs, gives out.
        inputs: makes them, for a device and a dtype; those of floating type may be differentiated.
        problem: what it computes, as ``(q, k, v, options)`` of :func:`flashlib.attention`, from the inputs.
        heads_first: out as ``[B, H, S, D]``.
        differentiable: whether it has a backward pass.
        dtypes: those that it takes; most ways are tried with the first.
    """

    name: str
    call: Callable[..., Tensor]
    inputs: Callable[[str, torch.dtype], tuple[Tensor, ...]]
    problem: Callable[..., tuple] = lambda q, k, v, *_: (q, k, v, {"causal": True})
    heads_first: Callable[[Tensor], Tensor] = lambda out: out
    differentiable: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    config: FlashAttentionConfig = field(default_factory=FlashAttentionConfig)


def drawn(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def heads_first_inputs(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(drawn(2, heads, 8, 64, device=device, dtype=dtype) for heads in (4, 2, 2))


def backend_subjects() -> list[Subject]:
    on_a_gpu = torch.cuda.is_available()
    halves = {"dtypes": (torch.float16, torch.bfloat16)}  # all that the fused kernels take there
    return [
        Subject(
            name,
            partial(attention, causal=True, backend=name),
            heads_first_inputs,
            **(halves if on_a_gpu and name in FUSED else {}),
        )
        for name, missing in available().items()
        if missing is None
    ]


def swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def function_subjects() -> list[Subject]:
    def tokens_first(device, dtype):
        return tuple(x.contiguous() for x in swapped(*heads_first_inputs(device, dtype)))

    def qkv(device, dtype):
        return (drawn(2, 8, 3, 2, 64, device=device, dtype=dtype),)

    def q_and_kv(device, dtype):
        return drawn(2, 8, 4, 64, device=device, dtype=dtype), drawn(2, 8, 2, 2, 64, device=device, dtype=dtype)

    def packed(*shapes: tuple[int, ...]):
        def inputs(device, dtype):
            ends = torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32, device=device)
            return (*(drawn(sum(LENGTHS), *shape, device=device, dtype=dtype) for shape in shapes), ends)

        return inputs

    def packed_problem(q, k, v, ends):
        from flashlib.masks import Causal, Varlen

        sequences = Varlen(ends)
        return *(x.transpose(0, 1)[None] for x in (q, k, v)), {"mask": sequences & Causal(sequences.offset(len(q)))}

    def packed_out(out):
        return out.transpose(0, 1)[None]

    longest = max(LENGTHS)
    qkv_of = {
        "problem": lambda qkv: (*swapped(*qkv.unbind(2)), {"causal": True}),
        "heads_first": lambda out: out.transpose(1, 2),
    }

    def cached(device, dtype):
        q, k, v = tokens_first(device, dtype)
        return q[:, -2:].contiguous(), k, v, torch.tensor([8, 8], dtype=torch.int32, device=device)

    def cached_problem(q, k, v, _):
        return *swapped(q, k, v), {"causal": True}

    def pages(device, dtype):
        q, k, v = tokens_first(device, dtype)
        table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
        return (
            q[:, -2:].contiguous(),
            *(x.reshape(4, 4, 2, 64) for x in (k, v)),
            torch.tensor([8, 8], dtype=torch.int32, device=device),
            table,
        )

    def pages_problem(q, k, v, *_):
        return *swapped(q, *(x.reshape(2, 8, 2, 64) for x in (k, v))), {"causal": True}

    f = flash_attn
    return [
        Subject("flash_attn_func", lambda q, k, v: f.flash_attn_func(q, k, v, causal=True), tokens_first,
                lambda q, k, v: (*swapped(q, k, v), {"causal": True}), lambda out: out.transpose(1, 2)),
        Subject("flash_attn_qkvpacked_func", lambda qkv: f.flash_attn_qkvpacked_func(qkv, causal=True), qkv, **qkv_of),
        Subject("flash_attn_kvpacked_func", lambda q, kv: f.flash_attn_kvpacked_func(q, kv, causal=True), q_and_kv,
                lambda q, kv: (*swapped(q, *kv.unbind(2)), {"causal": True}), lambda out: out.transpose(1, 2)),
        Subject("flash_attn_varlen_func", lambda q, k, v, ends: f.flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True),
                packed((4, 64), (2, 64), (2, 64)), packed_problem, packed_out),
        Subject("flash_attn_varlen_qkvpacked_func", lambda qkv, ends: f.flash_attn_varlen_qkvpacked_func(qkv, ends, longest, causal=True),
                packed((3, 2, 64)), lambda qkv, ends: packed_problem(*qkv.unbind(1), ends), packed_out),
        Subject("flash_attn_varlen_kvpacked_func",
                lambda q, kv, ends: f.flash_attn_varlen_kvpacked_func(q, kv, ends, ends, longest, longest, causal=True),
                packed((4, 64), (2, 2, 64)), lambda q, kv, ends: packed_problem(q, *kv.unbind(1), ends), packed_out),
        Subject("flash_attn_with_kvcache", lambda q, k, v, lengths: f.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True),
                cached, cached_problem, lambda out: out.transpose(1, 2), differentiable=False),
        Subject("flash_attn_with_kvcache, pages",
                lambda q, k, v, lengths, table: f.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table, causal=True),
                pages, pages_problem, lambda out: out.transpose(1, 2), differentiable=False),
        Subject("decode_attention", lambda q, k, v, lengths: decode_attention(q, k, v, lengths=lengths),
                lambda device, dtype: (*(x.transpose(1, 2) for x in cached(device, dtype)[:3]), torch.tensor([8, 8], dtype=torch.int32, device=device)),
                lambda q, k, v, _: (q, k, v, {"causal": True}), differentiable=False),
    ]  # fmt: skip


# The ways. Each takes a subject and a device, and raises what the subject raises, or AssertionError.


def eager(subject: Subject, device: str) -> None:
    for dtype in subject.dtypes:
        inputs = subject.inputs(device, dtype)
        within_budget(subject, subject.call(*inputs), inputs)


def within_budget(subject: Subject, out: Tensor, inputs: tuple[Tensor, ...]) -> None:
    q, k, v, options = subject.problem(*inputs)
    assert_within_budget(subject.heads_first(out), q, k, v, **options)


def naive(subject: Subject, *inputs: Tensor) -> Tensor:
    """What the subject computes, by the formula, as ``[B, H, S, D]``."""
    q, k, v, options = subject.problem(*inputs)
    return attention(q, k, v, **options, backend="reference")


def close(one: Tensor, other: Tensor, subject: Subject) -> None:
    """The same but for roundings, of which a square of a gradient has many."""
    tolerance = 1e-3 if subject.dtypes[0] == torch.float32 else 5e-2
    torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def floating(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs)


def gradients(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], square: bool = True) -> tuple[Tensor, ...]:
    leaves = floating(inputs)
    out = call(*leaves).float()
    objective = out.square().sum() if square else out.sum()
    return torch.autograd.grad(objective, [x for x in leaves if x.requires_grad])


def same_gradients(subject: Subject, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    expected = gradients(subject.call, inputs)
    for one, other in zip(gradients(call, inputs), expected, strict=True):
        close(one, other, subject)


def backward(subject: Subject, device: str) -> None:
    inputs = subject.inputs(device, subject.dtypes[0])
    found = gradients(subject.call, inputs)

    for one, other in zip(found, gradients(partial(naive, subject), inputs), strict=True):
        close(one, other, subject)


def autocast(subject: Subject, device: str) -> None:
    inputs = subject.inputs(device, torch.float32)
    low = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    with torch.autocast(device, torch.bfloat16):
        out = subject.call(*inputs)
        mixed = subject.call(low[0], *inputs[1:]) if len(inputs) > 1 else out
        assert out.dtype == mixed.dtype == torch.bfloat16, (out.dtype, mixed.dtype)
        if subject.differentiable:
            leaves = floating(inputs)
            subject.call(*leaves).float().sum().backward()
            assert all(x.grad.dtype == torch.float32 for x in leaves if x.requires_grad)
    for given in (out, mixed):
        within_budget(subject, given, low)


def compiled(subject: Subject, device: str, dynamic: bool = False) -> None:
    torch._dynamo.reset()
    inputs = subject.inputs(device, subject.dtypes[0])
    whole = torch.compile(
        subject.call, fullgraph=True, dynamic=dynamic or None, backend="inductor" if device == "cuda" else "aot_eager"
    )
    with torch.no_grad():
        within_budget(subject, whole(*inputs), inputs)
    if subject.differentiable:
        same_gradients(subject, whole, inputs)


def exported(subject: Subject, device: str) -> None:
    class Module(nn.Module):
        def forward(self, *inputs):
            return subject.call(*inputs)

    inputs = subject.inputs(device, subject.dtypes[0])
    program = torch.export.export(Module(), inputs)
    fresh = subject.inputs(device, subject.dtypes[0])
    within_budget(subject, program.module()(*fresh), fresh)


def vmapped(subject: Subject, device: str) -> None:
    several = [subject.inputs(device, subject.dtypes[0]) for _ in range(3)]
    stacked = [
        torch.stack(tensors) if tensors[0].is_floating_point() else tensors[0] for tensors in zip(*several, strict=True)
    ]
    in_dims = tuple(0 if x.is_floating_point() else None for x in several[0])
    for inputs, out in zip(several, torch.vmap(subject.call, in_dims=in_dims)(*stacked), strict=True):
        within_budget(subject, out, inputs)


def functional_grad(subject: Subject, device: str) -> None:
    inputs = subject.inputs(device, subject.dtypes[0])
    count = sum(x.is_floating_point() for x in inputs)

    def objective(*given: Tensor) -> Tensor:
        return subject.call(*given).square().sum()

    found = torch.func.grad(objective, argnums=tuple(range(count)))(*inputs)
    for one, other in zip(found, gradients(subject.call, inputs), strict=True):
        close(one, other, subject)


def jvp(subject: Subject, device: str) -> None:
    inputs = subject.inputs(device, subject.dtypes[0])
    count = sum(x.is_floating_point() for x in inputs)
    tangents = tuple(torch.randn_like(x) for x in inputs[:count])

    def call(*given: Tensor) -> Tensor:
        return subject.heads_first(subject.call(*given, *inputs[count:]))

    exact = torch.func.jvp(
        lambda *given: naive(subject, *given, *inputs[count:]),
        tuple(x.double() for x in inputs[:count]),
        tuple(x.double() for x in tangents),
    )[1]
    close(torch.func.jvp(call, inputs[:count], tangents)[1], exact, subject)


def second_derivative(subject: Subject, device: str) -> None:
    inputs = subject.inputs(device, subject.dtypes[0])

    def twice(call: Callable[..., Tensor]) -> Tensor:
        leaves = floating(inputs)
        (first,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[:1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves[:1])[0]

    close(twice(subject.call), twice(partial(naive, subject)), subject)


def checkpointed(subject: Subject, device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = subject.inputs(device, subject.dtypes[0])
    for use_reentrant in (False, True):
        leaves = floating(inputs)
        with use_config(FlashAttentionConfig(tiled=type(subject.config.tiled)(block_q=3, block_k=2))):
            out = checkpoint(subject.call, *leaves, use_reentrant=use_reentrant)
            expected = gradients(subject.call, inputs)
        out.square().sum().backward()  # the other kind refuses torch.autograd.grad
        found = [x.grad for x in leaves if x.requires_grad]
        for one, other in zip(found, expected, strict=True):
            close(one, other, subject)


def cuda_graph(subject: Subject, device: str) -> None:
    static = subject.inputs(device, torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        subject.call(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream), torch.no_grad():
        out = subject.call(*static)
    for _ in range(2):
        fresh = subject.inputs(device, torch.float16)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        within_budget(subject, out, fresh)


def threads(subject: Subject, device: str) -> None:
    several = [subject.inputs(device, subject.dtypes[0]) for _ in range(4)]
    outs: dict[int, Tensor | BaseException] = {}

    def work(number: int) -> None:
        try:
            for _ in range(2):
                outs[number] = subject.call(*several[number])
        except BaseException as error:
            outs[number] = error

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for number, inputs in enumerate(several):
        if isinstance(outs[number], BaseException):
            raise outs[number]
        within_budget(subject, outs[number], inputs)


def meta(subject: Subject, device: str) -> None:
    inputs = subject.inputs(device, torch.float16)
    out = subject.call(*(x.to("meta") for x in inputs))
    expected = subject.call(*inputs)
    assert (out.shape, out.dtype, out.device.type) == (expected.shape, expected.dtype, "meta")


def fake(subject: Subject, device: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = subject.inputs(device, torch.float16)
    expected = subject.call(*inputs)
    with FakeTensorMode() as mode:
        out = subject.call(*(mode.from_tensor(x) for x in inputs))
    assert (out.shape, out.dtype, out.device.type) == (expected.shape, expected.dtype, device)


def nested(subject: Subject, device: str) -> None:
    """Jagged tensors ``[B, H, j, D]``, as PyTorch's SDPA takes them. Functions of flash_attn have packed arguments for that."""
    sequences = [
        tuple(drawn(n, heads, 64, device=device, dtype=subject.dtypes[0]) for heads in (4, 2, 2)) for n in LENGTHS
    ]
    jagged = [
        torch.nested.nested_tensor(list(tensors), layout=torch.jagged).transpose(1, 2)
        for tensors in zip(*sequences, strict=True)
    ]
    out = subject.call(*jagged)
    for (q, k, v), one in zip(sequences, out.transpose(1, 2).unbind(), strict=True):
        q, k, v, one = (x.transpose(0, 1)[None] for x in (q, k, v, one))
        assert_within_budget(one, q, k, v, causal=True)


WAYS: dict[str, Callable[[Subject, str], None]] = {
    "eager": eager,
    "backward": backward,
    "autocast": autocast,
    "compile": compiled,
    "compile, dynamic": partial(compiled, dynamic=True),
    "export": exported,
    "vmap": vmapped,
    "func.grad": functional_grad,
    "jvp": jvp,
    "second derivative": second_derivative,
    "checkpoint": checkpointed,
    "threads": threads,
    "meta": meta,
    "fake": fake,
    "nested": nested,
}
ON_A_GPU = {"CUDA graph": cuda_graph}


def try_all(subjects: list[Subject], device: str, ways: dict[str, Callable] | None = None) -> list[dict]:
    """A row for each subject and way: ``outcome`` "works", "refuses" or "FAILS", and what was said."""
    ways = ways or WAYS | (ON_A_GPU if device == "cuda" else {})
    rows = []
    for subject, (name, way) in itertools.product(subjects, ways.items()):
        if way is nested and subject.name not in BACKENDS:
            continue
        outcome, message = "works", ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                way(subject, device)
        except Exception as error:
            outcome, message = "refuses" if is_ours(error) else "FAILS", f"{type(error).__name__}: {error}"
            told = re.search(
                rf"raised exception ({BackendUnavailableError.__name__})\(\(ConstantVariable\(str: \"(.*)\"\)", message
            )
            message = f"{told[1]}: {told[2]}" if told else message
        rows.append({"subject": subject.name, "way": name, "outcome": outcome, "message": message})
    return rows


REFUSALS = (NotImplementedError, BackendUnavailableError, ValueError, TypeError)


def is_ours(error: BaseException) -> bool:
    """Whether a line of flashlib that says ``raise`` raised it: what PyTorch raises inside a call of ours is no refusal."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    if f"raised exception {BackendUnavailableError.__name__}" in str(
        error
    ):  # so torch.compile tells it on, with much around it
        return True
    return isinstance(error, REFUSALS) and at.filename.startswith(PACKAGE) and (at.line or "").startswith("raise ")


def subjects_here() -> list[Subject]:
    """Interpreted, our kernels alone; otherwise everything else that this machine runs."""
    if interpreting():
        return [subject for subject in backend_subjects() if subject.name == "triton"]
    return [*backend_subjects(), *function_subjects()]


def main(record: Path | None = None, subject: str = "", way: str = "", as_json: bool = False) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subjects = [x for x in subjects_here() if subject in x.name]
    ways = {name: check for name, check in (WAYS | (ON_A_GPU if device == "cuda" else {})).items() if way in name}
    rows = try_all(subjects, device, ways)
    if as_json:
        print(json.dumps(rows))
    else:
        for row in rows:
            print(f"{row['subject']:34} {row['way']:18} {row['outcome']:8} {row['message'][:300]}".rstrip())
    if record:
        from flashlib.measure.records.record import new_record, save_record
        from flashlib.measure.records.sources import decode_sources, kernel_sources

        sources = [
            "attention.py",
            "spec.py",
            "engines.py",
            "launch/operators.py",
            "autocast.py",
            "values.py",
            *kernel_sources(),
            *decode_sources(),
        ]
        save_record(
            new_record(
                "everyday", rows, set(sources), "tests/everyday/ways.py: every way on every backend and function."
            ),
            record,
        )
    if any(row["outcome"] == "FAILS" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

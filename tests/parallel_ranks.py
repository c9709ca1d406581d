"""What each rank of a test does. Every rank draws the same problem from the same seed, and keeps its part of it."""

from __future__ import annotations

import io
import random
from typing import Any

import torch
from problems import random_problem
from torch.distributed.device_mesh import init_device_mesh

from flashlib.parallel import count_sent, parallel_attention, shard
from flashlib.parallel.layout import part_positions

LENGTHS = (0, 1, 2, 3, 5, 7, 13, 17, 33, 64, 65, 101)
HEADS = ((1, 1), (2, 2), (4, 2), (6, 2), (3, 1), (8, 1), (8, 8))
METHODS = ("ring", "all_to_all", "gather", "hybrid", "auto")


def saved(x: Any) -> bytes:
    """As bytes: tensors that go through a pipe as they are would each keep a file open."""
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def loaded(x: bytes) -> Any:
    return torch.load(io.BytesIO(x), weights_only=False)


def draw(seed: int, ranks: int, dtypes: tuple) -> tuple:
    """``(problem, method, layout, grad_out, grad_lse)`` of a seed."""
    rng = random.Random(seed)
    problem = random_problem(
        rng, lengths=LENGTHS, heads=HEADS, dtypes=dtypes, head_dims=(8, 40, 64), alibi=(None,) * 6 + ("heads",)
    )
    method = rng.choice(METHODS if ranks == 4 else METHODS[:3])
    layout = rng.choice(("contiguous", "zigzag", "striped"))
    if "alibi_slopes" in problem.options and layout == "striped":
        layout = "zigzag"
    generator = torch.Generator().manual_seed(seed)
    shape = (*problem.q.shape[:3], problem.v.shape[3])
    grad_out = torch.randn(shape, generator=generator).to(problem.q.dtype)
    grad_lse = torch.randn(shape[:3], generator=generator).to(torch.promote_types(problem.q.dtype, torch.float32))
    return problem, method, layout, grad_out, grad_lse


def solve(mesh, seeds: list[int], dtypes: tuple) -> bytes:
    """This rank's part of the results of each problem, and what it sent."""
    grid = init_device_mesh("cpu", (2, mesh.size() // 2)) if mesh.size() == 4 else None
    return saved([_solved(mesh, grid, draw(seed, mesh.size(), dtypes)) for seed in seeds])


def _solved(mesh, grid, drawn: tuple) -> dict[str, Any]:
    problem, method, layout, grad_out, grad_lse = drawn
    used = grid if method == "hybrid" else mesh
    q, k, v = (shard(x, mesh, layout=layout).requires_grad_() for x in (problem.q, problem.k, problem.v))
    with count_sent() as forward:
        out, lse = parallel_attention(
            q, k, v, mesh=used, method=method, layout=layout, **problem.options, return_lse=True
        )
    gradients = [shard(x, mesh, layout=layout) for x in (grad_out, grad_lse)]
    with count_sent() as backward:
        found = torch.autograd.grad((out, lse), (q, k, v), gradients)
    return {"results": (out.detach(), lse.detach(), *found), "sent": (forward.data, backward.data)}


def whole(parts: list[torch.Tensor], layout: str) -> torch.Tensor:
    """What the ranks have, in the order of the sequence."""
    places = part_positions(sum(x.shape[2] for x in parts), len(parts), layout)
    return torch.cat(parts, dim=2)[:, :, torch.cat(places).argsort()]


def repeated(mesh, seeds: list[int]) -> bool:
    """Whether each problem gives the same bits twice."""
    dtypes = (torch.float32, torch.bfloat16)
    same = True
    for seed in seeds:
        drawn = draw(seed, 2, dtypes)
        one, two = (_solved(mesh, None, drawn)["results"] for _ in range(2))
        same &= all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    return same


def sent(mesh, length: int, method: str, layout: str, heads: tuple[int, int], mask, shape: tuple) -> dict[str, Any]:
    """Bytes that this rank sent, forward and backward, what the formula says, and what of the pairs were its own."""
    used = mesh if len(shape) == 1 else init_device_mesh("cpu", shape)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, count, length, 16, requires_grad=True) for count in (heads[0], heads[1], heads[1]))
    q, k, v = (shard(x, mesh, layout=layout).detach().requires_grad_() for x in (q, k, v))
    with count_sent() as forward:
        out = parallel_attention(q, k, v, mesh=used, method=method, layout=layout, mask=mask)
    with count_sent() as backward:
        out.sum().backward()
    return {"forward": forward.data, "backward": backward.data, "messages": forward.messages.get("send", 0)}


def checked_by_torch(mesh, method: str, layout: str) -> None:
    """torch.autograd.gradcheck of what all ranks compute from what rank 0 moves: rank 0 decides, the others follow."""
    torch.manual_seed(2)
    whole_ones = [torch.randn(1, heads, 5, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]

    def function(q, k, v):
        parts = [shard(_of_rank_0(x), mesh, layout=layout) for x in (q, k, v)]
        out, lse = parallel_attention(*parts, mesh=mesh, method=method, layout=layout, causal=True, return_lse=True)
        return _Everywhere.apply(out, mesh, layout), _Everywhere.apply(lse[..., None], mesh, layout)

    assert torch.autograd.gradcheck(function, whole_ones, nondet_tol=0.0)


def _of_rank_0(x: torch.Tensor) -> torch.Tensor:
    """What rank 0 has, everywhere; all ranks' gradients, added up."""
    return _FromRank0.apply(x)


class _FromRank0(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        torch.distributed.broadcast(x, 0)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


class _Everywhere(torch.autograd.Function):
    """The whole of what the ranks have. Each rank's part of the gradient goes back to it."""

    @staticmethod
    def forward(ctx, x, mesh, layout):
        from flashlib.parallel import unshard

        ctx.mesh, ctx.layout = mesh, layout
        return unshard(x.detach(), mesh, layout=layout)

    @staticmethod
    def backward(ctx, grad):
        return shard(grad, ctx.mesh, layout=ctx.layout), None, None


def with_sinks(mesh, seed: int, method: str, layout: str) -> bytes:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, heads, 19, 8) for heads in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True)
    parts = [shard(x, mesh, layout=layout).requires_grad_() for x in (q, k, v)]
    out = parallel_attention(*parts, mesh=mesh, method=method, layout=layout, causal=True, sinks=sinks)
    out.square().sum().backward()
    torch.distributed.all_reduce(sinks.grad)
    return saved((out.detach(), *(x.grad for x in parts), sinks.grad))


def on_dtensors(mesh, length: int) -> bytes:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    torch.manual_seed(3)
    q, k, v = (distribute_tensor(torch.randn(1, 4, length, 8), mesh, [Shard(2)]).requires_grad_() for _ in range(3))
    out = parallel_attention(q, k, v, causal=True)
    assert isinstance(out, DTensor) and out.placements == (Shard(2),) and out.shape == q.shape
    out.square().sum().backward()
    return saved((out.full_tensor().detach(), *(x.grad.full_tensor() for x in (q, k, v))))


def sharded_and_back(mesh, seeds: list[int]) -> bool:
    from flashlib.parallel import positions, unshard

    for seed in seeds:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        layout, dim = rng.choice(("contiguous", "zigzag", "striped")), rng.choice((0, 1, -1))
        x = torch.arange(rng.choice((0, 1, 5, 12)) * 6).view(-1, 6) if dim == 0 else torch.rand(3, rng.randint(0, 11))
        part = shard(x, mesh, layout=layout, dim=dim)
        places = positions(x.shape[dim], mesh, layout=layout)
        if not (torch.equal(unshard(part, mesh, layout=layout, dim=dim), x) and len(places) == part.shape[dim]):
            return False
    return True


def peak(mesh, length: int, method: str) -> int:
    """Bytes of the tensors that a rank holds at most at one moment of a forward and a backward pass, its inputs aside."""
    from flashlib.measure.counting.meter import TrafficMeter

    torch.manual_seed(4)
    q, k, v = (shard(torch.randn(1, 4, length, 16), mesh, layout="zigzag").requires_grad_() for _ in range(3))
    with TrafficMeter() as meter:
        out = parallel_attention(
            q,
            k,
            v,
            mesh=mesh,
            method=method,
            layout="zigzag",
            causal=True,
            backend="cpu" if _has_kernels() else "tiled",
        )
        out.sum().backward()
    return meter.peak_bytes


def _has_kernels() -> bool:
    from flashlib.backends import available

    return available()["cpu"] is None


def decoded(mesh, seed: int, ranks: int) -> bytes:
    """Steps over a cache of ragged requests that grows on all ranks: contiguous and paged."""
    from flashlib.parallel import ShardedKVCache, ShardedPagedKVCache

    cache = ShardedKVCache(mesh, 3, 2, 64, 16)
    paged = ShardedPagedKVCache(mesh, 40, 3, 2, 16)
    requests = [paged.add() for _ in range(3)]
    results = []
    for q, k, v, counts in cache_steps(seed):
        cache.append(k, v, counts)
        paged.append(requests, k, v, counts)
        results.append((cache.attend(q, return_lse=True), paged.attend(requests, q, return_lse=True)))
    cache.truncate([2, 0, 5])
    assert cache.lengths.tolist() == [2, 0, 5]
    local = cache.local.lengths.tolist()
    return saved((results, local, cache.nbytes))


def cache_steps(seed: int) -> list[tuple]:
    """``(q, k, v, counts)`` of some steps: a prompt, tokens one by one, and several guessed at once."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    steps = []
    for new in (9, 1, 1, 4, 1):
        # The newest rows of every request are real: a request gets all of them or, in the prompt, at least as many as the next step asks for.
        counts = [rng.randint(5, new) for _ in range(3)] if new == 9 else [new] * 3
        rows = 1 if new == 9 else new
        q = torch.randn(3, 4, rows, 16, generator=generator)
        k, v = (torch.randn(3, 2, new, 16, generator=generator) for _ in range(2))
        steps.append((q, k, v, torch.tensor(counts)))
    return steps


def windowed(mesh, seed: int) -> bytes:
    """A cache of one length, under a mask of the whole."""
    from flashlib import masks
    from flashlib.parallel import ShardedKVCache

    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    cache = ShardedKVCache(mesh, 2, 2, 30, 8)
    cache.append(k, v)
    return saved(cache.attend(q, mask=masks.Window(5, 0)))


def trained(mesh, steps: int, layout: str) -> list[float]:
    """Losses of a model of SmolLM2's shape, its parameters sharded by FSDP2, and each sequence spread over the ranks."""
    from torch.distributed.fsdp import fully_shard

    from flashlib.interop.transformers import set_attention
    from flashlib.parallel import positions

    model = small_smollm2()
    set_attention(model, mesh=mesh, layout=layout)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    for ids in batches(steps):
        inputs, targets = (shard(x, mesh, layout=layout, dim=1) for x in (ids[:, :-1], ids[:, 1:]))
        places = positions(ids.shape[1] - 1, mesh, layout=layout)[None]
        logits = model(inputs, position_ids=places, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss / ids[:, 1:].numel()
        (loss * mesh.size()).backward()  # FSDP takes the mean over ranks
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    return losses


def small_smollm2(dtype=torch.float32):
    """SmolLM2-135M with fewer and narrower layers: 9 query and 3 KV heads, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=256, hidden_size=144, intermediate_size=384, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
        max_position_embeddings=128, tie_word_embeddings=True, rope_theta=100000.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def batches(steps: int) -> list[torch.Tensor]:
    """Token ids, two sequences of 64 a step, of which there are two: they can be learned by heart."""
    generator = torch.Generator().manual_seed(6)
    two = torch.randint(0, 256, (2, 2, 64), generator=generator)
    return [two[step % 2] for step in range(steps)]


def generated(mesh, prompt: str, tokens: int) -> tuple[list[int], int]:
    """What SmolLM2 writes with its cache spread over the ranks, and bytes of the cache on this one."""
    from flashlib.course.models import load_smollm2
    from flashlib.interop.transformers import FlashlibCache, set_attention

    model, tokenizer = load_smollm2()
    set_attention(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    cache = FlashlibCache(capacity=64, mesh=mesh)
    ids = model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    return ids[0].tolist(), cache.nbytes


# Around it


def as_programs_call_it(mesh, how: str) -> bytes:
    """The same gradient of q, through a checkpoint, torch.compile, or none."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(9)
    q, k, v = (shard(torch.randn(1, heads, 10, 8), mesh).requires_grad_() for heads in (4, 2, 2))

    def call(q, k, v):
        return 2 * parallel_attention(q, k, v, mesh=mesh, method="ring", causal=True)

    if how == "checkpoint":
        out = checkpoint(call, q, k, v, use_reentrant=False)
    elif how == "compile":
        out = torch.compile(call, backend="eager")(q, k, v)
    else:
        out = call(q, k, v)
    out.sum().backward()
    return saved((out.detach(), q.grad, k.grad, v.grad))


def on_a_part_of_the_ranks(mesh) -> list[int] | str:
    """A mesh of the first two ranks, who have one process group more than the others by then."""
    from torch.distributed.device_mesh import DeviceMesh

    x = torch.randn(1, 2, 4, 8)
    if mesh.get_local_rank() < 2:
        return list(parallel_attention(x, x, x, mesh=DeviceMesh("cpu", [0, 1])).shape)
    try:
        parallel_attention(x, x, x, mesh=DeviceMesh("cpu", [0, 1]))
    except ValueError as error:
        return str(error)
    return "went on"


# What goes wrong


def one_goes_back(mesh) -> None:
    """Rank 0 runs the backward pass, and the others call again."""
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    out = parallel_attention(x, x, x, mesh=mesh, method="ring")
    if mesh.get_local_rank() == 0:
        out.sum().backward()
    else:
        parallel_attention(x, x, x, mesh=mesh, method="ring")


def disagreeing(mesh, about: str):
    """Rank 1 is given something else."""
    odd = mesh.get_local_rank() == 1
    heads, dim, dtype, options = 4, 8, torch.float32, {}
    if about == "head_dim":
        dim = 16 if odd else 8
    elif about == "dtype":
        dtype = torch.float64 if odd else torch.float32
    elif about == "heads":
        heads = 8 if odd else 4
    elif about == "mask":
        from flashlib import masks

        options["mask"] = masks.Window(3 if odd else 4, 0)
    elif about == "method":
        options["method"] = "gather" if odd else "ring"
    elif about == "layout":
        options["layout"] = "zigzag" if odd else "contiguous"
    elif about == "type":
        options["mask"] = torch.ones(3, 3) if odd else None
    q, k, v = (torch.randn(1, count, 6, dim, dtype=dtype) for count in (heads, 2, 2))
    if about == "lengths":
        options["layout"] = "zigzag"
        q, k, v = (x[:, :, : 5 if odd else 6] for x in (q, k, v))
    if about == "mask of other lengths":
        from flashlib import masks

        options["mask"] = masks.Documents([0] * 5)
    return parallel_attention(q, k, v, mesh=mesh, **options).shape


def failing(mesh, how: str, culprit: int) -> str:
    """One rank ends in the middle of a call, in a way of its own."""
    import os
    import time

    from flashlib.parallel import ring as inside

    torch.manual_seed(7)
    q, k, v = (torch.randn(1, 4, 8, 8, requires_grad=True) for _ in range(3))
    mine = mesh.get_local_rank() == culprit

    def stop(*_args, **_options):
        if how.startswith("killed"):
            os.kill(os.getpid(), 9)
        if how == "hangs":
            time.sleep(25)
        if how == "interrupted":
            raise KeyboardInterrupt
        raise MemoryError("out of memory, for a test")

    if mine and how == "absent":
        time.sleep(25)
        return "was elsewhere"
    if mine and not how.endswith("backward"):
        inside.unpack = stop
    try:
        out = parallel_attention(q, k, v, mesh=mesh, method="ring", causal=False)
        if mine:
            inside.unpack = stop
        out.sum().backward()
    finally:
        from flashlib.parallel import link

        inside.unpack = link.unpack
    return "went on"


def works_again(mesh) -> list[int]:
    q = torch.randn(1, 4, 8, 8)
    return list(parallel_attention(q, q, q, mesh=mesh).shape)

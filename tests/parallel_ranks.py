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
    grid = init_device_mesh("cpu", (2, mesh.size() // 2)) if mesh.size() > 2 else None
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

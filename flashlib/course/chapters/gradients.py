"""What chapter 09 runs: contributions to dQ and the order they are summed in, finite differences, and a model that learns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flashlib.course.display import Table, table
from flashlib.course.models import sample_text
from flashlib.measure.records.record import BENCHMARKS, Record, load_record
from flashlib.reference import naive_attention, oracle, oracle_gradients

__all__ = [
    "contributions_to_dq",
    "dense_steps",
    "finite_difference_error",
    "recorded_backward",
    "sum_in_order",
    "training_losses",
]


def dense_steps(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, *, causal: bool = False) -> dict[str, Tensor]:
    """The dense steps of the backward, in float64: ``p``, ``dp``, ``ds`` ``[B, H, Sq, Sk]``, ``delta`` ``[B, H, Sq]``, ``out``.

    Dao et al. 2022, FlashAttention (arXiv 2205.14135), appendix B.2. For small inputs: it makes the N x N matrices.

    Args:
        q, k, v: ``[B, H, Sq, D]``, ``[B, H, Sk, D]``, ``[B, H, Sk, Dv]``, as many KV heads as query heads.
        grad_out: ``[B, H, Sq, Dv]``.
    """
    q, k, v, grad_out = (x.double() for x in (q, k, v, grad_out))
    out, lse = oracle(q, k, v, causal=causal)
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(s.shape[-1] - s.shape[-2] + 1)
        s = s.masked_fill(hidden, float("-inf"))
    p = torch.exp(s - lse[..., None])
    dp = grad_out @ v.mT
    delta = (grad_out * out).sum(-1)
    return {"p": p, "dp": dp, "ds": p * (dp - delta[..., None]), "delta": delta, "out": out}


def contributions_to_dq(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, block_k: int, *, causal: bool = False
) -> Tensor:
    """What each block of keys adds to dQ, in float32: ``[blocks, B, H, Sq, D]``. Their sum over the first axis is dQ.

    Args:
        q, k, v, grad_out, causal: as in :func:`dense_steps`.
        block_k: keys of a block.
    """
    ds = dense_steps(q, k, v, grad_out, causal=causal)["ds"].float() * q.shape[-1] ** -0.5
    pairs = zip(ds.split(block_k, -1), k.float().split(block_k, -2), strict=True)
    return torch.stack([ds_block @ k_block for ds_block, k_block in pairs])


def sum_in_order(parts: Tensor, order: Sequence[int] | Tensor) -> Tensor:
    """``parts[order[0]] + parts[order[1]] + ...``, one addition after the other, in the dtype of ``parts``.

    Args:
        parts: ``[count, ...]``.
        order: each of 0 .. count - 1 once.
    """
    order = [int(i) for i in order]
    if sorted(order) != list(range(len(parts))):
        raise ValueError(f"order must hold each of 0 .. {len(parts) - 1} once; got {order}")
    total = torch.zeros_like(parts[0])
    for i in order:
        total = total + parts[i]
    return total


def finite_difference_error(step: float, dtype: torch.dtype, *, seed: int = 0) -> float:
    """Relative error of a finite difference of attention: ``(f(q + step * d) - f(q - step * d)) / (2 * step)``.

    f is a weighted sum of the output of causal attention (2 heads, 16 tokens, 8 channels), and d a random direction. It is held
    against the gradient in float64.

    Args:
        step: how far to go, greater than 0.
        dtype: in which f is computed.
        seed: of the inputs and the direction.
    """
    if not step > 0:
        raise ValueError(f"step must be greater than 0; got {step}")
    generator = torch.Generator().manual_seed(seed)
    q, k, v, weights, direction = torch.randn(5, 1, 2, 16, 8, generator=generator, dtype=torch.float64)
    slope = float((oracle_gradients(q, k, v, weights, causal=True)[0] * direction).sum())

    def f(moved: Tensor) -> float:
        inputs = (x.to(dtype) for x in (moved, k, v))
        return float((naive_attention(*inputs, causal=True) * weights.to(dtype)).sum())

    difference = (f(q + step * direction) - f(q - step * direction)) / (2 * step)
    return abs(difference - slope) / abs(slope)


class CharacterModel(nn.Module):
    """One layer of causal attention between an embedding and a readout: enough to learn which character follows which."""

    def __init__(self, characters: int, attend: Callable[..., Tensor], heads: int = 2, head_dim: int = 16) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        width = heads * head_dim
        self.embed = nn.Embedding(characters, width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.readout = nn.Linear(width, characters)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)  # [B, S, width]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        out = self.attend(q, k, v, causal=True)  # [B, heads, S, head_dim]
        return self.readout(x + out.transpose(1, 2).flatten(2))


def training_losses(attend: Callable[..., Tensor], steps: int = 5, *, batch: int = 1, length: int = 48) -> list[float]:
    """Losses of a small model that learns the characters of *Alice*, one for each step; the same start and text each time.

    Args:
        attend: ``attend(q, k, v, causal=True)``, q, k and v ``[B, H, S, D]``.
        steps: of Adam.
        batch, length: sequences in a step, and characters in a sequence.
    """
    text = sample_text()
    ids = torch.tensor([ord(c) for c in text[: steps * batch * (length + 1)]]).view(steps, batch, length + 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CharacterModel(128, attend)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for chunk in ids:
        loss = nn.functional.cross_entropy(model(chunk[:, :-1]).flatten(0, 1), chunk[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def recorded_backward(peer: str = "triton") -> Table:
    """Speed of the backward in all records: our kernels, and the fastest other implementation of the same run.

    A case that was recorded again since the kernels changed is shown once, as it is now.

    Args:
        peer: whose speed is set against the others'.
    """
    records = [
        load_record(str(path.relative_to(BENCHMARKS).with_suffix(""))) for path in sorted(BENCHMARKS.rglob("*.json"))
    ]
    found, notes = {}, {}
    for record in sorted(records, key=lambda record: not record.stale):
        for *case, ours, fastest, name in _backward_rows(record, peer):
            found[tuple(case)] = ours, fastest, name, "STALE" if record.stale else "as they are"
            notes[record.label] = None
    rows = [(*case, *figures) for case, figures in sorted(found.items())]
    header = ["S", "D", "mask", f"{peer} (TFLOP/s)", "fastest other (TFLOP/s)", "named", "kernels"]
    return table(rows, header, notes=list(notes) or ["no speed of the backward is recorded yet"])


def _backward_rows(record: Record, peer: str) -> list[tuple]:
    speeds: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in record.rows:
        if row.get("direction") == "backward" and row.get("tflops"):
            speeds[row["length"], row["head_dim"], row["mask"]][row["peer"]] = row["tflops"]
    rows = []
    for case, rates in speeds.items():
        others = {name: rate for name, rate in rates.items() if name != peer}
        if peer in rates and others:
            best = max(others, key=others.get)
            rows.append((*case, round(rates[peer]), round(others[best]), best))
    return rows

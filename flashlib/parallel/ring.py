"""Keys that come by: the ring, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashlib.autocast import autocast_off
from flashlib.launch.engines import Engine, name_of, no_second_derivative
from flashlib.parallel.link import Link, Pending, nbytes, pack, unpack
from flashlib.parallel.plan import Piece, Plan
from flashlib.partial import Partial, merge

__all__ = ["Ring", "ring_attention"]


@dataclass(frozen=True)
class Ring:
    """How the members of a ring compute one call.

    Attributes:
        members: their places in the link. plan: who needs which keys, by member.
        numbers: slopes ``[B or 1, Hq]`` or None, scale, softcap.
        gather: all steps at once.
    """

    link: Link
    members: Sequence[int]
    plan: Plan
    engine: Engine
    numbers: tuple[Tensor | None, float, float]
    gather: bool

    @property
    def me(self) -> int:
        return list(self.members).index(self.link.rank)

    def before(self, step: int) -> int:
        return (self.me - step) % len(self.members)

    def after(self, step: int) -> int:
        return (self.me + step) % len(self.members)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of this rank's rows over all keys of the ring, on the autograd graph."""
    return _RingAttention.apply(q, k, v, ring)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ring):
        with ring.link.working():
            out, lse = _forward(q, k, v, ring)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return *_RingGradients.apply(*ctx.saved_tensors, grad_out, grad_lse, ctx.ring), None


class _RingGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, out, lse, grad_out, grad_lse, ring):
        ctx.engine = ring.engine
        with ring.link.call("the backward pass of parallel_attention"), autocast_off(q.device):
            ring.link.agree(lambda: {"backward pass of a ring": 1})
            with ring.link.working():
                return _backward(q, k, v, out, lse, grad_out, grad_lse, ring)

    @staticmethod
    def backward(ctx, *_):
        raise no_second_derivative(name_of(ctx.engine))


class _Steps:
    """The keys of each step, with those of the next one on their way."""

    def __init__(self, ring: Ring, k: Tensor, v: Tensor) -> None:
        self.ring, self.k, self.v = ring, k, v
        self.plan, self.me = ring.plan, ring.me
        self.count = len(ring.members)

    def wanted(self, step: int) -> Tensor:
        """Which keys of the member ``step`` places before are needed here."""
        return self.plan.needed(self.me, self.ring.before(step))

    def given(self, step: int) -> Tensor:
        """Which keys are needed by the member ``step`` places after."""
        return self.plan.needed(self.ring.after(step), self.me)

    def positions(self, step: int) -> Tensor:
        """Of the keys at hand in a step, in the whole sequence."""
        return self.plan.at_hand(self.me, self.ring.before(step))

    def shapes(self, count: int) -> list:
        return [((*x.shape[:2], count, x.shape[3]), x.dtype) for x in (self.k, self.v)]

    def begin(self, steps: Sequence[int]) -> Pending:
        sends, receives = {}, {}
        for step in steps:
            keys = _index(self.given(step), self.k.device)
            sends[self.ring.members[self.ring.after(step)]] = pack([_taken(x, keys) for x in (self.k, self.v)])
            receives[self.ring.members[self.ring.before(step)]] = nbytes(self.shapes(len(self.wanted(step))))
        return self.ring.link.exchange(sends, receives, self.k.device)

    def received(self, pending: Pending, step: int) -> tuple[Tensor, Tensor]:
        message = pending.wait()[self.ring.members[self.ring.before(step)]]
        k, v = unpack(message, self.shapes(len(self.wanted(step))))
        return k, v

    def __iter__(self):
        """``(step, pieces, k, v)``, this rank's own keys first; all at once where they are gathered."""
        others = range(1, self.count)
        if self.ring.gather:
            pending = self.begin(others)
            parts = [(self.k, self.v), *(self.received(pending, step) for step in others)]
            at = torch.cat([self.positions(step) for step in range(self.count)]).argsort().to(self.k.device)
            k, v = (torch.cat(side, dim=2).index_select(2, at) for side in zip(*parts, strict=True))
            yield 0, self.plan.pieces(self.me, None), k, v
            return
        pending = self.begin([1]) if self.count > 1 else None
        k, v = self.k, self.v
        for step in range(self.count):
            yield step, self.plan.pieces(self.me, self.ring.before(step)), k, v
            if step + 1 < self.count:
                assert pending is not None
                k, v = self.received(pending, step + 1)
                pending = self.begin([step + 2]) if step + 2 < self.count else None


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    total = Partial.identity(*q.shape[:3], v.shape[3], dtype=accumulate, device=q.device)
    untouched = True
    for _, pieces, k_part, v_part in _Steps(ring, k, v):
        for piece in pieces:
            rows = piece.rows
            inputs = (q[:, :, rows], k_part[:, :, piece.keys], v_part[:, :, piece.keys])
            if any(x.numel() == 0 for x in inputs):
                continue
            out, lse = ring.engine.forward(*inputs, _numbers(piece, ring, q))
            found = Partial(out.to(accumulate), lse.to(accumulate))
            if not untouched:  # merging with nothing would change no bit
                found = merge(Partial(total.out[:, :, rows], total.lse[:, :, rows]), found)
            total.out[:, :, rows], total.lse[:, :, rows] = found.out, found.lse
            untouched = False
    return total.out.to(q.dtype), total.lse


def _backward(q, k, v, out, lse, grad_out, grad_lse, ring: Ring) -> tuple[Tensor, Tensor, Tensor]:
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = (torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in (q, k, v))
    steps = _Steps(ring, k, v)
    returning: list[tuple[Pending, int]] = []

    def add_returned(pending: Pending, step: int) -> None:
        """What the member ``step`` places after found for the keys that it was sent."""
        mine = steps.given(step)
        message = pending.wait()[ring.members[ring.after(step)]]
        for total, part in zip((dk, dv), unpack(message, steps.shapes(len(mine))), strict=True):
            total.index_add_(2, mine.to(total.device), part.to(accumulate))

    for step, pieces, k_part, v_part in steps:
        dk_part, dv_part = (torch.zeros(x.shape, dtype=accumulate, device=x.device) for x in (k_part, v_part))
        for piece in pieces:
            rows = piece.rows
            inputs = (q[:, :, rows], k_part[:, :, piece.keys], v_part[:, :, piece.keys])
            if any(x.numel() == 0 for x in inputs):
                continue
            of_rows = out[:, :, rows], lse[:, :, rows], grad_out[:, :, rows]
            grad_of_lse = None if grad_lse is None else grad_lse[:, :, rows]
            found = ring.engine.backward(*inputs, *of_rows, grad_of_lse, _numbers(piece, ring, q))
            for total, part in zip(
                (dq[:, :, rows], dk_part[:, :, piece.keys], dv_part[:, :, piece.keys]), found, strict=True
            ):
                total += part
        if ring.gather:
            _give_back_all(steps, dk_part, dv_part, dk, dv)
        elif step == 0:
            dk += dk_part
            dv += dv_part
        else:
            while returning:
                add_returned(*returning.pop(0))
            owner, user = ring.members[ring.before(step)], ring.members[ring.after(step)]
            message = pack([dk_part.to(k.dtype), dv_part.to(v.dtype)])
            size = nbytes(steps.shapes(len(steps.given(step))))
            returning.append((ring.link.exchange({owner: message}, {user: size}, k.device), step))
    while returning:
        add_returned(*returning.pop(0))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _give_back_all(steps: _Steps, dk_all: Tensor, dv_all: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Gradients of gathered keys, to those whose keys they are."""
    ring, others, keys = steps.ring, range(1, steps.count), steps.plan.gathered(steps.me)
    sends, receives = {}, {}
    for step in others:
        at = torch.searchsorted(keys, steps.positions(step)).to(dk.device)
        sends[ring.members[ring.before(step)]] = pack(
            [dk_all[:, :, at].to(steps.k.dtype), dv_all[:, :, at].to(steps.v.dtype)]
        )
        receives[ring.members[ring.after(step)]] = nbytes(steps.shapes(len(steps.given(step))))
    pending = ring.link.exchange(sends, receives, dk.device)
    own = torch.searchsorted(keys, steps.plan.keys[steps.me]).to(dk.device)
    dk += dk_all[:, :, own]
    dv += dv_all[:, :, own]
    received = pending.wait()
    for step in others:
        mine = steps.given(step)
        parts = unpack(received[ring.members[ring.after(step)]], steps.shapes(len(mine)))
        for total, part in zip((dk, dv), parts, strict=True):
            total.index_add_(2, mine.to(total.device), part.to(total.dtype))


def _numbers(piece: Piece, ring: Ring, q: Tensor) -> tuple:
    """What an engine must know of a piece, as :meth:`flashlib.AttentionSpec.numbers`."""
    slopes, scale, softcap = ring.numbers
    offsets = None
    if slopes is not None:
        assert piece.offsets is not None
        offsets = piece.offsets.to(q.device)
        slopes = slopes[..., None].expand(-1, -1, piece.rows.stop - piece.rows.start).contiguous()
    return *piece.numbers(q.device), slopes, offsets, scale, softcap, 0.0, None


def _index(keys: Tensor, device: torch.device) -> slice | Tensor:
    """Some keys as a slice, if they are a run: then they are not copied twice."""
    if len(keys) == 0:
        return slice(0, 0)
    first, last = int(keys[0]), int(keys[-1])
    return slice(first, last + 1) if last - first + 1 == len(keys) else keys.to(device)


def _taken(x: Tensor, keys: slice | Tensor) -> Tensor:
    return x[:, :, keys]

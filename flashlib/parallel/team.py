"""Tokens for heads, and back: what the members of a team exchange before and after attention.

Each member gets some of the query heads, as equally many as they can be, and the KV heads that those use. Where there are fewer KV heads than members,
several get the same one, and its gradients are added up where it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from flashlib.parallel.link import Link, nbytes, pack, unpack
from flashlib.spec import AttentionSpec

__all__ = ["Team", "head_ranges", "to_heads", "to_tokens"]


def head_ranges(q_heads: int, kv_heads: int, members: int) -> list[tuple[slice, slice]]:
    """The query heads of each member of a team, and the KV heads that they use; both may be empty."""
    group = q_heads // kv_heads
    cuts = [q_heads * n // members for n in range(members + 1)]
    found = []
    for first, last in pairwise(cuts):
        found.append(
            (slice(first, last), slice(first // group, (last - 1) // group + 1) if first < last else slice(0, 0))
        )
    return found


@dataclass(frozen=True)
class Team:
    """The members of a team, and which tokens are whose.

    Attributes:
        members: their places in the link.
        q_places, k_places: positions of the tokens of every rank of the link.
    """

    link: Link
    members: Sequence[int]
    spec: AttentionSpec
    q_places: Sequence[Tensor]
    k_places: Sequence[Tensor]
    ranges: list[tuple[slice, slice]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", head_ranges(self.spec.q_heads, self.spec.kv_heads, len(self.members)))

    @property
    def me(self) -> int:
        return list(self.members).index(self.link.rank)

    @property
    def q_heads(self) -> slice:
        return self.ranges[self.me][0]

    def order(self, places: Sequence[Tensor]) -> Tensor:
        """Where each token of the team, one member's after another's, stands among all of them."""
        return torch.cat([places[member] for member in self.members]).argsort()

    def groups(self) -> Tensor | None:
        """The KV head of each of this rank's query heads, among those it got; None where they are shared out evenly, as GQA has it."""
        mine, used = self.ranges[self.me]
        group = self.spec.group_size
        heads = torch.arange(mine.start, mine.stop, device="cpu") // group - used.start
        count, kv = len(heads), used.stop - used.start
        if kv and count % kv == 0 and torch.equal(heads, torch.arange(count, device="cpu") // (count // kv)):
            return None
        return heads


def to_heads(q: Tensor, k: Tensor, v: Tensor, team: Team) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, some heads, all tokens of the team, D]``, in the order of the sequence, of this rank's q, k and v. On the autograd graph."""
    q, k, v = _ToHeads.apply(q, k, v, team)
    groups = team.groups()
    if groups is not None:
        k, v = (x.index_select(1, groups.to(x.device)) for x in (k, v))
    return q, k, v


def to_tokens(out: Tensor, lse: Tensor | None, team: Team) -> tuple[Tensor, Tensor | None]:
    """This rank's rows, all heads, of results for some heads and all rows of the team. On the autograd graph."""
    if lse is None:
        return _ToTokens.apply(team, out)[0], None
    lse, out = _ToTokens.apply(team, lse[..., None], out)
    return out, lse[..., 0]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, team):
        ctx.team = team
        return _gather_tokens([q, k, v], team, [0, 1, 1])

    @staticmethod
    def backward(ctx, dq, dk, dv):
        team = ctx.team
        with team.link.call("the backward pass of parallel_attention"):
            team.link.agree(lambda: {"backward pass of a team, to its tokens": 1})
            return *_scatter_tokens([dq, dk, dv], team, [0, 1, 1]), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, team, *results):
        ctx.team = team
        return tuple(_scatter_tokens(list(results), team, [0] * len(results)))

    @staticmethod
    def backward(ctx, *gradients):
        team = ctx.team
        with team.link.call("the backward pass of parallel_attention"):
            team.link.agree(lambda: {"backward pass of a team, to its heads": 1})
            return None, *_gather_tokens(list(gradients), team, [0] * len(gradients))


def _gather_tokens(tensors: list[Tensor], team: Team, sides: list[int]) -> tuple[Tensor, ...]:
    """Own tokens and all heads, to own heads and all tokens. ``sides``: 0 for what is shaped like queries, 1 for keys."""
    me = team.me
    lengths = [_lengths(team, side) for side in sides]

    def parts(member: int) -> list[Tensor]:
        return [x[:, team.ranges[member][side]] for x, side in zip(tensors, sides, strict=True)]

    def shapes(member: int) -> list:
        heads = [team.ranges[me][side] for side in sides]
        return [
            ((x.shape[0], held.stop - held.start, length[member], x.shape[3]), x.dtype)
            for x, held, length in zip(tensors, heads, lengths, strict=True)
        ]

    with team.link.working():
        received = _all_to_all(team, parts, shapes, tensors[0].device)
    found = []
    for n, side in enumerate(sides):
        places = team.k_places if side else team.q_places
        joined = torch.cat([received[member][n] for member in range(len(team.members))], dim=2)
        found.append(joined.index_select(2, team.order(places).to(joined.device)))
    return tuple(found)


def _scatter_tokens(tensors: list[Tensor], team: Team, sides: list[int]) -> tuple[Tensor, ...]:
    """The transpose of :func:`_gather_tokens`: heads that several members have are added up, first to last."""
    me = team.me
    totals = (team.spec.q_heads, team.spec.kv_heads)
    split = []
    for x, side in zip(tensors, sides, strict=True):
        places = team.k_places if side else team.q_places
        back = team.order(places).argsort().to(x.device)
        split.append(x.index_select(2, back).split(_lengths(team, side), dim=2))

    def parts(member: int) -> list[Tensor]:
        return [pieces[member] for pieces in split]

    def shapes(member: int) -> list:
        return [
            ((x.shape[0], team.ranges[member][side].stop - team.ranges[member][side].start, _lengths(team, side)[me], x.shape[3]), x.dtype)
            for x, side in zip(tensors, sides, strict=True)
        ]  # fmt: skip

    with team.link.working():
        received = _all_to_all(team, parts, shapes, tensors[0].device)
    found = []
    for n, (x, side) in enumerate(zip(tensors, sides, strict=True)):
        accumulate = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros(
            x.shape[0], totals[side], _lengths(team, side)[me], x.shape[3], dtype=accumulate, device=x.device
        )
        for member in range(len(team.members)):
            total[:, team.ranges[member][side]] += received[member][n]
        found.append(total.to(x.dtype))
    return tuple(found)


def _all_to_all(team: Team, parts, shapes, device: torch.device) -> list[list[Tensor]]:
    """What each member has for this one; ``parts`` and ``shapes`` say what is sent to a member, and what comes from it."""
    me, others = team.me, [member for member in range(len(team.members)) if member != team.me]
    sends = {team.members[member]: pack(parts(member)) for member in others}
    receives = {team.members[member]: nbytes(shapes(member)) for member in others}
    received = team.link.exchange(sends, receives, device).wait()
    return [
        parts(me) if member == me else unpack(received[team.members[member]], shapes(member))
        for member in range(len(team.members))
    ]


def _lengths(team: Team, side: int) -> list[int]:
    places = team.k_places if side else team.q_places
    return [len(places[member]) for member in team.members]

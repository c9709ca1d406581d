"""FlashAttention in plain PyTorch: the algorithm of chapter 3, forward and backward, for any tile sizes and any mask.

The score matrix ``S = scale * Q K^T`` is never made. It is visited in tiles of ``block_q`` rows by ``block_k`` keys, and each
row carries what the tiles seen so far amount to::

    m  [rows]      the largest score so far (the pivot that keeps exp from overflowing)
    l  [rows]      sum of exp(score - m)
    acc [rows, Dv] sum of exp(score - m) * v

When a tile raises ``m``, the old ``l`` and ``acc`` are multiplied by ``exp(m_old - m_new)``. At the end
``out = acc / l`` and ``lse = m + log l``.

Sources: Dao et al. 2022, FlashAttention (arXiv 2205.14135), algorithms 1 and 4; Dao 2023, FlashAttention-2
(arXiv 2307.08691), algorithms 1 and 2.

Shapes below: ``G`` query heads share each KV head, and their rows are stacked into one tile, so that a tile of K and V is
loaded once for all of them: q tile ``[B, Hkv, G * rows, D]``, k tile ``[B, Hkv, keys, D]``, scores ``[B, Hkv, G * rows, keys]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashlib.masks import Tile
from flashlib.spec import AttentionSpec

__all__ = ["LOOP_ORDERS", "Tiling"]

LOOP_ORDERS = ("q_outer", "kv_outer")


@dataclass(frozen=True)
class Tiling:
    """How the score matrix is cut and in which order its tiles are visited.

    Attributes:
        block_q, block_k: rows and keys of a tile.
        loop_order: ``"q_outer"`` finishes one block of rows before the next (FlashAttention-2); ``"kv_outer"`` loads each
            block of keys once and lets every row pass by it (FlashAttention-1).
    """

    block_q: int = 128
    block_k: int = 128
    loop_order: str = "q_outer"

    def __post_init__(self):
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {size!r}")
        if self.loop_order not in LOOP_ORDERS:
            raise ValueError(f"loop_order must be one of {', '.join(LOOP_ORDERS)}; got {self.loop_order!r}")


def tiled_forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of a checked problem. Shapes as in :func:`flashlib.backends.pytorch.tiled_attention`."""
    out = torch.empty(spec.out_shape, dtype=spec.dtype, device=spec.device)
    lse = torch.empty(spec.out_shape[:3], dtype=spec.accumulate_dtype, device=spec.device)
    forward = _forward_q_outer if tiling.loop_order == "q_outer" else _forward_kv_outer
    forward(_grouped(q, spec), k, v, _grouped(out, spec), _grouped(lse, spec), spec, tiling)
    return out, lse


def _forward_q_outer(q, k, v, out, lse, spec, tiling):
    """FlashAttention-2, algorithm 1: a block of rows stays in fast memory while all the keys pass by. O is written once."""
    for rows in blocks(spec.q_len, tiling.block_q):
        q_tile = _load(q, rows, spec)
        state = _empty_state(q_tile, spec)
        for keys in blocks(spec.kv_len, tiling.block_k):
            tile = visible_tile(spec, rows, keys)
            if tile.kind is not Tile.SKIP:
                k_tile, v_tile = tile.load_keys(k, spec), tile.load_keys(v, spec)
                scores, _ = _scores(q_tile, k_tile, tile, spec)
                state = online_softmax_step(state, scores, v_tile, tile.keep_factors(spec))
        tile_out, tile_lse = _finish(state)
        _store(out, rows, tile_out)
        _store(lse, rows, tile_lse)


def _forward_kv_outer(q, k, v, out, lse, spec, tiling):
    """FlashAttention-1, algorithm 1: a block of keys stays in fast memory while all the rows pass by.

    Every row's state lives in slow memory between visits: m, l and the output are read and written once per block of keys.
    That traffic is what FlashAttention-2 saved by swapping the loops.
    """
    states = [_empty_state(_load(q, rows, spec), spec) for rows in blocks(spec.q_len, tiling.block_q)]
    for keys in blocks(spec.kv_len, tiling.block_k):
        for i, rows in enumerate(blocks(spec.q_len, tiling.block_q)):
            tile = visible_tile(spec, rows, keys)
            if tile.kind is not Tile.SKIP:
                k_tile, v_tile = tile.load_keys(k, spec), tile.load_keys(v, spec)
                scores, _ = _scores(_load(q, rows, spec), k_tile, tile, spec)
                states[i] = online_softmax_step(states[i], scores, v_tile, tile.keep_factors(spec))
    for state, rows in zip(states, blocks(spec.q_len, tiling.block_q), strict=True):
        tile_out, tile_lse = _finish(state)
        _store(out, rows, tile_out)
        _store(lse, rows, tile_lse)


def online_softmax_step(
    state: tuple[Tensor, Tensor, Tensor], scores: Tensor, v_tile: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one more tile of scores into the running softmax (FlashAttention-2, algorithm 1, lines 9 and 10).

    Args:
        state: m, l ``[..., rows]`` and acc ``[..., rows, Dv]``.
        scores: ``[..., rows, keys]``, -inf where masked.
        v_tile: ``[..., keys, Dv]``.
        keep: what dropout multiplies the weights by, shaped like the scores; None without dropout. l, the softmax's own sum, knows nothing of it.

    Returns:
        the new state.
    """
    m, l, acc = state
    m_new = torch.maximum(m, scores.amax(-1))
    # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN. Any finite pivot does for it: all its terms are 0.
    pivot = m_new.masked_fill(m_new == float("-inf"), 0.0)
    p = torch.exp(scores - pivot[..., None])
    rescale = torch.exp(m - pivot)
    weights = p if keep is None else p * keep
    return m_new, l * rescale + p.sum(-1), acc * rescale[..., None] + weights @ v_tile


def _empty_state(q_tile: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """m, l and acc of rows that have seen no key yet. m must be -inf, not 0: all the scores may be below 0."""
    rows = q_tile.shape[:-1]
    return (
        q_tile.new_full(rows, float("-inf")),
        q_tile.new_zeros(rows),
        q_tile.new_zeros(*rows, spec.v_head_dim),
    )


def _finish(state: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The one division: ``out = acc / l`` and ``lse = m + log l``. A row that saw nothing (l = 0) gives 0 and -inf."""
    m, l, acc = state
    return acc / l.masked_fill(l == 0, 1.0)[..., None], m + l.log()


def tiled_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    spec: AttentionSpec,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the saved LSE: P is recomputed tile by tile, never stored (FlashAttention-2, algorithm 2).

    With P = exp(S - lse)::

        dV = P^T dO        dP = dO V^T        dS = P * (dP - delta)        delta = rowsum(dO * O) - dLSE
        dQ = scale * dS K                     dK = scale * dS^T Q

    The LSE's own gradient enters through delta alone, since d lse / d S = P. Under dropout, which multiplies P by M on its way to O, M stands
    at both products with V's side: dV = (M * P)^T dO and dP = M * (dO V^T); delta is rowsum(dO * O) - dLSE as ever.

    Args:
        q, k, v: the inputs of the forward pass. out, lse: its results.
        grad_out: ``[B, Hq, Sq, Dv]``. grad_lse: ``[B, Hq, Sq]`` or None.

    Returns:
        dq, dk, dv, shaped and typed like q, k, v.
    """
    delta = (grad_out.to(spec.accumulate_dtype) * out.to(spec.accumulate_dtype)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    dq, dk, dv = (torch.zeros(x.shape, dtype=spec.accumulate_dtype, device=spec.device) for x in (q, k, v))
    q, grad_out, lse, delta, dq_grouped = (_grouped(x, spec) for x in (q, grad_out, lse, delta, dq))
    for rows, keys in _tile_pairs(spec, tiling):
        tile = visible_tile(spec, rows, keys)
        if tile.kind is Tile.SKIP:
            continue
        q_tile, do_tile = tile.load_rows(q, spec), tile.load_rows(grad_out, spec)
        k_tile, v_tile = tile.load_keys(k, spec), tile.load_keys(v, spec)
        scores, slope = _scores(q_tile, k_tile, tile, spec)
        row_lse = lse[:, :, :, rows].flatten(2, 3)
        # A row that saw nothing has lse = -inf; with any finite number in its place all its P are exp(-inf) = 0.
        p = torch.exp(scores - row_lse.masked_fill(row_lse == float("-inf"), 0.0)[..., None])
        dp = do_tile @ v_tile.mT
        weights, keep = p, tile.keep_factors(spec)
        if keep is not None:
            dp, weights = dp * keep, p * keep
        ds = p * (dp - delta[:, :, :, rows].flatten(2, 3)[..., None]) * spec.scale
        if slope is not None:
            ds = ds * slope
        dv[:, :, keys] += weights.mT @ do_tile
        dk[:, :, keys] += ds.mT @ q_tile
        dq_grouped[:, :, :, rows] += (ds @ k_tile).unflatten(2, (spec.group_size, rows.stop - rows.start))
    return dq.to(spec.dtype), dk.to(spec.dtype), dv.to(spec.dtype)


def tiled_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    spec: AttentionSpec,
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:
    """How ``(out, lse)`` move when q, k and v move along ``tangents``, formed tile by tile from the saved LSE.

    With S' the tangent of the masked scores::

        lse' = rowsum(P * S')        out' = P V' + (P * (S' - lse')) V

    so that one pass sums P V', (P * S') V and rowsum(P * S'), and ``lse' * out`` is taken off at the end. Under dropout P counts in the first two sums
    as it reaches V.

    Args:
        q, k, v: the inputs of the forward pass. out, lse: its results.
        tangents: of q, k and v, shaped like them; None for one that does not move.

    Returns:
        the tangents of out and lse, shaped and typed like them.
    """
    dq, dk, dv = (torch.zeros_like(x) if dx is None else dx for x, dx in zip((q, k, v), tangents, strict=True))
    q, dq, lse, out = (_grouped(x, spec) for x in (q, dq, lse, out))
    moved_out, moved_lse = [], []
    for rows in blocks(spec.q_len, tiling.block_q):
        total = out.new_zeros((), dtype=spec.accumulate_dtype)
        shift = lse.new_zeros(())
        for keys in blocks(spec.kv_len, tiling.block_k):
            tile = visible_tile(spec, rows, keys)
            if tile.kind is Tile.SKIP:
                continue
            q_tile, dq_tile = tile.load_rows(q, spec), tile.load_rows(dq, spec)
            k_tile, dk_tile, v_tile, dv_tile = (tile.load_keys(x, spec) for x in (k, dk, v, dv))
            scores, slope = _scores(q_tile, k_tile, tile, spec)
            row_lse = lse[:, :, :, rows].flatten(2, 3)
            p = torch.exp(scores - row_lse.masked_fill(row_lse == float("-inf"), 0.0)[..., None])
            ds = (dq_tile @ k_tile.mT + q_tile @ dk_tile.mT) * spec.scale
            ds = ds if slope is None else ds * slope
            keep = tile.keep_factors(spec)
            weights = p if keep is None else p * keep
            total = total + weights @ dv_tile + (weights * ds) @ v_tile
            shift = shift + (p * ds).sum(-1)
        tile_out = out[:, :, :, rows].to(spec.accumulate_dtype).flatten(2, 3)
        moved = (total - shift[..., None] * tile_out).expand_as(tile_out)
        moved_out.append(moved.unflatten(2, (spec.group_size, -1)).to(spec.dtype))
        moved_lse.append(shift.expand(tile_out.shape[:-1]).unflatten(2, (spec.group_size, -1)))
    return torch.cat(moved_out, dim=3).flatten(1, 2), torch.cat(moved_lse, dim=3).flatten(1, 2)


def blocks(length: int, block: int) -> Iterator[slice]:
    """``0:block``, ``block:2*block``, ...; the last may be shorter."""
    return (slice(first, min(first + block, length)) for first in range(0, length, block))


def _tile_pairs(spec: AttentionSpec, tiling: Tiling) -> Iterator[tuple[slice, slice]]:
    if tiling.loop_order == "q_outer":
        return ((r, c) for r in blocks(spec.q_len, tiling.block_q) for c in blocks(spec.kv_len, tiling.block_k))
    return ((r, c) for c in blocks(spec.kv_len, tiling.block_k) for r in blocks(spec.q_len, tiling.block_q))


@dataclass(frozen=True, eq=False)
class VisibleTile:
    """One tile of the mask: its kind and, if it is PARTIAL, which pairs are visible (bool ``[B or 1, 1, rows, keys]``)."""

    kind: Tile
    rows: slice
    keys: slice
    pairs: Tensor | None

    def load_keys(self, x: Tensor, spec: AttentionSpec) -> Tensor:
        """This tile's keys of K or V: ``[B, Hkv, keys, D]``, blank where no row of the tile looks (``0 * NaN`` is NaN)."""
        tile = x[:, :, self.keys].to(spec.accumulate_dtype)
        return tile if self.pairs is None else tile.masked_fill(~self.pairs.any(2)[..., None], 0.0)

    def load_rows(self, x: Tensor, spec: AttentionSpec) -> Tensor:
        """This tile's rows of a grouped Q or dO: ``[B, Hkv, G * rows, D]``, blank where a row sees none of the tile's keys."""
        tile = x[:, :, :, self.rows].to(spec.accumulate_dtype)
        if self.pairs is not None:
            tile = tile.masked_fill(~self.pairs.any(3)[:, :, None, :, None], 0.0)
        return tile.flatten(2, 3)

    def keep_factors(self, spec: AttentionSpec) -> Tensor | None:
        """What dropout multiplies this tile's weights by, ``[B, Hkv, G * rows, keys]``; None without dropout."""
        keep = spec.keep_factors(self.rows, self.keys)
        return None if keep is None else _grouped(keep, spec).flatten(2, 3)


def visible_tile(spec: AttentionSpec, rows: slice, keys: slice) -> VisibleTile:
    kind = spec.intervals.classify(rows, keys)
    pairs = spec.intervals.tile(rows, keys)[:, None] if kind is Tile.PARTIAL else None
    return VisibleTile(kind, rows, keys, pairs)


def _scores(q_tile: Tensor, k_tile: Tensor, tile: VisibleTile, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """Masked scores ``[B, Hkv, G * rows, keys]``, and the slope of the softcap (None without one)."""
    scores = (q_tile @ k_tile.mT) * spec.scale
    slope = None
    if spec.softcap:
        squashed = torch.tanh(scores / spec.softcap)
        scores, slope = spec.softcap * squashed, 1 - squashed.square()
    bias = spec.bias(tile.rows, tile.keys)
    if bias is not None:
        scores = scores + _grouped(bias, spec).flatten(2, 3)
    if tile.pairs is not None:
        scores = scores.masked_fill(~tile.pairs.repeat(1, 1, spec.group_size, 1), float("-inf"))
    return scores, slope


def _grouped(x: Tensor, spec: AttentionSpec) -> Tensor:
    """``[B, Hq, ...]`` seen as ``[B, Hkv, G, ...]``: query head h belongs to KV head h // G. A view."""
    return x.unflatten(1, (spec.kv_heads, spec.group_size))


def _load(x: Tensor, rows: slice, spec: AttentionSpec) -> Tensor:
    """Rows of a grouped tensor, the heads of a group stacked: ``[B, Hkv, G * rows, D]``, in the accumulation dtype."""
    return x[:, :, :, rows].to(spec.accumulate_dtype).flatten(2, 3)


def _store(x: Tensor, rows: slice, tile: Tensor) -> None:
    x[:, :, :, rows] = tile.unflatten(2, (x.shape[2], rows.stop - rows.start))

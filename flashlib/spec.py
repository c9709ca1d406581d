"""One attention problem, checked once. Everything behind the front door may rely on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from flashlib.dropout import draw_seed, keep_factors
from flashlib.masks import Causal, Intervals, Mask, RowIntervals, Unmasked, Window
from flashlib.values import has_tangent

__all__ = ["AttentionSpec"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CAUSAL = Causal()  # made once: torch.compile in torch 2.11 cannot make one inside a function that it compiles


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Shapes, types and options of one call ``softmax(softcap(scale * Q K^T) + mask) V``.

    Attributes:
        batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim: the sizes B, Hq, Hkv, Sq, Sk, D, Dv of
            q ``[B, Hq, Sq, D]``, k ``[B, Hkv, Sk, D]``, v ``[B, Hkv, Sk, Dv]``. Query head ``h`` uses KV head
            ``h // group_size`` (GQA; Ainslie et al. 2023, arXiv 2305.13245).
        dtype, device: of q, k, v and of the output.
        scale: positive factor on the scores, ``1 / sqrt(D)`` unless given (Vaswani et al. 2017, equation 1).
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for none (Gemma 2, arXiv 2408.00118, section 2).
        alibi_slopes: fp32 ``[B or 1, Hq]``, or ``[B or 1, Hq, Sq]`` with one for each row, or None: ``slope * |i + offset - j|`` is
            taken from the score of row i and key j (Press et al. 2022, ALiBi, arXiv 2108.12409, section 3). The offset is Sk - Sq, or
            what the mask says (:meth:`flashlib.masks.Mask.row_offsets`).
        mask: a :class:`flashlib.masks.Mask`; never None.
        sinks: ``[Hq]``, a score without a value that every row of a head sees, or None (gpt-oss, arXiv 2508.10925, section 2.3).
        dropout_p: the share of the attention weights that is set to 0, the others growing by ``1 / (1 - dropout_p)``.
        dropout_seed: int64 ``[1]``: which ones (:mod:`flashlib.dropout`); None without dropout.
        return_lse: whether the log-sum-exp of each row is wanted, by the caller or to merge the sinks.
        needs_grad: whether a gradient may be asked for.
        has_tangents: whether an input carries a tangent of forward-mode differentiation (``torch.func.jvp``).
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    softcap: float
    mask: Mask
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    return_lse: bool = False
    needs_grad: bool = False
    has_tangents: bool = False
    _intervals: RowIntervals | None = field(default=None, init=False, repr=False)

    @classmethod
    def from_tensors(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | None = None,
        causal: bool = False,
        scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        dropout_p: float = 0.0,
        dropout_seed: Tensor | None = None,
        return_lse: bool = False,
    ) -> AttentionSpec:
        """Check one call's arguments and describe it. With dropout and no seed given, one is drawn.

        Raises:
            TypeError: an argument is of the wrong type, or the dtypes or devices differ.
            ValueError: the shapes do not fit together, or an option is out of range. The message names the argument,
                what came and what was expected.
        """
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            _check_tensor(name, tensor)
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dtype != q.dtype:
                raise TypeError(f"{name} is {tensor.dtype} but q is {q.dtype}; q, k and v must share one dtype")
            if tensor.device != q.device:
                raise TypeError(f"{name} is on {tensor.device} but q is on {q.device}; all must be on one device")
        batch, q_heads, q_len, head_dim = q.shape
        _, kv_heads, kv_len, _ = k.shape
        _check_shapes(q, k, v)
        dropout_p = _check_dropout(dropout_p, dropout_seed, q.device)
        if dropout_p and dropout_seed is None:
            dropout_seed = draw_seed(q.device)
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be True or False; got {causal!r}")
        mask = _check_mask(mask)
        spec = cls(
            batch=batch,
            q_heads=q_heads,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            v_head_dim=v.shape[3],
            dtype=q.dtype,
            device=q.device,
            scale=1.0 / math.sqrt(head_dim) if scale is None else _finite("scale", scale),
            softcap=_finite("softcap", softcap),
            mask=mask & CAUSAL if causal else mask,
            alibi_slopes=_check_slopes(alibi_slopes, batch, q_heads, q_len, q.device),
            sinks=_check_sinks(sinks, q_heads, q.device),
            dropout_p=dropout_p,
            dropout_seed=dropout_seed if dropout_p else None,
            return_lse=bool(return_lse) or sinks is not None,
            needs_grad=torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)),
            has_tangents=any(has_tangent(x) for x in (q, k, v)),
        )
        if spec.scale <= 0:
            raise ValueError(f"scale must be greater than 0; got {spec.scale}")
        if spec.softcap < 0:
            raise ValueError(f"softcap must be at least 0 (0 for none); got {spec.softcap}")
        if spec.mask.band() is None:
            spec.intervals  # noqa: B018  a mask made for other lengths is refused here, not inside a kernel
        return spec

    @classmethod
    def from_numbers(cls, q: Tensor, k: Tensor, v: Tensor, *numbers) -> AttentionSpec:
        """The inverse of :meth:`numbers`, for inputs already checked."""
        start, stop, left, right, alibi_slopes, row_offsets, scale, softcap, dropout_p, dropout_seed = numbers
        mask = Window(left, right) if start is None else Intervals(RowIntervals(start, stop, k.shape[2]), row_offsets)
        return cls(
            *(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype, q.device),
            *(scale, softcap, mask, alibi_slopes),
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            return_lse=True,
        )

    def numbers(self) -> tuple:
        """All that kernels and operators must know besides q, k and v, as tensors and plain numbers.

        Returns:
            ``(start, stop, left, right, alibi_slopes, row_offsets, scale, softcap, dropout_p, dropout_seed)``. A plain band is two numbers,
            left and right, None for no limit on that side; any other mask is its row intervals, start and stop, int64 ``[B or 1, Sq]``. Where
            rows do not share their slope, or sit elsewhere than bottom-right, alibi_slopes is ``[B or 1, Hq, Sq]`` and row_offsets
            int64 ``[B or 1, Sq]``; otherwise ``[B or 1, Hq]`` and None. Sinks are not among them: they are merged into the result.
        """
        band = self.mask.band()
        left, right = band or (None, None)
        start, stop = (None, None) if band is not None else (self.intervals.start, self.intervals.stop)
        slopes, offsets = self._slopes_and_offsets(band)
        return start, stop, left, right, slopes, offsets, self.scale, self.softcap, self.dropout_p, self.dropout_seed

    def _slopes_and_offsets(self, band: tuple | None) -> tuple[Tensor | None, Tensor | None]:
        slopes = self.alibi_slopes
        if slopes is None:
            return None, None
        offsets = self.row_offsets if band is None else None  # a band is aligned bottom-right
        if slopes.dim() == 2:
            if offsets is None:
                return slopes, None
            slopes = slopes[..., None].expand(-1, -1, self.q_len).contiguous()
        if offsets is None:
            offsets = torch.full((1, self.q_len), self.kv_len - self.q_len, device=self.device)
        return slopes, offsets

    @property
    def group_size(self) -> int:
        """How many query heads share a KV head."""
        return self.q_heads // self.kv_heads

    @property
    def is_empty(self) -> bool:
        """Whether there is no score to compute: no batch entry, no head, no query or no key."""
        return 0 in (self.batch, self.q_heads, self.q_len, self.kv_len)

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The type in which softmax statistics and the output are accumulated, and the type of the LSE."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def intervals(self) -> RowIntervals:
        """The mask as one interval of visible keys per row. Made once; not by functools.cached_property, whose lock torch.compile cannot trace."""
        made = self._intervals
        if made is None:
            made = self.mask.intervals(self.batch, self.q_len, self.kv_len, self.device)
            object.__setattr__(self, "_intervals", made)
        return made

    @property
    def row_offsets(self) -> Tensor | None:
        """The key at which each row sits, less the row, where the mask says it: int64 ``[B or 1, Sq]``. Else None: Sk - Sq for all."""
        offsets = self.mask.row_offsets(self.batch, self.q_len, self.kv_len, self.device)
        return None if offsets is None else offsets.expand(-1, self.q_len)

    def bias(self, rows: slice, keys: slice) -> Tensor | None:
        """What ALiBi adds to a tile of scores: ``[B or 1, Hq, rows, keys]`` in the accumulation dtype; None without slopes."""
        if self.alibi_slopes is None:
            return None
        row, key = (torch.arange(tile.start, tile.stop, device=self.device) for tile in (rows, keys))
        offset = self.kv_len - self.q_len if self.row_offsets is None else self.row_offsets[:, None, rows, None]
        slope = self.alibi_slopes[..., None] if self.alibi_slopes.dim() == 2 else self.alibi_slopes[:, :, rows]
        return -slope.to(self.accumulate_dtype)[..., None] * (row[:, None] + offset - key).abs()

    def keep_factors(self, rows: slice, keys: slice) -> Tensor | None:
        """What dropout multiplies the weights of a tile by: ``[B, Hq, rows, keys]`` in the accumulation dtype; None without dropout."""
        if not self.dropout_p:
            return None
        assert self.dropout_seed is not None
        heads = self.batch, self.q_heads
        return keep_factors(self.dropout_seed, self.dropout_p, *heads, rows, keys, self.accumulate_dtype)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.q_heads, self.q_len, self.v_head_dim)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} is {tensor.dtype}; expected one of {expected}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}; expected torch.strided")
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be 4-dimensional [batch, heads, seq, head_dim]; got shape {tuple(tensor.shape)}")
    if tensor.shape[3] < 1:
        raise ValueError(f"{name} has head_dim 0 (shape {tuple(tensor.shape)}); expected at least 1")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch {tensor.shape[0]} but q has batch {q.shape[0]}: {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v must have the same heads and length: {shapes}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k has head_dim {k.shape[3]} but q has head_dim {q.shape[3]}: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads and k has {k.shape[1]}; expected a multiple of the KV heads: {shapes}"
        )


def _check_mask(mask: Mask | None) -> Mask:
    if mask is None:
        return Unmasked()
    if isinstance(mask, Mask):
        return mask
    hint = ""
    if isinstance(mask, Tensor):
        hint = "; say the rule instead of the matrix, for instance flashlib.masks.KeyLengths(lengths) for padding"
    raise TypeError(f"mask must be a flashlib.masks.Mask or None; got {type(mask).__name__}{hint}")


def _check_slopes(slopes: Tensor | None, batch: int, q_heads: int, q_len: int, device: torch.device) -> Tensor | None:
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor):
        raise TypeError(f"alibi_slopes must be a torch.Tensor or None; got {type(slopes).__name__}")
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes is {slopes.dtype}; expected float32")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes requires a gradient, but none is computed for them; pass alibi_slopes.detach()")
    by_head, by_row = ((q_heads,), (batch, q_heads)), ((1, q_heads, q_len), (batch, q_heads, q_len))
    # Size by size: under torch.compile a tuple of fixed sizes is not equal to one of sizes that may vary.
    if not any(
        len(slopes.shape) == len(shape) and all(a == b for a, b in zip(slopes.shape, shape, strict=True))
        for shape in (*by_head, *by_row)
    ):
        raise ValueError(
            f"alibi_slopes has shape {tuple(slopes.shape)}; expected ({q_heads},) or ({batch}, {q_heads}): one per query head; "
            f"or {by_row[0]} or {by_row[1]}: one per query head and row"
        )
    if slopes.device != device:
        raise TypeError(f"alibi_slopes is on {slopes.device} but q is on {device}; all must be on one device")
    return slopes.contiguous()[None] if slopes.dim() == 1 else slopes.contiguous()


def _check_sinks(sinks: Tensor | None, q_heads: int, device: torch.device) -> Tensor | None:
    if sinks is None:
        return None
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a torch.Tensor or None; got {type(sinks).__name__}")
    if sinks.dtype not in DTYPES:
        raise TypeError(f"sinks is {sinks.dtype}; expected float16, bfloat16, float32 or float64")
    if sinks.shape != (q_heads,):
        raise ValueError(f"sinks has shape {tuple(sinks.shape)}; expected ({q_heads},), one score per query head")
    if sinks.device != device:
        raise TypeError(f"sinks is on {sinks.device} but q is on {device}; all must be on one device")
    return sinks


def _check_dropout(dropout_p: float, seed: Tensor | None, device: torch.device) -> float:
    dropout_p = _finite("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1; got {dropout_p}")
    if seed is not None and not (isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.shape == (1,)):
        came = f"{seed.dtype} {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"dropout_seed must be an int64 torch.Tensor of shape (1,) or None; got {came}")
    if seed is not None and seed.device != device:
        raise TypeError(f"dropout_seed is on {seed.device} but q is on {device}; all must be on one device")
    return dropout_p


def _finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace for a dynamic float
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)

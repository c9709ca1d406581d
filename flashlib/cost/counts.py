"""Operations and bytes of attention: of the formula, and of the schedules that compute it.

Operations are counted in three kinds that run on different parts of a processor and must not be added up as if they were alike:

* **products**: multiplications and additions of matrix products, 2 for each multiply-add. Tensor cores.
* **exponentials**: evaluations of exp, tanh and log. The special function units, which on a GPU are few.
* **other**: additions, multiplications, divisions, comparisons and selections on vectors.

Bytes are what a schedule asks of the memory behind the chip, by operand. A cache may answer part of it: what must come from memory
whatever the cache is :func:`compulsory`.

Sources: Dao et al. 2022 (arXiv 2205.14135), algorithms 0, 1 and 4; Dao 2023 (arXiv 2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from flashlib.cost.visible import Visible, checked_count

__all__ = ["BYTES", "Problem", "Work", "backward", "compulsory", "fa1", "fa2", "formula", "naive", "paper_flops"]

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5, "mxfp4": 17 / 32}
FP32 = 4


@dataclass(frozen=True)
class Work:
    """What a computation does.

    Attributes:
        products, exponentials, other: operations of each kind; a share of them where several devices share the work.
        read, written: bytes by operand.
    """

    products: float = 0
    exponentials: float = 0
    other: float = 0
    read: Mapping[str, float] = field(default_factory=dict)
    written: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        return sum(self.read.values()) + sum(self.written.values())

    def __add__(self, more: Work) -> Work:
        if not isinstance(more, Work):
            return NotImplemented
        read, written = Counter(self.read), Counter(self.written)
        read.update(more.read)
        written.update(more.written)
        return Work(
            self.products + more.products,
            self.exponentials + more.exponentials,
            self.other + more.other,
            dict(read),
            dict(written),
        )

    def __mul__(self, times: float) -> Work:
        scaled = ({name: value * times for name, value in moved.items()} for moved in (self.read, self.written))
        return Work(self.products * times, self.exponentials * times, self.other * times, *scaled)


@dataclass(frozen=True)
class Problem:
    """Shapes and mask of one attention call, without tensors.

    Attributes:
        batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim: B, Hq, Hkv, Sq, Sk, D, Dv.
        visible: the mask of each batch entry, ``[B]`` of them, or one that all share.
        dtype: of q, k, v and out, a key of :data:`BYTES`. kv_dtype: of k and v, if they are stored otherwise.
        softcap: whether scores are capped.

    Raises:
        TypeError, ValueError: a size is out of range; heads, masks or a dtype do not fit.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int = 0
    visible: tuple[Visible, ...] = ()
    dtype: str = "bf16"
    kv_dtype: str = ""
    softcap: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("batch", 0),
            ("q_heads", 1),
            ("kv_heads", 1),
            ("q_len", 0),
            ("kv_len", 0),
            ("head_dim", 1),
        ):
            checked_count(name, getattr(self, name), least)
        checked_count("v_head_dim", self.v_head_dim, 0)
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.head_dim)
        object.__setattr__(self, "kv_dtype", self.kv_dtype or self.dtype)
        object.__setattr__(self, "visible", tuple(self.visible) or (Visible.band(self.q_len, self.kv_len),))
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads must be a multiple of kv_heads; got {self.q_heads} and {self.kv_heads}")
        for name in ("dtype", "kv_dtype"):
            if getattr(self, name) not in BYTES:
                raise ValueError(f"{name} must be one of {', '.join(BYTES)}; got {getattr(self, name)!r}")
        if len(self.visible) not in (1, self.batch):
            raise ValueError(f"visible must be one mask or {self.batch}, one for each entry; got {len(self.visible)}")
        for mask in self.visible:
            if (mask.q_len, mask.kv_len) != (self.q_len, self.kv_len):
                raise ValueError(
                    f"visible is for {mask.q_len} rows and {mask.kv_len} keys, but the problem has {self.q_len} and {self.kv_len}"
                )

    @classmethod
    def causal(cls, batch: int, q_heads: int, kv_heads: int, q_len: int, kv_len: int, head_dim: int, *, window: int | None = None, **others) -> Problem:  # fmt: skip
        """Causal attention, aligned bottom-right; ``window``: each row sees itself and so many keys before it."""
        mask = Visible.band(q_len, kv_len, left=window, right=0)
        return cls(batch, q_heads, kv_heads, q_len, kv_len, head_dim, visible=(mask,), **others)

    @classmethod
    def from_spec(cls, spec) -> Problem:
        """From a :class:`flashlib.AttentionSpec`. Costs a step for each row."""
        start, stop = spec.intervals.start.tolist(), spec.intervals.stop.tolist()
        ends = zip(start, stop, strict=True)
        masks = tuple(Visible.from_intervals(*both, spec.kv_len, spec.mask.band()) for both in ends)
        dtype = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}[str(spec.dtype)[6:]]
        sizes = (spec.batch, spec.q_heads, spec.kv_heads, spec.q_len, spec.kv_len, spec.head_dim, spec.v_head_dim)
        return cls(*sizes, masks, dtype, softcap=spec.softcap > 0)

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def itemsize(self) -> float:
        return BYTES[self.dtype]

    @property
    def kv_itemsize(self) -> float:
        return BYTES[self.kv_dtype]

    def entries(self) -> Iterable[tuple[Visible, int]]:
        """Each mask with the number of batch entries that have it."""
        if len(self.visible) == 1:
            return [(self.visible[0], self.batch)]
        return list(Counter(self.visible).items())

    @cached_property
    def pairs(self) -> int:
        """Visible (row, key) pairs of one query head, over all batch entries."""
        return sum(mask.pairs * count for mask, count in self.entries())

    @property
    def masked(self) -> bool:
        return any(mask.pairs != self.q_len * self.kv_len for mask in self.visible)


def formula(problem: Problem) -> Work:
    """The least that the formula asks for: visible pairs only, each score once, each operand moved once.

    A pair costs ``2 (D + Dv)`` in products and one exponential; beside them scale, maximum, difference and sum. A row that sees
    anything is divided by its sum once.
    """
    pairs = problem.pairs * problem.q_heads
    rows = sum(mask.rows * count for mask, count in problem.entries()) * problem.q_heads
    return Work(
        2 * (problem.head_dim + problem.v_head_dim) * pairs,
        pairs * (1 + problem.softcap),
        pairs * (4 + 2 * problem.softcap) + rows * problem.v_head_dim,
        *compulsory(problem),
    )


def compulsory(problem: Problem) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes ``(read, written)`` that cross memory whatever the cache: q and out, and once each key and value that some row sees."""
    rows = problem.batch * problem.q_heads * problem.q_len * problem.itemsize
    keys = sum(mask.seen_keys * count for mask, count in problem.entries()) * problem.kv_heads * problem.kv_itemsize
    read = {"q": rows * problem.head_dim, "k": keys * problem.head_dim, "v": keys * problem.v_head_dim}
    return read, {"out": rows * problem.v_head_dim}


def paper_flops(problem: Problem, *, backward: bool = False) -> float:
    """As the FlashAttention papers count: ``4 Sq Sk D`` a head, half of it if causal (Dao 2023, section 4.1), 2.5 times in the backward."""
    whole = (
        2 * (problem.head_dim + problem.v_head_dim) * problem.batch * problem.q_heads * problem.q_len * problem.kv_len
    )
    return whole * (0.5 if problem.masked else 1.0) * (2.5 if backward else 1.0)


def naive(problem: Problem) -> Work:
    """Algorithm 0: S and P are whole matrices in memory, masked pairs included. Scale and mask are passes over S of their own.

    Operations on each score: scale, mask (if there is one), maximum, difference, exp, sum, division. K and V count once for each KV
    head and product.
    """
    heads = problem.batch * problem.q_heads
    area, rows = problem.q_len * problem.kv_len * heads, problem.q_len * heads
    keys = problem.batch * problem.kv_heads * problem.kv_len * problem.kv_itemsize
    size, scores = problem.itemsize, area * problem.itemsize
    passes = 1 + bool(problem.masked) + problem.softcap  # over S, between the product that writes it and the softmax
    read = {"q": rows * problem.head_dim * size, "k": keys * problem.head_dim, "v": keys * problem.v_head_dim}
    return Work(
        2 * (problem.head_dim + problem.v_head_dim) * area,
        area * (1 + problem.softcap),
        area * (5 + bool(problem.masked) + 2 * problem.softcap),
        {**read, "scores": (passes + 1) * scores, "weights": scores},
        {"scores": (passes + 1) * scores, "weights": scores, "out": rows * problem.v_head_dim * size},
    )


def fa1(problem: Problem, block_q: int, block_k: int) -> Work:
    """FlashAttention's algorithm 1: tiles of keys outside, blocks of rows inside, so that O, l and m pass again for each tile.

    A tile without a visible pair is left out; tiles at the edge count as what they hold. Operations of a row in a tile: scale,
    mask (in partial tiles), maximum, difference, exp and sum of each score; of the row itself lines 11 and 12 of the algorithm. O, l
    and m are written as zeros and -inf beforehand (line 2). O is in the dtype of q, l and m in fp32.
    """
    size = problem.itemsize
    total = Work(written={"out": 0})
    for mask, count in problem.entries():
        rows = _rows_in_tiles(mask, block_q, block_k)
        keys = _keys_in_tiles(mask, block_q, block_k)
        area, partial = mask.area(block_q, block_k), _partial_area(mask, block_q, block_k)
        per_row = 7 + 4 * problem.v_head_dim  # m: 1, l: 3, exponents: 2, the factor of O: 1; O: 4 for each channel
        of_head = Work(
            2 * (problem.head_dim + problem.v_head_dim) * area,
            area * (1 + problem.softcap) + 2 * rows,
            area * (4 + 2 * problem.softcap) + partial + per_row * rows,
            {
                "q": rows * problem.head_dim * size,
                "k": keys * problem.head_dim * problem.kv_itemsize,
                "v": keys * problem.v_head_dim * problem.kv_itemsize,
                "out": rows * problem.v_head_dim * size,
                "statistics": rows * 2 * FP32,
            },
            {
                "out": (rows + mask.q_len) * problem.v_head_dim * size,
                "statistics": (rows + mask.q_len) * 2 * FP32,
            },
        )
        total += of_head * (count * problem.q_heads)
    return total


def fa2(problem: Problem, block_q: int, block_k: int) -> Work:
    """FlashAttention-2's algorithm 1: blocks of rows outside, tiles of keys inside; O is written once, and the LSE with it.

    As :func:`fa1`, but of a row in a tile: its maximum, the factor that corrects what came before (a difference and an exp), l (2),
    and one multiplication for each channel of O. At the end each row is divided by l, and its LSE is a log and a sum.
    """
    size = problem.itemsize
    total = Work(written={"out": 0})
    for mask, count in problem.entries():
        seen = _rows_in_tiles(mask, block_q, block_k)
        keys = _keys_for_blocks(mask, block_q, block_k)
        area, partial, rows = mask.area(block_q, block_k), _partial_area(mask, block_q, block_k), mask.q_len
        of_head = Work(
            2 * (problem.head_dim + problem.v_head_dim) * area,
            area * (1 + problem.softcap) + seen + rows,
            area * (4 + 2 * problem.softcap)
            + partial
            + (4 + problem.v_head_dim) * seen
            + (problem.v_head_dim + 1) * rows,
            {
                "q": rows * problem.head_dim * size,
                "k": keys * problem.head_dim * problem.kv_itemsize,
                "v": keys * problem.v_head_dim * problem.kv_itemsize,
            },
            {"out": rows * problem.v_head_dim * size, "lse": rows * FP32},
        )
        total += of_head * (count * problem.q_heads)
    return total


def backward(problem: Problem, block_q: int, block_k: int, *, products: int = 5) -> Work:
    """FlashAttention-2's algorithm 2: blocks of keys outside, tiles of rows inside; P is computed again from the LSE.

    Args:
        products: 5 for one pass that adds to dQ in memory (fp32, read and written for each tile). 7 for two passes, one for dK and dV,
            one with blocks of rows outside for dQ, which form S and dP twice and add nothing in memory.

    A pass costs, of each score in its tiles: scale, mask (in partial tiles), difference to the LSE, exp, difference to delta, product
    with P. Delta, ``rowsum(dO * O)``, is a pass over out and its gradient beforehand. Nothing of a softcap is counted here.
    """
    if products not in (5, 7):
        raise ValueError(f"products must be 5 or 7; got {products!r}")
    size, d, dv = problem.itemsize, problem.head_dim, problem.v_head_dim
    total = Work()
    for mask, count in problem.entries():
        area, partial, rows = mask.area(block_q, block_k), _partial_area(mask, block_q, block_k), mask.q_len
        seen, keys = _rows_in_tiles(mask, block_q, block_k), _keys_in_tiles(mask, block_q, block_k)
        delta = Work(
            0, 0, rows * (2 * dv - 1), {"out": rows * dv * size, "grad_out": rows * dv * size}, {"delta": rows * FP32}
        )
        # dK and dV: S, dP, dV, dK. Query heads of a group pass by one after the other, so K and V are read once for all of them.
        read = {"q": seen * d * size, "grad_out": seen * dv * size, "lse": seen * FP32, "delta": seen * FP32}
        by_keys = Work((4 * d + 4 * dv) * area, area, 4 * area + partial, read)
        if products == 5:
            by_keys += Work(2 * d * area, read={"dq": seen * d * FP32}, written={"dq": seen * d * FP32})
            by_rows = Work()
        else:
            passing = _keys_for_blocks(mask, block_q, block_k)
            once = {"q": rows * d * size, "grad_out": rows * dv * size, "lse": rows * FP32, "delta": rows * FP32}
            once |= {"k": passing * d * problem.kv_itemsize, "v": passing * dv * problem.kv_itemsize}
            by_rows = Work((4 * d + 2 * dv) * area, area, 4 * area + partial, once, {"dq": rows * d * size})
        total += (delta + by_keys + by_rows) * (count * problem.q_heads)
        owned = {"k": keys * d * problem.kv_itemsize, "v": keys * dv * problem.kv_itemsize}
        total += Work(read=owned, written={"dk": mask.kv_len * d * size, "dv": mask.kv_len * dv * size}) * (
            count * problem.kv_heads
        )
    return total


def _rows_in_tiles(mask: Visible, block_q: int, block_k: int) -> int:
    """Rows, counted once for each seen tile that they lie in."""
    blocks = mask.by_rows(block_q, block_k)
    last = mask.q_len % block_q or block_q
    return sum(block.seen for block in blocks[:-1]) * block_q + (blocks[-1].seen * last if blocks else 0)


def _keys_for_blocks(mask: Visible, block_q: int, block_k: int) -> int:
    """Keys, counted once for each seen tile that they lie in: what blocks of rows read."""
    blocks = mask.by_keys(block_q, block_k)
    last = mask.kv_len % block_k or block_k
    return sum(block.seen for block in blocks[:-1]) * block_k + (blocks[-1].seen * last if blocks else 0)


def _keys_in_tiles(mask: Visible, block_q: int, block_k: int) -> int:
    """Keys of the blocks of keys that any row sees: what a loop with keys outside reads."""
    blocks = mask.by_keys(block_q, block_k)
    last = mask.kv_len % block_k or block_k
    sizes = [block_k] * (len(blocks) - 1) + [last] if blocks else []
    return sum(size for block, size in zip(blocks, sizes, strict=True) if block.seen)


def _partial_area(mask: Visible, block_q: int, block_k: int) -> int:
    """Pairs in tiles that are neither full nor empty."""
    full = 0
    last_k = mask.kv_len % block_k or block_k
    key_tiles = -(-mask.kv_len // block_k)
    for n, block in enumerate(mask.by_rows(block_q, block_k)):
        rows = min(block_q, mask.q_len - n * block_q)
        full += rows * block.full * block_k
        if block.full and _last_tile_full(mask, n * block_q, n * block_q + rows, (key_tiles - 1) * block_k):
            full -= rows * (block_k - last_k)
    return mask.area(block_q, block_k) - full


def _last_tile_full(mask: Visible, row: int, end: int, edge: int) -> bool:
    """Whether all these rows see all keys from ``edge`` on."""
    seeing = [run for run in mask.runs if run.first < end and run.last > row]
    return all(
        run.starts_at(min(end, run.last) - 1) <= edge and run.stops_at(max(row, run.first)) == mask.kv_len
        for run in seeing
    )

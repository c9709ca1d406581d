"""What is measured: attention problems by shape, mask, dtype and direction, written as short grids.

A grid is a line of ``name=value,value`` fields; its cases are all combinations:

    length=4096,16384 head_dim=64,128 mask=full,causal direction=forward,backward dtype=bf16 tokens=16384 width=2048
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import torch

from flashlib.masks import Causal, Mask, Unmasked, Varlen, Window

__all__ = ["DTYPES", "PRESETS", "Case", "parse_grid", "short_labels"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DIRECTIONS = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # with their work, in forwards
FIELDS = {  # of a grid, with the value where a line does not say
    "length": None,
    "head_dim": 128,
    "mask": "causal",
    "direction": "forward",
    "dtype": "bf16",
    "tokens": 16384,
    "width": 2048,
    "group": 1,
}
# The training presets are the grid of the FlashAttention papers: 16k tokens a batch, 2048 channels.
PRESETS = {
    "training-forward": "length=1024,2048,4096,8192,16384 head_dim=64,128 mask=full,causal direction=forward",
    "training-backward": "length=1024,2048,4096,8192,16384 head_dim=64,128 mask=full,causal direction=backward",
    "window": "length=16384 head_dim=64,128 mask=causal,window-1024 direction=forward,backward",
    "varlen": "length=1024,4096 head_dim=64,128 mask=full,packed,causal,packed-causal,ragged-causal direction=forward,backward",
    "grouped": "length=4096,16384 head_dim=128 mask=causal group=4,8 direction=forward,backward",
    "memory": "length=1024,2048,4096,8192,16384,32768,65536 head_dim=128 mask=causal direction=both tokens=0",
    "quick": "length=4096 head_dim=128 mask=full,causal direction=forward,backward",
}
CPU_SHORTER, CPU_NARROWER = 16, 8  # by how much a processor's presets are smaller than a GPU's


# A :class:`Case`, or a :class:`flashlib.measure.racing.decoding.DecodeCase`.
OneCase = TypeVar("OneCase", bound=Any)


@dataclass(frozen=True)
class Case:
    """One attention problem with as many queries as keys.

    Attributes:
        batch, q_heads, kv_heads, length, head_dim: B, Hq, Hkv, S, D.
        mask: ``"full"``; ``"causal"``; ``"window-N"``, each query sees itself and the N keys before it; ``"packed"`` or
            ``"packed-causal"``, the B sequences laid end to end as one row of B * S tokens; ``"ragged-causal"``, the same
            number of tokens and sequences, but of unequal lengths (S is their mean).
        direction: ``"forward"`` or ``"backward"`` alone, or ``"both"`` one after the other.
        dtype: a name of :data:`DTYPES`.

    Raises:
        ValueError: a value is not one of these.
    """

    batch: int
    q_heads: int
    kv_heads: int
    length: int
    head_dim: int
    mask: str = "causal"
    direction: str = "forward"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        for name in ("batch", "q_heads", "kv_heads", "length", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads must be a multiple of kv_heads; got {self.q_heads} and {self.kv_heads}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}; got {self.direction!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        known = ("full", "causal", "packed", "packed-causal", "ragged-causal")
        if self.mask not in known and not self.mask.removeprefix("window-").isdigit():
            raise ValueError(f"mask must be one of {', '.join(known)} or window-N; got {self.mask!r}")

    @property
    def causal(self) -> bool:
        return self.mask.endswith("causal") or self.window is not None

    @property
    def window(self) -> int | None:
        """How many keys before itself a query sees; None without a window."""
        return int(self.mask.removeprefix("window-")) if self.mask.startswith("window-") else None

    @cached_property
    def sequences(self) -> tuple[int, ...] | None:
        """Lengths of the sequences in a packed row; None where each sequence is a row of the batch."""
        if self.mask.startswith("packed"):
            return (self.length,) * self.batch
        if not self.mask.startswith("ragged"):
            return None
        rng = random.Random(self.length)  # the same lengths in every run, and for every peer
        total, cuts = self.batch * self.length, range(1, self.batch * self.length)
        ends = [0, *sorted(rng.sample(cuts, self.batch - 1)), total]
        return tuple(b - a for a, b in itertools.pairwise(ends))

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of q, k and v: ``[B, H, S, D]``."""
        rows, tokens = (self.batch, self.length) if self.sequences is None else (1, self.batch * self.length)
        return tuple((rows, heads, tokens, self.head_dim) for heads in (self.q_heads, self.kv_heads, self.kv_heads))

    def mask_rule(self) -> Mask:
        """The mask as :func:`flashlib.attention` takes it."""
        if self.window is not None:
            return Window(self.window, 0)
        rule: Mask = Causal() if self.causal else Unmasked()
        if self.sequences is None:
            return rule
        ends = torch.tensor([0, *itertools.accumulate(self.sequences)], device="cpu")
        return Varlen(ends, ends) & rule if self.causal else Varlen(ends, ends)

    @property
    def flops(self) -> float:
        """Floating-point operations as the FlashAttention papers count them: ``4 S^2 D`` per head, half of it if causal, 2.5
        times that for the backward (Dao 2023, arXiv 2307.08691, section 4.1). Of a window, the visible pairs alone.
        """
        if self.window is not None:
            pairs = float(self.batch * self.mask_rule().intervals(1, self.length, self.length).visible_pairs())
        else:
            squares = sum(n * n for n in self.sequences or (self.length,) * self.batch)
            pairs = squares / 2 if self.causal else float(squares)
        return 4 * self.q_heads * pairs * self.head_dim * DIRECTIONS[self.direction]

    @property
    def bytes(self) -> int:
        """The fewest bytes that must cross memory: each operand once. Forward: q, k, v, out. Backward: those, the gradient
        of out, and the three gradients; both: the sum. (The LSE, 4 bytes a row, is left out.)
        """
        tokens = self.batch * self.length * self.head_dim * DTYPES[self.dtype].itemsize
        q, k = tokens * self.q_heads, tokens * self.kv_heads
        forward = 2 * q + 2 * k
        return {"forward": forward, "backward": 2 * forward, "both": 3 * forward}[self.direction]

    def rates(self, ms: float) -> dict[str, float]:
        """What a record says beside the time."""
        return {"tflops": self.flops / ms / 1e9}

    @property
    def needs_grad(self) -> bool:
        return self.direction != "forward"

    @property
    def label(self) -> str:
        return " ".join(self.words().values())

    def words(self) -> dict[str, str]:
        """What is told of the case, by name."""
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        sizes = {
            "length": f"S{self.length}",
            "head_dim": f"D{self.head_dim}",
            "batch": f"B{self.batch}",
            "heads": f"H{heads}",
        }
        return {"direction": self.direction, "mask": self.mask, **sizes, "dtype": self.dtype}

    def columns(self) -> dict:
        """The case as columns of a record's row."""
        return asdict(self)

    @classmethod
    def from_columns(cls, row: dict) -> Case:
        """The case of a record's row."""
        return cls(**{field.name: row[field.name] for field in fields(cls)})


def short_labels(cases: Iterable[OneCase]) -> tuple[dict[OneCase, str], str]:
    """What tells each case from the others, and what they all share: ``({case: "causal S4096"}, "forward D128 bf16")``."""
    words = {case: case.words() for case in cases}
    varying = [name for name in next(iter(words.values()), {}) if len({told[name] for told in words.values()}) > 1]
    without = [name for name in varying if name not in ("batch", "heads")]  # in most grids they follow from S and D
    if len({tuple(told[name] for name in without) for told in words.values()}) == len(words):
        varying = without
    labels = {case: " ".join(told[name] for name in varying) or case.label for case, told in words.items()}
    shared = [
        word
        for word in next(iter(words.values()), {}).values()
        if all(word in told.values() for told in words.values())
    ]
    return labels, " ".join(shared)


def parse_grid(text: str, *, device: str = "cuda", preset: bool = False) -> list[Case]:
    """All cases of a grid such as ``"length=1024,4096 mask=full,causal"``.

    Fields: ``length`` (needed), ``head_dim``, ``mask``, ``direction``, ``dtype``, ``tokens`` (B * S; 0 for a batch of 1),
    ``width`` (Hq * D), ``group`` (query heads per KV head). Fields left out take the papers' values; on a CPU, those of
    a machine a hundred times slower.

    Args:
        text: the fields, separated by blanks.
        device: ``"cuda"`` or ``"cpu"``.
        preset: the lengths are a GPU's, to be shortened on a CPU.

    Raises:
        ValueError: a field or value is not known, or the sizes do not divide each other.
    """
    chosen = _on_cpu(FIELDS) if device == "cpu" else dict(FIELDS)
    for part in text.split():
        name, equals, values = part.partition("=")
        if not equals or name not in chosen:
            raise ValueError(f"a grid is made of name=value,...; names are {', '.join(chosen)}; got {part!r}")
        chosen[name] = values.split(",")
    if chosen["length"] is None:
        raise ValueError(f"a grid needs a length, for instance length=1024,4096; got {text!r}")
    lists: dict[str, list[Any]] = {
        name: value if isinstance(value, list) else [value] for name, value in chosen.items()
    }
    if preset and device == "cpu":
        lists["length"] = [int(length) // CPU_SHORTER for length in lists["length"]]
        lists["mask"] = [_shorter_window(mask) for mask in lists["mask"]]
        lists["width"] = [max(*lists["width"], max(map(int, lists["head_dim"])) * max(map(int, lists["group"])))]
    return [_case(dict(zip(lists, values, strict=True))) for values in itertools.product(*lists.values())]


def _on_cpu(defaults: dict) -> dict:
    smaller = {"tokens": defaults["tokens"] // CPU_SHORTER, "width": defaults["width"] // CPU_NARROWER}
    return {**defaults, **smaller, "dtype": "fp32"}


def _shorter_window(mask: str) -> str:
    name, dash, width = mask.partition("-")
    return f"{name}-{int(width) // CPU_SHORTER}" if dash and width.isdigit() else mask


def _case(values: dict) -> Case:
    length, head_dim, tokens, width, group = (
        _integer(name, values[name]) for name in ("length", "head_dim", "tokens", "width", "group")
    )
    tokens = tokens or length
    if length < 1 or tokens % length:
        raise ValueError(f"tokens must be a multiple of length; got {tokens} and {length}")
    if min(head_dim, group) < 1 or width % (head_dim * group):
        raise ValueError(f"width must be a multiple of head_dim * group; got {width}, {head_dim} and {group}")
    heads = width // head_dim
    choices = {name: values[name] for name in ("mask", "direction", "dtype")}
    return Case(tokens // length, heads, heads // group, length, head_dim, **choices)


def _integer(name: str, value: str | int) -> int:
    if not str(value).isdigit():
        raise ValueError(f"{name} must be a whole number; got {value!r}")
    return int(value)

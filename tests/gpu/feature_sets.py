"""Random problems in sets that share their compiled kernels, so that a GPU spends its time on problems and not on compilers.

Triton compiles a kernel anew for each dtype, width, feature and kind of mask, and whenever a stride begins or ceases to be a
multiple of 16. A set fixes these. Lengths, batch, heads, the numbers in masks, scales, values, and all strides that are multiples
of 16 are drawn anew for each problem.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from problems import BATCHES, HEADS, Problem, random_problem, random_rule

from flashlib import masks

DTYPES = (*[torch.bfloat16] * 5, *[torch.float16] * 3, *[torch.float32] * 2)
HEAD_DIMS = (*[(64, 64)] * 4, *[(128, 128)] * 5, (256, 256), (96, 96), (64, 128), (128, 32), (40, 40), (59, 128), (128, 111), (192, 40))  # fmt: skip
MASKS = ("intervals",) * 8 + ("right",) * 5 + ("none",) * 3 + ("both",) * 2 + ("left",) * 2
LENGTHS = {"cuda": (*range(1, 140), 0, 191, 192, 255, 256, 257, 384, 511, 640), "cpu": (0, 1, 17, 33, 64)}
SIXTEENS = {"cuda": (16, 32, 48, 64, 112, 128, 144, 192, 256, 272, 512, 640), "cpu": (16, 32, 48)}
ODD = {"cuda": (*range(3, 140, 2), 191, 255, 257, 511, 641), "cpu": (3, 17, 33)}
MANY_KEYS = {"cuda": range(3300, 4300), "cpu": (65, 128)}  # with a head_dim up to 64, enough for the kernel for Hopper
MANY_HEADS = {"cuda": ((48, 48), (64, 64), (64, 8), (96, 32)), "cpu": ((6, 6), (8, 2))}
ALIGNED = ("heads_first", "rows_first", "transposed", "sliced_16")
WIDTHS = (0, 1, 5, 40, 200, 3500)


@dataclass(frozen=True)
class FeatureSet:
    """What the kernels of some problems are compiled for.

    Attributes:
        mask: the kind that a kernel knows: "none", "left", "right" or "both" (a band with those ends), or "intervals".
        softcap: whether there is one. grouped: whether query heads share keys.
        alibi: "no"; "heads", slopes that rows share, which sit bottom-right; "rows", slopes of each row; or "offsets", slopes that rows
            share, which sit where the mask says.
        strides: "aligned", all multiples of 16; "rows odd", those of rows are not, but those of heads and batch entries are;
            "odd", none of some tensor's is.
        layouts: of q, k and v, in memory; any that keep strides aligned where they are.
        heads: (Hq, Hkv), where strides depend on them; else None.
        many_keys: thousands of keys for a few rows.
        many_heads: so many that a program must take several of their blocks.
        dropout: whether weights are dropped; the oracle is given the same seed.
    """

    dtype: torch.dtype
    head_dim: int
    v_head_dim: int
    mask: str
    softcap: bool
    alibi: str
    grouped: bool
    strides: str
    layouts: tuple[str, str, str] | None
    heads: tuple[int, int] | None
    many_keys: bool
    many_heads: bool
    dropout: bool

    @classmethod
    def draw(cls, seed: int) -> FeatureSet:
        rng = random.Random(seed)
        dtype, (head_dim, v_head_dim) = rng.choice(DTYPES), rng.choice(HEAD_DIMS)
        strides = "aligned"
        if (head_dim | v_head_dim) % 16 or rng.random() < 0.2:
            strides = rng.choice(("rows odd", "odd"))
        heads, layouts, grouped = None, None, rng.random() < 0.5
        if strides != "aligned":
            heads = rng.choice(HEADS) if strides == "rows odd" else rng.choice(((3, 3), (9, 3)))
            grouped = heads[0] > heads[1]
            # With widths that are multiples of 16 only a slice of something wider has other strides.
            layouts = tuple(rng.choice(("heads_first", "rows_first", "transposed", "sliced")) for _ in "qkv")
        few = dtype != torch.float32 and max(head_dim, v_head_dim) <= 64
        mask, softcap = rng.choice(MASKS), rng.random() < 0.25
        alibi = rng.choice(("heads", "rows", "offsets") if mask == "intervals" else ("heads", "rows"))
        features = {"mask": mask, "softcap": softcap, "alibi": alibi if rng.random() < 0.25 else "no"}
        many_keys = few and strides == "aligned" and rng.random() < 0.4
        many_heads = strides == "aligned" and not many_keys and rng.random() < 0.3
        return cls(dtype, head_dim, v_head_dim, **features, grouped=grouped, strides=strides, layouts=layouts, heads=heads,
                   many_keys=many_keys, many_heads=many_heads, dropout=rng.random() < 0.25)  # fmt: skip

    def problem(self, seed: int, device: str) -> Problem:
        """A problem with these features."""
        lengths = {"aligned": LENGTHS, "rows odd": SIXTEENS, "odd": ODD}[self.strides][device]
        heads = MANY_HEADS[device] if self.many_heads else HEADS
        heads = (self.heads,) if self.heads else [pair for pair in heads if (pair[0] > pair[1]) == self.grouped]
        if self.many_heads:
            lengths = [length for length in lengths if length <= 256]
        rng = random.Random(seed)
        problem = random_problem(
            rng,
            dtypes=(self.dtype,),
            lengths=lengths,
            kv_lengths=MANY_KEYS[device] if self.many_keys else None,
            head_dims=(self.head_dim,),
            v_head_dims=(self.v_head_dim,),
            batches=(2, 3) if self.strides == "odd" else BATCHES,
            heads=heads,
            layouts=[(name,) for name in self.layouts] if self.layouts else (ALIGNED,) * 3,
            rule=self._rule,
            softcaps=(0.5, 5.0, 30.0) if self.softcap else (0.0,),
            alibi=({"no": None, "offsets": "heads"}.get(self.alibi, self.alibi),),
            device=device,
        )
        if self.dropout:
            problem.options["dropout_p"] = rng.choice((0.1, 0.5, rng.uniform(0.01, 0.99)))
            problem.options["dropout_seed"] = torch.tensor([rng.getrandbits(64) - 2**63], device=device)
        return problem

    def _rule(self, rng: random.Random, batch: int, q_len: int, kv_len: int) -> dict:
        left, right = rng.choice(WIDTHS), rng.choice(WIDTHS)
        if self.mask == "none":
            return {"mask": None}
        if self.mask == "left":
            return {"mask": masks.Window(left, None)}
        if self.mask == "right":
            return rng.choice(({"causal": True}, {"mask": masks.Causal()}, {"mask": masks.Window(None, right)}))
        if self.mask == "both":
            return {"mask": masks.Window(left, right)} | rng.choice(({}, {"causal": True}))
        while True:
            options = random_rule(rng, batch, q_len, kv_len)
            mask = options["mask"]
            if mask is None or mask.band() is not None:
                continue
            says_where = mask.row_offsets(batch, q_len, kv_len, torch.device("cpu")) is not None
            if self.alibi in ("no", "rows") or says_where == (self.alibi == "offsets"):
                return options

    def cost(self) -> float:
        """About how long the kernels compile: products in fp32 are unrolled into single instructions."""
        return max(self.head_dim, self.v_head_dim) * (10 if self.dtype == torch.float32 else 1)

    def told(self) -> dict[str, str]:
        """The features by name, in words that a record can count."""
        head_dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"
        return {
            **{"dtype": str(self.dtype).removeprefix("torch."), "head_dim": head_dims, "mask": self.mask},
            **{
                name: "yes" if getattr(self, name) else "no"
                for name in ("softcap", "grouped", "many_keys", "many_heads", "dropout")
            },
            "strides": self.strides,
            "alibi": self.alibi,
        }

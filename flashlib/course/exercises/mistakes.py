"""Mistakes that several exercises know, each by one name and in the same words. An exercise says how its own function shows them.

`replace(HEADS_MODULO, model=...)` is one with the exercise's model. Mistakes in attention's formula bring their models along: they are
in `formula.py`, those of the running softmax in `online_softmax.py`, of results that are merged in `pieces.py`, and of masks as intervals
in `intervals.py`.
"""

from __future__ import annotations

from flashlib.course.grader.exercise import Misconception

ASSUMES_CONTIGUOUS = Misconception(
    "assumes-contiguous",
    "Your code needs inputs that lie in memory in the order of their axes. A transposed tensor does not.",
    "view works on contiguous memory only, and reshape copies where it cannot make a view. Do you need to change the shape at all?",
)
MISSING_SCALE = Misconception(
    "missing-scale",
    "The scores were not scaled. Without 1 / sqrt(D) they grow with the head dimension, and softmax saturates.",
    "What is the variance of a dot product of two random vectors of length D? What should scale be if the caller gave none?",
)
SCALED_TWICE = Misconception(
    "scaled-twice",
    "The scores were scaled twice. (Dividing by D, not by its square root, comes to the same.)",
    "Follow the scale from q to the scores. How often is it multiplied in?",
)
KEYS_RESHAPED = Misconception(
    "keys-reshaped",
    "The keys were reshaped where they should be transposed: same shape, numbers in other places.",
    "reshape keeps the order of the numbers in memory. Which operation swaps two axes?",
)
CAUSAL_IGNORED = Misconception(
    "causal-ignored", "causal=True made no difference.", "Query i may look at key j only if j lies in its past."
)
CAUSAL_TOP_LEFT = Misconception(
    "causal-top-left",
    "The causal mask starts at the top left corner. With Sq != Sk the last query must see the last key.",
    "The queries are the last Sq positions of a sequence of Sk. At which position does query 0 stand?",
)
CAUSAL_MISSES_ITSELF = Misconception(
    "causal-misses-itself",
    "The causal mask hides the diagonal too: a query does not see its own position.",
    "Is a position part of its own past? Look at query 0.",
)
CAUSAL_SEES_THE_NEXT = Misconception(
    "causal-sees-the-next",
    "The causal mask is one too wide: each query sees one key of its future.",
    "Write the mask of a 3 x 3 example down and compare it with the first row.",
)
HEADS_MODULO = Misconception(
    "heads-modulo",
    "Query head h looked at KV head h % Hkv. Heads of a group lie next to each other: it is h // (Hq / Hkv).",
    "With 4 query heads and 2 KV heads, which query heads look at KV head 0? repeat and repeat_interleave differ here.",
)
KV_REPEATED = Misconception(
    "kv-repeated",
    "K or V was in memory once for each query head. Reading the cache is all that decoding costs, and that made it several times as much.",
    "matmul copies an operand that it has to broadcast over a batch axis. Which reshape of q makes the group a part of its rows?",
)
NO_MAXIMUM = Misconception(
    "no-max-subtraction",
    "Exponentials of scores overflowed, or all of a row's became 0, and the output is NaN. Only differences of scores count: take "
    "the largest one out first.",
    "What is exp(120) in float32? And the sum of a row whose scores are all -200?",
)
BLOCK_K_IGNORED = Misconception(
    "block-k-ignored",
    "The keys were not cut by block_k: a tile is wider, or narrower, than it says.",
    "Which of your two loops takes steps of block_k?",
)
EXP2_FOR_EXP = Misconception(
    "exp2-for-exp",
    "2 was raised to the scores, not e: a softmax that is too flat.",
    "e^x = 2^(x * c). What is c? Or which function of torch has the base e?",
)

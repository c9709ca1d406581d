"""Other ways to count the FLOPs of attention, by name, beside the right one: what they say of one device, and of all together.

One of the documents that this repository started from counts the attention of a model analyser (GenZ) in two ways, an
"original" one and a "corrected" one. Both multiply the products by 3 for the softmax, and both ignore the mask. They differ under
sequence parallelism over ``devices``:

* ``"original"``: the keys are divided by the number of devices, ``3 * B H Sq (Sk / n) D`` multiply-adds for each of the two
  products. As the count of one device that is right, but for the factor and the mask.
* ``"corrected"``: nothing is divided, ``3 * B H Sq Sk D``. That is the count of all devices together, ascribed to each of them.

The argument between the two is about which question is asked; :class:`Counted` answers both, and names them. The factor 3 has no
case in which it is right: the exponentials, maxima and sums of a score are a handful beside its ``2 (D + Dv)``, and run elsewhere.

Source: ``Logit`` and ``Attend`` of GenZ (github.com/abhibambhaniya/GenZ-LLM-Analyzer), GenZ/Models/attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flashlib.cost.counts import Problem, formula
from flashlib.cost.visible import checked_count

__all__ = ["CONVENTIONS", "Counted", "corrected", "exact", "original"]

SOFTMAX_FACTOR = 3.0


@dataclass(frozen=True)
class Counted:
    """FLOPs in products: of one device, on average, and of all together."""

    per_device: float
    total: float


def original(problem: Problem, devices: int = 1) -> Counted:
    """Keys divided by the devices, times 3. Rounded down as there: ``Sk // n``."""
    checked_count("devices", devices, 1)
    each = _products(problem, problem.kv_len // devices)
    return Counted(each, each * devices)


def corrected(problem: Problem, devices: int = 1) -> Counted:
    """Nothing divided, times 3: each device is charged with the work of all."""
    checked_count("devices", devices, 1)
    each = _products(problem, problem.kv_len)
    return Counted(each, each * devices)


def exact(problem: Problem, devices: int = 1) -> Counted:
    """Visible pairs, each ``2 (D + Dv)``, shared by the devices."""
    checked_count("devices", devices, 1)
    products = formula(problem).products
    return Counted(products / devices, products)


CONVENTIONS: dict[str, Callable[..., Counted]] = {"original x3": original, "corrected x3": corrected}


def _products(problem: Problem, keys: int) -> float:
    area = problem.batch * problem.q_heads * problem.q_len * keys
    return SOFTMAX_FACTOR * 2 * (problem.head_dim + problem.v_head_dim) * area

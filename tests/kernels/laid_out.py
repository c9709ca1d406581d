"""Masks as the kernel lays them out against :meth:`flashlib.masks.Mask.intervals`, in Triton's interpreter.

TRITON_INTERPRET=1 python tests/kernels/laid_out.py --seed 0 --problems 40
"""

import random

import torch
from seeds import seeds_asked_for

from flashlib.launch.options import KernelOptions
from flashlib.launch.rules import RuledOptions, fits, rule_launch, rule_of
from flashlib.masks import NO_LIMIT, Causal, KeyLengths, Varlen, Window

LENGTHS = (1, 2, 60, 127, 128, 129, 300)


def random_mask(rng: random.Random, batch: int, q_len: int, kv_len: int):
    def ends(length: int, count: int) -> torch.Tensor:
        return torch.tensor([0, *sorted(rng.randint(0, length) for _ in range(count))])

    def offset():
        shape = rng.choice((None, (), (batch,), (1, q_len), (batch, q_len)))
        if shape is None:
            return None
        if shape == ():
            return rng.randint(-kv_len, 2 * kv_len)
        far = rng.choice((kv_len, 2**40, 2**62))
        return torch.tensor([rng.randint(-far, far) if rng.random() < 0.2 else rng.randint(-q_len, kv_len) for _ in range(torch.Size(shape).numel())]).view(shape)  # fmt: skip

    def width():
        return rng.choice((None, 0, rng.randrange(kv_len + 2), NO_LIMIT))

    count = rng.choice((1, 2, 7, 70, 200))
    parts = {
        "lengths": lambda: KeyLengths(torch.tensor([rng.randint(0, kv_len) for _ in range(batch)])),
        "packed": lambda: Varlen(
            *(x.to(rng.choice((torch.int32, torch.int64))) for x in (ends(q_len, count), ends(kv_len, count)))
        ),
        "window": lambda: Window(width(), width(), offset=offset()),
        "causal": lambda: Causal(offset=offset()),
    }
    names = rng.sample(list(parts), rng.randint(1, len(parts)))
    mask = parts[names[0]]()
    for name in names[1:]:
        part = parts[name]()
        if isinstance(mask, Varlen) and isinstance(part, Window) and rng.random() < 0.7:
            part = Window(part.left, part.right, offset=mask)
        mask = mask & part
    return mask


def check_one(seed: int) -> int:
    rng = random.Random(seed)
    batch, q_len, kv_len = rng.choice((1, 3)), rng.choice(LENGTHS), rng.choice(LENGTHS)
    mask, causal = random_mask(rng, batch, q_len, kv_len), rng.random() < 0.3
    found = rule_of(mask, causal)
    if found is None:
        return 0
    rule, tensors = found
    assert fits(rule, tensors, q_len, kv_len), (mask, seed)
    q, k = torch.zeros(batch, 2, q_len, 16), torch.zeros(batch, 1, kv_len, 16)
    options = KernelOptions(None, None, None, None, None, None, 1.0, 0.0)
    launch, start, stop = rule_launch(q, k, RuledOptions(options, rule, tuple(tensors)))
    start.fill_(-7)
    stop.fill_(-7)
    launch.start()
    expected = (mask & Causal() if causal else mask).intervals(batch, q_len, kv_len)
    assert torch.equal(start.long(), expected.start.expand(start.shape)), (seed, mask, causal)
    assert torch.equal(stop.long(), expected.stop.expand(stop.shape)), (seed, mask, causal)
    return 1


def main() -> None:
    checked = sum(map(check_one, seeds_asked_for(__doc__)))
    assert checked, "no mask drawn was one that the kernel lays out"
    print(f"{checked} masks laid out as they should be")


if __name__ == "__main__":
    main()

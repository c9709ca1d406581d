"""Jagged nested tensors: each sequence is held against the oracle by itself, forward and backward."""

import pytest
import torch

from flashlib import attention
from flashlib.masks import Causal, KeyLengths, Window
from flashlib.reference import check, check_gradients

RULES = [
    ({}, Window(None, None)),
    ({"causal": True}, Causal()),
    ({"mask": Window(3, 2)}, Window(3, 2)),
    ({"mask": Window(4, None), "causal": True, "softcap": 5.0}, Window(4, 0)),
]


def jagged(parts, **options):
    """``[B, H, j, D]`` from parts ``[length, H, D]``, and the leaf that it is a view of."""
    leaf = torch.nested.nested_tensor(parts, layout=torch.jagged, **options)
    return leaf.transpose(1, 2), leaf


def by_heads(part):
    return part.transpose(0, 1)[None]


@pytest.mark.parametrize("options, mask", RULES, ids=range(len(RULES)))
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("extra", ["", "alibi", "sinks"])
def test_each_sequence_is_its_own_problem(options, mask, cross, extra, rng):
    lengths_q = [rng.randint(1, 12) for _ in range(rng.randint(1, 4))]
    lengths_k = [rng.randint(1, 15) for _ in lengths_q] if cross else lengths_q
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float64))
    q, k = (
        [torch.randn(n, heads, 8).to(dtype) for n in lengths] for heads, lengths in ((4, lengths_q), (2, lengths_k))
    )
    v = [torch.randn(n, 2, 5).to(dtype) for n in lengths_k]
    (nq, leaf_q), (nk, leaf_k) = (jagged(x, requires_grad=True) for x in (q, k))
    leaf_v = torch.nested.nested_tensor_from_jagged(torch.cat(v).requires_grad_(), leaf_k.offsets())
    exact = {"mask": mask, "softcap": options.get("softcap", 0.0)}
    if extra == "alibi":
        options = options | {"alibi_slopes": torch.rand(4)}
        exact["alibi_slopes"] = options["alibi_slopes"]
    if extra == "sinks":
        options = options | {"sinks": torch.randn(4)}
        exact["sinks"] = options["sinks"]
    out, lse = attention(nq, nk, leaf_v.transpose(1, 2), **options, return_lse=True)
    assert out.shape[:2] == nq.shape[:2] and out.shape[2] == nq.shape[2] and out.shape[3] == 5 and lse.dim() == 3
    (
        out + attention(nq, nk, leaf_v.transpose(1, 2), **options)
    ).sum()  # the same j: nested tensors of one call go together
    for n, parts in enumerate(zip(q, k, v, strict=True)):
        comparison = check(out.unbind()[n][None], lse.unbind()[n][None], *map(by_heads, parts), **exact)
        assert comparison.passed, (lengths_q, lengths_k, dtype, comparison.message)
    if extra == "sinks":
        return
    grad = torch.randn_like(out.transpose(1, 2).values())
    gradients = torch.autograd.grad(out.transpose(1, 2).values(), (leaf_q, leaf_k), grad)
    grad_v = torch.autograd.grad(
        attention(nq, nk, leaf_v.transpose(1, 2), **options).transpose(1, 2).values(), leaf_v, grad
    )[0]
    begin = 0
    for n, parts in enumerate(zip(q, k, v, strict=True)):
        of_sequence = [by_heads(x.unbind()[n]) for x in (*gradients, grad_v)]
        grad_out = by_heads(grad[begin : begin + lengths_q[n]])
        begin += lengths_q[n]
        comparison = check_gradients(of_sequence, *map(by_heads, parts), grad_out, **exact)
        assert comparison.passed, (lengths_q, lengths_k, dtype, comparison.message)


def test_holes_are_closed(rng):
    """A jagged tensor may have more memory than its sequences fill; what lies between them is not read."""
    values = torch.randn(12, 2, 8)
    values[3:6] = values[10:] = float("nan")
    offsets, lengths = torch.tensor([0, 6, 12]), torch.tensor([3, 4])
    with_holes = torch.nested.nested_tensor_from_jagged(values, offsets, lengths).transpose(1, 2)
    whole, _ = jagged([values[:3], values[6:10]])
    out = attention(with_holes, with_holes, with_holes, causal=True)
    torch.testing.assert_close(
        out.transpose(1, 2).values(), attention(whole, whole, whole, causal=True).transpose(1, 2).values()
    )


PARTS = [torch.randn(n, 2, 8) for n in (3, 5)]
N, LEAF = jagged(PARTS)
OTHER, _ = jagged([torch.randn(n, 2, 8) for n in (4, 4)])
THREE, _ = jagged([torch.randn(n, 2, 8) for n in (4, 3, 1)])
DENSE = torch.randn(2, 2, 5, 8)
BAD = [
    (lambda: attention(LEAF, N, N), ValueError, "q is a jagged nested tensor of [2, j, 2, 8]; expected [B, H, j, D]"),
    (lambda: attention(N, torch.nested.nested_tensor(PARTS, layout=torch.strided), N), TypeError, "k is a nested tensor of layout torch.strided; expected torch.jagged"),
    (lambda: attention(N, N, DENSE), TypeError, "q, k and v must all be jagged nested tensors or none of them; v is a dense tensor"),
    (lambda: attention(DENSE, N, N), TypeError, "q is a dense tensor"),
    (lambda: attention(N, N, OTHER), ValueError, "k and v must have sequences of the same lengths"),
    (lambda: attention(N, THREE, THREE), ValueError, "q has 2 sequences but k has 3"),
    (lambda: attention(N, N, N, mask=KeyLengths([3, 5])), ValueError, "jagged nested tensors take Causal() and Window(left, right) without offsets"),
    (lambda: attention(N, N, N, mask=Causal(offset=1)), ValueError, "flashlib.masks.Varlen(q.offsets())"),
    (lambda: attention(N, N, N, alibi_slopes=torch.rand(2, 2)), ValueError, "expected [Hq], shared by all sequences"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", BAD, ids=range(len(BAD)))
def test_what_cannot_be_taken_says_what_to_do(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
